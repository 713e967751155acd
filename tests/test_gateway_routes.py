"""HTTPRoutes and GRPCRoutes: parents, conditions, and rules as the data plane gets them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway_world import BACKEND, GATEWAY, ROUTE, World, join, plain

LISTENERS = """
kind: Gateway
metadata: {name: gw}
spec:
  gatewayClassName: weft
  listeners:
  - {name: exact, port: 80, protocol: HTTP, hostname: a.example.com}
  - {name: wild, port: 80, protocol: HTTP, hostname: "*.example.com"}
  - {name: other, port: 8080, protocol: HTTP}
  - name: apps
    port: 81
    protocol: HTTP
    allowedRoutes: {namespaces: {from: Selector, selector: {matchLabels: {team: a}}}}
  - {name: grpc, port: 82, protocol: HTTP, allowedRoutes: {kinds: [{kind: GRPCRoute}]}}
"""


def route(
    name: str = "route",
    *,
    kind: str = "HTTPRoute",
    parent: str = "name: gw",
    hostnames: str = "",
    rules: str = "[{backendRefs: [{name: backend, port: 80}]}]",
    namespace: str = "default",
    created: str = "2024-01-01T00:00:00Z",
) -> str:
    return f"""
kind: {kind}
metadata: {{name: {name}, namespace: {namespace}, creationTimestamp: '{created}'}}
spec:
  parentRefs: [{{{parent}}}]
  hostnames: [{hostnames}]
  rules: {rules}
"""


def rules(world: World, name: str = "route", kind: str = "HTTPRoute") -> Any:
    return plain(world.sections[f"route/{kind}/default/{name}"].rules)


# --- parents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parent", "hostnames", "expected"),
    [
        ("name: gw, sectionName: exact", "", {"exact": ["a.example.com"]}),
        ("name: gw, sectionName: wild", "", {"wild": ["*.example.com"]}),
        (
            "name: gw, port: 80",
            "b.example.com, '*.com'",
            {"exact": ["a.example.com"], "wild": ["b.example.com", "*.example.com"]},
        ),
        ("name: gw, port: 80", "x.y.example.com", {"wild": ["x.y.example.com"]}),
        ("name: gw, port: 80", "b.example.com, example.com", {"wild": ["b.example.com"]}),
        ("name: gw, sectionName: other", "", {"other": ["*"]}),
        ("name: gw, sectionName: other", "x.test, y.test", {"other": ["x.test", "y.test"]}),
        ("name: gw, sectionName: other, port: 80", "", "NoMatchingParent"),
        ("name: gw, sectionName: nothing", "", "NoMatchingParent"),
        ("name: gw, port: 999", "", "NoMatchingParent"),
        ("name: gone", "", "NoMatchingParent"),
        ("name: gw, port: 80", "example.com", "NoMatchingListenerHostname"),
        ("name: gw, sectionName: apps", "", "NotAllowedByListeners"),
        ("name: gw, sectionName: grpc", "", "NotAllowedByListeners"),
        ("kind: Service, group: '', name: backend", "", "UnsupportedValue"),
        ("kind: ListenerSet, name: gw", "", "NoMatchingParent"),
    ],
)
def test_attachment(parent: str, hostnames: str, expected: Any) -> None:
    world = World()
    world.apply(join(LISTENERS, BACKEND, route(parent=parent, hostnames=hostnames)))
    if isinstance(expected, str):
        assert world.route("route")["Accepted"] == f"False {expected}"
        assert world.message("HTTPRoute", "route", "Accepted")
        assert not world.of("route")
        assert not world.of("cluster")
        return
    assert world.route("route") == {"Accepted": "True", "ResolvedRefs": "True"}
    section = world.sections["route/HTTPRoute/default/route"]
    found = {one.listener.rpartition("/")[2]: list(one.hostnames) for one in section.attachments}
    assert found == expected
    for listener in ("exact", "wild", "other", "apps", "grpc"):
        assert world.attached(listener) == (listener in expected)


def test_each_parent_has_its_own_answer() -> None:
    world = World()
    world.apply(
        join(
            LISTENERS,
            BACKEND,
            route(parent="name: gw, sectionName: exact}, {name: gw, sectionName: apps"),
        )
    )
    assert world.route("route", 0)["Accepted"] == "True"
    assert world.route("route", 1)["Accepted"] == "False NotAllowedByListeners"
    parents = world.status("HTTPRoute", "route").parents
    assert [one.parent_ref.section_name for one in parents] == ["exact", "apps"]
    assert {one.controller_name for one in parents} == {"weft.dev/gateway-controller"}


def test_route_without_a_parent_of_ours_has_no_status() -> None:
    world = World()
    world.apply(join(GATEWAY, route(parent="kind: Mesh, group: example.com, name: m")))
    assert world.status("HTTPRoute", "route") is None


def test_namespaces_by_selector_follow_their_labels() -> None:
    world = World()
    one = route(parent="name: gw, namespace: default, sectionName: apps", namespace="apps")
    world.apply(join(LISTENERS, one))
    assert world.attached("apps") == 0
    world.apply("kind: Namespace\nmetadata: {name: apps, labels: {team: a}}")
    assert world.attached("apps") == 1
    world.delete("Namespace", "apps", "")
    assert world.attached("apps") == 0


def test_default_gateways() -> None:
    world = World()
    text = route().replace("parentRefs: [{name: gw}]", "useDefaultGateways: All")
    world.apply(join(GATEWAY, BACKEND, text))
    assert world.status("HTTPRoute", "route") is None
    world.apply(GATEWAY + "  defaultScope: All")
    assert world.route("route")["Accepted"] == "True"
    assert world.status("HTTPRoute", "route").parents[0].parent_ref.name == "gw"
    assert world.attached("http") == 1


def test_http_and_grpc_on_one_hostname_the_older_is_accepted() -> None:
    world = World()
    world.apply(
        join(
            GATEWAY,
            BACKEND,
            route("a", hostnames="x.example.com"),
            route(
                "b", kind="GRPCRoute", hostnames="'*.example.com'", created="2024-01-02T00:00:00Z"
            ),
            route("c", hostnames="y.example.com", created="2024-01-03T00:00:00Z"),
            route("d", hostnames="other.test", created="2024-01-04T00:00:00Z"),
        )
    )
    assert world.route("a")["Accepted"] == "True"
    assert world.route("b", kind="GRPCRoute")["Accepted"] == "False Conflicted"
    assert "HTTPRoute default/a" in world.message("GRPCRoute", "b", "Accepted")
    # c conflicts only with what is itself rejected.
    assert world.route("c")["Accepted"] == "True"
    assert world.attached("http") == 3
    world.delete("HTTPRoute", "a")
    assert world.route("b", kind="GRPCRoute")["Accepted"] == "True"
    assert world.route("c")["Accepted"] == "False Conflicted"
    assert world.route("d")["Accepted"] == "True"
    assert "route/HTTPRoute/default/c" not in world.sections


def test_section_refused_by_the_data_plane() -> None:
    world = World()
    world.apply(join(GATEWAY, BACKEND, ROUTE))
    world.refuse("route/HTTPRoute/default/route", "rules[0]: bad regular expression")
    assert world.route("route")["Accepted"] == "False UnsupportedValue"
    assert "bad regular expression" in world.message("HTTPRoute", "route", "Accepted")
    assert world.attached("http") == 0
    # It stays in the configuration: the data plane keeps its last good version.
    assert "route/HTTPRoute/default/route" in world.sections
    world.refuse("route/HTTPRoute/default/route", None)
    assert world.route("route")["Accepted"] == "True"
    world.refuse("cluster/Service/default/backend/80", "bad CA")
    assert world.route("route")["ResolvedRefs"] == "False UnsupportedValue"


# --- backends -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "reason", "says"),
    [
        ("{name: gone, port: 80}", "BackendNotFound", "Service default/gone does not exist"),
        ("{name: backend, port: 81}", "BackendNotFound", "has no port 81 (it has 80)"),
        ("{group: example.com, kind: Bucket, name: b}", "InvalidKind", "example.com/Bucket"),
        ("{name: backend, port: 80, namespace: other}", "RefNotPermitted", "no ReferenceGrant"),
        ("{name: outside, port: 80}", "UnsupportedValue", "ExternalName"),
        ("{name: odd, port: 1}", "UnsupportedProtocol", "appProtocol example.com/odd"),
        ("{name: odd, port: 2}", "UnsupportedProtocol", "is UDP, not TCP"),
        ("{name: odd, port: 3}", "UnsupportedProtocol", "needs a BackendTLSPolicy"),
    ],
)
def test_backend_that_does_not_resolve(ref: str, reason: str, says: str) -> None:
    world = World()
    world.apply(
        join(
            GATEWAY,
            BACKEND,
            "kind: Service\nmetadata: {name: outside}\n"
            "spec: {type: ExternalName, externalName: example.com}",
            """
kind: Service
metadata: {name: odd}
spec:
  ports:
  - {name: a, port: 1, appProtocol: example.com/odd}
  - {name: b, port: 2, protocol: UDP}
  - {name: c, port: 3, appProtocol: kubernetes.io/wss}
""",
            route(rules=f"[{{backendRefs: [{ref}, {{name: backend, port: 80, weight: 3}}]}}]"),
        )
    )
    assert world.route("route") == {"Accepted": "True", "ResolvedRefs": f"False {reason}"}
    assert says in world.message("HTTPRoute", "route", "ResolvedRefs")
    # Its share of the requests gets 500, the rest is served.
    assert rules(world)[0]["backends"] == [
        {"cluster": None},
        {"cluster": "cluster/Service/default/backend/80", "weight": 3},
    ]
    assert list(world.of("cluster")) == ["cluster/Service/default/backend/80"]


def test_backend_of_another_namespace_by_grant() -> None:
    world = World()
    world.apply(
        join(
            GATEWAY,
            BACKEND.replace("name: backend}", "name: backend, namespace: other}"),
            route(rules="[{backendRefs: [{name: backend, namespace: other, port: 80}]}]"),
            """
kind: ReferenceGrant
metadata: {name: g, namespace: other}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: default}]
  to: [{group: "", kind: Service, name: backend}]
""",
        )
    )
    assert world.route("route")["ResolvedRefs"] == "True"
    assert list(world.of("cluster")) == ["cluster/Service/other/backend/80"]
    world.delete("ReferenceGrant", "g", "other")
    assert world.route("route")["ResolvedRefs"] == "False RefNotPermitted"
    assert not world.of("cluster")


# --- rules --------------------------------------------------------------------------------------


def translated(rule: str, kind: str = "HTTPRoute") -> Any:
    world = World()
    world.apply(join(GATEWAY, BACKEND, route(kind=kind, rules=f"[{{{rule}}}]")))
    assert world.route("route", kind=kind)["Accepted"] == "True"
    return rules(world, kind=kind)[0]


BACK = "backendRefs: [{name: backend, port: 80}]"


def test_matches() -> None:
    rule = translated(
        "name: first, matches: [{path: {type: Exact, value: /a}, method: POST,"
        " headers: [{name: X-One, value: a}, {name: x-one, value: b},"
        " {name: two, type: RegularExpression, value: 'b+'}],"
        " queryParams: [{name: Q, value: v}]}, {}], " + BACK
    )
    assert rule["name"] == "first"
    assert rule["matches"] == [
        {
            "path": {"type": "Exact", "value": "/a"},
            "method": "POST",
            "headers": [
                {"name": "x-one", "value": "a"},
                {"name": "two", "value": "b+", "type": "RegularExpression"},
            ],
            "query": [{"name": "Q", "value": "v"}],
        },
        {"path": {}},
    ]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("{service: a.B, method: Get}", {"type": "Exact", "value": "/a.B/Get"}),
        ("{service: a.B}", {"value": "/a.B/"}),
        ("{method: Get}", {"type": "RegularExpression", "value": "/[^/]+/Get"}),
        (
            "{type: RegularExpression, service: 'a|b'}",
            {"type": "RegularExpression", "value": "/(?:a|b)/[^/]+"},
        ),
        (
            "{type: RegularExpression, service: 'a.*', method: 'G.t'}",
            {"type": "RegularExpression", "value": "/(?:a.*)/(?:G.t)"},
        ),
    ],
)
def test_grpc_methods_are_paths(method: str, path: dict[str, str]) -> None:
    rule = translated(f"matches: [{{method: {method}}}], {BACK}", "GRPCRoute")
    assert rule["matches"] == [{"path": path}]
    assert rule["backends"] == [{"cluster": "cluster/Service-grpc/default/backend/80"}]


def test_grpc_backends_speak_http2() -> None:
    world = World()
    world.apply(join(GATEWAY, BACKEND, route(kind="GRPCRoute")))
    assert world.sections["cluster/Service-grpc/default/backend/80"].protocol == "h2c"


def test_filters() -> None:
    rule = translated(
        "filters: ["
        "{type: RequestHeaderModifier, requestHeaderModifier:"
        " {set: [{name: A, value: '1'}], add: [{name: B, value: '2'}], remove: [C]}},"
        "{type: ResponseHeaderModifier, responseHeaderModifier: {remove: [X-Powered-By]}},"
        "{type: RequestMirror, requestMirror: {backendRef: {name: backend, port: 80}}},"
        "{type: RequestMirror, requestMirror:"
        " {backendRef: {name: backend, port: 80}, percent: 5}},"
        "{type: RequestMirror, requestMirror:"
        " {backendRef: {name: backend, port: 80}, fraction: {numerator: 1, denominator: 3}}},"
        "{type: URLRewrite, urlRewrite: {hostname: in.example.com,"
        " path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}},"
        "{type: CORS, cors: {allowOrigins: ['https://*.example.com'], allowMethods: [GET],"
        " allowCredentials: true, maxAge: 60}}"
        "], " + BACK
    )
    cluster = "cluster/Service/default/backend/80"
    assert rule["filters"] == [
        {
            "type": "headers",
            "direction": "request",
            "set": [{"name": "a", "value": "1"}],
            "add": [{"name": "b", "value": "2"}],
            "remove": ["c"],
        },
        {"type": "headers", "direction": "response", "remove": ["x-powered-by"]},
        {"type": "mirror", "cluster": cluster},
        {"type": "mirror", "cluster": cluster, "numerator": 5, "denominator": 100},
        {"type": "mirror", "cluster": cluster, "denominator": 3},
        {
            "type": "rewrite",
            "hostname": "in.example.com",
            "path": {"type": "ReplacePrefixMatch", "value": "/new"},
        },
        {
            "type": "cors",
            "allow_origins": ["https://*.example.com"],
            "allow_credentials": True,
            "allow_methods": ["GET"],
            "max_age_s": 60,
        },
    ]


def test_redirect_needs_no_backend() -> None:
    rule = translated(
        "filters: [{type: RequestRedirect, requestRedirect: {scheme: https, hostname: x.test,"
        " port: 8443, statusCode: 308, path: {type: ReplaceFullPath, replaceFullPath: /y}}}]"
    )
    assert rule["filters"] == [
        {
            "type": "redirect",
            "scheme": "https",
            "hostname": "x.test",
            "port": 8443,
            "status": 308,
            "path": {"type": "ReplaceFullPath", "value": "/y"},
        }
    ]
    assert "error_status" not in rule


def test_backend_filters() -> None:
    rule = translated(
        "backendRefs: [{name: backend, port: 80, weight: 0, filters: [{type:"
        " RequestHeaderModifier, requestHeaderModifier: {add: [{name: v, value: '1'}]}}]}]"
    )
    assert rule["backends"] == [
        {
            "cluster": "cluster/Service/default/backend/80",
            "weight": 0,
            "filters": [
                {"type": "headers", "direction": "request", "add": [{"name": "v", "value": "1"}]}
            ],
        }
    ]


def test_rule_without_backends_answers_500() -> None:
    assert translated("name: nothing") == {
        "matches": [{"path": {}}],
        "name": "nothing",
        "error_status": 500,
    }


def test_timeouts_and_retry() -> None:
    rule = translated(
        "timeouts: {request: 1m30s, backendRequest: 250ms},"
        " retry: {codes: [503, 500], attempts: 3, backoff: 100ms}, " + BACK
    )
    assert (rule["request_timeout_ms"], rule["backend_timeout_ms"]) == (90_000, 250)
    assert rule["retry"] == {"codes": [500, 503], "attempts": 3, "backoff_ms": 100}
    assert "request_timeout_ms" not in translated("timeouts: {request: 0s}, " + BACK)


def test_session_persistence() -> None:
    rule = translated(
        "matches: [{path: {value: /cart}}], sessionPersistence: {sessionName: cart,"
        " absoluteTimeout: 1h, cookieConfig: {lifetimeType: Permanent}}, " + BACK
    )
    assert rule["session"] == {
        "name": "cart",
        "absolute_timeout_s": 3600.0,
        "permanent": True,
        "path": "/cart",
    }
    # Rules without a name of their own for it do not overwrite each other's cookies.
    world = World()
    one = f"{{sessionPersistence: {{}}, {BACK}}}"
    world.apply(join(GATEWAY, BACKEND, route(rules=f"[{one}, {one}]")))
    names = {rule["session"]["name"] for rule in rules(world)}
    assert len(names) == 2
    assert all(name.startswith("weft-session-") for name in names)


UNSUPPORTED = (
    "filters: [{type: ExtensionRef, extensionRef: {group: example.com, kind: Auth, name: a}}]"
)


def test_route_that_only_asks_for_what_is_not_done_is_not_accepted() -> None:
    world = World()
    world.apply(join(GATEWAY, BACKEND, route(rules=f"[{{{UNSUPPORTED}, {BACK}}}]")))
    assert world.route("route")["Accepted"] == "False UnsupportedValue"
    assert "spec.rules[0].filters[0].type ExtensionRef" in world.message(
        "HTTPRoute", "route", "Accepted"
    )
    assert world.attached("http") == 0
    # Its requests must not fall through to another route that has no such filter.
    assert rules(world) == [{"matches": [{"path": {}}], "error_status": 500}]
    assert not world.of("cluster")


def test_rule_that_asks_for_what_is_not_done_answers_500_and_the_rest_works() -> None:
    world = World()
    bad = f"{{matches: [{{path: {{value: /admin}}}}], {UNSUPPORTED}, {BACK}}}"
    world.apply(join(GATEWAY, BACKEND, route(rules=f"[{{{BACK}}}, {bad}]")))
    assert world.route("route") == {
        "Accepted": "True",
        "ResolvedRefs": "True",
        "PartiallyInvalid": "True UnsupportedValue",
    }
    assert "rules[1]" in world.message("HTTPRoute", "route", "PartiallyInvalid")
    # Its matches stay: its requests must not fall through to a rule without the filter.
    assert rules(world)[1] == {"matches": [{"path": {"value": "/admin"}}], "error_status": 500}


def test_external_auth_is_refused_by_name() -> None:
    world = World()
    rule = (
        "filters: [{type: ExternalAuth, externalAuth: {protocol: HTTP, http: {},"
        " backendRef: {name: backend, port: 80}}}], "
    )
    world.apply(join(GATEWAY, BACKEND, route(rules=f"[{{{rule}{BACK}}}]")))
    assert world.route("route")["Accepted"] == "False UnsupportedValue"
    assert "type ExternalAuth" in world.message("HTTPRoute", "route", "Accepted")


def test_mirror_that_does_not_resolve_is_left_out() -> None:
    world = World()
    rule = "filters: [{type: RequestMirror, requestMirror: {backendRef: {name: gone, port: 1}}}], "
    world.apply(join(GATEWAY, BACKEND, route(rules=f"[{{{rule}{BACK}}}]")))
    assert world.route("route") == {"Accepted": "True", "ResolvedRefs": "False BackendNotFound"}
    assert "filters" not in rules(world)[0]
