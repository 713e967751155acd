"""Which endpoint of a cluster a request goes to, and which ones are left alone for a while.

Passive ejection: an endpoint that fails several times in a row gets nothing new for a time that
grows with every ejection; at most half of a cluster's endpoints are ejected at once, so a lone one
never is. Time is the caller's; no I/O here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, TypeAlias

from l7proxy.peers import Source
from mesh.model.nodeconfig import CertificateSection, Endpoint, Settings

if TYPE_CHECKING:
    from l7proxy.pool import Pool

PoolKey: TypeAlias = CertificateSection | tuple[Source, CertificateSection | None] | None

# Whether policy lets a request go to an endpoint.
Allows: TypeAlias = Callable[[Endpoint], bool]

# Up to so many endpoints the least loaded is searched among all, beyond that between two random
# ones ("the power of two choices").
_SCAN = 8
# An ejection lasts at most this long, in seconds, unless the setting itself is longer; after as
# long without one the next is the first again.
_MAX_EJECTION_S = 300.0


class Member:
    """An endpoint as its cluster sees it. `load` counts the requests that have it: waiting and in
    flight. `pools` are the upstream's: its connections by client certificate, and by the workload
    on whose behalf they are where they go through a tunnel."""

    __slots__ = (
        "ejected",
        "ejected_until",
        "ejections",
        "endpoint",
        "failures",
        "id",
        "load",
        "pools",
        "target",
    )

    def __init__(self, endpoint: Endpoint) -> None:
        self.id = endpoint_id(endpoint)
        self.endpoint = endpoint
        self.target = (endpoint.address, endpoint.port)
        self.load = 0
        self.failures = 0
        self.ejections = 0
        self.ejected = False
        self.ejected_until = -math.inf
        self.pools: dict[PoolKey, Pool] = {}


def endpoint_id(endpoint: Endpoint) -> str:
    """ "address:port", IPv6 addresses in brackets."""
    if ":" in endpoint.address:
        return f"[{endpoint.address}]:{endpoint.port}"
    return f"{endpoint.address}:{endpoint.port}"


class Balancer:
    """The members of a cluster and the choice among them."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.ejected: list[Member] = []
        self._healthy: list[Member] = []
        self._next = 0

    def update(self, endpoints: Iterable[Endpoint]) -> list[Member]:
        """Take these endpoints; members that stay keep what is known of them. Returns those that
        left."""
        before = self.members
        self.members = {}
        for endpoint in endpoints:
            member = before.get(endpoint_id(endpoint)) or Member(endpoint)
            member.endpoint = endpoint
            self.members[member.id] = member
        self._sort_out()
        return [member for key, member in before.items() if key not in self.members]

    def pick(
        self,
        now: float,
        settings: Settings,
        *,
        avoid: Collection[str] = (),
        tried: Collection[str] = (),
        prefer: str | None = None,
    ) -> Member | None:
        """The member for a request, None if all were tried. `avoid` is a wish: what it names comes
        after all others; `prefer` one that only health and `avoid` override. With nothing healthy
        left the ejected serve too."""
        if self.ejected:
            self._recover(now)
        if prefer is not None and prefer not in avoid and prefer not in tried:
            member = self.members.get(prefer)
            if member is not None and not member.ejected:
                return member
        round_robin = settings.balancer == "round-robin"
        if not avoid and not tried and self._healthy:
            return self._choose(self._healthy, round_robin)
        healthy = [member for member in self._healthy if member.id not in tried]
        wanted = [member for member in healthy if member.id not in avoid]
        left = wanted or healthy or [one for one in self.ejected if one.id not in tried]
        return self._choose(left, round_robin) if left else None

    def _choose(self, members: list[Member], round_robin: bool) -> Member:
        count = len(members)
        if count == 1:
            return members[0]
        if round_robin or count <= _SCAN:
            # Starting elsewhere every time also spreads what is equally loaded.
            self._next = start = (self._next + 1) % count
            best = members[start]
            if round_robin:
                return best
            for index in range(start - count + 1, start):
                if members[index].load < best.load:
                    best = members[index]
            return best
        one = int(random.random() * count)
        other = (one + 1 + int(random.random() * (count - 1))) % count
        return members[one] if members[one].load <= members[other].load else members[other]

    # --- ejection -----------------------------------------------------------------------------

    def failed(self, member: Member, now: float, settings: Settings) -> bool:
        """Count a failure; True if the member is ejected for it."""
        member.failures += 1
        if (
            member.failures < settings.ejection_failures
            or member.ejected
            or self.members.get(member.id) is not member
        ):
            return False
        if self.ejected:
            self._recover(now)
        if (len(self.ejected) + 1) * 2 > len(self.members):
            return False
        if now >= member.ejected_until + _MAX_EJECTION_S:
            member.ejections = 0
        member.ejections += 1
        member.ejected = True
        base = settings.ejection_time_s
        member.ejected_until = now + min(base * member.ejections, max(base, _MAX_EJECTION_S))
        self._sort_out()
        return True

    def _recover(self, now: float) -> None:
        back = [member for member in self.ejected if member.ejected_until <= now]
        for member in back:
            member.ejected = False
            member.failures = 0
        if back:
            self._sort_out()

    def _sort_out(self) -> None:
        self.ejected = [one for one in self.members.values() if one.ejected]
        self._healthy = [one for one in self.members.values() if not one.ejected]


class Choice:
    """The members for one request, one after the other; `chosen` is told each one's id; `refused`:
    policy refused one of them."""

    def __init__(
        self,
        balancer: Balancer,
        settings: Settings,
        avoid: Collection[str],
        prefer: str | None,
        allows: Allows | None,
        chosen: Callable[[str], None] | None = None,
    ) -> None:
        self.tried: set[str] = set()
        self.refused = False
        self._balancer = balancer
        self._settings = settings
        self._avoid = avoid
        self._prefer = prefer
        self._allows = allows
        self._chosen = chosen

    def next(self, now: float) -> Member | None:
        while True:
            member = self._balancer.pick(
                now,
                self._settings,
                avoid=self._avoid,
                tried=self.tried,
                prefer=self._prefer,
            )
            if member is None or self._allows is None or self._allows(member.endpoint):
                if member is not None and self._chosen is not None:
                    self._chosen(member.id)
                return member
            self.refused = True
            self.tried.add(member.id)
