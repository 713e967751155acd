"""The guard in front of h2, without sockets: frames whole, byte by byte, with a tail; budgets."""

from __future__ import annotations

import pytest
from h2.errors import ErrorCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PingFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from l7proxy import http2_frames
from l7proxy.http2_frames import PREFACE, FloodGuard, Frame, FrameScanner, Violation, known_settings

SETTINGS = SettingsFrame(0, {4: 70_000}).serialize()
CONVERSATION = [
    SETTINGS,
    HeadersFrame(1, b"abc").serialize(),
    ContinuationFrame(1, b"").serialize(),
    ContinuationFrame(1, b"def", flags=["END_HEADERS"]).serialize(),
    DataFrame(1, b"x" * 16384).serialize(),
    DataFrame(1, b"", flags=["END_STREAM"]).serialize(),
    PingFrame(0, b"12345678").serialize(),
]


def scanner(*, preface: bool = True) -> FrameScanner:
    return FrameScanner(preface=preface, max_head_bytes=1000)


@pytest.mark.parametrize("preface", [True, False])
@pytest.mark.parametrize("step", [1, 7, 9, 10, 16393, 10**6])
def test_frames_come_out_as_they_went_in(step: int, preface: bool) -> None:
    scan = scanner(preface=preface)
    data = (PREFACE if preface else b"") + b"".join(CONVERSATION) + b"\x00\x00\x05tail"
    frames = [f for i in range(0, len(data), step) for f in scan.feed(data[i : i + step])]
    assert [frame.data for frame in frames] == CONVERSATION
    assert [frame.type for frame in frames] == [4, 1, 9, 9, 0, 0, 6]
    assert [frame.stream_id for frame in frames] == [0, 1, 1, 1, 1, 1, 0]
    assert frames[6].payload == b"12345678"


def test_an_open_block_is_seen() -> None:
    scan = scanner(preface=False)
    seen = [scan.in_block for data in CONVERSATION for _ in scan.feed(data)]
    assert seen == [False, True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("data", "code", "reason"),
    [
        (b"POST", ErrorCodes.PROTOCOL_ERROR, "h2_preface"),
        (PREFACE[:-1] + b"x", ErrorCodes.PROTOCOL_ERROR, "h2_preface"),
        (PREFACE + CONVERSATION[6], ErrorCodes.PROTOCOL_ERROR, "h2_preface"),
        (
            PREFACE + SettingsFrame(0, flags=["ACK"]).serialize(),
            ErrorCodes.PROTOCOL_ERROR,
            "h2_preface",
        ),
        # Refused by its header alone: the frame itself is never awaited.
        (PREFACE + b"\x00\x40\x01\x04" + bytes(5), ErrorCodes.FRAME_SIZE_ERROR, "h2_frame_size"),
        (
            PREFACE + SETTINGS + HeadersFrame(1, b"").serialize() + CONVERSATION[4],
            ErrorCodes.PROTOCOL_ERROR,
            "h2_protocol_error",
        ),
        (
            PREFACE + SETTINGS + HeadersFrame(1, b"").serialize() + CONVERSATION[1],
            ErrorCodes.PROTOCOL_ERROR,
            "h2_protocol_error",
        ),
        (
            PREFACE
            + SETTINGS
            + HeadersFrame(1, b"").serialize()
            + ContinuationFrame(3, b"").serialize(),
            ErrorCodes.PROTOCOL_ERROR,
            "h2_protocol_error",
        ),
        (
            PREFACE + SETTINGS + HeadersFrame(1, b"x" * 4001).serialize(),
            ErrorCodes.ENHANCE_YOUR_CALM,
            "h2_continuation_flood",
        ),
        (
            PREFACE
            + SETTINGS
            + HeadersFrame(1, b"x" * 2001).serialize()
            + ContinuationFrame(1, b"x" * 2000).serialize(),
            ErrorCodes.ENHANCE_YOUR_CALM,
            "h2_continuation_flood",
        ),
        (
            PREFACE
            + SETTINGS
            + HeadersFrame(1, b"").serialize()
            + ContinuationFrame(1, b"").serialize() * 33,
            ErrorCodes.ENHANCE_YOUR_CALM,
            "h2_continuation_flood",
        ),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_violations(data: bytes, code: ErrorCodes, reason: str, whole: bool) -> None:
    scan = scanner()
    pieces = [data] if whole else [data[i : i + 1] for i in range(len(data))]
    with pytest.raises(Violation) as caught:
        _ = [list(scan.feed(piece)) for piece in pieces]
    assert (caught.value.code, caught.value.reason) == (code, reason)


def test_blocks_within_the_limits() -> None:
    scan = scanner(preface=False)
    block = (
        HeadersFrame(1, b"x" * 2000).serialize()
        + ContinuationFrame(1, b"").serialize() * 31
        + ContinuationFrame(1, b"x" * 2000, flags=["END_HEADERS"]).serialize()
    )
    assert len(list(scan.feed(SETTINGS + block * 3))) == 1 + 3 * 33


def test_unknown_settings_are_taken_out() -> None:
    def frame(payload: bytes, flags: int = 0) -> Frame:
        data = len(payload).to_bytes(3, "big") + bytes((4, flags, 0, 0, 0, 0)) + payload
        return Frame(4, flags, 0, data)

    window, grease = b"\x00\x04\x00\x00\xff\xff", b"\x0a\x0a\x00\x00\x00\x01"
    assert known_settings(frame(grease + window + grease)) == frame(window).data
    assert known_settings(frame(grease)) == frame(b"").data
    assert known_settings(frame(b"")) == frame(b"").data
    assert known_settings(frame(window[:-1])) == frame(window[:-1]).data  # h2 refuses it
    assert known_settings(frame(grease, flags=1)) == frame(grease, flags=1).data


def spent(guard: FloodGuard, frame: Frame, now: float, *, open_stream: bool = True) -> int:
    """How many of `frame` come through."""
    for count in range(5_000):
        try:
            guard.frame(frame, now, open_stream=open_stream)
        except Violation:
            return count
    return -1


def parsed(data: bytes) -> Frame:
    scan = scanner(preface=False)
    return list(scan.feed(SETTINGS + data))[1]


PING = parsed(PingFrame(0, b"12345678").serialize())
EMPTY = parsed(DataFrame(1, b"").serialize())
PADDING = parsed(DataFrame(1, b"", pad_length=200, flags=["PADDED"]).serialize())
UPDATE = parsed(WindowUpdateFrame(1, 1).serialize())


@pytest.mark.parametrize("frame", [PING, EMPTY, PADDING, UPDATE])
def test_frames_without_work_are_bounded(frame: Frame) -> None:
    guard = FloodGuard(100.0)
    burst = spent(guard, frame, 100.0)
    assert burst == http2_frames._FRAME_BURST
    assert spent(guard, frame, 100.0) == 0
    assert spent(guard, frame, 101.0) == http2_frames._FRAMES_PER_S
    assert spent(guard, frame, 1_000_000.0) == burst
    assert spent(FloodGuard(0.0, scale=2), frame, 0.0) == 2 * burst


def test_work_earns() -> None:
    guard = FloodGuard(0.0)
    spent(guard, PING, 0.0)
    guard.sent(10 * 1024)
    assert spent(guard, UPDATE, 0.0) == 11
    for number in range(1, 11, 2):
        guard.frame(Frame(1, 4, number, b""), 0.0, open_stream=False)
    assert spent(guard, PING, 0.0) == 10
    full = parsed(DataFrame(1, b"x" * 16384).serialize())
    for _ in range(10):
        guard.frame(full, 0.0, open_stream=True)
    assert spent(guard, PING, 0.0) == 40
    assert spent(guard, full, 0.0) == -1


def test_what_comes_for_closed_streams_is_no_work() -> None:
    guard = FloodGuard(0.0)
    guard.frame(Frame(1, 4, 9, b""), 0.0, open_stream=False)
    assert spent(guard, parsed(DataFrame(7, b"data").serialize()), 0.0, open_stream=False) == 1000
    assert spent(guard, Frame(1, 4, 9, b""), 0.0, open_stream=False) == 0
    assert spent(guard, Frame(3, 0, 9, b""), 0.0, open_stream=False) == 0
    assert spent(guard, Frame(3, 0, 9, b""), 0.0, open_stream=True) == -1


def test_resets_against_completed_streams() -> None:
    guard = FloodGuard(0.0)

    def resets(now: float) -> int:
        for count in range(10_000):
            try:
                guard.reset(now)
            except Violation:
                return count
        return -1

    assert resets(0.0) == http2_frames._RESET_BURST
    assert resets(0.0) == 0
    for _ in range(7):
        guard.completed()
    assert resets(0.0) == 7
    assert resets(1.0) == http2_frames._RESETS_PER_S
