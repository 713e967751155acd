"""The pin directory: a directory in bpffs whose files keep maps and attached programs alive.

    <pin directory>/maps/<version>/<map>            see bpf/maps.py
    <pin directory>/programs/<version>/<program>    the newest on these maps; see bpf/programs.py
    <pin directory>/links/<hook>                    a program attached; without the file it is not
    <pin directory>/links/<version>/<hook>          one that stays with its version

The version follows from the layout of the maps.

Whoever holds a pin directory needs no process of ours to be alive. Knows no maps by name, no bcc.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
from pathlib import Path

from bpf import layout, syscall
from bpf.errors import DatapathError

_BPF_FS_MAGIC = 0xCAFE4A11
_MNT_DETACH = 2
# What our mounts call their device, by which they are known again.
_SOURCE = b"weft"

_libc = ctypes.CDLL(None, use_errno=True)


def map_path(directory: Path, name: str, of: str | None = None) -> Path:
    """`of`: a version of Weft, None: this one."""
    return directory / "maps" / (of or version()) / name


def program_path(directory: Path, name: str, of: str | None = None) -> Path:
    """See `map_path`."""
    return directory / "programs" / (of or version()) / name


def other_versions(directory: Path) -> list[str]:
    """Versions of Weft that left maps: sockets may still be in them, programs still be attached.
    The newest first."""
    try:
        found = [path for path in (directory / "maps").iterdir() if path.name != version()]
        found.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    except FileNotFoundError:
        return []
    return [path.name for path in found]


def is_attached(directory: Path, of: str) -> bool:
    """Whether programs of a version that stay with it are."""
    links = directory / "links" / of
    return links.is_dir() and any(links.iterdir())


def remove_version(directory: Path, of: str) -> None:
    """Lets go of what a version pinned. OSError."""
    for part in ("links", "programs", "maps"):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory / part / of)


def replace(fd: int, path: Path) -> None:
    """Pins in the place of what may be pinned there, at once. OSError."""
    draft = path.with_name(f"{path.name}~")
    draft.unlink(missing_ok=True)
    syscall.pin(fd, draft)
    draft.rename(path)


@functools.cache
def version() -> str:
    """The layout of all maps and structs in a few letters: where it differs, nothing is shared."""
    return hashlib.sha256(layout.description().encode()).hexdigest()[:12]


def link_path(directory: Path, hook: str, of: str | None = None) -> Path:
    """`of`: the version with which it stays."""
    return directory / "links" / (of or "") / hook


def prepare(directory: Path) -> None:
    """Makes the pin directory, mounting bpffs at it unless it lies in one. DatapathError."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not is_bpffs(directory):
            if any(directory.iterdir()):
                raise DatapathError(
                    f"{directory} has files in it and is no bpffs, so bpffs is not mounted there: "
                    "give an empty directory, or one below /sys/fs/bpf"
                )
            _mount(directory)
        for part in (f"maps/{version()}", f"programs/{version()}", f"links/{version()}"):
            (directory / part).mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise DatapathError(
            f"cannot prepare the pin directory {directory}: {error.strerror}: it takes root "
            "(CAP_SYS_ADMIN to mount bpffs) and a kernel with CONFIG_BPF_SYSCALL"
        ) from error


def lock(directory: Path) -> int:
    """Prepare the pin directory and keep others from filling its maps, for as long as the returned
    descriptor is open. DatapathError: somebody else does."""
    prepare(directory)
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise DatapathError(
            f"another gateway steers by the pins in {directory}: stop it, or give this one --pins "
            "of its own"
        ) from None
    return fd


def remove(directory: Path) -> None:
    """Detaches the programs, lets the maps go, and undoes the mount if `prepare` made one. Nothing
    there: nothing to do. Only files in bpffs are ever deleted. DatapathError."""
    try:
        for part in ("links", "programs", "maps"):
            inside = directory / part
            if inside.is_dir() and is_bpffs(inside):
                shutil.rmtree(inside)
        if _mounted_by_us(directory):
            _checked(_libc.umount2(os.fsencode(directory), _MNT_DETACH), directory)
        if directory.is_dir() and not os.path.ismount(directory):
            directory.rmdir()
    except OSError as error:
        raise DatapathError(
            f"cannot remove the pin directory {directory}: {error.strerror}: it takes root, and "
            "other files in it have to go first"
        ) from error


def below(directory: Path) -> list[Path]:
    """Pin directories at or below a directory that `prepare` mounted: a running Weft's, and those
    of self-tests that were killed."""
    return [mount for mount in _our_mounts() if mount.is_relative_to(directory.resolve())]


def is_bpffs(directory: Path) -> bool:
    """Whether the directory lies in a bpffs."""
    # struct statfs begins with f_type, a long on every 64-bit architecture Linux has.
    result = (ctypes.c_long * 32)()
    _checked(_libc.statfs(os.fsencode(directory), ctypes.byref(result)), directory)
    return bool(result[0] == _BPF_FS_MAGIC)


def _mount(directory: Path) -> None:
    _checked(_libc.mount(_SOURCE, os.fsencode(directory), b"bpf", 0, b"mode=0700"), directory)


def _mounted_by_us(directory: Path) -> bool:
    return directory.resolve() in _our_mounts()


def _our_mounts() -> list[Path]:
    found = []
    for line in Path("/proc/self/mounts").read_bytes().splitlines():
        source, escaped, kind, *_ = line.split(b" ")
        if (source, kind) == (_SOURCE, b"bpf"):
            # Blanks and backslashes are octal there; the rest is bytes as they are.
            where = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), escaped)
            found.append(Path(os.fsdecode(where)))
    return found


def _checked(result: int, path: Path) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
