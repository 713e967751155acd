"""The guard in front of h2: cuts a connection's bytes into frames and refuses floods of them.

h2 checks each frame for meaning, but waits for 16 MiB frames before it refuses them, remembers
every unknown setting and answers every PING, for as long as a peer sends. What is cheap to send and
costly to take is bounded here, before h2 sees it. No I/O, no clock of its own, no streams' state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from h2.errors import ErrorCodes

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_LENGTH = 9
# RFC 9113 §4.2: what we advertise, and the least allowed.
MAX_FRAME = 16384

# Frame types, RFC 9113 §6.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE = 0, 1, 2, 3, 4, 5
PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 6, 7, 8, 9
_NAMES = {
    DATA: "empty_data",
    HEADERS: "headers",
    RST_STREAM: "reset",
    PRIORITY: "priority",
    SETTINGS: "settings",
    PING: "ping",
    WINDOW_UPDATE: "window_update",
}

END_STREAM = ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8

# A header block may be this many times max_head_bytes, and of this many CONTINUATION frames, before
# the connection is given up. In between, its stream alone is answered 431: a block must be decoded
# whole, or the compression state of the connection is lost (RFC 9113 §4.3).
HARD_HEAD_FACTOR = 4
MAX_CONTINUATIONS = 32  # CVE-2024-27316

# Frames that do no work: a burst, and so many a second. Work done earns more (see `FloodGuard`).
_FRAME_BURST, _FRAMES_PER_S = 1000.0, 100.0
# Streams reset before their end, by the peer or because of it (CVE-2023-44487, and "MadeYouReset",
# CVE-2025-8671).
_RESET_BURST, _RESETS_PER_S = 200.0, 10.0

_KNOWN_SETTINGS = frozenset(range(1, 7)) | {8}


class Violation(Exception):
    """The peer broke the framing or a budget: the connection ends with GOAWAY and `code`.

    `reason` is the counted reason, snake case."""

    def __init__(self, code: ErrorCodes, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.reason = reason


class Frame(NamedTuple):
    """A whole frame. `data` is all of it, its nine-byte header included."""

    type: int
    flags: int
    stream_id: int
    data: bytes

    @property
    def payload(self) -> bytes:
        return self.data[HEADER_LENGTH:]


class FrameScanner:
    """Cuts bytes into frames and checks what can be told from a frame's header.

    `preface`: the peer is a client, so its connection preface comes first (RFC 9113 §3.4).
    """

    def __init__(self, *, preface: bool, max_head_bytes: int) -> None:
        self._buffer = bytearray()
        self._preface = PREFACE if preface else b""
        self._first = True
        self._max_block = max_head_bytes * HARD_HEAD_FACTOR
        self._block_stream = 0
        self._block_bytes = 0
        self._continuations = 0

    @property
    def in_block(self) -> bool:
        """A header block has begun and its END_HEADERS has not come."""
        return self._block_stream != 0

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that `data` completes. Violation ends the connection."""
        buffer = self._buffer
        buffer += data
        if self._preface:
            start = bytes(buffer[: len(self._preface)])
            if not self._preface.startswith(start):
                raise Violation(ErrorCodes.PROTOCOL_ERROR, "h2_preface", "no HTTP/2 preface")
            if len(start) < len(self._preface):
                return
            del buffer[: len(start)]
            self._preface = b""
        while len(buffer) >= HEADER_LENGTH:
            length = int.from_bytes(buffer[:3], "big")
            kind, flags = buffer[3], buffer[4]
            stream_id = int.from_bytes(buffer[5:9], "big") & 0x7FFFFFFF
            end = HEADER_LENGTH + length
            if len(buffer) < end:
                # Told as early as can be: what is refused needs no buffer.
                self._check(kind, flags, stream_id, length)
                return
            self._check(kind, flags, stream_id, length)
            self._enter(kind, flags, stream_id, length)
            frame = Frame(kind, flags, stream_id, bytes(buffer[:end]))
            del buffer[:end]
            yield frame

    def _check(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        if length > MAX_FRAME:
            raise Violation(
                ErrorCodes.FRAME_SIZE_ERROR, "h2_frame_size", f"a frame of {length} bytes"
            )
        if self._first and (kind != SETTINGS or flags & ACK):
            raise Violation(
                ErrorCodes.PROTOCOL_ERROR, "h2_preface", "the first frame is not SETTINGS"
            )
        if self._block_stream and (kind != CONTINUATION or stream_id != self._block_stream):
            raise Violation(
                ErrorCodes.PROTOCOL_ERROR, "h2_protocol_error", "a header block was interrupted"
            )
        if kind in (HEADERS, CONTINUATION):
            block = length + (self._block_bytes if kind == CONTINUATION else 0)
            if block > self._max_block or self._continuations >= MAX_CONTINUATIONS:
                raise Violation(
                    ErrorCodes.ENHANCE_YOUR_CALM, "h2_continuation_flood", "endless header block"
                )

    def _enter(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        self._first = False
        if kind == CONTINUATION and self._block_stream:
            self._continuations += 1
            self._block_bytes += length
        elif kind == HEADERS:
            self._block_stream = stream_id
            self._block_bytes = length
        if kind in (HEADERS, CONTINUATION) and flags & END_HEADERS:
            self._block_stream = self._block_bytes = self._continuations = 0


def known_settings(frame: Frame) -> bytes:
    """A SETTINGS frame without the settings RFC 9113 and RFC 8441 do not know, which must be
    ignored (§6.5.2): h2 would remember all 65,536 of them. A malformed one stays as it is."""
    payload = frame.payload
    if frame.flags & ACK or len(payload) % 6:
        return frame.data
    kept = b"".join(
        payload[i : i + 6]
        for i in range(0, len(payload), 6)
        if int.from_bytes(payload[i : i + 2], "big") in _KNOWN_SETTINGS
    )
    return len(kept).to_bytes(3, "big") + frame.data[3:HEADER_LENGTH] + kept


def _is_empty(frame: Frame) -> bool:
    """A DATA frame without data: padding alone is none."""
    length = len(frame.data) - HEADER_LENGTH
    return not length or bool(frame.flags & PADDED and frame.data[HEADER_LENGTH] >= length - 1)


class Budget:
    """A purse that fills with time and is emptied by what a peer does."""

    def __init__(self, burst: float, per_second: float, now: float) -> None:
        self._burst = self._left = burst
        self._rate = per_second
        self._then = now

    def spend(self, now: float, amount: float = 1.0) -> bool:
        """Whether there was enough."""
        self._left = min(self._burst, self._left + (now - self._then) * self._rate)
        self._then = now
        if self._left < amount:
            return False
        self._left -= amount
        return True

    def earn(self, amount: float) -> None:
        self._left = min(self._burst, self._left + amount)


class FloodGuard:
    """What a connection's peer has left of frames without work and of streams given up.

    Time is seconds of any monotonic clock. `scale`: so many times the patience with frames.
    """

    def __init__(self, now: float, *, scale: float = 1.0) -> None:
        self._frames = Budget(_FRAME_BURST * scale, _FRAMES_PER_S * scale, now)
        self._resets = Budget(_RESET_BURST, _RESETS_PER_S, now)
        self._highest = 0

    def frame(self, frame: Frame, now: float, *, open_stream: bool) -> None:
        """Account for a frame that came. `open_stream`: its stream is in use. Violation when frames
        without work, of whatever kind, have used up their budget."""
        kind = frame.type
        if kind == CONTINUATION:
            return  # the scanner counts them
        if kind == HEADERS and (open_stream or frame.stream_id > self._highest):
            self._highest = max(self._highest, frame.stream_id)
            self._frames.earn(2)
            return
        if kind == RST_STREAM and open_stream:
            return  # `reset` counts them
        if kind == DATA and open_stream:
            if not _is_empty(frame):
                self._frames.earn(len(frame.data) / 4096)
                return
            if frame.flags & END_STREAM:
                return
        if not self._frames.spend(now):
            what = _NAMES.get(kind, "frame")
            raise Violation(
                ErrorCodes.ENHANCE_YOUR_CALM, f"h2_{what}_flood", f"too many frames: {what}"
            )

    def sent(self, size: int) -> None:
        """DATA of `size` bytes was sent: the peer may open its windows again."""
        self._frames.earn(1 + size / 1024)

    def gave_up(self) -> None:
        """We reset a stream: frames of it are still under way."""
        self._frames.earn(32)

    def reset(self, now: float) -> None:
        """A stream was given up by the peer, or for what the peer did. Violation when that happened
        too often for the streams that were completed."""
        if not self._resets.spend(now):
            raise Violation(
                ErrorCodes.ENHANCE_YOUR_CALM, "h2_rapid_reset", "too many streams were given up"
            )

    def completed(self) -> None:
        """A stream was answered in full."""
        self._resets.earn(1)
