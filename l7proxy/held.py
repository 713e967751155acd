"""The connections to backends that are held for one client's connection, and what may pass there.

Knows what was decided of requests that follow (`Follower`), and which of it can be offered to the
kernel together; nothing of what passes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from bpf.constants import PAIR_SHARES, PAIR_WAYS, RESPONSE_MAX
from bpf.structs import Exchange, Way
from l7proxy.begun import Begun
from l7proxy.handles import Handles
from l7proxy.pool import IDLE_S
from l7proxy.series import Numbered
from l7proxy.streams import ClientStream, Handler, Kept


class Allowed(NamedTuple):
    """Which requests may pass by the proxy: see `bpf.proxy.Offer`. `timeout_s`: how long each may
    take, with its response; `late`: what is said then, as of `Follower.fail`."""

    generation: int
    egress: int
    ingress: int
    rule: int
    expires_ns: int
    series: Numbered
    response_max: int
    timeout_s: float | None
    late: tuple[int, str, str]


class Place(NamedTuple):
    """Where requests of a rule go: to an endpoint by its id, of one of the rule's backends, and
    which part of them does."""

    rule: Hashable
    backend: int
    endpoint: str
    share: float


class Follower(NamedTuple):
    """How requests that follow one that was answered are treated. `current`: nothing that this was
    decided by has changed; `pool`: whose connections they may go over. `resume` makes a handler for
    a response that comes through the proxy after all, on this stream; `fail` one for a request
    without a response (status, reason, detail), `broken` for one whose response has begun and will
    not end (reason, detail). `over` tells of one that needs no handler any more: all of it is done
    (""), or nobody waits for it (reason, detail). `answered`: requests have been, past the
    proxy."""

    allowed: Allowed
    place: Place
    authority: bytes
    current: Callable[[], bool]
    pool: object
    resume: Callable[[Begun, ClientStream], Handler]
    fail: Callable[[Begun, int, str, str], Handler]
    broken: Callable[[Begun, str, str], Handler]
    over: Callable[[Begun, str, str], None]
    answered: Callable[[], None]


@dataclass(slots=True, eq=False)
class Held:
    """A backend's connection, and which requests may go over it, for which rule each, the newest
    last. `parted`: as in `Exchange`, when it began to be held: of a request in
    parts one may have been lost on its way since, when memory is short; who waits for it would take
    the next request for it, which may be another client's. `answered`: requests since it was
    offered; `used`: when the last one was known to be on it, by time.monotonic()."""

    kept: Kept
    followers: list[Follower]
    parted: int
    answered: int = 0
    used: float = field(default_factory=time.monotonic)

    @property
    def good(self) -> bool:
        """It can be offered (again)."""
        kept = self.kept
        useless = kept.closed or kept.unread or kept.wanted or self.old
        return not useless and any(one.current() for one in self.followers)

    @property
    def old(self) -> bool:
        """Its backend may be about to close it, as one that is kept in a pool."""
        return time.monotonic() - self.used >= IDLE_S

    def note(self, answered: int) -> None:
        if answered != self.answered:
            self.answered, self.used = answered, time.monotonic()

    @property
    def endpoint(self) -> str:
        return self.followers[-1].place.endpoint

    def last(self, passed: Exchange) -> Follower:
        """What the last request was decided by, which has gone over this."""
        by = (one for one in self.followers if one.allowed.series.number == passed.series)
        return next(by, self.followers[-1])

    @property
    def ways(self) -> Iterator[Way]:
        for one in self.followers:
            allowed, share = one.allowed, round(one.place.share * PAIR_SHARES)
            yield Way(
                self.kept.cookie, allowed.series.number, allowed.rule, share, allowed.response_max
            )

    def let_go(self, parted: int) -> None:
        """Back to the pool, if it can be used again. `parted`: now."""
        kept = self.kept
        useless = kept.closed or kept.unread or parted != self.parted or self.old
        kept.let_go(reusable=not useless, used=self.used)


def to_offer(held: Iterable[Held]) -> list[Held]:
    """Those that can be offered together, for which rules: the newest, and what is decided by the
    same as that."""
    good = [one for one in held if one.good]
    if not good:
        return []
    newest = good[-1].followers[-1].allowed[:3]
    found: list[Held] = []
    room = PAIR_WAYS
    for one in reversed(good):
        same = [by for by in one.followers if by.current() and by.allowed[:3] == newest]
        if same and room:
            one.followers = same[-room:]
            room -= len(one.followers)
            found.insert(0, one)
    return found


class Holding:
    """All that are held for a client's socket, the first was offered first. `emptied` is called
    when the last one was let go."""

    def __init__(self, handles: Handles, client: int, emptied: Callable[[], None]) -> None:
        self._handles = handles
        self._client = client
        self._emptied = emptied
        self._all: list[Held] = []
        # By endpoint: what went over its connection, which the request that is served has now.
        self._former: dict[str, list[Follower]] = {}

    def __iter__(self) -> Iterator[Held]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @property
    def followers(self) -> Iterator[Follower]:
        return (one for held in self._all for one in held.followers)

    @property
    def current(self) -> bool:
        """Nothing has changed that any of these was decided by."""
        return all(one.current() for one in self.followers)

    @property
    def large(self) -> bool:
        """Responses may take more memory than most may."""
        return any(one.allowed.response_max > RESPONSE_MAX for one in self.followers)

    @property
    def timeout_s(self) -> float | None:
        """Of a request: the shortest there is."""
        times = (one.allowed.timeout_s for one in self.followers)
        return min((one for one in times if one is not None), default=None)

    def last(self, passed: Exchange) -> Held:
        """The one that the last request has gone to."""
        cookie = passed.backend
        return next((one for one in self._all if one.kept.cookie == cookie), self._all[-1])

    def others_unfit(self, last: Held) -> list[Held]:
        """Those but `last` that cannot be offered any more."""
        return [one for one in self._all if one is not last and not one.good]

    def add(self, kept: Kept, follower: Follower, parted: int) -> None:
        """Other rules' requests may go on over the connection, if they could before."""
        place, series = follower.place, follower.allowed.series
        before = self._former.get(place.endpoint, ())
        others = [
            one
            for one in before
            if one.pool is follower.pool
            and one.place[:2] != place[:2]
            and one.allowed.series is not series  # by which `Held.last` tells them apart
            and one.current()
        ]
        self._former.clear()
        self._all.append(Held(kept, [*others, follower], parted))

    def take(self, held: Held) -> None:
        """Its connection is that of the request that is served from now on."""
        self._all.remove(held)
        self._former[held.endpoint] = held.followers

    def leave(self, endpoint: str) -> None:
        """A request that is served is to go there: what is held might be the last connection that
        it can have."""
        for held in self._all:
            if held.endpoint == endpoint:
                self._former[endpoint] = held.followers
        self.keep([held for held in self._all if held.endpoint != endpoint])

    def keep(self, held: list[Held]) -> None:
        """Of what is held, and not offered, these; the others are let go."""
        if len(held) != len(self._all):
            passed = self._handles.passed(self._client)
            parted = 0 if passed is None else passed.parted
            gone, self._all = [one for one in self._all if one not in held], held
            for one in gone:
                one.let_go(parted)
        if not held:
            self._emptied()

    def keep_good(self) -> None:
        self.keep([one for one in self._all if one.good])

    def drop(self, gone: Collection[Held], parted: int) -> None:
        """Let these go, which were offered."""
        self._all = [one for one in self._all if one not in gone]
        self.forget(gone)
        for one in gone:
            one.let_go(parted)

    def forget(self, gone: Collection[Held] | None = None) -> None:
        """No response of these (None: of any) passes any more."""
        for one in self._all if gone is None else gone:
            one.note(self._handles.forget(one.kept.cookie))
            if one.answered:
                one.followers[-1].answered()

    def let_go(self, passed: Exchange | None) -> None:
        """All. `passed` None: none is used again, nobody knows what is on its way there."""
        gone, self._all = self._all, []
        self._former.clear()
        for one in gone:
            if passed is None:
                one.kept.let_go(reusable=False)
            else:
                one.let_go(passed.parted)
        self._emptied()
