"""Incremental derivation: tables of facts, indexes over them, and tables computed from them by pure
functions.

A `Rule` computes one value per key and reads other facts only through the `View` it is handed; the
view remembers what was read. When facts change, exactly the values that read them are computed
again, in the order of the rules; a value that comes out equal stops there. So work is in proportion
to the change, and the functions stay pure: the same facts give the same tables in whatever order
they arrived (a test compares with computing everything from nothing). Where a function raises, its
value is absent and the error is kept in `Derivation.failures`: one bad input affects only itself.

This module knows nothing of Gateway API. It must not do I/O or read a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, TypeAlias

Key: TypeAlias = Hashable
_Cell: TypeAlias = tuple[str, Key]
_NOTHING: frozenset[Key] = frozenset()


class Index(NamedTuple):
    """`buckets(key, value)` names the buckets of `name` in which a key of `table` stands. Several
    may share a name: one index over several tables, whose keys must differ."""

    name: str
    table: str
    buckets: Callable[[Any, Any], Iterable[Key]]


class Rule(NamedTuple):
    """The table `name`: for every key of `keys` (a table's keys, or an index's non-empty buckets)
    the value of `compute(view, key)`; None means no entry."""

    name: str
    keys: str
    compute: Callable[[View, Any], Any]


class Change(NamedTuple):
    """What became of one entry; None on either side: it was not there, it is gone."""

    old: Any
    new: Any


class View:
    """What a rule may read. Every read is remembered as a dependency of the computed value."""

    def __init__(
        self,
        tables: Mapping[str, Mapping[Key, Any]],
        indexes: Mapping[str, Mapping[Key, set[Key]]],
    ) -> None:
        self._tables = tables
        self._indexes = indexes
        self._readable: AbstractSet[str] = frozenset()
        self._reads: set[_Cell] = set()

    def get(self, table: str, key: Key) -> Any:
        """The entry, or None."""
        self._note(table, key)
        return self._tables[table].get(key)

    def bucket(self, index: str, key: Key) -> AbstractSet[Any]:
        """The keys in a bucket of an index. Iterate sorted where the order could matter."""
        self._note(index, key)
        return self._indexes[index].get(key, _NOTHING)

    def _note(self, name: str, key: Key) -> None:
        if name not in self._readable:
            raise KeyError(f"{name!r} is not a table or index before this rule")
        self._reads.add((name, key))

    def _observe(self, readable: AbstractSet[str]) -> set[_Cell]:
        self._readable, self._reads = readable, set()
        return self._reads


class Derivation:
    """The facts and everything derived from them.

    `inputs` are the names of the tables that `apply` fills. A rule may read the inputs, the tables
    of rules before it, and indexes over those; anything else is a KeyError.
    """

    def __init__(self, inputs: Sequence[str], rules: Sequence[Rule], indexes: Sequence[Index]):
        self.tables: dict[str, dict[Key, Any]] = {name: {} for name in inputs}
        self.indexes: dict[str, dict[Key, set[Key]]] = {index.name: {} for index in indexes}
        self._rules = tuple(rules)
        self._over: dict[str, list[Index]] = {}
        for index in indexes:
            self._over.setdefault(index.table, []).append(index)
        ready = set(inputs)
        readable: set[str] = ready | self._complete(ready)
        self._readable: dict[str, frozenset[str]] = {}
        self._keyed_by: dict[str, list[str]] = {}
        for rule in self._rules:
            if rule.name in readable or rule.keys not in readable:
                raise ValueError(f"rule {rule.name!r}: name taken, or keys not before it")
            self.tables[rule.name] = {}
            self._readable[rule.name] = frozenset(readable)
            self._keyed_by.setdefault(rule.keys, []).append(rule.name)
            ready.add(rule.name)
            readable |= ready | self._complete(ready)
        self._view = View(self.tables, self.indexes)
        self._reads: dict[_Cell, set[_Cell]] = {}
        self._readers: dict[_Cell, set[_Cell]] = {}
        self._dirty: dict[str, set[Key]] = {rule.name: set() for rule in self._rules}
        # Defects: (table, key) whose function raised at its last computation, and what.
        self.failures: dict[_Cell, Exception] = {}

    def _complete(self, ready: AbstractSet[str]) -> set[str]:
        """The indexes whose tables are all among `ready`."""
        names = set(self.indexes)
        return names - {i.name for table in self._over.keys() - ready for i in self._over[table]}

    def apply(self, changes: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[Key, Change]]:
        """Put (or, with None, remove) input entries; compute what follows.

        Returns, for each table in which something changed, inputs included, the changes by key.
        """
        result: dict[str, dict[Key, Change]] = {}
        for table, entries in changes.items():
            for key, value in entries.items():
                self._store(table, key, value, result)
        for rule in self._rules:
            dirty = self._dirty[rule.name]
            while dirty:
                key = dirty.pop()
                self._store(rule.name, key, self._compute(rule, key), result)
        return result

    def _compute(self, rule: Rule, key: Key) -> Any:
        cell = (rule.name, key)
        self.failures.pop(cell, None)
        for read in self._reads.pop(cell, ()):
            readers = self._readers[read]
            readers.discard(cell)
            if not readers:
                del self._readers[read]
        source = self.tables[rule.keys] if rule.keys in self.tables else self.indexes[rule.keys]
        if key not in source:
            return None
        reads = self._view._observe(self._readable[rule.name])
        try:
            value = rule.compute(self._view, key)
        except Exception as error:
            self.failures[cell] = error
            value = None
        self._reads[cell] = reads
        for read in reads:
            self._readers.setdefault(read, set()).add(cell)
        return value

    def _store(self, table: str, key: Key, new: Any, result: dict[str, dict[Key, Change]]) -> None:
        entries = self.tables[table]
        old = entries.get(key)
        if old == new:
            return
        if new is None:
            del entries[key]
        else:
            entries[key] = new
        changed = result.setdefault(table, {})
        first = changed.get(key)
        changed[key] = Change(first.old if first else old, new)
        self._touch(table, key, appeared_or_went=old is None or new is None)
        for index in self._over.get(table, ()):
            before = set(index.buckets(key, old)) if old is not None else set()
            after = set(index.buckets(key, new)) if new is not None else set()
            buckets = self.indexes[index.name]
            for bucket in before - after:
                members = buckets[bucket]
                members.discard(key)
                if not members:
                    del buckets[bucket]
                self._touch(index.name, bucket, appeared_or_went=not members)
            for bucket in after - before:
                members = buckets.setdefault(bucket, set())
                members.add(key)
                self._touch(index.name, bucket, appeared_or_went=len(members) == 1)

    def _touch(self, name: str, key: Key, *, appeared_or_went: bool) -> None:
        for rule, reader in self._readers.get((name, key), ()):
            self._dirty[rule].add(reader)
        if appeared_or_went:
            for rule in self._keyed_by.get(name, ()):
                self._dirty[rule].add(key)
