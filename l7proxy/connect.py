"""A new connection to an endpoint: socket or tunnel, TLS, and the HTTP version that its cluster
speaks."""

from __future__ import annotations

import asyncio
import select
import ssl
from collections.abc import Callable

from l7proxy.balance import Member
from l7proxy.dial import DialFailed
from l7proxy.handles import Kernel
from l7proxy.http1_client import Http1Client
from l7proxy.http2_client import Http2Client
from l7proxy.peers import Caller, Source, Tunnelled
from l7proxy.pool import ConnectFailed
from l7proxy.reach import reach
from l7proxy.streams import ClientConnection
from l7proxy.tls_client import ClientTLS, PeerRefused, refusal
from l7proxy.tls_stream import TLSStream
from l7proxy.tunnel import Digger
from l7proxy.tunnel_wire import Kind
from mesh.model.nodeconfig import Settings


async def connect_to(
    member: Member,
    tls: ClientTLS | None,
    settings: Settings,
    kernel: Kernel,
    on_change: Callable[[ClientConnection], None],
    *,
    http2: bool,
) -> tuple[ClientConnection, select.poll]:
    """A connection, and a poll that tells when its peer is gone. ConnectFailed."""
    try:
        sock, unread, cookie = await reach(kernel, *member.target, settings.connect_timeout_s)
    except DialFailed as error:
        raise ConnectFailed(member.id, error.reason, str(error)) from None

    def protocol() -> Http1Client | Http2Client:
        made = _protocol(settings, on_change, unread, tls=tls is not None, http2=http2)
        if isinstance(made, Http1Client) and tls is None:
            made.cookie = cookie
        return made

    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(settings.connect_timeout_s):
            transport, connection = await loop.create_connection(
                protocol,
                sock=sock,
                ssl=tls.context if tls is not None else None,
                server_hostname=tls.server_hostname if tls is not None else None,
                ssl_shutdown_timeout=settings.connect_timeout_s if tls is not None else None,
            )
    except (OSError, TimeoutError) as error:
        raise _failed(member, error, settings) from None
    if tls is not None:
        try:
            tls.check(transport.get_extra_info("ssl_object"))
        except PeerRefused as refused:
            transport.abort()
            raise ConnectFailed(member.id, refused.reason, str(refused)) from None
    return connection, _poll(transport, select.POLLRDHUP)


async def connect_through(
    digger: Digger,
    caller: Caller,
    source: Source,
    member: Member,
    tls: ClientTLS | None,
    settings: Settings,
    on_change: Callable[[ClientConnection], None],
    *,
    http2: bool,
) -> tuple[ClientConnection, select.poll]:
    """The same through a tunnel, for `source` and nobody else. It takes no more requests when the
    tunnel is old, or would not be made any more."""
    way = digger.peers.way(caller, *member.target)
    if not isinstance(way, Tunnelled) or way.source != source:
        raise ConnectFailed(member.id, "way_changed", "it is not to be connected to so any more")
    try:
        # What a backend encrypts itself nobody can read on the way.
        kind: Kind = "http" if tls is None else "tcp"
        tunnel = await digger.open(caller, way, *member.target, kind)
    except DialFailed as error:
        raise ConnectFailed(member.id, error.reason, str(error)) from None
    connection = _protocol(settings, on_change, None, tls=tls is not None, http2=http2)
    stream = tunnel.stream
    if tls is not None:
        inner = TLSStream(tls.context, server_hostname=tls.server_hostname)
        try:
            async with asyncio.timeout(settings.connect_timeout_s):
                stream.set_protocol(inner)
                await inner.handshake()
            tls.check(inner.ssl)
        except (OSError, TimeoutError, PeerRefused) as error:
            stream.abort()
            raise _failed(member, error, settings) from None
        stream = inner
    stream.set_protocol(connection)

    def retire(_: str) -> None:
        connection.close()
        tunnel.call_later(settings.drain_timeout_s, stream.abort)

    tunnel.cut = retire
    tunnel.grow_old = connection.close
    # An idle connection receives nothing: whatever comes, close_notify or else, is its end.
    return connection, _poll(
        stream, select.POLLRDHUP if http2 else select.POLLRDHUP | select.POLLIN
    )


def _protocol(
    settings: Settings,
    on_change: Callable[[ClientConnection], None],
    unread: Callable[[], int] | None,
    *,
    tls: bool,
    http2: bool,
) -> Http1Client | Http2Client:
    if http2:
        scheme = b"https" if tls else b"http"
        return Http2Client(settings, on_change, scheme=scheme, unread=unread)
    return Http1Client(settings, on_change, unread)


def _failed(member: Member, error: Exception, settings: Settings) -> ConnectFailed:
    """What went wrong once there was a connection."""
    match error:
        case TimeoutError():
            why = f"no TLS handshake within {settings.connect_timeout_s:g} s"
            return ConnectFailed(member.id, "connect_timeout", why)
        case PeerRefused():
            return ConnectFailed(member.id, error.reason, str(error))
        case ssl.SSLError():
            refused = refusal(error)
            return ConnectFailed(member.id, refused.reason, str(refused))
        case OSError():
            return ConnectFailed(member.id, "connect_failed", error.strerror or str(error))
    raise error


def _poll(transport: asyncio.Transport, events: int) -> select.poll:
    """Tells when the peer is gone, before the event loop knows."""
    found = select.poll()
    found.register(transport.get_extra_info("socket").fileno(), events)
    return found
