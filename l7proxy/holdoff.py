"""Whose responses do not pass by the proxy, though their requests do: not tried for a while.

Each costs more than one whose request came to the proxy at once. Knows keys, nothing of what they
are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable

# After so many in a row nothing is tried for so long, in seconds; then one is enough.
IN_A_ROW, PAUSE_S = 8, 10.0
# Of keys; without room the one that has been known for longest is forgotten.
_MOST = 4096


class HoldOff:
    """`now` is in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._failed: dict[Hashable, tuple[int, float]] = {}  # in a row, and until when nothing is

    def passed(self, key: Hashable) -> None:
        self._failed.pop(key, None)

    def failed(self, key: Hashable) -> bool:
        """Whether a pause begins with it."""
        now = self._now()
        count, until = self._failed.get(key, (0, 0.0))
        if until > now:
            return False
        if key not in self._failed and len(self._failed) >= _MOST:
            del self._failed[next(iter(self._failed))]
        count = min(count + 1, IN_A_ROW)
        pauses = count == IN_A_ROW
        self._failed[key] = count, now + PAUSE_S if pauses else 0.0
        return pauses

    def left(self, key: Hashable) -> float:
        """Of its pause, in seconds; 0: it has none."""
        found = self._failed.get(key)
        return max(found[1] - self._now(), 0.0) if found is not None else 0.0
