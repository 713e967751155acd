"""Attaching the pinned programs, and putting new ones in the place of old ones.

Each attachment is a pinned link: it lives without us, and takes another program at once, so nothing
ever passes a hook without one. Knows programs and pins, not what the maps hold.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bpf import pins, syscall
from bpf.errors import DatapathError
from bpf.programs import PROGRAMS, Place


def is_member(cgroup: Path, pid: int) -> bool:
    """Whether a process is in a cgroup, not in one below it."""
    try:
        return str(pid) in (cgroup / "cgroup.procs").read_text().split()
    except OSError:  # EOPNOTSUPP: a cgroup that cannot have any
        return False


def attach(
    directory: Path, cgroup: Path, proxy_cgroup: Path | None = None, *, pairs: bool = False
) -> None:
    """Attach the programs pinned in `directory`: to the workloads' cgroup and, if it is given, to
    the proxy's, without which nothing is enrolled. `pairs`: what workloads send may go past the
    proxy; sockets stay as they were enrolled. Those first that serve sockets, then those that
    decide for new ones: each of these finds the others of its version there, however far this gets.
    DatapathError: what could not be attached; what was attached before still is."""
    cgroups = {Place.WORKLOADS: cgroup}
    if proxy_cgroup is not None:
        cgroups[Place.PROXIES] = proxy_cgroup
        _attach_to_sockets(directory, "verdict", "proxy_sockets")
        if pairs:
            attach_pairs(directory)
        else:
            detach_pairs(directory)
    for path in cgroups.values():
        check_cgroup(path)
    for name, program in sorted(PROGRAMS.items(), key=lambda one: not one[1].stays):
        if program.place in cgroups:
            _attach(directory, name, cgroups[program.place])


def attach_pairs(directory: Path) -> None:
    """What workloads' sockets that are enrolled from now on send may go past the proxy."""
    _attach_to_sockets(directory, "exchange", "workload_sockets")


def detach_pairs(directory: Path) -> None:
    """What workloads send goes past no proxy any more, if it did."""
    _path(directory, "exchange").unlink(missing_ok=True)


def adopt(directory: Path, proxy_cgroup: Path) -> None:
    """What earlier Wefts left for the sockets of proxies, of any version, is for this cgroup where
    theirs has gone. Before its processes have sockets. DatapathError, OSError: it cannot be
    attached."""
    for version in (pins.version(), *pins.other_versions(directory)):
        path = pins.link_path(directory, "proxies", version)
        if path.exists():
            with opened(syscall.pinned(str(path))) as link:
                gone = not syscall.cgroup_of_link(link)
            if gone:
                _attach(directory, "proxies", proxy_cgroup, version)


def check_cgroup(cgroup: Path) -> None:
    """DatapathError: not a directory of cgroup v2, or the root of it."""
    if not (cgroup / "cgroup.controllers").exists():
        raise DatapathError(
            f"{cgroup} is not a cgroup v2 directory: make one below the cgroup2 mount "
            "(/proc/mounts names it) and give its path"
        )
    if not (cgroup / "cgroup.type").exists():
        raise DatapathError(
            f"{cgroup} is the root of cgroup v2: the hooks would catch every process of the "
            "machine; make a cgroup below it"
        )


@contextlib.contextmanager
def opened(fd: int) -> Iterator[int]:
    """Closed at the end of the block."""
    try:
        yield fd
    finally:
        os.close(fd)


def open_program(directory: Path, name: str, of: str | None = None) -> int:
    """A descriptor of a pinned program, of a version (None: this one). DatapathError: it is not
    there."""
    path = pins.program_path(directory, name, of)
    try:
        return syscall.pinned(str(path))
    except OSError as error:
        raise DatapathError(
            f"no program at {path}: {error.strerror}: run python -m bpf.loader --pin {directory} "
            "first, as root"
        ) from error


def _path(directory: Path, name: str, of: str | None = None) -> Path:
    return pins.link_path(directory, name, (of or pins.version()) if PROGRAMS[name].stays else None)


def _attach(directory: Path, name: str, cgroup: Path, of: str | None = None) -> None:
    path = _path(directory, name, of)
    with (
        opened(open_program(directory, name, of)) as program,
        opened(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)) as target,
    ):
        try:
            if path.exists():
                with opened(syscall.pinned(str(path))) as link:
                    if syscall.cgroup_of_link(link) == os.fstat(target).st_ino:
                        syscall.update_link(link, program)
                        return
                path.unlink()
            with opened(syscall.link(program, target, PROGRAMS[name].attach_type)) as link:
                syscall.pin(link, str(path))
        except OSError as error:
            raise DatapathError(
                f"cannot attach {name} to {cgroup}: {error.strerror}: it takes CAP_NET_ADMIN, and "
                "no program attached above it without the flag for several"
            ) from error


def _attach_to_sockets(directory: Path, name: str, map_name: str) -> None:
    path = _path(directory, name)
    with (
        opened(open_program(directory, name)) as program,
        opened(syscall.pinned(str(pins.map_path(directory, map_name)))) as sockets,
    ):
        try:
            if path.exists():
                with opened(syscall.pinned(str(path))) as link:
                    syscall.update_link(link, program)
                return
            with opened(syscall.link(program, sockets, PROGRAMS[name].attach_type)) as link:
                syscall.pin(link, str(path))
        except OSError as error:
            raise DatapathError(
                f"cannot attach {name} to the map {map_name}: {error.strerror}: it takes a "
                "kernel with links for sockmaps (6.10)"
            ) from error
