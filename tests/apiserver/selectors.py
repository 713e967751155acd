"""Label and field selectors of list and watch (api-concepts; the concepts pages "Labels and
Selectors" and "Field Selectors")."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from apiserver.errors import bad_request
from apiserver.resources import Resource

Predicate = Callable[[dict[str, Any]], bool]
_SET = re.compile(r"^\s*(\S+)\s+(in|notin)\s+\(([^)]*)\)\s*$")
# Which fields of a built-in kind may be selected by; of custom ones only name and namespace.
_FIELDS = {
    "pods": ("spec.nodeName", "spec.serviceAccountName", "status.phase", "status.podIP"),
    "secrets": ("type",),
    "nodes": ("spec.unschedulable",),
    "namespaces": ("status.phase",),
    "certificatesigningrequests": ("spec.signerName",),
    "clustertrustbundles": ("spec.signerName",),
    "events": ("involvedObject.name", "involvedObject.namespace", "involvedObject.kind", "reason"),
}


def predicate(resource: Resource, labels: str, fields: str) -> Predicate:
    """Whether an object is selected."""
    checks = [_label(part) for part in _split(labels)]
    checks += [_field(resource, part) for part in _split(fields)]
    return lambda obj: all(check(obj) for check in checks)


def _split(text: str) -> list[str]:
    """At the commas that are not within parentheses."""
    return [part for part in re.split(r",(?![^(]*\))", text) if part.strip()]


def _labels(obj: dict[str, Any]) -> dict[str, str]:
    return obj["metadata"].get("labels") or {}


def _label(text: str) -> Predicate:
    if match := _SET.match(text):
        name, operator, listed = match.groups()
        values = {one.strip() for one in listed.split(",")}
        if operator == "in":
            return lambda obj: _labels(obj).get(name) in values
        return lambda obj: _labels(obj).get(name) not in values
    text = text.strip()
    if "!=" in text:
        name, _, value = text.partition("!=")
        return lambda obj: _labels(obj).get(name.strip()) != value.strip()
    if "=" in text:
        name, value = re.split(r"==?", text, maxsplit=1)
        return lambda obj: _labels(obj).get(name.strip()) == value.strip()
    if text.startswith("!"):
        return lambda obj: text[1:].strip() not in _labels(obj)
    return lambda obj: text in _labels(obj)


def _field(resource: Resource, text: str) -> Predicate:
    negate = "!=" in text
    name, value = re.split(r"!=|==?", text, maxsplit=1)
    known = ("metadata.name", "metadata.namespace", *_FIELDS.get(resource.plural, ()))
    if name not in known:
        raise bad_request(f"field label not supported: {name}")

    def check(obj: dict[str, Any]) -> bool:
        found: Any = obj
        for step in name.split("."):
            found = found.get(step) if isinstance(found, dict) else None
        return (str(found or "") == value) != negate

    return check
