"""What the programs know of this node besides load balancing: its proxy, and who its addresses are.

Knows maps; what is in them stays in force without us.
"""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple, TypeAlias

from bpf import constants, layout
from bpf.maps import PinnedMap
from bpf.structs import Config, Identity, Number, Prefix, Target, Who
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import MESH_HTTP_PORT, MESH_RELAY_PORT, NodeSection, WorkloadSection
from mesh.model.policyconfig import CidrSection
from mesh.model.section import SectionKey

_NOWHERE = bytes(layout.TARGET.size)


def steer_to_proxy(
    directory: Path,
    ports: Iterable[tuple[str, int]],
    *,
    sockmap: bool,
    mtls: bool = False,
    home: int = 0,
) -> None:
    """From now on new connections to HTTP frontends and remote backends go to these ports of the
    proxy, MESH_HTTP_PORT and MESH_RELAY_PORT on at most one address of each family; where there is
    none, straight to backends; with `mtls` not to those of other nodes that take it. What the
    network namespace with cookie `home` opens goes where it asks. DatapathError, OSError."""
    by_place: dict[tuple[int, int], str] = {
        (ip_address(address).version, port): address for address, port in ports
    }

    def at(version: int, port: int) -> bytes:
        address = by_place.get((version, port))
        return layout.TARGET.pack(Target.of(address, port, "TCP")) if address else _NOWHERE

    flags = constants.CONFIG_SOCKMAP if sockmap else 0
    flags |= constants.CONFIG_MTLS if mtls else 0
    config = PinnedMap(directory, "config", Number, Config)
    try:
        config.put(
            Number(0),
            Config(
                at(4, MESH_HTTP_PORT),
                at(6, MESH_HTTP_PORT),
                at(4, MESH_RELAY_PORT),
                at(6, MESH_RELAY_PORT),
                flags,
                home,
            ),
        )
    finally:
        config.close()


class Generation:
    """The number from which on a change of identities and policies counts, all of it at once; the
    programs judge every flow anew when there is another. Beside it the time of the configuration
    that proxies have."""

    def __init__(self, directory: Path) -> None:
        """DatapathError: the map is not there."""
        self._map = PinnedMap(directory, "generation", Number, Number)
        self.now = (self._map.get(Number(0)) or Number(0)).value

    def close(self) -> None:
        self._map.close()

    def next(self) -> int:
        """One that has not begun."""
        return max(self.now + 1, time.monotonic_ns())

    def begin(self, number: int) -> None:
        """From now on what has come with it is in force."""
        self._map.put(Number(0), Number(number))
        self.now = number

    def end_offers(self, made_ns: int) -> None:
        """Of proxies whose configuration is from before this time (CLOCK_MONOTONIC)."""
        self._map.put(Number(2), Number(made_ns))


# What says who is behind addresses; the later ones stand above the earlier ones. A range that is a
# node's own address is there for the API server's identity only (mesh.policy.sections).
_ABOUT = (NodeSection, CidrSection, WorkloadSection)
IdentitySection: TypeAlias = CidrSection | NodeSection | WorkloadSection

# "::/0" is not about IPv4, though that is mapped; what a pod reaches on its link
# (mesh.lab.cni.GATEWAYS) is the node.
_ALWAYS: dict[SectionKey, CidrSection] = {
    f"always/{cidr}": CidrSection(cidr, identity)
    for cidr, identity in (
        ("0.0.0.0/0", Reserved.WORLD),
        ("169.254.1.1/32", Reserved.HOST),
        ("fe80::/10", Reserved.HOST),
    )
}


# So many ranges at most: pods and nodes have room, and so have ranges that take the place of
# others, which go with the next change.
MAX_RANGES = constants.IDENTITIES // 2

# By identity, those that the programs take for it.
Mistaken: TypeAlias = Mapping[int, frozenset[int]]


class _Claim(NamedTuple):
    """Who a section says is there; the greatest one stands."""

    rank: int
    order: int
    who: Who


_NOBODY = Who(0, 0)
_WHOLE = 128


class Identities:
    """Who is behind which address. A range's addresses are those that no longer prefix has: neither
    a pod, nor a node, nor a smaller range."""

    def __init__(self, directory: Path, node: str | None = None, generation: int = 0) -> None:
        """`node`: the name of this one; `generation`: the one that has begun. DatapathError: the
        map is not there."""
        self._map = PinnedMap(directory, "identities", Prefix, Identity)
        self._node = node
        self._by_key: dict[SectionKey, frozenset[Prefix]] = {}
        self._claims: dict[Prefix, dict[SectionKey, _Claim]] = {}
        self._order = 0
        self._in_force = {prefix: one.at(generation) for prefix, one in self._map.items()}
        # What an agent that was killed meant to begin must not begin with what comes next.
        for prefix in [prefix for prefix, one in self._map.items() if one.since > generation]:
            who = self._in_force[prefix]
            self._map.put(prefix, Identity(0, *who, *who))
        self._lengths = Counter(prefix.bits for prefix in self._in_force)
        # Prefixes that say what those around them say, until the next change.
        self._gone: set[Prefix] = set()
        self._ranges: set[Prefix] = set()
        # What there is no room for: with each change it is tried again.
        self._missing: dict[Prefix, str] = {}
        self._refused: dict[SectionKey, str] = {}

    def close(self) -> None:
        self._map.close()

    def replace(
        self, sections: Mapping[SectionKey, IdentitySection], since: int = 0
    ) -> dict[SectionKey, str]:
        """These and no others; returns which could not be taken, and why."""
        wanted = {**_ALWAYS, **sections}
        return self._change(wanted, self._by_key.keys() - wanted.keys(), since, {*self._in_force})

    def apply(
        self,
        put: Mapping[SectionKey, IdentitySection],
        remove: Iterable[SectionKey] = (),
        since: int = 0,
    ) -> dict[SectionKey, str]:
        """Add, change and remove, from generation `since` on (0: at once); unknown keys to remove
        are ignored. An address that two pods claim is the later one's: the other is on its way
        out."""
        return self._change(put, remove, since, set())

    def mistaken(self) -> Mistaken:
        """Who is taken for somebody else, for lack of room."""
        result: dict[int, set[int]] = {}
        lengths = sorted(self._lengths, reverse=True)
        for prefix in self._missing:
            if (claimed := self._claimed(prefix)) is not None:
                wider = (_cut(prefix, bits) for bits in lengths if bits <= prefix.bits)
                there = next(filter(None, map(self._in_force.get, wider)), _NOBODY)
                result.setdefault(there.number or Reserved.WORLD, set()).add(claimed.number)
                if prefix.bits == _WHOLE:  # perhaps of a pod of this node
                    result.setdefault(Reserved.INIT, set()).add(claimed.number)
        return {number: frozenset(those) for number, those in result.items()}

    @property
    def leaves(self) -> bool:
        """There is room once more is changed."""
        return bool(self._gone)

    def _change(
        self,
        put: Mapping[SectionKey, IdentitySection],
        remove: Iterable[SectionKey],
        since: int,
        touched: set[Prefix],
    ) -> dict[SectionKey, str]:
        for prefix in self._gone:
            self._map.remove(prefix)
        self._gone.clear()
        touched |= self._missing.keys()
        self._missing.clear()
        for key in (*remove, *put):
            self._refused.pop(key, None)
        for key in remove:
            touched |= self._claim(key, frozenset())
        for key, section in put.items():
            addresses = (section.cidr,) if isinstance(section, CidrSection) else section.addresses
            try:
                prefixes = frozenset(map(Prefix.of, addresses))
            except ValueError as error:
                self._refused[key] = f"its addresses cannot be told to the kernel: {error}"
                continue
            self._order += 1
            claim = _Claim(_ABOUT.index(type(section)), self._order, self._who(section))
            touched |= self._claim(key, prefixes, claim)
        return self._refused | self._settle(touched, since)

    def _who(self, section: IdentitySection) -> Who:
        # Who is no workload that is known has not said that it may be enrolled.
        if isinstance(section, NodeSection):
            own = section.name == self._node
            number: int = Reserved.HOST if own else Reserved.REMOTE_NODE
            return Who(number, constants.IDENTITY_PLAIN)
        if isinstance(section, CidrSection):
            return Who(section.identity, constants.IDENTITY_PLAIN)
        flags = 0 if section.sockmap else constants.IDENTITY_PLAIN
        if not section.meshed:
            flags |= constants.IDENTITY_APART
        elif section.node and not section.local:
            flags |= constants.IDENTITY_FAR
            modes = {section.mtls, *section.mtls_ports.values()}
            if "STRICT" in modes or (section.spiffe_id and "PERMISSIVE" in modes):
                flags |= constants.IDENTITY_MTLS
        return Who(section.identity, flags)

    def _claim(
        self, key: SectionKey, prefixes: frozenset[Prefix], claim: _Claim | None = None
    ) -> frozenset[Prefix]:
        """What a section says of these, and no longer of others; all about which it may say
        something else now."""
        before = self._by_key.pop(key, frozenset())
        if prefixes:
            self._by_key[key] = prefixes
        for prefix in before | prefixes:
            claims = self._claims.setdefault(prefix, {})
            claims.pop(key, None)
            if prefix in prefixes and claim is not None:
                claims[key] = claim
            if not claims:
                del self._claims[prefix]
        return before | prefixes

    def _settle(self, touched: Iterable[Prefix], since: int) -> dict[SectionKey, str]:
        """Who is behind these from now on. What is new was, and what is gone will be, what it lies
        in."""
        changed: dict[Prefix, Identity] = {}
        touched = tuple(touched)
        lengths = sorted({*self._lengths, *(one.bits for one in touched)}, reverse=True)
        for prefix in touched:
            old, new = self._in_force.get(prefix), self._claimed(prefix)
            if old is not None and prefix.bits == _WHOLE:
                # Of a pod that is gone nobody is left (podfilter.remove).
                now = self._map.get(prefix)
                old = Who(now.number, now.flags) if now is not None else None
            if old != new:
                wider = [_cut(prefix, bits) for bits in lengths if bits < prefix.bits]
                old = old or next(filter(None, map(self._in_force.get, wider)), _NOBODY)
                new = new or next(filter(None, map(self._claimed, wider)), _NOBODY)
                changed[prefix] = Identity(since, *new, *old)
        # The widest first: if there is no room, fewer addresses are mistaken.
        for prefix, identity in sorted(changed.items()):
            claims = self._claims.get(prefix, {})
            is_new = prefix not in self._in_force
            is_range = bool(claims) and max(claims.values()).rank == _ABOUT.index(CidrSection)
            try:
                if is_new and is_range and len(self._ranges) == MAX_RANGES:
                    raise OSError(errno.ENOSPC, f"more than {MAX_RANGES} ranges of addresses")
                self._map.put(prefix, identity)
            except OSError as error:
                self._missing[prefix] = str(error.strerror)
                continue
            if is_new:
                self._lengths[prefix.bits] += 1
            self._ranges.discard(prefix)
            if is_range:
                self._ranges.add(prefix)
            if claims:
                self._in_force[prefix] = Who(identity.number, identity.flags)
            else:
                del self._in_force[prefix]
                self._lengths -= {prefix.bits: 1}
                self._gone.add(prefix)
        return {
            key: f"its addresses cannot be told to the kernel: {why}"
            for prefix, why in self._missing.items()
            for key in self._claims.get(prefix, ())
        }

    def _claimed(self, prefix: Prefix) -> Who | None:
        claims = self._claims.get(prefix)
        return max(claims.values()).who if claims else None


def _cut(prefix: Prefix, bits: int) -> Prefix:
    """The wider one in which it lies."""
    rest = 128 - bits
    number = int.from_bytes(prefix.packed, "big") >> rest << rest
    return Prefix(bits, number.to_bytes(16, "big"))
