"""Ranges of addresses: one spelling, and which lie within which. Knows text and numbers only."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterator

from mesh.model.identity import FIRST_CIDR

_BITS = 24
# Ranges, and sets of labels, that can have one number: 31 bits are left for all of it.
MOST_ALIKE = 1 << 31 - _BITS


def canonical(text: str) -> str:
    """A range, or a single address, in the one spelling; what is set beyond the prefix is dropped,
    and what is mapped to IPv6 is of IPv4 (RFC 4291 section 2.5.5.2). ValueError: it is none."""
    network = ipaddress.ip_network(text, strict=False)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is not None and network.prefixlen >= 96:
        return f"{mapped}/{network.prefixlen - 96}"
    return str(network)


def covers(outer: str, inner: str) -> bool:
    """Whether all of `inner` lies in `outer`, both canonical."""
    one, other = ipaddress.ip_network(outer), ipaddress.ip_network(inner)
    return one.version == other.version and other.subnet_of(one)  # type: ignore[arg-type]


def around(text: str) -> Iterator[str]:
    """The ranges in which a canonical one lies, itself first, the whole family's last."""
    network = ipaddress.ip_network(text)
    yield text
    while network.prefixlen:
        network = network.supernet()
        yield str(network)


def number(text: str) -> int:
    """What follows from the range alone, of the 24 lower bits."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return FIRST_CIDR | int.from_bytes(digest, "big") % (1 << _BITS)


def apart(number: int, rank: int) -> int:
    """The identity of a range whose number others share, by its place among them. ValueError: they
    are too many, which is no accident; it must not get the identity of another."""
    if rank >= MOST_ALIKE:
        raise ValueError(f"more than {MOST_ALIKE} ranges of policies have number {number:#x}")
    return number | rank << _BITS
