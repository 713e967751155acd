"""The cluster's DNS, as pods see it: names of Services and nothing else.

A Service's name leads to its ClusterIPs, a headless one's to the addresses of its ready pods; every
other name does not exist, because no query leaves the lab. Short names are the resolver's business
(search domains in resolv.conf). Source: Kubernetes' DNS specification 1.1.0, sections 2.3 and 2.4.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import cast

from dnslib import AAAA, QTYPE, RCODE, RR, A, DNSRecord
from dnslib.dns import DNSError

from mesh.lab.plan import CLUSTER_DOMAIN, Addresses, Plan, ServicePlan

_TTL_S = 5
_PORT = 53
_PLAIN_UDP = 512
_MAX_TCP = 65535
# A client on TCP that says nothing.
_IDLE_S = 10.0


class Names:
    """`ready` gives the addresses of the ready pods of a headless Service."""

    def __init__(self, plan: Plan, ready: Callable[[ServicePlan], Iterable[Addresses]]) -> None:
        self._ready = ready
        self._services = {
            f"{one.name}.{one.namespace}.svc.{CLUSTER_DOMAIN}": one for one in plan.services
        }
        # Names between a Service's and the root exist, without addresses (RFC 8020).
        self._parents = {
            name.split(".", depth)[-1] for name in self._services for depth in range(1, 5)
        }

    def answer(self, query: bytes, limit: int | None = None) -> bytes | None:
        """The response to a message, within `limit` octets (None: what the query allows over UDP);
        None: it is no query."""
        try:
            asked = DNSRecord.parse(query)
        except DNSError:
            return None
        if asked.header.qr or not asked.questions:
            return None
        reply = asked.reply(ra=0, aa=1)
        name = str(asked.q.qname).rstrip(".").lower()
        service = self._services.get(name)
        if service is not None:
            for v4, v6 in [service.cluster_ips] if service.cluster_ips else self._ready(service):
                if asked.q.qtype == QTYPE.A:
                    reply.add_answer(RR(asked.q.qname, QTYPE.A, rdata=A(v4), ttl=_TTL_S))
                elif asked.q.qtype == QTYPE.AAAA:
                    reply.add_answer(RR(asked.q.qname, QTYPE.AAAA, rdata=AAAA(v6), ttl=_TTL_S))
        elif name not in self._parents:
            reply.header.rcode = RCODE.NXDOMAIN
        if limit is None:
            # EDNS (RFC 6891) has the size in the class of the OPT record.
            sizes = [record.rclass for record in asked.ar if record.rtype == QTYPE.OPT]
            limit = max(sizes, default=_PLAIN_UDP)
        packed: bytes = reply.pack()
        if len(packed) > limit:
            packed = reply.truncate().pack()
        return packed


async def serve(names: Names, address: str) -> asyncio.Server:
    """Answer on UDP and TCP port 53 of an address until the loop ends. OSError: it is taken."""
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(lambda: _Datagrams(names), local_addr=(address, _PORT))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError, EOFError, TimeoutError):
            while True:
                async with asyncio.timeout(_IDLE_S):
                    length = int.from_bytes(await reader.readexactly(2), "big")
                    answer = names.answer(await reader.readexactly(length), _MAX_TCP)
                if answer is None:
                    return
                writer.write(len(answer).to_bytes(2, "big") + answer)
                await writer.drain()

    return await asyncio.start_server(connected, address, _PORT)


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, names: Names) -> None:
        self._names = names

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio's own is no subclass of it before Python 3.12.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer = self._names.answer(data)
        if answer is not None:
            self._transport.sendto(answer, addr)
