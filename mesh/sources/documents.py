"""One file's documents as objects, and what is wrong with them.

Knows what a manifest document looks like from outside (kind, metadata, List); validation is
mesh.model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Literal, NamedTuple

from mesh.model.decode import KINDS, InvalidObject, Object, UnsupportedKind, decode, key_of
from mesh.model.errors import FieldError
from mesh.model.meta import ObjectKey
from mesh.policy import unreadable
from mesh.sources.manifest import Document

# Kinds that manifests for a cluster commonly hold and that say nothing to a gateway.
HARMLESS = frozenset(
    (
        *("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "ServiceAccount"),
        *("CronJob", "DaemonSet", "Deployment", "Job", "PodTemplate", "ReplicaSet"),
        *("ReplicationController", "StatefulSet", "HorizontalPodAutoscaler", "PriorityClass"),
        *("PersistentVolume", "PersistentVolumeClaim", "StorageClass", "PodDisruptionBudget"),
        *("CustomResourceDefinition", "Event", "Lease", "LimitRange", "ResourceQuota"),
    )
)
_CLUSTER_SCOPED = frozenset(info.kind for info in KINDS.values() if not info.namespaced)
# Lists in lists, deeper than anybody writes them, are taken for an object and refused.
_MAX_LISTS = 3
_STAYS = "; its last good version stays in force"

Level = Literal["error", "warning", "unsupported", "note"]


class Problem(NamedTuple):
    """Something in the files that is not in force as written.

    `document` counts from 1, 0 is the file as a whole. `path` is a field path. `level`: "error" is
    refused, "warning" in force but not as meant, "unsupported" a kind that Weft does not implement,
    "note" one it has no use for.
    """

    file: str
    document: int = 0
    kind: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""
    rule: str = ""
    message: str = ""
    level: Level = "error"


class ObjectId(NamedTuple):
    kind: str
    key: ObjectKey


class Claim(NamedTuple):
    """A document (of the file `path`, relative) says that it is this object."""

    path: str
    document: int
    position: int
    object: Object


class _Item(NamedTuple):
    """An object as written: a document, or an item of a List in it."""

    document: int
    prefix: str
    value: Any
    errors: tuple[tuple[str, str], ...]


def read_objects(
    path: str, file: str, documents: Iterable[Document], good: Mapping[ObjectId, Claim]
) -> tuple[dict[ObjectId, Claim], list[Problem]]:
    """The objects of one file, and the problems. `good`: what the file held before; an object that
    is invalid now keeps its version from there. Of a policy without one is left that it denies."""
    objects: dict[ObjectId, Claim] = {}
    problems: list[Problem] = []
    for position, item in enumerate(_items(documents)):
        ident = _identity(item.value)
        where = Problem(
            file, item.document, ident.kind, ident.key.namespace, ident.key.name, item.prefix
        )
        found: list[Problem] = []
        decoded = _decode(item, where, found)
        claim: Claim | None = None
        if decoded is not None:
            ident = ObjectId(decoded.kind, key_of(decoded))
            claim = Claim(path, item.document, position, decoded)
        elif (before := good.get(ident)) is not None and not unreadable.why(before.object):
            claim = Claim(path, item.document, position, before.object)
            found = [_told(problem, _STAYS) for problem in found]
        elif ident.kind in unreadable.POLICIES and any(one.level == "error" for one in found):
            errors = [FieldError(one.path, one.rule, one.message) for one in found]
            left = unreadable.closed(item.value, errors) or (before and before.object)
            if left is not None:
                claim = Claim(path, item.document, position, left)
            more = unreadable.CLOSES_NOTHING if left is None else unreadable.CLOSES
            found = [_told(problem, more) for problem in found]
        problems += found
        if claim is None:
            continue
        first = objects.setdefault(ident, claim)
        if first is not claim:
            problems.append(
                where._replace(
                    rule="duplicate",
                    message=f"already given in document {first.document} of this file, which "
                    "counts: remove one of them",
                )
            )
    return objects, problems


def merged(
    documents: Iterable[Document], before: Iterable[Document], stale: AbstractSet[ObjectId]
) -> Any:
    """The value of a document with the same objects, but those that are `stale` as they were."""
    written: dict[ObjectId, Any] = {}
    for given, which in ((before, stale.__contains__), (documents, lambda one: one not in stale)):
        for item in _items(given):
            if which(ident := _identity(item.value)):
                written.setdefault(ident, item.value)
    return {"apiVersion": "v1", "kind": "List", "items": list(written.values())}


def _told(problem: Problem, more: str) -> Problem:
    return problem._replace(message=f"{problem.message}{more}")


def _items(documents: Iterable[Document]) -> Iterator[_Item]:
    for number, value, errors in documents:
        yield from _unwrap(_Item(number, "", value, errors), _MAX_LISTS)


def _unwrap(item: _Item, depth: int) -> Iterator[_Item]:
    value = item.value
    is_list = (
        isinstance(value, dict)
        and str(value.get("kind", "")).endswith("List")
        and isinstance(value.get("items"), list)
    )
    if not is_list or not depth:
        yield item
        return
    for position, element in enumerate(value["items"]):
        prefix = f"items[{position}]"
        errors = tuple(
            (path.removeprefix(prefix).lstrip("."), message)
            for path, message in item.errors
            if path == prefix or path.startswith((prefix + ".", prefix + "["))
        )
        full = f"{item.prefix}.{prefix}" if item.prefix else prefix
        yield from _unwrap(_Item(item.document, full, element, errors), depth - 1)


def _identity(value: Any) -> ObjectId:
    """What a document says it is, as far as that can be read."""

    def text(mapping: Any, key: str) -> str:
        found = mapping.get(key) if isinstance(mapping, dict) else None
        return found if isinstance(found, str) else ""

    metadata = value.get("metadata") if isinstance(value, dict) else None
    kind = text(value, "kind")
    namespace = text(metadata, "namespace")
    if kind not in _CLUSTER_SCOPED:
        namespace = namespace or "default"
    return ObjectId(kind, ObjectKey(namespace, text(metadata, "name")))


def _decode(item: _Item, where: Problem, problems: list[Problem]) -> Object | None:
    """The object; or None, and why in `problems`."""
    for path, message in item.errors:
        problems.append(where._replace(path=_join(item.prefix, path), rule="yaml", message=message))
    if not isinstance(item.value, dict):
        problems.append(where._replace(rule="object", message="not an object: no kind, no fields"))
        return None
    if item.errors:
        return None
    # A status in a file is old, but for kubelet's: where pods and nodes are.
    kept = where.kind in ("Pod", "Node")
    raw = {key: value for key, value in item.value.items() if kept or key != "status"}
    try:
        return decode(raw)
    except UnsupportedKind as error:
        if where.kind in HARMLESS:
            note = "has no meaning for a gateway and is ignored"
            problems.append(where._replace(rule="kind", message=note, level="note"))
        else:
            problems.append(where._replace(rule="kind", message=str(error), level="unsupported"))
    except InvalidObject as error:
        problems.extend(
            where._replace(
                path=_join(item.prefix, wrong.path), rule=wrong.rule, message=wrong.message
            )
            for wrong in error.errors
        )
    return None


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path
