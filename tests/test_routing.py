"""The route matcher: cases from the specification, updates in place, refusals."""

from __future__ import annotations

import pytest

from l7proxy.message import Headers, RequestHead
from l7proxy.route_compile import Regex
from l7proxy.routing import PortIndex, Refused, RouteIndex, pick_backend
from mesh.model.nodeconfig import Listener, PortSection
from mesh.model.routeconfig import (
    Attachment,
    HeaderModifier,
    HeaderValue,
    PathMatch,
    PathModifier,
    Rewrite,
    RouteMatch,
    RouteRule,
    RouteSection,
    SessionPersistence,
    ValueMatch,
    WeightedBackend,
)
from mesh.model.section import route_key

L = "Gateway/infra/gw/http"


def head(
    path: str = "/",
    host: str = "example.com",
    method: str = "GET",
    headers: Headers | None = None,
    query: bytes | None = None,
) -> RequestHead:
    return RequestHead(method.encode(), b"http", host.encode(), path.encode(), query, headers or [])


def route(
    name: str,
    *matches: RouteMatch,
    hosts: tuple[str, ...] = ("*",),
    created: str = "2024-01-01T00:00:00Z",
    kind: str = "HTTPRoute",
) -> RouteSection:
    return RouteSection(
        kind, "infra", name, created, (Attachment(L, hosts),), (RouteRule(matches),)
    )


def index(*sections: RouteSection) -> RouteIndex:
    result = RouteIndex()
    for section in sections:
        result.put(route_key(section.kind, section.namespace, section.name), section)
    return result


def exact(path: str, **more: object) -> RouteMatch:
    return RouteMatch(PathMatch("Exact", path), **more)


def prefix(path: str, **more: object) -> RouteMatch:
    return RouteMatch(PathMatch("PathPrefix", path), **more)


def regex(pattern: str, **more: object) -> RouteMatch:
    return RouteMatch(PathMatch("RegularExpression", pattern), **more)


def name_of(routes: RouteIndex, request: RequestHead) -> str | None:
    found = routes.match(L, request)
    return found.route.name if found else None


@pytest.mark.parametrize(
    ("value", "path", "matches"),
    [
        ("/abc", "/abc", True),
        ("/abc", "/abc/", True),
        ("/abc", "/abc/d", True),
        ("/abc", "/abcd", False),
        ("/abc", "/ab", False),
        ("/abc/", "/abc", True),
        ("/abc/", "/abc/d/e/f", True),
        ("/", "/", True),
        ("/", "/anything/at/all", True),
        ("/", "*", False),
        ("/a%7ec", "/a~c/x", True),
        ("/a%2fc", "/a%2Fc", True),
        ("/a%2fc", "/a/c", False),
    ],
)
def test_prefixes_match_by_segment(value: str, path: str, matches: bool) -> None:
    assert (name_of(index(route("r", prefix(value))), head(path)) == "r") is matches


def test_exact_paths_match_as_they_are() -> None:
    routes = index(route("r", exact("/%61bc")))
    assert name_of(routes, head("/abc")) == "r"
    assert name_of(routes, head("/abc/")) is None
    assert name_of(routes, head("/ABC")) is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (exact("/a/b"), prefix("/a/b", method="GET")),
        (exact("/a/b"), regex("/a/.*", method="GET")),
        (regex("/./."), prefix("/a/b", method="GET")),
        (regex("/a/[b]"), regex("/a/.", method="GET")),
        (prefix("/a/b"), prefix("/a", method="GET", headers=(ValueMatch("x", "1"),))),
        (prefix("/a", method="GET"), prefix("/a", headers=(ValueMatch("x", "1"),))),
        (
            prefix("/a", headers=(ValueMatch("x", "1"), ValueMatch("y", "2"))),
            prefix("/a", headers=(ValueMatch("x", "1"),), query=(ValueMatch("q", "1"),)),
        ),
        (prefix("/a", query=(ValueMatch("q", "1"),)), prefix("/a")),
    ],
)
def test_precedence_of_matches(first: RouteMatch, second: RouteMatch) -> None:
    request = head("/a/b", headers=[(b"x", b"1"), (b"y", b"2")], query=b"q=1")
    # The loser is older and first by name, whichever is put first.
    sections = (route("b", first, created="2025-01-01T00:00:00Z"), route("a", second))
    assert name_of(index(*sections), request) == "b"
    assert name_of(index(*reversed(sections)), request) == "b"


def test_ties_go_to_the_oldest_then_the_first_name_then_the_first_rule() -> None:
    old, young = "2020-01-01T00:00:00Z", "2021-01-01T00:00:00Z"
    assert (
        name_of(
            index(
                route("a", prefix("/"), created=""),
                route("b", prefix("/"), created=young),
                route("c", prefix("/"), created=old),
                route("d", prefix("/"), created=old),
            ),
            head(),
        )
        == "c"
    )
    two = RouteSection(
        "HTTPRoute",
        "infra",
        "two",
        old,
        (Attachment(L, ("*",)),),
        (
            RouteRule((prefix("/x"), prefix("/")), name="first"),
            RouteRule((prefix("/"),), name="second"),
        ),
    )
    found = index(two).match(L, head())
    assert found is not None
    assert (found.rule.label, found.match_index) == ("first", 1)


def test_http_and_grpc_routes_share_one_order() -> None:
    routes = index(
        route("g", exact("/pkg.Svc/Do"), kind="GRPCRoute", created="2022-01-01T00:00:00Z"),
        route("h", exact("/pkg.Svc/Do"), created="2021-01-01T00:00:00Z"),
        route("p", prefix("/pkg.Svc")),
    )
    assert name_of(routes, head("/pkg.Svc/Do", method="POST")) == "h"
    routes.remove(route_key("HTTPRoute", "infra", "h"))
    assert name_of(routes, head("/pkg.Svc/Do", method="POST")) == "g"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("foo.example.com", "exact"),
        ("FOO.example.com", "exact"),
        ("foo.example.com:8080", "exact"),
        ("foo.example.com.", "exact"),
        ("bar.example.com", "wild"),
        ("x.bar.example.com", "longer"),
        ("y.x.bar.example.com", "longer"),
        ("example.com", "any"),
        ("notexample.com", "any"),
        (".example.com", "any"),
        ("", "any"),
        ("[::1]:80", "any"),
        ("a." * 200 + "example.com", "any"),
    ],
)
def test_the_most_specific_hostname_wins(host: str, expected: str) -> None:
    routes = index(
        route("exact", prefix("/"), hosts=("foo.example.com",)),
        route("wild", prefix("/"), hosts=("*.example.com",)),
        route("longer", prefix("/"), hosts=("*.bar.example.com",)),
        route("any", prefix("/")),
    )
    assert name_of(routes, head(host=host)) == expected


def test_less_specific_hostnames_serve_what_the_specific_ones_do_not() -> None:
    routes = index(
        route("exact", exact("/only"), hosts=("foo.example.com",)),
        route("wild", prefix("/w"), hosts=("*.example.com",)),
        route("any", prefix("/")),
    )
    request = {path: name_of(routes, head(path, "foo.example.com")) for path in ("/only", "/w/1")}
    assert request == {"/only": "exact", "/w/1": "wild"}
    assert name_of(routes, head("/else", "foo.example.com")) == "any"


def test_listeners_are_isolated() -> None:
    routes = index(route("r", prefix("/")))
    assert routes.match("Gateway/infra/gw/other", head()) is None


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("match", "headers", "holds"),
    [
        (ValueMatch("X-V", "a"), [(b"x-v", b"a")], True),
        (ValueMatch("x-v", "a"), [(b"x-v", b"A")], False),
        (ValueMatch("x-v", "a"), [], False),
        (ValueMatch("x-v", "a,b"), [(b"x-v", b"a"), (b"y", b"z"), (b"x-v", b"b")], True),
        (ValueMatch("x-v", "a"), [(b"x-v", b"a"), (b"x-v", b"b")], False),
        (ValueMatch("cookie", "a=1; b=2"), [(b"cookie", b"a=1"), (b"cookie", b"b=2")], True),
        (ValueMatch("x-v", "a.c", "RegularExpression"), [(b"x-v", b"abc")], True),
        (ValueMatch("x-v", "a.c", "RegularExpression"), [(b"x-v", b"xabc")], False),
        (ValueMatch("x-v", ".*", "RegularExpression"), [(b"x-v", b"caf\xe9")], True),
        (ValueMatch("x-v", ".*", "RegularExpression"), [], False),
        (ValueMatch("Host", "example.com"), [], True),
        (ValueMatch(":authority", "other.com"), [], False),
    ],
)
def test_header_matches(match: ValueMatch, headers: Headers, holds: bool) -> None:
    routes = index(route("r", prefix("/", headers=(match,))))
    assert (name_of(routes, head(headers=headers)) == "r") is holds


def test_fields_that_codecs_keep_can_be_matched() -> None:
    request = head()
    request.upgrade = b"websocket"
    request.body = 12
    wanted = (ValueMatch("upgrade", "websocket"), ValueMatch("Content-Length", "12"))
    routes = index(route("r", prefix("/", headers=wanted)))
    assert name_of(routes, request) == "r"


@pytest.mark.parametrize(
    ("match", "query", "holds"),
    [
        (ValueMatch("a", "1"), b"a=1", True),
        (ValueMatch("a", "1"), b"b=2&a=1", True),
        (ValueMatch("a", "1"), b"a=2&a=1", False),
        (ValueMatch("a", "1"), b"a=1&a=2", True),
        (ValueMatch("a", "x y"), b"a=x+y", True),
        (ValueMatch("a", "x y"), b"a=x%20y", True),
        (ValueMatch("a", "é"), b"a=%C3%A9", True),
        (ValueMatch("A", "1"), b"a=1", False),
        (ValueMatch("a.b", "1"), b"a%2Eb=1", True),
        (ValueMatch("a", "="), b"a==", True),
        (ValueMatch("a", "v[0-9]", "RegularExpression"), b"a=v1", True),
        (ValueMatch("a", "v[0-9]", "RegularExpression"), b"a=v10", False),
        (ValueMatch("a", ".*", "RegularExpression"), b"a", True),
        (ValueMatch("a", "1"), None, False),
        (ValueMatch("a", "1"), b"", False),
    ],
)
def test_query_matches(match: ValueMatch, query: bytes | None, holds: bool) -> None:
    routes = index(route("r", prefix("/", query=(match,))))
    assert (name_of(routes, head(query=query)) == "r") is holds


def test_of_equivalent_names_the_first_counts() -> None:
    match = prefix(
        "/",
        headers=(ValueMatch("X-V", "1"), ValueMatch("x-v", "2")),
        query=(ValueMatch("q", "1"), ValueMatch("q", "2")),
    )
    routes = index(route("r", match))
    assert name_of(routes, head(headers=[(b"x-v", b"1")], query=b"q=1")) == "r"
    assert name_of(routes, head(headers=[(b"x-v", b"2")], query=b"q=2")) is None


# --- regular expressions ------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|a)*b", "(.*a.{15})*b", "([a-z]+)+1"])
@pytest.mark.parametrize("size", [1_000, 30_000])
def test_expressions_that_explode_when_backtracking_answer(pattern: str, size: int) -> None:
    expression = Regex(pattern, "here")
    assert not expression.matches(b"a" * size)
    assert Regex("a*", "here").matches(b"a" * size)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "missing )"),
        ("(?=a)", "invalid perl operator"),
        (r"(a)\1", "invalid escape"),
        ("((a{100}){100}){100}", "invalid repetition size"),
        (r"\pL{900}", "instructions"),
        ("(" + "|".join(f"{i:x}{i * 7919:x}" for i in range(2000)) + ")", "instructions"),
    ],
)
def test_expressions_that_are_wrong_or_too_large_are_refused_by_field(
    pattern: str, why: str
) -> None:
    with pytest.raises(Refused) as refusal:
        index(route("r", exact("/"), regex(pattern)))
    assert str(refusal.value).startswith("rules[0].matches[1].path.value: regular expression")
    assert why in str(refusal.value)


# --- updates ------------------------------------------------------------------------------------


def test_a_refused_update_leaves_the_route_as_it_was() -> None:
    routes = index(route("r", prefix("/old")))
    with pytest.raises(Refused):
        routes.put(route_key("HTTPRoute", "infra", "r"), route("r", prefix("/new"), regex("(")))
    assert name_of(routes, head("/old")) == "r"
    assert name_of(routes, head("/new")) is None


def test_updates_replace_and_removals_leave_nothing() -> None:
    routes = index(route("r", prefix("/old"), regex("/x+")), route("s", prefix("/old/s")))
    routes.put(route_key("HTTPRoute", "infra", "r"), route("r", prefix("/new"), hosts=("a.com",)))
    assert name_of(routes, head("/old/1")) is None
    assert name_of(routes, head("/xx")) is None
    assert name_of(routes, head("/new", "a.com")) == "r"
    assert name_of(routes, head("/old/s")) == "s"
    for name in ("r", "s", "unknown"):
        routes.remove(route_key("HTTPRoute", "infra", name))
    assert name_of(routes, head("/old/s")) is None
    assert list(routes.routes()) == []


def test_a_route_without_rules_disturbs_nobody() -> None:
    empty = RouteSection("HTTPRoute", "infra", "none", "", (Attachment(L, ("*",)),), ())
    routes = index(empty, route("r", prefix("/")))
    routes.remove(route_key("HTTPRoute", "infra", "none"))
    assert name_of(routes, head()) == "r"


def test_a_host_and_listener_named_twice_count_once() -> None:
    twice = RouteSection(
        "HTTPRoute", "infra", "r", "", (Attachment(L, ("a.com", "a.com")),) * 2, (RouteRule(()),)
    )
    routes = index(twice)
    assert name_of(routes, head("/x", "a.com")) == "r"
    routes.remove(route_key("HTTPRoute", "infra", "r"))
    assert name_of(routes, head("/x", "a.com")) is None


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (RouteRule((exact("no-slash"),)), "rules[0].matches[0].path.value: 'no-slash'"),
        (RouteRule((exact("/a?b=1"),)), "rules[0].matches[0].path.value: '/a?b=1' has a query"),
        (RouteRule((prefix("/%zz"),)), "rules[0].matches[0].path.value: '/%zz'"),
        (
            RouteRule((prefix("/", headers=(ValueMatch("a b", "1"),)),)),
            "rules[0].matches[0].headers[0].name: 'a b'",
        ),
        (
            RouteRule((prefix("/", headers=(ValueMatch("TE", "1"),)),)),
            "rules[0].matches[0].headers[0].name: 'TE' belongs to one connection",
        ),
        (
            RouteRule((prefix("/", query=(ValueMatch("a", "[", "RegularExpression"),)),)),
            "rules[0].matches[0].queryParams[0].value: regular expression '['",
        ),
        (
            RouteRule(
                (prefix("/"), exact("/a")),
                filters=(Rewrite(path=PathModifier("ReplacePrefixMatch", "/b")),),
            ),
            "rules[0].filters[0].path: ReplacePrefixMatch needs",
        ),
        (
            RouteRule((), filters=(Rewrite(hostname="a.com"), Rewrite(hostname="b.com"))),
            "rules[0].filters: at most one rewrite",
        ),
        (
            RouteRule(
                (),
                backends=(
                    WeightedBackend(None),
                    WeightedBackend(
                        None,
                        filters=(HeaderModifier("request", set=(HeaderValue("host", "x"),)),),
                    ),
                ),
            ),
            "rules[0].backendRefs[1].filters[0].set[0].name: header 'host' cannot be changed",
        ),
        (RouteRule((), backends=(WeightedBackend(None, -1),)), "rules[0].backendRefs[0].weight"),
        (
            RouteRule((), session=SessionPersistence(permanent=True)),
            "rules[0].sessionPersistence: a Permanent cookie needs",
        ),
    ],
)
def test_refusals_name_rule_and_field(rule: RouteRule, reason: str) -> None:
    section = RouteSection("HTTPRoute", "infra", "r", "", (Attachment(L, ("*",)),), (rule,))
    with pytest.raises(Refused) as refusal:
        index(section)
    assert str(refusal.value).startswith(reason)


# --- backends -----------------------------------------------------------------------------------


def test_backends_are_picked_by_weight() -> None:
    section = RouteSection(
        "HTTPRoute",
        "infra",
        "r",
        "",
        (Attachment(L, ("*",)),),
        (
            RouteRule(
                (),
                backends=(
                    WeightedBackend("cluster/a", 1),
                    WeightedBackend("cluster/none", 0),
                    WeightedBackend(None, 2),
                    WeightedBackend("cluster/b", 7),
                ),
            ),
        ),
    )
    found = index(section).match(L, head())
    assert found is not None
    picked = []
    for tenth in range(10):
        backend = pick_backend(found.rule, lambda at=tenth / 10: at)
        assert backend is not None
        picked.append(backend.cluster)
    assert picked == ["cluster/a"] + [None] * 2 + ["cluster/b"] * 7


@pytest.mark.parametrize("backends", [(), (WeightedBackend("cluster/a", 0),)])
def test_no_backend_with_weight_is_none_at_all(backends: tuple[WeightedBackend, ...]) -> None:
    rule = RouteRule((), backends=backends)
    section = RouteSection("HTTPRoute", "infra", "r", "", (Attachment(L, ("*",)),), (rule,))
    found = index(section).match(L, head())
    assert found is not None
    assert pick_backend(found.rule, lambda: 0.0) is None


# --- listeners ----------------------------------------------------------------------------------


def port(**hostnames: str | None) -> PortIndex:
    listeners = tuple(Listener(name, hostname) for name, hostname in hostnames.items())
    return PortIndex(PortSection("0.0.0.0", 443, "HTTPS", "infra/gw", listeners))


# As in the conformance case HTTPRouteHTTPSListenerDetectMisdirectedRequests.
MISDIRECTED = [
    ("example.org", "example.org", 200, "https"),
    ("example.org", "second-example.org", 421, None),
    ("example.org", "unknown-example.org", 200, "https"),
    ("second-example.org", "second-example.org", 200, "second"),
    ("second-example.org", "example.org", 421, None),
    ("second-example.org", "unknown-example.org", 421, None),
    ("third-example.wildcard.org", "third-example.wildcard.org", 200, "wildcard"),
    ("third-example.wildcard.org", "fith-example.wildcard.org", 200, "wildcard"),
    ("third-example.wildcard.org", "fourth-example.wildcard.org", 421, None),
    ("third-example.wildcard.org", "unknown-example.org", 421, None),
    ("fourth-example.wildcard.org", "fourth-example.wildcard.org", 200, "fourth"),
    ("fourth-example.wildcard.org", "fith-example.wildcard.org", 421, None),
    ("unknown-example.org", "example.org", 200, "https"),
    ("Second-Example.org.", "second-example.org", 200, "second"),
    (None, "example.org", 200, "https"),
    (None, "second-example.org", 421, None),
]


@pytest.mark.parametrize(("sni", "host", "status", "listener"), MISDIRECTED)
def test_misdirected_requests(
    sni: str | None, host: str, status: int, listener: str | None
) -> None:
    index = port(
        https=None,
        second="second-example.org",
        wildcard="*.wildcard.org",
        fourth="fourth-example.wildcard.org",
    )
    assert index.misdirected(sni, host.encode()) is (status == 421)
    if listener is not None:
        selected = index.select(host.encode(), sni)
        assert selected is not None
        assert selected.id == listener


def test_a_host_of_no_listener_is_not_misdirected_but_unknown() -> None:
    index = port(one="one.example.org", wild="*.example.org")
    assert not index.misdirected("one.example.org", b"other.com")
    assert index.select(b"other.com", "one.example.org") is None


def test_a_request_without_host_goes_where_its_connection_went() -> None:
    index = port(any=None, one="one.example.org")
    assert not index.misdirected("one.example.org", b"")
    for sni, expected in (("one.example.org", "one"), (None, "any")):
        selected = index.select(b"", sni)
        assert selected is not None
        assert selected.id == expected
