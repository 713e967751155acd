"""Accepts connections on one port: limits, protocol choice, drain.

A connection becomes HTTP/2 by ALPN or by its preface (prior knowledge, RFC 9113 §3.3), else
HTTP/1.1. Every connection counts from its first moment, a TLS one before its handshake. This
module knows connections, not requests.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

from l7proxy import metrics
from l7proxy.http1_server import Http1Server
from l7proxy.http2_server import Http2Server
from l7proxy.streams import ConnectionInfo, Handler
from l7proxy.tasks import spawn
from l7proxy.tls_server import ServerTLS
from mesh.model.nodeconfig import Settings

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_BUSY = (
    b"HTTP/1.1 %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
)


# Connections taken in one go, before others get their turn.
_BATCH = 32


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
    """Takes the connections of one port, and remembers the open ones.

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

    def accept(self, listening: socket.socket) -> None:
        """Take what waits on a listening socket (not blocking), a bounded number: other workers
        accept on it too. OSError: no descriptor or memory is left for another connection."""
        for _ in range(_BATCH):
            try:
                sock, peer = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            self._take(sock, _plain(peer))

    def _take(self, sock: socket.socket, client: tuple[str, int]) -> None:
        settings = self.settings()
        if refused := self.admission.enter(client[0], settings):
            self._refuse(sock, refused)
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        spawn(self._begin(sock, client, settings), name="accept")

    async def _begin(
        self, sock: socket.socket, client: tuple[str, int], settings: Settings
    ) -> None:
        connection = _Undecided(self, client, settings)
        context = self.context
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=context,
                ssl_handshake_timeout=settings.head_timeout_s if context else None,
                ssl_shutdown_timeout=settings.connect_timeout_s if context else None,
            )
        except OSError:  # of the handshake; it has closed the socket
            _count_refused("tls_handshake")
            connection.leave(connection)
        except BaseException:
            connection.leave(connection)
            raise

    def _refuse(self, sock: socket.socket, reason: str) -> None:
        _count_refused(reason)
        with sock:
            if self.context is None:
                status = (
                    b"429 Too Many Requests"
                    if reason == "max_connections_per_client"
                    else b"503 Service Unavailable"
                )
                text = b"too many connections\n"
                try:
                    sock.send(_BUSY % (status, len(text), text), socket.MSG_DONTWAIT)
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass  # gone already

    def drain(self) -> None:
        self.draining = True
        for connection in tuple(self.open):
            connection.drain()


class _Undecided(asyncio.Protocol):
    """A connection until it is known which protocol it speaks."""

    def __init__(self, port: Acceptor, client: tuple[str, int], settings: Settings) -> None:
        self._port = port
        self._client: tuple[str, int] | None = client
        self._settings = settings
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None
        self._chosen = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        local = transport.get_extra_info("sockname")
        if not local or self._client is None or self._port.draining:  # already gone, or too late
            transport.close()
            return
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        self._info = ConnectionInfo(
            peer=self._client,
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

    def data_received(self, data: bytes) -> None:
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
            on_closed=lambda: self.leave(connection),
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
        if not self._chosen:
            if self._timer is not None:
                self._timer.cancel()
            self.leave(self)

    def leave(self, connection: Drainable) -> None:
        """`connection`, this one or what it has become, is over. Idempotent."""
        self._port.open.discard(connection)
        if self._client is not None:
            self._port.admission.leave(self._client[0])
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
