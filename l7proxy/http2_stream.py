"""One stream of an HTTP/2 connection: what was received and not yet read, and what may be sent.

Bytes are taken off the peer's windows only when `read` takes them; `write` waits for the peer's
windows and for the transport. What the halves mean, request or response, is known by
`http2_server` and `http2_client` only.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from h2.errors import ErrorCodes

from l7proxy.http2_fields import outgoing, trailers_of
from l7proxy.message import Headers, ProtocolError
from l7proxy.streams import StreamReset
from mesh.model.nodeconfig import Settings

if TYPE_CHECKING:
    from l7proxy.http2_connection import Http2Connection

# A peer gets body_timeout_s to take each piece of this size.
_PIECE = 16 * 1024


class Http2Stream:
    """Both halves of a stream. `id` is 0 until its HEADERS are sent."""

    def __init__(self, connection: Http2Connection[Http2Stream], stream_id: int) -> None:
        self.id = stream_id
        self.trailers: Headers = []
        self.ended = False  # by the peer's END_STREAM
        self.finished = False  # by ours
        self.reset = False  # by either side's RST_STREAM, or the connection is gone
        self._connection = connection
        self._expected: int | None = None  # bytes that a Content-Length still promises
        self._buffer = bytearray()
        self._read_failure: Exception | None = None
        self._write_failure: Exception | None = None
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()

    # --- reading ------------------------------------------------------------------------------

    async def read(self) -> bytes:
        while True:
            if self._read_failure is not None:
                raise self._read_failure
            if self._buffer:
                data = bytes(self._buffer)
                self._buffer.clear()
                self._connection.acknowledge(self.id, len(data))
                return data
            if self.ended:
                return b""
            self._readable.clear()
            await self._wait_readable()

    async def _wait_readable(self) -> None:
        await self._readable.wait()

    def on_data(self, data: bytes, padding: int, *, ended: bool) -> None:
        """DATA came; h2 has already checked it against the windows."""
        if self._expected is not None:
            self._expected -= len(data)
            if self._expected < 0 or (ended and self._expected):
                self.malformed("content_length_mismatch", "the body is not of its Content-Length")
        if self._read_failure is None:
            self._buffer += data
        else:
            padding += len(data)
        if padding:
            self._connection.acknowledge(self.id, padding)
        self.ended = self.ended or ended
        self._readable.set()

    def on_trailers(self, fields: Headers, settings: Settings) -> None:
        self.ended = True
        try:
            self.trailers = trailers_of(fields, settings, self.malformed_status)
        except ProtocolError as error:
            self.malformed(error.reason, error.detail)
        if self._expected:
            self.malformed("content_length_mismatch", "the body is shorter than its Content-Length")
        self._readable.set()

    malformed_status: ClassVar[int]

    def malformed(self, reason: str, detail: str) -> None:
        """What the peer sends on this stream cannot be used; what was not read of it is dropped."""
        self.fail_reading(ProtocolError(self.malformed_status, reason, detail))

    def fail_reading(self, error: Exception) -> None:
        if self._read_failure is None:
            self._read_failure = error
        self.drop()
        self._readable.set()

    def drop(self) -> None:
        """Give the window of unread bytes back to the other streams."""
        if self._buffer:
            self._connection.acknowledge(self.id, len(self._buffer))
            self._buffer.clear()

    def fail(self, error: Exception) -> None:
        """Nothing goes either way any more."""
        self.reset = True
        if not self.ended:
            self.fail_reading(error)
        self.fail_writing(error)

    # --- writing ------------------------------------------------------------------------------

    def fail_writing(self, error: Exception) -> None:
        if self._write_failure is None:
            self._write_failure = error
        self._writable.set()

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            piece = view[start : start + _PIECE]
            piece = piece[self._send(piece) :]
            if piece:
                await self._send_slowly(piece)

    async def _send_slowly(self, piece: memoryview) -> None:
        seconds = self._connection.settings.body_timeout_s
        try:
            async with asyncio.timeout(seconds):
                while piece:
                    await self._writable.wait()
                    piece = piece[self._send(piece) :]
        except TimeoutError:
            why = f"the peer did not take {_PIECE} bytes within {seconds:g} s"
            self._connection.refused("h2_write_timeout")
            self.abort(why)
            raise StreamReset(why) from None

    def _send(self, piece: memoryview) -> int:
        """Send what may be sent now; returns how much. Clears `_writable` if that is not all."""
        if self._write_failure is not None:
            raise self._write_failure
        sent = self._connection.send_data(self.id, piece)
        if sent < len(piece):
            self._writable.clear()
        return sent

    async def room(self) -> None:
        """Wait while the transport is full; StreamReset if it stays so."""
        if not self._connection.paused:
            return
        self._writable.clear()
        try:
            async with asyncio.timeout(self._connection.settings.body_timeout_s):
                while self._connection.paused and self._write_failure is None:
                    self._writable.clear()
                    await self._writable.wait()
        except TimeoutError:
            self._connection.refused("h2_write_timeout")
            self.abort("the peer does not read")
        if self._write_failure is not None:
            raise self._write_failure

    def wake(self) -> None:
        self._writable.set()

    async def finish(self, trailers: Headers) -> None:
        if self.finished:
            return
        if self._write_failure is not None:
            raise self._write_failure
        self.finished = True
        self._connection.end_stream(self.id, outgoing(trailers))

    def abort(self, why: str) -> None:
        self.give_up(why, ErrorCodes.INTERNAL_ERROR)

    def give_up(self, why: str, code: ErrorCodes) -> None:
        """RST_STREAM, unless both halves have ended. Idempotent."""
        if self.id and not self.reset and not (self.ended and self.finished):
            self._connection.reset_stream(self.id, code)
        self.fail(StreamReset(why))
        self.drop()
