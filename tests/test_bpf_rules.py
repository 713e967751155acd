"""Rules as entries of a trie, against rules as they are read."""

from __future__ import annotations

import itertools
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bpf import constants
from bpf.rules import Entry, entries, prefixes
from mesh.model.policyconfig import Direction, HttpRule, PolicyRule, PortRange

NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}
ALLOW, SAFE, DENY, AUDIT_DENY = (
    constants.POLICY_ALLOW,
    constants.POLICY_SAFE,
    constants.POLICY_DENY,
    constants.POLICY_AUDIT_DENY,
)
GRE = 47


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_prefixes_are_the_range_and_nothing_else(one: int, other: int) -> None:
    first, last = sorted((one, other))
    ranges = [(port, port + (1 << 16 - length) - 1) for length, port in prefixes(first, last)]
    assert ranges[0][0] == first
    assert ranges[-1][1] == last
    assert all(end + 1 == start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert all(port % (1 << 16 - length) == 0 for length, port in prefixes(first, last))
    assert len(ranges) <= 30


def looked_up(found: list[Entry], identity: int, protocol: int, port: int) -> int:
    """As the kernel does: the longest prefix, once for the identity and once for everybody."""
    said = 0
    for who in {identity, 0}:
        best, flags = 0, 0
        for entry in found:
            of_port = entry.bits - 80
            fits = entry.identity == who and (
                entry.bits == 72
                or (
                    entry.protocol == protocol
                    and port >> 16 - of_port == entry.port >> 16 - of_port
                )
            )
            if fits and entry.bits > best:
                best, flags = entry.bits, entry.flags
        said |= flags
    return DENY if said & DENY else said


def read(rules: list[PolicyRule], identity: int, protocol: int, port: int) -> int:
    """What rules say, one after another."""
    said = 0
    for rule in rules:
        if rule.peers is not None and identity not in rule.peers:
            continue
        if not any(covers(one, protocol, port) for one in rule.ports or (PortRange(),)):
            continue
        if rule.deny:
            said |= AUDIT_DENY if rule.audit else DENY
        elif rule.http is None and not rule.audit:
            said |= SAFE if rule.authenticated else ALLOW
    return DENY if said & DENY else said


def covers(one: PortRange, protocol: int, port: int) -> bool:
    if one == PortRange():
        return True
    named = ("TCP", "UDP", "SCTP") if one.protocol == "ANY" else (one.protocol,)
    return protocol in [NUMBERS[name] for name in named] and one.first <= port <= one.last


PORTS = st.sampled_from([0, 1, 79, 80, 81, 443, 8000, 8080, 32768, 65534, 65535])
RANGES = st.builds(
    lambda protocol, one, other: PortRange(protocol, min(one, other), max(one, other)),
    st.sampled_from([*NUMBERS, "ANY"]),
    PORTS,
    PORTS,
)
RULES = st.builds(
    PolicyRule,
    source=st.just("x"),
    peers=st.none() | st.frozensets(st.sampled_from([300, 301]), min_size=1),
    ports=st.lists(RANGES | st.just(PortRange()), max_size=3).map(tuple),
    deny=st.booleans(),
    http=st.none() | st.just((HttpRule(),)),
    authenticated=st.booleans(),
    audit=st.booleans(),
)


@given(st.lists(RULES, max_size=5))
def test_the_trie_says_what_the_rules_say(rules: list[PolicyRule]) -> None:
    found = list(entries(Direction(rules=tuple(rules)), constants.INGRESS))
    keys = [entry[:5] for entry in found]
    assert len(set(keys)) == len(keys)
    for identity in (300, 301, 302):
        for protocol in (*NUMBERS.values(), GRE):
            for port in (0, 1, 79, 80, 81, 442, 443, 8000, 8079, 8080, 8081, 40000, 65534, 65535):
                expected = read(rules, identity, protocol, port)
                assert looked_up(found, identity, protocol, port) == expected


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ([PolicyRule("first"), PolicyRule("second")], "first"),
        ([PolicyRule("allows"), PolicyRule("denies", deny=True)], "denies"),
        ([PolicyRule("tells", audit=True), PolicyRule("allows")], "allows"),
    ],
)
def test_the_rule_that_decides_is_named(rules: list[PolicyRule], named: str) -> None:
    [entry] = entries(Direction(rules=tuple(rules)), constants.EGRESS)
    assert rules[entry.rule].source == named


def test_identities_that_the_same_rules_name_cost_one_entry_each() -> None:
    peers = frozenset(range(300, 1300))
    web = PortRange("TCP", 80, 80)
    assert len(list(entries(Direction(rules=(PolicyRule("x", peers, (web,)),)), 0))) == 1000
    assert NUMBERS["TCP"] == socket.IPPROTO_TCP
