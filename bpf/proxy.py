"""What a proxy asks of the data path about its own sockets: who is at the far end, and how much
that end has not read yet.

Works with descriptors it is given (`HANDLES`), without rights of its own. A proxy's socket toward a
workload of this node is in one of two states, fixed when the connection is established: plain, or
enrolled, and then what the proxy sends reaches the workload by redirect and never by TCP.
Knows nothing of HTTP.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bpf import layout, syscall
from bpf.attach import open_program
from bpf.layout import Number, Proxied, Target
from bpf.maps import open_pinned

# Names of maps and of the program, as pinned; what `ProxyHandles` is made of.
HANDLES = ("proxied", "accepted", "plain", "queue")

# The frame that the program `queue` is run with: a cookie and padding; at least an Ethernet header.
_FRAME = struct.Struct("=Q56x")


def descriptors(directory: Path) -> dict[str, int]:
    """New descriptors of what is pinned, by HANDLES. DatapathError: it is not there."""
    maps = {name: open_pinned(directory, name) for name in HANDLES if name != "queue"}
    return {**maps, "queue": open_program(directory, "queue")}


class Origin(NamedTuple):
    """Of an accepted connection: the target the workload asked for, the backend that the kernel
    has chosen (a relay's, or a client's with session affinity; None where the proxy chooses), the
    workload's socket cookie and its network namespace's, and whether it is enrolled."""

    asked: Target
    backend: Target | None
    cookie: int
    netns: int
    enrolled: bool


class ProxyHandles:
    """The descriptors are the instance's from now on."""

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        """KeyError: one of HANDLES is missing."""
        self._proxied, self._accepted, self._plain, self._queue = (
            descriptors[name] for name in HANDLES
        )

    def origin(self, fd: int) -> Origin | None:
        """What is known of a connection that the proxy accepted; None: no workload steered here
        opened it."""
        found = self._look(fd)
        if found is None or not found.cookie:
            return None
        asked, backend = (
            layout.TARGET.unpack(Target, data) for data in (found.asked, found.backend)
        )
        return Origin(
            asked,
            backend if backend.port else None,
            found.cookie,
            found.netns,
            found.state == layout.STATE_ENROLLED,
        )

    def pair(self, fd: int) -> int | None:
        """Of a connection that the proxy opened: the far socket's cookie once it may send there by
        redirect; 0: it sends by TCP; None: ask again, and send nothing until then."""
        found = self._look(fd)
        if found is None or found.state != layout.STATE_ENROLLED:
            return 0
        if found.peer:
            return found.peer
        key = layout.U64.pack(Number(found.cookie))
        data = syscall.lookup(self._accepted, key, layout.U64.size)
        if data is None:
            return None
        peer = layout.U64.unpack(Number, data).value
        value = layout.PROXIED.pack(found._replace(peer=peer))
        syscall.update(self._proxied, layout.U32.pack(Number(fd)), value)
        return peer

    def queued(self, cookie: int) -> int:
        """Bytes of memory that a workload's socket holds unread; 0 once it is gone."""
        return max(0, syscall.run(self._queue, _FRAME.pack(cookie)))

    def mark_plain(self, backend: Target) -> None:
        """Connections to this backend are not enrolled for PLAIN_S seconds: it did not show its
        socket in time (TCP_DEFER_ACCEPT)."""
        now = layout.U64.pack(Number(time.monotonic_ns()))
        syscall.update(self._plain, layout.TARGET.pack(backend), now)

    def _look(self, fd: int) -> Proxied | None:
        data = syscall.lookup(self._proxied, layout.U32.pack(Number(fd)), layout.PROXIED.size)
        return None if data is None else layout.PROXIED.unpack(Proxied, data)
