"""A status as it is written: what has to change on the server, and nothing that is others'.

`status.parents` of routes and `status.ancestors` of policies are lists that several controllers
share, and their schema makes them atomic: whoever applies them applies them whole. So other
controllers' entries are written back as they were read, with the resourceVersion they were read at,
and a write in between is a conflict. Every other status is Weft's alone, and applied field by
field. What a cluster's CustomResourceDefinition does not declare yet, such as a Gateway's
`attachedListenerSets` before Gateway API v1.5, is left out: the server would refuse the whole.
Pure: the clock is handed in.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import msgspec

from gateway.status import with_transition_times
from mesh.model.decode import InvalidObject, encode
from mesh.model.schema import read

Json = dict[str, Any]
# Names of fields below `status`; those of a list's items follow that of the list.
Path = tuple[str, ...]
_UNDECLARED = re.compile(r"\.status((?:\.\w+|\[[^]]*\])+): field not declared in schema")
# How many entries the schemas allow.
_SHARED = {"parents": 32, "ancestors": 16}


class Body(NamedTuple):
    """`status` to apply; `locked`: only to the version that it was made from."""

    status: Json
    locked: bool


def render(
    status: msgspec.Struct | None,
    actual: Json,
    controller: str,
    now: str,
    undeclared: Collection[Path] = (),
) -> Body | None:
    """What to write so that an object has `status` (None: nothing of ours) but for the fields that
    its schema has not, where `actual` is on the server; None: it is so already."""
    shared = next((name for name in _SHARED if name in actual or hasattr(status, name)), None)
    if shared is not None:
        return _render_shared(shared, status, actual, controller, now, undeclared)
    if status is None:
        return Body({}, False) if actual else None
    new = rendered(_timed(status, actual, now), undeclared)
    return None if _there(status, new, actual) else Body(new, False)


def _render_shared(
    name: str,
    status: msgspec.Struct | None,
    actual: Json,
    controller: str,
    now: str,
    undeclared: Collection[Path],
) -> Body | None:
    listed = actual.get(name) or []
    others = [one for one in listed if one.get("controllerName") != controller]
    ours = [one for one in listed if one.get("controllerName") == controller]
    new: list[Json] = []
    if status is not None:
        new = rendered(_timed(status, {name: ours}, now), undeclared).get(name, [])
    new = new[: max(0, _SHARED[name] - len(others))]
    if new == ours:
        return None
    return Body({name: [*others, *new]}, True)


def _timed(status: msgspec.Struct, actual: Json, now: str) -> msgspec.Struct:
    try:
        old = read(actual, type(status), lenient=True)  # type: ignore[type-var]
    except InvalidObject:
        old = None
    return with_transition_times(old, status, now)


def rendered(status: Any, undeclared: Collection[Path] = ()) -> Json:
    """A status as plain data, as its schema has it."""
    new = encode(status)
    for listener in new.get("listeners", ()):
        # Required by the schema, empty or not (Gateway API v1.4).
        listener.setdefault("supportedKinds", [])
    for path in undeclared:
        _drop(new, path)
    return new


def _drop(value: Any, path: Path) -> None:
    if isinstance(value, list):
        for one in value:
            _drop(one, path)
    elif isinstance(value, dict):
        if path[1:]:
            _drop(value.get(path[0]), path[1:])
        else:
            value.pop(path[0], None)


def undeclared(refusal: str) -> set[Path]:
    """The fields of a status of which a server says that its schema has them not."""
    return {
        tuple(re.sub(r"\[[^]]*\]", "", found).removeprefix(".").split("."))
        for found in _UNDECLARED.findall(refusal)
    }


def _there(status: msgspec.Struct, new: Json, actual: Mapping[str, Any]) -> bool:
    """Whether all of a status stands on the server; others' conditions beside ours do no harm."""
    for field in msgspec.structs.fields(status):
        wanted, found = new.get(field.encode_name), actual.get(field.encode_name)
        if field.encode_name == "conditions":
            by_type = {one["type"]: one for one in found or ()}
            if any(by_type.get(one["type"]) != one for one in wanted or ()):
                return False
        elif (wanted or None) != (found or None):
            return False
    return True
