"""Accepts connections on one port: limits, protocol choice, drain.

A connection becomes HTTP/2 by ALPN or by its preface (prior knowledge, RFC 9113 §3.3), else
HTTP/1.1. This module knows connections, not requests. Of TLS connections it hears when their
handshake has ended: unfinished ones count for no limit and end by their timer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

from l7proxy import metrics
from l7proxy.http1_server import Http1Server
from l7proxy.http2_server import Http2Server
from l7proxy.streams import ConnectionInfo, Handler
from l7proxy.tls_server import ServerTLS
from mesh.model.nodeconfig import Settings

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_BUSY = (
    b"HTTP/1.1 %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
)


class Drainable(Protocol):
    def drain(self) -> None: ...


@dataclass(slots=True)
class Admission:
    """Counts this worker's client connections, in all and by client address."""

    total: int = 0
    by_client: Counter[str] = field(default_factory=Counter)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self, client: str, settings: Settings) -> str | None:
        """Count a connection in; or the reason why it must not be."""
        if self.total >= settings.max_connections:
            return "max_connections"
        if self.by_client[client] >= settings.max_connections_per_client:
            return "max_connections_per_client"
        self.total += 1
        self.by_client[client] += 1
        self.idle.clear()
        metrics.CONNECTIONS.set(self.total)
        return None

    def leave(self, client: str) -> None:
        self.total -= 1
        self.by_client[client] -= 1
        if not self.by_client[client]:
            del self.by_client[client]
        if not self.total:
            self.idle.set()
        metrics.CONNECTIONS.set(self.total)


class Acceptor:
    """Makes a protocol for every connection of one port, and remembers the open ones.

    `context` is for the connections that come next, None without TLS. Once drained it lets nobody
    in any more, those who are in the middle of a handshake included.
    """

    def __init__(
        self,
        *,
        handler: Handler,
        settings: Callable[[], Settings],
        admission: Admission,
        context: ssl.SSLContext | None,
    ) -> None:
        self.handler = handler
        self.settings = settings
        self.admission = admission
        self.context = context
        self.draining = False
        self.open: set[Drainable] = set()

    def __call__(self) -> asyncio.Protocol:
        return _Undecided(self)

    def drain(self) -> None:
        self.draining = True
        for connection in tuple(self.open):
            connection.drain()


class _Undecided(asyncio.Protocol):
    """A connection until it is known which protocol it speaks."""

    def __init__(self, port: Acceptor) -> None:
        self._port = port
        self._settings = port.settings()
        self._received = b""
        self._client: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._chosen = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        local = transport.get_extra_info("sockname")
        if not peer or not local or self._port.draining:  # already gone, or too late
            transport.close()
            return
        client = _plain(peer)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if refused := self._port.admission.enter(client[0], self._settings):
            self._refuse(refused, tls is not None)
            return
        self._client = client[0]
        self._info = ConnectionInfo(
            peer=client,
            local=_plain(local),
            tls=tls is not None,
            sni=ServerTLS.sni_of(tls) if tls else None,
            tls_version=tls.version() if tls else None,
        )
        self._port.open.add(self)
        if tls is not None:
            self._choose(http2=tls.selected_alpn_protocol() == "h2")
            return
        self._timer = asyncio.get_running_loop().call_later(
            self._settings.head_timeout_s, self._too_slow
        )

    def _refuse(self, reason: str, tls: bool) -> None:
        metrics.REFUSED.labels(reason).inc()
        if not tls:
            status = (
                b"429 Too Many Requests"
                if reason == "max_connections_per_client"
                else b"503 Service Unavailable"
            )
            text = b"too many connections\n"
            self._transport.write(_BUSY % (status, len(text), text))
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._client is None:
            return
        self._received += data
        if self._received.startswith(_PREFACE):
            self._choose(http2=True)
        elif not _PREFACE.startswith(self._received):
            self._choose(http2=False)

    def _choose(self, *, http2: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
        scheme = b"https" if self._info.tls else b"http"
        kind = Http2Server if http2 else Http1Server
        connection: Http1Server | Http2Server = kind(
            self._port.handler,
            self._info,
            self._settings,
            scheme=scheme,
            on_refused=_count_refused,
            on_closed=lambda: self._leave(connection),
        )
        self._port.open.discard(self)
        self._port.open.add(connection)
        self._chosen = True
        self._transport.set_protocol(connection)
        connection.connection_made(self._transport)
        if self._received:
            connection.data_received(self._received)

    def eof_received(self) -> bool | None:
        return None  # nothing was asked for: close

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._chosen and self._client is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._leave(self)

    def _leave(self, connection: Drainable) -> None:
        self._port.open.discard(connection)
        if self._client is not None:
            self._port.admission.leave(self._client)
            self._client = None

    def _too_slow(self) -> None:
        metrics.REFUSED.labels("head_timeout").inc()
        self._transport.abort()

    def drain(self) -> None:
        self._transport.close()


def _count_refused(reason: str) -> None:
    metrics.REFUSED.labels(reason).inc()


def _plain(address: tuple[str, int]) -> tuple[str, int]:
    """(address, port) with IPv4-mapped IPv6 as IPv4, and without scope."""
    host = address[0].partition("%")[0]
    if host.startswith("::ffff:"):
        mapped = ipaddress.IPv6Address(host).ipv4_mapped
        host = str(mapped) if mapped else host
    return host, address[1]
