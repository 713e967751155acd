"""A connection's transport: what waits to be sent goes out before the end, which is told once."""

from __future__ import annotations

import asyncio
import ssl

import uvloop
from loops import on_both_loops
from support.http1 import shutdown
from tls_peers import certificate, client_context

from l7proxy.http1_link import Link
from l7proxy.tls import load_certificate


def test_a_tls_connection_that_is_closed_after_a_flush_has_sent_all() -> None:
    class Sender(Link):
        def data_received(self, data: bytes) -> None:
            self.ending = asyncio.ensure_future(self.end())
            self.send(b"last words")

        async def end(self) -> None:
            await self.half_close()
            assert self.transport is not None
            self.transport.close()

    async def run() -> bytes:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        load_certificate(context, certificate("a.example"), "c")
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Sender(None), "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=client_context(), server_hostname="a.example"
            )
            writer.write(b"go")
            got = await reader.read()
            writer.close()
            return got

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(run()) == b"last words"


@on_both_loops
async def test_the_peers_end_is_told_once_whatever_is_held_after_it() -> None:
    ends: asyncio.Queue[Link] = asyncio.Queue()

    class Counter(Link):
        def eof_received(self) -> bool:
            self.eof = True
            ends.put_nowait(self)
            return True

    server = await asyncio.get_running_loop().create_server(lambda: Counter(None), "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        shutdown(writer)
        link = await ends.get()
        try:
            for word in (b"some", b"more"):  # it goes on, and is told of what there is to be read
                for paused in (True, False):
                    link.hold(paused)
                link.write((word,))
                assert await reader.readexactly(4) == word
            assert ends.empty()
        finally:
            link.abort()
            writer.close()
