"""Echo pods on sockets: HTTP/1.1 (and WebSocket at /ws), the same inside TLS, HTTP/2 prior
knowledge, gRPC. One event loop serves many pods; each has an address of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import WSMsgType, web

from echo.answer import Memory, Pod, Seen, answer
from echo.h2c import H2cProtocol

_SERVER_NAMES: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


class EchoServers:
    """Listening pods. `memory` has what they logged."""

    def __init__(self) -> None:
        self.memory = Memory()
        self._servers: list[asyncio.Server] = []
        self._http: list[web.Server] = []

    async def http(
        self, pod: Pod, port: int, tls: ssl.SSLContext | None = None, **listen: Any
    ) -> int:
        """Serve HTTP/1.1 on the pod's address; the port (0 asks for any)."""
        server = web.Server(_handler(pod, self.memory), access_log=None)
        self._http.append(server)
        return await self._listen(server, pod, port, ssl=tls, **listen)

    async def h2c(self, pod: Pod, port: int, *, grpc_too: bool = False) -> int:
        """Serve HTTP/2 with prior knowledge."""
        return await self._listen(
            lambda: H2cProtocol(pod, port, self.memory, grpc_too=grpc_too), pod, port
        )

    async def tcp(self, pod: Pod, port: int) -> int:
        """Serve lines: each comes back with the pod's name in front."""

        async def answer_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer), contextlib.suppress(OSError):
                async for line in reader:
                    writer.write(f"{pod.name} ".encode() + line)
                    await writer.drain()

        server = await asyncio.start_server(answer_lines, pod.address, port)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def _listen(self, factory: Callable[[], Any], pod: Pod, port: int, **more: Any) -> int:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(factory, pod.address, port, **more)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for http in self._http:
            await http.shutdown(timeout=0.1)


def server_context(
    chain_pem_file: str, key_pem_file: str, client_ca_pem: str | None = None
) -> ssl.SSLContext:
    """A server's context that notes the server name asked for. With an authority of clients it
    asks for a client certificate (it is shown in the answer) without requiring one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain_pem_file, key_pem_file)
    if client_ca_pem is not None:
        context.load_verify_locations(cadata=client_ca_pem)
        context.verify_mode = ssl.CERT_OPTIONAL
    context.set_alpn_protocols(["http/1.1"])
    context.sni_callback = _note_server_name  # type: ignore[assignment]  # typeshed: sslobj type
    return context


def _note_server_name(sslobj: Any, name: str | None, _context: ssl.SSLContext) -> None:
    _SERVER_NAMES[sslobj] = name or ""


def _tls(request: web.BaseRequest) -> dict[str, object] | None:
    sslobj = request.transport.get_extra_info("ssl_object") if request.transport else None
    if sslobj is None:
        return None
    cipher = sslobj.cipher()
    peer = sslobj.getpeercert(binary_form=True)
    return {
        "version": sslobj.version(),
        "serverName": _SERVER_NAMES.get(sslobj, ""),
        "negotiatedProtocol": sslobj.selected_alpn_protocol() or "",
        "cipherSuite": cipher[0] if cipher else "",
        "peerCertificates": [ssl.DER_cert_to_PEM_cert(peer)] if peer else [],
    }


def _handler(
    pod: Pod, memory: Memory
) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/ws":
            return await _websocket(request)
        await request.read()
        assert request.transport is not None
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in request.raw_headers
            if name.lower() != b"host"
        ]
        seen = Seen(
            method=request.method,
            target=request.raw_path,
            proto=f"HTTP/{request.version.major}.{request.version.minor}",
            host=request.headers.get("Host", ""),
            headers=headers,
            port=request.transport.get_extra_info("sockname")[1],
            tls=_tls(request),
        )
        got = await answer(pod, seen, memory)
        response = web.Response(status=got.status, body=got.body)
        for name, value in got.headers:
            if name == "Content-Type":
                response.headers[name] = value
            else:
                response.headers.add(name, value)
        return response

    return handle


async def _websocket(request: web.BaseRequest) -> web.StreamResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket
