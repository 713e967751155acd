"""Conditions on one value of a request as a nondeterministic automaton over bytes.

Exact texts share their beginnings; regular expressions are those of RE2 that have the same meaning
in Python's syntax, which parses them. What is outside that is `Unsupported`, and the caller leaves
the condition to the proxy: nothing is approximated here. Knows bytes, nothing of requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Python's own parser of regular expressions; it has no public name.
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any, TypeAlias

# A set of bytes: bit n is byte n.
Bytes: TypeAlias = int
States: TypeAlias = frozenset[int]

ALL: Bytes = (1 << 256) - 1
NOT_NEWLINE: Bytes = ALL & ~(1 << 10)
# What a repetition may multiply an expression to.
_MAX_STATES = 4_000
# Syntax that both accept and read differently: {,n} is literal in RE2; [: and set operations.
_AMBIGUOUS = re.compile(r"\{,|\[:|\[\[|--|&&|~~|\|\|")


class Unsupported(Exception):
    """Why the condition cannot be part of an automaton."""


def byte_set(values: Iterable[int]) -> Bytes:
    result = 0
    for value in values:
        result |= 1 << value
    return result


_DIGIT = byte_set(b"0123456789")
_UPPER, _LOWER = byte_set(range(0x41, 0x5B)), byte_set(range(0x61, 0x7B))
_WORD = _DIGIT | byte_set(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_SPACE = byte_set(b"\t\n\f\r ")  # RE2's \s, which has no vertical tab
_CATEGORIES = {
    op.CATEGORY_DIGIT: _DIGIT,
    op.CATEGORY_NOT_DIGIT: ALL & ~_DIGIT,
    op.CATEGORY_WORD: _WORD,
    op.CATEGORY_NOT_WORD: ALL & ~_WORD,
    op.CATEGORY_SPACE: _SPACE,
    op.CATEGORY_NOT_SPACE: ALL & ~_SPACE,
}


class Nfa:
    """One automaton for many conditions; each has a number, and holds where its end is reached."""

    def __init__(self) -> None:
        self._silent: list[list[int]] = []
        self._edges: list[list[tuple[Bytes, int]]] = []
        self._holds: dict[int, set[int]] = {}
        self._literal: dict[tuple[int, int], int] = {}
        self._steps: dict[tuple[States, int], States] = {}
        self._closures: dict[States, States] = {}
        self._any_case = False
        self._root = self._state()

    @property
    def start(self) -> States:
        return self._closure(frozenset((self._root,)))

    # --- conditions -------------------------------------------------------------------------------

    def add_exact(self, number: int, text: bytes) -> None:
        self._hold(self._follow(text), number)

    def add_path_prefix(self, number: int, prefix: bytes) -> None:
        """`prefix` has no trailing "/"; whole segments (HTTPPathMatch PathPrefix)."""
        end = self._follow(prefix)
        self._hold(end, number)
        rest = self._state()
        self._edges[self._follow(prefix + b"/")].append((ALL, rest))
        self._hold(self._follow(prefix + b"/"), number)
        self._edges[rest].append((ALL, rest))
        self._hold(rest, number)

    def add_suffix(self, number: int, suffix: bytes) -> None:
        """At least one byte, then `suffix`."""
        loop = self._state()
        self._edges[self._root].append((ALL, loop))
        self._edges[loop].append((ALL, loop))
        at = loop
        for byte in suffix:
            after = self._state()
            self._edges[at].append((1 << byte, after))
            at = after
        self._hold(at, number)

    def add_any(self, number: int) -> None:
        """Whatever it is, the empty text too."""
        loop = self._state()
        self._silent[self._root].append(loop)
        self._edges[loop].append((ALL, loop))
        self._hold(loop, number)

    def add_regex(self, number: int, source: str, *, any_case: bool = False) -> None:
        """The whole text matches. Unsupported: nothing was added."""
        tree = _parse(source)
        mark = len(self._edges)
        self._any_case = any_case
        try:
            start, end = self._sequence(tree)
        except Unsupported:
            del self._edges[mark:], self._silent[mark:]
            raise
        self._silent[self._root].append(start)
        self._hold(end, number)

    # --- walking ----------------------------------------------------------------------------------

    def step(self, states: States, byte: int) -> States:
        key = states, byte
        found = self._steps.get(key)
        if found is None:
            bit = 1 << byte
            reached = frozenset(
                to for state in states for allowed, to in self._edges[state] if allowed & bit
            )
            found = self._steps[key] = self._closure(reached)
        return found

    def holding(self, states: States) -> frozenset[int]:
        """The conditions that hold if the text ends here."""
        return frozenset().union(*(self._holds.get(state, ()) for state in states))

    def alphabets(self) -> set[Bytes]:
        """The sets of bytes that are told apart."""
        return {allowed for edges in self._edges for allowed, _ in edges}

    # --- building ---------------------------------------------------------------------------------

    def _state(self) -> int:
        if len(self._edges) > 50 * _MAX_STATES:
            raise Unsupported("too many states")
        self._silent.append([])
        self._edges.append([])
        return len(self._edges) - 1

    def _hold(self, state: int, number: int) -> None:
        self._holds.setdefault(state, set()).add(number)

    def _follow(self, text: bytes) -> int:
        at = self._root
        for byte in text:
            after = self._literal.get((at, byte))
            if after is None:
                after = self._literal[at, byte] = self._state()
                self._edges[at].append((1 << byte, after))
            at = after
        return at

    def _closure(self, states: States) -> States:
        found = self._closures.get(states)
        if found is None:
            reached, todo = set(states), list(states)
            while todo:
                for to in self._silent[todo.pop()]:
                    if to not in reached:
                        reached.add(to)
                        todo.append(to)
            found = self._closures[states] = frozenset(reached)
        return found

    # Fragments: the first and the last state.

    def _sequence(self, tree: Iterable[tuple[Any, Any]]) -> tuple[int, int]:
        start = at = self._state()
        for kind, argument in tree:
            first, last = self._item(kind, argument)
            self._silent[at].append(first)
            at = last
        return start, at

    def _item(self, kind: Any, argument: Any) -> tuple[int, int]:
        if (allowed := _bytes_of(kind, argument, self._any_case)) is not None:
            start, end = self._state(), self._state()
            self._edges[start].append((allowed, end))
            return start, end
        if kind is op.SUBPATTERN:
            _, added, removed, tree = argument
            if added or removed:
                raise Unsupported("flags")
            return self._sequence(tree)
        if kind is op.BRANCH:
            start, end = self._state(), self._state()
            for tree in argument[1]:
                first, last = self._sequence(tree)
                self._silent[start].append(first)
                self._silent[last].append(end)
            return start, end
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT):  # which is taken first does not matter here
            return self._repeat(*argument)
        raise Unsupported(f"{kind}")

    def _repeat(self, least: int, most: int, tree: Any) -> tuple[int, int]:
        mark = len(self._edges)
        start = at = self._state()
        end = self._state()
        for _ in range(least):
            first, last = self._sequence(tree)
            self._silent[at].append(first)
            at = last
            self._check_size(mark)
        if most is op.MAXREPEAT:
            first, last = self._sequence(tree)
            self._silent[at].append(first)
            self._silent[last].append(at)
        else:
            for _ in range(most - least):
                self._silent[at].append(end)
                first, last = self._sequence(tree)
                self._silent[at].append(first)
                at = last
                self._check_size(mark)
        self._silent[at].append(end)
        return start, end

    def _check_size(self, mark: int) -> None:
        if len(self._edges) - mark > _MAX_STATES:
            raise Unsupported("a repetition of too many states")


def _parse(source: str) -> Any:
    if not source.isascii() or _AMBIGUOUS.search(source):
        raise Unsupported("syntax that has more than one meaning")
    try:
        tree = _parser.parse(source)
    except (re.error, OverflowError, RecursionError) as error:
        raise Unsupported(str(error)) from None
    if tree.state.flags & ~re.UNICODE.value:
        raise Unsupported("flags")
    items = list(tree)
    # The whole text is matched anyway.
    while items and items[0] in ((op.AT, op.AT_BEGINNING), (op.AT, op.AT_BEGINNING_STRING)):
        items.pop(0)
    while items and items[-1] == (op.AT, op.AT_END):
        items.pop()
    return items


def _bytes_of(kind: Any, argument: Any, any_case: bool) -> Bytes | None:
    """The bytes that an item of one byte stands for; None: it is another kind of item."""
    folded = _in_any_case if any_case else _as_it_is
    if kind is op.LITERAL:
        return folded(_one(argument))
    if kind is op.NOT_LITERAL:
        return ALL & ~folded(_one(argument))
    if kind is op.ANY:
        return NOT_NEWLINE
    if kind is not op.IN:
        return None
    negated, result = False, 0
    for member, value in argument:
        if member is op.NEGATE:
            negated = True
        elif member is op.LITERAL:
            result |= _one(value)
        elif member is op.RANGE:
            result |= byte_set(range(value[0], value[1] + 1))
        elif member is op.CATEGORY and value in _CATEGORIES:
            result |= _CATEGORIES[value]
        else:
            raise Unsupported(f"{member} in a set")
    return ALL & ~folded(result) if negated else folded(result)


def _as_it_is(allowed: Bytes) -> Bytes:
    return allowed


def _in_any_case(allowed: Bytes) -> Bytes:
    upper = allowed & _UPPER
    lower = allowed & _LOWER
    return allowed | upper << 32 | lower >> 32


def _one(value: int) -> Bytes:
    if value > 255:
        raise Unsupported("a character that is no byte")
    return 1 << value
