"""The driver toward clients, on loopback sockets, under both event loops."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import trustme
import uvloop

from l7proxy.http1_link import READ_AHEAD
from l7proxy.http1_server import Http1Server
from l7proxy.message import Framing, ProtocolError, ResponseHead
from l7proxy.streams import ConnectionInfo, ServerStream, StreamReset
from mesh.model.nodeconfig import Settings
from tests.support.http1 import (
    SETTINGS,
    answer,
    echo,
    peer_of,
    reset,
    serving,
    shutdown,
    talk,
)

GET = b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSE = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"

Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run_test(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(main(), 30))

    return run_test


def bodies(data: bytes) -> list[bytes]:
    """The bodies of responses that are framed by Content-Length."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        found.append(data[:length])
        data = data[length:]
    return found


def test_pipelined_requests_are_answered_in_order(run: Run) -> None:
    async def main() -> None:
        running = 0

        async def handle(stream: ServerStream, info: ConnectionInfo) -> None:
            nonlocal running
            running += 1
            assert running == 1
            await asyncio.sleep(0)
            await echo(stream, info)
            running -= 1

        async with serving(handle) as server:
            post = b"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            post += b"2\r\nhi\r\n0\r\n\r\n"
            got = await talk(server.port, b"".join((GET % 1, GET % 2, post, GET % 3, CLOSE)))
            assert bodies(got) == [
                b"GET /1 ",
                b"GET /2 ",
                b"POST /p hi",
                b"GET /3 ",
                b"GET /last ",
            ]
            assert got.count(b"connection: close") == 1
            assert server.refused == []

    run(main)


def test_byte_by_byte(run: Run) -> None:
    async def main() -> None:
        async with serving(echo) as server, peer_of(server.port) as (reader, writer):
            data = (
                b"PUT /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc"
            )
            for byte in data:
                writer.write(bytes((byte,)))
                await asyncio.sleep(0)
            assert bodies(await reader.read()) == [b"PUT /x abc"]

    run(main)


def test_half_closing_client_gets_its_response(run: Run) -> None:
    async def main() -> None:
        async def slow(stream: ServerStream, info: ConnectionInfo) -> None:
            await asyncio.sleep(0.05)
            await echo(stream, info)

        async with serving(slow) as server:
            got = await talk(server.port, GET % 1 + GET % 2, half_close=True)
            assert bodies(got) == [b"GET /1 ", b"GET /2 "]

    run(main)


@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"nonsense\r\n\r\n", b"400", "bad_request_line"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400", "no_host"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 40000, b"431", "head_too_large"),
        (b"GET /" + b"y" * 40000, b"414", "target_too_long"),
        (b"GET / HTTP/3.0\r\nHost: a\r\n\r\n", b"505", "bad_version"),
    ],
)
def test_refusal_reaches_the_client_that_goes_on_sending(
    run: Run, data: bytes, status: bytes, reason: str
) -> None:
    async def main() -> None:
        async with serving(echo) as server:
            for tail in (b"", b"more of it" * 20_000):
                got = await talk(server.port, GET % 1 + data + tail)
                assert got.startswith(OK)
                last = got[got.index(b"HTTP/1.1 " + status + b" ") :]
                assert b"\r\nconnection: close\r\n" in last
            assert server.refused == [reason, reason]

    run(main)


def test_slow_heads_and_idle_connections_are_cut_off(run: Run) -> None:
    settings = Settings(head_timeout_s=0.05, idle_timeout_s=0.05)

    async def main() -> None:
        async with serving(echo, settings) as server:
            assert await talk(server.port, b"") == b""
            assert server.refused == ["head_timeout"]
            got = await talk(server.port, b"GET / HT")
            assert got.startswith(b"HTTP/1.1 408 ")
            got = await talk(server.port, GET % 1 + b"GET / HT")
            assert got.startswith(OK)
            assert b"\r\nHTTP/1.1 408 " in got or b"GET /1 HTTP/1.1 408 " in got
            assert server.refused == ["head_timeout"] * 3
            assert bodies(await talk(server.port, GET % 1)) == [b"GET /1 "]
            assert server.refused == ["head_timeout"] * 3  # an idle connection broke no rule

    run(main)


def test_a_head_that_trickles_in_does_not_move_its_deadline(run: Run) -> None:
    settings = Settings(head_timeout_s=0.15)

    async def main() -> None:
        async with serving(echo, settings) as server, peer_of(server.port) as (reader, writer):
            answered = asyncio.ensure_future(reader.read())
            writer.write(b"GET / HTTP/1.1\r\n")
            while not answered.done():
                writer.write(b"a: b\r\n")
                await asyncio.wait((answered,), timeout=0.02)
            assert (await answered).startswith(b"HTTP/1.1 408 ")

    run(main)


def test_slow_body(run: Run) -> None:
    settings = Settings(body_timeout_s=0.05)

    async def main() -> None:
        async with serving(echo, settings) as server:
            got = await talk(
                server.port, b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc"
            )
            assert got.startswith(b"HTTP/1.1 408 ")
            assert b"connection: close" in got
            assert server.refused == ["body_timeout"]

    run(main)


def test_a_client_that_does_not_read_is_cut_off(run: Run) -> None:
    settings = Settings(body_timeout_s=0.1)

    async def main() -> None:
        ended = asyncio.get_running_loop().create_future()

        async def endless(stream: ServerStream, info: ConnectionInfo) -> None:
            try:
                await stream.respond(ResponseHead(200, [], Framing.STREAM))
                while True:
                    await stream.write(b"x" * 65536)
            except BaseException as error:
                ended.set_result(type(error))
                raise

        async with serving(endless, settings) as server, peer_of(server.port) as (_, writer):
            writer.transport.pause_reading()
            writer.write(GET % 1)
            assert await ended in (StreamReset, asyncio.CancelledError)
            assert server.refused == ["write_timeout"]

    run(main)


@pytest.mark.parametrize("how", ["close", "reset", "mid_body"])
def test_the_handler_of_a_client_that_left_is_cancelled(run: Run, how: str) -> None:
    async def main() -> None:
        started = asyncio.Event()
        ended = asyncio.Event()

        async def wait(stream: ServerStream, info: ConnectionInfo) -> None:
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        async with serving(wait) as server, peer_of(server.port) as (_, writer):
            if how == "mid_body":
                writer.write(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")
                await started.wait()
                shutdown(writer)
            else:
                writer.write(GET % 1)
                await started.wait()
                reset(writer)
            await ended.wait()
            await server.all_closed.wait()

    run(main)


def test_reading_a_body_that_breaks_off(run: Run) -> None:
    async def main() -> None:
        outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def read(stream: ServerStream, info: ConnectionInfo) -> None:
            try:
                while await stream.read():
                    pass
            except StreamReset as error:
                outcome.set_result(str(error))
                stream.abort("")

        async with serving(read) as server, peer_of(server.port) as (_, writer):
            writer.write(b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab")
            await writer.drain()
            shutdown(writer)
            assert "mid-request" in await outcome
            await server.all_closed.wait()
            assert not server.refused

    run(main)


def test_a_body_over_the_limit(run: Run) -> None:
    settings = Settings(max_body_bytes=10)

    async def main() -> None:
        async with serving(echo, settings) as server:
            start = b"PUT / HTTP/1.1\r\nHost: a\r\n"
            got = await talk(server.port, start + b"Content-Length: 11\r\n\r\n" + b"x" * 100_000)
            assert got.startswith(b"HTTP/1.1 413 ")
            chunk = b"8\r\n01234567\r\n"
            got = await talk(
                server.port, start + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 20_000
            )
            assert got.startswith(b"HTTP/1.1 413 ")
            assert b"connection: close" in got
            assert server.refused == ["body_too_large"] * 2

    run(main)


@pytest.mark.parametrize("size", [10_000, 10_000_000])
def test_a_body_that_nobody_reads(run: Run, size: int) -> None:
    async def main() -> None:
        async def ignore(stream: ServerStream, info: ConnectionInfo) -> None:
            await answer(stream, ResponseHead(200, [], 2), b"ok")

        async with serving(ignore) as server:
            put = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % size
            got = await talk(server.port, put + b"x" * size + CLOSE)
            # A small rest is read off, a large one ends the connection; never is it a next request.
            assert bodies(got) == [b"ok"] * (2 if size == 10_000 else 1)
            assert server.refused == []

    run(main)


def test_expect_continue(run: Run) -> None:
    put = b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"

    async def main() -> None:
        async def wait(stream: ServerStream, info: ConnectionInfo) -> None:
            if stream.head.path == b"/no":
                await answer(stream, ResponseHead(403, [], 0))
                return
            if stream.head.expect_continue:
                stream.inform(ResponseHead(103, [(b"link", b"x")]))
            stream.inform(ResponseHead(100, []))
            stream.inform(ResponseHead(100, []))
            await echo(stream, info)

        async with serving(wait) as server:
            async with peer_of(server.port) as (reader, writer):
                writer.write(put)
                assert b"103 Early Hints\r\nlink: x" in await reader.readuntil(b"\r\n\r\n")
                assert b"100 Continue" in await reader.readuntil(b"\r\n\r\n")
                writer.write(b"hi" + CLOSE)
                assert bodies(await reader.read()) == [b"PUT / hi", b"GET /last "]
            got = await talk(server.port, put.replace(b"PUT /", b"PUT /no"))
            # What comes next could be the body or a request: the connection cannot go on.
            assert got.startswith(b"HTTP/1.1 403 ")
            assert b"connection: close" in got
            old = b"PUT / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi"
            assert (await talk(server.port, old)).count(b"HTTP/1.1") == 1

    run(main)


def test_http10_gets_a_body_until_close(run: Run) -> None:
    async def main() -> None:
        async def stream_it(stream: ServerStream, info: ConnectionInfo) -> None:
            await stream.respond(ResponseHead(200, [], Framing.STREAM))
            await stream.write(b"a")
            await stream.write(b"b")
            await stream.finish([(b"x", b"y")])

        async with serving(stream_it) as server:
            got = await talk(server.port, b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert got.endswith(b"\r\n\r\nab")
            assert b"transfer-encoding" not in got

    run(main)


def test_tunnel(run: Run) -> None:
    async def main() -> None:
        async def upgrade(stream: ServerStream, info: ConnectionInfo) -> None:
            await stream.respond(ResponseHead(101, [], upgrade=stream.head.upgrade))
            while chunk := await stream.read():
                await stream.write(chunk.upper())
            await stream.write(b" bye")
            await stream.finish([])

        settings = Settings(body_timeout_s=0.05, idle_timeout_s=0.05, head_timeout_s=0.05)
        async with serving(upgrade, settings) as server, peer_of(server.port) as (reader, writer):
            writer.write(
                b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nearly"
            )
            assert b"\r\nupgrade: x\r\n" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(5) == b"EARLY"
            await asyncio.sleep(0.15)  # no timer of requests applies to a tunnel
            writer.write(b" \x00\r\n\r\nlate")
            await writer.drain()
            shutdown(writer)
            assert await reader.read() == b" \x00\r\n\r\nLATE bye"

    run(main)


@pytest.mark.parametrize("length", [b"", b"Content-Length: 0\r\n"])
def test_a_tunnel_after_the_end_of_the_request_was_read(run: Run, length: bytes) -> None:
    async def main() -> None:
        async def upgrade(stream: ServerStream, info: ConnectionInfo) -> None:
            assert await stream.read() == b""  # as an upload of an empty body does
            await stream.respond(ResponseHead(101, [], upgrade=stream.head.upgrade))
            while chunk := await stream.read():
                await stream.write(chunk.upper())
            await stream.finish([])

        async with serving(upgrade) as server:
            head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n"
            got = await talk(server.port, head + length + b"\r\nearly", half_close=True)
            assert got.partition(b"\r\n\r\n")[2] == b"EARLY"

    run(main)


def test_an_aborted_response_does_not_look_whole(run: Run) -> None:
    async def main() -> None:
        async def give_up(stream: ServerStream, info: ConnectionInfo) -> None:
            await stream.respond(ResponseHead(200, [], Framing.STREAM))
            await stream.write(b"half")
            await asyncio.sleep(0.02)
            stream.abort("enough")
            stream.abort("harmless")

        async with serving(give_up) as server, peer_of(server.port) as (reader, writer):
            writer.write(GET % 1)
            got = await reader.readuntil(b"half")
            assert got.startswith(OK)
            assert b"0\r\n\r\n" not in await reader.read()

    run(main)


def test_a_failing_handler_is_answered_for(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def fail(stream: ServerStream, info: ConnectionInfo) -> None:
            raise RuntimeError("of the test")

        async def forget(stream: ServerStream, info: ConnectionInfo) -> None:
            return

        for handler in (fail, forget):
            async with serving(handler) as server:
                got = await talk(server.port, GET % 1)
                assert got.startswith(b"HTTP/1.1 500 ")
                assert server.refused == ["unanswered"]

    run(main)
    assert "of the test" in caplog.text


def test_max_requests_per_connection(run: Run) -> None:
    async def main() -> None:
        async with serving(echo, Settings(max_requests_per_connection=2)) as server:
            got = await talk(server.port, GET % 1 + GET % 2 + GET % 3)
            assert bodies(got) == [b"GET /1 ", b"GET /2 "]
            assert got.count(b"connection: close") == 1

    run(main)


def test_drain(run: Run) -> None:
    async def main() -> None:
        go_on = asyncio.Event()
        busy = asyncio.Event()

        async def wait(stream: ServerStream, info: ConnectionInfo) -> None:
            if stream.head.path == b"/1":
                busy.set()
                await go_on.wait()
            await echo(stream, info)

        async with (
            serving(wait) as server,
            peer_of(server.port) as (reader, writer),
            peer_of(server.port) as (idle_reader, idle_writer),
            peer_of(server.port) as (late_reader, late_writer),
        ):
            for peer_reader, peer_writer in (
                (idle_reader, idle_writer),
                (late_reader, late_writer),
            ):
                peer_writer.write(GET % 7)
                assert await peer_reader.readuntil(b"GET /7 ")
            writer.write(GET % 1)
            await busy.wait()
            for connection in server.connections:
                connection.drain()
            late_writer.write(GET % 8)  # in its socket before the proxy closes
            assert bodies(await late_reader.read()) == [b"GET /8 "]
            assert await idle_reader.read() == b""
            go_on.set()
            got = await reader.read()
            assert bodies(got) == [b"GET /1 "]
            assert b"connection: close" in got

    run(main)


def test_an_upload_waits_for_its_reader(run: Run) -> None:
    async def main() -> None:
        go_on = asyncio.Event()
        total = 20_000_000

        async def count(stream: ServerStream, info: ConnectionInfo) -> None:
            await go_on.wait()
            size = 0
            while chunk := await stream.read():
                size += len(chunk)
            text = b"%d" % size
            await answer(stream, ResponseHead(200, [], len(text)), text)

        async with serving(count) as server, peer_of(server.port) as (reader, writer):
            writer.write(b"PUT / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % total)
            sending = asyncio.ensure_future(_send(writer, total))
            connection = server.connections[0]
            while connection.codec.buffer.left <= READ_AHEAD:
                await asyncio.sleep(0)
            for _ in range(50):
                await asyncio.sleep(0.001)
                assert connection.codec.buffer.left <= READ_AHEAD + 256 * 1024
            go_on.set()
            assert bodies(await reader.read()) == [b"%d" % total]
            await sending

    run(main)


async def _send(writer: asyncio.StreamWriter, total: int) -> None:
    block = b"x" * 100_000
    for _ in range(total // len(block)):
        writer.write(block)
        await writer.drain()


def test_a_large_response_comes_whole_to_a_slow_reader(run: Run) -> None:
    async def main() -> None:
        blocks = [bytes((number,)) * 100_000 for number in range(100)]

        async def send(stream: ServerStream, info: ConnectionInfo) -> None:
            await stream.respond(ResponseHead(200, [], sum(map(len, blocks))))
            for block in blocks:
                await stream.write(block)
            await stream.finish([])

        async with serving(send) as server, peer_of(server.port) as (reader, writer):
            writer.write(CLOSE)
            await reader.readuntil(b"\r\n\r\n")
            got = bytearray()
            while chunk := await reader.read(50_000):
                got += chunk
                await asyncio.sleep(0)
            assert got == b"".join(blocks)

    run(main)


def test_tls(run: Run) -> None:
    authority = trustme.CA()
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)

    async def main() -> None:
        closed = asyncio.Event()
        refused: list[str] = []

        def make() -> Http1Server:
            return Http1Server(
                echo,
                ConnectionInfo(("c", 1), ("s", 2), tls=True),
                SETTINGS,
                scheme=b"https",
                on_refused=refused.append,
                on_closed=closed.set,
            )

        loop = asyncio.get_running_loop()
        server = await loop.create_server(make, "127.0.0.1", 0, ssl=server_context)
        port = server.sockets[0].getsockname()[1]
        for last, answers in ((CLOSE, 2), (b"rubbish\r\n\r\n", 1)):
            closed.clear()
            reader, writer = await asyncio.open_connection(
                "localhost", port, ssl=client_context, server_hostname="localhost"
            )
            writer.write(GET % 1 + last)
            got = await reader.read()
            assert got.count(OK) == answers
            assert got.count(b"connection: close") == 1
            writer.close()
            await closed.wait()
        assert refused == ["bad_request_line"]
        server.close()

    run(main)


def test_errors_of_the_body_keep_coming(run: Run) -> None:
    """A handler that reads on after an error gets the same error, and it is counted once."""

    async def main() -> None:
        errors: list[ProtocolError] = []

        async def stubborn(stream: ServerStream, info: ConnectionInfo) -> None:
            for _ in range(3):
                try:
                    await stream.read()
                except ProtocolError as error:
                    errors.append(error)
            await answer(stream, ResponseHead(400, [], 0))

        async with serving(stubborn) as server:
            start = b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            got = await talk(server.port, start + b"zz\r\n" + GET % 1)
            assert got.count(b"HTTP/1.1") == 1
            assert [error.reason for error in errors] == ["bad_chunk"] * 3
            assert server.refused == ["bad_chunk"]

    run(main)


@pytest.mark.parametrize("rest_comes", [True, False])
def test_a_reader_that_is_given_up_leaves_the_connection_in_order(
    run: Run, rest_comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a backend answers before the upload has ended."""
    monkeypatch.setattr("l7proxy.http1_server.LINGER_S", 0.1)

    async def main() -> None:
        async def answer_early(stream: ServerStream, info: ConnectionInfo) -> None:
            reading = asyncio.ensure_future(stream.read())
            await asyncio.sleep(0.01)
            await answer(stream, ResponseHead(200, [], 2), b"ok")
            reading.cancel()  # takes effect only after the handler has returned

        async with serving(answer_early) as server, peer_of(server.port) as (reader, writer):
            writer.write(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
            got = await reader.readuntil(b"ok")
            if rest_comes:
                writer.write(b"abcde" + CLOSE)
            got += await reader.read()
            assert bodies(got) == [b"ok"] * (2 if rest_comes else 1)

    run(main)


@pytest.mark.parametrize("rest", [b"zz\r\n" + CLOSE, b"5\r\nabcde\r\n0\r\n\r\n" + CLOSE])
def test_the_framing_of_a_body_that_nobody_reads_is_checked_all_the_same(
    run: Run, rest: bytes
) -> None:
    async def main() -> None:
        async def ignore(stream: ServerStream, info: ConnectionInfo) -> None:
            await answer(stream, ResponseHead(200, [], 2), b"ok")

        async with serving(ignore) as server:
            start = b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
            got = await talk(server.port, start + rest)
            whole = rest.startswith(b"5")
            assert bodies(got) == [b"ok"] * (2 if whole else 1)
            assert server.refused == ([] if whole else ["bad_chunk"])

    run(main)


def test_drain_while_the_response_is_on_its_way(run: Run) -> None:
    """It was not announced, so that the connection stays for one more request's flight."""

    async def main() -> None:
        go_on = asyncio.Event()

        async def slowly(stream: ServerStream, info: ConnectionInfo) -> None:
            await stream.respond(ResponseHead(200, [], 2))
            await go_on.wait()
            await stream.write(b"ok")
            await stream.finish([])

        async with serving(slowly) as server, peer_of(server.port) as (reader, writer):
            writer.write(GET % 1)
            head = await reader.readuntil(b"\r\n\r\n")
            assert b"connection" not in head
            for _ in range(2):
                server.connections[0].drain()
            go_on.set()
            assert await reader.readexactly(2) == b"ok"
            writer.write(GET % 2)
            got = await reader.read()
            assert bodies(got) == [b"ok"]
            assert b"\r\nconnection: close\r\n" in got

    run(main)


def test_a_response_while_the_client_leaves(run: Run) -> None:
    """Writing to a client that is gone is StreamReset, never an error of the transport."""

    async def main() -> None:
        outcome: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

        async def stubborn(stream: ServerStream, info: ConnectionInfo) -> None:
            server.connections[0].abort()
            stream.inform(ResponseHead(103, []))
            try:
                await stream.respond(ResponseHead(200, [], 2))
            except StreamReset as error:
                outcome.set_result(error)

        async with serving(stubborn) as server, peer_of(server.port) as (_, writer):
            writer.write(GET % 1)
            assert isinstance(await outcome, StreamReset)
            await server.all_closed.wait()
            assert server.refused == []

    run(main)
