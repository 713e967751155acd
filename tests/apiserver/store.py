"""What etcd is to a real server: objects by key, every version of them, one counter for all.

Nothing here knows what an object means. Objects are plain data that nobody changes once stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

Raw = dict[str, Any]


class Key(NamedTuple):
    """`resource` is GROUP/PLURAL; `namespace` "" for what is cluster-scoped."""

    resource: str
    namespace: str
    name: str


class Event(NamedTuple):
    """A write: `old` None created, `new` None deleted. `last` is what a deletion leaves to see: the
    last state, with the deletion's revision."""

    revision: int
    key: Key
    old: Raw | None
    new: Raw | None
    last: Raw


class Compacted(Exception):
    """The revision that was asked for is no longer kept."""


class Store:
    """`revision` rises by one with each write, whatever is written (api-concepts, "Resource
    versions")."""

    def __init__(self) -> None:
        self.revision = 1000
        self.compacted = 0
        self._versions: dict[str, dict[Key, list[tuple[int, Raw | None]]]] = {}
        self._log: dict[str, list[Event]] = {}
        self._watchers: dict[str, set[asyncio.Queue[Event]]] = {}
        self.written: Callable[[Event], None] = lambda event: None

    def get(self, key: Key) -> Raw | None:
        versions = self._versions.get(key.resource, {}).get(key)
        return versions[-1][1] if versions else None

    def put(self, key: Key, obj: Raw) -> Raw:
        """Store a version; the object with its resourceVersion."""
        old = self.get(key)
        self.revision += 1
        metadata = obj["metadata"] | {"resourceVersion": str(self.revision)}
        new = {**obj, "metadata": metadata}
        self._write(Event(self.revision, key, old, new, new))
        return new

    def delete(self, key: Key) -> Raw:
        """The last state, with the revision of its deletion (api-concepts, "Efficient detection of
        changes": a DELETED event carries it)."""
        old = self.get(key)
        assert old is not None
        self.revision += 1
        last = {**old, "metadata": old["metadata"] | {"resourceVersion": str(self.revision)}}
        self._write(Event(self.revision, key, old, None, last))
        return last

    def _write(self, event: Event) -> None:
        versions = self._versions.setdefault(event.key.resource, {})
        versions.setdefault(event.key, []).append((event.revision, event.new))
        self._log.setdefault(event.key.resource, []).append(event)
        for queue in self._watchers.get(event.key.resource, ()):
            queue.put_nowait(event)
        self.written(event)

    def list(
        self, resource: str, namespace: str | None, revision: int
    ) -> Iterator[tuple[Key, Raw]]:
        """The objects as they were at a revision, in the order of their keys. Compacted: nobody
        knows any more."""
        if revision < self.compacted:
            raise Compacted
        for key, versions in sorted(self._versions.get(resource, {}).items()):
            if namespace is not None and key.namespace != namespace:
                continue
            for when, obj in reversed(versions):
                if when <= revision:
                    if obj is not None:
                        yield key, obj
                    break

    def since(self, resource: str, revision: int) -> list[Event]:
        """Events after a revision, in order. Compacted: some of them may be forgotten."""
        if revision < self.compacted:
            raise Compacted
        return [event for event in self._log.get(resource, ()) if event.revision > revision]

    def compact(self) -> None:
        """Forget everything but what is there now."""
        self.compacted = self.revision
        self._log.clear()
        for versions in self._versions.values():
            for key in [key for key, kept in versions.items() if kept[-1][1] is None]:
                del versions[key]
            for kept in versions.values():
                del kept[:-1]

    def restore(self, revision: int) -> None:
        """As from a backup that was made at a revision: what was written since has never been."""
        self.revision = revision
        for log in self._log.values():
            log[:] = [event for event in log if event.revision <= revision]
        for versions in self._versions.values():
            for key, kept in list(versions.items()):
                kept[:] = [one for one in kept if one[0] <= revision]
                if not kept:
                    del versions[key]

    def watch(self, resource: str) -> asyncio.Queue[Event]:
        queue: asyncio.Queue[Event] = asyncio.Queue()
        self._watchers.setdefault(resource, set()).add(queue)
        return queue

    def unwatch(self, resource: str, queue: asyncio.Queue[Event]) -> None:
        self._watchers[resource].discard(queue)
