"""Http2Server to Http2Client to Http2Server, as the proxy puts them together, over real sockets."""

from __future__ import annotations

import asyncio
import random

import pytest

from l7proxy.http2_client import Http2ClientStream
from l7proxy.message import Framing, RequestHead, ResponseHead
from l7proxy.streams import ConnectionInfo, Reader, ServerStream, Writer
from mesh.model.nodeconfig import Settings
from tests.http2_peer import ServerUnderTest
from tests.loops import on_both_loops

TRAILERS = [(b"x-sum", b"1")]


async def copy(reader: Reader, writer: Writer) -> None:
    while data := await reader.read():
        await writer.write(data)
    await writer.finish(reader.trailers)


class Relay:
    """A handler that hands every request on over one connection."""

    def __init__(self, upstream: ServerUnderTest) -> None:
        self.upstream = upstream

    async def start(self) -> None:
        self.client = await self.upstream.client()

    async def __call__(self, stream: ServerStream, info: ConnectionInfo) -> None:
        onward = self.client.open()
        try:
            await onward.request(stream.head)
            async with asyncio.TaskGroup() as group:
                group.create_task(copy(stream, onward))
                head = await onward.response()
                while head.status < 200:
                    stream.inform(head)
                    head = await onward.response()
                await stream.respond(head)
                await copy(onward, stream)
        finally:
            onward.abort("over")


async def upside_down(stream: ServerStream, info: ConnectionInfo) -> None:
    """Answers as it reads, with every byte inverted."""
    stream.inform(ResponseHead(103, []))
    await stream.respond(ResponseHead(200, stream.head.headers, stream.head.body))
    while data := await stream.read():
        await stream.write(bytes(255 - byte for byte in data))
    await stream.finish(stream.trailers)


@pytest.mark.parametrize("seed", range(4))
@on_both_loops
async def test_random_bodies_in_random_pieces(seed: int) -> None:
    rng = random.Random(seed)
    async with ServerUnderTest(upside_down) as backend:
        relay = Relay(backend)
        await relay.start()
        async with ServerUnderTest(relay) as proxy:
            client = await proxy.client()

            async def exchange(number: int) -> None:
                size = rng.choice([0, 1, 100, 16384, 70_000, 200_000])
                body = rng.randbytes(size)
                length = rng.choice([size, Framing.STREAM])
                stream = client.open()
                fields = [(b"x-number", b"%d" % number)]
                await stream.request(
                    RequestHead(b"POST", b"http", b"a", b"/", None, fields, length)
                )
                interim, head = await stream.response(), None
                assert interim.status == 103

                async def send() -> None:
                    at = 0
                    while at < size:
                        step = rng.choice([1, 1000, 16385, 100_000])
                        await stream.write(body[at : at + step])
                        at += step
                        await asyncio.sleep(0)
                    await stream.finish(TRAILERS)

                async with asyncio.TaskGroup() as group:
                    group.create_task(send())
                    head = await stream.response()
                    got = await rest(stream)
                assert dict(head.headers)[b"x-number"] == b"%d" % number
                assert head.body == length
                assert got == bytes(255 - byte for byte in body)
                assert stream.trailers == TRAILERS

            async with asyncio.TaskGroup() as group:
                for number in range(12):
                    group.create_task(exchange(number))
            assert (client.active, relay.client.active) == (0, 0)
            assert (client.capacity, relay.client.capacity) == (100, 100)
            client.close()
        relay.client.close()
        assert backend.refused == proxy.refused == []


async def rest(stream: Http2ClientStream) -> bytes:
    body = bytearray()
    while data := await stream.read():
        body += data
    return bytes(body)


@on_both_loops
async def test_a_client_that_leaves_is_told_upstream() -> None:
    gone = asyncio.Event()

    async def endless(stream: ServerStream, info: ConnectionInfo) -> None:
        try:
            await stream.respond(ResponseHead(200, [], Framing.STREAM))
            while True:
                await stream.write(bytes(10_000))
        finally:
            gone.set()

    async with ServerUnderTest(endless) as backend:
        relay = Relay(backend)
        await relay.start()
        async with ServerUnderTest(relay) as proxy:
            client = await proxy.client()
            stream = client.open()
            await stream.request(RequestHead(b"GET", b"http", b"a", b"/", None, []))
            await stream.response()
            await stream.read()
            stream.abort("enough")
            await asyncio.wait_for(gone.wait(), 5)
            client.close()
        assert relay.client.active == 0
        relay.client.close()


@on_both_loops
async def test_many_requests_on_one_connection() -> None:
    async def hello(stream: ServerStream, info: ConnectionInfo) -> None:
        await stream.respond(ResponseHead(200, [], 5))
        await stream.write(b"hello")
        await stream.finish([])

    async with ServerUnderTest(hello, Settings(h2_max_concurrent_streams=20)) as backend:
        client = await backend.client()

        async def one() -> None:
            stream = client.open()
            await stream.request(RequestHead(b"GET", b"http", b"a", b"/", None, []))
            assert (await stream.response()).status == 200
            assert await rest(stream) == b"hello"

        await one()
        assert client.capacity == 20
        for _ in range(25):
            async with asyncio.TaskGroup() as group:
                for _ in range(client.capacity):
                    group.create_task(one())
        client.close()
        assert backend.refused == []
