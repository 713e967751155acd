"""The tables of an automaton as bytes: struct automaton of bpf/programs/automaton.h.

Knows the C, nothing of HTTP. A test holds the sizes against the header.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from l7proxy.automaton_rules import NONE, Limits

# Limits of the tables: words after the header, conditions in the mask, fields that must not come
# twice, rules that are asked for one path, and what a cell can name.
WORDS = 1 << 19
FACTS = 192
SEEN = 64
CANDIDATES = 256
_FOUND = 1 << 11
_FIELD, _FOUND_SHIFT, _EVENT = 1 << 19, 20, 1 << 31

_HEADER = struct.Struct("=Q8IQQ256s")
_ENTRY = struct.Struct("=IIQQQQQ")
_RULE = struct.Struct("=QQQII")
_WORD = 4
HEADER_SIZE = _HEADER.size
_M64 = (1 << 64) - 1
_NO_LIMIT = _M64


class TooLarge(Exception):
    """Which limit the tables go beyond."""


class Found(NamedTuple):
    """What a step has found: a Mark, a path class, bits of what is seen, bits of the mask."""

    mark: int = 0
    path: int = 0
    seen: int = 0
    facts: int = 0


class Candidate(NamedTuple):
    """A rule, where the path is what it wants: the bits it needs beside that."""

    need: int
    verdict: int


class Table(NamedTuple):
    """`classes`: a byte's column; `cells`: rows; `plain`: below which they stay where they are;
    `lists`: by list and path class."""

    classes: bytes
    start: int
    plain: int
    cells: list[int]
    found: Sequence[Found]
    lists: Sequence[Sequence[tuple[Candidate, ...]]]
    limits: Limits
    generation: int

    @staticmethod
    def cell(row: int, found: int, field: bool) -> int:
        if found >= _FOUND:
            raise TooLarge(f"more than {_FOUND} things to find")
        return row | (found << _FOUND_SHIFT | _EVENT if found else 0) | (_FIELD if field else 0)


def pack(table: Table) -> bytes:
    """TooLarge."""
    words = array("I", table.cells)
    found_at = _append(words, b"".join(_entry(one) for one in table.found))
    rules_at: dict[tuple[Candidate, ...], int] = {}
    offsets = array("I")
    for by_class in table.lists:
        for candidates in by_class:
            if candidates not in rules_at:
                rules = [_rule(one) for one in (*candidates, Candidate(0, NONE))]
                rules_at[candidates] = _append(words, b"".join(rules))
            offsets.append(rules_at[candidates])
    lists_at = _append(words, offsets.tobytes())
    if len(words) > WORDS:
        raise TooLarge(f"{len(words) * _WORD} bytes")
    limits = table.limits
    header = _HEADER.pack(
        table.generation,
        table.start,
        table.plain,
        found_at,
        lists_at,
        len(table.lists[0]) if table.lists else 0,
        limits.fields,
        limits.head,
        0,
        _NO_LIMIT if limits.body is None else limits.body,
        0,
        table.classes,
    )
    return header + words.tobytes()


def _append(words: array[int], content: bytes) -> int:
    """Where it begins: numbers of 64 bits stand at even words."""
    if len(words) % 2:
        words.append(0)
    at = len(words)
    words.frombytes(content)
    return at


def _entry(found: Found) -> bytes:
    return _ENTRY.pack(found.mark, found.path, found.seen, found.seen, *_split(found.facts))


def _rule(candidate: Candidate) -> bytes:
    return _RULE.pack(*_split(candidate.need), candidate.verdict, 0)


def _split(bits: int) -> tuple[int, int, int]:
    return bits & _M64, bits >> 64 & _M64, bits >> 128 & _M64
