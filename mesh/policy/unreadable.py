"""Policies that cannot be read: what is left of them selects the same pods and denies.

Knows manifests as plain data, and nothing of what is in force.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mesh.model.decode import InvalidObject, Object, UnsupportedKind, decode
from mesh.model.errors import FieldError
from mesh.policy.audit import AUDIT

# Why it cannot be read, in what is left of it.
UNREADABLE = "weft.dev/unreadable"
# What people are told besides.
CLOSES = "; until that is mended, it denies for whom it selects"
CLOSES_NOTHING = "; whom it selects cannot be read, so it denies nothing"

POLICIES = ("NetworkPolicy", "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy")
_OF_METADATA = (
    *("name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp"),
    "deletionTimestamp",
)
_SIDES = ("ingress", "egress")
_KNOWN = frozenset(
    (*_SIDES, "ingressDeny", "egressDeny", "endpointSelector", "enableDefaultDeny", "labels")
) | {"description"}
_MOST = 1000


def why(policy: Any) -> str:
    """Why it could not be read; "": it could."""
    text: str = policy.metadata.annotations.get(UNREADABLE, "")
    return text


def closed(raw: Any, errors: Iterable[FieldError]) -> Object | None:
    """What is left of a policy; None: it is none, or whom it selects cannot be read either."""
    if not isinstance(raw, Mapping) or raw.get("kind") not in POLICIES:
        return None
    metadata, kind = raw.get("metadata"), str(raw["kind"])
    if not isinstance(metadata, Mapping):
        return None
    annotations = metadata.get("annotations")
    audit = annotations.get(AUDIT) if isinstance(annotations, Mapping) else None
    said = "; ".join(f"{one.path}: {one.message}" if one.path else one.message for one in errors)
    left: dict[str, Any] = {
        "apiVersion": raw.get("apiVersion"),
        "kind": kind,
        "metadata": {
            **{key: metadata[key] for key in _OF_METADATA if key in metadata},
            "annotations": {
                UNREADABLE: said[:_MOST] or "it cannot be read",
                **({AUDIT: audit} if isinstance(audit, str) else {}),
            },
        },
    }
    if kind == "NetworkPolicy":
        return _read({**left, "spec": _network_policy(raw.get("spec"))})
    many = raw.get("specs")
    given = [raw["spec"]] if "spec" in raw else []
    given += many if isinstance(many, list) else []
    readable = [spec for one in given for spec in _cilium(one) if _read({**left, "spec": spec})]
    if lost := len(given) - len(readable):
        more = f"; whom {lost} of its specs selects cannot be read, so it denies nothing"
        left["metadata"]["annotations"][UNREADABLE] += more
    return _read({**left, "specs": readable}) if readable else None


def _read(raw: dict[str, Any]) -> Object | None:
    try:
        return decode(raw)
    except (InvalidObject, UnsupportedKind):
        return None


def _network_policy(spec: Any) -> Any:
    """None: it selects nobody that is known."""
    if not isinstance(spec, Mapping) or "podSelector" not in spec:
        return None
    types = spec.get("policyTypes")
    known = isinstance(types, list) and types and set(map(str, types)) <= {"Ingress", "Egress"}
    return {
        "podSelector": spec["podSelector"],
        "policyTypes": types if known else ["Ingress", "Egress"],
    }


def _cilium(spec: Any) -> Iterator[dict[str, Any]]:
    """At most one. Where a rule may have stood above other policies', so does what is left."""
    if not isinstance(spec, Mapping) or "endpointSelector" not in spec:
        return
    # A misspelt field may be any of these.
    unknown = not spec.keys() <= _KNOWN
    sides = [one for one in _SIDES if unknown or one in spec or f"{one}Deny" in spec] or _SIDES

    def above(side: str) -> bool:
        said = repr(spec.get(side))
        return unknown or f"{side}Deny" in spec or "Requires" in said or "authentication" in said

    left: dict[str, Any] = {"endpointSelector": spec["endpointSelector"]}
    for side in sides:
        peers = "fromEntities" if side == "ingress" else "toEntities"
        left[f"{side}Deny" if above(side) else side] = [{peers: ["all"]}]
    yield left
