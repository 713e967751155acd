"""Functions that the verifier looks at by themselves: once each, whatever who calls them knows.

What is written inline it follows anew on every way that leads there.

bcc makes no calls between functions. In C such a call is one of a helper with a number that no
helper has; bpf.compiler puts the function behind the program and makes it a call. The kernel is
told here (BTF, Documentation/bpf/btf.rst) that the function is a global one, and what it is given:
one pointer, to so many bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

# By their names in C; the size of the struct they are given. The numbers of their calls count up.
FUNCTIONS = {"refused": 88, "refusal": 80}
_FIRST_CALL = 1 << 16
CALLS = {_FIRST_CALL + index: name for index, name in enumerate(FUNCTIONS)}

_INT, _PTR, _STRUCT, _FUNC, _FUNC_PROTO = 1, 2, 4, 12, 13
_GLOBAL = 1


def c_header() -> str:
    """What FUNCTION in verifier.h needs."""
    return "".join(
        f"#define FUNCTION_{name} {number}\n#define SIZE_{name} {FUNCTIONS[name]}\n"
        for number, name in CALLS.items()
    )


class Types:
    """Of programs and functions, in the order in which they are added."""

    def __init__(self) -> None:
        self._strings = bytearray(b"\0")
        self._types = bytearray()
        self._count = 0
        self._int = self._add("u32", _INT, 4, struct.pack("=I", 32))

    def add(self, name: str) -> int:
        """The number of the type of a function, or of a program, of which nothing is said."""
        arguments = b""
        size = FUNCTIONS.get(name)
        if size is not None:
            pointer = self._add("", _PTR, self._add(f"of_{name}", _STRUCT, size))
            arguments = struct.pack("=II", self._text("given"), pointer)
        prototype = self._add("", _FUNC_PROTO, self._int, arguments, len(arguments) // 8)
        return self._add(name, _FUNC, prototype, b"", _GLOBAL)

    def btf(self) -> bytes:
        sizes = 0, len(self._types), len(self._types), len(self._strings)
        header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, *sizes)
        return bytes(header + self._types + self._strings)

    def _text(self, text: str) -> int:
        at = len(self._strings)
        self._strings += text.encode() + b"\0"
        return at if text else 0

    def _add(self, name: str, kind: int, size: int, more: bytes = b"", count: int = 0) -> int:
        self._types += struct.pack("=III", self._text(name), kind << 24 | count, size) + more
        self._count += 1
        return self._count


def described(functions: Iterable[tuple[int, str]]) -> tuple[bytes, bytes]:
    """BTF, and which of its functions begins where (struct bpf_func_info[]), for functions by the
    instructions at which they begin."""
    types = Types()
    places = b"".join(struct.pack("=II", at, types.add(name)) for at, name in functions)
    return types.btf(), places
