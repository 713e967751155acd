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
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

from bpf import layout, maglev
from bpf.extents import Extent, Extents
from bpf.layout import Frontend, Member, Number, Target
from bpf.maps import PinnedMap, Slots
from mesh.model.nodeconfig import LoadBalancerEntry, SectionKey


class _Refused(Exception):
    """Why an entry is not taken."""


# Backends and their weights, sorted, none twice.
_Backends: TypeAlias = tuple[tuple[Target, int], ...]


class _InForce(NamedTuple):
    """What a frontend uses. `key` and `wanted` are None for what an earlier process left."""

    key: SectionKey | None
    wanted: _Backends | None
    affinity_s: int
    extent: Extent | None
    backends: frozenset[int]


class Balancer:
    """The entries of one pin directory. One process at a time may have one."""

    def __init__(self, directory: Path) -> None:
        """Adopts what the maps hold. DatapathError: the maps are not there."""
        self._frontends = PinnedMap(directory, "frontends", Target, Frontend)
        self._backends = PinnedMap(directory, "backends", Number, Target)
        self._members = PinnedMap(directory, "members", Member, Number)
        self._slots = Slots(directory)
        self._in_force: dict[Target, _InForce] = {}
        self._by_key: dict[SectionKey, Target] = {}
        self._uses: Counter[int] = Counter()
        self._ids: dict[Target, int] = {}
        self._targets: dict[int, Target] = {}
        for frontend, (offset, size, affinity_s) in self._frontends.items():
            ids = frozenset(self._slots.read(offset, size))
            extent = Extent(offset, size) if size else None
            self._in_force[frontend] = _InForce(None, None, affinity_s, extent, ids)
            self._uses.update(ids)
        for number in self._uses:
            backend = self._backends.get(Number(number))
            if backend is not None:
                self._ids[backend] = number
                self._targets[number] = backend
        taken = (force.extent for force in self._in_force.values())
        self._extents = Extents(layout.SLOTS, (extent for extent in taken if extent is not None))
        # Never given out before those that were not used for longest; 0 is no backend.
        self._free_ids = deque(n for n in range(1, layout.BACKENDS) if n not in self._uses)
        self._left: list[_InForce] = []
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
        self._slots.close()

    def replace(self, entries: Mapping[SectionKey, LoadBalancerEntry]) -> dict[SectionKey, str]:
        """Puts these entries in force and takes away all others; see `apply`. A refused entry's
        frontend, if it has one in force, stays."""
        return self._change(entries, set(self._in_force))

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
                wanted = _backends(frontend, entry)
                affinity_s = entry.affinity_s or 0
                if not 0 <= affinity_s < 1 << 32:
                    raise _Refused(f"session affinity for {affinity_s} seconds")
                self._put(key, frontend, wanted, affinity_s, gone)
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
        wanted: _Backends,
        affinity_s: int,
        gone: set[Target],
    ) -> None:
        current = self._in_force.get(frontend)
        if current is not None and current.key not in (None, key) and frontend not in gone:
            raise _Refused(f"the same address, port and protocol as {current.key}")
        if current is None or (current.wanted, current.affinity_s) != (wanted, affinity_s):
            new = self._write(wanted, affinity_s)
            try:
                members = self._members_of(frontend, new)
                self._members.put_all((member, Number(1)) for member in members)
                offset, size = new.extent or (0, 0)
                self._frontends.put(frontend, Frontend(offset, size, affinity_s))
            except OSError:
                self._abandon(frontend, new, current)
                raise
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

    def _write(self, wanted: _Backends, affinity_s: int) -> _InForce:
        """Backends and a table of them, where no frontend points yet."""
        if not wanted:
            return _InForce(None, wanted, affinity_s, None, frozenset())
        fresh = [backend for backend, _ in wanted if backend not in self._ids]
        if len(fresh) > len(self._free_ids):
            raise _Refused(f"more than {layout.BACKENDS - 1} backends on this node")
        numbers = dict(zip(islice(self._free_ids, len(fresh)), fresh, strict=True))
        self._backends.put_all((Number(number), backend) for number, backend in numbers.items())
        size = maglev.size_for([weight for _, weight in wanted])
        extent = self._extents.take(size)
        if extent is None:
            raise _Refused(
                f"no room for a table of {size} slots: {layout.SLOTS} are for all entries"
            )
        for number, backend in numbers.items():
            self._free_ids.popleft()
            self._ids[backend] = number
            self._targets[number] = backend
        ids = [self._ids[backend] for backend, _ in wanted]
        self._uses.update(ids)
        positions = maglev.table([(layout.TARGET.pack(b), weight) for b, weight in wanted], size)
        self._slots.write(extent.offset, array("Q", [ids[position] for position in positions]))
        return _InForce(None, wanted, affinity_s, extent, frozenset(ids))

    def _members_of(self, frontend: Target, force: _InForce | None) -> set[Member]:
        if force is None or not force.affinity_s:
            return set()
        packed = layout.TARGET.pack(frontend)
        targets = (self._targets[number] for number in force.backends)
        return {Member(packed, layout.TARGET.pack(target)) for target in targets}

    def _leave(self, frontend: Target, following: _InForce | None = None) -> None:
        """What the frontend used is no longer in force, but `following` may be."""
        former = self._in_force.pop(frontend)
        if former.key is not None and self._by_key[former.key] == frontend:
            del self._by_key[former.key]
        self._abandon(frontend, former, following)

    def _abandon(self, frontend: Target, former: _InForce, other: _InForce | None) -> None:
        """The frontend does not use `former`, but perhaps some of it in `other`."""
        for member in self._members_of(frontend, former) - self._members_of(frontend, other):
            self._members.remove(member)
        self._left.append(former)

    def _reclaim(self) -> None:
        """What earlier changes left may be used for something new."""
        for former in self._left:
            if former.extent is not None:
                self._extents.release(former.extent)
            for number in former.backends:
                self._uses[number] -= 1
                if not self._uses[number]:
                    del self._uses[number]
                    self._ids.pop(self._targets.pop(number))
                    self._free_ids.append(number)
        self._left.clear()


def _backends(frontend: Target, entry: LoadBalancerEntry) -> _Backends:
    """Backends that have a weight; one that is named twice has the sum. _Refused."""
    weights: Counter[Target] = Counter()
    for backend in entry.backends:
        target = _target(backend.address, backend.port, entry.protocol)
        if target.is_ipv4 != frontend.is_ipv4:
            raise _Refused(
                f"the backend {backend.address} and the frontend {entry.address} are of different "
                "families: give each family an entry of its own"
            )
        if backend.weight < 0:
            raise _Refused(f"the backend {backend.address} has the weight {backend.weight}")
        weights[target] += backend.weight
    if len(weights) > maglev.SIZES[-1]:
        raise _Refused(f"{len(weights)} backends, and a table has {maglev.SIZES[-1]} slots at most")
    return tuple(sorted((target, weight) for target, weight in weights.items() if weight))


def _target(address: str, port: int, protocol: str) -> Target:
    if not 0 < port < 1 << 16:
        raise _Refused(f"{port} is not a port")
    try:
        return Target.of(address, port, protocol)
    except ValueError as error:
        raise _Refused(str(error)) from None
