"""A client for one request on a fresh connection: HTTP/1.1, HTTP/2 over TLS, HTTP/2 with prior
knowledge; in clear or with TLS. Redirects are not followed, connections are not kept."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h11


class RequestFailed(Exception):
    """No whole response came: refused, handshake failed, reset, timed out."""


@dataclass(frozen=True, slots=True)
class TLS:
    """What the server's certificate must be for and chain to (a leaf may be its own anchor).
    Without `client_chain_pem` no certificate is presented."""

    server_name: str
    ca_pem: str
    client_chain_pem: str | None = None
    client_key_pem: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """`host` is the Host or :authority field; `protocol` HTTP/1.1, H2, H2C_PRIOR_KNOWLEDGE, or TCP:
    the body is sent and a line is read, which is the response's body.
    `family`: which addresses of a name to take, such as socket.AF_INET6; 0 for any."""

    address: str
    port: int
    method: str = "GET"
    target: str = "/"
    host: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    protocol: str = "HTTP/1.1"
    tls: TLS | None = None
    family: int = 0


@dataclass(slots=True)
class Response:
    """Header and trailer names are lower case."""

    status: int
    headers: dict[str, list[str]] = field(default_factory=dict)
    body: bytes = b""
    trailers: dict[str, list[str]] = field(default_factory=dict)
    protocol: str = "HTTP/1.1"

    def header(self, name: str) -> str | None:
        values = self.headers.get(name.lower())
        return None if values is None else ",".join(values)


async def round_trip(request: Request, timeout_s: float = 10.0) -> Response:
    """Send a request, read the whole response. RequestFailed otherwise."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _round_trip(request)
    except TimeoutError:
        raise RequestFailed(f"no response within {timeout_s:g} s") from None
    except (OSError, EOFError, h11.ProtocolError, h2.exceptions.ProtocolError) as error:
        raise RequestFailed(f"{type(error).__name__}: {error}") from error


async def _round_trip(request: Request) -> Response:
    http2 = request.protocol in ("H2", "H2C_PRIOR_KNOWLEDGE")
    if request.protocol == "H2C_PRIOR_KNOWLEDGE" and request.tls is not None:
        raise RequestFailed("HTTP/2 with prior knowledge is not for TLS")
    context = _context(request.tls, "h2" if http2 else "http/1.1") if request.tls else None
    reader, writer = await asyncio.open_connection(
        request.address,
        request.port,
        family=request.family,
        ssl=context,
        server_hostname=request.tls.server_name if request.tls else None,
    )
    try:
        if request.tls is not None:
            certificate = writer.get_extra_info("peercert")
            if not _covers(certificate, request.tls.server_name):
                raise RequestFailed(f"the certificate is not for {request.tls.server_name}")
        if request.protocol == "TCP":
            return await _line(request, reader, writer)
        if not http2:
            return await _http1(request, reader, writer)
        if context is not None:
            chosen = writer.get_extra_info("ssl_object").selected_alpn_protocol()
            if chosen != "h2":
                raise RequestFailed(f"ALPN chose {chosen}, not h2")
        return await _http2(request, reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _context(tls: TLS, alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=tls.ca_pem)
    # A leaf may be the trust anchor itself: the suite's listener certificates are self-signed.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # OpenSSL would not take *.org for a wildcard; `_covers` does.
    context.check_hostname = False
    context.set_alpn_protocols([alpn])
    if tls.client_chain_pem is not None:
        with pem_files(tls.client_chain_pem, tls.client_key_pem or "") as (chain, key):
            context.load_cert_chain(chain, key)
    return context


def _covers(certificate: dict[str, Any], name: str) -> bool:
    """Whether a DNS name of the certificate is `name`; "*" stands for the leftmost label."""
    names = {value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"}
    _, dot, rest = name.partition(".")
    return name in names or f"*{dot}{rest}" in names


@contextlib.contextmanager
def pem_files(chain_pem: str, key_pem: str) -> Iterator[tuple[str, str]]:
    """Files, as the ssl module wants them, for as long as it takes to read them."""
    with tempfile.NamedTemporaryFile("w") as chain, tempfile.NamedTemporaryFile("w") as key:
        chain.write(chain_pem)
        key.write(key_pem)
        chain.flush()
        key.flush()
        yield chain.name, key.name


async def _line(
    request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Response:
    writer.write(request.body)
    line = await reader.readline()
    if not line:
        raise EOFError("the connection ended without a line")
    return Response(200, body=line, protocol="TCP")


async def _http1(
    request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Response:
    connection = h11.Connection(h11.CLIENT)
    headers = [("Host", request.host), *request.headers, ("Connection", "close")]
    if request.body:
        headers.append(("Content-Length", str(len(request.body))))
    head = h11.Request(method=request.method, target=request.target, headers=headers)
    data = connection.send(head) or b""
    if request.body:
        data += connection.send(h11.Data(request.body)) or b""
    data += connection.send(h11.EndOfMessage()) or b""
    writer.write(data)
    await writer.drain()
    response: Response | None = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            response = Response(event.status_code)
            _collect(response.headers, event.headers)
        elif isinstance(event, h11.Data) and response is not None:
            response.body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage) and response is not None:
            _collect(response.trailers, event.headers)
            return response
        elif isinstance(event, h11.ConnectionClosed):
            raise EOFError("the connection ended before the response did")


async def _http2(
    request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Response:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
    connection.initiate_connection()
    headers = [
        (":method", request.method),
        (":scheme", "https" if request.tls else "http"),
        (":authority", request.host),
        (":path", request.target),
        *((name.lower(), value) for name, value in request.headers),
    ]
    connection.send_headers(1, headers, end_stream=not request.body)
    if request.body:
        connection.send_data(1, request.body, end_stream=True)
    writer.write(connection.data_to_send())
    response = Response(0, protocol="HTTP/2.0")
    while True:
        data = await reader.read(65536)
        if not data:
            raise EOFError("the connection ended before the response did")
        for event in connection.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                fields = list(event.headers or ())
                response.status = int(next(value for name, value in fields if name == b":status"))
                _collect(response.headers, [pair for pair in fields if pair[0] != b":status"])
            elif isinstance(event, h2.events.TrailersReceived):
                _collect(response.trailers, event.headers or ())
            elif isinstance(event, h2.events.DataReceived):
                response.body += event.data or b""
                connection.acknowledge_received_data(event.flow_controlled_length or 0, 1)
            elif isinstance(event, h2.events.StreamEnded):
                return response
            elif isinstance(event, h2.events.StreamReset):
                raise EOFError(f"RST_STREAM, error code {event.error_code}")
            elif isinstance(event, h2.events.ConnectionTerminated):
                raise EOFError(f"GOAWAY, error code {event.error_code}")
        writer.write(connection.data_to_send())


def _collect(target: dict[str, list[str]], fields: object) -> None:
    for name, value in fields:  # type: ignore[attr-defined]  # h11 and h2 each have a type of their own
        target.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
