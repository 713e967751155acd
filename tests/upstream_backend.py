"""A backend on a real socket whose behaviour the test directs, and requests through leases."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Iterator

from l7proxy.lease import Lease
from l7proxy.message import RequestHead
from mesh.model.nodeconfig import Endpoint

GET = RequestHead(b"GET", b"http", b"backend.test", b"/", None, [])


class Backend:
    """Answers every request with 200 and its own name, one connection after the other kept.

    `connections` counts those accepted, `requests` the heads read. `hold`: answers wait until
    `go_on`. `open` are the connections' writers.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.connections = 0
        self.requests = 0
        self.open: set[asyncio.StreamWriter] = set()
        self.endpoint = Endpoint("127.0.0.1", 0)
        self.changed = asyncio.Condition()
        self._go = asyncio.Event()
        self._go.set()

    @property
    def id(self) -> str:
        return f"127.0.0.1:{self.endpoint.port}"

    def hold(self) -> None:
        self._go.clear()

    def go_on(self) -> None:
        self._go.set()

    async def until(self, **counts: int) -> None:
        """Wait until `connections`, `requests` or `open` are so many."""

        def reached() -> bool:
            have = {**vars(self), "open": len(self.open)}
            return all(have[name] == count for name, count in counts.items())

        async with self.changed:
            await self.changed.wait_for(reached)

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(writer)
        await self._tell()
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.requests += 1
                await self._tell()
                await self._go.wait()
                body = self.name.encode()
                head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.open.discard(writer)
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            await self._tell()

    def close_all(self) -> None:
        """FIN on every connection, at once."""
        for writer in self.open:
            with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as sock:
                sock.shutdown(socket.SHUT_WR)

    def reset_all(self) -> None:
        """RST on every connection, in the next step of the loop."""
        for writer in self.open:
            if writer.is_closing():
                continue  # no socket any more: `serve` takes it out of `open` a step later
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


@contextlib.asynccontextmanager
async def backend(name: str = "a", context: ssl.SSLContext | None = None) -> AsyncIterator[Backend]:
    made = Backend(name)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
    made.endpoint = Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        yield made
    finally:
        server.close()
        made.go_on()
        for writer in tuple(made.open):
            writer.transport.abort()
        await made.until(open=0)


@contextlib.contextmanager
def refusing() -> Iterator[Endpoint]:
    """An endpoint whose port is bound but does not listen: connection refused."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield Endpoint("127.0.0.1", sock.getsockname()[1])


@contextlib.contextmanager
def black_hole() -> Iterator[Endpoint]:
    """An endpoint whose accept queue is full: its SYNs go unanswered."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield Endpoint("127.0.0.1", listener.getsockname()[1])


async def finish(lease: Lease, status: int = 200) -> str:
    """Send a GET and read the answer: the backend's name. `status` is what health is told."""
    try:
        await lease.stream.request(GET)
        await lease.stream.response()
        body = b""
        while chunk := await lease.stream.read():
            body += chunk
        lease.succeeded(status)
        return body.decode()
    finally:
        lease.stream.abort("test is done with it")
        lease.release()
