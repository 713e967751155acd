"""Explanations: words for each reason, and never another answer than the matcher's."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy.explain import Explanation, explain
from l7proxy.message import RequestHead
from l7proxy.routing import PortIndex, RouteIndex
from mesh.model.nodeconfig import (
    ClusterSection,
    Endpoint,
    Listener,
    PortSection,
    Section,
    Settings,
    UpstreamTLS,
)
from mesh.model.routeconfig import (
    Attachment,
    Cors,
    HeaderModifier,
    HeaderValue,
    Mirror,
    PathMatch,
    PathModifier,
    Redirect,
    Rewrite,
    RouteMatch,
    RouteRule,
    RouteSection,
    ValueMatch,
    WeightedBackend,
)
from mesh.model.section import SETTINGS_KEY, cluster_key, port_key, route_key

ANY, FOO = "Gateway/infra/gw/any", "Gateway/infra/gw/foo"
PORT = PortSection("10.0.0.9", 80, "HTTP", "infra/gw", (Listener(ANY), Listener(FOO, "*.foo.com")))
STORE = cluster_key("Service", "infra", "store", 80)


def route(
    name: str,
    *rules: RouteRule,
    hosts: tuple[str, ...] = ("*",),
    listener: str = ANY,
    created: str = "2024-01-01T00:00:00Z",
) -> RouteSection:
    return RouteSection("HTTPRoute", "infra", name, created, (Attachment(listener, hosts),), rules)


def rule(path: str = "/", kind: str = "PathPrefix", **match: object) -> RouteRule:
    return RouteRule(
        (RouteMatch(PathMatch(kind, path), **match),), backends=(WeightedBackend(STORE),)
    )


def table(*routes: RouteSection, ports: tuple[PortSection, ...] = (PORT,)) -> dict[str, Section]:
    cluster = ClusterSection((Endpoint("10.1.0.1", 8080, "store-1"), Endpoint("10.1.0.2", 8080)))
    sections: dict[str, Section] = {STORE: cluster}
    sections |= {port_key(port.address, port.port): port for port in ports}
    sections |= {route_key(one.kind, one.namespace, one.name): one for one in routes}
    return sections


def ask(
    sections: dict[str, Section],
    path: str = "/",
    host: str = "example.com",
    headers: tuple[tuple[str, str], ...] = (),
    **other: object,
) -> Explanation:
    arguments = {"method": "GET", "scheme": "http", "port": 80} | other
    return explain(sections, host=host, path=path, headers=headers, **arguments)


def reason(found: Explanation, name: str) -> str:
    reasons = [c.reason for c in found.candidates if c.route == f"HTTPRoute/infra/{name}"]
    assert len(reasons) == 1
    return reasons[0]


def test_the_whole_way_is_told() -> None:
    broken = ClusterSection((Endpoint("10.1.0.3", 1),), tls=UpstreamTLS("x", broken="no CA"))
    winner = RouteRule(
        (RouteMatch(PathMatch("PathPrefix", "/api")),),
        name="api",
        filters=(
            HeaderModifier(
                "request",
                set=(HeaderValue("a", "1"),),
                add=(HeaderValue("b", "2"),),
                remove=("c",),
            ),
            Rewrite("store.local", PathModifier("ReplacePrefixMatch", "/v2")),
            Mirror("cluster/m", 1, 10),
            Cors(("https://a.com",)),
        ),
        backends=(
            WeightedBackend(STORE, 6),
            WeightedBackend(None, 2),
            WeightedBackend("cluster/empty", 1),
            WeightedBackend("cluster/broken", 1),
        ),
    )
    sections = table(route("r", rule("/other"), winner)) | {"cluster/broken": broken}
    found = ask(sections, "/api/x?y=1")
    assert (found.gateway, found.listener, found.route) == ("infra/gw", ANY, "HTTPRoute/infra/r")
    assert (found.rule, found.rule_index, found.match_index, found.status) == ("api", 1, 0, None)
    assert [(b.share, b.note) for b in found.backends] == [
        (0.6, ""),
        (0.2, "500: the reference does not resolve; see ResolvedRefs in the route's status"),
        (0.1, "503: no ready endpoints"),
        (0.1, "502: no CA"),
    ]
    assert found.backends[0].endpoints == ("10.1.0.1:8080 (store-1)", "10.1.0.2:8080")
    assert found.filters == (
        "request headers: set a: 1, add b: 2, remove c",
        "rewrite to host store.local, path prefix /v2",
        "mirror 1 in 10 of the requests to cluster/m",
        "CORS for origins https://a.com",
    )
    assert reason(found, "r") == "path is /api/x, not under /other"
    assert msgspec.json.decode(msgspec.json.encode(found), type=Explanation) == found


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (rule("/api"), "path is /x, not under /api"),
        (rule("/api", "Exact"), "path is /x, not /api"),
        (rule("/a.*", "RegularExpression"), "path is /x, which does not match /a.*"),
        (rule(method="POST"), "method is GET, not POST"),
        (rule(headers=(ValueMatch("Version", "v2"),)), "header version is v1, not v2"),
        (
            rule(headers=(ValueMatch("version", "v[2-9]", "RegularExpression"),)),
            "header version is v1, which does not match v[2-9]",
        ),
        (rule(headers=(ValueMatch("env", "a"),)), "header env is missing"),
        (rule(query=(ValueMatch("q", "2"),)), "query parameter q is 1, not 2"),
        (rule(query=(ValueMatch("z", "2"),)), "query parameter z is missing"),
        (rule("/api", method="PUT"), "path is /x, not under /api, method is GET, not PUT"),
        (
            RouteRule((RouteMatch(PathMatch("Exact", "/a")), RouteMatch(method="PUT"))),
            "path is /x, not /a; method is GET, not PUT",
        ),
    ],
)
def test_why_a_rule_does_not_match(other: RouteRule, why: str) -> None:
    sections = table(route("winner", rule()), route("other", other))
    found = ask(sections, "/x?q=1", headers=(("Version", "v1"),))
    assert found.route == "HTTPRoute/infra/winner"
    assert reason(found, "other") == why
    # The same where nothing matches at all.
    found = ask(table(route("other", other)), "/x?q=1", headers=(("Version", "v1"),))
    assert (found.status, found.detail, found.route) == (404, "no route matches", "")
    assert reason(found, "other") == why


@pytest.mark.parametrize(
    ("winner", "why"),
    [
        (route("w", rule(), hosts=("a.com",)), "more specific hostname"),
        (route("w", rule("/x", "Exact")), "exact path before expression before prefix"),
        (
            route("w", rule("/.*", "RegularExpression")),
            "exact path before expression before prefix",
        ),
        (route("w", rule("/x")), "longer path"),
        (route("w", rule(method="GET")), "has a method match"),
        (route("w", rule(headers=(ValueMatch("h", "1"),))), "more header matches"),
        (route("w", rule(query=(ValueMatch("q", "1"),))), "more query parameter matches"),
        (route("w", rule(), created="2023-01-01T00:00:00Z"), "older route"),
        (route("a", rule()), 'first by "namespace/name"'),
    ],
)
def test_why_a_rule_that_matches_lost(winner: RouteSection, why: str) -> None:
    found = ask(table(winner, route("loser", rule())), "/x?q=1", "a.com", (("h", "1"),))
    assert found.route == f"HTTPRoute/infra/{winner.name}"
    assert reason(found, "loser") == f"a more specific match won: {why}"


def test_an_earlier_rule_of_the_route_wins() -> None:
    found = ask(table(route("r", rule(), rule())))
    assert found.rule_index == 0
    assert [(c.rule, c.reason) for c in found.candidates] == [
        ("1", "a more specific match won: earlier rule")
    ]


def test_the_nearest_are_told_first() -> None:
    sections = table(
        route("a-other-listener", rule(), listener=FOO, hosts=("*.foo.com",)),
        route("b-other-host", rule(), hosts=("one.org",)),
        route("c-two-away", rule("/y", method="PUT")),
        route("d-one-away", rule("/y")),
        route("e-lost", rule(), rule()),
        route("f-refused", rule("(", "RegularExpression")),
    )
    found = ask(sections, "/x")
    assert [candidate.route.rpartition("/")[2] for candidate in found.candidates] == [
        "f-refused",
        "e-lost",
        "d-one-away",
        "c-two-away",
        "b-other-host",
        "a-other-listener",
    ]


def test_hosts_and_listeners() -> None:
    sections = table(
        route("any", rule()),
        route("named", rule(), hosts=("one.org", "*.two.org")),
        route("foo", rule(), listener=FOO, hosts=("*.foo.com",)),
    )
    found = ask(sections, host="example.com:80")
    assert found.route == "HTTPRoute/infra/any"
    assert reason(found, "named") == "hostname *.two.org and one.org does not match example.com"
    assert reason(found, "foo") == (
        f"its listener is for hostname *.foo.com; host example.com belongs to {ANY}"
    )
    found = ask(sections, host="a.foo.com")
    assert (found.listener, found.route) == (FOO, "HTTPRoute/infra/foo")
    assert reason(found, "any") == (
        f"its listener is for hostname *; host a.foo.com belongs to {FOO}"
    )


def test_a_host_of_no_listener() -> None:
    port = PortSection("10.0.0.9", 80, "HTTP", "infra/gw", (Listener(FOO, "*.foo.com"),))
    found = ask(table(route("r", rule(), listener=FOO), ports=(port,)))
    assert (found.gateway, found.listener, found.status) == ("infra/gw", "", 404)
    assert found.detail == "no listener is for host example.com"
    assert reason(found, "r") == "its listener is for hostname *.foo.com, host is example.com"


def test_a_refused_route_says_why() -> None:
    found = ask(table(route("bad", rule("(", "RegularExpression"))))
    assert reason(found, "bad").startswith("refused: rules[0].matches[0].path.value: ")


AWAY = Redirect("https", "b.com", PathModifier("ReplaceFullPath", "/n"), 8443, 301)


@pytest.mark.parametrize(
    ("one", "status", "detail"),
    [
        (RouteRule((), error_status=500), 500, "the rule is not whole; see the route's status"),
        (RouteRule(()), 500, "the rule has no backend with a weight"),
        (RouteRule((), filters=(AWAY,)), 301, "redirect to https://b.com:8443/n?q"),
    ],
)
def test_answers_of_the_proxys_own(one: RouteRule, status: int, detail: str) -> None:
    found = ask(table(route("r", one)), "/x?q")
    assert (found.route, found.status, found.detail) == ("HTTPRoute/infra/r", status, detail)


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"path": "x"}, 400), ({"path": "/../x"}, 400), ({"host": "a b"}, 400)],
)
def test_what_is_no_request(fields: dict[str, str], status: int) -> None:
    found = ask(table(route("r", rule())), **fields)
    assert (found.status, found.route) == (status, "")
    assert found.detail


def test_where_nothing_listens() -> None:
    sections = table(route("r", rule()))
    there = f"there is http on {PORT.address} port 80"
    assert ask(sections, port=81).detail == f"nothing listens on port 81 for http; {there}"
    found = ask(sections, scheme="https")
    assert found.detail == f"nothing listens on port 80 for https; {there}"
    found = ask(sections, address="10.0.0.8")
    assert found.detail == f"nothing listens on 10.0.0.8 port 80 for http; {there}"
    assert ask({}).detail == "nothing listens on port 80 for http; there is no listener"


def test_headers_are_taken_as_a_worker_takes_them() -> None:
    names = ("x-forwarded-for", "x-request-id", "upgrade")
    rules = [rule(f"/{name}", headers=(ValueMatch(name, "1"),)) for name in names]
    sections = table(*(route(f"r{i}", one) for i, one in enumerate(rules)))
    headers = (("X-Forwarded-For", "1"), ("X-Request-Id", "1"), ("Upgrade", "1"))
    assert reason(ask(sections, "/x-forwarded-for", headers=headers), "r0") == (
        "header x-forwarded-for is 127.0.0.1, not 1"
    )
    assert reason(ask(sections, "/x-request-id", headers=headers), "r1") == (
        "header x-request-id is missing"
    )
    assert reason(ask(sections, "/upgrade", headers=headers), "r2") == "header upgrade is missing"
    upgrade = (*headers, ("Connection", "Upgrade"))
    assert ask(sections, "/upgrade", headers=upgrade).route == "HTTPRoute/infra/r2"
    trusting = sections | {SETTINGS_KEY: Settings(trusted_hops=1)}
    assert ask(trusting, "/x-request-id", headers=headers).route == "HTTPRoute/infra/r1"
    assert ask(sections, headers=(("a b", "1"),)).status == 400


def test_gateways_that_share_a_port_are_told_apart_by_address() -> None:
    other = PortSection("10.0.0.8", 80, "HTTP", "infra/other", (Listener("Gateway/infra/other/l"),))
    sections = table(
        route("r", rule()), route("s", rule("/s"), listener="Gateway/infra/other/l"),
        ports=(PORT, other),
    )  # fmt: skip
    assert ask(sections, address="10.0.0.9").gateway == "infra/gw"
    assert ask(sections, address="10.0.0.8").gateway == "infra/other"
    # Without an address: the one that has an answer; the other's routes are candidates.
    found = ask(sections, "/x")
    assert found.gateway == "infra/gw"
    assert reason(found, "s") == "path is /x, not under /s"


# --- agreement ----------------------------------------------------------------------------------

paths = st.sampled_from(("/", "/a", "/a/b", "/ab"))
rule_matches = st.builds(
    RouteMatch,
    st.builds(PathMatch, st.sampled_from(("Exact", "PathPrefix", "RegularExpression")), paths),
    st.sampled_from((None, "GET", "POST")),
    st.sampled_from(((), (ValueMatch("x", "1"),))),
    st.sampled_from(((), (ValueMatch("q", "1"),))),
)
routes = st.builds(
    RouteSection,
    st.sampled_from(("HTTPRoute", "GRPCRoute")),
    st.just("infra"),
    st.sampled_from(("a", "b", "c", "d")),
    st.sampled_from(("", "2024-01-01T00:00:00Z")),
    st.lists(
        st.builds(
            Attachment,
            st.sampled_from((ANY, FOO)),
            st.sampled_from((("*",), ("a.foo.com", "*.foo.com"), ("a.com",))),
        ),
        max_size=2,
    ).map(tuple),
    st.lists(st.builds(RouteRule, st.lists(rule_matches, max_size=2).map(tuple)), max_size=3).map(
        tuple
    ),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(routes, max_size=6),
    st.sampled_from(("a.com", "a.foo.com", "z.org")),
    st.sampled_from(("/", "/a", "/a/b/", "/ab?q=1")),
    st.sampled_from((None, "1", "2")),
)
def test_explanations_agree_with_the_matcher(
    sections: list[RouteSection], host: str, path: str, header: str | None
) -> None:
    headers = () if header is None else (("X", header),)
    given_table = table(*sections)
    found = ask(given_table, path, host, headers)
    index = RouteIndex()
    for key, section in given_table.items():
        if isinstance(section, RouteSection):
            index.put(key, section)
    target, _, query = path.partition("?")
    head = RequestHead(
        b"GET", b"http", host.encode(), target.encode(), query.encode() or None,
        [(b"x", header.encode())] if header else [],
    )  # fmt: skip
    listener = PortIndex(PORT).select(host.encode(), None)
    assert listener is not None
    match = index.match(listener.id, head)
    expected = (match.route.label, match.rule.index) if match else ("", None)
    assert (found.route, found.rule_index) == expected
    assert found == ask(dict(reversed(given_table.items())), path, host, headers)
    # Every other rule on the port is told once for each of its listeners, with a reason.
    told = [(c.listener, c.route, c.rule) for c in found.candidates]
    in_force = [one for one in given_table.values() if isinstance(one, RouteSection)]
    rules = {
        (a.listener, f"{one.kind}/{one.namespace}/{one.name}", str(i))
        for one in in_force
        for a in one.attachments
        for i in range(len(one.rules))
    }
    if match:
        rules.remove((listener.id, match.route.label, match.rule.label))
    assert sorted(told) == sorted(rules)
    for candidate in found.candidates:
        assert candidate.reason
        assert bool(match) or not candidate.reason.startswith("a more specific match won")
