"""What both ends of HTTP/2 share: the transport, h2 behind its guard, and the end of a connection.

Frames go through `http2_frames` to h2, and h2's events to streams. What a stream means, request or
response, is known by `http2_server` and `http2_client` only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ClassVar, Generic, TypeVar, cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    InformationalResponseReceived,
    PingAckReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    TrailersReceived,
    WindowUpdated,
)
from h2.events import StreamReset as ResetReceived
from h2.exceptions import DenialOfServiceError
from h2.exceptions import ProtocolError as H2ProtocolError
from h2.settings import SettingCodes
from h2.settings import Settings as H2Settings
from hyperframe.frame import GoAwayFrame, SettingsFrame

from l7proxy import http2_frames as frames
from l7proxy.halves import end_half
from l7proxy.http2_fields import FieldDecoder
from l7proxy.http2_stream import Http2Stream
from l7proxy.message import Headers
from l7proxy.redirect import RedirectQueue
from mesh.model.nodeconfig import Settings

# Receive windows: what one stream may leave unread in our memory, and all of a connection. Eight
# streams must stall before others wait for them, and those end by their own timers.
STREAM_WINDOW = 128 * 1024
CONNECTION_WINDOW = 8 * STREAM_WINDOW
_FLUSH_BYTES = 64 * 1024
# What may wait in the transport beyond its own limits: answers to frames of a peer that sends and
# does not read (CVE-2019-9512 and its kin).
_MAX_BACKLOG = 1024 * 1024
# How long a closed connection discards what still comes, so that GOAWAY is not lost to a RST.
_LINGER_S = 1.0
# Our side of the HPACK encoder's table, however much the peer offers.
_MAX_ENCODER_TABLE = 4096


class _H2(H2Connection):
    """h2 that remembers fewer closed streams: they cost memory while a connection lives."""

    MAX_CLOSED_STREAMS = 1024


S = TypeVar("S", bound=Http2Stream, covariant=True)


class Http2Connection(asyncio.Protocol, Generic[S]):
    """One connection. Subclasses say what requests, responses and ends of streams mean."""

    client_side: ClassVar[bool]
    guard_scale: ClassVar[float] = 1.0

    def __init__(self, settings: Settings, unread: Callable[[], int] | None = None) -> None:
        """`unread`, where bytes go by redirect, tells how many the peer holds of them."""
        self.settings = settings
        self.streams: dict[int, S] = {}
        self.paused = False  # by the transport or by the receiver
        self._transport_full = False
        self._redirect = RedirectQueue(unread, self._check_room) if unread is not None else None
        self.closing = False  # GOAWAY was sent for good, or the transport is gone
        self._loop = asyncio.get_running_loop()
        self._guard = frames.FloodGuard(self._loop.time(), scale=self.guard_scale)
        self._scanner = frames.FrameScanner(
            preface=not self.client_side, max_head_bytes=settings.max_head_bytes
        )
        self._h2 = _H2(
            H2Configuration(
                client_side=self.client_side,
                header_encoding=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                validate_inbound_headers=False,
                normalize_inbound_headers=False,
            )
        )
        self._decoder = FieldDecoder(
            settings.max_head_bytes * frames.HARD_HEAD_FACTOR, responses=self.client_side
        )
        self._h2.decoder = self._decoder
        if not self.client_side:
            self._h2.receive_data(frames.PREFACE)  # the scanner takes the real one
        self._unflushed = 0
        self._flush_planned = False
        self._goaway_queued = False  # by h2, which met an error
        self._linger: asyncio.TimerHandle | None = None

    # --- what subclasses say --------------------------------------------------------------------

    def refused(self, reason: str) -> None:
        """Count something that was cut off."""

    def on_head(self, stream_id: int, *, ended: bool) -> None:
        """A HEADERS block that is not trailers came; its fields are the decoder's."""
        raise NotImplementedError

    def on_reset(self, stream: Http2Stream, code: int, *, by_peer: bool) -> None:
        raise NotImplementedError

    def on_goaway(self, last_stream_id: int, code: int) -> None:
        raise NotImplementedError

    def on_stream_over(self, stream: Http2Stream) -> None:
        """Our half or the peer's has ended."""

    def on_progress(self) -> None:
        """A batch of bytes was dealt with."""

    def on_ping_ack(self) -> None:
        """The peer answered our PING."""

    def on_settings(self) -> None:
        """The peer's SETTINGS are in force."""

    def on_lost(self) -> None:
        """The transport is gone, or soon is: all streams fail."""
        raise NotImplementedError

    # --- transport ------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        values = {
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            SettingCodes.MAX_HEADER_LIST_SIZE: self.settings.max_head_bytes,
        }
        # This limit is told, but h2 does not hold a client to it: one that has not yet seen it
        # deserves REFUSED_STREAM, not the end of its connection.
        unlimited = {SettingCodes.MAX_CONCURRENT_STREAMS: 2**31 - 1}
        self._h2.local_settings = H2Settings(self.client_side, values | unlimited)
        if not self.client_side:
            values[SettingCodes.MAX_CONCURRENT_STREAMS] = self.settings.h2_max_concurrent_streams
        preface = frames.PREFACE if self.client_side else b""
        self._write(
            preface
            + SettingsFrame(
                0, settings={int(key): value for key, value in values.items()}
            ).serialize()
        )
        self._h2.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self.closing:
            return
        try:
            for frame in self._scanner.feed(data):
                self._receive(frame)
                if self.closing:
                    return
        except frames.Violation as violation:
            self.fail(violation)
            return
        self._flush()
        self.on_progress()

    def _receive(self, frame: frames.Frame) -> None:
        stream = self.streams.get(frame.stream_id)
        in_use = stream is not None and not stream.reset
        self._guard.frame(frame, self._loop.time(), open_stream=in_use)
        if frame.type == frames.GOAWAY and len(frame.payload) >= 8:
            # h2 would refuse to go on with the streams that the peer still serves.
            last = int.from_bytes(frame.payload[:4], "big") & 0x7FFFFFFF
            self.on_goaway(last, int.from_bytes(frame.payload[4:8], "big"))
            return
        data = frames.known_settings(frame) if frame.type == frames.SETTINGS else frame.data
        try:
            events = self._h2.receive_data(data)
        except H2ProtocolError as error:
            self._goaway_queued = True
            reason = "h2_protocol_error"
            if isinstance(error, DenialOfServiceError):
                reason = "h2_header_bomb"
            raise frames.Violation(ErrorCodes(error.error_code), reason, str(error)) from error
        for event in events:
            self._dispatch(event)

    def _dispatch(self, event: Event) -> None:
        match event:
            case RequestReceived() | ResponseReceived() | InformationalResponseReceived():
                ended = getattr(event, "stream_ended", None) is not None
                self.on_head(event.stream_id, ended=ended)
            case DataReceived():
                length, ended = event.flow_controlled_length or 0, event.stream_ended is not None
                stream = self.streams.get(event.stream_id)
                if stream is None:
                    self.acknowledge(event.stream_id, length)
                    return
                stream.on_data(event.data or b"", length - len(event.data or b""), ended=ended)
                if ended:
                    self.on_stream_over(stream)
            case TrailersReceived():
                if (stream := self.streams.get(event.stream_id)) is not None:
                    stream.on_trailers(self._decoder.fields, self.settings)
                    self.on_stream_over(stream)
            case ResetReceived():
                if (stream := self.streams.get(event.stream_id)) is not None:
                    code = int(event.error_code or 0)
                    self.on_reset(stream, code, by_peer=event.remote_reset)
            case WindowUpdated():
                self._wake(event.stream_id)
            case RemoteSettingsChanged():
                if self._h2.encoder.header_table_size > _MAX_ENCODER_TABLE:
                    self._h2.encoder.header_table_size = _MAX_ENCODER_TABLE
                self._wake(0)
                self.on_settings()
            case PingAckReceived():
                self.on_ping_ack()
            case _:
                pass

    def _wake(self, stream_id: int) -> None:
        if stream_id == 0:
            for stream in self.streams.values():
                stream.wake()
        elif (found := self.streams.get(stream_id)) is not None:
            found.wake()

    def pause_writing(self) -> None:
        self._transport_full = True
        self._check_room()

    def resume_writing(self) -> None:
        self._transport_full = False
        if self.closing:
            self._shut()
        self._check_room()

    def _check_room(self) -> None:
        """The transport or the receiver has become full, or is not full any more."""
        self.paused = self._transport_full or (self._redirect is not None and self._redirect.full)
        if not self.paused:
            self._wake(0)

    def _write(self, data: bytes) -> None:
        self._transport.write(data)
        if self._redirect is not None:
            self._redirect.sent(len(data))

    def eof_received(self) -> bool | None:
        return None  # the transport closes itself

    def connection_lost(self, exc: Exception | None) -> None:
        self.closing = True
        if self._linger is not None:
            self._linger.cancel()
        if self._redirect is not None:
            self._redirect.close()
        self.on_lost()

    # --- sending --------------------------------------------------------------------------------

    def acknowledge(self, stream_id: int, size: int) -> None:
        """`size` bytes of the peer's windows are free again."""
        if not self.closing:
            self._h2.acknowledge_received_data(size, stream_id)
            self._flush_soon()

    def send_headers(self, stream_id: int, fields: Headers, *, end_stream: bool) -> None:
        self._h2.send_headers(stream_id, fields, end_stream)
        self._flush_soon()

    def send_data(self, stream_id: int, data: memoryview) -> int:
        """Send as much of `data` as windows, frame size and transport allow; returns how much."""
        if self.paused or self.closing:
            return 0
        size = min(
            len(data),
            self._h2.local_flow_control_window(stream_id),
            self._h2.max_outbound_frame_size,
        )
        if size <= 0:
            return 0
        self._h2.send_data(stream_id, data[:size])
        self._guard.sent(size)
        self._unflushed += size
        if self._unflushed >= _FLUSH_BYTES:
            self._flush()
        else:
            self._flush_soon()
        return size

    def end_stream(self, stream_id: int, trailers: Headers) -> None:
        if trailers:
            self._h2.send_headers(stream_id, trailers, end_stream=True)
        else:
            self._h2.end_stream(stream_id)
        self._flush_soon()
        self.on_stream_over(self.streams[stream_id])

    def reset_stream(self, stream_id: int, code: ErrorCodes) -> None:
        if not self.closing:
            self._h2.reset_stream(stream_id, code)
            self._guard.gave_up()
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._flush_planned:
            self._flush_planned = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_planned = False
        self._unflushed = 0
        data = self._h2.data_to_send()
        if not data or self.closing or self._transport.is_closing():
            return
        self._write(data)
        backlog = self._transport.get_write_buffer_size()
        if self._redirect is not None:
            backlog += self._redirect.overdrawn
        if backlog > _MAX_BACKLOG:
            self.refused("h2_write_backlog")
            self.closing = True
            self._transport.abort()

    # --- the end --------------------------------------------------------------------------------

    def goaway(self, last_stream_id: int, code: ErrorCodes = ErrorCodes.NO_ERROR) -> None:
        """Send GOAWAY. Not through h2, which would end the streams in flight with it."""
        self._flush()
        if not self._transport.is_closing():
            frame = GoAwayFrame(0, last_stream_id=last_stream_id, error_code=code)
            self._write(frame.serialize())

    def fail(self, violation: frames.Violation) -> None:
        """The peer broke the protocol: GOAWAY, and all streams with it."""
        if not self.closing:
            self.refused(violation.reason)
            self.shut_down(violation.code)

    def shut_down(self, code: ErrorCodes) -> None:
        """GOAWAY, then close as soon as it is written and the peer has closed, or a moment later.
        Streams in flight fail."""
        if self.closing:
            return
        if self._goaway_queued:
            self._flush()
        else:
            self.goaway(self._h2.highest_inbound_stream_id, code)
        self.closing = True
        self.on_lost()
        if self._transport.get_write_buffer_size() == 0:
            self._shut()
            return
        # The last responses may still wait for a slow client, who broke no rule.
        seconds = _LINGER_S if code else self.settings.body_timeout_s
        self._linger = self._loop.call_later(seconds, self._transport.abort)
        self._transport.set_write_buffer_limits(0)  # resume_writing tells when it is empty

    def _shut(self) -> None:
        """All is written. The peer learns of it at once, and closes. The TLS of clients has no
        half-close: its peer has GOAWAY to go by."""
        if self._linger is not None:
            self._linger.cancel()
        self._linger = self._loop.call_later(_LINGER_S, self._transport.close)
        if (
            self._transport.get_extra_info("ssl_object") is None
            and self._transport.get_extra_info("socket").fileno() >= 0
        ):
            end_half(self._transport)
