"""The compiled programs, and what their maps are: kept from one load to the next.

Compiling takes bcc, clang in it, 120 MB and more than a second; what comes of it follows from the
source, the headers and bcc alone. It is kept in a directory that nobody else can write to; where
there is none, everything is compiled each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

import msgspec

from bpf import syscall
from bpf.btf import kernel_types
from bpf.compiler import HEADERS, Module, Program, source
from bpf.maps import MAPS
from bpf.programs import PROGRAMS, SOURCE
from bpf.syscall import MapInfo

CACHE = Path("/var/cache/weft")
# An upgrade may be taken back.
_KEPT = 4


class Objects(msgspec.Struct, frozen=True):
    maps: dict[str, MapInfo]
    programs: dict[str, Program]


def objects() -> Objects:
    """Those of this version of Weft. DatapathError: they do not compile."""
    directory = Path(os.environ.get("WEFT_CACHE", CACHE))
    path = directory / f"{_digest()}.msgpack"
    if (kept := _read(path)) is not None:
        return kept
    module = Module(SOURCE)
    templates = {name: module.map_fd(name) for name in MAPS}
    names = {fd: name for name, fd in templates.items()}
    found = Objects(
        {name: syscall.map_info(fd) for name, fd in templates.items()},
        {name: module.program(name, names) for name in PROGRAMS},
    )
    # Without it the next load compiles again.
    with contextlib.suppress(OSError):
        _write(path, msgspec.msgpack.encode(found))
    return found


def _digest() -> str:
    """Of all that the outcome follows from."""
    parts = [source(SOURCE).encode(), kernel_types()]
    bcc = importlib.util.find_spec("bcc")
    places = bcc.submodule_search_locations if bcc is not None else None
    for directory in (*HEADERS, *map(Path, places or ())):
        for file in sorted(directory.rglob("*.[hp]*")):
            stat = file.stat()
            parts.append(f"{file} {stat.st_size} {stat.st_mtime_ns}".encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _read(path: Path) -> Objects | None:
    try:
        with open(path, "rb") as file:
            # What is loaded into the kernel must not be another user's.
            for stat in (os.stat(path.parent), os.fstat(file.fileno())):
                if stat.st_uid not in (0, os.geteuid()) or stat.st_mode & 0o022:
                    return None
            return msgspec.msgpack.decode(file.read(), type=Objects)
    except (OSError, msgspec.MsgspecError):
        return None


def _write(path: Path, data: bytes) -> None:
    """At once and whole; of what other versions left, all but the newest goes."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    by_age = sorted(path.parent.glob("*.msgpack"), key=lambda one: one.stat().st_mtime_ns)
    for stale in by_age[: 1 - _KEPT]:
        stale.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    os.replace(file.name, path)
