"""Ending processes of a node's Weft without warning, and whom that may concern."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from mesh.lab.plan import NodePlan


class Kill(NamedTuple):
    """`process` as it names itself; times in nanoseconds of CLOCK_MONOTONIC: it ended between
    them."""

    node: str
    process: str
    before: int
    after: int

    def explains(self, nodes: Set[str], since: int, at: int) -> bool:
        """Whether a client's connection through these nodes, opened and broken at these times, was
        a worker's that was killed. Everything else survives a kill."""
        ended = self.process == "weft-worker" and self.node in nodes
        return ended and since <= self.after and at >= self.before


def kill(node: NodePlan, process: str) -> Kill | None:
    """Ends one with SIGKILL, and waits until it is gone; None: there is none just now."""
    netns = os.stat(node.netns).st_ino
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            name = (directory / "comm").read_text().strip()
            if name != process or os.stat(directory / "ns/net").st_ino != netns:
                continue
            pidfd = os.pidfd_open(int(directory.name))
            try:
                before = time.monotonic_ns()
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                select.select([pidfd], [], [])
                return Kill(node.name, process, before, time.monotonic_ns())
            finally:
                os.close(pidfd)
    return None
