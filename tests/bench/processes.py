"""What a process and all its descendants have used, from /proc."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


class Usage(NamedTuple):
    """CPU seconds since the processes began, to a clock tick (10 ms); resident memory, shared
    pages counted in each of them."""

    cpu_s: float
    rss_mib: float


def usage(roots: Iterable[int]) -> Usage:
    """Of the processes with these ids and their descendants that are alive."""
    parents, found = {}, {}
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            # After the command's name, which may hold anything, ")" included: state, parent, …
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended just now
            continue
        pid = int(directory.name)
        parents[pid] = int(fields[1])
        # utime, stime and rss: fields 14, 15 and 24 of proc(5), where the state is 3.
        cpu_s = (int(fields[11]) + int(fields[12])) * _TICK_S
        found[pid] = Usage(cpu_s, int(fields[21]) * _PAGE_MIB)
    wanted = set(roots)
    mine = [used for pid, used in found.items() if wanted & _line(pid, parents)]
    return Usage(sum(used.cpu_s for used in mine), sum(used.rss_mib for used in mine))


def _line(pid: int, parents: dict[int, int]) -> set[int]:
    """A process and its ancestors."""
    line = set()
    while pid in parents:
        line.add(pid)
        pid = parents[pid]
    return line
