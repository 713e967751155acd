"""The checks against the CRDs' own CEL rules, evaluated by a CEL interpreter on the examples of all
checks and on random changes of them. Skips without ../shared or cel-python."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mesh.model.decode import KINDS, RULES, InvalidObject, parse
from mesh.model.references import GROUP
from tests.model_cases import CASES

celpy = pytest.importorskip("celpy")
celtypes = pytest.importorskip("celpy.celtypes")

CRDS = Path(__file__).parents[2] / "shared/gateway-api/crds/experimental"
pytestmark = pytest.mark.skipif(not CRDS.is_dir(), reason="../shared/gateway-api is not here")

# Enforced as list-map keys, which the walk below does not evaluate.
BY_LIST_KEYS = {
    "Listener name must be unique within the Gateway",
    "Port for TLS configuration must be unique within the Gateway",
}
# The enum of the schema refuses first.
UNREACHABLE = {"type must be one of ['Exact', 'PathPrefix', 'RegularExpression']"}
# Checks that stand for schema keywords.
BY_SCHEMA = ("x-kubernetes-list", "an IPAddress must be of format")
# CEL's `true || error` is true; the interpreter lets an error inside exists_one through.
ONE_NAME = "self.exists_one(l2, has(l2.name) && l1.name == l2.name)"
REWRITTEN = {
    f"self.all(l1, !has(l1.name) || {ONE_NAME})": f"self.all(l1, has(l1.name) ? {ONE_NAME} : true)"
}
# Random changes per kind, spread over its examples.
CHANGES = 200

ENVIRONMENT = celpy.Environment()


def split(text: Any, separator: Any) -> Any:
    """Kubernetes' string extension, which the interpreter lacks."""
    return celtypes.ListType([celtypes.StringType(part) for part in text.split(separator)])


@cache
def program(rule: str) -> Any:
    rule = REWRITTEN.get(rule.strip(), rule)
    return ENVIRONMENT.program(ENVIRONMENT.compile(rule), functions={"split": split})


@cache
def holds(rule: str, value: str) -> bool:
    """Whether the rule holds of a value, given as JSON so that equal ones are judged once. As on
    the API server, a rule that cannot be evaluated does not hold."""
    try:
        return bool(program(rule).evaluate({"self": celpy.json_to_cel(json.loads(value))}))
    except celpy.CELEvalError:
        return False


def escaped(value: Any) -> Any:
    """CEL's reserved words are written with underscores around them."""
    if isinstance(value, dict):
        return {("__namespace__" if k == "namespace" else k): escaped(v) for k, v in value.items()}
    return [escaped(item) for item in value] if isinstance(value, list) else value


@cache
def schema_of(kind: str) -> dict[str, Any]:
    for file in CRDS.glob(f"{GROUP}_*.yaml"):
        for document in yaml.load_all(file.read_text(), yaml.CSafeLoader):
            if document["kind"] == "CustomResourceDefinition":
                spec = document["spec"]
                if spec["names"]["kind"] == kind:
                    (version,) = (v for v in spec["versions"] if v["storage"])
                    return version["schema"]["openAPIV3Schema"]
    raise LookupError(kind)


def defaulted(schema: dict[str, Any], value: Any) -> Any:
    """The value with the schema's defaults, as the API server fills them in."""
    if isinstance(value, dict) and "properties" in schema:
        filled = dict(value)
        for name, inner in schema["properties"].items():
            if name not in filled and "default" in inner:
                filled[name] = inner["default"]
            if name in filled:
                filled[name] = defaulted(inner, filled[name])
        return filled
    if isinstance(value, list):
        return [defaulted(schema["items"], item) for item in value]
    return value


def broken(schema: dict[str, Any], value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Path and message of every CEL rule that does not hold."""
    rules = schema.get("x-kubernetes-validations", ())
    text = json.dumps(escaped(value)) if rules else ""
    for rule in rules:
        known = "oldSelf" in rule["rule"] or rule["message"] in BY_LIST_KEYS
        if not known and not holds(rule["rule"], text):
            yield path, rule["message"]
    if isinstance(value, dict):
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                yield from broken(inner, value[name], f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from broken(schema["items"], item, f"{path}[{index}]")


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a manifest's data."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from nodes(inner)


def pool(manifests: list[Any]) -> dict[str, list[Any]]:
    """All values that stand under a name anywhere."""
    values: dict[str, list[Any]] = {}
    for manifest in manifests:
        for container, key in nodes(manifest["spec"]):
            if isinstance(key, str):
                values.setdefault(key, []).append(container[key])
    return values


def change(chance: random.Random, manifest: Any, values: dict[str, list[Any]]) -> None:
    """One to three random edits: a field removed, added or replaced, a list's item repeated, a list
    emptied."""
    for _ in range(chance.randint(1, 3)):
        places = list(nodes(manifest["spec"]))
        if not places:
            return
        container, key = chance.choice(places)
        edit = chance.randrange(5)
        if edit == 0 and isinstance(container, dict):
            del container[key]
        elif edit == 1 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif edit == 2 and isinstance(container[key], list):
            container[key] = []
        elif edit == 3 and isinstance(container, dict):
            name = chance.choice(sorted(values))
            container[name] = copy.deepcopy(chance.choice(values[name]))
        elif isinstance(key, str) and key in values:
            container[key] = copy.deepcopy(chance.choice(values[key]))


@pytest.mark.parametrize("kind", sorted(kind for group, kind in KINDS if group == GROUP))
def test_checks_agree_with_cel(kind: str) -> None:
    chance = random.Random(kind)
    manifests = [m for case in CASES for m in (case.good, case.bad) if m["kind"] == kind]
    values = pool(manifests)
    schema = schema_of(kind)
    compared, refused = 0, set()
    each = -(-CHANGES // max(1, len(manifests)))
    for manifest in manifests:
        changed = [copy.deepcopy(manifest) for _ in range(each)]
        for raw in changed:
            change(chance, raw, values)
        for raw in (manifest, *changed):
            try:
                obj = parse(raw)
            except InvalidObject:
                continue
            theirs = sorted(set(broken(schema, defaulted(schema, raw), "")))
            ours = sorted(
                {
                    (error.path, error.rule)
                    for error in RULES.errors(obj)
                    if not error.rule.startswith(BY_SCHEMA)
                }
            )
            assert ours == theirs, raw
            compared += 1
            refused |= {message for _, message in theirs}
    assert compared >= len(manifests) // 2
    # The comparison has seen every rule refuse something.
    skipped = BY_LIST_KEYS | UNREACHABLE | {rule.rule for rule in RULES.transitions}
    assert messages(schema) - skipped == refused


def messages(schema: Any) -> set[str]:
    """The messages of all rules of a schema."""
    found = {rule["message"] for rule in schema.get("x-kubernetes-validations", ())}
    for inner in (*schema.get("properties", {}).values(), schema.get("items")):
        if inner:
            found |= messages(inner)
    return found
