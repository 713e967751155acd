"""What the proxy has done in C, in this process: `build` compiles it at set-up.

`Native` judges heads by an automaton's table, `Requests` and `Responses` read messages that go on
as their own bytes. Without a C compiler there is no library, and whoever would use it goes on
without. Nothing but the C library is needed to compile it. Knows tables and heads as bytes, nothing
of rules.

    python -m l7proxy.native      builds it, or says why not
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from bpf import layout
from l7proxy.automaton_table import HEADER_SIZE, WORDS

_HERE = Path(__file__).parent
_SOURCES = (_HERE / "native.c", layout.AUTOMATON_SOURCE)
_FLAGS = ("-O2", "-shared", "-fPIC", "-std=gnu11", "-Wall", "-Wextra", "-Werror")
# clang's pragmas are the kernel's half.
_QUIET = ("-Wno-unknown-pragmas", "-Wno-override-init")
# One of other sources would not judge as the kernel does: its name says what it is made of.
_MADE_OF = (*(path.read_bytes() for path in _SOURCES), repr((_FLAGS, _QUIET)).encode())
_DIGEST = hashlib.sha256(b"".join(_MADE_OF)).hexdigest()[:12]
LIBRARY = _HERE / f"libweft-{_DIGEST}.so"

# struct request: table, lists, told; then policy rules, target, host, request id, method's end.
_QUESTION = struct.Struct("=Q3I4x")
_FOUND = struct.Struct("=10I")
# struct response: limits; size of the head, whether it is dated, bytes left, what is dropped.
_LIMITS = struct.Struct("=II")
_HEAD = struct.Struct("=IIqII")


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


class Table:
    """A table in memory, with the room behind it that native.c wants. What is not touched of that
    takes no memory."""

    def __init__(self, table: bytes) -> None:
        self._memory = ctypes.create_string_buffer(HEADER_SIZE + 4 * WORDS)
        ctypes.memmove(self._memory, table, len(table))
        self.address = ctypes.addressof(self._memory)


class Native:
    """A table, ready to judge by. OSError: there is no library (`available` says so before)."""

    def __init__(self, table: bytes) -> None:
        self._judge = _library().weft_judge
        self._table = Table(table)
        self._judged = _Judged()
        self._arguments = self._table.address, ctypes.addressof(self._judged)

    def judge(self, head: bytes, egress: int = 0, ingress: int = 0) -> Judged:
        """What becomes of the head that `head` begins with."""
        table, judged = self._arguments
        self._judge(table, head, len(head), egress, ingress, judged)
        found = self._judged
        if not found.rule:
            return _PUNTED
        return Judged(found.rule, found.egress, found.ingress, found.size, found.length)


_PUNTED = Judged()


class Requests:
    """Judges requests by a table and two lists of its policy rules (0: none). `told`: backends are
    told who asks, so none that says so itself may go on as it is. OSError: as `Native`."""

    __slots__ = ("_address", "_memory", "_request", "_table")

    def __init__(self, table: Table, egress: int, ingress: int, *, told: bool = False) -> None:
        self._request = _library().weft_request
        self._table = table
        self._memory = ctypes.create_string_buffer(_QUESTION.size + _FOUND.size)
        self._address = ctypes.addressof(self._memory)
        _QUESTION.pack_into(self._memory, 0, table.address, egress, ingress, told)

    def judge(self, data: bytes) -> int:
        """The number of the rule for a request that is whole, and all of this; 0: none that may go
        on as it is."""
        found: int = self._request(self._address, data, len(data))
        return found

    def found(self) -> tuple[int, int, int, int, int, int, int, int, int, int]:
        """Of the request that was judged last: the policy rules' numbers; where target, host and
        the value of X-Request-Id begin and end (0, 0: nowhere); where the method and the head
        end."""
        return _FOUND.unpack_from(self._memory, _QUESTION.size)


class Responses:
    """Reads response heads up to these limits. OSError: as `Native`."""

    __slots__ = ("_address", "_memory", "_response")

    def __init__(self, max_bytes: int, max_fields: int) -> None:
        self._response = _library().weft_response
        self._memory = ctypes.create_string_buffer(_LIMITS.size + _HEAD.size)
        self._address = ctypes.addressof(self._memory)
        _LIMITS.pack_into(self._memory, 0, max_bytes, max_fields)

    def status(self, data: bytes, *, bodiless: bool) -> int:
        """Of a response that begins with a whole head, keeps its connection, and whose length is
        known; 0: of none. `bodiless`: it answers HEAD."""
        found: int = self._response(self._address, data, len(data), bodiless)
        return found

    def found(self) -> tuple[int, int, int, int, int]:
        """Of the response that was read last: bytes of its head; whether it has a Date; bytes that
        are still to come (negative: too many came); where a field line begins and ends that goes no
        further (0, 0: none)."""
        return _HEAD.unpack_from(self._memory, _LIMITS.size)


def available() -> str:
    """Why there is no library; "": there is one."""
    try:
        _library()
    except (OSError, AttributeError) as error:
        return f"no compiled automaton: {error}: run scripts/setup.sh with a C compiler (gcc)"
    return ""


def build() -> str:
    """Compiles the library unless there is one of these sources. Why not, if it cannot; else ""."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if LIBRARY.exists():
        return ""
    if compiler is None:
        return "no C compiler (apt-get install gcc libc6-dev)"
    draft = LIBRARY.with_suffix(".so~")
    command = (compiler, *_FLAGS, *_QUIET, "-o", str(draft), str(_SOURCES[0]))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"{' '.join(command)}: {done.stderr.strip()}"
    draft.rename(LIBRARY)
    for other in set(_HERE.glob("libweft*.so")) - {LIBRARY}:
        other.unlink()
    return ""


@functools.cache
def _library() -> ctypes.CDLL:
    # Calls are too short to let others have the interpreter meanwhile, which takes longer.
    library = ctypes.PyDLL(str(LIBRARY))
    address, text = ctypes.c_void_p, ctypes.c_char_p
    size, number = ctypes.c_size_t, ctypes.c_uint32
    library.weft_judge.restype = None
    library.weft_judge.argtypes = (address, text, size, number, number, address)
    library.weft_request.restype = number
    library.weft_request.argtypes = (address, text, size)
    library.weft_response.restype = number
    library.weft_response.argtypes = (address, text, size, number)
    return library


if __name__ == "__main__":
    if why := build():
        print(f"weft: the proxy goes on without its compiled automaton: {why}", file=sys.stderr)
        sys.exit(1)
