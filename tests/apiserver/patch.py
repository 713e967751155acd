"""Patches: JSON Patch (RFC 6902), JSON Merge Patch (RFC 7396), strategic merge patch (api-concepts,
"Patch mechanisms")."""

from __future__ import annotations

import copy
from typing import Any

from apiserver.errors import ApiError, bad_request

# By which field items of a list are the same in a strategic merge patch; lists of other names are
# replaced whole. Of the published API, what tests use.
_MERGE_KEYS: dict[str, tuple[str, ...]] = {
    "containers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "volumeMounts": ("mountPath",),
    "conditions": ("type",),
    "ports": ("port", "containerPort"),
    "addresses": ("type",),
    "ownerReferences": ("uid",),
}
_PRIMITIVE = frozenset(("finalizers",))


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396 §2."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patch(result.get(name), value)
    return result


def strategic_patch(target: Any, patch: Any) -> Any:
    """As merge_patch, but lists of objects merge by key, and `$patch` and friends are honoured."""
    if not isinstance(patch, dict):
        return patch
    if patch.get("$patch") == "replace":
        return {name: value for name, value in patch.items() if name != "$patch"}
    result = dict(target) if isinstance(target, dict) else {}
    retained = patch.get("$retainKeys")
    if retained is not None:
        result = {name: value for name, value in result.items() if name in retained}
    for name, value in patch.items():
        if name.startswith("$deleteFromPrimitiveList/"):
            field = name.partition("/")[2]
            result[field] = [one for one in result.get(field, []) if one not in value]
        elif name.startswith("$"):
            continue
        elif value is None:
            result.pop(name, None)
        elif isinstance(value, list) and name in _PRIMITIVE:
            before = result.get(name) or []
            result[name] = before + [one for one in value if one not in before]
        elif isinstance(value, list) and name in _MERGE_KEYS:
            result[name] = _merge_list(result.get(name) or [], value, _MERGE_KEYS[name])
        else:
            result[name] = strategic_patch(result.get(name), value)
    return result


def _merge_list(target: list[Any], patch: list[Any], keys: tuple[str, ...]) -> list[Any]:
    def key(item: dict[str, Any]) -> Any:
        return next((item[one] for one in keys if one in item), None)

    result = list(target)
    for item in patch:
        if item.get("$patch") == "replace":
            return [one for one in patch if "$patch" not in one]
        place = next((i for i, one in enumerate(result) if key(one) == key(item)), None)
        if item.get("$patch") == "delete":
            if place is not None:
                del result[place]
        elif place is None:
            result.append(item)
        else:
            result[place] = strategic_patch(result[place], item)
    return result


def json_patch(target: Any, operations: Any) -> Any:
    """RFC 6902. 422: an operation cannot be applied."""
    if not isinstance(operations, list):
        raise bad_request("a JSON patch is a list of operations")
    document = copy.deepcopy(target)
    for operation in operations:
        try:
            document = _apply(document, operation)
        except (KeyError, IndexError, ValueError, TypeError) as error:
            text = f"the server rejected our request due to an error in our request: {error!r}"
            raise ApiError(422, "Invalid", text) from None
    return document


def _apply(document: Any, operation: dict[str, Any]) -> Any:
    op, path = operation["op"], _pointer(operation["path"])
    if op == "test":
        if _get(document, path) != operation["value"]:
            raise ValueError(f"testing {operation['path']} failed")
        return document
    value = operation.get("value")
    if op in ("move", "copy"):
        source = _pointer(operation["from"])
        value = copy.deepcopy(_get(document, source))
        if op == "move":
            document = _change(document, source, None, remove=True)
    if op == "replace":
        _get(document, path)
    if op not in ("add", "replace", "remove", "move", "copy"):
        raise ValueError(f"no such operation: {op}")
    return _change(document, path, value, remove=op == "remove", insert=op != "replace")


def _pointer(text: str) -> list[str]:
    """RFC 6901."""
    if not text:
        return []
    if not text.startswith("/"):
        raise ValueError(f"not a pointer: {text}")
    return [part.replace("~1", "/").replace("~0", "~") for part in text[1:].split("/")]


def _get(document: Any, path: list[str]) -> Any:
    for step in path:
        document = document[int(step)] if isinstance(document, list) else document[step]
    return document


def _change(
    document: Any, path: list[str], value: Any, *, remove: bool = False, insert: bool = True
) -> Any:
    if not path:
        return None if remove else value
    parent = _get(document, path[:-1])
    last = path[-1]
    if isinstance(parent, list):
        place = len(parent) if last == "-" else int(last)
        if not 0 <= place <= len(parent):
            raise IndexError(last)
        if remove:
            del parent[place]
        elif insert:
            parent.insert(place, value)
        else:
            parent[place] = value
    elif remove:
        del parent[last]
    else:
        parent[last] = value
    return document
