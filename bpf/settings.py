"""What the programs know of this node besides load balancing: its proxy, and who its addresses are.

Knows maps; what is in them stays in force without us.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from pathlib import Path

from bpf import layout
from bpf.layout import Address, Config, Identity, Number, Target
from bpf.maps import PinnedMap
from mesh.model.nodeconfig import MESH_HTTP_PORT, MESH_RELAY_PORT, WorkloadSection
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


class Identities:
    """Who is behind which address."""

    def __init__(self, directory: Path) -> None:
        """DatapathError: the map is not there."""
        self._map = PinnedMap(directory, "identities", Address, Identity)
        self._by_key: dict[SectionKey, dict[Address, Identity]] = {}
        self._owners: dict[Address, SectionKey] = {}

    def close(self) -> None:
        self._map.close()

    def replace(self, workloads: Mapping[SectionKey, WorkloadSection]) -> dict[SectionKey, str]:
        """These and no others; returns which could not be taken, and why."""
        refused = self.apply(workloads, tuple(self._by_key.keys() - workloads.keys()))
        for stale in [address for address, _ in self._map.items() if address not in self._owners]:
            self._map.remove(stale)
        return refused

    def apply(
        self, put: Mapping[SectionKey, WorkloadSection], remove: Iterable[SectionKey] = ()
    ) -> dict[SectionKey, str]:
        """Add, change and remove; unknown keys to remove are ignored. An address that two pods
        claim is the later one's: the other is on its way out."""
        refused: dict[SectionKey, str] = {}
        for key in remove:
            self._forget(key, self._by_key.pop(key, {}))
        for key, workload in put.items():
            flags = 0 if workload.sockmap else layout.IDENTITY_PLAIN
            identity = Identity(workload.identity, flags)
            try:
                now = {Address.of(address): identity for address in workload.addresses}
                before = self._by_key.get(key, {})
                self._forget(key, {one: who for one, who in before.items() if one not in now})
                self._by_key[key] = now
                for address in now:
                    self._map.put(address, identity)
                    self._owners[address] = key
            except (ValueError, OSError) as error:
                refused[key] = f"its addresses cannot be told to the kernel: {error}"
        return refused

    def _forget(self, key: SectionKey, addresses: Mapping[Address, Identity]) -> None:
        for address in addresses:
            if self._owners.get(address) == key:
                del self._owners[address]
                self._map.remove(address)
