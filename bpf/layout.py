"""How the structs of the maps lie in memory, and the C that checks it is so there too.

The programs are never compiled without these checks: `c_checks` has a _Static_assert for the size
and every offset of every struct. Knows no bpf(2), no bcc.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import ClassVar, TypeVar

from bpf import constants
from bpf.structs import (
    Address,
    Addresses,
    Affinity,
    AffinityKey,
    AutomatonPlace,
    Backend,
    Config,
    Event,
    Exchange,
    Flow,
    FlowKey,
    Frontend,
    Identity,
    Member,
    Number,
    Origin,
    OriginKey,
    Outgoing,
    Pair,
    Paired,
    Passed,
    PassedKey,
    Passing,
    Pod,
    Policy,
    PolicyKey,
    Prefix,
    Proxied,
    Target,
    Tuple,
    Way,
)

# Tables of the automaton are read by the programs of the version that reads them so.
AUTOMATON_SOURCE = Path(__file__).parent / "programs" / "automaton.h"

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
    Way,
    Pair,
    Paired,
    Exchange,
    Passed,
    PassedKey,
    Passing,
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
FRONTEND = Layout(
    "frontend",
    "=",
    {"offset": "I", "size": "I", "affinity_s": "I", "flags": "I", "backends": "I"},
)
BACKEND = Layout("backend", "=", {"target": "20s", "flags": "I"})
ORIGIN = Layout("origin", "=", {"asked": "20s", "backend": "20s", "flags": "I"})
CONNECTED = Layout("connected", "=", {"peer": "20s", "origin": f"{ORIGIN.size}s"})
ASKED = Layout(
    "asked", "=", {"last": f"{CONNECTED.size * constants.ASKED_LATELY}s", "next": "I", "zero": "4x"}
)
ORIGIN_KEY = Layout("origin_key", "=", {"cookie": "Q", "peer": "20s", "zero": "4x"})
MEMBER = Layout("member", "=", {"frontend": "20s", "backend": "20s"})
AFFINITY_KEY = Layout("affinity_key", "=", {"client": "Q", "frontend": "20s", "zero": "4x"})
AFFINITY = Layout("affinity", "=", {"used_ns": "Q", "backend": "24s"})
CONFIG = Layout(
    "config",
    "=",
    {
        "http4": "20s",
        "http6": "20s",
        "relay4": "20s",
        "relay6": "20s",
        "flags": "I",
        "zero": "4x",
        "home": "Q",
    },
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
    "pod",
    "=",
    {
        "since": "Q",
        "proven_until": "Q",
        "policy": "I",
        "flags": "I",
        "old_policy": "I",
        "old_flags": "I",
    },
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
FLOW = Layout(
    "flow",
    "=",
    {"seen_ns": "Q", "generation": "Q", "until": "Q", "flags": "I", "refused": "I"},
)
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
WAY = Layout(
    "way",
    "=",
    {
        "backend": "Q",
        "series": "Q",
        "rule": "I",
        "share": "I",
        "response_max": "I",
        "zero": "4x",
    },
)
PAIR = Layout(
    "pair",
    "=",
    {
        "offer": "Q",
        "client": "Q",
        "generation": "Q",
        "egress": "I",
        "ingress": "I",
        "received": "I",
        "handed": "I",
        "until": "I",
        "zero": "4x",
        "expires_ns": "Q",
        "made_ns": "Q",
        "ways": f"{WAY.size * constants.PAIR_WAYS}s",
        "offer_again": "Q",
    },
)
PAIRED = Layout("paired", "=", {"client": "Q", "received": "I", "answered": "I"})
EXCHANGE = Layout(
    "exchange",
    "=",
    {
        "started_ns": "Q",
        "backend": "Q",
        "series": "Q",
        "egress": "I",
        "ingress": "I",
        "forwarded": "I",
        "answered": "I",
        "handed": "I",
        "parted": "I",
        "sent": "I",
        "unsent": "I",
        "left": "I",
        "messages": "I",
        "bodiless": "I",
        "status": "I",
        "bytes_in": "I",
        "bytes_out": "I",
        "response_max": "I",
        "port": "I",
        "shown": "I",
        "missed": "I",
        "head": f"{constants.PASSING_HEAD}s",
    },
)
PASSED_KEY = Layout(
    "passed_key",
    "=",
    {"series": "Q", "egress": "I", "ingress": "I", "status": "I", "zero": "4x"},
)
PASSED = Layout(
    "passed",
    "=",
    {
        "requests": "Q",
        "bytes_in": "Q",
        "bytes_out": "Q",
        "elapsed_ns": "Q",
        "faster": f"{8 * constants.PAIR_BUCKETS}s",
    },
)
PASSING = Layout(
    "passing",
    "=",
    {
        "started_ns": "Q",
        "elapsed_ns": "Q",
        "series": "Q",
        "egress": "I",
        "ingress": "I",
        "status": "I",
        "bytes_in": "I",
        "bytes_out": "I",
        "port": "I",
        "shown": "I",
        "zero": "4x",
        "head": f"{constants.PASSING_HEAD}s",
    },
)
WORKLOAD = Layout("workload", "=", {"cookie": "Q", "base": "I", "is_backend": "I"})
RESPONSES = Layout("responses", "=", {"raw": f"{constants.RESPONSE_STATES * 256 * 2}s"})
AUTOMATON_PLACE = Layout("automaton_place", "=", {"arena": "I", "word": "I"})
U32 = Layout("u32", "=", {"value": "I"})
U64 = Layout("u64", "=", {"value": "Q"})


def description() -> str:
    """Everything that must be the same where maps are shared."""
    structs = "".join(f"{one.name} {one.format.format} {one.fields}\n" for one in Layout.all)
    # Tables of the automaton are read by the programs of the version that reads them so.
    return structs + c_header() + AUTOMATON_SOURCE.read_text()


def c_header() -> str:
    """Sizes and flags as C."""
    shared = [pair for pair in vars(constants).items() if isinstance(pair[1], int)]
    bounds = " ".join(f"X({bound}ULL)" for bound in constants.PAIR_BOUNDS)
    numbers = "".join(f"#define {name} {value:d}\n" for name, value in shared)
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
