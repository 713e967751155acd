"""The matcher against a plain, slow restatement of the specification: list all, filter, sort.

The restatement shares no code with the matcher: Python's `re` for expressions, `parse_qsl` for
queries, strings throughout.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from hypothesis import given, settings
from hypothesis import strategies as st

from l7proxy.message import RequestHead
from l7proxy.routing import RouteIndex
from mesh.model.routeconfig import (
    Attachment,
    PathMatch,
    RouteMatch,
    RouteRule,
    RouteSection,
    ValueMatch,
)
from mesh.model.section import route_key

LISTENERS = ("Gateway/a/gw/one", "Gateway/a/gw/two")
HOSTS = ("*", "*.a.com", "*.b.a.com", "a.com", "b.a.com", "c.b.a.com", "z.com")
SEGMENTS = ("", "a", "b", "ab", "a~")


def paths(most: int = 3) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(SEGMENTS[1:]), max_size=most).flatmap(
        lambda parts: st.sampled_from(("/" + "/".join(parts), "/" + "/".join(parts) + "/"))
    ).map(lambda path: path.replace("//", "/"))  # fmt: skip


path_matches = st.one_of(
    st.builds(PathMatch, st.sampled_from(("Exact", "PathPrefix")), paths()),
    st.builds(
        PathMatch,
        st.just("RegularExpression"),
        st.sampled_from(("/a/?", "/.*", "/(a|b)+", "/[ab]*/b", "/a")),
    ),
)
value_matches = st.lists(
    st.builds(
        ValueMatch,
        st.sampled_from(("x", "y")),
        st.sampled_from(("1", "2", "[12]")),
        st.sampled_from(("Exact", "RegularExpression")),
    ),
    max_size=2,
    unique_by=lambda match: match.name,
).map(tuple)
matches = st.builds(
    RouteMatch, path_matches, st.sampled_from((None, None, "GET", "POST")), value_matches,
    value_matches,
)  # fmt: skip
rules = st.builds(RouteRule, st.lists(matches, max_size=3).map(tuple))
attachments = st.lists(
    st.builds(
        Attachment,
        st.sampled_from(LISTENERS),
        st.lists(st.sampled_from(HOSTS), min_size=1, max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=2,
).map(tuple)
sections = st.builds(
    RouteSection,
    st.sampled_from(("HTTPRoute", "GRPCRoute")),
    st.sampled_from(("ns1", "ns2")),
    st.sampled_from(("r1", "r2", "r3")),
    st.sampled_from(("", "2024-01-01T00:00:00Z", "2024-01-02T00:00:00Z")),
    attachments,
    st.lists(rules, max_size=3).map(tuple),
)
requests = st.builds(
    RequestHead,
    st.sampled_from((b"GET", b"POST")),
    st.just(b"http"),
    st.sampled_from((b"", b"a.com", b"b.a.com:80", b"c.b.a.com", b"d.c.b.a.com", b"q.com")),
    paths(4).map(str.encode),
    st.sampled_from((None, b"x=1", b"x=2&y=1", b"y=1&y=2&x=%31")),
    st.lists(st.tuples(st.sampled_from((b"x", b"y")), st.sampled_from((b"1", b"2"))), max_size=3),
)


def hostname_rank(pattern: str, host: str) -> tuple[int, int] | None:
    if pattern == host:
        return (0, 0)
    if pattern == "*":
        return (2, 0)
    if pattern.startswith("*.") and host.endswith(pattern[1:]) and len(host) >= len(pattern):
        return (1, -len(pattern))
    return None


def value_holds(match: ValueMatch, found: str | None) -> bool:
    if found is None:
        return False
    if match.type == "Exact":
        return found == match.value
    return re.fullmatch(match.value, found) is not None


def match_rank(match: RouteMatch, request: RequestHead) -> tuple[int, ...] | None:
    path, value = request.path.decode(), match.path.value
    if match.path.type == "Exact":
        if path != value:
            return None
        rank = (0, 0)
    elif match.path.type == "RegularExpression":
        if not re.fullmatch(value, path):
            return None
        rank = (1, -len(value))
    else:
        wanted = [part for part in value.split("/") if part]
        if path.removesuffix("/").split("/")[1 : len(wanted) + 1] != wanted:
            return None
        rank = (2, -len("/".join(wanted)))
    if match.method is not None and match.method != request.method.decode():
        return None
    for header in match.headers:
        found = [v.decode() for n, v in request.headers if n.decode() == header.name]
        if not value_holds(header, ",".join(found) if found else None):
            return None
    pairs = parse_qsl((request.query or b"").decode(), keep_blank_values=True)
    for parameter in match.query:
        values = [v for n, v in pairs if n == parameter.name]
        if not value_holds(parameter, values[0] if values else None):
            return None
    return (*rank, match.method is None, -len(match.headers), -len(match.query))


def oracle(
    routes: list[RouteSection], listener: str, request: RequestHead
) -> tuple[str, int, int] | None:
    host = request.authority.decode().partition(":")[0]
    found = []
    for section in routes:
        hosts = [h for a in section.attachments if a.listener == listener for h in a.hostnames]
        for pattern in hosts:
            host_rank = hostname_rank(pattern, host)
            if host_rank is None:
                continue
            for i, rule in enumerate(section.rules):
                for j, match in enumerate(rule.matches or (RouteMatch(),)):
                    rank = match_rank(match, request)
                    if rank is not None:
                        age = (section.created == "", section.created)
                        name = (f"{section.namespace}/{section.name}", section.kind)
                        key = route_key(section.kind, section.namespace, section.name)
                        found.append(((host_rank, rank, age, name, i, j), (key, i, j)))
    return min(found)[1] if found else None


tables = st.lists(sections, max_size=8)


@settings(max_examples=300, deadline=None)
@given(tables, st.lists(requests, min_size=1, max_size=6), st.data())
def test_the_index_agrees_with_the_specification(
    table: list[RouteSection], heads: list[RequestHead], data: st.DataObject
) -> None:
    """Whatever the order of puts, replacements and removals."""
    index = RouteIndex()
    in_force: dict[str, RouteSection] = {}
    for section in table:
        key = route_key(section.kind, section.namespace, section.name)
        index.put(key, section)
        in_force[key] = section
    gone = data.draw(st.sets(st.sampled_from(sorted(in_force)))) if in_force else set()
    for key in gone:
        index.remove(key)
        del in_force[key]
    for head in heads:
        for listener in LISTENERS:
            found = index.match(listener, head)
            got = found and (found.route.key, found.rule.index, found.match_index)
            assert got == oracle(list(in_force.values()), listener, head)
            if found and found.prefix is not None:
                assert (head.path + b"/").startswith(found.prefix + b"/")
    for key in list(in_force):
        index.remove(key)
    assert index._listeners == {}
