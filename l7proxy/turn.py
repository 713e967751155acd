"""A turn on a tunnel: one relayed connection inside of TLS, after which others may follow.

What a connection sends goes as pieces, each behind its length (four bytes, big-endian). A length of
0 ends its half. When both halves have ended the turn is whole: the stream is free, and what comes
next is the next turn's preface. What becomes of the tunnel then is no matter to the turn. Whatever
else ends a turn breaks the tunnel off, so that a reset is seen as one and nobody takes a turn after
it. Knows framing, neither identities nor policies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, cast

from l7proxy.tls_stream import TLSStream

_HEAD_BYTES = 4
_END = bytes(_HEAD_BYTES)
# No piece is longer: what is longer goes as several.
_MAX_PIECE = 1 << 24


class Turn(asyncio.Transport, asyncio.Protocol):
    """The transport of one connection, over a stream whose protocol it is until the turn is whole:
    then nobody has the stream, and `over` is told.

    `half_close` and then `close` end it in good order, anything else is a reset.
    """

    def __init__(self, stream: TLSStream, over: Callable[[], None]) -> None:
        super().__init__()
        self._stream = stream
        self._over = over
        self._above: asyncio.Protocol
        self._head = b""  # a part of one
        self._left = 0  # bytes of the piece that is coming
        self._ended = False  # our half
        self._peer_ended = False
        self._whole = False  # and the stream is somebody else's
        self._closed = False  # by whoever is above
        self._paused = False

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
            if self._peer_ended:
                self._stream.abort()  # only what follows a turn may come then
                return
            head = self._head + data[at : at + _HEAD_BYTES - len(self._head)]
            at += len(head) - len(self._head)
            self._head = head
            if len(head) < _HEAD_BYTES:
                return
            self._head, self._left = b"", int.from_bytes(head, "big")
            if self._left > _MAX_PIECE:
                self._stream.abort()
                return
            if not self._left:
                self._peer_ended = True
                self._release_if_whole(data[at:])
                self._above.eof_received()
                if self._whole:
                    return

    def eof_received(self) -> bool | None:
        """The peer closes the tunnel in the middle."""
        self._stream.abort()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        self._above.connection_lost(exc)

    def pause_writing(self) -> None:
        self._above.pause_writing()

    def resume_writing(self) -> None:
        self._above.resume_writing()
        self._release_if_whole()

    def _release_if_whole(self, rest: bytes = b"") -> None:
        """`rest` is what has come behind the peer's end. Our own counts once it has gone out."""
        if self._whole or not (self._ended and self._peer_ended):
            return
        if self._stream.is_closing() or self._stream.get_write_buffer_size():
            return
        self._whole = True
        if self._paused:
            self._stream.resume_reading()
        self._stream.release(rest)
        self._over()

    # --- from above -------------------------------------------------------------------------------

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
            self._release_if_whole()

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """A reset, of a turn that is not whole."""
        if self._closed:
            return
        if self._whole:
            self._closed = True
            asyncio.get_running_loop().call_soon(self._above.connection_lost, None)
        else:
            self._stream.abort()

    def is_closing(self) -> bool:
        return self._closed or self._whole or self._stream.is_closing()

    def pause_reading(self) -> None:
        if not self.is_closing():
            self._paused = True
            self._stream.pause_reading()

    def resume_reading(self) -> None:
        if not self.is_closing():
            self._paused = False
            self._stream.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if not self.is_closing():
            self._stream.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return 0 if self._closed or self._whole else self._stream.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._stream.get_extra_info(name, default)
