"""Fairness among clients: shares of what is limited, and the line of those who wait for some.

A client may take one more only while it holds no more than are free. So one alone gets half, and
however many it asks for, others find something; nothing is ever taken away from anybody. Knows
clients by name only, no connections, no requests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Shares:
    """`limit` places, of which `taken` are held by clients."""

    __slots__ = ("_held", "limit", "taken")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0
        self._held: dict[str, int] = {}

    def may_take(self, client: str) -> bool:
        free = self.limit - self.taken
        return free > 0 and self._held.get(client, 0) <= free

    def room_for(self, client: str) -> int:
        """How many places `client` might take, one after the other, if nobody else did."""
        free = self.limit - self.taken
        return max(0, min(free, (free - self._held.get(client, 0)) // 2 + 1))

    def take(self, client: str) -> None:
        self.taken += 1
        self._held[client] = self._held.get(client, 0) + 1

    def give(self, client: str) -> None:
        """Give one back."""
        self.taken -= 1
        left = self._held[client] - 1
        if left:
            self._held[client] = left
        else:
            del self._held[client]


class Line(Generic[T]):
    """Who waits: the clients take turns, each one's are served first come first."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def lengths(self) -> Iterator[tuple[str, int]]:
        """Of each client that waits."""
        return ((client, len(line)) for client, line in self._waiting.items())

    def join(self, client: str, waiter: T) -> None:
        line = self._waiting.get(client)
        if line is None:
            line = self._waiting[client] = deque()
        line.append(waiter)

    def leave(self, client: str, waiter: T) -> None:
        """Idempotent."""
        line = self._waiting.get(client)
        if line is not None and waiter in line:
            line.remove(waiter)
            if not line:
                del self._waiting[client]

    def next(self, may: Callable[[str], bool]) -> tuple[str, T] | None:
        """Whose turn it is among the clients that `may`; it leaves the line."""
        for client, line in self._waiting.items():
            if may(client):
                del self._waiting[client]
                waiter = line.popleft()
                if line:  # its next turn comes after everybody else's
                    self._waiting[client] = line
                return client, waiter
        return None
