"""Which manifest files a directory tree has, and their bytes once nobody is writing them.

Knows the file system, no YAML and no objects.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
from pathlib import Path
from typing import NamedTuple

from mesh.sources.manifest import MAX_FILE

_SUFFIXES = (".yaml", ".yml", ".json")


class FileError(Exception):
    """A file or directory that cannot be read; the message says why and what to do."""


class BeingWritten(Exception):
    """Somebody has the file open for writing: what it holds now may be half of it."""


class Tree(NamedTuple):
    """What a walk found. `files`: path relative to the root, with its real path (symbolic links
    resolved). `unreadable`: relative directory ("." is the root) and why."""

    files: dict[str, str]
    unreadable: dict[str, str]


def is_manifest(name: str) -> bool:
    """By name: YAML or JSON, and neither hidden nor an editor's temporary file."""
    return name.endswith(_SUFFIXES) and not name.startswith((".", "#", "~"))


def walk(root: Path) -> Tree:
    """All manifest files below `root`. Symbolic links are followed, hidden directories are not
    entered (Kubernetes' volumes keep their versions in them and link to them)."""
    tree = Tree({}, {})
    _walk(str(root), "", tree, frozenset())
    return tree


def _walk(directory: str, relative: str, tree: Tree, above: frozenset[tuple[int, int]]) -> None:
    try:
        info = os.stat(directory)
        identity = (info.st_dev, info.st_ino)
        if identity in above:  # a link to a directory above itself
            return
        with os.scandir(directory) as entries:
            names = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        tree.unreadable[relative or "."] = explain_os_error(error)
        return
    for entry in names:
        if entry.name.startswith("."):
            continue
        path = f"{relative}/{entry.name}" if relative else entry.name
        try:
            if entry.is_dir():
                _walk(entry.path, path, tree, above | {identity})
            elif is_manifest(entry.name):
                tree.files[path] = os.path.realpath(entry.path)
        except OSError as error:  # a link that leads in a circle
            tree.unreadable[path] = explain_os_error(error)


def read(path: str, *, settled: bool) -> bytes:
    """The bytes of a manifest file. FileError: why not; FileNotFoundError: it is gone.

    With `settled`, BeingWritten while a writer has it open. A read lease tells (fcntl(2),
    F_SETLEASE): the kernel grants none while the file is open for writing, and while it is held
    (for the time of reading) a new writer waits in open(2).
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(explain_os_error(error)) from None
    with os.fdopen(fd, "rb") as file:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise FileError("not a regular file")
        if info.st_size > MAX_FILE:
            raise FileError(f"larger than {MAX_FILE >> 20} MiB: split it into several files")
        leased = settled and _lease(fd)
        try:
            return file.read(MAX_FILE + 1)
        except OSError as error:
            raise FileError(explain_os_error(error)) from None
        finally:
            if leased:
                fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _lease(fd: int) -> bool:
    try:
        # A writer who comes breaks the lease, which is told by a signal: one that is ignored by
        # default, not SIGIO, which ends the process.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        raise BeingWritten from None
    except OSError:  # not the owner and no CAP_LEASE, or a file system without leases
        return False
    return True


def explain_os_error(error: OSError) -> str:
    """What went wrong with a file, and what to do, in a line."""
    why = (error.strerror or str(error)).lower()
    if isinstance(error, PermissionError):
        return f"{why}: let user {os.geteuid()} read it (chmod, chown)"
    return why
