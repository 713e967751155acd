"""Ordered rules over request heads as tables: one automaton that bpf/programs/automaton.h walks.

Several lists of rules share one walk: those of routes, and of policies. A condition that cannot be
part of an automaton is left out, and its rule PUNT: it keeps its place, so that no lower rule
answers in its stead. What goes beyond a limit of the tables ends its list with PUNT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from l7proxy.automaton_head import (
    END,
    HOST_SEEN,
    LENGTH_WANTED,
    NOTHING,
    Action,
    HeadMachine,
    State,
)
from l7proxy.automaton_nfa import Nfa, Unsupported
from l7proxy.automaton_rules import PUNT, Condition, Limits, Rule
from l7proxy.automaton_table import (
    CANDIDATES,
    FACTS,
    SEEN,
    WORDS,
    Candidate,
    Found,
    Table,
    TooLarge,
    pack,
)

# Fields that are more than their lines: their values stand elsewhere in a head, or are joined.
_SPECIAL = frozenset((b"content-length", b"upgrade", b"cookie"))
# Bytes that a row may stay at, to be skipped eight at a time.
_PLAIN = range(0x20, 0x7F)


class Automaton(NamedTuple):
    """`table`: bytes for bpf/programs/automaton.h. `facts`: what each bit of the mask is about.
    `left_out`: conditions that are the proxy's, and why. `kept`: of each list how many rules there
    are before all are the proxy's, since the tables would be too large (`limit` says how)."""

    table: bytes
    states: int
    classes: int
    facts: tuple[Condition, ...]
    paths: int
    left_out: dict[Condition, str]
    kept: tuple[int, ...]
    limit: str


def compile_rules(
    lists: Sequence[Sequence[Rule]], limits: Limits, generation: int = 0
) -> Automaton:
    """Verdicts of the lists are those of their rules. Takes seconds for thousands of rules."""
    most = max(map(len, lists), default=0)
    limit = ""
    while True:
        kept = tuple(min(most, len(rules)) for rules in lists)
        cut = [
            rules if count == len(rules) else (*rules[:count], Rule((), PUNT))
            for count, rules in zip(kept, lists, strict=True)
        ]
        try:
            return _Compiler(cut).run(limits, generation)._replace(kept=kept, limit=limit)
        except TooLarge as error:
            if most == 0:
                raise
            limit = limit or str(error)
            most //= 2


class _Machine(NamedTuple):
    """What is reachable, by numbers. Of each state what each kind of byte leads to and does; state
    0 is the end of everything, 1 the first; action 0 is none."""

    targets: list[tuple[int, ...]]
    does: list[tuple[int, ...]]
    actions: list[Action]


class _Compiler:
    def __init__(self, lists: Sequence[Sequence[Rule]]) -> None:
        self._numbers: dict[Condition, int] = {}
        self._methods, self._paths, self._hosts = Nfa(), Nfa(), Nfa()
        self._headers: dict[bytes, Nfa] = {}
        self._parameters: dict[bytes, Nfa] = {}
        self._left_out: dict[Condition, str] = {}
        self._lists = [[self._rule(rule) for rule in rules] for rules in lists]
        self._machine = HeadMachine(
            self._methods, self._paths, self._hosts, self._headers, self._parameters
        )
        # Bits of the mask, by numbers of conditions; of the mask of what was seen; path classes.
        self._facts: dict[int, int] = {}
        self._seen: dict[object, int] = {HOST_SEEN: 0, LENGTH_WANTED: 1}
        self._path_classes: dict[frozenset[int], int] = {}

    # --- conditions -------------------------------------------------------------------------------

    def _rule(self, rule: Rule) -> Rule:
        kept = tuple(one for one in rule.conditions if self._supported(one))
        return Rule(kept, rule.verdict if len(kept) == len(rule.conditions) else PUNT)

    def _supported(self, condition: Condition) -> bool:
        if condition in self._numbers:
            return True
        if condition in self._left_out:
            return False
        number = len(self._numbers)
        try:
            self._add(condition, number)
        except Unsupported as error:
            self._left_out[condition] = str(error)
            return False
        self._numbers[condition] = number
        return True

    def _add(self, condition: Condition, number: int) -> None:
        of, kind, value, name = condition
        if of == "hostname":
            _add_hostname(self._hosts, number, kind, value)
            return
        if of == "header" and name in _SPECIAL:
            raise Unsupported(f"{name.decode()} is more than its line")
        named = self._headers if of == "header" else self._parameters
        whole = {"method": self._methods, "path": self._paths, "host": self._hosts}
        nfa = whole[of] if of in whole else named.setdefault(name, Nfa())
        if kind == "exact":
            nfa.add_exact(number, value)
        elif kind == "prefix":
            nfa.add_path_prefix(number, value)
        elif kind == "present":
            nfa.add_any(number)
        else:
            nfa.add_regex(number, value.decode("latin-1"))

    # --- tables -----------------------------------------------------------------------------------

    def run(self, limits: Limits, generation: int) -> Automaton:
        classes, samples = self._byte_classes()
        machine = self._reachable(samples)
        block = _minimise(machine)
        # One state stands for those that are alike; the end of everything first.
        kept = list({number: state for state, number in reversed([*enumerate(block)])}.values())
        kept.sort()
        columns, classes = _merge_columns(machine, kept, block, classes)
        plain_columns = {classes[byte] for byte in _PLAIN}
        # Rows that are skipped in come first.
        plain = [
            state
            for state in kept[1:]
            if all(
                block[machine.targets[state][columns[one]]] == block[state]
                and not machine.does[state][columns[one]]
                for one in plain_columns
            )
        ]
        order = list(dict.fromkeys((kept[0], *plain, *kept)))
        width = len(columns)
        if len(order) * width > WORDS:
            raise TooLarge(f"{len(order)} states of {width} kinds of bytes")
        place = {block[state]: at * width for at, state in enumerate(order)}
        found: dict[Found, int] = {Found(): 0}
        numbers = [found.setdefault(self._found(one), len(found)) for one in machine.actions]
        cells = [
            Table.cell(
                place[block[machine.targets[state][column]]],
                numbers[does := machine.does[state][column]],
                machine.actions[does].field,
            )
            for state in order
            for column in columns
        ]
        table = Table(
            classes=classes,
            start=place[block[1]],
            plain=(len(plain) + 1) * width,
            cells=cells,
            found=list(found),
            lists=self._candidates(),
            limits=limits,
            generation=generation,
        )
        by_bit = sorted((bit, number) for number, bit in self._facts.items())
        conditions = list(self._numbers)
        return Automaton(
            pack(table),
            len(order),
            width,
            tuple(conditions[number] for _, number in by_bit),
            len(self._path_classes),
            self._left_out,
            (),
            "",
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

    def _reachable(self, samples: list[int]) -> _Machine:
        step = self._machine.step
        numbers: dict[State, int] = {END: 0, self._machine.start: 1}
        actions: dict[Action, int] = {NOTHING: 0}
        dead = (0,) * len(samples)
        machine = _Machine([dead], [dead], [])
        order = [self._machine.start]
        for state in order:
            targets, does = [], []
            for byte in samples:
                found = step(state, byte)
                if found is None:
                    targets.append(0)
                    does.append(0)
                    continue
                target, action = found
                number = numbers.setdefault(target, len(numbers))
                if number > len(order):
                    order.append(target)
                targets.append(number)
                does.append(actions.setdefault(action, len(actions)))
            machine.targets.append(tuple(targets))
            machine.does.append(tuple(does))
            # Before minimising: states that are the same are few.
            if len(order) * len(samples) > 4 * WORDS:
                raise TooLarge(f"more than {len(order)} states of {len(samples)} kinds of bytes")
        machine.actions.extend(actions)
        return machine

    def _found(self, action: Action) -> Found:
        path = 0
        if action.path is not None:
            path = self._path_classes.setdefault(action.path, len(self._path_classes) + 1)
        seen = 0
        if action.seen is not None:
            seen = 1 << self._seen.setdefault(action.seen, len(self._seen))
            if len(self._seen) > SEEN:
                raise TooLarge(f"more than {SEEN} headers and query parameters")
        return Found(action.mark, path, seen, sum(1 << self._bit(one) for one in action.sets))

    def _bit(self, number: int) -> int:
        bit = self._facts.setdefault(number, len(self._facts))
        if bit >= FACTS:
            raise TooLarge(f"more than {FACTS} conditions beside those on paths")
        return bit

    def _candidates(self) -> list[list[tuple[Candidate, ...]]]:
        """By list and path class, from 1."""
        result = []
        for rules in self._lists:
            needs = [self._need(rule) for rule in rules]
            by_class: list[tuple[Candidate, ...]] = [()]
            for holding in self._path_classes:
                kept: list[Candidate] = []
                for rule, (paths, need) in zip(rules, needs, strict=True):
                    if not paths <= holding:
                        continue
                    # Nothing comes after a rule that wants no more than the one before.
                    if any(need & above.need == above.need for above in kept):
                        continue
                    if len(kept) == CANDIDATES - 1:
                        kept.append(Candidate(0, PUNT))
                        break
                    kept.append(Candidate(need, rule.verdict))
                by_class.append(tuple(kept))
            result.append(by_class)
        return result

    def _need(self, rule: Rule) -> tuple[frozenset[int], int]:
        """The path conditions, and the bits of the others."""
        paths = frozenset(self._numbers[one] for one in rule.conditions if one.of == "path")
        rest = {self._bit(self._numbers[one]) for one in rule.conditions if one.of != "path"}
        return paths, sum(1 << bit for bit in rest)


def _add_hostname(nfa: Nfa, number: int, kind: str, value: bytes) -> None:
    """Of the host, whatever port follows it."""
    port = "(:[0-9]+)?"
    if kind == "regex":
        source = value.decode("latin-1")
        nfa.add_regex(number, source, any_case=True)  # of the whole, for one that has a port in it
        nfa.add_regex(number, f"({source}){port}", any_case=True)
        return
    literal = "".join(
        character if character.isalnum() else "\\" + character
        for character in value.removeprefix(b"*").decode()
    )
    wild = ".+" if kind == "exact" and value.startswith(b"*") else ""
    nfa.add_regex(number, wild + literal + port)


def _minimise(machine: _Machine) -> list[int]:
    """The block of each state: states of one block do the same with every text (Moore)."""
    known: dict[object, int] = {}
    block = [known.setdefault(does, len(known)) for does in machine.does]
    count = 0
    while len(known) != count:
        count = len(known)
        known = {}
        of = block.__getitem__
        block = [
            known.setdefault((own, *map(of, targets)), len(known))
            for own, targets in zip(block, machine.targets, strict=True)
        ]
    return block


def _merge_columns(
    machine: _Machine, kept: list[int], block: list[int], classes: bytes
) -> tuple[list[int], bytes]:
    """A column for each of those that are not alike, and the new classes."""
    rows = [tuple(map(block.__getitem__, machine.targets[state])) for state in kept]
    contents = zip(
        zip(*rows, strict=True),
        zip(*(machine.does[state] for state in kept), strict=True),
        strict=True,
    )
    known: dict[object, int] = {}
    renamed: list[int] = []
    columns: list[int] = []
    for column, content in enumerate(contents):
        if content not in known:
            known[content] = len(columns)
            columns.append(column)
        renamed.append(known[content])
    return columns, bytes(renamed[one] for one in classes)
