"""The framing of config channels: whatever pieces the bytes come in, the messages are the same."""

from __future__ import annotations

import pytest

from mesh.model.channel import MAX_FRAME, FrameReader, encode_frame
from mesh.model.nodeconfig import Ack, Delta, Settings
from mesh.model.section import SETTINGS_KEY

MESSAGES = [Delta(0, 1, {SETTINGS_KEY: Settings()}, ()), Ack(1, {"route/x": "no"}), Ack(2, {})]
BYTES = b"".join(map(encode_frame, MESSAGES))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, len(BYTES)])
@pytest.mark.parametrize("tail", [b"", b"\x00", encode_frame(Ack(3, {}))[:-1]])
def test_messages_in_any_pieces(size: int, tail: bytes) -> None:
    reader, data = FrameReader(), BYTES + tail
    got = []
    for start in range(0, len(data), size):
        got += reader.receive(data[start : start + size])
    assert got == MESSAGES


def test_a_message_comes_with_its_last_byte() -> None:
    reader = FrameReader()
    frame = encode_frame(MESSAGES[0])
    assert list(reader.receive(frame[:-1])) == []
    assert list(reader.receive(frame[-1:])) == MESSAGES[:1]


@pytest.mark.parametrize(
    "data",
    [
        (MAX_FRAME + 1).to_bytes(4, "big"),
        b"GET / HTTP/1.1\r\n\r\n",
        (3).to_bytes(4, "big") + b"\x00\x00\x00",
        (0).to_bytes(4, "big"),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        list(FrameReader().receive(data))
