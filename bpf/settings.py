"""What the programs know of this node besides load balancing: its proxy, and who its addresses are.

Knows maps; what is in them stays in force without us.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple, TypeAlias

from bpf import layout
from bpf.layout import Config, Identity, Number, Prefix, Target
from bpf.maps import PinnedMap
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import MESH_HTTP_PORT, MESH_RELAY_PORT, NodeSection, WorkloadSection
from mesh.model.policyconfig import CidrSection
from mesh.model.section import SectionKey

_NOWHERE = bytes(layout.TARGET.size)


def steer_to_proxy(directory: Path, ports: Iterable[tuple[str, int]], *, sockmap: bool) -> None:
    """From now on new connections to HTTP frontends and remote backends go to these ports of the
    proxy, MESH_HTTP_PORT and MESH_RELAY_PORT on at most one address of each family; where there is
    none, straight to backends. DatapathError, OSError."""
    by_place: dict[tuple[int, int], str] = {
        (ip_address(address).version, port): address for address, port in ports
    }

    def at(version: int, port: int) -> bytes:
        address = by_place.get((version, port))
        return layout.TARGET.pack(Target.of(address, port, "TCP")) if address else _NOWHERE

    config = PinnedMap(directory, "config", Number, Config)
    try:
        config.put(
            Number(0),
            Config(
                at(4, MESH_HTTP_PORT),
                at(6, MESH_HTTP_PORT),
                at(4, MESH_RELAY_PORT),
                at(6, MESH_RELAY_PORT),
                layout.CONFIG_SOCKMAP if sockmap else 0,
            ),
        )
    finally:
        config.close()


class Generation:
    """The number that tells the programs that what they judged flows by has changed."""

    def __init__(self, directory: Path) -> None:
        """DatapathError: the map is not there."""
        self._map = PinnedMap(directory, "generation", Number, Number)

    def close(self) -> None:
        self._map.close()

    def next(self) -> None:
        """From now on every flow is judged anew before another packet of it passes. Anybody may do
        this, at any time: no two numbers are the same."""
        self._map.put(Number(0), Number(time.monotonic_ns()))


# What says who is behind addresses; the later ones stand above the earlier ones.
_ABOUT = (CidrSection, NodeSection, WorkloadSection)
IdentitySection: TypeAlias = CidrSection | NodeSection | WorkloadSection

# "::/0" is not about IPv4, though that is mapped; what a pod reaches on its link is the node.
_ALWAYS: dict[SectionKey, CidrSection] = {
    f"always/{cidr}": CidrSection(cidr, identity)
    for cidr, identity in (("0.0.0.0/0", Reserved.WORLD), ("fe80::/10", Reserved.HOST))
}


class _Claim(NamedTuple):
    """Who a section says is there; the greatest one stands."""

    rank: int
    order: int
    identity: Identity


class Identities:
    """Who is behind which address. A range's addresses are those that no longer prefix has: neither
    a pod, nor a node, nor a smaller range."""

    def __init__(self, directory: Path, node: str | None = None) -> None:
        """`node`: the name of this one. DatapathError: the map is not there."""
        self._map = PinnedMap(directory, "identities", Prefix, Identity)
        self._node = node
        self._by_key: dict[SectionKey, frozenset[Prefix]] = {}
        self._claims: dict[Prefix, dict[SectionKey, _Claim]] = {}
        self._order = 0

    def close(self) -> None:
        self._map.close()

    def replace(self, sections: Mapping[SectionKey, IdentitySection]) -> dict[SectionKey, str]:
        """These and no others; returns which could not be taken, and why."""
        wanted = {**_ALWAYS, **sections}
        refused = self.apply(wanted, tuple(self._by_key.keys() - wanted.keys()))
        for stale in [prefix for prefix, _ in self._map.items() if prefix not in self._claims]:
            self._map.remove(stale)
        return refused

    def apply(
        self, put: Mapping[SectionKey, IdentitySection], remove: Iterable[SectionKey] = ()
    ) -> dict[SectionKey, str]:
        """Add, change and remove; unknown keys to remove are ignored. An address that two pods
        claim is the later one's: the other is on its way out."""
        refused: dict[SectionKey, str] = {}
        for key in remove:
            self._claim(key, frozenset())
        for key, section in put.items():
            try:
                addresses = (
                    (section.cidr,) if isinstance(section, CidrSection) else section.addresses
                )
                prefixes = frozenset(map(Prefix.of, addresses))
                self._order += 1
                rank = _ABOUT.index(type(section))
                self._claim(key, prefixes, _Claim(rank, self._order, self._who(section)))
            except (ValueError, OSError) as error:
                refused[key] = f"its addresses cannot be told to the kernel: {error}"
        return refused

    def _who(self, section: IdentitySection) -> Identity:
        # Who is no workload that is known has not said that it may be enrolled.
        if isinstance(section, NodeSection):
            own = section.name == self._node
            number: int = Reserved.HOST if own else Reserved.REMOTE_NODE
            return Identity(number, layout.IDENTITY_PLAIN)
        if isinstance(section, CidrSection):
            return Identity(section.identity, layout.IDENTITY_PLAIN)
        flags = 0 if section.sockmap else layout.IDENTITY_PLAIN
        if not section.meshed:
            flags |= layout.IDENTITY_APART
        elif section.node and not section.local:
            flags |= layout.IDENTITY_FAR
        return Identity(section.identity, flags)

    def _claim(
        self, key: SectionKey, prefixes: frozenset[Prefix], claim: _Claim | None = None
    ) -> None:
        before = self._by_key.pop(key, frozenset())
        if prefixes:
            self._by_key[key] = prefixes
        for prefix in before | prefixes:
            claims = self._claims.setdefault(prefix, {})
            claims.pop(key, None)
            if prefix in prefixes and claim is not None:
                claims[key] = claim
            if claims:
                self._map.put(prefix, max(claims.values()).identity)
            else:
                del self._claims[prefix]
                self._map.remove(prefix)
