"""From the C in bpf/programs to instructions and maps, with bcc. Only bpf.objects imports this.

bcc and the clang in it take 120 MB: a process that imports this module should be short-lived.
Shim headers in bpf/include stand in for a kernel source tree, over those of linux-libc-dev.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import msgspec

from bpf import btf, functions, layout, reasons
from bpf.errors import DatapathError

_HERE = Path(__file__).parent
_PROGRAMS = _HERE / "programs"
_UAPI = Path("/usr/include")
# Where headers come from; bcc looks for include/ below the first, in place of a kernel source tree.
HEADERS = (_HERE / "include", _UAPI / "linux")
_INCLUDE = re.compile(r'^#include "(\w+\.h)"\n', re.MULTILINE)
_INSTRUCTION_SIZE = 8
# An instruction that loads a map's address: BPF_LD | BPF_DW | BPF_IMM from BPF_PSEUDO_MAP_FD.
_LD_IMM64, _FROM_MAP_FD = 0x18, 1
# One that calls a helper, BPF_JMP | BPF_CALL; and of BPF_PSEUDO_CALL, a function of the program.
_CALL, _OF_FUNCTION = 0x85, 1


def source(main: Path) -> str:
    """One text of a program and our headers, with the tables that Python owns, but not what the
    running kernel says. bcc rewrites map accesses reliably only in one file; #line keeps places in
    messages true."""
    seen: set[str] = set()

    def text_of(path: Path) -> str:
        text = f'#line 1 "{path.name}"\n' + path.read_text()

        def insert(match: re.Match[str]) -> str:
            name = match[1]
            line = text[: match.start()].count("\n") + 1
            back = f'#line {line} "{path.name}"\n'
            if name in seen:
                return back
            seen.add(name)
            checks = layout.c_checks() if name == "types.h" else ""
            return text_of(_PROGRAMS / name) + checks + back

        return _INCLUDE.sub(insert, text)

    headers = (layout, reasons, functions)
    return "".join(one.c_header() for one in headers) + text_of(main)


class Module:
    """A compiled program file: its functions, and templates of its maps that exist in the kernel
    for as long as this does."""

    def __init__(self, main: Path) -> None:
        """DatapathError: no bcc, no headers, or it does not compile (clang says why on stderr)."""
        try:
            import bcc
        except ImportError as error:
            raise DatapathError(
                f"cannot compile the eBPF programs: {error}: apt-get install python3-bpfcc, and "
                "use a virtual environment of /usr/bin/python3 with --system-site-packages"
            ) from error
        multiarch = _UAPI / (sysconfig.get_config_var("MULTIARCH") or "")
        if not (_UAPI / "linux" / "types.h").exists():
            raise DatapathError(
                f"cannot compile the eBPF programs: no {_UAPI}/linux/types.h: "
                "apt-get install linux-libc-dev"
            )
        # bcc looks for include/ below it, in place of the running kernel's source.
        os.environ["BCC_KERNEL_SOURCE"] = str(_HERE)
        flags = ["-Wall", "-Wextra", "-Werror"]
        for directory in (_UAPI, multiarch):
            flags += ["-idirafter", str(directory)]
        text = btf.c_header() + source(main)
        try:
            self._bpf = bcc.BPF(text=text.encode(), cflags=flags)
        except Exception as error:  # bcc raises bare Exception
            raise DatapathError(
                f"cannot compile {main}: {error}: clang's messages stand above; without rights to "
                "use bpf(2) the maps fail too: run as root"
            ) from error
        self._lib = bcc.lib

    def map_fd(self, name: str) -> int:
        """The descriptor of a map's template. KeyError: the program has no such map."""
        fd: int = self._lib.bpf_table_fd(self._bpf.module, name.encode())
        if fd < 0:
            raise KeyError(name)
        return fd

    def program(self, function: str, maps: dict[int, str]) -> Program:
        """A function with those that it calls; `maps`: names by descriptors of templates."""
        code = bytearray(self._bpf.dump_func(function.encode()))
        found = {}
        begins = {function: 0}
        at = 0
        while at < len(code):
            wide = code[at] == _LD_IMM64
            number = int.from_bytes(code[at + 4 : at + 8], "little")
            if wide and code[at + 1] >> 4 == _FROM_MAP_FD:
                found[at] = maps[number]
                code[at + 4 : at + 8] = bytes(4)
            elif code[at] == _CALL and number in functions.CALLS:
                called = functions.CALLS[number]
                if called not in begins:
                    begins[called] = len(code)
                    code += self._bpf.dump_func(called.encode())
                distance = (begins[called] - at) // _INSTRUCTION_SIZE - 1
                code[at + 1] = _OF_FUNCTION << 4
                code[at + 4 : at + 8] = distance.to_bytes(4, "little", signed=True)
            at += 2 * _INSTRUCTION_SIZE if wide else _INSTRUCTION_SIZE
        return Program(bytes(code), found, begins)


class Program(msgspec.Struct, frozen=True):
    """Instructions; `maps`: the names of the maps whose addresses they load, by byte offset;
    `functions`: by name, where they begin, the program's own first."""

    code: bytes
    maps: dict[int, str]
    functions: dict[str, int]

    def instructions(self, descriptors: Mapping[str, int]) -> bytes:
        """With these maps."""
        code = bytearray(self.code)
        for at, name in self.maps.items():
            code[at + 4 : at + 8] = descriptors[name].to_bytes(4, "little")
        return bytes(code)

    def described(self) -> tuple[bytes, bytes]:
        """What load_program wants to know of several functions."""
        if len(self.functions) == 1:
            return b"", b""
        return functions.described(
            (at // _INSTRUCTION_SIZE, name) for name, at in self.functions.items()
        )
