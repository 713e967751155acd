"""The structs of the maps as Python sees them. Knows nothing of their bytes (bpf/layout.py)."""

from __future__ import annotations

import ipaddress
import socket
from typing import NamedTuple

from bpf import constants

_MAPPED = bytes(10) + b"\xff\xff"


class Target(NamedTuple):
    """Where to: struct target. `address` is 16 bytes, IPv4 as ::ffff:a.b.c.d; `protocol` is an IP
    protocol number. Frontends, backends and original destinations are all targets."""

    address: bytes
    port: int
    protocol: int

    @classmethod
    def of(cls, address: str, port: int, protocol: str) -> Target:
        """From text; `protocol` is "TCP" or "UDP". ValueError: not an address."""
        parsed = ipaddress.ip_address(address)
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.scope_id is not None:
            raise ValueError(f"{address}: an address with a zone cannot be balanced")
        packed = parsed.packed if parsed.version == 6 else _MAPPED + parsed.packed
        number = socket.IPPROTO_TCP if protocol == "TCP" else socket.IPPROTO_UDP
        return cls(packed, port, number)

    @property
    def is_ipv4(self) -> bool:
        return self.address.startswith(_MAPPED)


class Frontend(NamedTuple):
    """struct frontend: its backends are in slots[offset : offset + size]; size 0: none. Clients
    keep their backend until they have not connected for `affinity_s` seconds; 0: they do not.
    `flags`: FRONTEND_…; `backends`: how many they are."""

    offset: int
    size: int
    affinity_s: int
    flags: int = 0
    backends: int = 0


class Backend(NamedTuple):
    """struct backend: a packed Target; `flags`: BACKEND_…"""

    target: bytes
    flags: int = 0


class OriginKey(NamedTuple):
    """struct origin_key: a socket's cookie and the backend it was given, a packed Target."""

    cookie: int
    peer: bytes


class Member(NamedTuple):
    """struct member: two packed Targets."""

    frontend: bytes
    backend: bytes


class AffinityKey(NamedTuple):
    """struct affinity_key: the cookie of the client's network namespace, and a packed Target."""

    client: int
    frontend: bytes


class Affinity(NamedTuple):
    """struct affinity: when the client last connected (CLOCK_MONOTONIC, ns), a packed Backend."""

    used_ns: int
    backend: bytes


class Origin(NamedTuple):
    """struct origin: what a socket asked for and what was chosen for it, packed Targets."""

    asked: bytes
    backend: bytes
    flags: int


class Config(NamedTuple):
    """struct config: where this node's proxy listens for workloads, packed Targets, all zero:
    nowhere. `flags`: CONFIG_…; `home`: the cookie of the network namespace that is left alone."""

    http4: bytes
    http6: bytes
    relay4: bytes
    relay6: bytes
    flags: int
    home: int = 0


class Tuple(NamedTuple):
    """struct tuple: a TCP connection as its opener sees it, two packed Targets."""

    opener: bytes
    peer: bytes


class Proxied(NamedTuple):
    """struct proxied: a connection of a workload to the proxy, or of the proxy to a workload, with
    the proxy's socket. `state`: STATE_…"""

    peer: int
    cookie: int
    netns: int
    asked: bytes
    backend: bytes
    state: int


class Outgoing(NamedTuple):
    """struct outgoing: the proxy's socket of a connection that it opened."""

    cookie: int
    state: int


class Address(NamedTuple):
    """struct address: 16 bytes, as in Target."""

    packed: bytes

    @classmethod
    def of(cls, address: str) -> Address:
        """ValueError: not an address."""
        return cls(Target.of(address, 0, "TCP").address)


class Who(NamedTuple):
    """`number` 0: nobody says. `flags`: IDENTITY_…"""

    number: int
    flags: int


class Identity(NamedTuple):
    """struct identity: who an address is from a generation on, and before it (Who's)."""

    since: int
    number: int
    flags: int
    old_number: int
    old_flags: int

    def at(self, generation: int) -> Who:
        new = self.since <= generation
        return Who(self.number, self.flags) if new else Who(self.old_number, self.old_flags)


class Prefix(NamedTuple):
    """struct prefix: the first `bits` of 16 bytes as in Target."""

    bits: int
    packed: bytes

    @classmethod
    def of(cls, cidr: str) -> Prefix:
        """A range of addresses, or one address. ValueError: neither, or bits set beyond its
        length."""
        network = ipaddress.ip_network(cidr)
        if network.version == 6:
            return cls(network.prefixlen, network.network_address.packed)
        return cls(96 + network.prefixlen, _MAPPED + network.network_address.packed)


class Rules(NamedTuple):
    """`policy`: a set of rules; `flags`: POD_…; 0: nothing is in force. `proven_until` by
    CLOCK_MONOTONIC, in ns: where POD_PROVEN."""

    policy: int
    flags: int
    proven_until: int = 0


class Pod(NamedTuple):
    """struct pod: what is in force for one from a generation on, and before it (Rules);
    `proven_until` is of the newer one that is proven."""

    since: int
    proven_until: int
    policy: int
    flags: int
    old_policy: int
    old_flags: int

    def at(self, generation: int) -> Rules:
        new = self.since <= generation
        policy, flags = (self.policy, self.flags) if new else (self.old_policy, self.old_flags)
        return Rules(policy, flags, self.proven_until if flags & constants.POD_PROVEN else 0)


class PolicyKey(NamedTuple):
    """struct policy_key: `bits` of what follows count; `port` is two bytes in network order."""

    bits: int
    set: int
    identity: int
    direction: int
    protocol: int
    port: bytes


class Policy(NamedTuple):
    """struct policy: `flags`: POLICY_…; `rule` tells where it comes from."""

    flags: int
    rule: int


class FlowKey(NamedTuple):
    """struct flow_key: a packed Tuple, and EGRESS or INGRESS."""

    tuple: bytes
    direction: int


class Flow(NamedTuple):
    """struct flow: `seen_ns` and `until` by CLOCK_MONOTONIC; `flags`: FLOW_…; `refused` is a Reason
    or 0."""

    seen_ns: int
    generation: int
    until: int
    flags: int
    refused: int


class Addresses(NamedTuple):
    """struct addresses: those of a network namespace, 16 bytes each, all zero: none."""

    v4: bytes
    v6: bytes


class Event(NamedTuple):
    """struct event: what happened to a connection or datagram. `time_ns` is CLOCK_MONOTONIC; packed
    Targets, `source` all zero where it is not known; `reason` is a Reason; `rule` as in Policy."""

    time_ns: int
    netns: int
    source: bytes
    asked: bytes
    peer: bytes
    reason: int
    rule: int


class Way(NamedTuple):
    """struct way: to a backend's socket, `share` of PAIR_SHARES of a rule's requests."""

    backend: int
    series: int
    rule: int
    share: int
    response_max: int


class Pair(NamedTuple):
    """struct pair: what the proxy offers to a client's socket. `ways`: packed ones."""

    offer: int
    client: int
    generation: int
    egress: int
    ingress: int
    received: int
    handed: int
    until: int
    expires_ns: int
    made_ns: int
    ways: bytes
    offer_again: int


class Paired(NamedTuple):
    """struct paired: of a backend's socket, which has `answered` so many requests since."""

    client: int
    received: int
    answered: int


class Exchange(NamedTuple):
    """struct exchange: what goes past the proxy. `parted`: requests that came in more than one
    message; `bodiless`: the last request's response has no body, as it is of HEAD; `unsent`,
    `left`: so many bytes of it, and of the response, are still to come: as the first ones came,
    those of the request only while the client's socket has sent no more than `sent` by TCP.
    `missed`: requests that the proxy has because there was no way to the endpoint chosen."""

    started_ns: int
    backend: int
    series: int
    egress: int
    ingress: int
    forwarded: int
    answered: int
    handed: int
    parted: int
    sent: int
    unsent: int
    left: int
    messages: int
    bodiless: int
    status: int
    bytes_in: int
    bytes_out: int
    response_max: int
    port: int
    shown: int
    missed: int
    head: bytes

    @property
    def outstanding(self) -> bool:
        """A request was forwarded, and nothing of its response has come."""
        return (self.answered + self.handed - self.forwarded) & 0xFFFFFFFF != 0


class PassedKey(NamedTuple):
    """struct passed_key: what requests that passed by the proxy are counted under."""

    series: int
    egress: int
    ingress: int
    status: int


class Passed(NamedTuple):
    """struct passed: how many there were. `faster`: packed u64, one for each of PAIR_BOUNDS."""

    requests: int
    bytes_in: int
    bytes_out: int
    elapsed_ns: int
    faster: bytes


class Passing(NamedTuple):
    """struct passing: one of them. `head` has `shown` bytes of how it began."""

    started_ns: int
    elapsed_ns: int
    series: int
    egress: int
    ingress: int
    status: int
    bytes_in: int
    bytes_out: int
    port: int
    shown: int
    head: bytes


class AutomatonPlace(NamedTuple):
    """struct automaton_place: the arena that a table stands in, and the word where it begins."""

    arena: int
    word: int


class Number(NamedTuple):
    """A bare u32 or u64: indices, slots, counters."""

    value: int
