"""Many things that are looked at now and then, each when its own time comes.

What is added, or is to come earlier, costs O(log n). Knows nothing of what it looks at.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

# So many at once, then others have their turn.
_AT_ONCE = 128
_NEVER = float("inf")


class Schedule(Generic[T]):
    """`look` is called when something's time has come; it is looked at again only if `within` says
    so."""

    def __init__(self, look: Callable[[T], None]) -> None:
        self._look = look
        self._when: dict[T, float] = {}
        # By time; an entry counts only if its time is that in `_when`. The number is for equals.
        self._heap: list[tuple[float, int, T]] = []
        self._numbers = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = _NEVER  # one of uvloop's does not tell if it is due at once

    def within(self, one: T, seconds: float) -> None:
        """It is looked at so soon, at the latest."""
        when = asyncio.get_running_loop().time() + seconds
        if self._when.get(one, _NEVER) > when:
            self._when[one] = when
            heapq.heappush(self._heap, (when, next(self._numbers), one))
            self._wake()

    def drop(self, one: T) -> None:
        """It is not looked at any more. Idempotent."""
        self._when.pop(one, None)

    def _wake(self) -> None:
        when = self._heap[0][0]
        if self._timer_at <= when:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = asyncio.get_running_loop().call_at(when, self._run)

    def _run(self) -> None:
        self._timer, self._timer_at = None, _NEVER
        now = asyncio.get_running_loop().time()
        try:
            for _ in range(_AT_ONCE):
                if not self._heap or self._heap[0][0] > now:
                    break
                when, _, one = heapq.heappop(self._heap)
                if self._when.get(one) == when:
                    del self._when[one]
                    self._look(one)
        finally:
            if self._heap:
                self._wake()
