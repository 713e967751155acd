"""Filters on heads: tables from the text of HTTPRouteFilter."""

from __future__ import annotations

import pytest

from l7proxy import filters
from l7proxy.field_rules import Refused
from l7proxy.message import Headers, RequestHead, ResponseHead
from l7proxy.routing import RouteIndex, RouteMatchResult
from mesh.model.nodeconfig import PortSection
from mesh.model.routeconfig import (
    Attachment,
    Filter,
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
    WeightedBackend,
)


def head(path: bytes = b"/", headers: Headers | None = None, **fields: object) -> RequestHead:
    fields = {"scheme": b"http", "authority": b"example.org", "query": None} | fields
    return RequestHead(method=b"GET", path=path, headers=headers or [], **fields)


def matched(
    request: RequestHead,
    *rule_filters: Filter,
    prefix: str = "/",
    backend_filters: tuple[Filter, ...] = (),
    match: PathMatch | None = None,
) -> RouteMatchResult:
    rule = RouteRule(
        (RouteMatch(match or PathMatch("PathPrefix", prefix)),),
        filters=rule_filters,
        backends=(WeightedBackend("cluster/a", filters=backend_filters),),
    )
    index = RouteIndex()
    index.put(
        "route/r", RouteSection("HTTPRoute", "n", "r", "", (Attachment("L", ("*",)),), (rule,))
    )
    found = index.match("L", request)
    assert found is not None
    return found


def filtered(request: RequestHead, *rule_filters: Filter, prefix: str = "/") -> RequestHead:
    found = matched(request, *rule_filters, prefix=prefix)
    return filters.request(found.rule.filters, request, found)


def header(name: str, value: str) -> HeaderValue:
    return HeaderValue(name, value)


# --- headers ------------------------------------------------------------------------------------

BEFORE = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]


@pytest.mark.parametrize(
    ("modifier", "after"),
    [
        ({"set": (header("a", "9"),)}, [(b"b", b"2"), (b"a", b"9")]),
        ({"set": (header("C", "9"),)}, [*BEFORE, (b"c", b"9")]),
        ({"add": (header("a", "9"),)}, [*BEFORE, (b"a", b"9")]),
        ({"add": (header("a", "bar,baz"),)}, [*BEFORE, (b"a", b"bar,baz")]),
        ({"remove": ("A", "unknown")}, [(b"b", b"2")]),
        (
            {"set": (header("a", "8"),), "add": (header("a", "9"),)},
            [(b"b", b"2"), (b"a", b"8"), (b"a", b"9")],
        ),
        # Of names that are the same, the first counts.
        ({"set": (header("a", "8"), header("A", "9"))}, [(b"b", b"2"), (b"a", b"8")]),
        # Removing comes last.
        ({"set": (header("b", "8"),), "remove": ("b",)}, [(b"a", b"1"), (b"a", b"3")]),
        ({"add": (header("c", "8"),), "remove": ("c",)}, BEFORE),
    ],
)
def test_header_modifiers(modifier: dict[str, object], after: Headers) -> None:
    request = head(headers=list(BEFORE))
    assert filtered(request, HeaderModifier("request", **modifier)).headers == after
    assert request.headers == BEFORE
    response = ResponseHead(200, list(BEFORE))
    found = matched(request, HeaderModifier("response", **modifier))
    filters.response(found.rule.filters, response)
    assert response.headers == after
    assert filters.request(found.rule.filters, request, found) is request


def test_rule_and_backend_filters_add_up() -> None:
    one = HeaderModifier("request", set=(header("a", "rule"),), add=(header("b", "rule"),))
    two = HeaderModifier("request", set=(header("a", "backend"),), add=(header("b", "backend"),))
    request = head(b"/p/x")
    rewrites = [
        Rewrite(hostname=f"{name}.org", path=PathModifier("ReplacePrefixMatch", f"/{name}"))
        for name in ("rule", "backend")
    ]
    found = matched(request, one, rewrites[0], prefix="/p", backend_filters=(two, rewrites[1]))
    after = filters.request(found.rule.filters, request, found)
    after = filters.request(found.rule.backends[0].filters, after, found)
    assert after.headers == [(b"b", b"rule"), (b"a", b"backend"), (b"b", b"backend")]
    # The rule's rewrite has taken the prefix; the host is the backend's to say.
    assert (after.authority, after.path) == (b"backend.org", b"/rule/x")


@pytest.mark.parametrize(
    "name",
    [
        *("Host", "Content-Length", "Transfer-Encoding", "Connection", "Upgrade", "TE", "Trailer"),
        *("Keep-Alive", "Proxy-Connection", "Expect", "X-Forwarded-Client-Cert"),
        *("", "a b", "a:", "a\r\nb", "é"),
    ],
)
@pytest.mark.parametrize("direction", ["request", "response"])
def test_names_that_filters_may_not_touch_are_refused(name: str, direction: str) -> None:
    for field, change in (
        ("set[0].name", HeaderModifier(direction, set=(header(name, "1"),))),
        ("add[0].name", HeaderModifier(direction, add=(header(name, "1"),))),
        ("remove[0]", HeaderModifier(direction, remove=(name,))),
    ):
        with pytest.raises(Refused) as refusal:
            matched(head(), change)
        assert str(refusal.value).startswith(f"rules[0].filters[0].{field}: ")


@pytest.mark.parametrize("value", ["a\r\nb: c", "a\nb", "a\0", "a\rb", " a", "a ", "\x7f"])
def test_values_that_would_break_the_message_are_refused(value: str) -> None:
    with pytest.raises(Refused, match=r"filters\[0\]\.set\[0\]\.value"):
        matched(head(), HeaderModifier("response", set=(header("a", value),)))


# --- paths --------------------------------------------------------------------------------------

# The table of HTTPPathModifier.replacePrefixMatch.
PREFIX_TABLE = [
    ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
    ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
    ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
    ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
    ("/foo", "/foo", "/xyz", "/xyz"),
    ("/foo/", "/foo", "/xyz", "/xyz/"),
    ("/foo/bar", "/foo", "", "/bar"),
    ("/foo/", "/foo", "", "/"),
    ("/foo", "/foo", "", "/"),
    ("/foo/", "/foo", "/", "/"),
    ("/foo", "/foo", "/", "/"),
    # Beyond the table.
    ("/foo", "/", "/xyz", "/xyz/foo"),
    ("/", "/", "/xyz", "/xyz/"),
    ("/foo/bar", "/foo", "xyz", "/xyz/bar"),
    ("/f%2Fo/bar", "/f%2fo", "/xyz", "/xyz/bar"),
]


@pytest.mark.parametrize(("path", "prefix", "value", "after"), PREFIX_TABLE)
def test_prefixes_are_replaced(path: str, prefix: str, value: str, after: str) -> None:
    modifier = PathModifier("ReplacePrefixMatch", value)
    request = head(path.encode(), query=b"q=/foo")
    result = filtered(request, Rewrite(path=modifier), prefix=prefix)
    assert (result.path, result.query) == (after.encode(), b"q=/foo")
    assert request.path == path.encode()
    found = matched(request, Redirect(path=modifier), prefix=prefix)
    assert found.rule.redirect is not None
    answer = filters.redirect(found.rule.redirect, request, port(80), found)
    assert answer.headers == [(b"location", b"http://example.org" + after.encode() + b"?q=/foo")]


@pytest.mark.parametrize(
    ("value", "after"), [("/one", b"/one"), ("/one/", b"/one/"), ("", b"/"), ("one", b"/one")]
)
def test_full_paths_are_replaced(value: str, after: bytes) -> None:
    rewrite = Rewrite(path=PathModifier("ReplaceFullPath", value))
    assert filtered(head(b"/a/b", query=b"q"), rewrite).target == after + b"?q"


@pytest.mark.parametrize("value", ["/a b", "/a?b", "/a#b", "/a\r\n", "/é", "/%4", "/../a", "/a/."])
@pytest.mark.parametrize("kind", ["ReplaceFullPath", "ReplacePrefixMatch"])
def test_replacements_that_are_no_paths_are_refused(value: str, kind: str) -> None:
    with pytest.raises(Refused, match=r"rules\[0\]\.filters\[0\]\.path"):
        matched(head(), Rewrite(path=PathModifier(kind, value)))


def test_the_host_is_rewritten_without_a_port() -> None:
    request = head(authority=b"rewrite.example:8080")
    assert filtered(request, Rewrite(hostname="One.example.org")).authority == b"one.example.org"
    assert request.authority == b"rewrite.example:8080"


# --- redirects ----------------------------------------------------------------------------------


def port(number: int) -> PortSection:
    return PortSection("0.0.0.0", number, "HTTP", "n/gw", ())


@pytest.mark.parametrize(
    ("redirect", "request_fields", "listener_port", "location"),
    [
        # The conformance case HTTPRouteRedirectPortAndScheme.
        ({}, {}, 80, "http://example.org/p"),
        ({"port": 80}, {}, 80, "http://example.org/p"),
        ({"port": 8080}, {}, 80, "http://example.org:8080/p"),
        ({"scheme": "https"}, {}, 80, "https://example.org/p"),
        ({"scheme": "https", "port": 443}, {}, 80, "https://example.org/p"),
        ({"scheme": "https", "port": 8443}, {}, 80, "https://example.org:8443/p"),
        ({}, {}, 8080, "http://example.org:8080/p"),
        ({"port": 80}, {}, 8080, "http://example.org/p"),
        ({"scheme": "https"}, {}, 8080, "https://example.org/p"),
        ({}, {"scheme": b"https"}, 443, "https://example.org/p"),
        ({"port": 443}, {"scheme": b"https"}, 443, "https://example.org/p"),
        ({"port": 8443}, {"scheme": b"https"}, 443, "https://example.org:8443/p"),
        ({"scheme": "http"}, {"scheme": b"https"}, 443, "http://example.org/p"),
        ({"scheme": "http", "port": 80}, {"scheme": b"https"}, 443, "http://example.org/p"),
        ({"scheme": "http", "port": 8080}, {"scheme": b"https"}, 443, "http://example.org:8080/p"),
        # A well-known port of the other scheme is told.
        ({"port": 443}, {}, 80, "http://example.org:443/p"),
        ({"scheme": "https", "port": 80}, {}, 80, "https://example.org:80/p"),
        # The port of Host is not the listener's.
        ({}, {"authority": b"example.org:9999"}, 80, "http://example.org/p"),
        ({"hostname": "Other.com"}, {"authority": b"a:1"}, 8080, "http://other.com:8080/p"),
        ({}, {"authority": b"[::1]:81"}, 81, "http://[::1]:81/p"),
        ({}, {"query": b"a=b"}, 80, "http://example.org/p?a=b"),
        ({}, {"query": b""}, 80, "http://example.org/p?"),
        # HTTP/1.0 without Host.
        ({}, {"authority": b""}, 80, "/p"),
        ({}, {"authority": b"", "path": b"//evil.com"}, 80, "/.//evil.com"),
    ],
)
def test_locations(
    redirect: dict[str, object],
    request_fields: dict[str, object],
    listener_port: int,
    location: str,
) -> None:
    request = head(**({"path": b"/p"} | request_fields))
    found = matched(request, Redirect(**redirect))
    assert found.rule.redirect is not None
    answer = filters.redirect(found.rule.redirect, request, port(listener_port), found)
    assert (answer.status, answer.body) == (302, 0)
    assert answer.headers == [(b"location", location.encode())]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_all_codes_of_redirects(status: int) -> None:
    found = matched(head(), Redirect(status=status))
    assert found.rule.redirect is not None
    assert filters.redirect(found.rule.redirect, head(), port(80), found).status == status


@pytest.mark.parametrize(
    ("redirect", "field"),
    [(Redirect(status=300), "statusCode"), (Redirect(hostname="a.com/\r\nx: y"), "hostname")],
)
def test_redirects_that_are_none_are_refused(redirect: Redirect, field: str) -> None:
    with pytest.raises(Refused, match=rf"rules\[0\]\.filters\[0\]\.{field}"):
        matched(head(), redirect)


# --- mirrors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numerator", "denominator", "of_thousand"),
    [(1, 1, 1000), (0, 100, 0), (100, 100, 1000), (1, 4, 250), (3, 1000, 3)],
)
def test_mirrors_take_their_fraction(numerator: int, denominator: int, of_thousand: int) -> None:
    mirror = Mirror("cluster/m", numerator, denominator)
    taken = sum(filters.sampled(mirror, lambda at=i / 1000: at) for i in range(1000))
    assert taken == of_thousand


@pytest.mark.parametrize(("numerator", "denominator"), [(1, 0), (2, 1), (-1, 2)])
def test_fractions_that_are_none_are_refused(numerator: int, denominator: int) -> None:
    with pytest.raises(Refused, match=r"rules\[0\]\.filters\[0\]\.fraction"):
        matched(head(), Mirror("cluster/m", numerator, denominator))
