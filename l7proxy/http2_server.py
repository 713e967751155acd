"""HTTP/2 toward clients: every stream is a request with a task of its own (RFC 9113).

Knows requests, limits and timers of a client's connection, and drains; frames, windows and floods
are `http2_connection`'s and `http2_frames`'.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus

from h2.errors import ErrorCodes

from l7proxy.http2_connection import Http2Connection
from l7proxy.http2_fields import bodiless, request_head, response_fields
from l7proxy.http2_stream import Http2Stream
from l7proxy.message import Framing, ProtocolError, RequestHead, ResponseHead
from l7proxy.streams import ConnectionInfo, Handler, StreamReset
from l7proxy.tasks import spawn
from mesh.model.nodeconfig import Settings

_LAST_STREAM_ID = 2**31 - 1
# Between the two GOAWAYs of a drain, if the client does not answer the PING sent with the first.
_DRAIN_PING_S = 1.0


class Http2ServerStream(Http2Stream):
    """A request and its response (streams.ServerStream)."""

    malformed_status = 400

    def __init__(self, connection: Http2Server, stream_id: int, head: RequestHead) -> None:
        super().__init__(connection, stream_id)
        self.head = head
        self.task: asyncio.Task[None] | None = None
        self._server = connection
        self._received = 0
        self._responded = False
        self._bodiless = False
        if isinstance(head.body, int):
            self._expected = head.body

    async def _wait_readable(self) -> None:
        # Once the response has begun this may be a conversation, in which silence is no fault.
        if self._responded:
            await self._readable.wait()
            return
        seconds = self._server.settings.body_timeout_s
        try:
            async with asyncio.timeout(seconds):
                await self._readable.wait()
        except TimeoutError:
            self._server.refused("body_timeout")
            self.fail_reading(
                ProtocolError(408, "body_timeout", f"nothing of the body came for {seconds:g} s")
            )

    def on_data(self, data: bytes, padding: int, *, ended: bool) -> None:
        self._received += len(data)
        limit = self._server.settings.max_body_bytes
        if limit is not None and self._received > limit and self._read_failure is None:
            self._server.refused("body_too_large")
            self.fail_reading(
                ProtocolError(413, "body_too_large", f"the body is larger than {limit} bytes")
            )
        super().on_data(data, padding, ended=ended)

    def malformed(self, reason: str, detail: str) -> None:
        self._server.refused(reason)
        super().malformed(reason, detail)

    def inform(self, head: ResponseHead) -> None:
        # HTTP/2 has no 101 (RFC 9113 §8.6).
        if self._write_failure is None and not self._responded and head.status != 101:
            self._server.send_headers(self.id, response_fields(head), end_stream=False)

    async def respond(self, head: ResponseHead) -> None:
        await self.room()
        if self._write_failure is not None:
            raise self._write_failure
        fields = response_fields(head)
        self._responded = True
        self._bodiless = bodiless(head.status, self.head.method) or head.body is Framing.NONE
        self.finished = self._bodiless
        self._server.send_headers(self.id, fields, end_stream=self._bodiless)
        self._readable.set()

    async def write(self, data: bytes) -> None:
        if not self._bodiless:
            await super().write(data)

    def over(self) -> None:
        """The handler is done with it."""
        if not self.finished:
            self.give_up("the response was not finished", ErrorCodes.INTERNAL_ERROR)
        elif not self.ended:  # RFC 9113 §8.1: the rest of the request is not needed
            self.give_up("answered before the request's end", ErrorCodes.NO_ERROR)
        self.drop()


class Http2Server(Http2Connection[Http2ServerStream]):
    """A client's connection. `scheme` is b"http" or b"https"; `on_refused` is told the counted
    reason of everything cut off, `on_closed` once that the connection is gone."""

    client_side = False

    def __init__(
        self,
        handler: Handler,
        info: ConnectionInfo,
        settings: Settings,
        *,
        scheme: bytes,
        on_refused: Callable[[str], None],
        on_closed: Callable[[], None],
    ) -> None:
        super().__init__(settings, info.steered.unread if info.steered else None)
        self._on_refused = on_refused
        self._handler = handler
        self._info = info
        self._scheme = scheme
        self._on_closed = on_closed
        self._requests = 0
        self._draining = False
        self._last_accepted = _LAST_STREAM_ID
        self._block_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._drain_timer: asyncio.TimerHandle | None = None
        self._timer_reason = ""

    def refused(self, reason: str) -> None:
        self._on_refused(reason)

    # --- requests -------------------------------------------------------------------------------

    def on_head(self, stream_id: int, *, ended: bool) -> None:
        if stream_id > self._last_accepted:
            self.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            return
        if self._is_full():
            self.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
            self.refused("h2_max_concurrent_streams")
            self._guard.reset(self._loop.time())
            return
        try:
            head = request_head(
                self._decoder.fields, ended=ended, scheme=self._scheme, settings=self.settings
            )
            limit = self.settings.max_body_bytes
            if limit is not None and isinstance(head.body, int) and head.body > limit:
                raise ProtocolError(413, "body_too_large", f"the body is larger than {limit} bytes")
        except ProtocolError as error:
            self.refused(error.reason)
            self._answer(stream_id, error, ended=ended)
            return
        stream = Http2ServerStream(self, stream_id, head)
        stream.ended = ended
        self.streams[stream_id] = stream
        self._requests += 1
        stream.task = spawn(self._serve(stream), name=f"h2 stream {stream_id}")
        stream.task.add_done_callback(lambda _: self._over(stream))
        self._set_timer(None, "")
        limit = self.settings.max_requests_per_connection
        if limit is not None and self._requests >= limit:
            self.drain()

    def _is_full(self) -> bool:
        """Whether the client has its streams, or left us so many that handlers still end."""
        limit = self.settings.h2_max_concurrent_streams
        if len(self.streams) < limit:
            return False
        in_use = sum(
            not (stream.reset or (stream.ended and stream.finished))
            for stream in self.streams.values()
        )
        return in_use >= limit or len(self.streams) >= 2 * limit

    async def _serve(self, stream: Http2ServerStream) -> None:
        await self._handler(stream, self._info)

    def _over(self, stream: Http2ServerStream) -> None:
        if stream.finished and not stream.reset:
            self._guard.completed()
        stream.over()
        self.streams.pop(stream.id, None)
        if not self.streams and not self.closing:
            self._idle()

    def _answer(self, stream_id: int, error: ProtocolError, *, ended: bool) -> None:
        """Refuse a request that no handler sees (RFC 9113 §8.1.1)."""
        text = f"{error.status} {HTTPStatus(error.status).phrase}: {error.detail}\n".encode()
        head = ResponseHead(error.status, [(b"content-type", b"text/plain")], len(text))
        method = dict(self._decoder.fields).get(b":method", b"")
        if bodiless(error.status, method):
            text = b""
        self.send_headers(stream_id, response_fields(head), end_stream=not text)
        if text and self.send_data(stream_id, memoryview(text)) == len(text):
            self._h2.end_stream(stream_id)
        elif text:  # no room for explanations
            self.reset_stream(stream_id, ErrorCodes.PROTOCOL_ERROR)
            return
        if not ended:
            self.reset_stream(stream_id, ErrorCodes.NO_ERROR)

    def on_reset(self, stream: Http2Stream, code: int, *, by_peer: bool) -> None:
        if not stream.finished:
            self._guard.reset(self._loop.time())
        who = "the client" if by_peer else "a client's error"
        stream.fail(StreamReset(f"{who} reset the stream (code {code})"))
        if isinstance(stream, Http2ServerStream) and stream.task is not None:
            stream.task.cancel()

    # --- timers ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._set_timer(self.settings.head_timeout_s, "head_timeout")

    def on_progress(self) -> None:
        # A header block that does not end holds its memory, whatever else the connection does.
        if not self._scanner.in_block:
            if self._timer_reason == "block" and not self.closing:
                self._set_timer(None, "")
                if not self.streams:
                    self._idle()
        elif self._timer_reason not in ("block", "head_timeout"):
            self._set_timer(self.settings.head_timeout_s, "block")

    def _idle(self) -> None:
        """No stream is left."""
        if self._draining and self._last_accepted != _LAST_STREAM_ID:
            self.shut_down(ErrorCodes.NO_ERROR)
        elif self._timer_reason != "block":
            self._set_timer(self.settings.idle_timeout_s, "idle")

    def _set_timer(self, seconds: float | None, reason: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_reason = reason
        self._timer = None
        if seconds is not None:
            self._timer = self._loop.call_later(seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        if self._timer_reason != "idle":
            self.refused("head_timeout")
        self.shut_down(ErrorCodes.NO_ERROR)

    # --- the end --------------------------------------------------------------------------------

    def drain(self) -> None:
        """Finish what was begun, then close. GOAWAY comes twice (RFC 9113 §6.8): requests under way
        when the first is sent are still served."""
        if self._draining or self.closing:
            return
        self._draining = True
        self.goaway(_LAST_STREAM_ID)
        self._h2.ping(b"draining")
        self._flush_soon()
        self._drain_timer = self._loop.call_later(_DRAIN_PING_S, self._drain_for_good)

    def on_ping_ack(self) -> None:
        if self._draining:
            self._drain_for_good()

    def _drain_for_good(self) -> None:
        if self.closing or self._last_accepted != _LAST_STREAM_ID:
            return
        self._last_accepted = self._h2.highest_inbound_stream_id
        if self.streams:
            self.goaway(self._last_accepted)
        else:
            self.shut_down(ErrorCodes.NO_ERROR)

    def on_goaway(self, last_stream_id: int, code: int) -> None:
        """The client opens no more streams."""
        self._draining = True
        self._last_accepted = self._h2.highest_inbound_stream_id
        if not self.streams:
            self.shut_down(ErrorCodes.NO_ERROR)

    def on_lost(self) -> None:
        self._set_timer(None, "")
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        for stream in tuple(self.streams.values()):
            stream.fail(StreamReset("the client's connection is gone"))
            if stream.task is not None:
                stream.task.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._on_closed()
