"""The sets of rules in the kernel's trie: written before anybody uses them, shared by pods with the
same rules, removed once no program can still read them.

One that there is no room for is not taken, so that what is there stays whole. Knows the map
`policies`, and nothing of who uses which set.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

from bpf import constants
from bpf.maps import PinnedMap
from bpf.rules import DEFAULT, entries
from bpf.settings import Mistaken
from bpf.structs import Policy, PolicyKey
from mesh.model.policyconfig import Direction, PolicyRule, PolicySection

# Of one pod, so that one huge policy does not take the room of all others.
MAX_ENTRIES = constants.POLICIES // 4
# What has more entries leaves so much of the room to what has fewer.
_LARGE, _FOR_SMALL = 1024, constants.POLICIES // 4
_NO_ROOM = "the kernel's maps have no room for it"
# The set that has no rules.
NO_RULES = 0


class Refused(Exception):
    """Why a set is not taken."""


class NoRoom(Refused):
    """It can be once others have made room."""


class _Set(NamedTuple):
    """What was written of a set, and the numbers that its rules have by their sources."""

    keys: list[PolicyKey]
    rules: dict[str, int]


class RuleSets:
    """Those of one pin directory. One process at a time may have them."""

    def __init__(self, directory: Path) -> None:
        """DatapathError: the map is not there."""
        self._map = PinnedMap(directory, "policies", PolicyKey, Policy)
        self._numbers_of: dict[tuple[Direction, Direction], int] = {}
        self._written: dict[int, _Set] = {}
        self._uses: Counter[int] = Counter()
        self._left: list[int] = []
        for key, _ in self._map.items():
            self._written.setdefault(key.set, _Set([], {})).keys.append(key)
        # Of an earlier process, which stay until it is known what is wanted.
        self._adopted = list(self._written)
        self._entries = sum(len(one.keys) for one in self._written.values())
        self._numbers = count(max(self._written, default=NO_RULES) + 1)
        self._rule_numbers = count(1)
        self._sources: dict[int, str] = {}

    def close(self) -> None:
        """Lets go of the map; the kernel goes on with what is in it."""
        self._map.close()

    def source(self, rule: int) -> str:
        """Where a rule that the kernel named comes from (PolicyRule.source); "": not of ours."""
        return self._sources.get(rule, "")

    @property
    def leaves(self) -> bool:
        """`reclaim` has something to do."""
        return bool(self._left)

    def take(self, section: PolicySection) -> int:
        """The number of the set that says what a policy does; one more uses it. Refused, OSError:
        there is none."""
        rules = section.egress, section.ingress
        number = self._numbers_of.get(rules)
        if number is None:
            number = next(self._numbers)
            self._written[number] = _Set([], {})
            try:
                self._write(number, section)
            except (Refused, OSError):
                self._left.append(number)
                raise
            self._numbers_of[rules] = number
        self._uses[number] += 1
        return number

    def leave(self, number: int) -> None:
        """One less uses a set."""
        if number != NO_RULES:
            self._uses[number] -= 1
            if not self._uses[number]:
                self._left.append(number)

    def leave_adopted(self) -> None:
        """All that is wanted has been taken."""
        self._left += self._adopted
        self._adopted = []

    def reclaim(self) -> bool:
        """Remove what was left before the last change; whether there is more room now."""
        before = self._entries
        for number in self._left:
            if not self._uses[number]:
                del self._uses[number]
                keys, rules = self._written.pop(number, _Set([], {}))
                self._entries -= len(keys)
                for key in keys:
                    self._map.remove(key)
                for rule in rules.values():
                    del self._sources[rule]
        self._left.clear()
        self._numbers_of = {
            rules: number for rules, number in self._numbers_of.items() if number in self._written
        }
        return self._entries < before

    def broken(self, mistaken: Mistaken) -> set[int]:
        """Sets that say something else of somebody than of whom it is taken for."""
        if not mistaken:
            return set()
        return {
            number
            for sides, number in self._numbers_of.items()
            if any(_tells(rule, mistaken) for side in sides for rule in side.rules)
        }

    def _write(self, number: int, section: PolicySection) -> None:
        keys, rules = self._written[number]
        values: list[Policy] = []
        egress = entries(section.egress, constants.EGRESS)
        both = chain(egress, entries(section.ingress, constants.INGRESS))
        wanted = list(islice(both, MAX_ENTRIES + 1))
        if len(wanted) > MAX_ENTRIES:
            raise Refused(f"its rules come to more than {MAX_ENTRIES} entries of the kernel's")
        room = constants.POLICIES - (_FOR_SMALL if len(wanted) > _LARGE else 0) - self._entries
        if len(wanted) > room:
            raise NoRoom(f"its rules come to {len(wanted)} entries, and {_NO_ROOM}")
        for entry in wanted:
            source = _source(section.ingress if entry.direction else section.egress, entry.rule)
            if source not in rules:
                rules[source] = next(self._rule_numbers)
                self._sources[rules[source]] = source
            port = entry.port.to_bytes(2, "big")
            keys.append(
                PolicyKey(entry.bits, number, entry.identity, entry.direction, entry.protocol, port)
            )
            values.append(Policy(entry.flags, rules[source]))
        self._entries += len(keys)
        self._map.put_all(zip(keys, values, strict=True))


def _tells(rule: PolicyRule, mistaken: Mistaken) -> bool:
    """Whether a rule is about somebody and not about whom it is taken for, or the other way."""
    peers = rule.peers
    return peers is not None and any(
        not (peers >= those if other in peers else peers.isdisjoint(those))
        for other, those in mistaken.items()
    )


def _source(direction: Direction, rule: int) -> str:
    if rule == DEFAULT:
        return ", ".join(direction.selected_by)
    return direction.rules[rule].source
