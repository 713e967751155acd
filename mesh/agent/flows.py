"""The flow records of this node: as many as fit, the newest, and who follows them.

Everything is bounded: records by number and by the length of what clients chose, followers by
queues of their own. What does not fit is lost and counted, and nobody waits for anybody. A record
takes about 1 KiB. Knows no sockets and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import msgspec

from mesh.agent.flow_peers import Peers
from mesh.model.flow import Flow, Flows, Verdict

DEFAULT_CAPACITY = 16_384
# Records that a follower may be behind; about as much memory at most as the store's for 8 of them.
FOLLOWER_LIMIT = 2_048
# Characters kept of what a client chose (a request's path, say).
_TEXT_LIMIT = 1_024

Matches: TypeAlias = Callable[[Flow], bool]
# worker: by a worker whose queue was full; kernel: the ring buffer was full; undecodable: what the
# kernel told is of another version; follower: somebody who follows was too slow.
Where: TypeAlias = Literal["worker", "kernel", "undecodable", "follower"]


class Lost(msgspec.Struct, frozen=True):
    """Told in a stream, at the place where records are missing. `where` "overwritten": those that
    were asked for are no longer held, and `count` is 0: how many is not known."""

    where: Where | Literal["overwritten"]
    count: int = 0


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """A line of the API's stream: one of the two."""

    flow: Flow | None = None
    lost: Lost | None = None


class Follower:
    """Gets what is recorded from now on, as far as it `matches`."""

    def __init__(self, matches: Matches, limit: int) -> None:
        self._matches = matches
        self._limit = limit
        self._waiting: list[Flow] = []
        self._lost: Counter[Where] = Counter()
        self._ended = False
        self._news = asyncio.Event()

    def offer(self, flow: Flow) -> bool:
        """False: it was lost, because this one does not keep up."""
        if not self._matches(flow):
            return True
        if len(self._waiting) >= self._limit:
            self._lost["follower"] += 1
            return False
        self._waiting.append(flow)
        self._news.set()
        return True

    def lost(self, where: Where, count: int) -> None:
        self._lost[where] += count
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    async def batch(self) -> list[Line]:
        """What has come since the last call, what is lost last; waits for some. Empty: the end."""
        await self._news.wait()
        lines = [Line(flow) for flow in self._waiting]
        lines += [Line(lost=Lost(where, count)) for where, count in self._lost.items()]
        self._waiting, self._lost = [], Counter()
        if not self._ended:
            self._news.clear()
        return lines


class FlowStore:
    """`seen` counts records by verdict, `lost` those that never came here or did not reach a
    follower, `overwritten` those that made room for newer ones."""

    def __init__(self, peers: Peers, capacity: int = DEFAULT_CAPACITY, node: str = "") -> None:
        self.peers = peers
        self.seen: dict[Verdict, int] = dict.fromkeys(get_args(Verdict), 0)
        self.lost: dict[Where, int] = dict.fromkeys(get_args(Where), 0)
        self.overwritten = 0
        self.capacity = capacity
        self._node = node
        self._held: deque[Flow] = deque(maxlen=capacity)
        self._followers: set[Follower] = set()

    def receive(self, flows: Flows) -> None:
        """From a worker."""
        for flow in flows.records:
            self.record(flow)
        if flows.lost:
            self.count_lost("worker", flows.lost)

    def record(self, flow: Flow) -> None:
        flow = _bounded(self.peers.complete(flow, self._node))
        self.seen[flow.verdict] += 1
        self.overwritten += len(self._held) == self.capacity
        self._held.append(flow)
        for follower in self._followers:
            if not follower.offer(flow):
                self.lost["follower"] += 1

    def count_lost(self, where: Where, count: int) -> None:
        self.lost[where] += count
        for follower in self._followers:
            follower.lost(where, count)

    def held(self) -> list[Flow]:
        """All there are, in the order in which they came."""
        return list(self._held)

    def follow(self, matches: Matches, limit: int = FOLLOWER_LIMIT) -> Follower:
        follower = Follower(matches, limit)
        self._followers.add(follower)
        return follower

    def unfollow(self, follower: Follower) -> None:
        self._followers.discard(follower)

    def close(self) -> None:
        """All followers are at the end."""
        for follower in self._followers:
            follower.end()


def _bounded(flow: Flow) -> Flow:
    """What a client sent may be as long as a request head."""
    http = flow.http
    if http is None:
        return flow
    texts = ("method", "host", "path", "request_id")
    cut = {
        name: f"{text[:_TEXT_LIMIT]}…"
        for name in texts
        if len(text := getattr(http, name)) > _TEXT_LIMIT
    }
    if not cut:
        return flow
    return msgspec.structs.replace(flow, http=msgspec.structs.replace(http, **cut))
