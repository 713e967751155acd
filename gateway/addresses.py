"""Which addresses a Gateway listens on: its own wishes (spec.addresses), the pool, or the host's.

Allocation is a function of the set of requests alone: the same Gateways get the same addresses in
whatever order they came, and a younger Gateway never moves an older one. Knows no listeners.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from typing import NamedTuple

from mesh.model.meta import ObjectKey


def canonical(address: str) -> str:
    """The one way to write an address; one of IPv4 inside IPv6 (RFC 4291 §2.5.5.2) is that of IPv4.
    ValueError: it is none."""
    ip = ipaddress.ip_address(address)
    return str(getattr(ip, "ipv4_mapped", None) or ip)


class Request(NamedTuple):
    """What a Gateway asks for. `wanted`: one entry per address, "" is "assign one", out of the
    ranges of `pool`; sorts by age, then name, the order in which requests are served."""

    created: str
    key: ObjectKey
    wanted: tuple[str, ...]
    pool: tuple[str, ...] = ()


class Pool:
    """The addresses that may be given to Gateways: CIDRs and single addresses, in order."""

    def __init__(self, ranges: Iterable[str]) -> None:
        """ValueError: not an address or CIDR."""
        self._networks = tuple(ipaddress.ip_network(text, strict=False) for text in ranges)
        self.size = sum(_usable(network) for network in self._networks)

    def __contains__(self, address: str) -> bool:
        ip = ipaddress.ip_address(address)
        return any(ip.version == n.version and ip in n for n in self._networks)

    def probe(self, seed: str) -> Iterator[str]:
        """Every address of the pool once, from a place that `seed` determines."""
        if not self.size:
            return
        start = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big")
        for step in range(self.size):
            yield self._at((start + step) % self.size)

    def _at(self, position: int) -> str:
        for network in self._networks:
            usable = _usable(network)
            if position < usable:
                # Network and broadcast addresses are left out where a network has them.
                return str(network[position + (1 if usable < network.num_addresses else 0)])
            position -= usable
        raise IndexError(position)


def _usable(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> int:
    plain = network.version == 6 or network.prefixlen >= 31
    return network.num_addresses - (0 if plain else 2)


@cache
def pool_of(ranges: tuple[str, ...]) -> Pool:
    """There are few different ones."""
    return Pool(ranges)


def allocate(requests: Iterable[Request]) -> dict[ObjectKey, tuple[str | None, ...]]:
    """The address for each entry of each request: the one it names, or one from its pool that no
    request of its age or older names or got; None where the pool has none left."""
    taken: set[str] = set()
    given: dict[ObjectKey, tuple[str | None, ...]] = {}
    for _, same_age in groupby(sorted(requests), key=lambda request: request.created):
        group = tuple(same_age)
        taken.update(address for request in group for address in request.wanted if address)
        for request in group:
            addresses: list[str | None] = []
            for number, address in enumerate(request.wanted):
                chosen: str | None = address or None
                if chosen is None:
                    seed = f"{request.key}#{number}"
                    probe = pool_of(request.pool).probe(seed)
                    chosen = next((a for a in probe if a not in taken), None)
                    if chosen is not None:
                        taken.add(chosen)
                addresses.append(chosen)
            given[request.key] = tuple(addresses)
    return given
