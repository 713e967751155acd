"""The HTTP/1.1 driver toward backends: one connection, one request at a time (`ClientConnection`).

It moves bytes between a transport and `ClientCodec`. It never repeats anything: it tells, in
`StreamReset`, what the caller needs for that decision. It knows no pools and no timers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from l7proxy.http1_codec import ClientCodec
from l7proxy.http1_link import Link
from l7proxy.message import (
    Data,
    EndOfMessage,
    Framing,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
)
from l7proxy.streams import ClientConnection, ClientStream, StreamReset
from mesh.model.nodeconfig import Settings

if TYPE_CHECKING:
    from l7proxy.lane import Lane


class Http1Client(Link):
    """A backend's connection.

    `on_change` is told when a stream gave its place back, be it to a keeper, and when the
    connection closes of itself. Bytes that nobody asked for close it: they are no response to any
    request of ours. `unread` as in `Link`.
    """

    def __init__(
        self,
        settings: Settings,
        on_change: Callable[[ClientConnection], None],
        unread: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(None, unread)
        self.codec = ClientCodec(settings)
        self.broken = False  # by an error, not by an orderly close
        self.answered = False  # a byte came since the request was sent
        self.cookie = 0  # of the far socket, where requests can reach it past the proxy
        self.held = False  # by whoever keeps it: no requests come from the pool
        self.wanted = False  # while it is held, by a request that waits
        self.used: float | None = None
        self._keeper: Callable[[], None] | None = None
        self._last = False  # what it serves
        self._on_change = on_change
        self._stream: _Stream | None = None
        self._lane: Lane | None = None
        self._streams = 0
        self._closing = False

    @property
    def capacity(self) -> int:
        if self._stream is not None or self._lane is not None or self.held or self.closed:
            return 0
        return 1

    @property
    def closed(self) -> bool:
        return self._closing or self.eof or self.gone

    @property
    def active(self) -> int:
        return 0 if self._stream is None and self._lane is None and not self.held else 1

    def open(self) -> ClientStream:
        self.answered = False
        self.used = None
        self._stream = _Stream(self, reused=self._streams > 0)
        self._streams += 1
        return self._stream

    def close(self) -> None:
        self._closing = True
        if not self.active:
            self.close_now()

    # --- requests that go straight on (`lane`) ----------------------------------------------------

    def carry(self, lane: Lane, request: bytes) -> None:
        """Send a whole request as it is; `lane` gets what comes for it."""
        self._lane = lane
        self._streams += 1
        self.answered = False
        self.used = None
        self.send(request)

    def carried(self, *, reusable: bool) -> None:
        """The request of `carry` has ended."""
        self._lane = None
        self.release(reusable=reusable)

    def take_over(self, head: RequestHead, received: bytes) -> ClientStream:
        """A stream for the request that was carried, of whose response this has come; its body has
        gone. ValueError: as `request`."""
        self._lane = None
        self.answered = bool(received)
        self.codec.request(dataclasses.replace(head, body=Framing.NONE))
        self.codec.receive(received)
        self._stream = _Stream(self, reused=self._streams > 1, sent=True)
        return self._stream

    # --- while it is kept (`ClientStream.keep`) ---------------------------------------------------

    def keep(self, keeper: Callable[[], None]) -> None:
        self._keeper = keeper

    def recall(self) -> bool:
        if self._keeper is None or self.wanted or not self.held:
            return False
        self.wanted = True
        self._keeper()
        return True

    @property
    def unread(self) -> int:
        """Bytes that have come while it was held."""
        return self.codec.buffer.left

    def resume(self, head: RequestHead, *, last: bool) -> ClientStream:
        """For the response to a request that was sent past the proxy. `last`: no other goes over
        the connection. ValueError: as `request`."""
        self._last = last
        self.held = False
        self._keeper = None
        self.answered = False
        self.codec.request(head)
        self._stream = _Stream(self, reused=True, sent=True)
        return self._stream

    def bring(self, data: bytes) -> None:
        """The rest of a request that was sent past the proxy, or a part of it."""
        if not self.gone:
            self.write((data,))

    def take(self, count: int) -> bytes:
        """Of what has come while it was held, up to so many bytes."""
        buffer = self.codec.buffer
        data = bytes(buffer.take(min(count, buffer.left)))
        self.hold_input(buffer.left)
        return data

    def let_go(self, *, reusable: bool, used: float | None = None) -> None:
        """Back to the pool, or closed; also if it is not held (any more)."""
        self._keeper = None
        if self.held:
            self.held = False
            self.used = used
            self.release(reusable=reusable)

    # --- from the event loop ---------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self._lane is not None:
            self._lane.response(data)
            return
        if self.held:
            self.codec.receive(data)
            self.hold_input(self.codec.buffer.left)
            self._tell_keeper()
            return
        if self._stream is None or not self.codec.response_due:
            self._closing = True
            self.abort()
            return
        self.answered = True
        self.codec.receive(data)
        self.hold_input(self.codec.buffer.left)
        self.wake()

    def eof_received(self) -> bool | None:
        self.eof = True
        if self._lane is not None:
            self._lane.backend_ended()
        self.wake()
        if self.held:
            self._tell_keeper()
            return True
        if self._stream is None:
            self._on_change(self)
            return False
        return not self.tls  # the stream closes when it has read what there is

    def connection_lost(self, exc: Exception | None) -> None:
        self.broken = exc is not None
        super().connection_lost(exc)
        if self._lane is not None:
            self._lane.backend_ended()
        if self.held:
            self._tell_keeper()
        self._on_change(self)

    def _tell_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper()

    # --- from the stream -------------------------------------------------------------------------

    def release(self, *, reusable: bool) -> None:
        """The stream has ended."""
        self._stream = None
        if not reusable:
            self._closing = True
            self.abort()
        elif self._last or self.closed or not self.codec.keep_alive or self.codec.buffer.left:
            self._closing = True
            self.reset_on_close(False)
            self.close_now()
        else:
            self.hold_input(0)
            # Who waits may have come before there was anybody to recall it from: it is told of too.
            self.held = self._keeper is not None
        self.wanted = self.wanted and self.held
        self._on_change(self)


class _Stream:
    """One request on the connection (`ClientStream`)."""

    def __init__(self, connection: Http1Client, *, reused: bool, sent: bool = False) -> None:
        self.trailers: Headers = []
        self._connection = connection
        self._reused = reused
        self._written = sent
        self._sent = sent
        self._received = False
        self._released = False
        self._tunnel = False

    def keep(self, keeper: Callable[[], None]) -> Http1Client | None:
        connection = self._connection
        if not connection.cookie or self._released:
            return None
        connection.keep(keeper)
        return connection

    async def request(self, head: RequestHead) -> None:
        connection = self._connection
        if connection.closed and not self._released:
            self._release(reusable=False)
        if self._released:
            raise self._reset("the backend closed before the request was sent")
        try:
            block = connection.codec.request(head)
        except ValueError as error:
            self._release(reusable=False)
            raise ProtocolError(500, "unsafe_head", str(error)) from None
        self._written = True
        await self._send((block,))
        if head.body is Framing.NONE:
            self._sent = True

    async def write(self, data: bytes) -> None:
        await self._send(self._connection.codec.data(data))

    async def finish(self, trailers: Headers) -> None:
        connection = self._connection
        if self._tunnel:
            if connection.tls and connection.transport is not None:
                connection.transport.close()
            await connection.half_close()
        elif tail := connection.codec.end(trailers):
            await self._send((tail,))
        self._sent = True
        self._release_if_ended()

    async def response(self) -> ResponseHead:
        event = await self._next()
        if not isinstance(event, ResponseHead):
            raise RuntimeError("the response's head was read before")
        self._tunnel = event.status == 101
        if self._tunnel:
            self._connection.reset_on_close(True)
        return event

    async def read(self) -> bytes:
        if self._received:
            return b""
        event = await self._next()
        if isinstance(event, Data):
            return event.data
        if isinstance(event, ResponseHead):
            raise RuntimeError("the response's head was not read before its body")
        self.trailers = event.trailers
        self._received = True
        self._release_if_ended()
        return b""

    def abort(self, why: str) -> None:
        if not self._released:
            self._release(reusable=False)

    async def _next(self) -> ResponseHead | Data | EndOfMessage:
        connection = self._connection
        codec = connection.codec
        while not self._released:
            try:
                event = codec.next_event()
            except ProtocolError:
                self._release(reusable=False)
                raise
            if event is None and connection.eof:
                # A reset is no orderly end, not even of a body that the close delimits.
                event = None if connection.broken else codec.receive_eof()
                if event is None:
                    break
            connection.hold_input(codec.buffer.left)
            if event is not None:
                return event
            await connection.more_input()
        error = self._reset("the backend closed before its response was whole")
        self.abort(str(error))
        raise error

    async def _send(self, pieces: Sequence[bytes]) -> None:
        connection = self._connection
        if connection.gone or self._released:
            raise self._reset("the backend is gone")
        connection.write(pieces)
        if connection.write_paused:
            await connection.room()

    def _reset(self, why: str) -> StreamReset:
        return StreamReset(
            why,
            unprocessed=not self._written,
            reused=self._reused and not self._connection.answered,
        )

    def _release_if_ended(self) -> None:
        if self._sent and self._received and not self._released:
            self._release(reusable=True)

    def _release(self, *, reusable: bool) -> None:
        self._released = True
        self._connection.wake()
        self._connection.release(reusable=reusable)
