"""The pinned maps, typed. Needs pins and bpf(2), never bcc or clang.

A map's methods raise OSError as bpf(2) does: ENOSPC or E2BIG is a full map.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from bpf import constants, layout, pins, syscall
from bpf.errors import DatapathError
from bpf.layout import Layout
from bpf.reasons import Reason
from bpf.structs import (
    Address,
    Addresses,
    Affinity,
    AffinityKey,
    Backend,
    Config,
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
    Pod,
    Policy,
    PolicyKey,
    Prefix,
    Proxied,
    Target,
    Tuple,
)

K = TypeVar(
    "K",
    Target,
    OriginKey,
    Member,
    AffinityKey,
    Tuple,
    Address,
    Prefix,
    PolicyKey,
    FlowKey,
    Number,
)
V = TypeVar(
    "V",
    Frontend,
    Backend,
    Origin,
    Affinity,
    Config,
    Proxied,
    Outgoing,
    Identity,
    Addresses,
    Pod,
    Policy,
    Flow,
    Pair,
    Exchange,
    Number,
)


# BPF_F_MMAPABLE.
_MMAPABLE = 1 << 10


class Spec(NamedTuple):
    """What the program file declares. A ring buffer has neither keys nor values, and its entries
    are bytes; a map that belongs to sockets has no number of entries."""

    key: Layout | None
    value: Layout | None
    entries: int


MAPS = {
    "frontends": Spec(layout.TARGET, layout.FRONTEND, constants.FRONTENDS),
    "slots": Spec(layout.U32, layout.U64, constants.SLOTS),
    "backends": Spec(layout.U32, layout.BACKEND, constants.BACKENDS),
    "connected": Spec(layout.U32, layout.CONNECTED, 0),
    "asked": Spec(layout.U32, layout.ASKED, 0),
    "origins": Spec(layout.ORIGIN_KEY, layout.ORIGIN, constants.ORIGINS),
    "affinities": Spec(layout.AFFINITY_KEY, layout.AFFINITY, constants.AFFINITIES),
    "members": Spec(layout.MEMBER, layout.U32, constants.MEMBERS),
    "config": Spec(layout.U32, layout.CONFIG, 1),
    "incoming": Spec(layout.TUPLE, layout.PROXIED, constants.CONNECTING),
    "outgoing": Spec(layout.TUPLE, layout.OUTGOING, constants.OUTGOING_MAX),
    "accepted": Spec(layout.U64, layout.U64, constants.CONNECTING),
    "proxied": Spec(layout.U32, layout.PROXIED, 0),
    "fast": Spec(layout.TARGET, layout.U32, constants.BACKENDS),
    "plain": Spec(layout.TARGET, layout.U64, constants.PLAIN),
    "workload_sockets": Spec(layout.U64, layout.U64, constants.SOCKETS_MAX),
    "proxy_sockets": Spec(layout.U64, layout.U64, constants.SOCKETS_MAX),
    "workload": Spec(layout.U32, layout.WORKLOAD, 0),
    "pairs": Spec(layout.U64, layout.PAIR, constants.PAIRS_MAX),
    "paired": Spec(layout.U64, layout.PAIRED, constants.PAIRED_MAX),
    "exchanges": Spec(layout.U64, layout.EXCHANGE, constants.EXCHANGES_MAX),
    "passed": Spec(layout.PASSED_KEY, layout.PASSED, constants.PASSED_MAX),
    "passings": Spec(None, None, constants.PASSING_PAGES * 4096),
    "responses": Spec(layout.U32, layout.RESPONSES, 1),
    "interfaces": Spec(layout.ADDRESS, layout.U32, constants.PODS),
    "namespaces": Spec(layout.U64, layout.ADDRESSES, constants.PODS),
    "identities": Spec(layout.PREFIX, layout.IDENTITY, constants.IDENTITIES),
    "pods": Spec(layout.ADDRESS, layout.POD, constants.PODS),
    "mtls_ports": Spec(layout.TARGET, layout.U32, constants.MTLS_PORTS),
    "policies": Spec(layout.POLICY_KEY, layout.POLICY, constants.POLICIES),
    "generation": Spec(layout.U32, layout.U64, 3),
    "flows": Spec(layout.FLOW_KEY, layout.FLOW, constants.FLOWS),
    "fragments": Spec(layout.FRAGMENT, layout.U64, constants.FRAGMENTS),
    "told": Spec(layout.U32, layout.TOLD, 3),
    "events": Spec(None, None, constants.EVENT_PAGES * 4096),
    "automata": Spec(layout.U64, layout.AUTOMATON_PLACE, constants.AUTOMATA),
    "automaton_arenas": Spec(layout.U32, layout.U32, constants.AUTOMATON_ARENAS),
    "counters": Spec(layout.U32, layout.U64, len(Reason)),
}
# What is in maps of maps, as programs expect it.
INNER = {"automaton_arenas": syscall.MapInfo(2, 4, constants.AUTOMATON_ARENA, 1, _MMAPABLE)}


def open_pinned(directory: Path, name: str, of: str | None = None) -> int:
    """A descriptor of a pinned map, of a version (None: this one). DatapathError: none, no rights,
    or its keys or values have another size than here."""
    path = pins.map_path(directory, name, of)
    try:
        fd = syscall.pinned(str(path))
    except OSError as error:
        raise DatapathError(
            f"no map at {path}: {error.strerror}: run python -m bpf.loader --pin {directory} "
            "--cgroup PATH first, as root"
        ) from error
    spec, info = MAPS[name], syscall.map_info(fd)
    sizes = tuple(part.size if part is not None else 0 for part in (spec.key, spec.value))
    entries = spec.entries if of is None else info.max_entries
    if (info.key_size, info.value_size, info.max_entries) != (*sizes, entries):
        os.close(fd)
        raise DatapathError(
            f"the map at {path} is of another version of Weft: load the programs anew after "
            f"python -m bpf.loader --remove --pin {directory}"
        )
    return fd


class PinnedMap(Generic[K, V]):
    """A hash or array map."""

    def __init__(
        self, directory: Path, name: str, key: type[K], value: type[V], of: str | None = None
    ) -> None:
        """See `open_pinned`."""
        spec = MAPS[name]
        assert spec.key is not None
        assert spec.value is not None
        self._fd = open_pinned(directory, name, of)
        self._keys, self._values = spec.key, spec.value
        self._key: type[K] = key
        self._value: type[V] = value

    def close(self) -> None:
        os.close(self._fd)

    def get(self, key: K) -> V | None:
        data = syscall.lookup(self._fd, self._keys.pack(key), self._values.size)
        return None if data is None else self._values.unpack(self._value, data)

    def put(self, key: K, value: V) -> None:
        syscall.update(self._fd, self._keys.pack(key), self._values.pack(value))

    def put_all(self, items: Iterable[tuple[K, V]]) -> None:
        """Many at once; not atomic: others may see some of them before the rest."""
        packed = [(self._keys.pack(key), self._values.pack(value)) for key, value in items]
        if packed:
            keys, values = (b"".join(parts) for parts in zip(*packed, strict=True))
            syscall.update_batch(self._fd, keys, values, len(packed))

    def remove(self, key: K) -> bool:
        """False: it was not there."""
        return syscall.delete(self._fd, self._keys.pack(key))

    def items(self) -> Iterator[tuple[K, V]]:
        """All entries. An entry that others remove meanwhile may make some appear twice."""
        size = self._keys.size
        key = syscall.next_key(self._fd, None, size)
        while key is not None:
            data = syscall.lookup(self._fd, key, self._values.size)
            if data is not None:
                value = self._values.unpack(self._value, data)
                yield self._keys.unpack(self._key, key), value
            key = syscall.next_key(self._fd, key, size)


class Slots:
    """The array of Maglev tables, mapped into memory: writing costs no system call."""

    def __init__(self, directory: Path) -> None:
        fd = open_pinned(directory, "slots")
        try:
            self._memory = mmap.mmap(fd, constants.SLOTS * layout.U64.size)
        finally:
            os.close(fd)
        self._words = memoryview(self._memory).cast("Q")

    def close(self) -> None:
        self._words.release()
        self._memory.close()

    def read(self, offset: int, size: int) -> list[int]:
        return self._words[offset : offset + size].tolist()

    def write(self, offset: int, words: array[int]) -> None:
        """`words` has type code "Q"."""
        self._words[offset : offset + len(words)] = memoryview(words)


def counters(directory: Path) -> dict[Reason, int]:
    """How often each reason was given, over all CPUs, since the maps were made. DatapathError."""
    fd = open_pinned(directory, "counters")
    try:
        return {reason: _sum(fd, reason) for reason in Reason}
    finally:
        os.close(fd)


def _sum(fd: int, reason: Reason) -> int:
    size = layout.U64.size * possible_cpus()
    data = syscall.lookup(fd, layout.U32.pack(Number(reason)), size)
    return 0 if data is None else sum(memoryview(data).cast("Q"))


def possible_cpus() -> int:
    """The kernel's own number, which the size of per-CPU values follows, not that of CPUs at work:
    "0-3", or "0,2-3"."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().rsplit(",")[-1]
    return int(last.rsplit("-")[-1]) + 1
