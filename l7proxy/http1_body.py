"""HTTP/1.1 bodies (RFC 9112 §6, §7): the receive buffer, readers for each framing, and the writer.

Bytes in, bytes out; no I/O, and nothing of heads beyond trailer fields. A body that arrives in one
piece leaves as the same object, without a copy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from l7proxy.http1_head import parse_fields
from l7proxy.message import BodyLength, Data, EndOfMessage, Framing, Headers, ProtocolError
from l7proxy.normalise import TOKEN, filter_trailers
from mesh.model.nodeconfig import Settings

# A chunk extension means nothing to a proxy that makes its own chunks; it is bounded and dropped.
_MAX_CHUNK_LINE = 1024
_CHUNK_LINE = re.compile(
    rb"([0-9A-Fa-f]{1,15})"
    rb"(?:;"
    + TOKEN
    + rb"(?:=(?:"
    + TOKEN
    + rb'|"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"))?)*'
)
_CHUNK_LINE_BEGUN = re.compile(rb"(?:[0-9A-Fa-f]{1,15}(?:;[\t -~\x80-\xff]*)?)?\r?")


class ReceiveBuffer:
    """Bytes received and not yet taken; `left` is how many."""

    __slots__ = ("data", "left", "position", "searched")

    def __init__(self) -> None:
        self.data = b""
        self.left = 0
        self.position = 0
        self.searched = 0  # up to here the wanted line end is known not to be

    def put(self, data: bytes) -> None:
        if not self.left:
            self.data = data
            self.searched = 0
        else:
            self.data = self.data[self.position :] + data
            self.searched = max(0, self.searched - self.position)
        self.left += len(data)
        self.position = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, of which there must be as many."""
        end = self.position + count
        taken = self.data if count == len(self.data) else self.data[self.position : end]
        self.left -= count
        self.position = end
        self.searched = end
        return taken

    def find(self, mark: bytes) -> int:
        """How many bytes there are up to and including `mark`; -1 without it."""
        start = max(self.position, self.searched - len(mark) + 1)
        found = self.data.find(mark, start)
        if found < 0:
            self.searched = len(self.data)
            return -1
        return found + len(mark) - self.position

    def peek(self) -> bytes:
        return self.data[self.position :]


class BodyReader(Protocol):
    def next(self, buffer: ReceiveBuffer) -> Data | EndOfMessage | None:
        """The next event, None if more bytes are needed. ProtocolError: the framing is broken."""


class LengthReader:
    """A body of `length` bytes."""

    __slots__ = ("left",)

    def __init__(self, length: int) -> None:
        self.left = length

    def next(self, buffer: ReceiveBuffer) -> Data | EndOfMessage | None:
        if not self.left:
            return EndOfMessage()
        count = min(self.left, buffer.left)
        if not count:
            return None
        self.left -= count
        return Data(buffer.take(count))


class CloseReader:
    """Bytes until the connection closes; also the bytes of a tunnel. Its end is the caller's."""

    __slots__ = ()

    def next(self, buffer: ReceiveBuffer) -> Data | EndOfMessage | None:
        return Data(buffer.take(buffer.left)) if buffer.left else None


class ChunkedReader:
    """A chunked body of at most `limit` bytes (None: no limit), RFC 9112 §7.1, strictly.

    `status` is what ProtocolErrors carry: 400 in requests, 502 in responses.
    """

    __slots__ = ("_left", "_limit", "_settings", "_status", "_step", "_total")

    def __init__(self, settings: Settings, limit: int | None, status: int) -> None:
        self._settings = settings
        self._limit = limit
        self._status = status
        self._step = self._size
        self._left = 0
        self._total = 0

    def next(self, buffer: ReceiveBuffer) -> Data | EndOfMessage | None:
        return self._step(buffer)

    def _size(self, buffer: ReceiveBuffer) -> Data | EndOfMessage | None:
        length = buffer.find(b"\r\n")
        if length < 0 and buffer.left <= _MAX_CHUNK_LINE:
            if _CHUNK_LINE_BEGUN.fullmatch(buffer.peek()) is None:
                raise self._broken()
            return None
        if length < 0 or length > _MAX_CHUNK_LINE:
            raise ProtocolError(self._status, "chunk_line_too_long", "a chunk-size line too long")
        match = _CHUNK_LINE.fullmatch(buffer.take(length)[:-2])
        if match is None:
            raise self._broken()
        self._left = int(match[1], 16)
        self._total += self._left
        if self._limit is not None and self._total > self._limit:
            raise ProtocolError(413, "body_too_large", f"the body exceeds {self._limit} bytes")
        self._step = self._data if self._left else self._trailers
        return self._step(buffer)

    def _data(self, buffer: ReceiveBuffer) -> Data | EndOfMessage | None:
        count = min(self._left, buffer.left)
        if not count:
            return None
        self._left -= count
        if not self._left:
            self._step = self._end
        return Data(buffer.take(count))

    def _end(self, buffer: ReceiveBuffer) -> Data | EndOfMessage | None:
        available = buffer.data[buffer.position : buffer.position + 2]
        if not b"\r\n".startswith(available):
            raise self._broken()
        if len(available) < 2:
            return None
        buffer.take(2)
        self._step = self._size
        return self._size(buffer)

    def _trailers(self, buffer: ReceiveBuffer) -> Data | EndOfMessage | None:
        if buffer.data.startswith(b"\r\n", buffer.position):
            buffer.take(2)
            return EndOfMessage()
        length = buffer.find(b"\r\n\r\n")
        if max(length, buffer.left if length < 0 else 0) > self._settings.max_head_bytes:
            raise ProtocolError(
                431 if self._status == 400 else self._status,
                "trailers_too_large",
                f"trailers larger than {self._settings.max_head_bytes} bytes",
            )
        if length < 0:
            return None
        try:
            fields = parse_fields(buffer.take(length)[:-2], self._settings.max_headers)
        except ProtocolError as error:
            status = error.status if self._status == 400 else self._status
            raise ProtocolError(status, error.reason, f"trailers: {error.detail}") from None
        return EndOfMessage(filter_trailers(fields))

    def _broken(self) -> ProtocolError:
        return ProtocolError(self._status, "bad_chunk", "the chunked framing is broken")


class BodyWriter:
    """Frames one outgoing body. With `silent` (HEAD, 204, 304) nothing of it is sent."""

    __slots__ = ("_left", "_length", "_silent")

    def __init__(self, length: BodyLength, *, silent: bool = False) -> None:
        self._length = length
        self._silent = silent
        self._left = length if isinstance(length, int) else 0

    @property
    def ends_by_close(self) -> bool:
        """Nothing in the bytes tells their end."""
        return self._length is Framing.CLOSE and not self._silent

    @property
    def complete(self) -> bool:
        """All bytes that were declared have come."""
        return isinstance(self._length, int) and not self._left

    def data(self, data: bytes) -> Sequence[bytes]:
        """The pieces to send for some body bytes. ValueError: more than was declared."""
        if self._silent or not data:
            return ()
        if self._length is Framing.STREAM:
            return (b"%x\r\n" % len(data), data, b"\r\n")
        if self._length is not Framing.CLOSE:
            self._left -= len(data)
            if self._left < 0:
                raise ValueError("a body longer than its Content-Length")
        return (data,)

    def end(self, trailers: Headers) -> bytes:
        """What ends the body. ValueError: less than was declared."""
        if self._silent:
            return b""
        if self._left:
            raise ValueError("a body shorter than its Content-Length")
        if self._length is not Framing.STREAM:
            return b""
        if not trailers:
            return b"0\r\n\r\n"
        return encode_head(b"0\r\n", filter_trailers(trailers))


def encode_head(start: bytes, fields: Headers) -> bytes:
    """A start line (with its CRLF), field lines and the empty line. ValueError if any part would
    have broken out of its line: no bug elsewhere may turn one message into two."""
    block = start + b"".join([b"%b: %b\r\n" % field for field in fields]) + b"\r\n"
    lines = len(fields) + 2
    if block.count(b"\n") != lines or block.count(b"\r") != lines or b"\0" in block:
        raise ValueError("a head with CR, LF or NUL inside a field")
    return block
