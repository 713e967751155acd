"""A turn on a tunnel: one relayed connection inside of TLS, after which others may follow.

What a connection sends goes as pieces, each behind its length (four bytes, big-endian); a length of
0 ends its half. When both halves have ended, and all of it is passed on, the end that was connected
to says DONE: from then on the other may ask for the next turn, with another preface. Whatever is no
such end breaks the tunnel off, so that a reset is seen as one and nobody takes a turn after it.

Once both halves have ended a turn is whole: what becomes of the tunnel is no matter to it any more.
Knows framing, neither identities nor policies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, cast

from l7proxy.tls_stream import TLSStream

_HEAD_BYTES = 4
_END = bytes(_HEAD_BYTES)
_DONE_LENGTH = 0xFFFF_FFFF
_DONE = _DONE_LENGTH.to_bytes(_HEAD_BYTES, "big")
# No piece is longer: what is longer goes as several.
_MAX_PIECE = 1 << 24
# How long DONE is waited for, once this end's turn is over, seconds.
_DONE_WAIT_S = 5.0


class Turn(asyncio.Transport, asyncio.Protocol):
    """The transport of one connection, over a stream whose protocol it is until the turn is over:
    then nobody has the stream, and `over` is told. `answers`: of the end that says DONE.

    It closes in good order only (`half_close`, then `close`); else `abort`.
    """

    def __init__(self, stream: TLSStream, over: Callable[[], None], *, answers: bool) -> None:
        super().__init__()
        self._stream = stream
        self._over = over
        self._answers = answers
        self._above: asyncio.Protocol
        self._head = b""  # a part of one
        self._left = 0  # bytes of the piece that is coming
        self._ended = False  # our half
        self._peer_ended = False
        self._closed = False  # by whoever is above, in good order
        self._done = False  # the peer has said so
        self._told = False  # above, of its end
        self._lost = False
        self._aborted = False
        self._paused = False
        self._wait: asyncio.TimerHandle | None = None

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Who gets the bytes; once."""
        self._above = cast(asyncio.Protocol, protocol)
        self._above.connection_made(self)
        self._stream.set_protocol(self)

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._above

    # --- from below -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        pass

    def data_received(self, data: bytes) -> None:
        at, end = 0, len(data)
        while at < end:
            if self._left:
                piece = data[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                self._above.data_received(piece)
                continue
            head = self._head + data[at : at + _HEAD_BYTES - len(self._head)]
            at += len(head) - len(self._head)
            self._head = head
            if len(head) == _HEAD_BYTES:
                self._head = b""
                if not self._begins(int.from_bytes(head, "big"), last=at == end):
                    self._stream.abort()
                    return
        if self._done and self._closed:
            self._end()

    def _begins(self, length: int, *, last: bool) -> bool:
        """What such a length begins. False: nothing that may come now."""
        if length == _DONE_LENGTH:
            self._done = self._ended and self._peer_ended and not self._answers and last
            return self._done
        if self._peer_ended or length > _MAX_PIECE:
            return False
        self._left = length
        if not length:
            self._peer_ended = True
            self._above.eof_received()
        return True

    def eof_received(self) -> bool | None:
        """The peer closes the tunnel."""
        if not self._whole:
            self._stream.abort()
        elif self._closed:
            self._stream.close()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        if self._wait is not None:
            self._wait.cancel()
        if self._whole and not self._aborted:
            self._above.resume_writing()  # nothing waits to be written
        else:
            self._tell_lost(exc)

    def pause_writing(self) -> None:
        self._above.pause_writing()

    def resume_writing(self) -> None:
        self._above.resume_writing()

    # --- from above -------------------------------------------------------------------------------

    @property
    def _whole(self) -> bool:
        return self._ended and self._peer_ended

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._ended or self.is_closing():
            return
        size = len(data)
        if size <= _MAX_PIECE:
            if size:
                self._stream.writelines((size.to_bytes(_HEAD_BYTES, "big"), data))
            return
        view = memoryview(data)
        for at in range(0, size, _MAX_PIECE):
            self.write(view[at : at + _MAX_PIECE])

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        self.write(b"".join(list_of_data))

    def half_close(self) -> None:
        """Nothing more will be written; the peer may still send."""
        if not self._ended and not self.is_closing():
            self._ended = True
            self._stream.write(_END)

    def close(self) -> None:
        """All that came is passed on, both halves have ended."""
        if self._closed:
            return
        if not self._whole:
            self.abort()
            return
        self._closed = True
        loop = asyncio.get_running_loop()
        loop.call_soon(self._tell_lost, None)
        if self._paused:
            self._stream.resume_reading()
        if self._lost:
            return
        if self._answers:
            self._stream.write(_DONE)
            self._end()
        elif self._done:
            self._end()
        else:
            self._wait = loop.call_later(_DONE_WAIT_S, self._stream.close)

    def _end(self) -> None:
        if self._wait is not None:
            self._wait.cancel()
        self._stream.release()
        self._over()

    def _tell_lost(self, exc: Exception | None) -> None:
        if not self._told:
            self._told = True
            self._above.connection_lost(exc)

    def abort(self) -> None:
        """Of a turn that is over nothing is left to be broken off."""
        if self._closed:
            return
        self._aborted = True
        if self._lost:
            asyncio.get_running_loop().call_soon(self._tell_lost, None)
        else:
            self._stream.abort()

    def is_closing(self) -> bool:
        return self._closed or self._lost or self._stream.is_closing()

    def pause_reading(self) -> None:
        if not self._closed:
            self._paused = True
            self._stream.pause_reading()

    def resume_reading(self) -> None:
        if not self._closed:
            self._paused = False
            self._stream.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if not self._closed:
            self._stream.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return 0 if self._closed or self._lost else self._stream.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._stream.get_extra_info(name, default)
