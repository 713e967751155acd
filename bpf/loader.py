"""The loader, `python -m bpf.loader --pin DIR [--cgroup PATH [--proxy-cgroup PATH]]`: compiles,
loads, pins, and attaches where it is told to.

Run again on the same directory it adopts the maps with all that is in them, if they are of the same
layout, and replaces the programs one by one, each at once: no connection passes a hook without a
program. Maps of another layout stay for the sockets in them (bpf/pins.py). `--remove` takes
everything away. Messages go to stderr; the exit status is 1 if something failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bpf import attach, layout, pins, syscall
from bpf.errors import DatapathError
from bpf.maps import INNER
from bpf.programs import LICENCE, OLDEST_KERNEL, PROGRAMS
from bpf.response import tables
from bpf.structs import Number

_LOG_LINES = 20


def load(directory: Path) -> None:
    """Pin maps and programs in `directory`. DatapathError: says what was in the way; what worked
    before still does."""
    from bpf.objects import objects  # brings clang if need be: only where it is used

    made = objects()
    adopted = {name: _adopt(directory, name, info) for name, info in made.maps.items()}
    maps = {name: adopted[name] or create(name, info) for name, info in made.maps.items()}
    # All programs are accepted before anything is pinned.
    programs = {
        name: _program(name, program.instructions(maps), program.described())
        for name, program in made.programs.items()
    }
    syscall.update(maps["responses"], layout.U32.pack(Number(0)), tables())
    pins.prepare(directory)
    for name, fd in maps.items():
        if adopted[name] is None:
            _pin(syscall.pin, fd, pins.map_path(directory, name))
    for name, fd in programs.items():
        _pin(pins.replace, fd, pins.program_path(directory, name))


def create(name: str, info: syscall.MapInfo) -> int:
    """A map of the programs', as it was declared. DatapathError."""
    try:
        inner = syscall.create_map(name, INNER[name]) if name in INNER else None
        try:
            return syscall.create_map(name, info, inner)
        finally:
            if inner is not None:
                os.close(inner)
    except OSError as error:
        raise DatapathError(
            f"cannot make the map {name}: {error.strerror}: it takes root (CAP_BPF), and memory"
        ) from error


def _adopt(directory: Path, name: str, info: syscall.MapInfo) -> int | None:
    path = pins.map_path(directory, name)
    try:
        adopted = syscall.pinned(str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DatapathError(
            f"cannot adopt the map pinned at {path}: {error.strerror}: it takes root (CAP_BPF), "
            "and a directory that is in no bpffs must be empty"
        ) from error
    if syscall.map_info(adopted) != info:
        raise DatapathError(
            f"the map pinned at {path} is not what its version says: end what uses it, then remove "
            f"it: python -m bpf.loader --remove --pin {directory}"
        )
    return adopted


def _pin(how: Callable[[int, Path], None], fd: int, path: Path) -> None:
    try:
        how(fd, path)
    except OSError as error:
        raise DatapathError(
            f"cannot pin {path}: {error.strerror}: it takes a bpffs, and "
            "no other loader at work on it"
        ) from error


def _program(name: str, code: bytes, functions: tuple[bytes, bytes]) -> int:
    program = PROGRAMS[name]
    try:
        return syscall.load_program(
            name, program.type, program.attach_type, code, LICENCE, functions
        )
    except syscall.VerifierError as error:
        lines = error.log.splitlines()[-_LOG_LINES:]
        raise DatapathError(
            f"the kernel's verifier refused the program {name} ({error.strerror}): this kernel "
            f"({os.uname().release}) is not one Weft works on: it takes Linux "
            f"{'.'.join(map(str, OLDEST_KERNEL))} or newer; the verifier's last lines:\n"
            + "\n".join(lines)
        ) from error
    except OSError as error:
        raise DatapathError(
            f"the kernel does not load the program {name}: {error.strerror}: it takes root "
            "(CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN) and a kernel with CONFIG_CGROUP_BPF and "
            "CONFIG_BPF_STREAM_PARSER"
        ) from error


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bpf.loader", description="Loads the eBPF programs."
    )
    parser.add_argument(
        "--pin", type=Path, required=True, help="directory in bpffs, or to mount it at"
    )
    parser.add_argument("--cgroup", type=Path, help="cgroup v2 directory whose sockets are steered")
    parser.add_argument(
        "--proxy-cgroup", type=Path, help="cgroup v2 directory of the proxy, for redirects to it"
    )
    parser.add_argument(
        "--remove", action="store_true", help="detach and unpin everything in --pin"
    )
    parser.add_argument(
        "--pairs", action="store_true", help="let requests and responses pass by the proxy"
    )
    args = parser.parse_args()
    if args.remove and (args.cgroup or args.proxy_cgroup):
        parser.error("--remove goes with --pin only")
    if args.proxy_cgroup and not args.cgroup:
        parser.error("--proxy-cgroup goes with --cgroup")
    try:
        if args.remove:
            pins.remove(args.pin)
            return 0
        for cgroup in filter(None, (args.cgroup, args.proxy_cgroup)):
            attach.check_cgroup(cgroup)
        load(args.pin)
        if args.cgroup is not None:
            attach.attach(args.pin, args.cgroup, args.proxy_cgroup, pairs=args.pairs)
    except DatapathError as error:
        print(f"weft: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
