"""What a process and all its descendants have used, from /proc; processors that do not halt."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
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


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """No processor halts meanwhile: to be woken takes a virtual one tens of microseconds, whatever
    it is woken by. Each has a process that runs while nobody else would (SCHED_IDLE)."""

    def spin(processor: int) -> subprocess.Popen[bytes]:
        def settle() -> None:
            os.sched_setaffinity(0, {processor})
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

        command = (sys.executable, "-c", "while True: pass")
        return subprocess.Popen(command, preexec_fn=settle)

    with contextlib.ExitStack() as stack:
        for processor in os.sched_getaffinity(0):
            process = spin(processor)
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield
