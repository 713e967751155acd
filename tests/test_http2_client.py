"""Http2Client against the h2 library as a raw server, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame

from l7proxy.http2_client import Http2Client, Http2ClientStream
from l7proxy.message import Framing, Headers, ProtocolError, RequestHead, ResponseHead
from l7proxy.streams import StreamReset
from mesh.model.nodeconfig import Settings
from tests.http2_peer import RawPeer
from tests.loops import on_both_loops

OK = [(b":status", b"200")]


def head(method: bytes = b"GET", **more: object) -> RequestHead:
    return RequestHead(method, b"https", b"b.example", b"/p", b"q=1", [(b"x-a", b"1")], **more)  # type: ignore[arg-type]


class Client(Http2Client):
    """Tells when its transport is gone."""

    def __init__(self, settings: Settings, changes: list[object]) -> None:
        super().__init__(settings, changes.append, scheme=b"http")
        self.gone = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.gone.set()


class Endpoint:
    """A raw server with one connection, and the client under test."""

    def __init__(self, client: Http2Client, peer: RawPeer, changes: list[object]) -> None:
        self.client, self.peer, self.changes = client, peer, changes

    async def request(self, **more: object) -> tuple[Http2ClientStream, h2.events.RequestReceived]:
        """A request sent, and as it came."""
        stream = self.client.open()
        await stream.request(head(**more))  # type: ignore[arg-type]
        event = await self.peer.event(h2.events.RequestReceived, stream.id)
        return stream, event

    def answer(self, stream_id: int, fields: Headers = OK, *, end: bool = True) -> None:
        self.peer.conn.send_headers(stream_id, fields, end_stream=end)
        self.peer.flush()

    def data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.peer.conn.send_data(stream_id, data, end_stream=end)
        self.peer.flush()

    async def settled(self) -> None:
        """The endpoint's SETTINGS are in force at the client."""
        await self.peer.event(h2.events.SettingsAcknowledged)


@asynccontextmanager
async def endpoint(
    settings: dict[int, int] | None = None, limits: Settings | None = None
) -> AsyncIterator[Endpoint]:
    arrived: asyncio.Queue[RawPeer] = asyncio.Queue()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.put_nowait(RawPeer(reader, writer, client=False))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    changes: list[object] = []
    _, client = await asyncio.get_running_loop().create_connection(
        lambda: Client(limits or Settings(), changes),
        *server.sockets[0].getsockname(),
    )
    peer = await asyncio.wait_for(arrived.get(), 5)
    peer.start(settings)
    try:
        yield Endpoint(client, peer, changes)
    finally:
        await peer.close()
        server.close()
        client.close()
        await asyncio.wait_for(client.gone.wait(), 5)


@on_both_loops
async def test_a_request_and_its_response() -> None:
    async with endpoint() as e:
        stream, event = await e.request(
            method=b"POST", body=5, trailers_ok=True, expect_continue=True
        )
        assert event.headers == [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":authority", b"b.example"),
            (b":path", b"/p?q=1"),
            (b"x-a", b"1"),
            (b"content-length", b"5"),
            (b"te", b"trailers"),
            (b"expect", b"100-continue"),
        ]
        e.answer(stream.id, [(b":status", b"100")], end=False)
        assert await stream.response() == ResponseHead(100, [])
        await stream.write(b"he")
        await stream.write(b"llo")
        await stream.finish([(b"x-sum", b"1")])
        await e.peer.event(h2.events.TrailersReceived, stream.id)
        assert e.peer.body(stream.id) == b"hello"
        e.answer(stream.id, [(b":status", b"103"), (b"link", b"x")], end=False)
        e.answer(stream.id, [*OK, (b"content-length", b"3"), (b"a", b"b")], end=False)
        e.data(stream.id, b"abc")
        assert await stream.response() == ResponseHead(103, [(b"link", b"x")])
        assert await stream.response() == ResponseHead(200, [(b"a", b"b")], 3)
        assert await stream.read() == b"abc"
        assert (e.client.active, e.client.closed) == (1, False)
        e.answer(stream.id, [(b"x-end", b"1"), (b"content-length", b"9")])
        assert await stream.read() == b""
        assert stream.trailers == [(b"x-end", b"1")]
        assert e.client.active == 0
        stream.abort("harmless")


@pytest.mark.parametrize(
    ("method", "fields", "data", "body"),
    [
        (b"GET", OK, b"abc", Framing.STREAM),
        (b"GET", OK, None, Framing.NONE),
        (b"GET", [*OK, (b"content-length", b"0")], None, 0),
        (b"HEAD", [*OK, (b"content-length", b"7")], None, 7),
        (b"HEAD", [*OK, (b"content-length", b"7")], b"", 7),
        (b"GET", [(b":status", b"304"), (b"content-length", b"7")], None, 7),
        (b"GET", [(b":status", b"204")], None, Framing.NONE),
    ],
)
@on_both_loops
async def test_bodies_of_responses(
    method: bytes, fields: Headers, data: bytes | None, body: object
) -> None:
    async with endpoint() as e:
        stream, _ = await e.request(method=method)
        e.answer(stream.id, fields, end=data is None)
        if data is not None:
            e.data(stream.id, data, end=True)
        assert (await stream.response()).body == body
        assert await stream.read() == (data or b"")
        assert e.client.capacity >= 100


@pytest.mark.parametrize(
    ("fields", "data"),
    [
        ([(b"a", b"b")], None),
        ([(b":status", b"2x0")], None),
        ([(b":status", b"99")], None),
        ([*OK, (b":path", b"/")], None),
        ([*OK, (b"connection", b"close")], None),
        ([*OK, (b"transfer-encoding", b"chunked")], None),
        ([*OK, (b"a", b"b\r\nset-cookie: c")], None),
        ([*OK, (b"A", b"b")], None),
        ([*OK, (b"content-length", b"-1")], None),
        ([*OK, (b"content-length", b"1")], None),
        ([*OK, (b"content-length", b"5")], b"abc"),
        ([*OK, (b"content-length", b"2")], b"abc"),
        ([(b":status", b"304")], b"abc"),
        ([*OK, (b"a", b"b" * 40_000)], None),
        ([*OK, *[(b"a", b"b")] * 101], None),
    ],
)
@on_both_loops
async def test_malformed_responses_fail_alone(fields: Headers, data: bytes | None) -> None:
    async with endpoint() as e:
        stream, _ = await e.request()
        encode = e.peer.conn.encoder.encode
        e.peer.conn.encoder.encode = lambda _: encode(fields)  # type: ignore[method-assign]
        e.peer.conn.send_headers(stream.id, OK, end_stream=data is None)
        e.peer.conn.encoder.encode = encode  # type: ignore[method-assign]
        if data is not None:
            e.peer.conn.send_data(stream.id, data, end_stream=True)
        e.peer.flush()
        with pytest.raises(ProtocolError) as caught:
            await whole(stream)
        assert caught.value.status == 502
        stream.abort("not usable")
        other, _ = await e.request()
        e.answer(other.id)
        assert (await other.response()).status == 200
        assert e.client.active == 0


@on_both_loops
async def test_no_101_in_http2() -> None:
    async with endpoint() as e:
        stream, _ = await e.request()
        e.answer(stream.id, [(b":status", b"101")], end=False)
        with pytest.raises(ProtocolError) as caught:
            await stream.response()
        assert (caught.value.status, caught.value.reason) == (502, "bad_status")
        stream.abort("not usable")


async def whole(stream: Http2ClientStream) -> bytes:
    await stream.response()
    body = b""
    while data := await stream.read():
        body += data
    return body


@on_both_loops
async def test_settings_make_capacity() -> None:
    async with endpoint({SettingCodes.MAX_CONCURRENT_STREAMS: 2}) as e:
        assert e.client.capacity == 100  # nothing of the endpoint has come yet
        await e.settled()
        assert e.client.capacity == 2
        assert e.changes == [e.client]
        first, _ = await e.request()
        unsent = e.client.open()
        assert (e.client.capacity, e.client.active) == (0, 2)
        unsent.abort("not needed")
        assert e.client.capacity == 1
        e.answer(first.id)
        await whole(first)
        assert (e.client.capacity, e.client.active) == (2, 0)
        assert len(e.changes) == 3


@on_both_loops
async def test_a_lowered_limit_leaves_requests_unprocessed() -> None:
    async with endpoint({SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as e:
        await e.request()
        stream = e.client.open()
        await e.settled()
        with pytest.raises(StreamReset) as caught:
            await stream.request(head())
        assert caught.value.unprocessed
        assert e.client.active == 1


@pytest.mark.parametrize(
    ("code", "unprocessed"),
    [(ErrorCodes.REFUSED_STREAM, True), (ErrorCodes.INTERNAL_ERROR, False)],
)
@on_both_loops
async def test_reset_before_a_response(code: ErrorCodes, unprocessed: bool) -> None:
    async with endpoint() as e:
        for reused in (False, True):
            stream, _ = await e.request(method=b"POST", body=Framing.STREAM)
            e.peer.conn.reset_stream(stream.id, code)
            e.peer.flush()
            for wait in (stream.response, stream.read, lambda s=stream: s.write(b"x")):
                with pytest.raises(StreamReset) as caught:
                    await wait()
                assert caught.value.unprocessed is unprocessed
                assert caught.value.reused is reused
            assert e.client.active == 0
            assert not e.client.closed


@on_both_loops
async def test_reset_in_mid_body() -> None:
    async with endpoint() as e:
        stream, _ = await e.request()
        e.answer(stream.id, end=False)
        e.data(stream.id, b"half")
        await stream.response()
        assert await stream.read() == b"half"
        e.peer.conn.reset_stream(stream.id, ErrorCodes.CANCEL)
        e.peer.flush()
        with pytest.raises(StreamReset) as caught:
            await stream.read()
        assert not caught.value.unprocessed
        assert not caught.value.reused


@on_both_loops
async def test_answered_before_the_end_of_the_request() -> None:
    """A whole response, then RST_STREAM(NO_ERROR): the response counts (RFC 9113 §8.1)."""
    async with endpoint() as e:
        stream, _ = await e.request(method=b"POST", body=Framing.STREAM)
        e.answer(stream.id, [(b":status", b"413")], end=False)
        e.data(stream.id, b"too large", end=True)
        e.peer.conn.reset_stream(stream.id, ErrorCodes.NO_ERROR)
        e.peer.flush()
        assert (await stream.response()).status == 413
        assert await stream.read() == b"too large"
        assert await stream.read() == b""
        with pytest.raises(StreamReset):
            await stream.write(b"more")
        assert e.client.active == 0


@on_both_loops
async def test_abort_cancels_and_frees_the_window() -> None:
    async with endpoint() as e:
        for _ in range(10):  # more than the connection's window in all
            stream, _ = await e.request()
            e.answer(stream.id, end=False)
            for _ in range(8):
                e.data(stream.id, bytes(16384))
            await stream.response()
            stream.abort("not needed")
            stream.abort("not needed")
            reset = await e.peer.event(h2.events.StreamReset, stream.id)
            assert reset.error_code == ErrorCodes.CANCEL
            with pytest.raises(StreamReset):
                await stream.read()
        assert e.client.active == 0


@on_both_loops
async def test_goaway_leaves_later_streams_unprocessed() -> None:
    async with endpoint() as e:
        first, _ = await e.request()
        second, _ = await e.request()
        unsent = e.client.open()
        e.peer.send_raw(GoAwayFrame(0, last_stream_id=first.id, error_code=0).serialize())
        for stream in (second, unsent):
            with pytest.raises(StreamReset) as caught:
                await stream.response()
            assert caught.value.unprocessed
        assert (e.client.closed, e.client.capacity, e.client.active) == (True, 0, 1)
        late = e.client.open()
        with pytest.raises(StreamReset) as caught:
            await late.request(head())
        assert caught.value.unprocessed
        e.answer(first.id, end=False)
        e.data(first.id, b"still served", end=True)
        assert await whole(first) == b"still served"
        assert await e.peer.goaway() == ErrorCodes.NO_ERROR


@on_both_loops
async def test_the_connection_breaks() -> None:
    async with endpoint() as e:
        answered, _ = await e.request()
        e.answer(answered.id, end=False)
        await answered.response()
        waiting, _ = await e.request()
        unsent = e.client.open()
        e.peer.writer.transport.abort()
        for stream, reused, unprocessed in (
            (answered, False, False),
            (waiting, True, False),
            (unsent, True, True),
        ):
            with pytest.raises(StreamReset) as caught:
                await stream.read()
            assert (caught.value.reused, caught.value.unprocessed) == (reused, unprocessed)
        assert (e.client.closed, e.client.capacity, e.client.active) == (True, 0, 0)
        with pytest.raises(StreamReset):
            await e.client.open().request(head())


@on_both_loops
async def test_close_lets_streams_finish() -> None:
    async with endpoint() as e:
        stream, _ = await e.request()
        e.client.close()
        assert (e.client.closed, e.client.active) == (True, 1)
        e.answer(stream.id)
        assert (await stream.response()).status == 200
        assert await e.peer.goaway() == ErrorCodes.NO_ERROR


@on_both_loops
async def test_a_connection_without_stream_ids_left() -> None:
    async with endpoint() as e:
        e.client._h2.highest_outbound_stream_id = 2**31 - 3  # as after a billion requests
        stream, _ = await e.request()
        assert stream.id == 2**31 - 1
        assert (e.client.closed, e.client.active) == (True, 1)
        e.answer(stream.id)
        assert (await stream.response()).status == 200
        assert await e.peer.goaway() == ErrorCodes.NO_ERROR


@on_both_loops
async def test_a_broken_endpoint() -> None:
    async with endpoint() as e:
        stream, _ = await e.request()
        e.peer.send_raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        with pytest.raises(StreamReset):
            await stream.response()
        assert await e.peer.goaway() == ErrorCodes.FRAME_SIZE_ERROR


@on_both_loops
async def test_interim_responses_without_end() -> None:
    async with endpoint() as e:
        stream, _ = await e.request()
        for _ in range(17):
            e.answer(stream.id, [(b":status", b"102")], end=False)
        e.peer.conn.ping(b"all came")
        e.peer.flush()
        await e.peer.event(h2.events.PingAckReceived)
        for _ in range(16):
            assert (await stream.response()).status == 102
        with pytest.raises(ProtocolError) as caught:
            await stream.response()
        assert caught.value.reason == "too_many_interim_responses"


@on_both_loops
async def test_an_endpoint_that_does_not_open_its_window() -> None:
    async with endpoint(limits=Settings(body_timeout_s=0.1)) as e:
        e.peer.acknowledge = False
        stream, _ = await e.request(method=b"POST", body=Framing.STREAM)
        with pytest.raises(StreamReset):
            await stream.write(bytes(100_000))
        reset = await e.peer.event(h2.events.StreamReset, stream.id)
        assert reset.error_code == ErrorCodes.CANCEL
        assert len(e.peer.body(stream.id)) == 65535
