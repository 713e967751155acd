"""Being in another network namespace for a while: setns(2), which Python has from 3.12 on.

It takes CAP_SYS_ADMIN. Knows no pods.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

CLONE_NEWNET = 0x40000000
OWN = "/proc/thread-self/ns/net"

_libc = ctypes.CDLL(None, use_errno=True)


def join(namespace: Path | str, kind: int) -> None:
    """Enter a namespace by the path of its file, with this thread. OSError."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(fd, kind, str(namespace))
    finally:
        os.close(fd)


def enter(fd: int, kind: int, what: str) -> None:
    """The same by a descriptor; `what` it is, for errors."""
    if _libc.setns(fd, kind):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


@contextlib.contextmanager
def inside(netns: Path | str) -> Iterator[None]:
    """In another network namespace until the block ends; sockets opened there stay there."""
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        join(netns, CLONE_NEWNET)
        try:
            yield
        finally:
            enter(home, CLONE_NEWNET, "the own network namespace")
    finally:
        os.close(home)
