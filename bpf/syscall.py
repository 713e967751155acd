"""bpf(2): the commands Weft uses, through ctypes, so that who has pins needs no bcc or clang.

Knows the layout of `union bpf_attr` (linux/bpf.h) for these commands and nothing of Weft's maps.
No library from PyPI does this and is kept up; libbpf comes with bcc only. The interface is stable.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from typing import NamedTuple

_NUMBERS = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}
_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "s390x": 356, "ppc64le": 365}
_MEMBARRIER_CMD_GLOBAL = 1
_MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY = 1, 2, 3, 4
_PROG_LOAD, _OBJ_PIN, _OBJ_GET = 5, 6, 7
_PROG_RUN = 10
_MAP_TAKE = 21  # BPF_MAP_LOOKUP_AND_DELETE_ELEM
_MAP_CREATE, _BTF_LOAD = 0, 18
_INFO_BY_FD = 15
_MAP_LOOKUP_BATCH, _MAP_UPDATE_BATCH = 24, 26
_LINK_CREATE, _LINK_UPDATE, _LINK_DETACH = 28, 29, 34
_SK_STORAGE = 24  # enum bpf_map_type
_FUNC_INFO_SIZE = 8  # struct bpf_func_info

BPF_ANY, BPF_NOEXIST = 0, 1
# Entries read at a time; more than any bucket of a hash map has.
_BATCH = 1 << 12
# The verifier's log: the end is kept, which is where the reason stands (log_level 1 is enough).
_LOG_SIZE = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class VerifierError(OSError):
    """The kernel refused a program; `log` is what the verifier said."""

    def __init__(self, number: int, name: str, log: str) -> None:
        super().__init__(number, os.strerror(number), name)
        self.log = log


class MapInfo(NamedTuple):
    """What the kernel says of a map (struct bpf_map_info); sizes in bytes."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


def _call(command: int, attributes: ctypes.Array[ctypes.c_char]) -> int:
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise OSError(
            f"the number of bpf(2) on {platform.machine()} is not known to bpf/syscall.py"
        )
    result: int = _libc.syscall(
        ctypes.c_long(number),
        ctypes.c_int(command),
        ctypes.byref(attributes),
        ctypes.c_uint(ctypes.sizeof(attributes)),
    )
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _bpf(command: int, layout: str, *values: int | bytes) -> int:
    packed = struct.pack(layout, *values)
    return _call(command, ctypes.create_string_buffer(packed, len(packed)))


def _buffer(data: bytes) -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(data, len(data))


# --- maps ---------------------------------------------------------------------------------------


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The value under a key, None if there is none. `value_size`: as read, all CPUs of a per-CPU
    map."""
    return _read(_MAP_LOOKUP, fd, key, value_size)


def take(fd: int, key: bytes, value_size: int) -> bytes | None:
    """The same of a hash map, and there is none any more."""
    return _read(_MAP_TAKE, fd, key, value_size)


def _read(command: int, fd: int, key: bytes, value_size: int) -> bytes | None:
    key_buffer, value = _buffer(key), ctypes.create_string_buffer(value_size)
    try:
        _bpf(
            command,
            "=I4xQQQ",
            fd,
            ctypes.addressof(key_buffer),
            ctypes.addressof(value),
            BPF_ANY,
        )
    except FileNotFoundError:
        return None
    return value.raw


def update(fd: int, key: bytes, value: bytes, flags: int = BPF_ANY) -> None:
    key_buffer, value_buffer = _buffer(key), _buffer(value)
    _bpf(
        _MAP_UPDATE,
        "=I4xQQQ",
        fd,
        ctypes.addressof(key_buffer),
        ctypes.addressof(value_buffer),
        flags,
    )


def delete(fd: int, key: bytes) -> bool:
    """False: there was no such key."""
    key_buffer = _buffer(key)
    try:
        _bpf(_MAP_DELETE, "=I4xQQQ", fd, ctypes.addressof(key_buffer), 0, BPF_ANY)
    except FileNotFoundError:
        return False
    return True


def next_key(fd: int, key: bytes | None, key_size: int) -> bytes | None:
    """The key after `key`, the first for None; None at the end. A key that is gone starts again."""
    following = ctypes.create_string_buffer(key_size)
    held = None if key is None else _buffer(key)
    address = 0 if held is None else ctypes.addressof(held)
    try:
        _bpf(_MAP_NEXT_KEY, "=I4xQQQ", fd, address, ctypes.addressof(following), 0)
    except FileNotFoundError:
        return None
    return following.raw


def update_batch(fd: int, keys: bytes, values: bytes, count: int) -> None:
    """Writes `count` packed keys and values; what was written before an error stays."""
    key_buffer, value_buffer = _buffer(keys), _buffer(values)
    _bpf(
        _MAP_UPDATE_BATCH,
        "=QQQQIIQQ",
        0,
        0,
        ctypes.addressof(key_buffer),
        ctypes.addressof(value_buffer),
        count,
        fd,
        BPF_ANY,
        0,
    )


def entries(fd: int, key_size: int, value_size: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a hash map, many in a call. What changes meanwhile may be missing."""
    at, following = ctypes.create_string_buffer(4), ctypes.create_string_buffer(4)
    keys = ctypes.create_string_buffer(key_size * _BATCH)
    values = ctypes.create_string_buffer(value_size * _BATCH)
    began = more = False
    while not began or more:
        attributes = _buffer(
            struct.pack(
                "=QQQQIIQQ",
                ctypes.addressof(at) if began else 0,
                ctypes.addressof(following),
                ctypes.addressof(keys),
                ctypes.addressof(values),
                _BATCH,
                fd,
                0,
                0,
            )
        )
        began = more = True
        try:
            _call(_MAP_LOOKUP_BATCH, attributes)
        except FileNotFoundError:  # these are the last
            more = False
        (count,) = struct.unpack_from("=I", attributes.raw, 32)
        some, theirs = keys.raw, values.raw
        for index in range(count):
            yield (
                some[index * key_size : (index + 1) * key_size],
                theirs[index * value_size : (index + 1) * value_size],
            )
        at.raw = following.raw


def map_info(fd: int) -> MapInfo:
    info = ctypes.create_string_buffer(40)
    _bpf(_INFO_BY_FD, "=IIQ", fd, len(info), ctypes.addressof(info))
    kind, _, key_size, value_size, max_entries, flags = struct.unpack_from("=6I", info)
    return MapInfo(kind, key_size, value_size, max_entries, flags)


def create_map(name: str, info: MapInfo, inner: int | None = None) -> int:
    """A descriptor. `inner`: of a map like those that are to be in a map of maps."""
    types = 0, 0, 0
    if info.type == _SK_STORAGE:
        types = _bytes_type(info.value_size)
    try:
        return _bpf(
            _MAP_CREATE,
            "=IIIIIII16sIIII",
            info.type,
            info.key_size,
            info.value_size,
            info.max_entries,
            info.flags,
            inner or 0,
            0,
            name.encode()[:15],
            0,
            *types,
        )
    finally:
        if types[0]:
            os.close(types[0])


def _bytes_type(size: int) -> tuple[int, int, int]:
    """Types of keys and values, without which the kernel makes no map that belongs to sockets: a
    descriptor of BTF, and in it the numbers of a 32-bit integer and an array of so many bytes
    (Documentation/bpf/btf.rst)."""
    integer, array = 1 << 24, 3 << 24
    types = struct.pack("=III I", 1, integer, 4, 32)  # 1: int
    types += struct.pack("=III I", 1, integer, 1, 8)  # 2: char
    types += struct.pack("=III III", 0, array, 0, 2, 1, size)  # 3: char[size]
    strings = b"\0t\0"
    header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings))
    return _load_btf(header + types + strings), 1, 3


def _load_btf(data: bytes) -> int:
    blob = _buffer(data)
    return _bpf(_BTF_LOAD, "=QQIIII", ctypes.addressof(blob), 0, len(blob), 0, 0, 0)


# --- programs, links, pins ------------------------------------------------------------------------


def load_program(
    name: str,
    kind: int,
    attach_type: int,
    code: bytes,
    licence: str,
    functions: tuple[bytes, bytes] = (b"", b""),
) -> int:
    """Loads eBPF instructions; a descriptor. `functions`: BTF and struct bpf_func_info[], where
    there are several. VerifierError: refused by the verifier; OSError: not even looked at (no
    rights, type unknown)."""
    instructions, licence_text = _buffer(code), _buffer(licence.encode() + b"\0")
    log = ctypes.create_string_buffer(_LOG_SIZE)
    types, places = _load_btf(functions[0]) if functions[0] else 0, _buffer(functions[1])

    def attempt(level: int) -> int:
        return _bpf(
            _PROG_LOAD,
            "=IIQQIIQII16sIIIIQI4x",
            kind,
            len(code) // 8,
            ctypes.addressof(instructions),
            ctypes.addressof(licence_text),
            level,
            len(log) if level else 0,
            ctypes.addressof(log) if level else 0,
            0,
            0,
            name.encode()[:15],
            0,
            attach_type,
            types,
            _FUNC_INFO_SIZE if types else 0,
            ctypes.addressof(places) if types else 0,
            len(places) // _FUNC_INFO_SIZE,
        )

    try:
        return attempt(0)
    except OSError:
        try:
            return attempt(1)
        except OSError as error:
            if not log.value:
                raise
            text = log.value.decode(errors="replace")
            raise VerifierError(error.errno or 0, name, text) from None
    finally:
        if types:
            os.close(types)


def run(program: int, packet: bytes) -> int:
    """Runs a program of type SCHED_CLS on a packet (BPF_PROG_RUN); what it returned, signed. Takes
    no rights beyond the descriptor."""
    data = _buffer(packet)
    attributes = _buffer(
        struct.pack("=4I2Q2I", program, 0, len(packet), 0, ctypes.addressof(data), 0, 1, 0)
    )
    _call(_PROG_RUN, attributes)
    returned: int = struct.unpack_from("=i", attributes.raw, 4)[0]
    return returned


def pin(fd: int, path: str | os.PathLike[str]) -> None:
    name = _buffer(os.fsencode(path) + b"\0")
    _bpf(_OBJ_PIN, "=QII", ctypes.addressof(name), fd, 0)


def pinned(path: str) -> int:
    """A descriptor of what is pinned at a path."""
    name = _buffer(os.fsencode(path) + b"\0")
    return _bpf(_OBJ_GET, "=QII", ctypes.addressof(name), 0, 0)


def link(program: int, target: int, attach_type: int) -> int:
    """Attaches a program to a cgroup (a descriptor) or a network interface (its index) for as long
    as the returned descriptor or its pin lives."""
    return _bpf(_LINK_CREATE, "=4I48x", program, target, attach_type, 0)


def update_link(link_fd: int, program: int) -> None:
    """Puts another program in a link's place at once: nothing passes in between unseen."""
    _bpf(_LINK_UPDATE, "=4I", link_fd, program, 0, 0)


def detach_link(link_fd: int) -> None:
    """Ends what a link attaches, now; without this it ends a moment after nobody holds the link."""
    _bpf(_LINK_DETACH, "=I", link_fd)


class TcxLink(NamedTuple):
    """The id of the program, the index of the interface (0: gone) and enum bpf_attach_type."""

    program: int
    interface: int
    attach_type: int


def tcx_link(link_fd: int) -> TcxLink:
    """What the kernel says of a link to an interface (struct bpf_link_info)."""
    info = ctypes.create_string_buffer(24)
    _bpf(_INFO_BY_FD, "=IIQ", link_fd, len(info), ctypes.addressof(info))
    return TcxLink(*struct.unpack_from("=8xI4x2I", info))


def cgroup_of_link(link_fd: int) -> int:
    """The id (inode number) of the cgroup that a link is attached to; 0: that cgroup is gone."""
    info = ctypes.create_string_buffer(32)
    _bpf(_INFO_BY_FD, "=IIQ", link_fd, len(info), ctypes.addressof(info))
    number: int = struct.unpack_from("=Q", info, 16)[0]
    return number


def wait_for_programs() -> None:
    """Until every program that runs now, and may have seen what maps held before, has ended: a
    grace period of RCU (membarrier(2), MEMBARRIER_CMD_GLOBAL). Blocks for some milliseconds."""
    number = ctypes.c_long(_MEMBARRIER[platform.machine()])
    if _libc.syscall(number, ctypes.c_int(_MEMBARRIER_CMD_GLOBAL), ctypes.c_uint(0), 0) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
