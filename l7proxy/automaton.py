"""Ordered rules over request heads as tables: one automaton that bpf/programs/automaton.h walks.

A rule is a conjunction of conditions and a verdict. Several lists of rules share one walk (routes,
policies): for each the first rule whose conditions hold gives the verdict. What cannot be part of
an automaton makes its rule PUNT with the conditions that are left: it keeps its place, so that no
lower rule answers in its stead. The reference for what a condition means is l7proxy.route_match.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal, NamedTuple

from l7proxy.automaton_head import END, HOST_SEEN, NOTHING, START, Action, HeadMachine, State
from l7proxy.automaton_nfa import Nfa, Unsupported

# Verdicts of no rule: the proxy is to decide; no rule holds.
PUNT = 0
NONE = 0xFFFF
LISTS = 2

# Limits of the tables, as in bpf/programs/automaton.h.
CELLS = 1 << 16
ACTIONS = 1 << 10
PATHS = 1 << 10
RULES = 1 << 12
BITS = 64
# A cell: the row that follows, the action, and whether the head goes on.
_ACTION_SHIFT = 17
_ALIVE = 1 << 31


class Condition(NamedTuple):
    """`name` is a header's (lower case) or query parameter's; "host" conditions see host and port,
    "hostname" ones are patterns of a route ("*.example.com") for the host alone."""

    of: Literal["method", "path", "host", "hostname", "header", "query"]
    kind: Literal["exact", "prefix", "regex", "present"]
    value: bytes = b""
    name: bytes = b""


class Rule(NamedTuple):
    """`verdict`: PUNT, or a number of the caller's below NONE."""

    conditions: tuple[Condition, ...]
    verdict: int


class TooLarge(Exception):
    """Which limit the tables go beyond."""


class Candidate(NamedTuple):
    """A rule, where the path is what it wants: the facts it needs beside that."""

    need: int
    verdict: int


class Automaton(NamedTuple):
    """`classes`: a byte's column; `cells`: rows of `width`, by their first index; `actions`: facts
    to set, facts that must not have been, what is added up; `candidates`: by list and path class.
    `facts`: what each bit of the mask means."""

    classes: bytes
    width: int
    start: int
    cells: tuple[int, ...]
    actions: tuple[tuple[int, int, int], ...]
    candidates: tuple[tuple[tuple[Candidate, ...], ...], ...]
    facts: tuple[object, ...]
    host: int

    def walk(self, head: bytes) -> Walked | None:
        """As bpf/programs/automaton.h does. None: the proxy's; or not whole."""
        row, mask, total, length_at = self.start, 0, 0, 0
        for at, byte in enumerate(head):
            cell = self.cells[row + self.classes[byte]]
            row = cell & CELLS * 2 - 1
            sets, once, adds = self.actions[cell >> _ACTION_SHIFT & ACTIONS - 1]
            if mask & once:
                return None
            mask |= sets
            total += adds & ~_LENGTH
            if adds & _LENGTH:
                length_at = at
            if total & _WHOLE:
                digits = head[length_at:].partition(b"\r")[0] if length_at else b"0"
                return Walked(
                    mask, total >> _PATH_SHIFT & 0xFFFF, int(digits), total & 0xFFFF, at + 1
                )
            if not cell & _ALIVE:
                return None
        return None

    def verdicts(self, walked: Walked) -> tuple[int, ...]:
        """Of each list."""
        return tuple(
            next(
                (one.verdict for one in rules[walked.path] if one.need & walked.mask == one.need),
                NONE,
            )
            for rules in self.candidates
        )


class Walked(NamedTuple):
    """A head that was read to its end: facts, path class, Content-Length, fields, bytes."""

    mask: int
    path: int
    length: int
    lines: int
    size: int


# What actions add up: lines, the path class, that the head is whole; and where a length begins.
_LINE, _PATH_SHIFT, _WHOLE, _LENGTH = 1, 16, 1 << 32, 1 << 63


def compile_rules(lists: Sequence[Sequence[Rule]]) -> Automaton:
    """TooLarge."""
    return _Compiler(lists).run()


class _Compiler:
    def __init__(self, lists: Sequence[Sequence[Rule]]) -> None:
        self._numbers: dict[Condition, int] = {}
        self._paths, self._hosts = Nfa(), Nfa()
        self._headers: dict[bytes, Nfa] = {}
        self._parameters: dict[bytes, Nfa] = {}
        self._unsupported: set[Condition] = set()
        self._lists = [[self._rule(rule) for rule in rules] for rules in lists]
        methods = {one.value for one in self._numbers if one.of == "method"}
        self._machine = HeadMachine(
            frozenset(methods), self._paths, self._hosts, self._headers, self._parameters
        )
        self._bits: dict[object, int] = {}
        self._path_classes: dict[frozenset[int], int] = {}

    # --- conditions -------------------------------------------------------------------------------

    def _rule(self, rule: Rule) -> Rule:
        kept = tuple(one for one in rule.conditions if self._supported(one))
        return Rule(kept, rule.verdict if len(kept) == len(rule.conditions) else PUNT)

    def _supported(self, condition: Condition) -> bool:
        if condition in self._numbers:
            return True
        if condition in self._unsupported:
            return False
        number = len(self._numbers)
        try:
            self._add(condition, number)
        except Unsupported:
            self._unsupported.add(condition)
            return False
        self._numbers[condition] = number
        return True

    def _add(self, condition: Condition, number: int) -> None:
        of, kind, value, name = condition
        if of == "method":
            if kind != "exact":
                raise Unsupported("methods are compared as they are")
            return
        if of == "hostname":
            _add_hostname(self._hosts, number, value)
            return
        nfas = {"header": self._headers, "query": self._parameters}
        if of == "header" and name in (b"host", b"content-length", b"upgrade", b"cookie"):
            raise Unsupported("a header that is more than its line")
        nfa = {"path": self._paths, "host": self._hosts}.get(of)
        if nfa is None:
            nfa = nfas[of].setdefault(name, Nfa())
        if kind == "exact":
            nfa.add_exact(number, value)
        elif kind == "prefix":
            nfa.add_path_prefix(number, value)
        elif kind == "present":
            nfa.add_any(number)
        else:
            nfa.add_regex(number, value.decode("latin-1"))

    def _fact(self, condition: Condition) -> object:
        number = self._numbers[condition]
        match condition.of:
            case "method":
                return "method", condition.value
            case "host" | "hostname":
                return "host", number
            case _:
                return condition.of, condition.name, number

    # --- tables -----------------------------------------------------------------------------------

    def run(self) -> Automaton:
        classes, samples = self._byte_classes()
        order, rows = self._reachable(samples)
        block = _minimise(order, rows)
        actions: dict[Action, int] = {NOTHING: 0}
        width = len(samples)
        # Row 0 leads nowhere; the end is an action, not a row.
        first = {number: (number + 1) * width for number in set(block.values())}
        if (len(first) + 1) * width > CELLS:
            raise TooLarge(f"{len(first)} states of {width} kinds of bytes")
        table = [0] * ((len(first) + 1) * width)
        for state in order:
            at = first[block[state]]
            for column, target in enumerate(rows[state]):
                if target is None:
                    continue
                action = actions.setdefault(target.action, len(actions))
                if target.state == END:
                    action = actions.setdefault(_END_ACTION, len(actions))
                    table[at + column] = action << _ACTION_SHIFT
                else:
                    row = first[block[target.state]]
                    table[at + column] = _ALIVE | action << _ACTION_SHIFT | row
        packed = tuple(self._pack(action) for action in actions)
        candidates = self._candidates()
        if len(packed) > ACTIONS:
            raise TooLarge(f"{len(packed)} actions")
        return Automaton(
            classes,
            width,
            first[block[START]],
            tuple(table),
            packed,
            candidates,
            tuple(self._bits),
            1 << self._bit(HOST_SEEN),
        )

    def _byte_classes(self) -> tuple[bytes, list[int]]:
        """A class for each byte, and a byte of each class."""
        alphabets = sorted(self._machine.alphabets())
        single = self._machine.single_bytes()
        known: dict[object, int] = {}
        samples: list[int] = []
        classes = bytearray(256)
        for byte in range(256):
            kind: object = byte if byte in single else tuple(a >> byte & 1 for a in alphabets)
            if kind not in known:
                known[kind] = len(samples)
                samples.append(byte)
            classes[byte] = known[kind]
        return bytes(classes), samples

    def _reachable(self, samples: list[int]) -> tuple[list[State], dict[State, _Row]]:
        step = self._machine.step
        rows: dict[State, _Row] = {}
        order, seen = [START], {START}
        for state in order:
            row = []
            for byte in samples:
                found = step(state, byte)
                row.append(_Target(*found) if found is not None else None)
                if found is not None and found[0] not in seen and found[0] != END:
                    seen.add(found[0])
                    order.append(found[0])
            rows[state] = tuple(row)
            # Before minimising: states that are the same are few.
            if len(order) * len(samples) > 8 * CELLS:
                raise TooLarge(f"more than {len(order)} states of {len(samples)} kinds of bytes")
        return order, rows

    def _bit(self, fact: object) -> int:
        bit = self._bits.setdefault(fact, len(self._bits))
        if bit >= BITS:
            raise TooLarge(f"more than {BITS} facts")
        return bit

    def _pack(self, action: Action) -> tuple[int, int, int]:
        if action is _END_ACTION:
            return 0, 0, _WHOLE
        adds = (_LINE if action.line else 0) | (_LENGTH if action.length else 0)
        if action.path is not None:
            path = self._path_classes.setdefault(action.path, len(self._path_classes) + 1)
            if path >= PATHS:
                raise TooLarge(f"more than {PATHS} kinds of paths")
            adds |= path << _PATH_SHIFT
        sets = sum(1 << self._bit(fact) for fact in action.sets)
        once = sum(1 << self._bit(fact) for fact in action.once)
        return sets, once, adds

    def _candidates(self) -> tuple[tuple[tuple[Candidate, ...], ...], ...]:
        count = 0
        result = []
        for rules in self._lists:
            by_class: list[tuple[Candidate, ...]] = [()]
            for holding in self._path_classes:
                found = [self._candidate(rule) for rule in rules if self._path_holds(rule, holding)]
                # Nothing comes after a rule that wants no more than the one before.
                kept: list[Candidate] = []
                for one in found:
                    if not any(one.need & above.need == above.need for above in kept):
                        kept.append(one)
                count += len(kept)
                by_class.append(tuple(kept))
            result.append(tuple(by_class))
        if count > RULES:
            raise TooLarge(f"{count} rules, counted for each kind of path")
        return tuple(result)

    def _path_holds(self, rule: Rule, holding: frozenset[int]) -> bool:
        return all(self._numbers[one] in holding for one in rule.conditions if one.of == "path")

    def _candidate(self, rule: Rule) -> Candidate:
        need = 1 << self._bit(HOST_SEEN)
        for one in rule.conditions:
            if one.of != "path":
                need |= 1 << self._bit(self._fact(one))
        return Candidate(need, rule.verdict)


class _Target(NamedTuple):
    state: State
    action: Action


_Row = tuple["_Target | None", ...]
_END_ACTION = Action(path=frozenset(), length=True, line=True)  # no step of a head does this


def _add_hostname(nfa: Nfa, number: int, pattern: bytes) -> None:
    """The host alone counts: a port may follow."""
    port = r"(:[0-9]+)?"
    if pattern == b"*":
        nfa.add_any(number)
        return
    literal = "".join(
        "\\" + character if not character.isalnum() else character
        for character in pattern.removeprefix(b"*").decode()
    )
    nfa.add_regex(number, (".+" if pattern.startswith(b"*") else "") + literal + port)


def _minimise(order: list[State], rows: dict[State, _Row]) -> dict[State, int]:
    """The block of each state: states of one block do the same with every text (Moore)."""
    block = dict.fromkeys(order, 0)
    count = 1
    while True:
        known: dict[object, int] = {}
        refined = {}
        for state in order:
            signature = (
                block[state],
                tuple(
                    None if target is None else (block.get(target.state, -1), target.action)
                    for target in rows[state]
                ),
            )
            refined[state] = known.setdefault(signature, len(known))
        block = refined
        if len(known) == count:
            return block
        count = len(known)


def pack(automaton: Automaton) -> bytes:
    """The tables as struct automaton of bpf/programs/automaton.h, little endian."""
    rules: list[bytes] = []
    firsts: list[int] = []
    for by_class in automaton.candidates:
        for candidates in by_class:
            firsts.append(len(rules))
            rules += [struct.pack("<QII", one.need, one.verdict, 0) for one in candidates]
            rules.append(struct.pack("<QII", 0, NONE, 0))
        firsts += [0] * (PATHS - len(by_class))
    firsts += [0] * ((LISTS - len(automaton.candidates)) * PATHS)
    actions = [struct.pack("<QQQ", *action) for action in automaton.actions]
    return b"".join(
        (
            automaton.classes,
            struct.pack("<IIQ", automaton.start, automaton.width, 0),
            b"".join(actions).ljust(ACTIONS * 24, b"\0"),
            struct.pack(f"<{len(firsts)}H", *firsts),
            b"".join(rules).ljust(2 * RULES * 16, b"\0"),
            struct.pack(f"<{len(automaton.cells)}I", *automaton.cells).ljust(CELLS * 4, b"\0"),
        )
    )
