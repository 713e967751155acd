"""A TLS server around a ServerTLS, and a blocking client that shows what it got."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass

from certs.selfsigned import Authority
from l7proxy.tls_server import ServerTLS
from mesh.model.nodeconfig import CertificateSection, ClientValidation, Listener, PortSection

AUTHORITY = Authority.create("test root")
OTHER_AUTHORITY = Authority.create("another root")


def certificate(*dns: str, authority: Authority = AUTHORITY, **more: object) -> CertificateSection:
    return CertificateSection(*authority.issue(dns=dns, **more))  # type: ignore[arg-type]


def port_section(*listeners: Listener, validation: ClientValidation | None = None) -> PortSection:
    return PortSection("127.0.0.1", 443, "HTTPS", "ns/gw", listeners, validation)


class _Greeter(asyncio.Protocol):
    """Answers any bytes with what the server knows of the connection, and stays."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        tls = self.transport.get_extra_info("ssl_object")
        self.transport.write(f"{ServerTLS.sni_of(tls)} {tls.selected_alpn_protocol()}\n".encode())


@contextlib.asynccontextmanager
async def serving(context: ssl.SSLContext) -> AsyncIterator[int]:
    """Yields the port."""
    server = await asyncio.get_running_loop().create_server(
        _Greeter, "127.0.0.1", 0, ssl=context, ssl_shutdown_timeout=1
    )
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


@dataclass
class Seen:
    """`greeting` is "<sni> <alpn>" as the server saw it; `names` the DNS SANs of its
    certificate; `key_type` tells RSA from EC."""

    greeting: str
    names: tuple[str, ...]
    der: bytes
    version: str
    session: ssl.SSLSession | None
    reused: bool
    cipher: str


def client_context(
    *,
    own: CertificateSection | None = None,
    alpn: tuple[str, ...] = (),
    version: ssl.TLSVersion | None = None,
    ca_pem: str = AUTHORITY.certificate_pem,
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=ca_pem)
    if own is not None:
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(own.key_pem + own.chain_pem)
            file.flush()
            context.load_cert_chain(file.name)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


def _handshake(
    port: int, sni: str | None, context: ssl.SSLContext, session: ssl.SSLSession | None
) -> Seen:
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname=sni, session=session) as tls,
    ):
        tls.sendall(b"?")
        greeting = tls.recv(1000)
        if not greeting:
            raise ConnectionResetError("closed without an answer")
        peer = tls.getpeercert() or {}
        names = tuple(value for kind, value in peer.get("subjectAltName", ()) if kind == "DNS")
        chosen = tls.cipher()
        return Seen(
            greeting.decode().strip(),
            names,
            tls.getpeercert(binary_form=True) or b"",
            tls.version() or "",
            tls.session,
            bool(tls.session_reused),
            chosen[0] if chosen else "",
        )


async def handshake(
    port: int,
    sni: str | None,
    context: ssl.SSLContext | None = None,
    session: ssl.SSLSession | None = None,
) -> Seen:
    """Connect in a thread. ssl.SSLError or ConnectionError: refused."""
    return await asyncio.to_thread(_handshake, port, sni, context or client_context(), session)


async def refused(
    port: int,
    sni: str | None,
    context: ssl.SSLContext | None = None,
    session: ssl.SSLSession | None = None,
) -> None:
    """The server lets nobody in. Which alert it has in mind does not show: asyncio and uvloop close
    without sending it."""
    try:
        seen = await handshake(port, sni, context, session)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionError):
        return
    raise AssertionError(f"let in: {seen}")


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
