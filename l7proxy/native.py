"""The automaton's C in this process: `build` compiles it at set-up, `Native` judges heads by it.

Without a C compiler there is no library, and whoever would use it goes on without. Nothing but the
C library is needed to compile it. Knows tables as bytes, nothing of rules.

    python -m l7proxy.native      builds it, or says why not
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bpf import layout
from l7proxy.automaton_table import HEADER_SIZE, WORDS

_HERE = Path(__file__).parent
_SOURCES = (_HERE / "native.c", layout.AUTOMATON_SOURCE)
LIBRARY = _HERE / "libweft.so"
_FLAGS = ("-O2", "-shared", "-fPIC", "-std=gnu11", "-Wall", "-Wextra", "-Werror")
# clang's pragmas are the kernel's half.
_QUIET = ("-Wno-unknown-pragmas",)


class Judged(NamedTuple):
    """struct judged. `rule` 0: it is the proxy's."""

    rule: int = 0
    egress: int = 0
    ingress: int = 0
    size: int = 0
    length: int = 0


class _Judged(ctypes.Structure):
    _fields_ = (
        ("rule", ctypes.c_uint32),
        ("egress", ctypes.c_uint32),
        ("ingress", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("length", ctypes.c_uint64),
    )


class Native:
    """A table, ready to judge by. OSError: there is no library (`available` says so before)."""

    def __init__(self, table: bytes) -> None:
        self._judge = _library().weft_judge
        # See native.c. What is not touched takes no memory.
        self._table = ctypes.create_string_buffer(HEADER_SIZE + 4 * WORDS)
        ctypes.memmove(self._table, table, len(table))
        self._judged = _Judged()
        self._arguments = ctypes.addressof(self._table), ctypes.addressof(self._judged)

    def judge(self, head: bytes, egress: int = 0, ingress: int = 0) -> Judged:
        """What becomes of the head that `head` begins with."""
        table, judged = self._arguments
        self._judge(table, head, len(head), egress, ingress, judged)
        found = self._judged
        if not found.rule:
            return _PUNTED
        return Judged(found.rule, found.egress, found.ingress, found.size, found.length)


_PUNTED = Judged()


def available() -> str:
    """Why there is no library; "": there is one."""
    try:
        _library()
    except (OSError, AttributeError) as error:
        return f"no compiled automaton: {error}: run scripts/setup.sh with a C compiler (gcc)"
    return ""


def build() -> str:
    """Compiles the library unless it is newer than its sources. Why not, if it cannot; else ""."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    newest = max(path.stat().st_mtime_ns for path in _SOURCES)
    if LIBRARY.exists() and LIBRARY.stat().st_mtime_ns > newest:
        return ""
    if compiler is None:
        return "no C compiler (apt-get install gcc libc6-dev)"
    draft = LIBRARY.with_suffix(".so~")
    command = (compiler, *_FLAGS, *_QUIET, "-o", str(draft), str(_SOURCES[0]))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{' '.join(command)}: {done.stderr.strip()}"
    draft.rename(LIBRARY)
    return ""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.weft_judge.restype = None
    library.weft_judge.argtypes = (
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
        ctypes.c_uint32,
        ctypes.c_uint32,
        ctypes.c_void_p,
    )
    return library


if __name__ == "__main__":
    if why := build():
        print(f"weft: the proxy goes on without its compiled automaton: {why}", file=sys.stderr)
        sys.exit(1)
