"""Http2Server against the h2 library as a raw client, over real sockets."""

from __future__ import annotations

import asyncio
import shutil
import subprocess

import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame, PingFrame

from l7proxy.message import Framing, ResponseHead
from l7proxy.streams import ConnectionInfo, ServerStream, StreamReset
from mesh.model.nodeconfig import Settings
from tests.http2_peer import GET, POST, RawPeer, ServerUnderTest, answer_errors, echo
from tests.loops import on_both_loops

BIG = bytes(range(256)) * 1600  # 400 KiB, more than any window


@on_both_loops
async def test_get_and_echo() -> None:
    async with ServerUnderTest() as server:
        peer = await server.peer()
        first = peer.request()
        second = peer.request(POST, b"hello")
        status, fields, body = await peer.response(first)
        assert (status, fields[b"x-path"], body) == (200, b"/", b"")
        assert b"date" in fields
        status, fields, body = await peer.response(second)
        assert (status, fields[b"content-length"], body) == (200, b"5", b"hello")
        assert server.refused == []


@on_both_loops
async def test_head_of_a_request() -> None:
    heads = []

    async def keep(stream: ServerStream, info: ConnectionInfo) -> None:
        heads.append(stream.head)
        await stream.respond(ResponseHead(204, []))

    async with ServerUnderTest(keep) as server:
        peer = await server.peer()
        fields = [
            (b":method", b"PUT"),
            (b":scheme", b"https"),
            (b":authority", b"A.example:80"),
            (b":path", b"/x/../y%7e?q=%zz"),
            (b"host", b"a.EXAMPLE:80"),
            (b"te", b"trailers"),
            (b"expect", b"100-continue"),
            (b"cookie", b"a=1"),
            (b"x-a", b"1"),
            (b"cookie", b"b=2"),
            (b"proxy-authorization", b"secret"),
            (b"content-length", b"2"),
        ]
        await peer.response(peer.request(fields, b"ab"))
        await peer.response(peer.request(POST, b""))
        await peer.response(peer.request([*GET[:3], (b":path", b"/"), (b"content-length", b"0")]))
        await peer.response(peer.request([(b":method", b"OPTIONS"), *GET[1:3], (b":path", b"*")]))
        await peer.response(peer.request([*GET[:2], GET[3], (b"host", b"B.example")]))
    head = heads[0]
    assert (head.method, head.scheme, head.authority) == (b"PUT", b"http", b"a.example:80")
    assert (head.path, head.query, head.version) == (b"/y~", b"q=%zz", b"2")
    assert head.headers == [(b"x-a", b"1"), (b"cookie", b"a=1; b=2")]
    assert (head.body, head.trailers_ok, head.expect_continue, head.upgrade) == (
        2,
        True,
        True,
        None,
    )
    assert [h.body for h in heads[1:]] == [Framing.STREAM, 0, Framing.NONE, Framing.NONE]
    assert heads[3].path == b"*"
    assert (heads[4].authority, heads[4].headers) == (b"b.example", [])


MALFORMED = {
    "no method": (GET[1:], 400),
    "no scheme": ([GET[0], *GET[2:]], 400),
    "no authority": ([*GET[:2], GET[3]], 400),
    "no path": (GET[:3], 400),
    "empty path": ([*GET[:3], (b":path", b"")], 400),
    "path twice": ([*GET, (b":path", b"/other")], 400),
    "unknown pseudo": ([*GET, (b":version", b"2")], 400),
    "status in a request": ([(b":status", b"100"), *GET], 400),
    "pseudo after regular": ([*GET[:3], (b"a", b"b"), GET[3]], 400),
    "extended connect": ([(b":method", b"CONNECT"), *GET[1:], (b":protocol", b"websocket")], 400),
    "connect": ([(b":method", b"CONNECT"), *GET[1:]], 501),
    "method": ([(b":method", b"GE T"), *GET[1:]], 400),
    "scheme": ([GET[0], (b":scheme", b"ftp"), *GET[2:]], 400),
    "authority": ([*GET[:2], (b":authority", b"a@b"), GET[3]], 400),
    "host twice": ([*GET[:2], GET[3], (b"host", b"a"), (b"host", b"b")], 400),
    "host differs": ([*GET, (b"host", b"b.example")], 400),
    "path": ([*GET[:3], (b":path", b"a")], 400),
    "path with a line": ([*GET[:3], (b":path", b"/ HTTP/1.1\r\nx: y")], 400),
    "star": ([*GET[:3], (b":path", b"*")], 400),
    "upper case": ([*GET, (b"X-A", b"b")], 400),
    "empty name": ([*GET, (b"", b"b")], 400),
    "name with colon": ([*GET, (b"a:b", b"b")], 400),
    "name with a line": ([*GET, (b"a\r\nb", b"b")], 400),
    "value with CR LF": ([*GET, (b"a", b"b\r\nc: d")], 400),
    "value with NUL": ([*GET, (b"a", b"\x00")], 400),
    "value with blanks around": ([*GET, (b"a", b" b")], 400),
    "connection": ([*GET, (b"connection", b"close")], 400),
    "transfer-encoding": ([*GET, (b"transfer-encoding", b"chunked")], 400),
    "upgrade": ([*GET, (b"upgrade", b"websocket")], 400),
    "te": ([*GET, (b"te", b"gzip")], 400),
    "expectation": ([*GET, (b"expect", b"miracle")], 417),
    "content-length": ([*GET, (b"content-length", b"+1")], 400),
    "content-length twice": ([*GET, (b"content-length", b"0"), (b"content-length", b"0")], 400),
    "content-length without content": ([*GET, (b"content-length", b"1")], 400),
    "large head": ([*GET, (b"a", b"b" * 40_000)], 431),
    "many fields": ([*GET, *[(b"a", b"b")] * 101], 431),
}


@on_both_loops
async def test_malformed_requests_fail_alone() -> None:
    """All on one connection, which goes on."""
    async with ServerUnderTest() as server:
        peer = await server.peer()
        for number, (what, (fields, expected)) in enumerate(MALFORMED.items(), 1):
            stream_id = peer.conn.get_next_available_stream_id()
            send_headers(peer, stream_id, fields)
            status, _, body = await peer.response(stream_id)
            assert (what, status) == (what, expected)
            assert body.startswith(b"%d " % status)
            assert len(server.refused) == number
        status, _, _ = await peer.response(peer.request())
        assert status == 200


def send_headers(peer: RawPeer, stream_id: int, fields: list[tuple[bytes, bytes]]) -> None:
    """A request that h2's client would not send: its stream is opened with other fields."""
    encode = peer.conn.encoder.encode
    peer.conn.encoder.encode = lambda _: encode(fields)  # type: ignore[method-assign]
    peer.conn.send_headers(stream_id, GET, end_stream=True)
    peer.conn.encoder.encode = encode  # type: ignore[method-assign]
    peer.flush()


@pytest.mark.parametrize(
    ("sent", "end", "status"), [(b"abc", True, 400), (b"abcdef", False, 400), (b"abcde", True, 200)]
)
@on_both_loops
async def test_content_length_against_data(sent: bytes, end: bool, status: int) -> None:
    async with ServerUnderTest(answer_errors) as server:
        peer = await server.peer()
        stream_id = peer.request([*POST, (b"content-length", b"5")], sent, end=end)
        assert (await peer.response(stream_id))[0] == status
        assert server.refused == ([] if status == 200 else ["content_length_mismatch"])
        assert (await peer.response(peer.request()))[0] == 200


@pytest.mark.parametrize(
    "trailers", [[(b":path", b"/")], [(b"A", b"b")], [(b"a", b"b\r\n")], [(b"connection", b"x")]]
)
@on_both_loops
async def test_malformed_trailers(trailers: list[tuple[bytes, bytes]]) -> None:
    async with ServerUnderTest(answer_errors) as server:
        peer = await server.peer()
        stream_id = peer.request(POST, b"body", end=False)
        peer.conn.send_headers(stream_id, trailers, end_stream=True)
        peer.flush()
        assert (await peer.response(stream_id))[0] == 400
        assert len(server.refused) == 1


@on_both_loops
async def test_a_body_that_trailers_cut_short() -> None:
    async with ServerUnderTest(answer_errors) as server:
        peer = await server.peer()
        stream_id = peer.request([*POST, (b"content-length", b"5")], b"body", end=False)
        peer.conn.send_headers(stream_id, [(b"a", b"b")], end_stream=True)
        peer.flush()
        status, fields, _ = await peer.response(stream_id)
        assert (status, fields[b"x-reason"]) == (400, b"content_length_mismatch")


@on_both_loops
async def test_a_refusal_without_room_for_its_reason() -> None:
    async with ServerUnderTest() as server:
        peer = await server.peer({SettingCodes.INITIAL_WINDOW_SIZE: 0})
        stream_id = peer.request([*GET, (b"a", b" b")])
        reset = await peer.event(h2.events.StreamReset, stream_id)
        assert reset.error_code == ErrorCodes.PROTOCOL_ERROR
        assert dict((await peer.event(h2.events.ResponseReceived)).headers)[b":status"] == b"400"


@on_both_loops
async def test_a_client_that_goes_away_gets_its_answers() -> None:
    gate = asyncio.Event()

    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        await gate.wait()
        await echo(stream, info)

    async with ServerUnderTest(handler) as server:
        peer = await server.peer()
        stream_id = peer.request()
        peer.send_raw(GoAwayFrame(0).serialize() + PingFrame(0, b"has come").serialize())
        await peer.until(lambda e: getattr(e, "ping_data", None) == b"has come")
        gate.set()
        assert (await peer.response(stream_id))[0] == 200
        assert await peer.goaway() == ErrorCodes.NO_ERROR
        idle = await server.peer()
        idle.send_raw(GoAwayFrame(0).serialize())
        assert await idle.goaway() == ErrorCodes.NO_ERROR


@pytest.mark.parametrize("fed", ["whole", "bytes", "halves"])
@on_both_loops
async def test_fed_in_pieces(fed: str) -> None:
    """The whole conversation of a client in one write, byte by byte, and with a frame's tail."""
    async with ServerUnderTest() as server:
        peer = await server.raw()
        conn = peer.conn
        conn.initiate_connection()
        conn.send_headers(1, [*POST, (b"te", b"trailers")])
        conn.send_data(1, b"he", pad_length=7)
        conn.send_data(1, b"llo")
        conn.send_headers(1, [(b"x-sum", b"42"), (b"content-type", b"no")], end_stream=True)
        conn.send_headers(3, GET, end_stream=True)
        conn.ping(b"12345678")
        data = conn.data_to_send()
        step = {"whole": len(data), "bytes": 1, "halves": len(data) // 2 + 3}[fed]
        connection = server.connections[0] if server.connections else await made(server)
        for start in range(0, len(data), step):
            connection.data_received(data[start : start + step])
        status, _, body = await peer.response(1)
        assert (status, body) == (200, b"hello")
        trailers = await peer.event(h2.events.TrailersReceived, 1)
        assert trailers.headers == [(b"x-sum", b"42")]
        assert (await peer.response(3))[0] == 200
        await peer.event(h2.events.PingAckReceived)


async def made(server: ServerUnderTest) -> object:
    async with asyncio.timeout(5):
        while not server.connections:
            await asyncio.sleep(0)
    return server.connections[0]


@pytest.mark.parametrize(
    ("method", "status", "length"),
    [(b"HEAD", 200, b"7"), (b"GET", 304, b"7"), (b"GET", 204, None), (b"HEAD", 404, b"7")],
)
@on_both_loops
async def test_no_content_where_none_may_be(
    method: bytes, status: int, length: bytes | None
) -> None:
    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        await stream.respond(ResponseHead(status, [(b"connection", b"x")], 7))
        await stream.write(b"content")
        await stream.finish([])

    async with ServerUnderTest(handler) as server:
        peer = await server.peer()
        got, fields, body = await peer.response(peer.request([(b":method", method), *GET[1:]]))
        assert (got, fields.get(b"content-length"), body) == (status, length, b"")
        assert b"connection" not in fields


@on_both_loops
async def test_interim_responses() -> None:
    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        stream.inform(ResponseHead(100, []))
        stream.inform(ResponseHead(101, []))  # unknown to HTTP/2: left out
        assert await stream.read() == b"body"
        stream.inform(ResponseHead(103, [(b"link", b"</x>")]))
        await stream.respond(ResponseHead(200, []))

    async with ServerUnderTest(handler) as server:
        peer = await server.peer()
        stream_id = peer.request([*POST, (b"expect", b"100-continue")], end=False)
        await peer.event(h2.events.InformationalResponseReceived, stream_id)
        peer.conn.send_data(stream_id, b"body", end_stream=True)
        peer.flush()
        await peer.response(stream_id)
        interim = [
            dict(e.headers)[b":status"]
            for e in peer.events
            if isinstance(e, h2.events.InformationalResponseReceived)
        ]
        assert interim == [b"100", b"103"]


@pytest.mark.parametrize("window", [1000, 16_384, 100_000])
@on_both_loops
async def test_large_bodies_and_small_windows(window: int) -> None:
    """Interleaved streams, up and down at once, each within its windows."""

    async def stream_back(stream: ServerStream, info: ConnectionInfo) -> None:
        await stream.respond(ResponseHead(200, [], Framing.STREAM))
        while data := await stream.read():
            await stream.write(data)
        await stream.finish([(b"x-end", b"1")])

    async with ServerUnderTest(stream_back) as server:
        peer = await server.peer({SettingCodes.INITIAL_WINDOW_SIZE: window})
        left = {peer.request(POST, end=False): memoryview(BIG[: 40 * window]) for _ in range(3)}
        whole = {stream_id: bytes(data) for stream_id, data in left.items()}
        while left:
            for stream_id, data in tuple(left.items()):
                size = min(len(data), 9973, peer.conn.local_flow_control_window(stream_id))
                peer.conn.send_data(stream_id, bytes(data[:size]), end_stream=size == len(data))
                left[stream_id] = data[size:]
                if not left[stream_id]:
                    del left[stream_id]
            peer.flush()
            await peer.more()
        for stream_id, data in whole.items():
            assert (await peer.response(stream_id))[2] == data
            await peer.event(h2.events.TrailersReceived, stream_id)


@on_both_loops
async def test_a_stalled_stream_does_not_stop_others() -> None:
    gate = asyncio.Event()

    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        if stream.head.path == b"/stalled":
            await gate.wait()
        await echo(stream, info)

    async with ServerUnderTest(handler) as server:
        peer = await server.peer()
        stalled = peer.request([*POST[:3], (b":path", b"/stalled")], end=False)
        await peer.event(h2.events.WindowUpdated)
        await send_all(peer, stalled, b"s" * 128 * 1024, end=False)
        assert peer.conn.local_flow_control_window(stalled) == 0
        other = peer.request(POST, end=False)
        await send_all(peer, other, BIG)
        assert (await peer.response(other))[2] == BIG
        assert peer.conn.local_flow_control_window(stalled) == 0
        gate.set()
        peer.conn.end_stream(stalled)
        peer.flush()
        assert len((await peer.response(stalled))[2]) == 128 * 1024


async def send_all(peer: RawPeer, stream_id: int, data: bytes, *, end: bool = True) -> None:
    while data:
        size = min(len(data), 16384, peer.conn.local_flow_control_window(stream_id))
        if size:
            peer.conn.send_data(stream_id, data[:size], end_stream=end and size == len(data))
            data = data[size:]
            peer.flush()
        else:
            await peer.more()


@on_both_loops
async def test_answered_before_the_end_of_the_request() -> None:
    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        await stream.respond(ResponseHead(403, [], 2))
        await stream.write(b"no")
        await stream.finish([])

    async with ServerUnderTest(handler) as server:
        peer = await server.peer()
        stream_id = peer.request(POST, b"x" * 5000, end=False)
        assert (await peer.response(stream_id))[::2] == (403, b"no")
        reset = await peer.event(h2.events.StreamReset, stream_id)
        assert reset.error_code == ErrorCodes.NO_ERROR
        assert (await peer.response(peer.request()))[0] == 403
        assert server.refused == []


@on_both_loops
async def test_reset_by_the_client_cancels_the_handler() -> None:
    ends: asyncio.Queue[str] = asyncio.Queue()

    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        if stream.head.method == b"GET":
            return await echo(stream, info)
        try:
            assert await stream.read() == b"half"
            stream.inform(ResponseHead(103, []))
            await stream.read()
        except asyncio.CancelledError:
            with pytest.raises(StreamReset):
                await stream.read()
            with pytest.raises(StreamReset):
                await stream.respond(ResponseHead(200, []))
            stream.abort("again")
            ends.put_nowait("cancelled")
            raise
        return None

    async with ServerUnderTest(handler) as server:
        peer = await server.peer()
        stream_id = peer.request(POST, b"half", end=False)
        await peer.event(h2.events.InformationalResponseReceived, stream_id)
        peer.conn.reset_stream(stream_id, ErrorCodes.CANCEL)
        peer.flush()
        assert await asyncio.wait_for(ends.get(), 5) == "cancelled"
        assert (await peer.response(peer.request()))[0] == 200
        stream_id = peer.request(POST, b"half", end=False)
        await peer.event(h2.events.InformationalResponseReceived, stream_id)
        await peer.close()
        assert await asyncio.wait_for(ends.get(), 5) == "cancelled"


@pytest.mark.parametrize("how", ["abort", "return", "return early"])
@on_both_loops
async def test_an_unfinished_response_is_reset(how: str) -> None:
    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        if how == "return early":
            return
        await stream.respond(ResponseHead(200, [], Framing.STREAM))
        await stream.write(b"half")
        if how == "abort":
            stream.abort("gone")
            stream.abort("gone")

    async with ServerUnderTest(handler) as server:
        peer = await server.peer()
        stream_id = peer.request()
        reset = await peer.event(h2.events.StreamReset, stream_id)
        assert reset.error_code == ErrorCodes.INTERNAL_ERROR
        assert peer.body(stream_id) == (b"" if how == "return early" else b"half")


@on_both_loops
async def test_drain_lets_streams_finish() -> None:
    gate = asyncio.Event()

    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        await gate.wait()
        await echo(stream, info)

    async with ServerUnderTest(handler) as server:
        peer = await server.raw()
        peer.conn.initiate_connection()
        first = peer.request()
        async with asyncio.timeout(5):
            while not (server.connections and server.connections[0].streams):
                await asyncio.sleep(0)
        server.connections[0].drain()
        server.connections[0].drain()
        # h2 would end the connection at a GOAWAY: these frames are read by hand.
        late = peer.conn.get_next_available_stream_id()
        peer.conn.send_headers(late, GET, end_stream=True)
        peer.flush()
        data = await read_until(peer, b"draining")
        assert goaways(data) == [(2**31 - 1, 0)]
        peer.writer.write(b"\x00\x00\x08\x06\x01\x00\x00\x00\x00draining")
        data += await read_until(peer, b"\x00\x00\x08\x07", times=2, so_far=data)
        assert goaways(data) == [(2**31 - 1, 0), (late, 0)]
        refused = peer.conn.get_next_available_stream_id()
        peer.conn.send_headers(refused, GET, end_stream=True)
        peer.flush()
        data += await read_until(peer, refused.to_bytes(4, "big"))
        gate.set()
        data += await asyncio.wait_for(peer.reader.read(), 5)
        frames = list(split(data))
        ended = [stream for kind, flags, stream, _ in frames if kind in (0, 1) and flags & 1]
        assert ended == [first, late]
        assert [(s, p) for k, _, s, p in frames if k == 3] == [(refused, b"\x00\x00\x00\x07")]
        assert server.refused == []


def split(data: bytes) -> list[tuple[int, int, int, bytes]]:
    frames = []
    while len(data) >= 9:
        length = int.from_bytes(data[:3], "big")
        frames.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + length]))
        data = data[9 + length :]
    return frames


def goaways(data: bytes) -> list[tuple[int, int]]:
    return [
        (int.from_bytes(payload[:4], "big"), int.from_bytes(payload[4:8], "big"))
        for kind, _, _, payload in split(data)
        if kind == 7
    ]


async def read_until(peer: RawPeer, what: bytes, times: int = 1, so_far: bytes = b"") -> bytes:
    data = b""
    while (so_far + data).count(what) < times:
        more = await asyncio.wait_for(peer.reader.read(65536), 5)
        assert more
        data += more
    return data


@on_both_loops
async def test_drain_of_an_idle_connection_closes_it() -> None:
    async with ServerUnderTest() as server:
        peer = await server.peer()
        await peer.response(peer.request())
        server.connections[0].drain()
        assert await peer.goaway() == ErrorCodes.NO_ERROR
        await peer.close()


@on_both_loops
async def test_a_slow_reader_gets_the_last_response_whole() -> None:
    """The connection is over for the server, but what it has written still waits for the client."""

    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        await stream.respond(ResponseHead(200, [], len(BIG)))
        await stream.write(BIG)
        await stream.finish([])

    async with ServerUnderTest(handler, Settings(max_requests_per_connection=1)) as server:
        peer = await server.narrow()
        peer.start({SettingCodes.INITIAL_WINDOW_SIZE: len(BIG)})
        peer.conn.increment_flow_control_window(len(BIG))
        stream_id = peer.request()
        await peer.event(h2.events.ResponseReceived)
        connection = server.connections[0]
        while connection.streams:
            await peer.more()
        peer.writer.transport.pause_reading()
        assert connection._transport.get_write_buffer_size() > 0
        await asyncio.sleep(1.2)  # longer than an empty connection lingers
        peer.writer.transport.resume_reading()
        assert (await peer.response(stream_id))[2] == BIG
        assert await peer.goaway() == ErrorCodes.NO_ERROR


@on_both_loops
async def test_requests_per_connection() -> None:
    async with ServerUnderTest(settings=Settings(max_requests_per_connection=2)) as server:
        peer = await server.peer()
        await peer.response(peer.request())
        stream_id = peer.request()
        assert await peer.goaway() == ErrorCodes.NO_ERROR
        assert stream_id == 3
        assert server.refused == []


@pytest.mark.skipif(shutil.which("nghttp") is None, reason="nghttp2-client is not installed")
@on_both_loops
async def test_nghttp(tmp_path: object) -> None:
    async with ServerUnderTest() as server:
        url = f"http://127.0.0.1:{server.port}"
        out = await run("nghttp", "-n", "-s", f"{url}/a", f"{url}/b", "-m", "5")
        assert out.count("200") >= 10
        out = await run("nghttp", "--expect-continue", "-d", __file__, f"{url}/c")
        assert out.startswith('"""Http2Server against')


@pytest.mark.skipif(shutil.which("h2load") is None, reason="nghttp2-client is not installed")
@on_both_loops
async def test_h2load() -> None:
    async with ServerUnderTest() as server:
        url = f"http://127.0.0.1:{server.port}/"
        out = await run("h2load", "-n", "600", "-c", "3", "-m", "150", url)
        assert "600 succeeded, 0 failed, 0 errored" in out
        out = await run(
            "h2load", "-n", "60", "-c", "2", "-m", "20", "-w", "10", "-d", __file__, url
        )
        assert "60 succeeded, 0 failed, 0 errored" in out
        assert server.refused == []


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out, _ = await asyncio.wait_for(process.communicate(), 30)
    return out.decode()
