"""From plain data to objects and back: schema errors, defaults, names, Secrets, selectors."""

from __future__ import annotations

import base64
import contextlib
import copy
import datetime
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mesh.model.core import Secret
from mesh.model.decode import (
    KINDS,
    FieldError,
    InvalidObject,
    UnsupportedKind,
    decode,
    encode,
    key_of,
)
from mesh.model.gateway import Gateway
from mesh.model.httproute import HTTPPathMatch, HTTPRoute, HTTPRouteMatch
from mesh.model.meta import LabelSelector, LabelSelectorRequirement, ObjectKey, parse_duration
from mesh.model.scalars import WILDCARD_DOMAIN, HeaderValue
from mesh.model.schema import unwrap

CONFORMANCE = Path(__file__).parents[2] / "shared/gateway-api/conformance"

ROUTE: dict[str, Any] = {
    "apiVersion": "gateway.networking.k8s.io/v1",
    "kind": "HTTPRoute",
    "metadata": {"name": "a", "namespace": "b", "labels": {"app": "x"}},
    "spec": {
        "parentRefs": [{"name": "gw"}],
        "hostnames": ["a.example.com"],
        "rules": [{"backendRefs": [{"name": "s", "port": 80}]}],
    },
}
SECRET: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "s"},
    "data": {"one": base64.b64encode(b"hunter2").decode()},
    "stringData": {"two": "correct horse"},
}


def put(raw: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`raw` with the value at a path of keys and indexes replaced, "a/0/b"; Ellipsis removes it."""
    raw = copy.deepcopy(raw)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place: Any = raw
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return raw


def errors(raw: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidObject) as refused:
        decode(raw)
    assert all(error.message for error in refused.value.errors)
    return [(error.path, error.rule) for error in refused.value.errors]


# --- schema --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("spec", ..., ("spec", "required")),
        ("metadata", ..., ("metadata", "required")),
        ("metadata", [], ("metadata", "type: object")),
        ("spec", None, ("spec", "required")),
        ("spec/rules", {}, ("spec.rules", "type: array")),
        ("spec/rules", [], ("spec.rules", "minItems: 1")),
        ("spec/rules", [{}] * 17, ("spec.rules", "maxItems: 16")),
        ("spec/rules/0", "x", ("spec.rules[0]", "type: object")),
        ("spec/rules/0", None, ("spec.rules[0]", "type: object")),
        ("spec/rules/0/route", 1, ("spec.rules[0].route", "unknown field")),
        ("spec/parentRefs/0/name", ..., ("spec.parentRefs[0].name", "required")),
        ("spec/parentRefs/0/name", "", ("spec.parentRefs[0].name", "minLength: 1")),
        ("spec/parentRefs/0/name", 1, ("spec.parentRefs[0].name", "type: string")),
        ("spec/hostnames/0", "a" * 254, ("spec.hostnames[0]", "maxLength: 253")),
        (
            "spec/hostnames/0",
            "a.example\n",
            (
                "spec.hostnames[0]",
                f"pattern: {WILDCARD_DOMAIN}".replace(r"\Z", "$"),
            ),
        ),
        (
            "spec/useDefaultGateways",
            "Some",
            ("spec.useDefaultGateways", "must be one of All, None"),
        ),
        (
            "spec/rules/0/backendRefs/0/port",
            0,
            ("spec.rules[0].backendRefs[0].port", "minimum: 1"),
        ),
        (
            "spec/rules/0/backendRefs/0/port",
            65536,
            ("spec.rules[0].backendRefs[0].port", "maximum: 65535"),
        ),
        (
            "spec/rules/0/backendRefs/0/port",
            "80",
            ("spec.rules[0].backendRefs[0].port", "type: integer"),
        ),
        (
            "spec/rules/0/backendRefs/0/port",
            True,
            ("spec.rules[0].backendRefs[0].port", "type: integer"),
        ),
        ("metadata/labels", {"a": 1}, ("metadata.labels[a]", "type: string")),
        ("metadata/labels", {1: "a"}, ("metadata.labels", "keys must be strings")),
        (
            "metadata/annotations",
            {"a": "\ud800"},
            ("metadata.annotations[a]", "text must be Unicode"),
        ),
        ("metadata/annotations", {"\ud800": ""}, ("metadata.annotations", "keys must be Unicode")),
        ("spec/\ud800\n", 1, (r"spec.'\ud800\n'", "unknown field")),
        (
            "metadata/managedFields",
            [{"fieldsV1": {"f": 2**70}}],
            ("", "text must be Unicode, integers fit into 64 bits, nesting be shallow"),
        ),
        (
            "spec/rules/0/filters",
            [{"type": "RequestRedirect", "requestRedirect": {"statusCode": "301"}}],
            ("spec.rules[0].filters[0].requestRedirect.statusCode", "type: integer"),
        ),
        (
            "spec/rules/0/filters",
            [{"type": "RequestRedirect", "requestRedirect": {"statusCode": 304}}],
            (
                "spec.rules[0].filters[0].requestRedirect.statusCode",
                "must be one of 301, 302, 303, 307, 308",
            ),
        ),
        ("metadata/labels", {"a": None}, ("metadata.labels[a]", "type: string")),
        (
            "metadata/creationTimestamp",
            datetime.datetime(2026, 1, 1),
            ("metadata.creationTimestamp", "type: string"),
        ),
    ],
)
def test_schema_error(path: str, value: Any, expected: tuple[str, str]) -> None:
    assert errors(put(ROUTE, path, value)) == [expected]


def test_all_schema_errors_at_once() -> None:
    raw = put(put(put(ROUTE, "spec/hostnames/0", 1), "spec/x", 2), "spec/parentRefs/0/name", "")
    assert [path for path, _ in errors(raw)] == [
        "spec.parentRefs[0].name",
        "spec.hostnames[0]",
        "spec.x",
    ]


def test_value_of_two_types() -> None:
    raw = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "s"},
        "spec": {"ports": [{"port": 80, "targetPort": 1.5}]},
    }
    assert errors(raw) == [("spec.ports[0].targetPort", "type: integer or string")]


def test_nesting_without_end_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert errors(put(ROUTE, "spec/rules/0", {"filters": [deep]})) == [
        ("spec.rules[0].filters[0]", "type: object")
    ]


def test_message_says_what_was_found() -> None:
    raw = put(ROUTE, "spec/rules/0/backendRefs/0/name", 80)
    with pytest.raises(InvalidObject) as refused:
        decode(raw)
    assert str(refused.value) == (
        "spec.rules[0].backendRefs[0].name: type: string: found 80, which YAML reads as int; put it"
        " in quotes"
    )


@pytest.mark.parametrize("raw", [None, [], "x", 1])
def test_not_an_object(raw: Any) -> None:
    assert errors(raw) == [("", "type: object")]


def test_object_without_kind() -> None:
    assert errors({"metadata": {}}) == [("apiVersion", "required"), ("kind", "required")]


@pytest.mark.parametrize(
    ("api_version", "kind"),
    [
        ("apps/v1", "Deployment"),
        ("gateway.networking.k8s.io/v1", "TLSRoute"),
        ("gateway.networking.k8s.io/v1alpha2", "HTTPRoute"),
        ("v1", "HTTPRoute"),
        ("v2", "Service"),
    ],
)
def test_unsupported(api_version: str, kind: str) -> None:
    with pytest.raises(UnsupportedKind) as refused:
        decode({**ROUTE, "apiVersion": api_version, "kind": kind})
    assert (refused.value.api_version, refused.value.kind) == (api_version, kind)


def test_every_served_version_decodes() -> None:
    for version in ("v1", "v1beta1"):
        route = decode({**ROUTE, "apiVersion": f"gateway.networking.k8s.io/{version}"})
        assert route.api_version == f"gateway.networking.k8s.io/{version}"


def test_null_is_absent_and_defaults_apply() -> None:
    raw = put(put(ROUTE, "spec/rules/0/backendRefs/0/weight", None), "spec/rules/0/matches", None)
    raw = put(put(raw, "metadata/creationTimestamp", None), "status", None)
    route = decode(raw)
    assert route == decode(ROUTE)
    assert isinstance(route, HTTPRoute)
    assert route.spec.rules[0].backend_refs[0].weight == 1
    assert route.spec.rules[0].matches == (
        HTTPRouteMatch(path=HTTPPathMatch(type="PathPrefix", value="/")),
    )


def test_defaults_of_a_listener() -> None:
    gateway = decode(
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": {"name": "gw"},
            "spec": {
                "gatewayClassName": "weft",
                "listeners": [{"name": "a", "port": 80, "protocol": "HTTP"}],
                "allowedListeners": {},
            },
        }
    )
    assert isinstance(gateway, Gateway)
    (listener,) = gateway.spec.listeners
    assert listener.allowed_routes.namespaces.from_ == "Same"
    assert gateway.spec.allowed_listeners is not None
    assert gateway.spec.allowed_listeners.namespaces.from_ == "None"
    assert [condition.type for condition in gateway.status.conditions] == ["Accepted", "Programmed"]


def test_header_value_pattern_is_linear() -> None:
    # With the CRD's own form of this pattern this test would not end.
    _, (constraints,) = unwrap(HeaderValue)
    value = "a" * 4000 + "\x01"
    raw = put(ROUTE, "spec/rules/0/matches", [{"headers": [{"name": "x", "value": value}]}])
    ((path, rule),) = errors(raw)
    assert path == "spec.rules[0].matches[0].headers[0].value"
    assert rule == f"pattern: {constraints.pattern}".replace(r"\Z", "$")


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("Namespace", "a-1", "a.b"),
        ("Namespace", "a" * 63, "a" * 64),
        ("Service", "a-1", "1a"),
        ("ConfigMap", "a.b-c", "A"),
        ("ConfigMap", "a" * 253, "a" * 254),
        ("Secret", "0", "-a"),
        ("Secret", "a.b", "a..b"),
        ("Secret", "a", "a\n"),
    ],
)
def test_object_names(kind: str, good: str, bad: str) -> None:
    raw = {"apiVersion": "v1", "kind": kind, "spec": {"clusterIP": "None"}}
    if kind != "Service":
        del raw["spec"]
    assert decode({**raw, "metadata": {"name": good}}).metadata.name == good
    ((path, rule),) = errors({**raw, "metadata": {"name": bad}})
    assert path == "metadata.name"
    assert "DNS-1" in rule


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("metadata/name", ..., "metadata.name"),
        ("metadata/namespace", "a.b", "metadata.namespace"),
        ("metadata/labels", {"a/b/c": ""}, "metadata.labels[a/b/c]"),
        ("metadata/labels", {"a": "-"}, "metadata.labels[a]"),
        ("metadata/labels", {"a": "b" * 64}, "metadata.labels[a]"),
        ("metadata/annotations", {"a b": ""}, "metadata.annotations[a b]"),
        ("metadata/annotations", {"a": "b" * 262144}, "metadata.annotations"),
    ],
)
def test_metadata(path: str, value: Any, where: str) -> None:
    assert [path for path, _ in errors(put(ROUTE, path, value))] == [where]


def test_namespace_defaults_and_keys() -> None:
    assert key_of(decode(ROUTE)) == ObjectKey("b", "a")
    assert key_of(decode(put(ROUTE, "metadata/namespace", ...))) == ObjectKey("default", "a")
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}}
    assert key_of(decode(namespace)) == ObjectKey("", "a")
    assert [str(key_of(decode(raw))) for raw in (ROUTE, namespace)] == ["b/a", "a"]
    namespace["metadata"] = {"name": "a", "namespace": "b"}
    assert errors(namespace) == [("metadata.namespace", "must be absent")]


# --- Secrets -------------------------------------------------------------------------------------


def test_secret_is_decoded_and_merged() -> None:
    secret = decode(put(SECRET, "stringData/one", "over"))
    assert isinstance(secret, Secret)
    assert secret.data == {"one": b"over", "two": b"correct horse"}
    lines = put(SECRET, "data/one", "aHVu\ndGVyMg==\n")
    decoded = decode(lines)
    assert isinstance(decoded, Secret)
    assert decoded.data["one"] == b"hunter2"


def test_secret_shows_no_values() -> None:
    raw = put(SECRET, "metadata/annotations", {"last-applied": str(SECRET)})
    secret = decode(raw)
    shown = f"{secret!r} {secret} {list(secret.__rich_repr__())} {encode(secret)}"
    assert "one" in shown
    for value in ("hunter2", SECRET["data"]["one"], "correct horse"):
        assert value not in shown


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("data/one", "hunter2!", "data[one]"),
        ("data/one", "aHVudGVyMg", "data[one]"),
        ("data/one", ["hunter2"], "data[one]"),
        ("data/one", 123456789, "data[one]"),
        ("data", "hunter2", "data"),
        ("data", ["hunter2"], "data"),
        ("stringData", "hunter2", "stringData"),
        ("stringData/two", 123456789, "data[two]"),
        ("immutable", "hunter2", "immutable"),
        ("spec", "hunter2", "spec"),
    ],
)
def test_secret_errors_show_no_values(path: str, value: Any, where: str) -> None:
    with pytest.raises(InvalidObject) as refused:
        decode(put(SECRET, path, value))
    assert [error.path for error in refused.value.errors] == [where]
    assert "hunter2" not in str(refused.value)
    assert "123456789" not in str(refused.value)
    assert refused.value.__suppress_context__ or refused.value.__context__ is None


def test_config_map_binary_data() -> None:
    raw = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "c"},
        "binaryData": {"a": "AAE="},
    }
    config = decode(raw)
    assert config.binary_data == {"a": b"\x00\x01"}
    assert encode(config)["binaryData"] == {"a": "AAE="}
    assert errors(put(raw, "binaryData/a", "!")) == [("binaryData[a]", "type: base64 text")]


# --- encode --------------------------------------------------------------------------------------


def test_encode_gives_names_of_manifests_and_keeps_meaning() -> None:
    raw = put(ROUTE, "spec/rules/0/matches", [])
    encoded = encode(decode(raw))
    assert encoded["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert encoded["metadata"] == raw["metadata"]
    assert encoded["spec"]["rules"] == [
        {
            "matches": [],
            "backendRefs": [{"group": "", "kind": "Service", "name": "s", "port": 80, "weight": 1}],
        }
    ]
    assert "status" not in encoded
    assert decode(encoded) == decode(raw)


# --- selectors and durations ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "values", "labels", "matches"),
    [
        ("In", ("x", "y"), {"a": "y"}, True),
        ("In", ("x", "y"), {"a": "z"}, False),
        ("In", ("x",), {}, False),
        ("NotIn", ("x",), {"a": "x"}, False),
        ("NotIn", ("x",), {"a": "y"}, True),
        ("NotIn", ("x",), {}, True),
        ("Exists", (), {"a": ""}, True),
        ("Exists", (), {"b": ""}, False),
        ("DoesNotExist", (), {"a": ""}, False),
        ("DoesNotExist", (), {}, True),
        ("Gt", ("1",), {"a": "2"}, False),
    ],
)
def test_selector_operator(
    operator: str, values: tuple[str, ...], labels: dict[str, str], matches: bool
) -> None:
    requirement = LabelSelectorRequirement(key="a", operator=operator, values=values)
    assert LabelSelector(match_expressions=(requirement,)).matches(labels) is matches


def test_selector_needs_all() -> None:
    exists = LabelSelectorRequirement(key="b", operator="Exists")
    selector = LabelSelector(match_labels={"a": "1"}, match_expressions=(exists,))
    assert selector.matches({"a": "1", "b": "2", "c": "3"})
    assert not selector.matches({"a": "1"})
    assert not selector.matches({"a": "2", "b": "2"})
    assert LabelSelector().matches({})


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("0s", 0),
        ("10ms", 10),
        ("1h30m", 5_400_000),
        ("1m", 60_000),
        ("99999h", 359_996_400_000),
        ("1s1s1ms1ms", 2_002),
    ],
)
def test_duration(text: str, milliseconds: int) -> None:
    assert parse_duration(text) == milliseconds


@pytest.mark.parametrize(
    "text", ["", "1", "s", "1.5s", "-1s", "100000s", "1s1s1s1s1s", "1s\n", "1d", " 1s", "١s"]
)
def test_not_a_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


# --- anything ------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([b"x", datetime.date(2026, 1, 1), "\ud800", 2**70])
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(SCALARS.filter(bool), inner, max_size=2)
    ),
    max_leaves=5,
)
PLACES = st.sampled_from(
    [
        "metadata",
        "metadata/name",
        "metadata/labels",
        "metadata/managedFields",
        "spec",
        "spec/hostnames",
        "spec/rules",
        "spec/rules/0",
        "spec/rules/0/backendRefs/0/port",
        "data",
        "stringData",
        "kind",
        "status",
    ]
)


@given(PLACES, ANYTHING, st.sampled_from(sorted(KINDS)))
def test_nothing_but_the_two_refusals(place: str, value: Any, kind: tuple[str, str]) -> None:
    group, name = kind
    whole = {**ROUTE, **SECRET, "spec": ROUTE["spec"], "metadata": ROUTE["metadata"]}
    raw = {**whole, "kind": name, "apiVersion": f"{group}/v1" if group else "v1"}
    if name != "Secret":
        raw = {k: v for k, v in raw.items() if k not in ("data", "stringData")}
    with contextlib.suppress(InvalidObject, UnsupportedKind):
        obj = decode(put(raw, place, value))
        assert isinstance(obj, Secret) or decode(encode(obj)) == obj


# --- conformance manifests -----------------------------------------------------------------------

PLACEHOLDERS = {
    "{GATEWAY_CLASS_NAME}": "weft",
    "{GATEWAY_CONTROLLER_NAME}": "weft.dev/gateway",
    "PLACEHOLDER_USABLE_ADDRS": "192.0.2.1",
    "PLACEHOLDER_UNUSABLE_ADDRS": "192.0.2.2",
}


@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="../shared/gateway-api is not here")
def test_conformance_manifests_decode() -> None:
    unsupported: Counter[str] = Counter()
    refused: list[tuple[str, tuple[FieldError, ...]]] = []
    decoded = 0
    for file in sorted(CONFORMANCE.rglob("*.yaml")):
        text = file.read_text()
        for placeholder, value in PLACEHOLDERS.items():
            text = text.replace(placeholder, value)
        for raw in filter(None, yaml.load_all(text, yaml.CSafeLoader)):
            try:
                obj = decode(raw)
                assert isinstance(obj, Secret) or decode(encode(obj)) == obj
                decoded += 1
            except UnsupportedKind as error:
                unsupported[error.kind] += 1
            except InvalidObject as error:
                refused.append((file.name, error.errors))
    assert refused == []
    assert decoded > 250
    assert unsupported.keys() <= {"Deployment", "TLSRoute", "TCPRoute", "UDPRoute"}


# --- Pods: lenient where others are strict ------------------------------------------------------

POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "p", "namespace": "shop", "labels": {"app": "cart"}},
    "spec": {
        "nodeName": "n1",
        "serviceAccountName": "cart",
        "terminationGracePeriodSeconds": 30,
        "tolerations": [{"key": "x", "operator": "Exists"}],
        "containers": [
            {
                "name": "c",
                "image": "cart:1",
                "resources": {"limits": {"cpu": "1"}},
                "ports": [{"name": "http", "containerPort": 8080, "hostIP": "10.0.0.9"}],
            }
        ],
    },
    "status": {
        "phase": "Running",
        "qosClass": "Burstable",
        "podIP": "10.0.0.1",
        "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
        "conditions": [{"type": "Ready", "status": "True", "lastProbeTime": None}],
    },
}


def test_pods_keep_what_is_read_and_pass_over_the_rest() -> None:
    assert encode(decode(POD)) == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": POD["metadata"],
        "spec": {
            "nodeName": "n1",
            "serviceAccountName": "cart",
            "hostNetwork": False,
            "containers": [
                {
                    "name": "c",
                    "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                }
            ],
        },
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def test_pods_with_nulls_and_unknown_fields_are_read_too() -> None:
    """The API server writes nulls; they send the reader down its slower way."""
    raw = put(put(POD, "spec/hostNetwork", None), "metadata/creationTimestamp", None)
    assert decode(raw) == decode(POD)
    bare = decode({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}})
    assert encode(bare)["spec"] == {"serviceAccountName": "default", "hostNetwork": False}


@pytest.mark.parametrize(
    ("path", "value", "field", "rule"),
    [
        ("spec/containers/0/ports/0/containerPort", 0, None, "minimum: 1"),
        ("spec/hostNetwork", "yes", "spec.hostNetwork", "type: boolean"),
        ("spec/containers/0/name", ..., "spec.containers[0].name", "required"),
        ("status/podIP", "10.0.0", "status.podIP", "must be an IP address"),
        ("status/podIP", "10.0.0.2", "status", "podIPs must begin with podIP"),
        ("status/podIPs/1/ip", "x", "status.podIPs[1].ip", "must be an IP address"),
        ("metadata/colour", "red", "metadata.colour", "unknown field"),
        ("colour", "red", "colour", "unknown field"),
    ],
)
def test_what_is_read_of_pods_is_checked(path: str, value: Any, field: str, rule: str) -> None:
    with pytest.raises(InvalidObject) as caught:
        decode(put(POD, path, value))
    found = {(error.path, error.rule) for error in caught.value.errors}
    assert (field or "spec.containers[0].ports[0].containerPort", rule) in found
