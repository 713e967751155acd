"""The loader, `python -m bpf.loader --pin DIR --cgroup PATH`: compiles, loads, pins, attaches.

Run again on the same directory it adopts the maps with all that is in them and replaces the
programs one by one, each at once: no connection passes a hook without a program. `--remove` takes
everything away. Messages go to stderr; the exit status is 1 if something failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bpf import pins, syscall
from bpf.errors import DatapathError
from bpf.maps import MAPS

# Function in programs/balance.c -> enum bpf_attach_type (linux/bpf.h).
HOOKS = {
    "connect4": 10,
    "connect6": 11,
    "sendmsg4": 14,
    "sendmsg6": 15,
    "recvmsg4": 19,
    "recvmsg6": 20,
    "getpeername4": 29,
    "getpeername6": 30,
}
_CGROUP_SOCK_ADDR = 18
_LICENCE = "GPL"
_LOG_LINES = 20


def load(directory: Path, cgroup: Path) -> None:
    """Makes the hooks of `cgroup` (a cgroup v2 directory) work from pins in `directory`.
    DatapathError: says what was in the way; what worked before still does."""
    check_cgroup(cgroup)
    from bpf.compiler import Module  # brings clang: only where it is used

    module = Module(Path(__file__).parent / "programs" / "balance.c")
    templates = {name: module.map_fd(name) for name in MAPS}
    adopted = {name: _adopt(directory, name, fd) for name, fd in templates.items()}
    used = {fd: adopted[name] or fd for name, fd in templates.items()}
    # All programs are accepted before anything is pinned or attached.
    programs = {
        hook: _program(hook, attach_type, module.instructions(hook, used))
        for hook, attach_type in HOOKS.items()
    }
    pins.prepare(directory)
    for name, fd in templates.items():
        if adopted[name] is None:
            _pin(fd, pins.map_path(directory, name))
    target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    for hook, program in programs.items():
        _attach(directory, hook, program, target, cgroup)


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


def _adopt(directory: Path, name: str, template: int) -> int | None:
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
    if syscall.map_info(adopted) != syscall.map_info(template):
        raise DatapathError(
            f"the map pinned at {path} is of another version of Weft and cannot be adopted: end "
            f"what uses it, then remove it: python -m bpf.loader --remove --pin {directory}"
        )
    return adopted


def _pin(fd: int, path: Path) -> None:
    try:
        syscall.pin(fd, str(path))
    except OSError as error:
        raise DatapathError(
            f"cannot pin a map at {path}: {error.strerror}: it takes a bpffs, and "
            "no other loader at work on it"
        ) from error


def _program(hook: str, attach_type: int, code: bytes) -> int:
    try:
        return syscall.load_program(hook, _CGROUP_SOCK_ADDR, attach_type, code, _LICENCE)
    except syscall.VerifierError as error:
        lines = error.log.splitlines()[-_LOG_LINES:]
        raise DatapathError(
            f"the kernel's verifier refused the program {hook} ({error.strerror}): this kernel "
            f"({os.uname().release}) is not one Weft works on; the verifier's last lines:\n"
            + "\n".join(lines)
        ) from error
    except OSError as error:
        raise DatapathError(
            f"the kernel does not load the program {hook}: {error.strerror}: it takes root "
            "(CAP_BPF and CAP_NET_ADMIN) and a kernel with CONFIG_CGROUP_BPF"
        ) from error


def _attach(directory: Path, hook: str, program: int, target: int, cgroup: Path) -> None:
    path = pins.link_path(directory, hook)
    try:
        if path.exists():
            link = syscall.pinned(str(path))
            if syscall.cgroup_of_link(link) == os.fstat(target).st_ino:
                syscall.update_link(link, program)
                return
            path.unlink()
        syscall.pin(syscall.link(program, target, HOOKS[hook]), str(path))
    except OSError as error:
        raise DatapathError(
            f"cannot attach {hook} to {cgroup}: {error.strerror}: it takes CAP_NET_ADMIN, and no "
            "program attached above it without the flag for several"
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
        "--remove", action="store_true", help="detach and unpin everything in --pin"
    )
    args = parser.parse_args()
    if args.remove == (args.cgroup is not None):
        parser.error("give either --cgroup or --remove")
    try:
        if args.remove:
            pins.remove(args.pin)
        else:
            load(args.pin, args.cgroup)
    except DatapathError as error:
        print(f"weft: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
