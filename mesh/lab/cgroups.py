"""Cgroups of version 2: where they are, making one, and ending one with all processes in it.

Knows nothing of labs.
"""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

from mesh.lab.errors import LabError

_MOUNTS = Path("/proc/self/mountinfo")


def cgroup_root() -> Path:
    """Where cgroup v2 is mounted. LabError: nowhere."""
    for line in _MOUNTS.read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            return Path(before.split()[4])
    raise LabError(
        "cgroup v2 is not mounted, and a pod of the lab is a cgroup: mount it with "
        "'mount -t cgroup2 none /sys/fs/cgroup'"
    )


def join_cgroup(path: Path | str) -> None:
    """Move this process there; what it starts from now on is there too."""
    Path(path, "cgroup.procs").write_text("0")


def members(path: Path | str) -> set[int]:
    """Pids of the processes in a cgroup, without those in its children; empty where there is
    none."""
    try:
        return set(map(int, Path(path, "cgroup.procs").read_text().split()))
    except FileNotFoundError:
        return set()


def remove_tree(path: Path, timeout_s: float = 10.0) -> None:
    """Kill all processes in a cgroup and below it, then remove them all, if they are there.

    LabError: a process does not end (it hangs in the kernel).
    """
    deadline = time.monotonic() + timeout_s
    while path.exists():
        try:
            (path / "cgroup.kill").write_text("1")
            _wait_empty(path, deadline)
            for directory, _, _ in os.walk(path, topdown=False):
                os.rmdir(directory)
        except FileNotFoundError:
            continue
        except OSError as error:
            # EBUSY: a process that was on its way into the cgroup arrived after the kill.
            if time.monotonic() > deadline:
                raise LabError(f"cgroup {path} cannot be removed: {error.strerror}") from None


def _wait_empty(path: Path, deadline: float) -> None:
    with open(path / "cgroup.events") as events:
        poll = select.poll()
        poll.register(events, select.POLLPRI)
        while "populated 1" in events.read():
            left = deadline - time.monotonic()
            if left <= 0:
                raise LabError(
                    f"processes in cgroup {path} do not end: see its cgroup.procs, and try again"
                )
            poll.poll(left * 1000)
            events.seek(0)
