"""What has passed by the proxy: counted by series, and single requests while somebody takes them;
and what is left of pairs whose sockets are gone.

Knows `struct passed` and `struct passing` (bpf/layout.py), not what the number of a series means.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Container, Iterator
from pathlib import Path
from typing import ClassVar

from bpf import constants, layout, syscall
from bpf.maps import open_pinned, possible_cpus
from bpf.ringbuf import RingBuffer
from bpf.structs import Number, Paired, Passed, PassedKey, Passing


class PassedMaps:
    """OSError of any method: as bpf(2) has it."""

    def __init__(self, directory: Path) -> None:
        """DatapathError: the maps are not there."""
        with contextlib.ExitStack() as opened:
            self._counted = open_pinned(directory, "passed")
            opened.callback(os.close, self._counted)
            ring = open_pinned(directory, "passings")
            self._ring = RingBuffer(ring, constants.PASSING_PAGES * 4096)
            opened.pop_all()

    def close(self) -> None:
        os.close(self._counted)
        self._ring.close()

    def counted(self) -> Iterator[tuple[PassedKey, Passed]]:
        """All that is counted, of all CPUs together."""
        size = layout.PASSED.size * possible_cpus()
        for key, values in syscall.entries(self._counted, layout.PASSED_KEY.size, size):
            yield layout.PASSED_KEY.unpack(PassedKey, key), _sum(values)

    def forget(self, key: PassedKey) -> None:
        """Of a series that nobody has any more."""
        syscall.delete(self._counted, layout.PASSED_KEY.pack(key))

    def take(self, limit: int) -> list[Passing]:
        """Requests, the oldest first; from now on the kernel may tell of so many others."""
        return [layout.PASSING.unpack(Passing, record) for record in self._ring.read(limit)]


class Leftovers:
    """What the maps of pairs have of sockets that are gone. OSError of any method: as bpf(2) has
    it."""

    # By cookies of workloads' sockets, and the size of a value.
    _MAPS: ClassVar = {
        "pairs": layout.PAIR.size,
        "paired": layout.PAIRED.size,
        "exchanges": layout.EXCHANGE.size,
    }

    def __init__(self, directory: Path) -> None:
        """DatapathError: the maps are not there."""
        with contextlib.ExitStack() as opened:
            self._sockets = self._open(opened, directory, "workload_sockets")
            self._fds = {name: self._open(opened, directory, name) for name in self._MAPS}
            self._opened = opened.pop_all()
        self._gone: set[tuple[str, bytes]] = set()  # when they were looked for last

    @staticmethod
    def _open(opened: contextlib.ExitStack, directory: Path, name: str) -> int:
        fd = open_pinned(directory, name)
        opened.callback(os.close, fd)
        return fd

    def close(self) -> None:
        self._opened.close()

    def sweep(self) -> int:
        """Delete what was left the last time, too: by now the proxy has read it, and no program
        counts in it any more. How many."""
        gone = set[tuple[str, bytes]]()
        # Whose request may still be answered, though they are gone: the proxy reads of it then.
        asked = set[bytes]()
        for name, fd in self._fds.items():
            for key, value in syscall.entries(fd, layout.U64.size, self._MAPS[name]):
                if syscall.lookup(self._sockets, key, layout.U64.size) is None:
                    gone.add((name, key))
                elif name == "paired":
                    client = layout.PAIRED.unpack(Paired, value).client
                    asked.add(layout.U64.pack(Number(client)))
        gone -= {("exchanges", client) for client in asked}
        old = gone & self._gone
        self._gone = gone - old
        return sum(syscall.delete(self._fds[name], key) for name, key in old)


def keys(counted: int, series: Container[int]) -> list[PassedKey]:
    """Those of these series, in the map of this descriptor."""
    size = layout.PASSED.size * possible_cpus()
    found = syscall.entries(counted, layout.PASSED_KEY.size, size)
    all_of_them = (layout.PASSED_KEY.unpack(PassedKey, key) for key, _ in found)
    return [key for key in all_of_them if key.series in series]


def take(counted: int, key: PassedKey) -> Passed | None:
    """What is counted there, and it is not any more."""
    packed, size = layout.PASSED_KEY.pack(key), layout.PASSED.size * possible_cpus()
    values = syscall.take(counted, packed, size)
    return None if values is None else _sum(values)


def _sum(values: bytes) -> Passed:
    """The struct is u64 throughout."""
    words = memoryview(values).cast("Q")
    each = layout.PASSED.size // 8
    sums = [sum(words[at::each]) for at in range(each)]
    return layout.PASSED.unpack(Passed, struct.pack(f"={each}Q", *sums))
