"""The rules of a pod's policy as the kernel's trie holds them: for each identity and direction, its
ports as prefixes, of which the longest one that fits has the answer.

Pure: knows keys and values of the map `policies`, not the map. What a set says does not depend on
the pod, so pods with the same rules share one.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from itertools import groupby
from operator import or_
from typing import NamedTuple

from bpf import constants
from mesh.model.policyconfig import Direction, PolicyRule, PortRange

# Bits of struct policy_key up to the direction, and with the protocol; 16 more with the port.
_ANY_PROTOCOL, _ANY_PORT = 72, 80
_PORTS = 1 << 16
_PROTOCOLS = {
    "TCP": socket.IPPROTO_TCP,
    "UDP": socket.IPPROTO_UDP,
    "SCTP": socket.IPPROTO_SCTP,
    "ICMP": socket.IPPROTO_ICMP,
    "ICMPv6": socket.IPPROTO_ICMPV6,
}
# Those that "ANY" means where it comes with ports.
_WITH_PORTS = ("TCP", "UDP", "SCTP")
# Where rules name nobody.
_ANYBODY = 0


# Where no rule says anything, and that is what refuses.
DEFAULT = -1


class Entry(NamedTuple):
    """A key without its set, and its value: `flags` (POLICY_…), and the place of the rule to name,
    or DEFAULT. `port` is of as many bits as `bits` leave."""

    bits: int
    identity: int
    direction: int
    protocol: int
    port: int
    flags: int
    rule: int


class _Said(NamedTuple):
    """What some rules say together: POLICY_…, and the place of the one to name."""

    flags: int
    rule: int


class _At(NamedTuple):
    """The same for some ports; `bits` as in Entry."""

    bits: int
    protocol: int
    port: int
    said: _Said


def entries(direction: Direction, number: int) -> Iterator[Entry]:
    """What is in the trie for a direction, EGRESS or INGRESS. A rule about requests lets nothing
    through here: the proxy's own connections are not judged by these."""
    says = [_says(rule, audit=direction.audit) for rule in direction.rules]
    by_identity: dict[int, list[int]] = {}
    for place, rule in enumerate(direction.rules):
        if says[place]:
            for identity in (_ANYBODY,) if rule.peers is None else rule.peers:
                by_identity.setdefault(identity, []).append(place)
    if direction.default_deny:
        by_identity.setdefault(_ANYBODY, [])
    # Identities that the same rules name are many, and have the same ports.
    known: dict[tuple[int, ...], list[_At]] = {}
    for identity, places in by_identity.items():
        which = tuple(places)
        if which not in known:
            known[which] = list(_ports({at: (direction.rules[at], says[at]) for at in which}))
        for bits, protocol, port, said in known[which]:
            yield Entry(bits, identity, number, protocol, port, said.flags, said.rule)
    if direction.default_deny and not any(
        one.bits == _ANY_PROTOCOL for one in known[tuple(by_identity[_ANYBODY])]
    ):
        yield Entry(_ANY_PROTOCOL, _ANYBODY, number, 0, 0, 0, DEFAULT)


def prefixes(first: int, last: int) -> Iterator[tuple[int, int]]:
    """The fewest prefixes of 16 bits that are together `first` to `last`: length and first port."""
    while first <= last:
        size = min(first & -first or _PORTS, 1 << (last - first + 1).bit_length() - 1)
        yield 17 - size.bit_length(), first
        first += size


def _says(rule: PolicyRule, *, audit: bool) -> int:
    if rule.deny:
        return constants.POLICY_AUDIT_DENY if rule.audit else constants.POLICY_DENY
    # In audit mode it does not allow either, unless nothing is refused anyway.
    if rule.http is not None or (rule.audit and not audit):
        return 0
    return constants.POLICY_SAFE if rule.authenticated else constants.POLICY_ALLOW


def _ports(rules: Mapping[int, tuple[PolicyRule, int]]) -> Iterator[_At]:
    """What rules say of ports, by their places and what each says."""
    ranges = [
        (one, _Said(says, place))
        for place, (rule, says) in rules.items()
        for one in rule.ports or (PortRange(),)
    ]
    everywhere = _together(said for one, said in ranges if _is_all(one))
    if everywhere.flags:
        yield _At(_ANY_PROTOCOL, 0, 0, everywhere)
    for name, protocol in _PROTOCOLS.items():
        here = [(one, said) for one, said in ranges if _is_about(one, name)]
        starts = {0, *(one.first for one, _ in here), *(one.last + 1 for one, _ in here)}
        # From each start to the next, all ports are in the same ranges.
        parts = [
            (at, _together(said for one, said in here if one.first <= at <= one.last))
            for at in sorted(starts - {_PORTS})
        ]
        alike = [next(part) for _, part in groupby(parts, lambda part: part[1].flags)]
        ends = [at - 1 for at, _ in alike[1:]] + [_PORTS - 1]
        for (first, said), last in zip(alike, ends, strict=True):
            if said.flags != everywhere.flags:
                for length, port in prefixes(first, last):
                    yield _At(_ANY_PORT + length, protocol, port, said)


def _together(said: Iterable[_Said]) -> _Said:
    """A rule that denies stands above all others, and is the one to name."""
    every = sorted(said, key=lambda one: one.flags, reverse=True)
    flags = reduce(or_, (one.flags for one in every), 0)
    if flags & constants.POLICY_DENY:
        flags = constants.POLICY_DENY
    return _Said(flags, next((one.rule for one in every if one.flags & flags), 0))


def _is_all(one: PortRange) -> bool:
    return (one.protocol, one.first, one.last) == ("ANY", 0, _PORTS - 1)


def _is_about(one: PortRange, protocol: str) -> bool:
    if one.protocol == "ANY":
        return protocol in _WITH_PORTS or _is_all(one)
    return one.protocol == protocol
