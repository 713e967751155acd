"""What the HTTP/1.1 drivers of both sides share: waiting, flow control and half-close on asyncio.

Writers wait for the transport and, where bytes go by redirect, for the receiver (`redirect`). One
task reads and one writes at a time. The transport's own half-close is never used: uvloop frees a
handle twice if a close follows while data is queued (a regression test reproduces it).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import cast
from weakref import WeakKeyDictionary

from l7proxy.dial import reset_on_close
from l7proxy.halves import end_half
from l7proxy.redirect import RedirectQueue

_log = logging.getLogger("weft.link")

# Received bytes beyond which reading pauses, and written ones beyond which writers wait.
READ_AHEAD = 64 * 1024
WRITE_AHEAD = 64 * 1024
# Larger pieces do not wait for others.
_SMALL = 4096


class Deadline:
    """A timer that is cheap to move: setting it later, or clearing it, touches no event loop."""

    __slots__ = ("_at", "_expired", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop, expired: Callable[[], None]) -> None:
        self._loop = loop
        self._expired = expired
        self._at: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def set(self, seconds: float) -> None:
        self._at = self._loop.time() + seconds
        if self._timer is not None:
            if self._timer.when() <= self._at:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(self._at, self._tick)

    def clear(self) -> None:
        self._at = None

    def close(self) -> None:
        """Clear it and let go of the event loop."""
        self._at = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = None
        if self._at is None:
            return
        if self._at <= self._loop.time():
            self._at = None
            self._expired()
        else:
            self._timer = self._loop.call_at(self._at, self._tick)


# Of each event loop: those that have something to send once it has handed out what has come.
_sending: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Link]] = WeakKeyDictionary()


def _send_all(waiting: list[Link]) -> None:
    links = waiting.copy()
    waiting.clear()
    for link in links:
        try:
            link.send_now()
        except Exception:
            _log.exception("what waited to be sent was not")
            link.abort()


class Link(asyncio.Protocol):
    """A connection's transport. `lost`: it is gone; `eof`: the peer sends no more.

    With `stall_s` a peer that takes none of the bytes that wait for it for that long is cut off,
    after `stalled` was told. `unread`, where bytes go by redirect, tells how many the peer holds.
    """

    def __init__(self, stall_s: float | None, unread: Callable[[], int] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self.eof = False
        self.tls = False
        self.received = 0  # bytes, since it was established
        self._input: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None
        self.write_paused = False
        self._transport_full = False
        self._redirect: RedirectQueue | None = None
        self.paced_by(unread)
        self._read_paused = False
        self._stall_s = stall_s
        self._stall = Deadline(self.loop, self._check_progress)
        self._waiting_bytes = 0
        self._soon = b""  # to be written once the event loop has handed out what has come
        self._sending = _sending.setdefault(self.loop, [])

    def paced_by(self, unread: Callable[[], int] | None) -> None:
        """What is sent goes by redirect, where `unread` is given."""
        if unread is not None:
            self._redirect = RedirectQueue(unread, self._check_room)

    @property
    def gone(self) -> bool:
        """Nothing can be written any more: it is lost, or about to be."""
        transport = self.transport
        return self.lost or transport is None or transport.is_closing()

    # --- from the event loop ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.tls = transport.get_extra_info("ssl_object") is not None
        self.transport.set_write_buffer_limits(WRITE_AHEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = self.eof = True
        self._soon = b""
        self._stall.close()
        if self._redirect is not None:
            self._redirect.close()
        self.wake()
        self._wake_writer()

    def pause_writing(self) -> None:
        self._transport_full = True
        self._check_room()

    def resume_writing(self) -> None:
        self._transport_full = False
        self._check_room()

    def _check_room(self) -> None:
        """The transport or the receiver has become full, or is not full any more."""
        full = self._transport_full or (self._redirect is not None and self._redirect.full)
        if full is self.write_paused:
            return
        self.write_paused = full
        if not full:
            self._stall.clear()
            self._wake_writer()
        elif self._stall_s is not None:
            self._waiting_bytes = self._untaken()
            self._stall.set(self._stall_s)

    def _untaken(self) -> int:
        """Bytes that the peer has not taken, as far as is known here."""
        size = self.transport.get_write_buffer_size() if self.transport is not None else 0
        return size + (self._redirect.unread() if self._redirect is not None else 0)

    def stalled(self) -> None:
        """The peer is about to be cut off."""

    def _check_progress(self) -> None:
        if self.transport is None or self._stall_s is None or not self.write_paused:
            return
        size = self._untaken()
        if size < self._waiting_bytes:
            self._waiting_bytes = size
            self._stall.set(self._stall_s)
        else:
            self.stalled()
            self.transport.abort()

    # --- reading ---------------------------------------------------------------------------------

    async def more_input(self) -> None:
        """Wait for bytes, the end of them, or whatever else calls `wake`."""
        waiter = self._input = self.loop.create_future()
        try:
            await waiter
        finally:
            if self._input is waiter:  # else another waits by now, and this task was cancelled
                self._input = None

    @property
    def awaiting_input(self) -> bool:
        return self._input is not None

    def wake(self) -> None:
        if self._input is not None and not self._input.done():
            self._input.set_result(None)

    def hold_input(self, buffered: int) -> None:
        """Stop receiving while more than enough is buffered, and go on when it is not."""
        if (buffered > READ_AHEAD) is not self._read_paused:
            self.hold(not self._read_paused)

    def hold(self, paused: bool) -> None:
        """Stop receiving, or go on. After the peer's end there is nothing to stop, and who goes on
        is told of it again."""
        if paused is self._read_paused or self.transport is None or self.gone:
            return
        if paused and self.eof:
            return
        self._read_paused = paused
        if paused:
            self.transport.pause_reading()
        else:
            self.transport.resume_reading()

    # --- writing ---------------------------------------------------------------------------------

    def write(self, pieces: Sequence[bytes]) -> None:
        """Hand bytes to the transport; only while there is one."""
        assert self.transport is not None
        if self._soon:
            self.send_now()
        self.transport.writelines(pieces)
        if self._redirect is not None:
            self._redirect.sent(sum(map(len, pieces)))

    def send(self, data: bytes) -> None:
        """The same for one piece, which may wait until the event loop has handed out all that has
        come: who receives one thing after the other while it is awake is woken less often, and
        waking costs the sender more than sending."""
        if self._soon or len(data) > _SMALL:
            self.write((data,))
            return
        self._soon = data
        if not self._sending:
            self.loop.call_soon(_send_all, self._sending)
        self._sending.append(self)

    def send_now(self) -> None:
        """What waits for the event loop (see `send`)."""
        data, self._soon = self._soon, b""
        if data and self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)
            if self._redirect is not None:
                self._redirect.sent(len(data))

    def write_through(self, data: bytes) -> bool:
        """Hand bytes to the kernel now, all of them, or none (False). Not for TLS."""
        self.send_now()
        transport = self.transport
        if transport is None or self.gone or self.write_paused or transport.get_write_buffer_size():
            return False
        try:
            sent = os.write(transport.get_extra_info("socket").fileno(), data)
        except OSError:
            return False
        if sent < len(data):  # by redirect there is always room
            transport.write(data[sent:])
        if self._redirect is not None:
            self._redirect.sent(len(data))
        return True

    async def room(self) -> None:
        """Wait until more may be written, or the connection is lost."""
        while self.write_paused and not self.lost:
            waiter = self._room = self.loop.create_future()
            try:
                await waiter
            finally:
                if self._room is waiter:
                    self._room = None

    def _wake_writer(self) -> None:
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def flush(self) -> None:
        """Wait until the kernel has every byte, or the connection is lost. Nothing may be written
        afterwards. Not for TLS, whose transports cannot tell; their `close` flushes."""
        if not self._flushed():
            await self.room()

    def _flushed(self) -> bool:
        """As far as it goes without waiting: whether that was all."""
        if self.transport is None or self.gone:
            return True
        self.send_now()
        if self.tls:
            return True
        if self._redirect is not None:  # it gets no more, so it need not have read
            self._redirect.close()
            self._check_room()
        self.transport.set_write_buffer_limits(0)  # pauses unless there is nothing to wait for
        return not self.write_paused

    async def half_close(self) -> None:
        """Tell the peer that no more will come, once it has everything. TLS has no half-close
        here: nothing happens then."""
        await self.flush()
        while not self.half_closed():
            await self.flush()

    def half_closed(self) -> bool:
        """The same as far as it goes without waiting: whether that was all."""
        if not self._flushed():
            return False
        if self.transport is None or self.gone or self.tls:
            return True
        end_half(self.transport)
        return self._flushed()  # close_notify is written like any other byte

    def reset_on_close(self, on: bool) -> None:
        """Whether every close, a killed worker's too, is a reset (see `dial.reset_on_close`): so
        while nothing but an orderly end tells the peer that it has everything. TLS tells it."""
        if self.transport is not None and not self.gone and not self.tls:
            with contextlib.suppress(OSError):
                reset_on_close(self.transport.get_extra_info("socket"), on)

    def abort(self) -> None:
        """Cut the connection: what waits to be written is lost."""
        self._soon = b""
        if self.transport is not None:
            self.transport.abort()

    def close_now(self) -> None:
        """Close in good order if everything is sent; bytes that still wait would never end it."""
        self.send_now()
        if self.transport is not None:
            if self.transport.get_write_buffer_size():
                self.transport.abort()
            else:
                self.transport.close()
