"""The HTTP/1.1 driver toward clients: one connection, its timers, its requests one after another.

It moves bytes between a transport and `ServerCodec` and runs the handler for each request. What a
request means, and what HTTP/1.1 looks like on the wire, it does not know.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from l7proxy.http1_codec import ServerCodec
from l7proxy.http1_linger import LINGER_S, Linger
from l7proxy.http1_link import Deadline, Link
from l7proxy.http1_request import Http1Request
from l7proxy.lane import Lane
from l7proxy.message import Data, ProtocolError, RequestHead
from l7proxy.pairing import Pairing
from l7proxy.streams import ConnectionInfo, Handler
from l7proxy.tasks import spawn
from mesh.model.nodeconfig import Settings

_log = logging.getLogger("weft.http1")

# A request body that nobody read is taken off the connection up to this size, so that it can go on.
_DISCARD_BYTES = 64 * 1024
# An idle connection being drained may have a request in its socket that was not read yet.
_DRAIN_GRACE_S = 0.05


class Http1Server(Link):
    """A client's connection. The acceptor calls `connection_made` and hands over what it read.

    `on_refused` is told the reason of everything refused or cut off here; `on_closed` is called
    once, when the connection is gone.
    """

    def __init__(
        self,
        handler: Handler,
        info: ConnectionInfo,
        settings: Settings,
        *,
        scheme: bytes,
        on_refused: Callable[[str], None],
        on_closed: Callable[[], None],
    ) -> None:
        super().__init__(settings.body_timeout_s, info.steered.unread if info.steered else None)
        self.settings = settings
        self.scheme = scheme
        self.codec = ServerCodec(scheme, settings)
        self.timer = Deadline(self.loop, self._expired)
        self.failure: ProtocolError | None = None
        self._handler = handler
        self._info = info
        self._on_refused = on_refused
        self._on_closed = on_closed
        self._task: asyncio.Task[None] | None = None
        self._stream: Http1Request | None = None
        self._served = 0
        self._head_started = True  # the first head is due from the connection's start
        self._draining = False
        self._grace_over = False
        self._lingering: Linger | None = None
        self._pairing = info.pairing
        if self._pairing is not None:
            self._pairing.wake = self.wake
            self._pairing.active = self._note_activity
        self._lane = info.lane
        self._resting = False  # nothing of a next request has come
        self._sent: tuple[RequestHead, Handler] | None = None
        if self._lane is not None:
            self._lane.server = self

    # --- from the event loop ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.timer.set(self.settings.head_timeout_s)
        self._resting = True
        self._task = spawn(self._run(), name="http1 connection")

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self._lingering is not None:
            self._lingering.receive(len(data))
            return
        if self._resting and self._lane is not None and self._carry(self._lane, data):
            return
        self.codec.receive(data)
        self.hold_input(self.codec.buffer.left)
        self.wake()

    def eof_received(self) -> bool | None:
        self.eof = True
        stream = self._stream
        if stream is not None and stream.open and not self.awaiting_input and self.codec.cut_short:
            self._cancel()  # a request that will never be whole, and nobody reads who would notice
        self.wake()
        # A client that has sent its request may close its half and still wants the response. TLS
        # connections cannot be half-closed here.
        return not self.tls

    def connection_lost(self, exc: Exception | None) -> None:
        ended = self.eof and exc is None
        super().connection_lost(exc)
        self.timer.close()
        if self._lane is not None and self._lane.busy:
            self._lane.client_lost()
        if self._pairing is not None:
            self._pairing.close(ended=ended)
        if self._stream is not None and self._stream.open:
            self._cancel()
        self._on_closed()

    def stalled(self) -> None:
        self._on_refused("write_timeout")

    def drain(self) -> None:
        """Finish the request in hand with Connection: close; without one, close."""
        if self._draining:
            return
        self._draining = True
        if self._pairing is not None:
            self._pairing.dissolve()
        if self._lane is not None and self._lane.busy:
            if not self._lane.answering:
                self._lane.hand_over()
        elif self._stream is None:
            self._start_grace()
        elif not self._stream.responded:
            self.codec.keep_alive = False

    def _start_grace(self) -> None:
        self.loop.call_later(_DRAIN_GRACE_S, self._end_grace)

    def _end_grace(self) -> None:
        self._grace_over = True
        self.wake()

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _expired(self) -> None:
        """The client took too long over a head, over a body, between requests, or to go away."""
        if self._lingering is not None:
            self._lingering.end()
        elif self._lane is not None and self._lane.busy:
            self._lane.expired()
        elif self._stream is not None:
            self.failure = ProtocolError(408, "body_timeout", "the request's body did not come")
        elif not self.codec.between_requests:
            self.failure = ProtocolError(408, "head_timeout", "the request's head did not come")
        elif self._pairing is not None and self._pairing.offered:
            if self._pairing.in_use:
                self.timer.set(self.settings.idle_timeout_s)
            else:  # a request may be passing just now
                self.drain()
        else:
            if not self._served:
                self._on_refused("head_timeout")
            self.close_now()
        self.wake()

    def fail(self, error: ProtocolError) -> None:
        """Count what ends the connection; the next response is its last."""
        self.failure = error
        self.codec.keep_alive = False
        self._on_refused(error.reason)

    # --- requests that go straight on -------------------------------------------------------------

    def _carry(self, lane: Lane, data: bytes) -> bool:
        if lane.busy or self.codec.buffer.left or self._sent is not None:
            return False
        if self._draining or self.eof or self.gone or self.write_paused:
            return False
        if self.failure is not None or (self._pairing is not None and self._pairing.offered):
            return False
        return lane.take(data)

    def carrying(self, timeout_s: float | None) -> None:
        """A request is on its way, and may be for so long."""
        if timeout_s is None:
            self.timer.clear()
        else:
            self.timer.set(timeout_s)

    def carried(self) -> None:
        """It was answered."""
        self._served += 1
        self._head_started = False
        self.timer.set(self.settings.idle_timeout_s)
        if self._draining:
            self._start_grace()
        if self.codec.buffer.left or self.eof:
            self.wake()

    def resume(self, head: RequestHead, handler: Handler) -> None:
        """It is to be answered by `handler`."""
        self.timer.clear()
        self._sent = head, handler
        self.wake()

    def _check_room(self) -> None:
        super()._check_room()
        if self._lane is not None:
            self._lane.hold(self.write_paused)

    # --- requests --------------------------------------------------------------------------------

    async def _run(self) -> None:
        self._resting = False
        try:
            while (head := await self._next_head()) is not None and await self._serve(
                head, self._handler
            ):
                pass
            await self._linger()
        except BaseException:
            self.abort()
            raise

    def _note_activity(self) -> None:
        """Requests have passed by here."""
        if self._stream is None and self.codec.between_requests:
            self.timer.set(self.settings.idle_timeout_s)

    async def _take_over(self, pairing: Pairing) -> bool:
        """Let nothing pass by here any more, and answer what is outstanding; whether the connection
        goes on."""
        self.timer.clear()
        moved = self.eof or not self.codec.between_requests
        handler = await pairing.take_over(
            moved=moved, ended=lambda: self.eof, take=self._take, give=self._give
        )
        if self.lost:
            return False
        self._served += pairing.count
        if handler is None and pairing.lost:
            return False
        if handler is not None:
            self.codec.resume(pairing.head)
            if pairing.lost:
                self.codec.keep_alive = False
            return await self._serve(pairing.head, handler)
        self._head_started = False
        self.timer.set(self.settings.idle_timeout_s)
        return True

    def _take(self, count: int) -> bytes:
        """Of what has come as it is, up to so many bytes."""
        buffer = self.codec.buffer
        data = bytes(buffer.take(min(count, buffer.left)))
        self.hold_input(buffer.left)
        return data

    async def _give(self, data: bytes) -> None:
        """As it is."""
        if not self.gone:
            self.write((data,))
        if self.write_paused:
            await self.room()

    async def _next_head(self) -> RequestHead | None:
        """The next request's head; None at the end of the connection."""
        pairing, lane = self._pairing, self._lane
        while True:
            if self._sent is not None:
                (head, handler), self._sent = self._sent, None
                self.codec.resume(head)
                if not await self._serve(head, handler):
                    return None
            if lane is not None and lane.busy:
                await self._rest(True)
                continue
            if pairing is not None and pairing.offered:
                over = self.eof or self._draining or self.failure is not None
                if (over or pairing.due or not self.codec.between_requests) and (
                    not await self._take_over(pairing)
                ):
                    return None
            try:
                if self.failure is not None:
                    raise self.failure
                event = self.codec.next_event()
            except ProtocolError as error:
                self._refuse(error)
                return None
            if isinstance(event, RequestHead):
                self.timer.clear()
                return event
            waiting = self.codec.between_requests
            if self.eof or (waiting and self._grace_over):
                return None
            if not waiting and not self._head_started:
                self._head_started = True
                self.timer.set(self.settings.head_timeout_s)
            self.hold_input(self.codec.buffer.left)
            await self._rest(waiting)

    async def _rest(self, resting: bool) -> None:
        """Wait for input. `resting`: what comes is the beginning of a request."""
        self._resting = resting
        try:
            await self.more_input()
        finally:
            self._resting = False

    async def _serve(self, head: RequestHead, handler: Handler) -> bool:
        """Run a handler; whether the connection goes on."""
        self._served += 1
        limit = self.settings.max_requests_per_connection
        if self._draining or (limit is not None and self._served >= limit):
            self.codec.keep_alive = False
        stream = self._stream = Http1Request(self, head)
        try:
            await handler(stream, self._info)
        except Exception:
            _log.exception("the handler of a request failed")
        if self._pairing is not None and self._pairing.proposed:
            self._pairing.decline()
        if not stream.finished:
            if stream.responded or stream.aborted or self.lost:
                self.abort()
            else:
                self._refuse(ProtocolError(500, "unanswered", "the request was not answered"))
            return False
        if stream.tunnel or not await self._discard_body() or not self.codec.keep_alive:
            return False
        self._stream = None
        self.codec.next_request()
        self._head_started = False
        self.timer.set(self.settings.idle_timeout_s)
        if self._draining:
            self._start_grace()
        return True

    @property
    def pairing(self) -> Pairing | None:
        """Where the request that is served may be followed by others past the proxy."""
        pairing, codec = self._pairing, self.codec
        if pairing is None or not pairing.proposed or self._draining or self.eof or self.gone:
            return None
        if self.more_requests == 0 or not codec.request_whole:
            return None
        return pairing if codec.keep_alive else None

    @property
    def more_requests(self) -> int | None:
        """How many may come before the last one, which goes through the proxy; None: any number."""
        limit = self.settings.max_requests_per_connection
        return None if limit is None else max(0, limit - self._served - 1)

    async def _discard_body(self) -> bool:
        """Take what is left of the request off the connection; whether that came to its end."""
        left = _DISCARD_BYTES
        if not self.codec.request_complete:
            self.timer.set(LINGER_S)
        while not self.codec.request_complete:
            if self.failure is not None:
                return False
            try:
                event = self.codec.next_event()
            except ProtocolError as error:
                self.fail(error)
                return False
            if isinstance(event, Data):
                left -= len(event.data)
                if left < 0:
                    return False
            elif event is None:
                if self.eof or not self.codec.keep_alive:
                    return False
                self.hold_input(0)
                await self.more_input()
        return True

    def _refuse(self, error: ProtocolError) -> None:
        """Answer in the handler's place."""
        self.fail(error)
        if self.transport is not None and not self.gone:
            self.write((self.codec.error(error),))

    async def _linger(self) -> None:
        """Close so that the client gets the last response, whatever it is still sending."""
        self._stream = None
        linger = self._lingering = Linger(self)
        self.timer.clear()
        self.hold_input(0)
        await self.half_close()
        if self.codec.ends_by_close:
            self.reset_on_close(False)
        if self.tls and self.failure is None and self.codec.request_complete:
            linger.end()
        short = self.tls or (self._grace_over and self.codec.between_requests)
        await linger.run(self.timer, short=short)
        if self.transport is not None:
            self.transport.close()
