"""HTTP/2 toward endpoints: many requests at once on one connection (RFC 9113).

Prior knowledge, or ALPN that the caller has checked. Knows responses and what became of requests
when streams or the connection end; frames and windows are `http2_connection`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError as H2ProtocolError

from l7proxy.http2_connection import Http2Connection
from l7proxy.http2_fields import request_fields, response_head
from l7proxy.http2_stream import Http2Stream
from l7proxy.message import Framing, ProtocolError, RequestHead, ResponseHead
from l7proxy.streams import ClientConnection, StreamReset
from mesh.model.nodeconfig import Settings

# Until the endpoint's SETTINGS come: the least it should allow (RFC 9113 §6.5.2). One that allows
# less refuses streams unprocessed.
_INITIAL_STREAMS = 100
# One connection's share, whatever the endpoint allows: it is a single TCP connection after all.
_MAX_STREAMS = 256
# Interim responses that nobody has asked for yet.
_MAX_INTERIM = 16
_LAST_STREAM_ID = 2**31 - 1


class Http2ClientStream(Http2Stream):
    """A request to an endpoint and its response (streams.ClientStream)."""

    malformed_status = 502

    def __init__(self, connection: Http2Client, *, first: bool) -> None:
        super().__init__(connection, 0)
        self._client = connection
        self._first = first
        self._method = b""
        self._heads: deque[ResponseHead] = deque()
        self._answered = False
        self._final = False

    def lost(self, why: str, *, unprocessed: bool = False) -> StreamReset:
        """How this stream failed, for whoever may repeat its request."""
        return StreamReset(
            why,
            unprocessed=unprocessed or not self.id,
            reused=not self._first and not self._answered,
        )

    def keep(self, keeper: Callable[[], None]) -> None:
        return None

    async def request(self, head: RequestHead) -> None:
        await self.room()
        if self._write_failure is not None:
            raise self._write_failure
        self._method = head.method
        fields = request_fields(head, self._client.scheme)
        no_body = head.body is Framing.NONE
        try:
            stream_id = self._client.send_request(self, fields, end_stream=no_body)
        except H2ProtocolError as error:
            # The endpoint has lowered its limit, or the connection has no stream ids left.
            failure = self.lost(f"no stream could be opened: {error}", unprocessed=True)
            self.fail(failure)
            self._client.forget(self)
            raise failure from None
        self.id = stream_id
        self.finished = no_body

    async def response(self) -> ResponseHead:
        while not self._heads:
            if self._read_failure is not None:
                raise self._read_failure
            self._readable.clear()
            await self._readable.wait()
        return self._heads.popleft()

    def on_response(self, *, ended: bool) -> None:
        self._answered = True
        try:
            head = response_head(
                self._client.fields,
                ended=ended,
                method=self._method,
                settings=self._client.settings,
            )
        except ProtocolError as error:
            self.malformed(error.reason, error.detail)
            self.ended = self.ended or ended
            return
        if head.status >= 200:
            self._final = True
            # A response without content promises none, whatever its Content-Length says of others.
            if self._method == b"HEAD" or head.status == 304 or head.body is Framing.NONE:
                self._expected = 0
            elif isinstance(head.body, int):
                self._expected = head.body
        elif len(self._heads) >= _MAX_INTERIM:
            self.malformed("too_many_interim_responses", "1xx responses without end")
            return
        self._heads.append(head)
        self.ended = self.ended or ended
        self._readable.set()

    def give_up(self, why: str, code: ErrorCodes) -> None:
        # RFC 9113 §8.7: the endpoint is told that its response is not wanted any more.
        super().give_up(why, ErrorCodes.CANCEL if code is ErrorCodes.INTERNAL_ERROR else code)
        self._client.forget(self)


class Http2Client(Http2Connection[Http2ClientStream]):
    """A connection to an endpoint (streams.ClientConnection). `scheme` is b"http" or b"https";
    `on_change` is told whenever `capacity`, `active` or `closed` may have changed."""

    client_side = True
    # An endpoint that is a little odd should not cost all requests in flight.
    guard_scale = 10.0

    def __init__(
        self,
        settings: Settings,
        on_change: Callable[[ClientConnection], None],
        *,
        scheme: bytes,
        unread: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(settings, unread)
        self.scheme = scheme
        self.held = False  # ever
        self.used: float | None = None  # given back as soon as it is not
        self._on_change = on_change
        self._waiting: set[Http2ClientStream] = set()  # opened, but nothing sent yet
        self._opened = 0
        self._leaving = False  # no new streams: GOAWAY either way
        self._settled = False  # the endpoint's SETTINGS have come

    @property
    def fields(self) -> list[tuple[bytes, bytes]]:
        """The last header block."""
        return self._decoder.fields

    # --- ClientConnection -------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        if self.closed:
            return 0
        limit = self._h2.remote_settings.max_concurrent_streams if self._settled else None
        allowed = min(_INITIAL_STREAMS if limit is None else limit, _MAX_STREAMS)
        return max(0, allowed - self.active)

    @property
    def closed(self) -> bool:
        return self.closing or self._leaving

    @property
    def active(self) -> int:
        return len(self.streams) + len(self._waiting)

    def open(self) -> Http2ClientStream:
        stream = Http2ClientStream(self, first=self._opened == 0)
        self._opened += 1
        if self.closed:
            stream.fail(stream.lost("the connection is closed"))
        else:
            self._waiting.add(stream)
        return stream

    @staticmethod
    def recall() -> bool:
        return False  # nothing passes by the proxy to HTTP/2

    def close(self) -> None:
        if not self.closed:
            self._leaving = True
            self._on_change(self)
        self._close_if_done()

    # --- streams ----------------------------------------------------------------------------------

    def send_request(
        self, stream: Http2ClientStream, fields: list[tuple[bytes, bytes]], *, end_stream: bool
    ) -> int:
        """Send HEADERS; returns the stream's id. h2's ProtocolError if there can be no stream."""
        stream_id = self._h2.get_next_available_stream_id()
        self.send_headers(stream_id, fields, end_stream=end_stream)
        self._waiting.discard(stream)
        self.streams[stream_id] = stream
        if stream_id >= _LAST_STREAM_ID - 1:
            self.close()  # as its last stream ends
        return stream_id

    def forget(self, stream: Http2Stream) -> None:
        """The stream's place is free."""
        found = self.streams.pop(stream.id, None)
        if isinstance(stream, Http2ClientStream) and stream in self._waiting:
            self._waiting.discard(stream)
        elif found is None:
            return
        self._on_change(self)
        self._close_if_done()

    def on_stream_over(self, stream: Http2Stream) -> None:
        if stream.ended and stream.finished:
            self.forget(stream)

    def on_head(self, stream_id: int, *, ended: bool) -> None:
        if (stream := self.streams.get(stream_id)) is not None:
            stream.on_response(ended=ended)
            self.on_stream_over(stream)

    def on_reset(self, stream: Http2Stream, code: int, *, by_peer: bool) -> None:
        assert isinstance(stream, Http2ClientStream)
        who = "the endpoint reset the stream" if by_peer else "the endpoint broke the protocol"
        stream.fail(
            stream.lost(f"{who} (code {code})", unprocessed=code == ErrorCodes.REFUSED_STREAM)
        )
        self.forget(stream)

    def on_settings(self) -> None:
        self._settled = True
        self._on_change(self)

    # --- the end ----------------------------------------------------------------------------------

    def on_goaway(self, last_stream_id: int, code: int) -> None:
        self._leaving = True
        why = f"the endpoint closes the connection (code {code})"
        refused = [s for number, s in self.streams.items() if number > last_stream_id]
        for stream in (*refused, *self._waiting):
            stream.fail(stream.lost(why, unprocessed=True))
            self.streams.pop(stream.id, None)
        self._waiting.clear()
        self._on_change(self)
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._leaving and not self.active:
            self.shut_down(ErrorCodes.NO_ERROR)

    def on_lost(self) -> None:
        lost = (*self.streams.values(), *self._waiting)
        self.streams.clear()
        self._waiting.clear()
        for stream in lost:
            stream.fail(stream.lost("the connection to the endpoint is gone"))
        self._on_change(self)
