"""The driver toward backends, on loopback sockets, under both event loops."""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import trustme
import uvloop

from l7proxy.http1_client import Http1Client
from l7proxy.message import Framing, ProtocolError, RequestHead, ResponseHead
from l7proxy.streams import ClientStream, ConnectionInfo, ServerStream, StreamReset
from tests.support.http1 import (
    SETTINGS,
    connect,
    echo,
    peer_of,
    raw_backend,
    relay,
    reset,
    serving,
    shutdown,
)

HEAD = RequestHead(b"GET", b"http", b"a", b"/x", None, [])
UPLOAD = dataclasses.replace(HEAD, method=b"PUT", body=Framing.STREAM)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run_test(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(main(), 30))

    return run_test


async def body_of(stream: ClientStream) -> bytes:
    got = b""
    while chunk := await stream.read():
        got += chunk
    return got


async def get(connection: Http1Client) -> tuple[ResponseHead, bytes]:
    stream = connection.open()
    await stream.request(HEAD)
    head = await stream.response()
    return head, await body_of(stream)


async def outcome_of(connection: Http1Client, head: RequestHead = HEAD) -> StreamReset:
    with pytest.raises(StreamReset) as caught:
        await _whole_exchange(connection, head)
    return caught.value


async def _whole_exchange(connection: Http1Client, head: RequestHead) -> None:
    stream = connection.open()
    await stream.request(head)
    await stream.response()
    await body_of(stream)


def test_one_request_after_another(run: Run) -> None:
    async def main() -> None:
        changes: list[tuple[int, bool, int]] = []

        def changed(connection: Http1Client) -> None:
            changes.append((connection.capacity, connection.closed, connection.active))

        async with serving(echo) as backend:
            connection = await connect(backend.port, changed)
            assert (connection.capacity, connection.closed, connection.active) == (1, False, 0)
            for _ in range(3):
                stream = connection.open()
                assert (connection.capacity, connection.active) == (0, 1)
                await stream.request(UPLOAD)
                await stream.write(b"some ")
                await stream.write(b"body")
                await stream.finish([(b"x-sum", b"1")])
                assert (await stream.response()).status == 200
                assert await body_of(stream) == b"PUT /x some body"
                assert stream.trailers == [(b"x-sum", b"1")]
                assert await stream.read() == b""
                stream.abort("harmless after the end")
            assert changes == [(1, False, 0)] * 3
            connection.close()
            assert (connection.capacity, connection.closed) == (0, True)
            assert len(backend.connections) == 1

    run(main)


@pytest.mark.parametrize("how", ["Connection: close", "close", "HTTP/1.0", "tail"])
def test_a_connection_that_cannot_go_on_is_closed(run: Run, how: str) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            text = OK
            if how == "close":
                text = b"HTTP/1.1 200 OK\r\n\r\nok"
            elif how == "HTTP/1.0":
                text = OK.replace(b"1.1", b"1.0")
            elif how == "tail":
                text += b"HTTP/1.1 200 OK\r\n"
            else:
                text = OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n", 1)
            writer.write(text)
            if how == "close":
                shutdown(writer)
            await reader.read()

        async with raw_backend(answer) as port:
            connection = await connect(port)
            head, body = await get(connection)
            assert (head.status, body) == (200, b"ok")
            assert (connection.capacity, connection.closed, connection.active) == (0, True, 0)

    run(main)


@pytest.mark.parametrize("how", ["close", "reset", "half_close", "bytes"])
def test_an_idle_connection_that_the_backend_ends(run: Run, how: str) -> None:
    async def main() -> None:
        closed = asyncio.Event()
        go_on = asyncio.Event()

        def changed(connection: Http1Client) -> None:
            if connection.closed:
                closed.set()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK)
            await go_on.wait()
            if how == "reset":
                reset(writer)
            elif how == "half_close":
                shutdown(writer)
                await reader.read()
            elif how == "bytes":
                writer.write(OK)
                await reader.read()

        async with raw_backend(answer) as port:
            connection = await connect(port, changed)
            assert (await get(connection))[1] == b"ok"
            assert connection.capacity == 1
            go_on.set()
            await closed.wait()
            assert connection.capacity == 0

    run(main)


@pytest.mark.parametrize("how", ["close", "reset", "half_close"])
@pytest.mark.parametrize("reused", [False, True])
def test_closed_just_as_the_request_comes(run: Run, how: str, reused: bool) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if reused:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(OK)
            await reader.readexactly(1)
            if how == "reset":
                reset(writer)
            elif how == "half_close":
                shutdown(writer)
                await reader.read()

        async with raw_backend(answer) as port:
            connection = await connect(port)
            if reused:
                await get(connection)
            error = await outcome_of(connection)
            assert (error.unprocessed, error.reused) == (False, reused)
            assert connection.closed
            assert connection.active == 0

    run(main)


@pytest.mark.parametrize("when", ["before_open", "after_open"])
def test_closed_before_a_byte_was_written(run: Run, when: str) -> None:
    async def main() -> None:
        async with serving(echo) as backend:
            connection = await connect(backend.port)
            await get(connection)
            stream = connection.open() if when == "after_open" else None
            connection.abort()
            if stream is None:
                assert connection.capacity == 0
                stream = connection.open()
            with pytest.raises(StreamReset) as caught:
                await stream.request(HEAD)
            assert caught.value.unprocessed
            assert connection.active == 0

    run(main)


@pytest.mark.parametrize(
    "part",
    [b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"],
)  # fmt: skip
def test_a_response_that_breaks_off(run: Run, part: bytes) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(part)
            await writer.drain()

        async with raw_backend(answer) as port:
            connection = await connect(port)
            await get(connection)
            error = await outcome_of(connection)
            # A byte of the response had come: the backend has seen the request.
            assert (error.unprocessed, error.reused) == (False, False)
            assert connection.closed

    run(main)


def test_a_reset_is_no_end_of_a_body_until_close(run: Run) -> None:
    async def main() -> None:
        taken = asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\n\r\nhalf")
            await taken.wait()
            reset(writer)

        async with raw_backend(answer) as port:
            connection = await connect(port)
            stream = connection.open()
            await stream.request(HEAD)
            assert (await stream.response()).body is Framing.CLOSE
            assert await stream.read() == b"half"
            taken.set()
            with pytest.raises(StreamReset):
                await stream.read()

    run(main)


@pytest.mark.parametrize(
    "text", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n", b"\x15\x03"]
)
def test_a_malformed_response(run: Run, text: bytes) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(text)
            await reader.read()

        async with raw_backend(answer) as port:
            connection = await connect(port)
            with pytest.raises(ProtocolError) as caught:
                await _whole_exchange(connection, HEAD)
            assert caught.value.status == 502
            assert connection.closed

    run(main)


def test_an_early_response_comes_while_the_request_is_held_up(run: Run) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK.replace(b"200 OK", b"413 Too Large"))
            await asyncio.Event().wait()  # never reads the body

        async with raw_backend(answer) as port:
            connection = await connect(port)
            stream = connection.open()
            await stream.request(UPLOAD)

            async def upload() -> None:
                while True:
                    await stream.write(b"x" * 100_000)

            uploading = asyncio.ensure_future(upload())
            assert (await stream.response()).status == 413
            assert await body_of(stream) == b"ok"
            assert connection.active == 1  # its request has not ended
            stream.abort("answered")
            with pytest.raises(StreamReset):
                await uploading
            assert (connection.active, connection.closed) == (0, True)

    run(main)


def test_informational_responses_come_one_by_one(run: Run) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert b"\r\nexpect: 100-continue\r\n" in await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 103 E\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
            assert await reader.readexactly(7) == b"2\r\nhi\r\n"
            writer.write(OK)
            await reader.read()

        async with raw_backend(answer) as port:
            connection = await connect(port)
            stream = connection.open()
            await stream.request(dataclasses.replace(UPLOAD, expect_continue=True))
            early = await stream.response()
            assert (early.status, early.headers) == (103, [(b"link", b"x")])
            assert (await stream.response()).status == 100
            await stream.write(b"hi")
            assert (await stream.response()).status == 200
            await stream.finish([])
            assert await body_of(stream) == b"ok"
            assert connection.capacity == 1

    run(main)


def test_abort_wakes_who_waits(run: Run) -> None:
    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

        async with raw_backend(answer) as port:
            connection = await connect(port)
            stream = connection.open()
            await stream.request(HEAD)
            waiting = asyncio.ensure_future(stream.response())
            await asyncio.sleep(0)
            stream.abort("the client left")
            stream.abort("twice")
            with pytest.raises(StreamReset):
                await waiting

    run(main)


def test_close_lets_the_stream_end(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as backend:
            connection = await connect(backend.port)
            stream = connection.open()
            await stream.request(HEAD)
            connection.close()
            assert (connection.closed, connection.active) == (True, 1)
            assert (await stream.response()).status == 200
            assert await body_of(stream) == b"GET /x "
            await backend.all_closed.wait()

    run(main)


def test_a_download_waits_for_its_reader(run: Run) -> None:
    async def main() -> None:
        total = 20_000_000

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total)
            for _ in range(total // 100_000):
                writer.write(b"x" * 100_000)
                await writer.drain()
            await reader.read()

        async with raw_backend(answer) as port:
            connection = await connect(port)
            stream = connection.open()
            await stream.request(HEAD)
            await stream.response()
            for _ in range(50):
                await asyncio.sleep(0.001)
                assert connection.codec.buffer.left <= 400_000
            assert len(await body_of(stream)) == total
            assert connection.capacity == 1

    run(main)


def test_a_request_that_would_break_out_of_its_head_is_not_sent(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as backend:
            connection = await connect(backend.port)
            bad = dataclasses.replace(HEAD, headers=[(b"x", b"y\r\n\r\nGET / HTTP/1.1")])
            with pytest.raises(ProtocolError):
                await connection.open().request(bad)
            assert connection.closed
            await backend.all_closed.wait()
            assert backend.refused == []

    run(main)


def test_websocket_through_both_drivers(run: Run) -> None:
    async def main() -> None:
        async def switch(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"\r\nupgrade: websocket\r\nconnection: upgrade\r\n" in head
            writer.write(
                b"HTTP/1.1 101 S\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello"
            )
            while chunk := await reader.read(65536):
                writer.write(chunk)
            await writer.drain()
            writer.write(b" bye")
            await writer.drain()
            shutdown(writer)
            await reader.read()

        async with raw_backend(switch) as port:

            async def tunnel(stream: ServerStream, info: ConnectionInfo) -> None:
                connection = await connect(port)
                upstream = connection.open()
                await upstream.request(stream.head)
                head = await upstream.response()
                assert head.upgrade == b"websocket"
                await stream.respond(head)

                async def up() -> None:
                    while chunk := await stream.read():
                        await upstream.write(chunk)
                    await upstream.finish([])

                async with asyncio.TaskGroup() as group:
                    group.create_task(up())
                    while chunk := await upstream.read():
                        await stream.write(chunk)
                    await stream.finish([])
                assert connection.active == 0

            async with serving(tunnel) as front, peer_of(front.port) as (reader, writer):
                writer.write(
                    b"GET / HTTP/1.1\r\nHost: a\r\n"
                    b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"
                )
                await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(5) == b"hello"
                writer.write(b"x" * 300_000)
                await writer.drain()
                shutdown(writer)
                assert await reader.read() == b"x" * 300_000 + b" bye"

    run(main)


def test_relay_of_large_bodies_both_ways(run: Run) -> None:
    async def main() -> None:
        async def backend(stream: ServerStream, info: ConnectionInfo) -> None:
            await stream.respond(ResponseHead(200, [], Framing.STREAM))
            while chunk := await stream.read():
                await stream.write(chunk)
            await stream.finish([])

        async with serving(backend) as behind:

            async def both_ways(stream: ServerStream, info: ConnectionInfo) -> None:
                connection = await connect(behind.port)
                upstream = connection.open()
                await upstream.request(stream.head)

                async def up() -> None:
                    while chunk := await stream.read():
                        await upstream.write(chunk)
                    await upstream.finish(stream.trailers)

                async with asyncio.TaskGroup() as group:
                    group.create_task(up())
                    await stream.respond(await upstream.response())
                    while chunk := await upstream.read():
                        await stream.write(chunk)
                    await stream.finish([])
                connection.close()

            async with serving(both_ways) as front:
                connection = await connect(front.port)
                stream = connection.open()
                await stream.request(dataclasses.replace(UPLOAD, body=5_000_000))
                blocks = [bytes((number,)) * 50_000 for number in range(100)]

                async def send() -> None:
                    for block in blocks:
                        await stream.write(block)
                    await stream.finish([])

                sending = asyncio.ensure_future(send())
                await stream.response()
                assert await body_of(stream) == b"".join(blocks)
                await sending

    run(main)


def test_tls(run: Run) -> None:
    authority = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)

    async def main() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for _ in range(2):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(OK)
            await writer.drain()
            writer.close()

        closed = asyncio.Event()

        def changed(connection: Http1Client) -> None:
            if connection.closed:
                closed.set()

        server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_context)
        port = server.sockets[0].getsockname()[1]
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Http1Client(SETTINGS, changed),
            "127.0.0.1",
            port,
            ssl=client_context,
            server_hostname="localhost",
        )
        for _ in range(2):
            assert (await get(connection))[1] == b"ok"
        await closed.wait()
        assert connection.capacity == 0
        server.close()

    run(main)


def test_relay_gives_the_client_what_the_backend_said(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as backend, serving(relay(backend.port)) as front:
            connection = await connect(front.port)
            for body in (Framing.STREAM, 4):
                stream = connection.open()
                await stream.request(dataclasses.replace(UPLOAD, body=body))
                await stream.write(b"abcd")
                await stream.finish([])
                assert (await stream.response()).status == 200
                assert await body_of(stream) == b"PUT /x abcd"
            head, body_bytes = await get(connection)
            assert (head.status, body_bytes) == (200, b"GET /x ")

    run(main)
