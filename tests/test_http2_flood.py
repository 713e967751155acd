"""Clients that want to wear the server out: each is cut off with the right code and a counted
reason, while a well-behaved connection beside it goes on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import h2.events
import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    ExtensionFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

import l7proxy.http2_connection
from l7proxy.message import Framing, ResponseHead
from l7proxy.streams import ConnectionInfo, ServerStream
from mesh.model.nodeconfig import Settings
from tests.http2_peer import GET, POST, RawPeer, ServerUnderTest, answer_errors, echo
from tests.loops import on_both_loops

CALM = ErrorCodes.ENHANCE_YOUR_CALM
PROTOCOL = ErrorCodes.PROTOCOL_ERROR


def encoded(peer: RawPeer, fields: list[tuple[bytes, bytes]] = GET) -> bytes:
    return peer.conn.encoder.encode(fields)


def headers(stream_id: int, block: bytes, *flags: str) -> bytes:
    return HeadersFrame(stream_id, block, flags=flags).serialize()


def repeat(make: Callable[[int], Frame], times: int = 1500) -> Callable[[RawPeer], bytes]:
    """Many frames on a connection with one open stream, 1."""

    def flood(peer: RawPeer) -> bytes:
        opened = headers(1, encoded(peer, POST), "END_HEADERS")
        return opened + b"".join(make(number).serialize() for number in range(times))

    return flood


def rapid_reset(peer: RawPeer) -> bytes:
    return b"".join(
        headers(n, encoded(peer), "END_HEADERS", "END_STREAM") + RstStreamFrame(n, 8).serialize()
        for n in range(1, 1001, 2)
    )


def made_you_reset(peer: RawPeer) -> bytes:
    """The server is made to reset streams whose requests it has begun to serve."""
    overflow = 2**31 - 1
    return b"".join(
        headers(n, encoded(peer), "END_HEADERS", "END_STREAM")
        + WindowUpdateFrame(n, overflow).serialize()
        for n in range(1, 1001, 2)
    )


def too_many_streams(peer: RawPeer) -> bytes:
    return b"".join(headers(n, encoded(peer, POST), "END_HEADERS") for n in range(1, 1001, 2))


def continuations(size: int) -> Callable[[RawPeer], bytes]:
    def flood(peer: RawPeer) -> bytes:
        frame = ContinuationFrame(1, b"\x00" * size).serialize()
        return headers(1, encoded(peer)) + frame * 100

    return flood


def header_bomb(peer: RawPeer) -> bytes:
    """One large field in the table, then references to it, a byte each."""
    first = encoded(peer, [*GET, (b"x-large", b"v" * 3900)])
    return headers(1, first, "END_HEADERS", "END_STREAM") + headers(
        3, encoded(peer) + b"\xbe" * 8000, "END_HEADERS", "END_STREAM"
    )


def unknown_settings(peer: RawPeer) -> bytes:
    settings = b"".join(n.to_bytes(2, "big") + b"\0\0\0\1" for n in range(100, 2700))
    header = len(settings).to_bytes(3, "big") + bytes((4, 0, 0, 0, 0, 0))
    return (header + settings) * 1500


FLOODS = {
    "rapid reset": (rapid_reset, CALM, "h2_rapid_reset"),
    "made you reset": (made_you_reset, CALM, "h2_rapid_reset"),
    "too many streams": (too_many_streams, CALM, "h2_rapid_reset"),
    "continuations": (continuations(16384), CALM, "h2_continuation_flood"),
    "empty continuations": (continuations(0), CALM, "h2_continuation_flood"),
    "header bomb": (header_bomb, CALM, "h2_header_bomb"),
    "ping": (repeat(lambda _: PingFrame(0, b"12345678")), CALM, "h2_ping_flood"),
    "ping answers": (
        repeat(lambda _: PingFrame(0, b"12345678", flags=["ACK"])),
        CALM,
        "h2_ping_flood",
    ),
    "settings": (repeat(lambda n: SettingsFrame(0, {4: n})), CALM, "h2_settings_flood"),
    "unknown settings": (unknown_settings, CALM, "h2_settings_flood"),
    "priority": (repeat(lambda n: PriorityFrame(2 * n + 3)), CALM, "h2_priority_flood"),
    "empty data": (repeat(lambda _: DataFrame(1)), CALM, "h2_empty_data_flood"),
    "padded empty data": (
        repeat(lambda _: DataFrame(1, b"", pad_length=3, flags=["PADDED"])),
        CALM,
        "h2_empty_data_flood",
    ),
    "window updates": (repeat(lambda _: WindowUpdateFrame(1, 1)), CALM, "h2_window_update_flood"),
    "unknown frames": (repeat(lambda _: ExtensionFrame(0xBE, 0)), CALM, "h2_frame_flood"),
    "resets of closed streams": (
        lambda peer: (
            headers(9, encoded(peer), "END_HEADERS", "END_STREAM")
            + RstStreamFrame(7, 8).serialize() * 1500
        ),
        CALM,
        "h2_reset_flood",
    ),
    "headers of closed streams": (
        lambda peer: (
            headers(9, encoded(peer), "END_HEADERS", "END_STREAM")
            + RstStreamFrame(9, 8).serialize()
            + headers(9, encoded(peer), "END_HEADERS") * 1500
        ),
        CALM,
        "h2_headers_flood",
    ),
    "huge frame": (lambda _: b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", 6, "h2_frame_size"),
    "interrupted block": (
        lambda peer: headers(1, encoded(peer)) + PingFrame(0, b"12345678").serialize(),
        PROTOCOL,
        "h2_protocol_error",
    ),
    "continuation alone": (
        lambda _: ContinuationFrame(1, b"", flags=["END_HEADERS"]).serialize(),
        PROTOCOL,
        "h2_protocol_error",
    ),
    "garbage": (lambda _: b"GET / HTTP/1.1\r\n\r\n" * 9, 6, "h2_frame_size"),
}


@pytest.mark.parametrize("flood", FLOODS)
@on_both_loops
async def test_flood(flood: str) -> None:
    make, code, reason = FLOODS[flood]
    gone = asyncio.Event()

    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        if stream.head.method == b"GET" and stream.head.headers:
            await gone.wait()
        await echo(stream, info)

    async with ServerUnderTest(handler) as server:
        good = await server.peer()
        stream_id = good.request(POST, b"before", end=False)
        bad = await server.peer()
        bad.send_raw(make(bad))
        assert await bad.goaway() == code
        assert reason in server.refused
        assert set(server.refused) <= {reason, "h2_max_concurrent_streams"}
        assert not server.connections[1].streams
        good.conn.send_data(stream_id, b"after", end_stream=True)
        good.flush()
        assert (await good.response(stream_id))[2] == b"beforeafter"
        assert (await good.response(good.request()))[0] == 200
        assert good.goaways == []


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0" * 9]
)
@on_both_loops
async def test_no_preface(data: bytes) -> None:
    async with ServerUnderTest() as server:
        peer = await server.raw()
        peer.writer.write(data)
        assert await peer.goaway() == PROTOCOL
        assert server.refused == ["h2_preface"]


@on_both_loops
async def test_streams_beyond_the_limit_are_refused() -> None:
    gate = asyncio.Event()

    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        await gate.wait()
        await echo(stream, info)

    settings = Settings(h2_max_concurrent_streams=2)
    async with ServerUnderTest(handler, settings) as server:
        peer = await server.peer()
        streams = [peer.request() for _ in range(3)]
        reset = await peer.event(h2.events.StreamReset)
        assert (reset.stream_id, reset.error_code) == (streams[2], ErrorCodes.REFUSED_STREAM)
        gate.set()
        for stream_id in streams[:2]:
            assert (await peer.response(stream_id))[0] == 200
        assert server.refused == ["h2_max_concurrent_streams"]


@pytest.mark.parametrize("declared", [True, False])
@on_both_loops
async def test_body_too_large(declared: bool) -> None:
    async with ServerUnderTest(answer_errors, Settings(max_body_bytes=10)) as server:
        peer = await server.peer()
        length = [(b"content-length", b"11")] if declared else []
        stream_id = peer.request([*POST, *length], b"12345678901", end=False)
        assert (await peer.response(stream_id))[0] == 413
        assert server.refused == ["body_too_large"]
        assert (await peer.response(peer.request(POST, b"1234567890")))[0] == 200


@on_both_loops
async def test_a_client_that_does_not_read_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(l7proxy.http2_connection, "_MAX_BACKLOG", 100_000)
    async with ServerUnderTest() as server:
        good = await server.peer()
        bad = await server.narrow()
        bad.start()
        bad.writer.transport.pause_reading()
        block = encoded(bad, [*GET, (b"bad", b" ")])
        stream_id = 1
        while "h2_write_backlog" not in server.refused and stream_id < 40_000:
            bad.send_raw(headers(stream_id, block, "END_HEADERS", "END_STREAM"))
            stream_id += 2
            if stream_id % 200 == 1:
                await asyncio.sleep(0)
        assert "h2_write_backlog" in server.refused
        assert (await good.response(good.request()))[0] == 200
        await bad.close()


@on_both_loops
async def test_slow_connections_are_closed() -> None:
    settings = Settings(head_timeout_s=0.1, idle_timeout_s=0.2)
    async with ServerUnderTest(settings=settings) as server:
        nothing = await server.raw()
        no_request = await server.peer()
        half = await server.peer()
        await half.event(h2.events.RemoteSettingsChanged)
        half.send_raw(headers(1, encoded(half)))
        after = await server.peer()
        await after.response(after.request())
        assert server.refused == []
        after.send_raw(headers(3, encoded(after)))
        silence = await asyncio.wait_for(nothing.reader.read(), 5)
        assert silence.endswith(GoAwayFrame(0).serialize())
        for peer in (no_request, half, after):
            assert await peer.goaway() == ErrorCodes.NO_ERROR
        assert server.refused == ["head_timeout"] * 4
        idle = await server.peer()
        await idle.response(idle.request())
        assert await idle.goaway() == ErrorCodes.NO_ERROR
        assert server.refused == ["head_timeout"] * 4


@on_both_loops
async def test_a_body_that_does_not_come() -> None:
    async with ServerUnderTest(answer_errors, Settings(body_timeout_s=0.1)) as server:
        peer = await server.peer()
        stream_id = peer.request(POST, b"half", end=False)
        assert (await peer.response(stream_id))[0] == 408
        assert server.refused == ["body_timeout"]


@on_both_loops
async def test_a_conversation_may_be_silent() -> None:
    """Once the response has begun, a client that waits for more of it owes nothing."""
    gate = asyncio.Event()

    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        await stream.respond(ResponseHead(200, [], Framing.STREAM))
        gate.set()
        await echo_rest(stream)

    async def echo_rest(stream: ServerStream) -> None:
        while data := await stream.read():
            await stream.write(data)
        await stream.finish([])

    async with ServerUnderTest(handler, Settings(body_timeout_s=0.05)) as server:
        peer = await server.peer()
        stream_id = peer.request(POST, end=False)
        await asyncio.wait_for(gate.wait(), 5)
        await asyncio.sleep(0.15)  # three times the limit: nothing must come of it
        peer.conn.send_data(stream_id, b"late", end_stream=True)
        peer.flush()
        assert (await peer.response(stream_id))[2] == b"late"


@pytest.mark.parametrize("window", [0, 100])
@on_both_loops
async def test_a_client_that_does_not_open_its_window(window: int) -> None:
    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        await stream.respond(ResponseHead(200, [], Framing.STREAM))
        await stream.write(bytes(100_000))
        await stream.finish([])

    async with ServerUnderTest(handler, Settings(body_timeout_s=0.1)) as server:
        peer = await server.peer({4: window})
        peer.acknowledge = False
        stream_id = peer.request()
        reset = await peer.event(h2.events.StreamReset, stream_id)
        assert reset.error_code == ErrorCodes.INTERNAL_ERROR
        assert len(peer.body(stream_id)) == window
        assert server.refused == ["h2_write_timeout"]
        assert not server.connections[0].closing


@on_both_loops
async def test_a_client_that_does_not_read_at_all() -> None:
    """Its windows are open, but its socket is full: body and heads wait, and not for ever."""
    full = asyncio.Event()

    async def handler(stream: ServerStream, info: ConnectionInfo) -> None:
        if stream.head.path != b"/large":
            await full.wait()
        await stream.respond(ResponseHead(200, [], Framing.STREAM))
        while True:
            write = asyncio.ensure_future(stream.write(bytes(100_000)))
            await asyncio.wait([write], timeout=0.02)
            if not write.done():
                full.set()
            await write

    async with ServerUnderTest(handler, Settings(body_timeout_s=0.2)) as server:
        peer = await server.narrow()
        peer.start({4: 2**31 - 1})
        peer.conn.increment_flow_control_window(2**31 - 1 - 65535)
        peer.request([*GET[:3], (b":path", b"/large")])
        peer.writer.transport.pause_reading()
        peer.request()
        async with asyncio.timeout(10):
            while len(server.refused) < 2:
                await asyncio.sleep(0.01)
        assert server.refused == ["h2_write_timeout"] * 2


def random_frame(rng: random.Random, peer: RawPeer) -> bytes:
    """Mostly a frame in good order, at a moment that may be wrong; now and then noise."""
    stream_id = rng.choice([1, 1, 3, 3, 5, 7, 9, 2])
    data = rng.randbytes(rng.choice([0, 1, 40]))
    fields = rng.choice([GET, POST, [(b"a", b"b")], [*POST, (b"content-length", b"40")]])
    flags = ["END_HEADERS", *rng.choice([[], ["END_STREAM"]])]
    kind = rng.randrange(16)
    if kind < 4:
        return headers(stream_id, encoded(peer, fields), *flags)
    if kind < 9:
        return DataFrame(stream_id, data, flags=flags[1:]).serialize()
    match kind:
        case 9:
            return RstStreamFrame(stream_id, rng.randrange(20)).serialize()
        case 10 | 11:
            increment = rng.choice([1, 1000, 2**31 - 1])
            return WindowUpdateFrame(rng.choice([0, stream_id]), increment).serialize()
        case 12:
            return SettingsFrame(0, {4: rng.randrange(2**31), 1: rng.randrange(2**32)}).serialize()
        case 13:
            return PriorityFrame(stream_id, depends_on=11).serialize()
        case 14:
            return PingFrame(0, b"12345678").serialize()
    head = len(data).to_bytes(3, "big") + bytes((rng.randrange(12), rng.choice([0, 1, 4, 8, 0x2D])))
    return head + rng.choice([0, stream_id]).to_bytes(4, "big") + data


@pytest.mark.parametrize("seed", range(3))
@on_both_loops
async def test_random_frames(seed: int) -> None:
    """Whatever comes, a connection ends with GOAWAY or goes on; nothing escapes to the loop."""
    rng = random.Random(seed)
    escaped: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: escaped.append(context))
    stands = 0
    async with ServerUnderTest(answer_errors) as server:
        good = await server.peer()
        for _ in range(60):
            bad = await server.peer()
            bad.send_raw(b"".join(random_frame(rng, bad) for _ in range(rng.choice([2, 5, 15]))))
            if await bad.settled():
                stands += 1
            else:
                assert bad.goaways
            await bad.close()
        assert escaped == []
        assert 0 < stands < 60
        assert (await good.response(good.request()))[0] == 200
