"""Ending processes of a node's Weft without warning, and whom that may concern."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

from mesh.lab.kernel import inside
from mesh.lab.plan import NodePlan
from mesh.model.nodeconfig import MESH_TUNNEL_PORT

# Python starts slowly where much else runs.
_LIMIT_S = 30.0


class Kill(NamedTuple):
    """`process` as it names itself; times in nanoseconds of CLOCK_MONOTONIC: it ended between
    `before` and `after`, and if it was a worker, the next one served at `served`."""

    node: str
    process: str
    before: int
    after: int
    served: int = 0

    def explains(self, node: str, far: Set[str], since: int, at: int) -> bool:
        """Whether the connection of a client on `node` to pods on `far`, opened and broken at these
        times, was a worker's that was killed, or waited in vain for the next one of the far node:
        it is not waited for without end, as a client waits. Everything else survives a kill."""
        if self.process != "weft-worker" or at < self.before:
            return False
        return (self.node == node and since <= self.after) or (
            self.node in far and since <= max(self.after, self.served)
        )


def until_served(node: NodePlan) -> int:
    """Wait until a worker of the node answers; when that was. Who connects waits as long."""
    with inside(node.netns):
        asking = socket.socket()
    with asking:
        asking.settimeout(_LIMIT_S)
        asking.connect((node.addresses[0], MESH_TUNNEL_PORT))
        with contextlib.suppress(ConnectionError):
            asking.sendall(b"no TLS")
            asking.recv(100)
    return time.monotonic_ns()


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
