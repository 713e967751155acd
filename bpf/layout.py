"""What is in the maps: structs as Python sees them, and the C that checks it is so there too.

The programs are never compiled without these checks: `c_checks` has a _Static_assert for the size
and every offset of every struct. Knows no bpf(2), no bcc.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import ClassVar, NamedTuple, TypeVar

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
    keep their backend until they have not connected for `affinity_s` seconds; 0: they do not."""

    offset: int
    size: int
    affinity_s: int


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
    """struct affinity: when the client last connected (CLOCK_MONOTONIC, ns), a packed Target."""

    used_ns: int
    backend: bytes


class Number(NamedTuple):
    """A bare u32 or u64: indices, slots, counters."""

    value: int


T = TypeVar("T", Target, Frontend, OriginKey, Member, AffinityKey, Affinity, Number)


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
FRONTEND = Layout("frontend", "=", {"offset": "I", "size": "I", "affinity_s": "I"})
ORIGIN_KEY = Layout("origin_key", "=", {"cookie": "Q", "peer": "20s", "zero": "4x"})
MEMBER = Layout("member", "=", {"frontend": "20s", "backend": "20s"})
AFFINITY_KEY = Layout("affinity_key", "=", {"client": "Q", "frontend": "20s", "zero": "4x"})
AFFINITY = Layout("affinity", "=", {"used_ns": "Q", "backend": "20s", "zero": "4x"})
U32 = Layout("u32", "=", {"value": "I"})
U64 = Layout("u64", "=", {"value": "Q"})

# Sizes of the maps, in entries. A slot takes 8 bytes, a backend 24, the others about 120.
FRONTENDS = 1 << 14
SLOTS = 1 << 20
BACKENDS = 1 << 16
ORIGINS = 1 << 16
AFFINITIES = 1 << 16
MEMBERS = 1 << 16


def c_header() -> str:
    """Sizes as C."""
    sizes = {
        "FRONTENDS": FRONTENDS,
        "SLOTS": SLOTS,
        "BACKENDS": BACKENDS,
        "ORIGINS": ORIGINS,
        "AFFINITIES": AFFINITIES,
        "MEMBERS": MEMBERS,
    }
    return "".join(f"#define {name} {size}\n" for name, size in sizes.items())


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
