"""What is in the maps: structs as Python sees them, and the C that checks it is so there too.

The programs are never compiled without these checks: `c_checks` has a _Static_assert for the size
and every offset of every struct. Knows no bpf(2), no bcc.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar

from mesh.model.identity import FIRST_CIDR as FIRST_CIDR
from mesh.model.identity import FIRST_WORKLOAD as FIRST_WORKLOAD
from mesh.model.identity import Reserved

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
    `flags`: FRONTEND_…"""

    offset: int
    size: int
    affinity_s: int
    flags: int = 0


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
    nowhere. `flags`: CONFIG_…"""

    http4: bytes
    http6: bytes
    relay4: bytes
    relay6: bytes
    flags: int


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
    """`policy`: a set of rules; `flags`: POD_…; 0: nothing is in force."""

    policy: int
    flags: int


class Pod(NamedTuple):
    """struct pod: what is in force for one from a generation on, and before it (Rules)."""

    since: int
    policy: int
    flags: int
    old_policy: int
    old_flags: int

    def at(self, generation: int) -> Rules:
        new = self.since <= generation
        return Rules(self.policy, self.flags) if new else Rules(self.old_policy, self.old_flags)


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
    """struct flow: `seen_ns` by CLOCK_MONOTONIC; `flags`: FLOW_…; `refused` is a Reason or 0."""

    seen_ns: int
    generation: int
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


class Pair(NamedTuple):
    """struct pair: what the proxy offers to a client's socket."""

    offer: int
    backend: int
    generation: int
    egress: int
    ingress: int
    rule: int
    received: int
    handed: int
    until: int
    expires_ns: int
    offer_again: int


class Paired(NamedTuple):
    """struct paired: of a backend's socket."""

    client: int
    received: int


class Exchange(NamedTuple):
    """struct exchange: what went past the proxy. `faster`: packed u64, one for each of PAIR_BOUNDS;
    `bodiless`: the last request's response has no body, as it is of HEAD; `left`: so many bytes of
    it are still to come, as the first ones came."""

    started_ns: int
    bytes_in: int
    bytes_out: int
    elapsed_ns: int
    faster: bytes
    forwarded: int
    answered: int
    handed: int
    bodiless: int
    left: int

    @property
    def outstanding(self) -> bool:
        """A request was forwarded, and nothing of its response has come."""
        return (self.answered + self.handed - self.forwarded) & 0xFFFFFFFF != 0


class AutomatonPlace(NamedTuple):
    """struct automaton_place: the arena that a table stands in, and the word where it begins."""

    arena: int
    word: int


class Number(NamedTuple):
    """A bare u32 or u64: indices, slots, counters."""

    value: int


# Of the tables of bpf/response.py; a power of two. In a cell above the next state: the byte is a
# digit of Content-Length; the head goes on with it. The first state, and that of a whole head.
RESPONSE_STATES = 512
RESPONSE_DIGIT, RESPONSE_ALIVE = 14, 15
RESPONSE_START, RESPONSE_DONE = 1, 2

T = TypeVar(
    "T",
    Target,
    Frontend,
    Backend,
    OriginKey,
    Origin,
    Member,
    AffinityKey,
    Affinity,
    Config,
    Tuple,
    Proxied,
    Outgoing,
    Address,
    Identity,
    Prefix,
    Pod,
    PolicyKey,
    Policy,
    FlowKey,
    Flow,
    Addresses,
    Event,
    Pair,
    Paired,
    Exchange,
    AutomatonPlace,
    Number,
)


class Layout:
    """A struct as bytes. `fields` are C members with their struct format; "x" formats are padding,
    which is zero always: keys are compared byte by byte. `order` is "!" where every number of the
    struct is in network order, "=" where they are the host's."""

    all: ClassVar[list[Layout]] = []

    def __init__(self, name: str, order: str, fields: dict[str, str]) -> None:
        self.name = name
        self._order = order
        self.fields = fields
        self.format = struct.Struct(order + "".join(fields.values()))
        self.size = self.format.size
        if name not in ("u32", "u64"):
            Layout.all.append(self)

    def offsets(self) -> dict[str, int]:
        """Each member's offset in bytes."""
        formats = list(self.fields.values())
        return {
            name: struct.calcsize(self._order + "".join(formats[:index]))
            for index, name in enumerate(self.fields)
        }

    def pack(self, value: T) -> bytes:
        return self.format.pack(*value)

    def unpack(self, kind: type[T], data: bytes) -> T:
        return kind(*self.format.unpack(data))


TARGET = Layout("target", "!", {"address": "16s", "port": "H", "protocol": "B", "zero": "x"})
FRONTEND = Layout("frontend", "=", {"offset": "I", "size": "I", "affinity_s": "I", "flags": "I"})
BACKEND = Layout("backend", "=", {"target": "20s", "flags": "I"})
ORIGIN = Layout("origin", "=", {"asked": "20s", "backend": "20s", "flags": "I"})
ORIGIN_KEY = Layout("origin_key", "=", {"cookie": "Q", "peer": "20s", "zero": "4x"})
MEMBER = Layout("member", "=", {"frontend": "20s", "backend": "20s"})
AFFINITY_KEY = Layout("affinity_key", "=", {"client": "Q", "frontend": "20s", "zero": "4x"})
AFFINITY = Layout("affinity", "=", {"used_ns": "Q", "backend": "24s"})
CONFIG = Layout(
    "config",
    "=",
    {"http4": "20s", "http6": "20s", "relay4": "20s", "relay6": "20s", "flags": "I"},
)
TUPLE = Layout("tuple", "=", {"opener": "20s", "peer": "20s"})
PROXIED = Layout(
    "proxied",
    "=",
    {
        "peer": "Q",
        "cookie": "Q",
        "netns": "Q",
        "asked": "20s",
        "backend": "20s",
        "state": "I",
        "zero": "4x",
    },
)
OUTGOING = Layout("outgoing", "=", {"cookie": "Q", "state": "I", "zero": "4x"})
ADDRESS = Layout("address", "=", {"words": "16s"})
IDENTITY = Layout(
    "identity",
    "=",
    {"since": "Q", "number": "I", "flags": "I", "old_number": "I", "old_flags": "I"},
)
PREFIX = Layout("prefix", "=", {"bits": "I", "address": "16s"})
POD = Layout(
    "pod", "=", {"since": "Q", "policy": "I", "flags": "I", "old_policy": "I", "old_flags": "I"}
)
POLICY_KEY = Layout(
    "policy_key",
    "=",
    {
        "bits": "I",
        "set": "I",
        "identity": "I",
        "direction": "B",
        "protocol": "B",
        "port": "2s",
    },
)
POLICY = Layout("policy", "=", {"flags": "I", "rule": "I"})
FLOW_KEY = Layout("flow_key", "=", {"tuple": "40s", "direction": "I"})
FLOW = Layout("flow", "=", {"seen_ns": "Q", "generation": "Q", "flags": "I", "refused": "I"})
FRAGMENT = Layout(
    "fragment",
    "=",
    {"source": "16s", "destination": "16s", "id": "I", "direction": "I"},
)
TOLD = Layout("told", "=", {"second": "Q", "events": "Q"})
ADDRESSES = Layout("addresses", "=", {"v4": "16s", "v6": "16s"})
EVENT = Layout(
    "event",
    "=",
    {
        "time_ns": "Q",
        "netns": "Q",
        "source": "20s",
        "asked": "20s",
        "peer": "20s",
        "reason": "I",
        "rule": "I",
        "zero": "4x",
    },
)
# As those of the proxy's histogram, in ns.
PAIR_BOUNDS = tuple(
    int(ms * 1_000_000)
    for ms in (1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000)
)
PAIR_BUCKETS = len(PAIR_BOUNDS)
PAIR = Layout(
    "pair",
    "=",
    {
        "offer": "Q",
        "backend": "Q",
        "generation": "Q",
        "egress": "I",
        "ingress": "I",
        "rule": "I",
        "received": "I",
        "handed": "I",
        "until": "I",
        "expires_ns": "Q",
        "offer_again": "Q",
    },
)
PAIRED = Layout("paired", "=", {"client": "Q", "received": "I", "zero": "4x"})
EXCHANGE = Layout(
    "exchange",
    "=",
    {
        "started_ns": "Q",
        "bytes_in": "Q",
        "bytes_out": "Q",
        "elapsed_ns": "Q",
        "faster": f"{8 * PAIR_BUCKETS}s",
        "forwarded": "I",
        "answered": "I",
        "handed": "I",
        "bodiless": "I",
        "left": "I",
        "zero": "4x",
    },
)
WORKLOAD = Layout("workload", "=", {"cookie": "Q", "base": "I", "is_backend": "I"})
RESPONSES = Layout("responses", "=", {"raw": f"{RESPONSE_STATES * 256 * 2}s"})
AUTOMATON_PLACE = Layout("automaton_place", "=", {"arena": "I", "word": "I"})
U32 = Layout("u32", "=", {"value": "I"})
U64 = Layout("u64", "=", {"value": "Q"})

# A frontend's connections go to this node's proxy; and it may answer them by redirect.
FRONTEND_HTTP, FRONTEND_SOCKMAP = 1, 2
# A backend is reached through the relay of this node's proxy.
BACKEND_REMOTE = 1
# The proxy sends to workloads of this node by redirect.
# Also: nothing goes plainly to a pod of another node that takes mutual TLS.
CONFIG_SOCKMAP, CONFIG_MTLS = 1, 2
# An address whose sockets are never enrolled; of a meshed pod of another node; of a pod that is not
# in the mesh; of one of another node that takes mutual TLS, at some port at least.
IDENTITY_PLAIN, IDENTITY_FAR, IDENTITY_APART, IDENTITY_MTLS = 1, 2, 4, 8
# Of a connection between proxy and workload: to be enrolled if both ends can be; enrolled.
STATE_WANTED, STATE_ENROLLED = 1, 2

# Of a pod, for egress: it has policies; what no rule allows is refused; refusals are only told. For
# ingress the same, shifted. Then: its ports are STRICT; not all of them are as the pod is; the node
# holds a valid SVID of it.
POD_POLICED, POD_DEFAULT_DENY, POD_AUDIT, POD_INGRESS_SHIFT = 1, 2, 4, 4
POD_STRICT, POD_MTLS_PORTS, POD_PROVEN = 1 << 8, 1 << 9, 1 << 10
# Whose rules judge: those of who opens a flow, those of whom it is opened to.
EGRESS, INGRESS = 0, 1
# Of what rules say: it is allowed; if it goes by mutual TLS or between two pods of this node with
# SVIDs; it is refused; it would be, were the rule not in audit mode.
POLICY_ALLOW, POLICY_SAFE, POLICY_DENY, POLICY_AUDIT_DENY = 1, 2, 4, 8
# Of a flow to a pod: the node itself has opened it, another pod of this node. Of all flows: the
# peer has answered; its opener has said that it ends, its peer, both (or one has broken it off).
FLOW_FROM_NODE, FLOW_FROM_POD, FLOW_FROM = 1, 2, 3
FLOW_ANSWERED, FLOW_ENDED_BY_OPENER, FLOW_ENDED_BY_PEER, FLOW_ENDED = 4, 8, 16, 24
# What stands for who is no pod, in `identities`.
IDENTITY_HOST, IDENTITY_WORLD, IDENTITY_INIT = Reserved.HOST, Reserved.WORLD, Reserved.INIT
# The mark of packets that the filter has made itself, between its two ends.
RESET_MARK = 0x57454654

# Sizes of the maps, in entries. A slot takes 8 bytes, a backend 24, the others about 120.
FRONTENDS = 1 << 15
SLOTS = 1 << 20
BACKENDS = 1 << 16
ORIGINS = 1 << 16
AFFINITIES = 1 << 16
MEMBERS = 1 << 16
# Connections to the proxy that it has yet to accept; connections that it has opened; backends that
# cannot be enrolled; enrolled sockets.
CONNECTING = 1 << 14
OUTGOING_MAX = 1 << 16
PLAIN = 1 << 12
# For how long, in seconds.
PLAIN_S = 600
SOCKETS_MAX = 1 << 16
# Of this node; of the cluster.
PODS = 1 << 10
IDENTITIES = 1 << 16
MTLS_PORTS = 1 << 12
# Rules of all pods: some 150 bytes for each that is there.
POLICIES = 1 << 18
# What pods have opened, and what was opened to them: 18 MB, at once. The least recently used go.
FLOWS = 1 << 17
# How long a silent flow is remembered, in seconds: one of TCP while it lives (as kube-proxy has
# nf_conntrack do), all others.
FLOW_TCP_S, FLOW_S = 86_400, 120
# Fragmented packets on their way; how long the rest of one may take (Linux puts none together that
# is older), in seconds.
FRAGMENTS = 1 << 12
FRAGMENT_S = 30
# Refusals of packets that are told of in one second, on each CPU.
TOLD_MAX = 500
# Pairs, and what went past the proxy by them. A response that does is no longer than this, and its
# client has read all before: so that all pairs' hold no more than 512 MiB.
PAIRS_MAX = 1 << 13
EXCHANGES_MAX = 1 << 14
RESPONSE_MAX, REQUEST_MAX = 64 * 1024, 64 * 1024
# Of its head; a power of two.
RESPONSE_HEAD_MAX = 2048
# Of 4 KiB; a power of two.
EVENT_PAGES = 128
# Tables that requests are judged by, and the arenas they stand in: twice what the largest table
# takes and a header (bpf/programs/automaton.h), in bytes; 4 MB for each that is in use.
AUTOMATON_SOURCE = Path(__file__).parent / "programs" / "automaton.h"
AUTOMATA = 1 << 12
AUTOMATON_ARENAS, AUTOMATON_ARENA = 1 << 8, (4 << 20) + 512

# What C is told by these names.
_CONSTANTS = (
    "FRONTEND_HTTP",
    "FRONTEND_SOCKMAP",
    "BACKEND_REMOTE",
    "CONFIG_SOCKMAP",
    "CONFIG_MTLS",
    "IDENTITY_PLAIN",
    "IDENTITY_FAR",
    "IDENTITY_APART",
    "IDENTITY_MTLS",
    "IDENTITY_HOST",
    "IDENTITY_WORLD",
    "IDENTITY_INIT",
    "FIRST_WORKLOAD",
    "FIRST_CIDR",
    "EGRESS",
    "INGRESS",
    "POD_POLICED",
    "POD_DEFAULT_DENY",
    "POD_AUDIT",
    "POD_INGRESS_SHIFT",
    "POD_STRICT",
    "POD_MTLS_PORTS",
    "POD_PROVEN",
    "POLICY_ALLOW",
    "POLICY_SAFE",
    "POLICY_DENY",
    "POLICY_AUDIT_DENY",
    "FLOW_FROM_NODE",
    "FLOW_FROM_POD",
    "FLOW_FROM",
    "FLOW_ANSWERED",
    "FLOW_ENDED_BY_OPENER",
    "FLOW_ENDED_BY_PEER",
    "FLOW_ENDED",
    "RESET_MARK",
    "STATE_WANTED",
    "STATE_ENROLLED",
    "FRONTENDS",
    "SLOTS",
    "BACKENDS",
    "ORIGINS",
    "AFFINITIES",
    "MEMBERS",
    "CONNECTING",
    "OUTGOING_MAX",
    "PLAIN",
    "PLAIN_S",
    "SOCKETS_MAX",
    "PODS",
    "IDENTITIES",
    "MTLS_PORTS",
    "POLICIES",
    "FLOWS",
    "FLOW_TCP_S",
    "FLOW_S",
    "FRAGMENTS",
    "FRAGMENT_S",
    "TOLD_MAX",
    "EVENT_PAGES",
    "PAIR_BUCKETS",
    "PAIRS_MAX",
    "EXCHANGES_MAX",
    "RESPONSE_MAX",
    "REQUEST_MAX",
    "RESPONSE_HEAD_MAX",
    "RESPONSE_STATES",
    "RESPONSE_DIGIT",
    "RESPONSE_ALIVE",
    "RESPONSE_START",
    "RESPONSE_DONE",
    "AUTOMATA",
    "AUTOMATON_ARENAS",
    "AUTOMATON_ARENA",
)


def description() -> str:
    """Everything that must be the same where maps are shared."""
    structs = "".join(f"{one.name} {one.format.format} {one.fields}\n" for one in Layout.all)
    # Tables of the automaton are read by the programs of the version that reads them so.
    return structs + c_header() + AUTOMATON_SOURCE.read_text()


def c_header() -> str:
    """Sizes and flags as C."""
    bounds = " ".join(f"X({bound}ULL)" for bound in PAIR_BOUNDS)
    numbers = "".join(f"#define {name} {globals()[name]:d}\n" for name in _CONSTANTS)
    return f"{numbers}#define PAIR_BOUNDS(X) {bounds}\n"


def c_checks() -> str:
    """Checks, to stand after the structs, that C lays them out as this module does."""
    lines = []
    for layout in Layout.all:
        name = f"struct {layout.name}"
        lines.append(f'_Static_assert(sizeof({name}) == {layout.size}, "size of {name}");')
        for member, offset in layout.offsets().items():
            what = f"__builtin_offsetof({name}, {member}) == {offset}"
            lines.append(f'_Static_assert({what}, "offset of {name}.{member}");')
    return "\n".join(lines) + "\n"
