"""The mesh tests: those of the test data as they are, the others of the suite written here.

The test data names all mesh tests of Gateway API v1.6.1 with their features, and lacks manifests
and steps of some. Those are written after their names and features: from the gateway test of the
same name where the test data has it, otherwise from the specification of the field they are about.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from acceptance.cases import SHARED, Case, Json, load_cases, load_objects, published

MESH = "gateway-conformance-mesh"
_INFRA = "gateway-conformance-infra"
_CLIENT = {"app": "app=echo,version=v1", "namespace": MESH}
_API = "gateway.networking.k8s.io/v1"


class Own(NamedTuple):
    """What the test data lacks of a test. Without objects its manifests have all."""

    objects: tuple[Json, ...]
    steps: tuple[Json, ...]


def load_mesh_cases(root: Path = SHARED) -> list[Case]:
    """All mesh tests of the suite, in the order of its names."""
    ready = {case.name: case for case in load_cases(root)}
    cases = []
    for test in published(root):
        if not test.mesh:
            continue
        case = ready.get(test.name, test)
        if test.name in _SAME_STEPS:
            steps = _from_gateway(ready[_SAME_STEPS[test.name]]).steps
            case = dataclasses.replace(case, steps=steps)
        elif test.name in _FROM_GATEWAY:
            own = _from_gateway(ready[_FROM_GATEWAY[test.name]], root)
            case = dataclasses.replace(case, **own._asdict(), own=True)
        elif test.name in _BY_HAND:
            own = _BY_HAND[test.name]()
            case = dataclasses.replace(case, **own._asdict(), own=True)
        if test.name in _MANIFESTS:
            case = dataclasses.replace(case, manifests=(_MANIFESTS[test.name],))
        cases.append(case)
    return cases


# Manifests that the test data has, of tests it has no steps for.
_MANIFESTS = {"MeshFrontend": "conformance/tests/mesh/mesh-frontend.yaml"}
# Here the manifests are there, and the steps are those of the gateway test.
_SAME_STEPS = {"MeshHTTPRouteBackendRequestHeaderModifier": "HTTPRouteRequestHeaderModifier"}
_FROM_GATEWAY = {
    "MeshHTTPRoute303Redirect": "HTTPRoute303Redirect",
    "MeshHTTPRouteRedirectHostAndStatus": "HTTPRouteRedirectHostAndStatus",
    "MeshHTTPRouteRequestHeaderModifier": "HTTPRouteRequestHeaderModifier",
}


def _from_gateway(case: Case, root: Path | None = None) -> Own:
    """A gateway test with the Service echo as parent and the mesh's backends; its requests come
    from a pod. Without `root` its steps only."""

    def meshed(value: Json) -> Json:
        text = json.dumps(value).replace(_INFRA, MESH).replace("infra-backend-", "echo-")
        result: Json = json.loads(text)
        return result

    objects = (
        [] if root is None else [o for p in case.manifests for o in load_objects(root / p, {})]
    )
    routes = [meshed(obj) for obj in objects]
    for route in routes:
        route["spec"]["parentRefs"] = [service("echo", port=80)]
    steps = [
        {
            "op": "mesh_request",
            "case": meshed(step["case"]),
            "client": _CLIENT,
            "expect": "consistent",
        }
        for step in case.steps
        if step["op"] == "http_request"
    ]
    return Own(tuple(routes), tuple(steps))


# --- by hand -------------------------------------------------------------------------------------


def service(name: str, **more: object) -> Json:
    """A parentRef."""
    return {"group": "", "kind": "Service", "name": name, **more}


def _backends(**weights: int) -> list[Json]:
    """echo_v1=70 is 70 of weight for port 8080 of echo-v1."""
    return [
        {"name": name.replace("_", "-"), "port": 8080, "weight": weight}
        for name, weight in weights.items()
    ]


def route(
    name: str,
    parent: Json,
    rules: Iterable[Json],
    *,
    kind: str = "HTTPRoute",
    namespace: str = MESH,
) -> Json:
    return {
        "apiVersion": _API,
        "kind": kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"parentRefs": [parent], "rules": list(rules)},
    }


def request(
    path: str = "/",
    *,
    host: object = "echo",
    headers: dict[str, str] | None = None,
    backend: str = "echo-v1",
    response: Json | None = None,
    redirect: Json | None = None,
    client: Json = _CLIENT,
) -> Json:
    """A step: a request of a pod, one of echo-v1 unless told otherwise."""
    case: Json = {
        "Request": {"Host": host, "Path": path, "Headers": headers or {}, "Method": "GET"},
        "Response": {"StatusCodes": [200], **(response or {})},
        "Namespace": MESH,
    }
    if redirect is None:
        case["Backend"] = backend
    else:
        case["RedirectRequest"] = redirect
    return {"op": "mesh_request", "case": case, "client": client, "expect": "consistent"}


def response_header(name: str, value: str) -> Json:
    """A filter that sets it."""
    modifier = {"set": [{"name": name, "value": value}]}
    return {"type": "ResponseHeaderModifier", "responseHeaderModifier": modifier}


IS_SET = {"Headers": {"X-Header-Set": "set"}}
_IS_NOT_SET = {"AbsentHeaders": ["X-Header-Set"]}


def _frontend() -> Own:
    """A route of a Service is for what asks for the Service, not for its pods' addresses."""
    return Own(
        (),
        (
            request(host="echo-v2", backend="echo-v2", response=IS_SET),
            request(
                host={"$pod": "echo-v2", "port": 8080}, backend="echo-v2", response=_IS_NOT_SET
            ),
        ),
    )


def _ports() -> Own:
    """parentRef.port restricts a route to that port of the Service; without it all have it
    (ParentReference.port)."""

    def rule(name: str) -> Json:
        return {
            "filters": [response_header("X-Header-Set", "set")],
            "backendRefs": [{"name": name, "port": 80}],
        }

    return Own(
        (
            route("mesh-one-port", service("echo-v1", port=80), [rule("echo-v1")]),
            route("mesh-all-ports", service("echo-v2"), [rule("echo-v2")]),
        ),
        (
            request(host="echo-v1", response=IS_SET),
            request(host="echo-v1:8080", response=_IS_NOT_SET),
            request(host="echo-v2", backend="echo-v2", response=IS_SET),
            request(host="echo-v2:8080", backend="echo-v2", response=IS_SET),
        ),
    )


def _named_rule() -> Own:
    """HTTPRouteRule.name changes nothing of what a rule does."""
    rules = [
        {"name": "named-rule", "matches": [_path("/named")], "backendRefs": _backends(echo_v1=1)},
        {"matches": [_path("/unnamed")], "backendRefs": _backends(echo_v2=1)},
    ]
    return Own(
        (route("mesh-named-rule", service("echo", port=80), rules),),
        (request("/named"), request("/unnamed", backend="echo-v2")),
    )


def _path(value: str, kind: str = "PathPrefix") -> Json:
    return {"path": {"type": kind, "value": value}}


def _query_parameters() -> Own:
    """Exact matching of query parameters; all of a match must hold, one match is enough, and more
    of them win over fewer (HTTPRouteRule.matches)."""

    def match(**wanted: str) -> Json:
        return {"queryParams": [{"name": name, "value": value} for name, value in wanted.items()]}

    rules = [
        {"matches": [match(animal="whale")], "backendRefs": _backends(echo_v1=1)},
        {
            "matches": [match(animal="dolphin"), match(animal="whale", color="blue")],
            "backendRefs": _backends(echo_v2=1),
        },
    ]

    def missing(path: str) -> Json:
        return request(path, response={"StatusCodes": [404]})

    return Own(
        (route("mesh-query-param-matching", service("echo", port=80), rules),),
        (
            request("/?animal=whale"),
            request("/?animal=dolphin", backend="echo-v2"),
            request("/?animal=whale&color=blue", backend="echo-v2"),
            request("/?animal=whale&color=red"),
            request("/path?color=blue&animal=dolphin", backend="echo-v2"),
            missing("/"),
            missing("/?animal=shark"),
            missing("/?animal=WHALE"),
            missing("/?color=blue"),
        ),
    )


def _scheme_redirect() -> Own:
    """HTTPRequestRedirectFilter.scheme: without a port it is the new scheme's."""

    def rule(path: str, **redirect: object) -> Json:
        filters = [{"type": "RequestRedirect", "requestRedirect": redirect}]
        return {"matches": [_path(path)], "filters": filters}

    def redirected(path: str, status: int, **to: str) -> Json:
        return request(path, response={"StatusCodes": [status]}, redirect={"Scheme": "https", **to})

    rules = [
        rule("/scheme", scheme="https"),
        rule("/scheme-and-host", scheme="https", hostname="example.org"),
        rule("/scheme-and-status", scheme="https", statusCode=301),
        rule("/scheme-and-host-and-status", scheme="https", hostname="example.org", statusCode=302),
    ]
    return Own(
        (route("mesh-redirect-scheme", service("echo", port=80), rules),),
        (
            redirected("/scheme", 302),
            redirected("/scheme-and-host", 302, Host="example.org"),
            redirected("/scheme-and-status", 301),
            redirected("/scheme-and-host-and-status", 302, Host="example.org"),
        ),
    )


def _traffic_split() -> Own:
    """Traffic of one Service goes to several by path."""
    rules = [
        {"matches": [_path("/v1", "Exact")], "backendRefs": _backends(echo_v1=1)},
        {"matches": [_path("/v2", "Exact")], "backendRefs": _backends(echo_v2=1)},
    ]
    return Own(
        (route("mesh-split", service("echo"), rules),),
        (request("/v1"), request("/v2", backend="echo-v2")),
    )


# Shares, and how many requests they are measured with: as the suite does it for gateways.
_SHARES = {
    "weights": {"echo-v1": 0.7, "echo-v2": 0.3},
    "total_requests": 500,
    "tolerance": 0.05,
    "retries": 10,
}


def _weight() -> Own:
    step = request()
    del step["case"]["Backend"]
    sender = {"protocol": "http", "case": step["case"], "client": _CLIENT}
    rules = [{"backendRefs": _backends(echo_v1=70, echo_v2=30)}]
    return Own(
        (route("mesh-weighted-backends", service("echo", port=80), rules),),
        (step, {"op": "weighted_distribution", "sender": sender, **_SHARES}),
    )


def _grpc_weight() -> Own:
    case = {"EchoRequest": {}, "Host": "echo:7070", "Response": {"Code": 0}, "Namespace": MESH}
    backends = [{**one, "port": 7070} for one in _backends(echo_v1=70, echo_v2=30)]
    parent = service("echo", port=7070)
    weighted = route(
        "mesh-weighted-backends", parent, [{"backendRefs": backends}], kind="GRPCRoute"
    )
    sender = {"protocol": "grpc", "case": case, "client": _CLIENT}
    return Own(
        (weighted,),
        (
            {"op": "grpc_request", "case": case, "client": _CLIENT, "expect": "consistent"},
            {"op": "weighted_distribution", "sender": sender, **_SHARES},
        ),
    )


_BY_HAND: dict[str, Callable[[], Own]] = {
    "MeshFrontend": _frontend,
    "MeshGRPCRouteWeight": _grpc_weight,
    "MeshHTTPRouteNamedRule": _named_rule,
    "MeshHTTPRouteQueryParamMatching": _query_parameters,
    "MeshHTTPRouteSchemeRedirect": _scheme_redirect,
    "MeshHTTPRouteWeight": _weight,
    "MeshPorts": _ports,
    "MeshTrafficSplit": _traffic_split,
}
