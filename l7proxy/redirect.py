"""Sending by redirect, where the kernel holds nobody back.

A workload's enrolled socket takes whatever the proxy sends, and writability never ends. So every so
many bytes the proxy asks how much the receiver holds unread, and sends nothing while that is much.
Between two answers no more is sent than makes MOST with what was held at the first: so much, and
one write, is what a receiver holds at most that does not read. Knows bytes, no protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# A receiver that holds more than so many bytes is not sent to, and what one may hold. TCP, which
# holds up to 6 MiB for a receiver (tcp_rmem), asks nobody and need not wait for a timer.
LONG = 768 * 1024
MOST = 1024 * 1024
# A message takes 1 KiB of the kernel's memory besides its bytes (struct sk_msg), charged to nobody,
# so a receiver does not hold more than so many; which ones it has read is known once that is all.
MESSAGES = 1024
_UNASKED_MESSAGES = 256
# When to look again, in seconds; doubling from the first to the last.
_FIRST_LOOK_S = 0.0005
_LAST_LOOK_S = 0.02


class RedirectQueue:
    """What one receiver has not read. `unread` asks it, in bytes of memory; `on_change` is told
    when `full` has changed."""

    __slots__ = (
        "_known",
        "_loop",
        "_messages",
        "_on_change",
        "_sent",
        "_timer",
        "_unasked",
        "_wait_s",
        "full",
        "unread",
    )

    def __init__(self, unread: Callable[[], int], on_change: Callable[[], None]) -> None:
        self.unread = unread
        self.full = False  # nothing should be sent
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._sent = 0  # since the receiver was last known not to hold much
        self._unasked = LONG  # bytes that may be sent then
        self._messages = 0  # since it was last known to hold nothing
        self._known = 0  # of these, when it was last asked
        self._wait_s = _FIRST_LOOK_S
        self._timer: asyncio.TimerHandle | None = None

    @property
    def overdrawn(self) -> int:
        """Bytes sent although it is full, and before that without asking."""
        return self._sent if self.full else 0

    def sent(self, size: int) -> None:
        """So many bytes were sent, as one message."""
        self._sent += size
        self._messages += 1
        few = self._messages - self._known <= _UNASKED_MESSAGES
        if self.full or (few and self._sent <= self._unasked):
            return
        if not self._holds_much():
            self._sent = 0
            return
        self.full = True
        self._wait_s = _FIRST_LOOK_S
        self._timer = self._loop.call_later(self._wait_s, self._look)
        self._on_change()

    def _holds_much(self) -> bool:
        unread = self.unread()
        if not unread:
            self._messages = 0
        self._known = self._messages
        self._unasked = MOST - unread
        return unread > LONG or self._messages > MESSAGES

    def _look(self) -> None:
        if not self._holds_much():
            self.close()
            self._on_change()
            return
        self._wait_s = min(2 * self._wait_s, _LAST_LOOK_S)
        self._timer = self._loop.call_later(self._wait_s, self._look)

    def close(self) -> None:
        """Nothing more is sent, or as if the receiver had read: it is not full."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.full = False
        self._sent = 0
