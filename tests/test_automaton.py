"""The automaton's verdicts: the kernel's, the compiled C's and the reference's, head by head."""

from __future__ import annotations

import base64
import contextlib
from random import Random

import msgspec
import pytest
import yaml
from automaton_world import Judges, check, kernel
from bpf_world import missing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_http1_hostile import LLHTTP, SMUGGLING, with_host
from test_routing_oracle import LISTENERS, sections

from l7proxy.automaton_nfa import Nfa, Unsupported
from l7proxy.automaton_plan import plan
from l7proxy.native import Judged
from l7proxy.route_compile import Regex
from l7proxy.routing import RouteIndex
from mesh.model.nodeconfig import Settings
from mesh.model.policyconfig import HeaderRule, HttpRule, PolicyRule
from mesh.model.routeconfig import (
    Attachment,
    Rewrite,
    RouteRule,
    RouteSection,
    SessionPersistence,
    WeightedBackend,
)
from mesh.model.section import route_key

LIMITS = Settings(max_headers=12, max_body_bytes=5_000)
METHODS = (b"GET", b"POST", b"G", b"CONNECT", b"TRACE", b"OPTIONS", b"get")
NAMES = (b"x", b"y", b"X", b"xy", b"accept", b"x-forwarded-for")
ODD = (
    b"Connection: close", b"Connection: keep-alive", b"connection:  Keep-Alive ",
    b"Connection: x", b"Content-Length: 5", b"Content-Length: 05", b"content-length: 5, 5",
    b"Content-Length: +5", b"Content-Length: 0", b"Content-Length: 5001", b"Content-Length: 5000",
    b"Content-Length: 99999999999999999999", b"Transfer-Encoding: chunked", b"TE: trailers",
    b"Upgrade: websocket", b"Expect: 100-continue", b"Host: a.com", b"host:b.a.com",
    b"X-Forwarded-Client-Cert: me", b"Keep-Alive: 5", b"Proxy-Connection: keep-alive",
    b"x : 1", b" x: 1", b"x\t: 1", b": 1", b"x", b"x:", b"x: \xe9", b"x: a\x00b", b"x:\x0b1",
    b"x: 1\n", b"x: 1\r", b"Cookie: a=1", b"trailer: x", b"via: 1.1 a",
)  # fmt: skip
AUTHORITIES = (
    b"a.com", b"b.a.com:80", b"c.b.a.com", b"q.com", b"A.com", b"a.com.", b"a.com:", b"[::1]",
    b"a.com:080", b"a.com:99999", b"a..com", b"-", b".a.com", b"a b", b"", b"a.com:8080",
    b"x" * 63 + b".a.com", b".".join([b"y" * 60] * 4) + b".b.a.com",
    b".".join([b"y" * 60] * 4) + b".cc.b.a.com", b"a.com, b.a.com",
)  # fmt: skip
TARGETS = (
    b"/", b"/a", b"/a/b", b"/ab", b"/a/", b"//a", b"/a/../b", b"/a/.", b"/.a", b"/a;x", b"/%61",
    b"/a%2fb", b"*", b"http://a.com/a", b"/a#f", b"/a\\b", b"/a|b", b"/\xc3", b"a", b"/b/b/b",
    b"/a~/b",
)  # fmt: skip
QUERIES = (
    b"", b"?", b"?x=1", b"?x=2&y=1", b"?y=1&y=2", b"?x=%31", b"?x=+", b"?z", b"?x", b"?x=1&&y=2",
    b"?=1&x=1", b"?x=1=2", b"?a#b", b"?x=1?", b"?\"'", b"?%78=1", b"?y&x=1", b"?xx=1&x=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The kernel's half, None where there are no rights: the rest is tested everywhere."""
    if missing() is not None:
        yield None
        return
    with kernel(tmp_path_factory.mktemp("bpf")) as one:
        yield one


def a_field(random: Random) -> bytes:
    if random.random() < 0.4:
        return random.choice(ODD)
    name = random.choice(NAMES) + b":" + random.choice((b" ", b" ", b"", b"\t "))
    value = random.choice((b"1", b"2", b"", b"1 2", b"12", b"a" * 40, b"1,2", b"a.com"))
    return name + value + random.choice((b"", b"", b" ", b" \t"))


def a_head(random: Random) -> bytes:
    """As clients send them, and with things in them that they should not have."""
    plain = random.random() < 0.5
    version = b"HTTP/1.1" if plain else random.choice((b"HTTP/1.1", b"HTTP/1.0", b"http/1.1"))
    method = random.choice(METHODS[:2] if plain else METHODS)
    target = random.choice(TARGETS[:5] if plain else TARGETS) + random.choice(QUERIES)
    lines = [a_field(random) for _ in range(random.choice((0, 0, 1, 2, 3, 14)))]
    authority = random.choice(AUTHORITIES[:4] if plain else AUTHORITIES)
    lines.insert(random.randint(0, len(lines)), b"Host: " + authority)
    head = b"\r\n".join((method + b" " + target + b" " + version, *lines)) + b"\r\n\r\n"
    if random.random() < 0.2:
        head += random.choice((b"body", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"\r\n"))
    if random.random() < 0.3:
        at = random.randrange(len(head))
        byte = bytes((random.choice(b"\r\n\0 \t:/?&=%.;,#aA1\x7f\x80\xff"),))
        cut = random.randint(0, 3)
        head = head[:at] + random.choice((byte, b"", byte * 2)) + head[at + cut :]
    return head


http_rules = st.builds(
    HttpRule,
    st.sampled_from((None, "GET", "GET|POST", "P.*", "(?i)get")),
    st.sampled_from((None, "/a.*", "/(a|b)/?", "/[^/]+", "/a/b", "/.*b$", "/a\\b")),
    st.sampled_from(
        (None, None, "A\\.com", ".*\\.a\\.com", "[^b].*", "b.a.com:80", "[A-Z]+\\.com")
    ),
    st.lists(
        st.builds(
            HeaderRule,
            st.sampled_from(("x", "y", "cookie")),
            st.sampled_from((None, "1", "1,2")),
            st.sampled_from(("DENY", "DENY", "LOG", "ADD", "REPLACE")),
        )
        | st.builds(HeaderRule, st.just("host"), st.sampled_from((None, "a.com", "b.a.com:80"))),
        max_size=2,
    ).map(tuple),
)
policy_rules = st.lists(st.lists(http_rules, min_size=1, max_size=3).map(tuple), max_size=3).map(
    lambda several: tuple(PolicyRule(f"rule {i}", http=one) for i, one in enumerate(several))
)


# Half of the rules are the proxy's.
_WHOLE = {"backends": (WeightedBackend("c"),)}
_OTHER = (
    {},
    {"request_timeout_ms": 5},
    {"session": SessionPersistence()},
    {"backends": (WeightedBackend(None), WeightedBackend("c"))},
    {"filters": (Rewrite("a.com"),)},
)
finished = st.builds(
    lambda section, kinds: msgspec.structs.replace(
        section,
        rules=tuple(
            msgspec.structs.replace(rule, **_WHOLE | kind)
            for rule, kind in zip(section.rules, kinds, strict=False)
        ),
    ),
    sections,
    st.lists(st.sampled_from((*({},) * 4, *_OTHER)), min_size=3, max_size=3),
)


def index_of(given_sections) -> RouteIndex:
    routes = RouteIndex()
    for section in given_sections:
        routes.put(route_key(section.kind, section.namespace, section.name), section)
    return routes


@settings(max_examples=40, deadline=None, phases=(Phase.generate,))
@given(
    st.lists(finished, max_size=4),
    st.sampled_from((*LISTENERS, *LISTENERS, "")),
    st.lists(policy_rules, max_size=2),
    st.integers(0, 1 << 32),
)
def test_no_executor_says_what_the_reference_does_not(real, routes, listener, policies, seed):
    random = Random(seed)
    index = index_of(routes)
    with contextlib.closing(Judges(real, plan(listener, index, policies, LIMITS))) as judges:
        for _ in range(100):
            check(judges, index, LIMITS, a_head(random))


# --- one by one -----------------------------------------------------------------------------------

ROUTES = """
rules:
- matches: [{path: {type: Exact, value: /exact}, method: GET}]
- matches: [{path: {type: RegularExpression, value: "/items/[0-9]+"}}]
- matches: [{path: {value: /api}, headers: [{name: x-version, value: v2}]}]
- matches:
  - path: {value: /api}
    headers: [{name: x-trace, value: "[0-9a-f]{4,8}", type: RegularExpression}]
- matches: [{path: {value: /api}, query: [{name: user, value: ann}]}]
- matches: [{path: {value: /api}}]
- matches: [{path: {value: /slow}}]
  request_timeout_ms: 100
- matches: [{path: {value: /}}]
"""  # fmt: skip


def a_section(routes: str = ROUTES) -> list[RouteSection]:
    rules = msgspec.convert(yaml.safe_load(routes)["rules"], tuple[RouteRule, ...])
    rules = tuple(msgspec.structs.replace(rule, backends=_WHOLE["backends"]) for rule in rules)
    places = (Attachment(LISTENERS[0], ("*",)),)
    return [RouteSection("HTTPRoute", "ns", "r", "", places, rules)]


def a_table(routes: str = ROUTES) -> RouteIndex:
    return index_of(a_section(routes))


@pytest.fixture(scope="module")
def table(real):
    index = a_table()
    with contextlib.closing(Judges(real, plan(LISTENERS[0], index, [], Settings()))) as judges:
        yield index, judges


def place(judges: Judges, judged: Judged) -> int:
    """Which rule of its route, from 1."""
    return judged.rule and judges.plan.rules[judged.rule - 1].result.rule.index + 1


def lines(*some: str) -> bytes:
    return "".join(f"{line}\r\n" for line in some).encode() + b"\r\n"


@pytest.mark.parametrize(
    ("rule", "head"),
    [
        (1, lines("GET /exact HTTP/1.1", "Host: a")),
        (8, lines("POST /exact HTTP/1.1", "Host: a", "Content-Length: 0")),
        (8, lines("DELETE /exact HTTP/1.1", "Host: a")),
        (0, lines("POST /exact HTTP/1.1", "Host: a")),
        (0, lines("PUT /exact HTTP/1.1", "Host: a", "Content-Length:\t1")),
        (0, lines("PUT /exact HTTP/1.1", "Host: a", "Content-Length: 1\t")),
        (0, lines("GET /exact HTTP/1.1", "Host: a", "Accept: a\tb")),
        (8, lines("GET /exact/ HTTP/1.1", "Host: a")),
        (2, lines("GET /items/42 HTTP/1.1", "Host: a")),
        (8, lines("GET /items/4x HTTP/1.1", "Host: a")),
        (3, lines("GET /api HTTP/1.1", "Host: a", "X-VERSION:  v2 ")),
        (3, lines("GET /api/x HTTP/1.1", "x-Version: v2", "Host: a")),
        (6, lines("GET /api/x HTTP/1.1", "X-Version: v22", "Host: a")),
        (4, lines("GET /api HTTP/1.1", "Host: a", "X-Trace: 00ff")),
        (6, lines("GET /api HTTP/1.1", "Host: a", "X-Trace: 00ff00ff0")),
        (5, lines("GET /api?x=1&user=ann HTTP/1.1", "Host: a")),
        (6, lines("GET /api?x=1&user=anne HTTP/1.1", "Host: a")),
        (8, lines("GET /apis HTTP/1.1", "Host: a")),
        (8, lines("PUT / HTTP/1.1", "Host: a.b-c:8080", "Content-Length: 123456789")),
        (8, lines("GET / HTTP/1.1", "Connection: keep-alive", "Host: a", "Accept: */*")),
        (8, lines("GET / HTTP/1.1", "Host: a", f"Cookie: {'x' * 3000}", "X-Version: v1")),
        (8, lines("GET / HTTP/1.1", "Host: a", *(f"a{i}: {'x' * i}" for i in range(90)))),
        (7, lines("GET /slow HTTP/1.1", "Host: a")),  # it has a timeout
        # The proxy's: two of what a rule reads; what the proxy would change or refuse.
        (0, lines("GET /api HTTP/1.1", "Host: a", "X-Version: v2", "X-Version: v1")),
        (0, lines("GET /api?user=ann&user=bob HTTP/1.1", "Host: a")),
        (0, lines("GET /api?%75ser=ann HTTP/1.1", "Host: a")),
        (0, lines("GET /%61pi HTTP/1.1", "Host: a")),
        (0, lines("GET /a//b HTTP/1.1", "Host: a")),
        (0, lines("GET / HTTP/1.1", "Host: A")),
        (0, lines("GET / HTTP/1.1", "Host: a", "Connection: close")),
        (0, lines("GET / HTTP/1.1", "Host: a", "Transfer-Encoding: chunked")),
        (0, lines("GET / HTTP/1.1", "Host: a", "Content-Length: 1234567890")),
        (0, lines("GET / HTTP/1.1", "Host: a", *("a: b" for i in range(100)))),
        (0, lines("GET / HTTP/1.1", "Host: a", f"X-Version: {'x' * 7961}")),
        (0, lines("GET / HTTP/1.1")),
        (0, lines("GET / HTTP/1.1", "Host: a")[:-1]),
    ],
)  # fmt: skip
def test_what_the_kernel_decides_and_what_it_leaves(table, rule, head):
    index, judges = table
    for tail in (b"", b"x", b"GET /exact HTTP/1.1\r\nHost: a\r\n\r\n", b"\0" * 9000):
        assert place(judges, check(judges, index, Settings(), head + tail)) == rule


def test_heads_of_every_length_to_the_last_byte(table):
    """What is skipped, and the end of what is read, at every place in a chunk."""
    index, judges = table
    bare = lines("GET /api HTTP/1.1", "Host: a", "Accept: ", "X-Version: v2")
    for size in (*range(20), *range(7930, 7950)):
        head = bare.replace(b"Accept: ", b"Accept: " + b"v" * size)
        found = check(judges, index, Settings(), head)
        assert place(judges, found) == (3 if len(head) <= 8000 else 0), len(head)
        assert not check(judges, index, Settings(), head[:-1]).rule
        for at in range(0, len(head), 7 if size < 20 else 611):
            odd = (b"\x80", b"\x7f", b"\x1f", b"\xff")[at % 4]
            check(judges, index, Settings(), head[:at] + odd + head[at + 1 :])


def test_no_byte_is_skipped_that_has_a_meaning(table):
    """In a value that no rule reads, at each place of a chunk."""
    index, judges = table
    head = lines("GET / HTTP/1.1", "Host: a", "Accept: " + "v" * 40)
    for byte in range(256):
        for at in range(head.index(b"vvv") + 12, head.index(b"vvv") + 20):
            found = check(judges, index, Settings(), head[:at] + bytes((byte,)) + head[at + 1 :])
            assert bool(found.rule) == (0x20 <= byte < 0x7F)


def test_limits_of_settings(real):
    limits = Settings(max_head_bytes=64, max_headers=3, max_body_bytes=10)
    index = a_table()
    with contextlib.closing(Judges(real, plan(LISTENERS[0], index, [], limits))) as judges:
        for size in range(60, 68):
            head = lines("GET /exact HTTP/1.1", "Host: a", "A: ")
            head = head.replace(b"A: ", b"A: " + b"a" * (size - len(head)))
            assert bool(check(judges, index, limits, head).rule) == (len(head) <= 64)
        for length in (9, 10, 11):
            head = lines("PUT / HTTP/1.1", "Host: a", f"Content-Length: {length}")
            assert bool(check(judges, index, limits, head).rule) == (length <= 10)
        for count in (1, 2, 3):
            head = lines("GET / HTTP/1.1", "Host: a", *("a: b",) * count)
            assert bool(check(judges, index, limits, head).rule) == (count < 3)


def test_more_to_find_than_there_is_room_for(real):
    """The first must not be forgotten, not for bytes behind the head either."""
    names = [f"h{i}" for i in range(40)]
    routes = "rules:\n- matches: [{path: {type: Exact, value: /a}, method: DELETE}]\n" + "".join(
        f"- matches: [{{path: {{value: /}}, headers: [{{name: {one}, value: x}}]}}]\n"
        for one in names
    )
    index = a_table(routes + "- matches: [{path: {value: /}}]")
    with contextlib.closing(Judges(real, plan(LISTENERS[0], index, [], Settings()))) as judges:
        for tail in (b"", b"x", b"x" * 100):
            judged = []
            for count in range(41):
                fields = [f"{one}: y" for one in names[:count]]
                head = lines("DELETE /a HTTP/1.1", "Host: a", *fields) + tail
                judged.append(place(judges, check(judges, index, Settings(), head)))
            # Beside the fields: method, path, where the host begins and ends, and the end.
            assert judged == [1] * 27 + [0] * 14


def test_hosts_longer_than_names(real):
    """They are matched by nothing but "*" (l7proxy.routing), so they are the proxy's."""
    places = (Attachment(LISTENERS[0], ("*.a.com", "*")),)
    one = msgspec.structs.replace(a_section()[0], attachments=places)
    index = index_of([one])
    with contextlib.closing(Judges(real, plan(LISTENERS[0], index, [], Settings()))) as judges:
        for size in range(248, 264):
            for port in ("", ":80"):
                host = ".".join(["y" * 40] * 7)[-size + 6 :].strip(".").rjust(size - 6, "y")
                host = host + ".a.com" + port
                found = check(judges, index, Settings(), lines("GET / HTTP/1.1", f"Host: {host}"))
                assert bool(found.rule) == (len(host) <= 253)


@pytest.mark.skipif(not SMUGGLING, reason="needs ../shared/http")
def test_published_attacks(table):
    """Also with a Host where they lack one, so that this is not why."""
    index, judges = table
    odd = [base64.b64decode(case["bytes"]) for case in LLHTTP if case["type"] == "request"]
    payloads = [*SMUGGLING, *odd, *map(with_host, odd)]
    judged = [check(judges, index, Settings(), payload).rule for payload in payloads if payload]
    assert 0 < sum(map(bool, judged)) < len(judged)


@pytest.mark.parametrize(
    ("value", "holds", "fields"),
    [
        ("2", True, ["x: 2"]),
        ("2", True, ["y: evil", "X:  2 ", "xx: evil"]),
        ("2", False, ["x: 2", "x: 2"]),
        ("2", False, ["x: 2", "X: evil"]),
        ("2", False, ["X: evil", "y: 2", "x: 2"]),
        ("2", False, ["x:", "x: 2"]),
        ("2", False, ["x: 2, evil"]),
        ("2", False, ["x : 2"]),
        ("2", False, ["y: 2"]),
        (None, True, ["x:"]),
        (None, False, ["y: 2", "xx: 2"]),
    ],
)
def test_a_header_twice_is_not_the_one_that_a_policy_asks_for(real, value, holds, fields):
    """Nothing passes by the proxy for it, whoever's rules they are."""
    asked = PolicyRule("p", http=(HttpRule(headers=(HeaderRule("x", value, "DENY"),)),))
    index = a_table()
    with contextlib.closing(Judges(real, plan(LISTENERS[0], index, [(asked,)], LIMITS))) as judges:
        head = lines("GET /a HTTP/1.1", "Host: a", *fields)
        check(judges, index, LIMITS, head)
        assert bool(judges.judge(head, egress=1).rule) == holds
        assert bool(judges.judge(head, ingress=1).rule) == holds


def test_a_rule_that_needs_the_proxy_keeps_its_place(real):
    """So does one that no automaton can have: what it wants besides counts."""
    routes = """
rules:
- matches: [{path: {value: /a}, headers: [{name: x, value: "1"}]}]
  retry: {attempts: 2}
- matches: [{path: {value: /a}, headers: [{name: y, value: "a\\\\bc", type: RegularExpression}]}]
- matches: [{path: {value: /a}}]
- matches: [{path: {value: /}}]
"""
    index = a_table(routes)
    with contextlib.closing(Judges(real, plan(LISTENERS[0], index, [], Settings()))) as judges:
        assert [one.why for one in judges.plan.rules] == ["it retries", "", "", ""]
        assert len(judges.automaton.left_out) == 1
        ask = [("/a", "x: 1"), ("/a", "y: 1"), ("/a", "z: 1"), ("/b", "x: 1")]
        heads = [lines(f"GET {path} HTTP/1.1", "Host: a", field) for path, field in ask]
        # The second rule's header cannot be read, so that it may hold for everything below /a.
        found = [place(judges, check(judges, index, Settings(), head)) for head in heads]
        assert found == [0, 0, 0, 4]


def test_too_many_rules_end_with_the_proxy(real):
    """The first stay in the kernel; no lower rule answers for one that does not fit."""
    values = [f"v{i}" for i in range(300)]
    routes = "rules:\n" + "".join(
        f"- matches: [{{path: {{value: /a}}, headers: [{{name: x, value: {one}}}]}}]\n"
        for one in values
    )
    index = a_table(routes + "- matches: [{path: {value: /}}]")
    with contextlib.closing(Judges(real, plan(LISTENERS[0], index, [], Settings()))) as judges:
        assert "more than 192 conditions" in judges.automaton.limit
        (kept,) = judges.automaton.kept
        assert 100 < kept < 192
        for i in (0, kept - 1, kept, 299):
            head = lines("GET /a HTTP/1.1", "Host: a", f"x: {values[i]}")
            found = check(judges, index, Settings(), head)
            assert place(judges, found) == (i + 1 if i < kept else 0)
        assert check(judges, index, Settings(), lines("GET /b HTTP/1.1", "Host: a")).rule == 0


expressions = st.recursive(
    st.sampled_from(
        (
            "a",
            "b",
            ".",
            "[ab]",
            "[^a]",
            "[a-c]",
            r"\d",
            r"\w",
            r"\.",
            "/",
            "A",
            r"[^\d]",
            "-",
            r"\s",
        )
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda some: f"({'|'.join(some)})"),
        st.builds("(?:{}){}".format, inner, st.sampled_from(("*", "+", "?", "{2}", "{1,3}", "*?"))),
        inner.map("^{}".format),
        inner.map("{}$".format),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(expressions, st.booleans(), st.lists(st.text("abcA1./- ", max_size=6), min_size=20))
def test_expressions_mean_what_they_mean_to_re2(source, any_case, texts):
    nfa = Nfa()
    try:
        nfa.add_regex(0, source, any_case=any_case)
    except Unsupported:
        return
    oracle = Regex(f"(?i:{source})" if any_case else source, "")
    for text in texts:
        states = nfa.start
        for byte in text.encode():
            states = nfa.step(states, byte)
        assert (0 in nfa.holding(states)) == oracle.matches(text.encode()), (source, text)
