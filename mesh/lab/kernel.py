"""Namespaces and mounts: the system calls that Python 3.11 does not have, and ip-netns(8).

Namespaces are the calling thread's; a process that uses these functions has one thread. Knows
nothing of labs.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

from mesh.cni.netns import CLONE_NEWNET as CLONE_NEWNET
from mesh.cni.netns import OWN, enter
from mesh.cni.netns import inside as inside
from mesh.cni.netns import join as join

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000

_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SLAVE = 1 << 19
_MS_SHARED = 1 << 20
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def unshare(flags: int) -> None:
    """New namespaces for this process. OSError: no rights."""
    _check(_libc.unshare(flags), "unshare")


def _mount(source: str, target: str, flags: int) -> None:
    _check(_libc.mount(source.encode(), target.encode(), b"none", flags, None), target)


def bind(source: Path | str, target: Path | str) -> None:
    """Show the file `source` at the existing file `target`."""
    _mount(str(source), str(target), _MS_BIND)


def private_mounts() -> None:
    """A mount namespace of its own: sees the host's mounts come and go, shows it nothing."""
    unshare(CLONE_NEWNS)
    _mount("none", "/", _MS_REC | _MS_SLAVE)


def create_netns(path: Path) -> None:
    """A network namespace that lives as long as its name. FileExistsError: the name is taken."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _share(path.parent)
    path.touch(0o444, exist_ok=False)
    home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNET)
        try:
            bind(OWN, path)
        finally:
            enter(home, CLONE_NEWNET, "the own network namespace")
    finally:
        os.close(home)


def _share(directory: Path) -> None:
    """Make the directory a shared mount, so that names removed here go in all mount namespaces
    (otherwise each copy would keep the network namespace alive); locked as ip-netns does."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            _mount("none", str(directory), _MS_SHARED | _MS_REC)
        except OSError:  # not a mount yet
            _mount(str(directory), str(directory), _MS_BIND | _MS_REC)
            _mount("none", str(directory), _MS_SHARED | _MS_REC)
    finally:
        os.close(fd)


def remove_netns(path: Path) -> None:
    """Take the name away, if it is there; the namespace ends with its last process and socket."""
    _libc.umount2(str(path).encode(), _MNT_DETACH)  # fails where a killed creation never mounted
    path.unlink(missing_ok=True)


def write_sysctls(values: Mapping[str, int]) -> None:
    """Set sysctls ("net.ipv4.ip_forward") of the network namespace that this process is in."""
    for name, value in values.items():
        Path("/proc/sys", name.replace(".", "/")).write_text(str(value))
