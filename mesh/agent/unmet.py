"""What is in the manifests but not in force as meant: conditions that do not hold, Gateways that
nobody serves, annotations with values that are none. For a running gateway and for one that is only
imagined (`weft validate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mesh.model.decode import Object
from mesh.model.gateway import Gateway
from mesh.model.meta import ObjectKey
from mesh.sources.documents import Problem

# Conditions that are well when they are False.
_BAD_WHEN_TRUE = frozenset(("Conflicted",))


def unmet(status: Mapping[str, Any]) -> str:
    """What does not hold in a status (plain data): type, reason and message of its conditions, ""
    where all is well. What listeners say is not said again for their Gateway."""
    parts = ("listeners", "parents", "ancestors")
    groups = [*(group for part in parts for group in status.get(part) or ()), status]
    said: list[str] = []
    for group in groups:
        name = f"listener {group['name']}: " if "name" in group else ""
        for one in group.get("conditions") or ():
            if one["status"] == ("False" if one["type"] in _BAD_WHEN_TRUE else "True"):
                continue
            message = one.get("message", "")
            known = "; ".join(said)
            if not message or any(piece not in known for piece in message.split("; ")):
                said.append(f"{name}{one['type']}: {one['reason']}: {message}".rstrip(": "))
    return "; ".join(said)


def warnings(
    objects: Mapping[str, Mapping[ObjectKey, Object]],
    told: Iterable[tuple[tuple[str, ObjectKey], str]],
    origin: Callable[[str, ObjectKey], tuple[str, int]],
) -> list[Problem]:
    """A warning for each thing that is told of an object (what is `unmet` in statuses, and problems
    of the control plane's), and for each Gateway of a class that does not exist. `origin`: file and
    document of an object; KeyError where it has just gone."""
    result = []
    for (kind, key), why in (*told, *_classless(objects)):
        try:
            file, document = origin(kind, key)
        except KeyError:
            continue
        result.append(
            Problem(
                file,
                document,
                kind=kind,
                namespace=key.namespace,
                name=key.name,
                rule="status",
                message=why,
                level="warning",
            )
        )
    return result


def _classless(
    objects: Mapping[str, Mapping[ObjectKey, Object]],
) -> Iterator[tuple[tuple[str, ObjectKey], str]]:
    classes = objects.get("GatewayClass", {})
    for key, gateway in objects.get("Gateway", {}).items():
        assert isinstance(gateway, Gateway)
        name = gateway.spec.gateway_class_name
        if ObjectKey("", name) not in classes:
            why = f"GatewayClass {name} does not exist, so nobody serves this Gateway"
            yield ("Gateway", key), why
