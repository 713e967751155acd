"""HTTP on an accepted connection: which protocol it speaks.

A connection becomes HTTP/2 by ALPN or by its preface (prior knowledge, RFC 9113 §3.3), else
HTTP/1.1. This module knows connections, not requests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import ssl
from collections.abc import Callable
from typing import cast

from l7proxy import metrics
from l7proxy.acceptor import Acceptor, Admission, Client, Drainable, count_refused, plain
from l7proxy.handles import Steered
from l7proxy.http1_server import Http1Server
from l7proxy.http2_server import Http2Server
from l7proxy.lane import Lane
from l7proxy.pairing import Pairing
from l7proxy.streams import ConnectionInfo, Handler
from l7proxy.tls_server import ServerTLS
from mesh.model.nodeconfig import Settings

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_BUSY = (
    b"HTTP/1.1 %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
)


class HttpAcceptor(Acceptor):
    """`context` is for the connections that come next, None without TLS."""

    def __init__(
        self,
        *,
        handler: Handler,
        settings: Callable[[], Settings],
        admission: Admission,
        context: ssl.SSLContext | None = None,
        identify: Callable[[int], Steered | None] | None = None,
        pairing: Callable[[ConnectionInfo], Pairing | None] = lambda _: None,
        lane: Callable[[ConnectionInfo], Lane | None] = lambda _: None,
    ) -> None:
        super().__init__(settings=settings, admission=admission, identify=identify)
        self.handler = handler
        self.context = context
        self.pairing = pairing
        self.lane = lane

    def protocol(self, client: Client) -> asyncio.Protocol:
        """For a connection that somebody else has accepted."""
        return _Undecided(self, client)

    async def begin(self, sock: socket.socket, client: Client) -> None:
        connection = _Undecided(self, client)
        context, settings = self.context, client.settings
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=context,
                ssl_handshake_timeout=settings.head_timeout_s if context else None,
                ssl_shutdown_timeout=settings.connect_timeout_s if context else None,
            )
        except OSError:  # of the handshake; it has closed the socket
            count_refused("tls_handshake")
            connection.leave(connection)
        except BaseException:
            connection.leave(connection)
            raise

    def turn_away(self, sock: socket.socket, reason: str) -> None:
        if self.context is not None:
            return
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


class _Undecided(asyncio.Protocol):
    """A connection until it is known which protocol it speaks."""

    def __init__(self, port: HttpAcceptor, client: Client) -> None:
        self._port = port
        self._client = client
        self._settings = client.settings
        self._over = False
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None
        self._chosen = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        local = transport.get_extra_info("sockname")
        if not local or self._over or self._port.draining:  # already gone, or too late
            transport.close()
            return
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        self._info = ConnectionInfo(
            peer=self._client.address,
            local=plain(local),
            steered=self._client.steered,
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
        info = self._info
        if not http2:
            info = dataclasses.replace(info, pairing=self._port.pairing(info))
            info = dataclasses.replace(info, lane=self._port.lane(info))
        connection: Http1Server | Http2Server = kind(
            self._port.handler,
            info,
            self._settings,
            scheme=scheme,
            on_refused=count_refused,
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
        if not self._over:
            self._over = True
            self._port.left(connection, self._client)

    def _too_slow(self) -> None:
        metrics.REFUSED.labels("head_timeout").inc()
        self._transport.abort()

    def drain(self) -> None:
        self._transport.close()
