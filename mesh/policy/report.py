"""Policies for people: whom they select, and whether they are enforced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec

from mesh.model.meta import ObjectKey
from mesh.policy.sections import ResolvedSpec
from mesh.policy.spec import PolicyKey, Rulebook


class Row(msgspec.Struct, frozen=True):
    """`pods`: "<ns>/<name>" of those it selects, on any node. `problems`: why it is refused."""

    kind: str
    namespace: str
    name: str
    pods: tuple[str, ...]
    audit: bool
    problems: tuple[str, ...]


def rows(
    tables: Mapping[str, Mapping[Any, Any]],
    indexes: Mapping[str, Mapping[Any, AbstractSet[Any]]],
) -> Iterator[Row]:
    """Of all policies, in order."""
    key: PolicyKey
    for key in sorted(tables["rulebooks"]):
        book: Rulebook = tables["rulebooks"][key]
        pods: set[ObjectKey] = set()
        audit = False
        for number in range(len(book.specs)):
            for identity in tables["subjects"].get((key, number), ()):
                pods |= indexes["pods_of_identity"].get(identity, set())
            spec: ResolvedSpec | None = tables["resolved"].get((key, number))
            audit |= spec is not None and spec.audit
        named = tuple(str(pod) for pod in sorted(pods))
        yield Row(key.kind, key.namespace, key.name, named, audit, book.problems)
