"""Field ownership and server-side apply (server-side-apply).

A set of fields is a set of paths; a path is a tuple of the elements that `fieldsV1` is made of:
`f:NAME`, `k:{...}` for an item of a list by its keys, `v:...` for one of a set. Which lists are
associative, and which are atomic, is in the schema ("Merge strategy"); of built-in kinds, which
have none here, `_LISTS` says it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from apiserver.errors import ApiError

Path = tuple[str, ...]
Fields = frozenset[Path]
Schema = dict[str, Any]

_LISTS: dict[str, Schema] = {
    name: {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": keys}
    for name, keys in {
        "conditions": ["type"],
        "containers": ["name"],
        "ownerReferences": ["uid"],
        "podIPs": ["ip"],
        "ports": ["port", "protocol"],
    }.items()
} | {"finalizers": {"x-kubernetes-list-type": "set"}}
_NO_SCHEMA: Schema = {"built-in": True}
_METADATA: Schema = {
    "properties": {name: _LISTS[name] for name in ("finalizers", "ownerReferences")}
}
# Never owned by anybody.
_SYSTEM = frozenset(
    (
        *("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp"),
        *("deletionTimestamp", "deletionGracePeriodSeconds", "managedFields", "selfLink"),
        "generateName",
    )
)


class Manager(NamedTuple):
    name: str
    operation: str
    subresource: str


class Owned(NamedTuple):
    fields: Fields
    api_version: str
    time: str


Managers = dict[Manager, Owned]


# --- fieldsV1 ------------------------------------------------------------------------------------


def read_managers(obj: dict[str, Any]) -> Managers:
    result: Managers = {}
    for entry in obj["metadata"].get("managedFields") or ():
        who = Manager(entry["manager"], entry["operation"], entry.get("subresource", ""))
        fields = frozenset(_paths(entry.get("fieldsV1") or {}, ()))
        result[who] = Owned(fields, entry["apiVersion"], entry.get("time", ""))
    return result


def _paths(tree: dict[str, Any], prefix: Path) -> list[Path]:
    found: list[Path] = []
    for element, below in tree.items():
        if element == ".":
            found.append(prefix)
        elif below:
            found += _paths(below, (*prefix, element))
        else:
            found.append((*prefix, element))
    return found


def write_managers(managers: Managers) -> list[dict[str, Any]]:
    """metadata.managedFields; managers that own nothing are left out."""
    entries = []
    for who, owned in managers.items():
        if not owned.fields:
            continue
        entry = {
            "manager": who.name,
            "operation": who.operation,
            "apiVersion": owned.api_version,
            "time": owned.time,
            "fieldsType": "FieldsV1",
            "fieldsV1": _tree(owned.fields),
        }
        if who.subresource:
            entry["subresource"] = who.subresource
        entries.append(entry)
    return entries


def _tree(fields: Fields) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path in sorted(fields):
        node = root
        for element in path:
            node = node.setdefault(element, {})
    for path in fields:
        node = root
        for element in path:
            node = node[element]
        if node:
            node["."] = {}
    return root


# --- values by path ------------------------------------------------------------------------------


def _below(schema: Schema, name: str) -> Schema:
    if schema.get("built-in"):
        return _LISTS.get(name, _NO_SCHEMA) | {"built-in": True}
    inner = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
    return inner if isinstance(inner, dict) else {}


def _root(schema: Schema | None) -> Schema:
    if schema is None:
        return {"properties": {"metadata": _METADATA}, "additionalProperties": _NO_SCHEMA}
    return {**schema, "properties": {**schema.get("properties", {}), "metadata": _METADATA}}


def _items(schema: Schema) -> Schema:
    if schema.get("built-in"):
        return _NO_SCHEMA
    inner = schema.get("items")
    return inner if isinstance(inner, dict) else {}


def _element(item: Any, schema: Schema) -> str | None:
    """How an item of this list is named in a path; None: the list is atomic ("Merge strategy":
    the default)."""
    kind = schema.get("x-kubernetes-list-type")
    if kind == "set":
        return "v:" + json.dumps(item, separators=(",", ":"))
    if kind == "map" and isinstance(item, dict):
        keys = {}
        for key in schema["x-kubernetes-list-map-keys"]:
            fallback = _items(schema).get("properties", {}).get(key, {}).get("default")
            if (value := item.get(key, fallback)) is not None:
                keys[key] = value
        return "k:" + json.dumps(keys, separators=(",", ":"), sort_keys=True)
    return None


def _associative(schema: Schema) -> bool:
    return schema.get("x-kubernetes-list-type") in ("set", "map")


def _granular(value: Any, schema: Schema) -> bool:
    return isinstance(value, dict) and schema.get("x-kubernetes-map-type") != "atomic"


def fields_of(obj: dict[str, Any], schema: Schema | None) -> dict[Path, Any]:
    """Every field that an object sets, with its value (None for an item of a list as such)."""
    found: dict[Path, Any] = {}
    root = _root(schema)
    for name, value in obj.items():
        if name in ("apiVersion", "kind"):
            continue
        if name == "metadata":
            value = {one: what for one, what in value.items() if one not in _SYSTEM}
            if not value:
                continue
        _collect(value, _below(root, name), (f"f:{name}",), found)
    return found


def _collect(value: Any, schema: Schema, path: Path, found: dict[Path, Any]) -> None:
    if _granular(value, schema) and value:
        for name, one in value.items():
            _collect(one, _below(schema, name), (*path, f"f:{name}"), found)
    elif isinstance(value, list) and value and _associative(schema):
        for item in value:
            element = _element(item, schema)
            assert element is not None
            found[(*path, element)] = None
            if isinstance(item, dict):
                _collect(item, _items(schema), (*path, element), found)
    else:
        found[path] = value


def _merge(live: Any, applied: Any, schema: Schema) -> Any:
    if _granular(applied, schema) and isinstance(live, dict):
        result = dict(live)
        for name, value in applied.items():
            result[name] = (
                _merge(live[name], value, _below(schema, name)) if name in live else value
            )
        return result
    if isinstance(applied, list) and isinstance(live, list) and _associative(schema):
        result = list(live)
        places = {_element(item, schema): place for place, item in enumerate(live)}
        for item in applied:
            place = places.get(_element(item, schema))
            if place is None:
                result.append(item)
            else:
                result[place] = _merge(result[place], item, _items(schema))
        return result
    return applied


def _without(value: Any, paths: set[Path], kept: Fields, schema: Schema, prefix: Path) -> Any:
    """The value without the fields at `paths`; what has nothing left in it goes as well, unless
    somebody else owns something there."""
    if _granular(value, schema):
        result = {}
        for name, one in value.items():
            path = (*prefix, f"f:{name}")
            if path in paths and not _owned_below(kept, path):
                continue
            inner = _without(one, paths, kept, _below(schema, name), path)
            if inner in ({}, []) and one not in ({}, []):
                continue
            result[name] = inner
        return result
    if isinstance(value, list) and _associative(schema):
        items = []
        for item in value:
            path = (*prefix, _element(item, schema) or "")
            if path in paths and not _owned_below(kept, path):
                continue
            items.append(_without(item, paths, kept, _items(schema), path))
        return items
    return value


def _owned_below(kept: Fields, path: Path) -> bool:
    return any(one[: len(path)] == path for one in kept)


# --- the two operations --------------------------------------------------------------------------


def applied(
    live: dict[str, Any],
    config: dict[str, Any],
    who: Manager,
    *,
    schema: Schema | None,
    force: bool,
    api_version: str,
    now: str,
) -> dict[str, Any]:
    """The object after server-side apply. 409: another manager owns a field with another value, and
    the request does not force ("Conflicts")."""
    managers = read_managers(live)
    wanted = fields_of(config, schema)
    present = fields_of(live, schema)
    before = managers.get(who, Owned(frozenset(), api_version, now))
    others = {other: owned for other, owned in managers.items() if other != who}
    conflicts: dict[Manager, Fields] = {}
    for other, owned in others.items():
        differing = frozenset(
            path
            for path in owned.fields & wanted.keys()
            if path in present and present[path] != wanted[path]
        )
        if differing:
            conflicts[other] = differing
    if conflicts and not force:
        raise _conflict(conflicts)
    for other, lost in conflicts.items():
        others[other] = others[other]._replace(fields=others[other].fields - lost)
    merged = {**live}
    root = _root(schema)
    for name, value in config.items():
        if name not in ("apiVersion", "kind"):
            if name == "metadata":
                value = {one: what for one, what in value.items() if one not in _SYSTEM}
            merged[name] = _merge(live.get(name), value, _below(root, name))
    # "Field management": what the manager no longer applies, and nobody else owns, is removed.
    kept = frozenset().union(*(owned.fields for owned in others.values()), wanted.keys())
    dropped = set(before.fields - wanted.keys())
    if dropped:
        merged = _without(merged, dropped, kept, root, ())
    fields = frozenset(wanted)
    time = before.time if before.fields == fields and before.time else now
    others[who] = Owned(fields, api_version, time)
    merged["metadata"] = {**merged["metadata"], "managedFields": write_managers(others)}
    return merged


def _conflict(conflicts: dict[Manager, Fields]) -> ApiError:
    causes = []
    for other, fields in sorted(conflicts.items()):
        using = " with subresource " + json.dumps(other.subresource) if other.subresource else ""
        for path in sorted(fields):
            causes.append(
                {
                    "reason": "FieldManagerConflict",
                    "message": f"conflict with {json.dumps(other.name)}{using}",
                    "field": _dotted(path),
                }
            )
    text = "; ".join(f"{cause['message']}: {cause['field']}" for cause in causes)
    message = f"Apply failed with {len(causes)} conflict(s): {text}"
    return ApiError(409, "Conflict", message, details={"causes": causes})


def _dotted(path: Path) -> str:
    return "".join(
        f".{element[2:]}" if element.startswith("f:") else f"[{element[2:]}]" for element in path
    )


def updated(
    live: dict[str, Any] | None,
    new: dict[str, Any],
    who: Manager,
    *,
    schema: Schema | None,
    api_version: str,
    now: str,
    only: Callable[[Path], bool],
) -> dict[str, Any]:
    """The object after any other write: its writer owns what it changed, everybody else loses that
    ("Field management": operation Update). `only`: the fields that the endpoint writes."""
    before = fields_of(live, schema) if live is not None else {}
    after = {path: value for path, value in fields_of(new, schema).items() if only(path)}
    before = {path: value for path, value in before.items() if only(path)}
    changed = frozenset(
        path for path, value in after.items() if path not in before or before[path] != value
    )
    gone = before.keys() - after.keys()
    managers = read_managers(live) if live is not None else {}
    result: Managers = {}
    for other, owned in managers.items():
        lost = gone if other == who else gone | changed
        result[other] = owned._replace(fields=owned.fields - lost)
    if changed:
        own = result.get(who, Owned(frozenset(), api_version, now))
        result[who] = Owned(own.fields | changed, api_version, now)
    return {**new, "metadata": {**new["metadata"], "managedFields": write_managers(result)}}
