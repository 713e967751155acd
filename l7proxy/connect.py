"""A new connection to an endpoint: socket, TLS, and the HTTP version that its cluster speaks."""

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
from l7proxy.pool import ConnectFailed
from l7proxy.reach import reach
from l7proxy.streams import ClientConnection
from l7proxy.tls_client import ClientTLS, PeerRefused, refusal
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
    address, port = member.endpoint.address, member.endpoint.port
    try:
        sock, unread = await reach(kernel, address, port, settings.connect_timeout_s)
    except DialFailed as error:
        raise ConnectFailed(member.id, error.reason, str(error)) from None

    def protocol() -> Http1Client | Http2Client:
        if http2:
            scheme = b"https" if tls else b"http"
            return Http2Client(settings, on_change, scheme=scheme, unread=unread)
        return Http1Client(settings, on_change, unread)

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
    except TimeoutError:
        why = f"no TLS handshake within {settings.connect_timeout_s:g} s"
        raise ConnectFailed(member.id, "connect_timeout", why) from None
    except ssl.SSLError as error:
        refused = refusal(error)
        raise ConnectFailed(member.id, refused.reason, str(refused)) from None
    except OSError as error:
        raise ConnectFailed(member.id, "connect_failed", error.strerror or str(error)) from None
    if tls is not None:
        try:
            tls.check(transport.get_extra_info("ssl_object"))
        except PeerRefused as refused:
            transport.abort()
            raise ConnectFailed(member.id, refused.reason, str(refused)) from None
    peer_gone = select.poll()
    peer_gone.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
    return connection, peer_gone
