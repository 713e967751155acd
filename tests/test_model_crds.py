"""The models and checks against the published CRDs: field by field, rule by rule.

Reads ../shared/gateway-api/crds and skips without it; what the comparison itself notices is tested
on small schemas that stand here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import msgspec
import pytest
import yaml

from mesh.model.backendtlspolicy import SubjectAltName
from mesh.model.decode import KINDS, RULES
from mesh.model.meta import Model
from mesh.model.references import GROUP
from mesh.model.rules_core import CHECKS as CORE_CHECKS
from mesh.model.rules_policy import CHECKS as POLICY_CHECKS
from mesh.model.schema import hints, required, unwrap, wire_names

CRDS = Path(__file__).parents[2] / "shared/gateway-api/crds"

# Rules that the schema part of the models already enforces: enums and list-map keys.
BY_SCHEMA = {
    "type must be one of ['Exact', 'PathPrefix', 'RegularExpression']",
    "Listener name must be unique within the Gateway",
    "Port for TLS configuration must be unique within the Gateway",
}
# Rules of the standard channel whose place another rule takes in the experimental one.
SAME_PARENT = "when parentRefs includes 2 or more references to the same parent"
SUPERSEDED = {
    f"sectionName must be {what} {SAME_PARENT}": f"sectionName or port must be {what} {SAME_PARENT}"
    for what in ("specified", "unique")
}
# Patterns written otherwise in the models because Python's engine backtracks.
EQUAL_PATTERNS = {r"^[!-~]+([\t ]?[!-~]+)*$": r"^[!-~]+([\t ][!-~]+)*$"}
# The check that stands for this oneOf.
IP_RULE = "an IPAddress must be of format ipv4 or ipv6"
IP_SCHEMA = [
    {
        "properties": {
            "type": {"enum": ["IPAddress"]},
            "value": {"anyOf": [{"format": "ipv4"}, {"format": "ipv6"}]},
        }
    },
    {"properties": {"type": {"not": {"enum": ["IPAddress"]}}}},
]
BOUNDS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
# How lists and objects merge on the server; nothing that an object can break.
# Of kinds whose rules stand in no CRD of these.
OTHERS = CORE_CHECKS + POLICY_CHECKS
NO_CONSTRAINTS = {"description", "x-kubernetes-map-type"}
KNOWN = {
    "type",
    "properties",
    "required",
    "items",
    "additionalProperties",
    "enum",
    "pattern",
    "format",
    "default",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "oneOf",
    "x-kubernetes-validations",
    "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys",
}


class Comparison:
    """Compares a schema with a model; `differences` are lines for people. `channel` standard may
    lack fields, enum values and constraints that the models take from the experimental one."""

    def __init__(self, standard: bool) -> None:
        self.standard = standard
        self.differences: list[str] = []
        # (model, field, rule) of every rule that was met and has a check.
        self.met: set[tuple[type[Model], str | None, str]] = set()

    def model(self, schema: dict[str, Any], model: type[Model], path: str) -> None:
        names, fields = wire_names(model), msgspec.structs.fields(model)
        defaults = {field.encode_name: field for field in fields}
        properties = schema.get("properties", {})
        top = {"apiVersion", "kind", "metadata"} if not path else set()
        for name in properties.keys() - names.keys():
            self.note(f"{path}.{name}", "no such field in the model")
        if not self.standard:
            for name in names.keys() - properties.keys():
                self.note(f"{path}.{name}", "no such field in the schema")
        wanted, given = set(schema.get("required", ())) - top, required(model) - top
        if self.standard:
            given = given & properties.keys()
        if wanted != given:
            self.note(path, f"required {sorted(wanted)}, the model {sorted(given)}")
        for name, inner in properties.items():
            if name in top or name not in names:
                continue
            hint = hints(model)[names[name]]
            self.value(inner, hint, f"{path}.{name}", (model, names[name]))
            self.default(inner, hint, defaults[name], f"{path}.{name}")

    def default(self, schema: dict[str, Any], hint: Any, field: Any, path: str) -> None:
        if field.required:
            if "default" in schema:
                self.note(path, "a default that the model lacks")
            return
        ours = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        if "default" not in schema:
            if ours is not None and ours not in ((), {}):
                self.note(path, f"no default, the model {ours!r}")
        elif msgspec.convert(schema["default"], hint) != ours:
            self.note(path, f"default {schema['default']!r}, the model {ours!r}")

    def value(
        self, schema: dict[str, Any], hint: Any, path: str, owner: tuple[type[Model], str]
    ) -> None:
        """One schema against one type; `owner` is the model and attribute it hangs on."""
        for keyword in schema.keys() - KNOWN - NO_CONSTRAINTS:
            self.note(path, f"keyword {keyword} is not compared")
        bare, metas = unwrap(hint)
        meta = {
            name: value
            for one in metas
            for name in ("min_length", "max_length", "ge", "le", "pattern", "extra")
            if (value := getattr(one, name)) is not None
        }
        is_model = isinstance(bare, type) and issubclass(bare, Model)
        self.rules(schema, (bare, None) if is_model else owner, path)
        match schema.get("type"):
            case "object" if "additionalProperties" in schema:
                if get_origin(bare) is not dict:
                    self.note(path, f"a map, the model {bare}")
                    return
                self.equal(
                    path, "maxProperties", schema.get("maxProperties"), meta.get("max_length")
                )
                self.value(schema["additionalProperties"], get_args(bare)[1], f"{path}{{}}", owner)
            case "object":
                if not is_model:
                    self.note(path, f"an object, the model {bare}")
                    return
                self.model(schema, bare, path)
            case "array":
                if get_origin(bare) is not tuple:
                    self.note(path, f"an array, the model {bare}")
                    return
                extra = meta.get("extra", {})
                keys = tuple(schema.get("x-kubernetes-list-map-keys", ()))
                self.equal(path, "minItems", schema.get("minItems"), meta.get("min_length"))
                self.equal(path, "maxItems", schema.get("maxItems"), meta.get("max_length"))
                self.equal(path, "list-map-keys", keys, extra.get("list_map_keys", ()))
                unique = schema.get("x-kubernetes-list-type") == "set"
                self.equal(path, "list-type set", unique, extra.get("set", False))
                self.value(schema["items"], get_args(bare)[0], f"{path}[]", owner)
            case "string" | "integer" | "boolean" as kind:
                self.scalar(schema, kind, bare, meta, path)
            case other:
                self.note(path, f"type {other} is not compared")

    def scalar(
        self, schema: dict[str, Any], kind: str, bare: Any, meta: dict[str, Any], path: str
    ) -> None:
        base = {"string": str, "integer": int, "boolean": bool}[kind]
        if get_origin(bare) is Literal:
            ours, theirs = set(get_args(bare)), set(schema.get("enum", ()))
            if theirs != ours and not (self.standard and theirs and theirs < ours):
                self.note(path, f"enum {sorted(theirs)}, the model {sorted(ours)}")
        else:
            self.equal(path, "type", base, bare)
            self.equal(path, "enum", schema.get("enum"), None)
        self.equal(path, "minLength", schema.get("minLength") or None, meta.get("min_length"))
        self.equal(path, "maxLength", schema.get("maxLength"), meta.get("max_length"))
        if kind == "integer" and get_origin(bare) is not Literal:
            low, high = BOUNDS[schema.get("format", "int64")]
            self.equal(path, "minimum", schema.get("minimum", low), meta.get("ge"))
            self.equal(path, "maximum", schema.get("maximum", high), meta.get("le"))
        elif schema.get("format") not in (None, "date-time"):
            self.note(path, f"format {schema['format']} is not compared")
        pattern = meta.get("pattern", "").replace(r"\Z", "$")
        if schema.get("format") == "date-time":
            self.equal(path, "date-time", True, r"[Tt]([01]\d|2[0-3])" in pattern)
            return
        theirs = schema.get("pattern", "")
        if self.standard and not theirs and pattern in EQUAL_PATTERNS.values():
            return
        self.equal(path, "pattern", EQUAL_PATTERNS.get(theirs, theirs), pattern)

    def rules(
        self, schema: dict[str, Any], owner: tuple[type[Model], str | None], path: str
    ) -> None:
        messages = [rule["message"] for rule in schema.get("x-kubernetes-validations", ())]
        if "oneOf" in schema:
            self.equal(path, "oneOf", IP_SCHEMA, schema["oneOf"])
            messages.append(IP_RULE)
        have = {(check.model, check.field, check.rule) for check in RULES.checks}
        have |= {(rule.model, rule.field, rule.rule) for rule in RULES.transitions}
        for message in messages:
            if self.standard:
                message = SUPERSEDED.get(message, message)
            if (*owner, message) in have:
                self.met.add((*owner, message))
            elif message not in BY_SCHEMA:
                self.note(path, f"no check for the rule {message!r}")

    def equal(self, path: str, what: str, theirs: Any, ours: Any) -> None:
        if theirs != ours:
            self.note(path, f"{what} {theirs!r}, the model {ours!r}")

    def note(self, path: str, text: str) -> None:
        self.differences.append(f"{path or '.'}: {text}")


class Published(NamedTuple):
    channel: str
    kind: str
    scope: str
    version: str
    schema: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.channel}-{self.kind}-{self.version}"


def published() -> Iterator[Published]:
    """Every served version of every CRD of our kinds."""
    for file in sorted(CRDS.glob(f"*/{GROUP}_*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            if document and document["kind"] == "CustomResourceDefinition":
                spec = document["spec"]
                kind = spec["names"]["kind"]
                for version in spec["versions"] if (GROUP, kind) in KINDS else ():
                    schema = version["schema"]["openAPIV3Schema"]
                    if version["served"]:
                        yield Published(
                            file.parent.name, kind, spec["scope"], version["name"], schema
                        )


ALL = list(published())
shared = pytest.mark.skipif(not ALL, reason="../shared/gateway-api is not here")


@shared
@pytest.mark.parametrize("crd", ALL, ids=str)
def test_model_equals_schema(crd: Published) -> None:
    info = KINDS[GROUP, crd.kind]
    assert crd.version in info.versions
    assert (crd.scope == "Namespaced") == info.namespaced
    comparison = Comparison(standard=crd.channel == "standard")
    comparison.model(crd.schema, info.model, "")
    assert comparison.differences == []


@shared
def test_every_kind_and_version_is_published() -> None:
    ours = {(info.kind, v) for (g, _), info in KINDS.items() for v in info.versions if g == GROUP}
    assert ours == {(crd.kind, crd.version) for crd in ALL}


@shared
def test_no_check_without_a_rule() -> None:
    met = set()
    for crd in ALL:
        comparison = Comparison(standard=crd.channel == "standard")
        comparison.model(crd.schema, KINDS[GROUP, crd.kind].model, "")
        met |= comparison.met
    checks = (*RULES.checks, *RULES.transitions)
    extra = {(c.model, c.field, c.rule) for c in checks if c not in OTHERS} - met
    assert extra == set()


SAN = {
    "type": "object",
    "required": ["type"],
    "properties": {
        "type": {"type": "string", "enum": ["Hostname", "URI"]},
        "hostname": {
            "type": "string",
            "minLength": 1,
            "maxLength": 253,
            "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
        },
        "uri": {
            "type": "string",
            "minLength": 1,
            "maxLength": 253,
            "pattern": r"^(([^:/?#]+):)(//([^/?#]*))([^?#]*)(\?([^#]*))?(#(.*))?",
        },
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """SAN with one place of it replaced."""
    schema = msgspec.json.decode(msgspec.json.encode(SAN))
    *parents, last = path.split("/")
    place = schema
    for name in parents:
        place = place[name]
    place[last] = value
    return schema


@pytest.mark.parametrize(
    ("path", "value", "difference"),
    [
        ("properties/more", {"type": "string"}, ".more: no such field in the model"),
        ("required", ["type", "uri"], ".: required ['type', 'uri'], the model ['type']"),
        ("properties/type/enum", ["URI"], ".type: enum ['URI'], the model ['Hostname', 'URI']"),
        ("properties/uri/maxLength", 9, ".uri: maxLength 9, the model 253"),
        ("properties/uri/minLength", 0, ".uri: minLength None, the model 1"),
        ("properties/uri/type", "boolean", ".uri: type <class 'bool'>, the model <class 'str'>"),
        ("properties/uri/default", "a://b", ".uri: default 'a://b', the model None"),
        ("properties/uri/format", "ipv4", ".uri: format ipv4 is not compared"),
        ("properties/uri/multipleOf", 2, ".uri: keyword multipleOf is not compared"),
        (
            "properties/hostname/x-kubernetes-validations",
            [{"rule": "self != 'x'", "message": "not x"}],
            ".hostname: no check for the rule 'not x'",
        ),
    ],
)
def test_comparison_notices(path: str, value: Any, difference: str) -> None:
    same, other = Comparison(standard=False), Comparison(standard=False)
    same.model(SAN, SubjectAltName, "")
    other.model(changed(path, value), SubjectAltName, "")
    assert same.differences == []
    assert difference in other.differences
