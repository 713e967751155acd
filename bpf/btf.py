"""Where the members of the running kernel's structs are: /sys/kernel/btf/vmlinux.

Source: Documentation/bpf/btf.rst. Reads what it is asked for and no more; needs no rights.
"""

from __future__ import annotations

import struct
from pathlib import Path

from bpf.errors import DatapathError

_VMLINUX = Path("/sys/kernel/btf/vmlinux")
_MAGIC = 0xEB9F
_STRUCT, _UNION = 4, 5
# What follows a type's 12 bytes, by its kind: so many bytes, and so many for each of `vlen`.
_TRAILERS = {
    1: (4, 0),  # INT
    3: (12, 0),  # ARRAY
    4: (0, 12),  # STRUCT
    5: (0, 12),  # UNION
    6: (0, 8),  # ENUM
    13: (0, 8),  # FUNC_PROTO
    14: (4, 0),  # VAR
    15: (0, 12),  # DATASEC
    17: (4, 0),  # DECL_TAG
    19: (0, 12),  # ENUM64
}


def kernel_types() -> bytes:
    """All that the kernel says: some 5 MB, of which `c_header` is made in a tenth of a second.
    DatapathError: it says nothing."""
    try:
        return _VMLINUX.read_bytes()
    except OSError as error:
        raise DatapathError(
            f"cannot read the kernel's types, {_VMLINUX}: {error.strerror}: it takes a kernel with "
            "CONFIG_DEBUG_INFO_BTF"
        ) from error


class Btf:
    """The kernel's types."""

    def __init__(self) -> None:
        """DatapathError: the kernel does not tell."""
        data = kernel_types()
        magic, _, _, header, types, size, strings, _ = struct.unpack_from("=HBBIIIII", data)
        if magic != _MAGIC:
            raise DatapathError(f"{_VMLINUX} is not BTF of this machine's byte order")
        self._data = data
        self._strings = header + strings
        # Where each type stands; the first is void.
        self._at = [0]
        at, end = header + types, header + types + size
        while at < end:
            self._at.append(at)
            info = int.from_bytes(data[at + 4 : at + 8], "little")
            fixed, each = _TRAILERS.get(info >> 24 & 0x1F, (0, 0))
            at += 12 + fixed + each * (info & 0xFFFF)

    def offset(self, struct_name: str, *members: str) -> int:
        """Bytes from the start of a struct to a member, by way of members that are structs
        themselves; members of unnamed ones count as the outer's. DatapathError: there is none."""
        number, bits = self._struct(struct_name), 0
        for member in members:
            found = self._member(number, member)
            if found is None:
                raise DatapathError(
                    f"this kernel's struct {struct_name} has no {'.'.join(members)}: it is not one "
                    "Weft works on"
                )
            offset, number = found
            bits += offset
        return bits // 8

    def _struct(self, name: str) -> int:
        wanted = name.encode()
        for number in range(1, len(self._at)):
            name_at, info, _ = struct.unpack_from("=III", self._data, self._at[number])
            if info >> 24 & 0x1F == _STRUCT and self._text(name_at) == wanted:
                return number
        raise DatapathError(f"this kernel has no struct {name}: it is not one Weft works on")

    def _member(self, number: int, member: str) -> tuple[int, int] | None:
        """Its offset in bits, and its type."""
        _, info, _ = struct.unpack_from("=III", self._data, self._at[number])
        if info >> 24 & 0x1F not in (_STRUCT, _UNION):
            return None
        for index in range(info & 0xFFFF):
            at = self._at[number] + 12 + 12 * index
            name_at, kind, offset = struct.unpack_from("=III", self._data, at)
            if info >> 31:  # with bit fields: their size stands in the upper byte
                offset &= 0xFFFFFF
            name = self._text(name_at)
            if name == member.encode():
                return offset, kind
            if not name:
                inner = self._member(kind, member)
                if inner is not None:
                    return offset + inner[0], inner[1]
        return None

    def _text(self, offset: int) -> bytes:
        start = self._strings + offset
        return self._data[start : self._data.index(b"\0", start)]


def c_header() -> str:
    """Offsets that the programs need, as C: all in struct tcp_sock, whose first member is, by way
    of others, its struct sock. Of timers: of what is 0 while they are not pending.
    DatapathError."""
    btf = Btf()
    pending = btf.offset("timer_list", "entry", "pprev")
    armed = btf.offset("hrtimer", "state")
    sock, connection = "sock", "inet_connection_sock"
    offsets = {
        "SK_RMEM_ALLOC": btf.offset(sock, "sk_backlog", "rmem_alloc"),
        "SK_REFCNT": btf.offset(sock, "__sk_common", "skc_refcnt"),
        "SK_TIMER": btf.offset(sock, "sk_timer") + pending,
        "TCP_RETRANSMIT_TIMER": btf.offset(connection, "icsk_retransmit_timer") + pending,
        "TCP_DELACK_TIMER": btf.offset(connection, "icsk_delack_timer") + pending,
        "TCP_PACING_TIMER": btf.offset("tcp_sock", "pacing_timer") + armed,
        "TCP_COMPRESSED_ACK_TIMER": btf.offset("tcp_sock", "compressed_ack_timer") + armed,
        "TCP_WRITE_SEQ": btf.offset("tcp_sock", "write_seq"),
    }
    return "".join(f"#define {name} {at}\n" for name, at in offsets.items())
