"""Flow records on their way from worker to agent: gathered, sent in batches, lost if need be.

What nobody could receive is not even made: without a channel, or while the agent does not read what
it was sent, records are lost, and counted. Knows requests as the log does, and no kernel.
"""

from __future__ import annotations

import asyncio
import time
from functools import lru_cache

from l7proxy import metrics
from l7proxy.accesslog import MAX_NAME, cut, protocol
from l7proxy.handles import Destination
from l7proxy.peers import identities
from l7proxy.record import Ends, Record
from l7proxy.streams import ConnectionInfo
from mesh.model.channel import encode_frame
from mesh.model.flow import Encryption, Flow, Flows, HttpFlow, Peer, Verdict

# A batch is sent when it has so many records, or this long after its first, in seconds.
_BATCH = 256
_FLUSH_S = 0.1
# Bytes that may wait for the agent to read them; some 10,000 records.
_MAX_BACKLOG = 2 * 1024 * 1024


class FlowLog:
    """The records that are to be sent."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._records: list[Flow] = []
        self._lost = 0
        self._timer: asyncio.TimerHandle | None = None

    def connect(self, transport: asyncio.Transport) -> None:
        """Send through this channel from now on."""
        self._transport = transport

    def disconnect(self, transport: asyncio.Transport) -> None:
        """The channel is gone, if it was not replaced before."""
        if self._transport is transport:
            self._transport = None

    @property
    def wanted(self) -> bool:
        """Somebody reads. What is not made because of this is to be counted with `lose`."""
        transport = self._transport
        return transport is not None and transport.get_write_buffer_size() <= _MAX_BACKLOG

    def lose(self, count: int = 1) -> None:
        self._lost += count
        metrics.FLOWS_LOST.inc(count)

    def request(self, record: Record, info: ConnectionInfo) -> None:
        """A request that has ended, its record closed."""
        # Of a batch that has begun all is made: it is sent, or lost, as a whole.
        if not self._records and not self.wanted:
            self.lose()
            return
        ends = record.ends
        if ends is None:
            ends = record.ends = _ends(record, info)
        head = record.head
        http = HttpFlow(
            cut(head.method, MAX_NAME),
            cut(record.host, MAX_NAME),
            cut(record.path),
            record.status,
            protocol(head.version),
            round(record.elapsed * 1000, 3),
            record.bytes_in,
            record.bytes_out,
            record.request_id,
        )
        self._add(
            Flow(
                time.time_ns(),
                record.verdict,
                ends.source,
                ends.destination,
                reason=record.reason,
                service=record.service,
                http=http,
                gateway=ends.gateway,
                route=record.route,
                policy=record.policy,
                encryption=ends.encryption,
            )
        )

    def connection(
        self,
        source: Peer,
        destination: Peer,
        verdict: Verdict,
        reason: str,
        bytes_in: int,
        bytes_out: int,
        encryption: Encryption,
        policy: str = "",
    ) -> None:
        """A relayed connection that has ended."""
        if not self.wanted:
            self.lose()
            return
        self._add(
            Flow(
                time=time.time_ns(),
                verdict=verdict,
                source=source,
                destination=destination,
                reason=reason,
                bytes_in=bytes_in,
                bytes_out=bytes_out,
                policy=policy,
                encryption=encryption,
            )
        )

    def _add(self, flow: Flow) -> None:
        self._records.append(flow)
        if len(self._records) >= _BATCH:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(_FLUSH_S, self.flush)

    def flush(self) -> None:
        """Send what there is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        records, self._records = self._records, []
        if not records:
            return
        if self._transport is None or not self.wanted:
            self.lose(len(records))
            return
        lost, self._lost = self._lost, 0
        self._transport.write(encode_frame(Flows(tuple(records), lost)))


def _ends(record: Record, info: ConnectionInfo) -> Ends:
    endpoint, way, steered = record.destination, record.way, info.steered
    own, other = identities(way)
    if endpoint is not None:
        destination = _peer(endpoint.address, endpoint.port, endpoint.name, other)
    else:
        asked = steered.asked if steered is not None else Destination(*info.local)
        destination = _peer(asked.address, asked.port)
    address, port = info.peer
    # Behind proxies of ours the client is another, and its port unknown.
    of_peer = port if record.client == address else 0
    return Ends(
        _peer(record.client, of_peer, "", own if steered is not None else ""),
        destination,
        record.gateway if steered is None else "",
        record.encryption or (way.encryption if way is not None else "none"),
    )


@lru_cache(maxsize=4096)
def _peer(address: str, port: int, pod: str = "", spiffe_id: str = "") -> Peer:
    return Peer(address, port, pod=pod, spiffe_id=spiffe_id)
