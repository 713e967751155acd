"""Load-balancer entries into the maps, in an order that no connection can see halfway.

Backends are written first, then a table that names them, in slots no frontend points at; then the
frontend is switched to it by one update. What the old table used is taken for something new in a
later change at the earliest: a program that has just looked up the old frontend still finds its
table whole. Established connections are never touched: only connect and sendmsg read the maps.

Knows maps and entries, not who asks for them; a section it cannot take is refused with a reason,
and what was in force for it stays.
"""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

from bpf import constants, layout, maglev
from bpf.extents import Extent, Extents
from bpf.maps import PinnedMap, Slots
from bpf.structs import Backend, Frontend, Member, Number, Target
from mesh.model.nodeconfig import LoadBalancerEntry
from mesh.model.section import SectionKey


class _Refused(Exception):
    """Why an entry is not taken."""


# The lower half of a slot (struct frontend).
_NUMBER = (1 << 32) - 1

# Backends and their weights, sorted, none twice.
_Backends: TypeAlias = tuple[tuple[Backend, int], ...]


class _Wanted(NamedTuple):
    """What an entry asks for. `fast`: backends that may be enrolled, packed Targets."""

    backends: _Backends
    affinity_s: int
    flags: int
    fast: frozenset[bytes]


class _InForce(NamedTuple):
    """What a frontend uses. `key` and `wanted` are None for what an earlier process left."""

    key: SectionKey | None
    wanted: _Wanted | None
    affinity_s: int
    extent: Extent | None
    backends: frozenset[int]


class Balancer:
    """The entries of one pin directory. One process at a time may have one."""

    def __init__(self, directory: Path) -> None:
        """Adopts what the maps hold. DatapathError: the maps are not there."""
        self._frontends = PinnedMap(directory, "frontends", Target, Frontend)
        self._backends = PinnedMap(directory, "backends", Number, Backend)
        self._members = PinnedMap(directory, "members", Member, Number)
        self._slots = Slots(directory)
        self._in_force: dict[Target, _InForce] = {}
        self._by_key: dict[SectionKey, Target] = {}
        self._uses: Counter[int] = Counter()
        self._ids: dict[Backend, int] = {}
        self._by_id: dict[int, Backend] = {}
        for frontend, (offset, size, affinity_s, *_) in self._frontends.items():
            ids = frozenset(slot & _NUMBER for slot in self._slots.read(offset, size))
            extent = Extent(offset, size) if size else None
            self._in_force[frontend] = _InForce(None, None, affinity_s, extent, ids)
            self._uses.update(ids)
        for number in self._uses:
            backend = self._backends.get(Number(number))
            if backend is not None:
                self._ids[backend] = number
                self._by_id[number] = backend
        taken = (force.extent for force in self._in_force.values())
        self._extents = Extents(constants.SLOTS, (extent for extent in taken if extent is not None))
        # Never given out before those that were not used for longest; 0 is no backend.
        self._free_ids = deque(n for n in range(1, constants.BACKENDS) if n not in self._uses)
        self._left: list[_InForce] = []
        # What an earlier process left may be enrolled until it is known what is wanted.
        self._fast = PinnedMap(directory, "fast", Target, Number)
        self._fast_uses: Counter[bytes] = Counter()
        # An earlier process may have ended between taking a backend away and forgetting it here.
        members = (self._members_of(*item) for item in self._in_force.items())
        known = set().union(*members)
        for stale in [member for member, _ in self._members.items() if member not in known]:
            self._members.remove(stale)

    def close(self) -> None:
        """Lets go of the maps; the kernel goes on with what is in them."""
        self._frontends.close()
        self._backends.close()
        self._members.close()
        self._fast.close()
        self._slots.close()

    def replace(self, entries: Mapping[SectionKey, LoadBalancerEntry]) -> dict[SectionKey, str]:
        """Puts these entries in force and takes away all others; see `apply`. A refused entry's
        frontend, if it has one in force, stays."""
        refused = self._change(entries, set(self._in_force))
        left = [
            one for one, _ in self._fast.items() if layout.TARGET.pack(one) not in self._fast_uses
        ]
        for stale in left:
            self._fast.remove(stale)
        return refused

    def apply(
        self, put: Mapping[SectionKey, LoadBalancerEntry], remove: Iterable[SectionKey] = ()
    ) -> dict[SectionKey, str]:
        """Puts entries in force, takes others away; unknown keys to remove are ignored. Returns why
        which entries were refused; what was in force under their keys stays."""
        gone = {self._by_key[key] for key in remove if key in self._by_key}
        return self._change(put, gone)

    def _change(
        self, put: Mapping[SectionKey, LoadBalancerEntry], gone: set[Target]
    ) -> dict[SectionKey, str]:
        self._reclaim()
        refused: dict[SectionKey, str] = {}
        for key, entry in put.items():
            frontend = None
            try:
                frontend = _target(entry.address, entry.port, entry.protocol)
                self._put(key, frontend, _wanted(frontend, entry), gone)
            except _Refused as error:
                refused[key] = str(error)
            except OSError as error:
                refused[key] = f"the kernel's maps do not take it: {error.strerror}"
            if key in refused:
                gone.discard(self._by_key.get(key, frontend))
        for frontend in gone:
            self._frontends.remove(frontend)
            self._leave(frontend)
        return refused

    def _put(
        self,
        key: SectionKey,
        frontend: Target,
        wanted: _Wanted,
        gone: set[Target],
    ) -> None:
        current = self._in_force.get(frontend)
        if current is not None and current.key not in (None, key) and frontend not in gone:
            raise _Refused(f"the same address, port and protocol as {current.key}")
        if current is None or current.wanted != wanted:
            new = self._write(wanted)
            try:
                members = self._members_of(frontend, new)
                self._members.put_all((member, Number(1)) for member in members)
                fast = (layout.TARGET.unpack(Target, one) for one in wanted.fast)
                self._fast.put_all((one, Number(1)) for one in fast)
                offset, size = new.extent or (0, 0)
                value = Frontend(
                    offset, size, wanted.affinity_s, wanted.flags, len(wanted.backends)
                )
                self._frontends.put(frontend, value)
            except OSError:
                self._abandon(frontend, new, current)
                for one in wanted.fast - self._fast_uses.keys():
                    self._fast.remove(layout.TARGET.unpack(Target, one))
                raise
            self._fast_uses.update(wanted.fast)
            if current is not None:
                self._leave(frontend, new)
            current = new
        elif current.key is not None:
            del self._by_key[current.key]
        former = self._by_key.get(key)
        if former is not None:
            gone.add(former)
        gone.discard(frontend)
        self._in_force[frontend] = current._replace(key=key)
        self._by_key[key] = frontend

    def _write(self, wanted: _Wanted) -> _InForce:
        """Backends and a table of them, where no frontend points yet."""
        backends = wanted.backends
        if not backends:
            return _InForce(None, wanted, wanted.affinity_s, None, frozenset())
        fresh = [backend for backend, _ in backends if backend not in self._ids]
        if len(fresh) > len(self._free_ids):
            raise _Refused(f"more than {constants.BACKENDS - 1} backends on this node")
        numbers = dict(zip(islice(self._free_ids, len(fresh)), fresh, strict=True))
        self._backends.put_all((Number(number), backend) for number, backend in numbers.items())
        size = maglev.size_for([weight for _, weight in backends])
        extent = self._extents.take(size)
        if extent is None:
            raise _Refused(
                f"no room for a table of {size} slots: {constants.SLOTS} are for all entries"
            )
        for number, backend in numbers.items():
            self._free_ids.popleft()
            self._ids[backend] = number
            self._by_id[number] = backend
        ids = [self._ids[backend] for backend, _ in backends]
        self._uses.update(ids)
        positions = maglev.table([(backend.target, weight) for backend, weight in backends], size)
        slots = [ids[position] | other << 32 for position, other in maglev.ring(positions)]
        self._slots.write(extent.offset, array("Q", slots))
        return _InForce(None, wanted, wanted.affinity_s, extent, frozenset(ids))

    def _members_of(self, frontend: Target, force: _InForce | None) -> set[Member]:
        if force is None or not force.affinity_s:
            return set()
        packed = layout.TARGET.pack(frontend)
        return {Member(packed, self._by_id[number].target) for number in force.backends}

    def _leave(self, frontend: Target, following: _InForce | None = None) -> None:
        """What the frontend used is no longer in force, but `following` may be."""
        former = self._in_force.pop(frontend)
        if former.key is not None and self._by_key[former.key] == frontend:
            del self._by_key[former.key]
        if former.wanted is not None:
            self._forget_fast(former.wanted.fast)
        self._abandon(frontend, former, following)

    def _abandon(self, frontend: Target, former: _InForce, other: _InForce | None) -> None:
        """The frontend does not use `former`, but perhaps some of it in `other`."""
        for member in self._members_of(frontend, former) - self._members_of(frontend, other):
            self._members.remove(member)
        self._left.append(former)

    def _forget_fast(self, fast: frozenset[bytes]) -> None:
        """One frontend less that uses these."""
        for one in fast:
            self._fast_uses[one] -= 1
            if not self._fast_uses[one]:
                del self._fast_uses[one]
                self._fast.remove(layout.TARGET.unpack(Target, one))

    def _reclaim(self) -> None:
        """What earlier changes left may be used for something new."""
        for former in self._left:
            if former.extent is not None:
                self._extents.release(former.extent)
            for number in former.backends:
                self._uses[number] -= 1
                if not self._uses[number]:
                    del self._uses[number]
                    self._ids.pop(self._by_id.pop(number))
                    self._free_ids.append(number)
        self._left.clear()


def _wanted(frontend: Target, entry: LoadBalancerEntry) -> _Wanted:
    """Backends that have a weight; one that is named twice has the sum. _Refused."""
    weights: Counter[Backend] = Counter()
    fast: set[bytes] = set()
    for backend in entry.backends:
        target = _target(backend.address, backend.port, entry.protocol)
        if target.is_ipv4 != frontend.is_ipv4:
            raise _Refused(
                f"the backend {backend.address} and the frontend {entry.address} are of different "
                "families: give each family an entry of its own"
            )
        if backend.weight < 0:
            raise _Refused(f"the backend {backend.address} has the weight {backend.weight}")
        packed = layout.TARGET.pack(target)
        weights[Backend(packed, constants.BACKEND_REMOTE if backend.remote else 0)] += (
            backend.weight
        )
        # Loopback tuples are not unique on a node: every network namespace has them.
        if backend.sockmap and not ip_address(backend.address).is_loopback:
            fast.add(packed)
    if len(weights) > maglev.SIZES[-1]:
        raise _Refused(f"{len(weights)} backends, and a table has {maglev.SIZES[-1]} slots at most")
    affinity_s = entry.affinity_s or 0
    if not 0 <= affinity_s < 1 << 32:
        raise _Refused(f"session affinity for {affinity_s} seconds")
    flags = (constants.FRONTEND_HTTP if entry.http else 0) | (
        constants.FRONTEND_SOCKMAP if entry.http and entry.sockmap else 0
    )
    backends = tuple(sorted((one, weight) for one, weight in weights.items() if weight))
    return _Wanted(backends, affinity_s, flags, frozenset(fast))


def _target(address: str, port: int, protocol: str) -> Target:
    if not 0 < port < 1 << 16:
        raise _Refused(f"{port} is not a port")
    try:
        return Target.of(address, port, protocol)
    except ValueError as error:
        raise _Refused(str(error)) from None
