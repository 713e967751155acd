"""Structural schemas of custom resources (crds): defaults, pruning, and the simple validations."""

from __future__ import annotations

import re
from typing import Any

Cause = tuple[str, str, str]
_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}


def prune(value: Any, schema: dict[str, Any], *, root: bool = True) -> Any:
    """Without the fields that the schema does not name (crds, "Field pruning")."""
    if isinstance(value, dict):
        if schema.get("x-kubernetes-preserve-unknown-fields"):
            return value
        properties = schema.get("properties", {})
        more = schema.get("additionalProperties")
        kept = {}
        for name, one in value.items():
            if root and name in ("apiVersion", "kind", "metadata"):
                kept[name] = one
            elif name in properties:
                kept[name] = prune(one, properties[name], root=False)
            elif isinstance(more, dict):
                kept[name] = prune(one, more, root=False)
            elif more is True:
                kept[name] = one
        return kept
    if isinstance(value, list) and "items" in schema:
        return [prune(one, schema["items"], root=False) for one in value]
    return value


def undeclared(
    value: Any, schema: dict[str, Any], path: str = "", *, root: bool = True
) -> list[str]:
    """Where a value has fields that the schema does not name; apply refuses those, as
    structured-merge-diff does, where every other write prunes them."""
    found: list[str] = []
    if isinstance(value, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        properties, more = schema.get("properties", {}), schema.get("additionalProperties")
        for name, one in value.items():
            if root and name in ("apiVersion", "kind", "metadata"):
                continue
            inner = properties.get(name, more)
            if inner is None:
                found.append(f"{path}.{name}: field not declared in schema")
            elif isinstance(inner, dict):
                found += undeclared(one, inner, f"{path}.{name}", root=False)
    elif isinstance(value, list):
        keys = schema.get("x-kubernetes-list-map-keys")
        for index, one in enumerate(value):
            named = ",".join(f'{key}="{one[key]}"' for key in keys or () if key in one)
            at = f"{path}[{named or index}]"
            found += undeclared(one, schema.get("items", {}), at, root=False)
    return found


def default(value: Any, schema: dict[str, Any]) -> Any:
    """With defaults filled in (crds, "Defaulting"): also where a null is not allowed."""
    if isinstance(value, dict):
        result = dict(value)
        for name, one in schema.get("properties", {}).items():
            absent = name not in result or (result[name] is None and not one.get("nullable"))
            if absent and "default" in one:
                result[name] = one["default"]
            if name in result:
                result[name] = default(result[name], one)
        more = schema.get("additionalProperties")
        if isinstance(more, dict):
            for name in result.keys() - schema.get("properties", {}).keys():
                result[name] = default(result[name], more)
        return result
    if isinstance(value, list) and "items" in schema:
        return [default(one, schema["items"]) for one in value]
    return value


def validate(value: Any, schema: dict[str, Any], path: str = "") -> list[Cause]:
    """What breaks the schema: types, required, enum, bounds, patterns, unique keys."""
    causes: list[Cause] = []

    def wrong(message: str, reason: str = "FieldValueInvalid", at: str = path) -> None:
        causes.append((at or "<nil>", reason, message))

    if schema.get("x-kubernetes-int-or-string"):
        return causes
    expected = schema.get("type")
    if expected and (
        not isinstance(value, _TYPES[expected])
        or (isinstance(value, bool) and expected in ("integer", "number"))
    ):
        wrong(f"Invalid value: must be of type {expected}", "FieldValueTypeInvalid")
        return causes
    if "enum" in schema and value not in schema["enum"]:
        known = ", ".join(f'"{one}"' for one in schema["enum"])
        wrong(f"Unsupported value: supported values: {known}", "FieldValueNotSupported")
    if isinstance(value, str):
        if len(value) < schema.get("minLength", 0) or len(value) > schema.get("maxLength", 2**63):
            wrong("Invalid value: bad length")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            wrong(f"Invalid value: should match '{schema['pattern']}'")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            wrong("Invalid value: out of range")
    elif isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 2**63):
            wrong("Invalid value: bad number of items")
        for index, one in enumerate(value):
            causes += validate(one, schema.get("items", {}), f"{path}[{index}]")
        causes += _duplicates(value, schema, path)
    elif isinstance(value, dict):
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in value:
                at = f"{path}.{name}" if path else name
                wrong("Required value", "FieldValueRequired", at)
        more = schema.get("additionalProperties")
        if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 2**63):
            wrong("Invalid value: bad number of properties")
        for name, one in value.items():
            inner = properties.get(name, more if isinstance(more, dict) else None)
            if inner is not None and not (one is None and inner.get("nullable")):
                causes += validate(one, inner, f"{path}.{name}" if path else name)
    return causes


def _duplicates(value: list[Any], schema: dict[str, Any], path: str) -> list[Cause]:
    keys = schema.get("x-kubernetes-list-map-keys")
    if schema.get("x-kubernetes-list-type") == "set":
        found = value
    elif keys:
        found = [tuple(one.get(key) for key in keys) for one in value if isinstance(one, dict)]
    else:
        return []
    return [
        (f"{path}[{index}]", "FieldValueDuplicate", "Duplicate value")
        for index, one in enumerate(found)
        if one in found[:index]
    ]
