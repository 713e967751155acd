"""The automaton's verdicts: the kernel's, the compiled C's and the reference's, head by head."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from automaton_world import Judges, Kernel, check, kernel, reference
from bpf_world import missing
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_http1_hostile import LLHTTP, SMUGGLING, with_host
from test_routing_oracle import HOSTS, LISTENERS, sections

from l7proxy.automaton_plan import HttpRules, plan
from l7proxy.message import Framing
from l7proxy.routing import RouteIndex
from mesh.model.nodeconfig import Settings
from mesh.model.policyconfig import HeaderRule, HttpRule, PolicyRule
from mesh.model.routeconfig import Rewrite, SessionPersistence, WeightedBackend
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
    b"/a%2fb", b"*", b"http://a.com/a", b"/a#f", b"/a\\b", b"/a|b", b"/\xc3", b"a", b"/b/b/b", b"/a~/b",
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
    st.sampled_from((None, None, "A\\.com", ".*\\.a\\.com", "[^b].*", "b.a.com:80", "[A-Z]+\\.com")),
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


@settings(max_examples=60, deadline=None, phases=(Phase.generate,))
@given(
    st.lists(finished, max_size=4),
    st.sampled_from((*LISTENERS, *LISTENERS, "")),
    st.lists(policy_rules, max_size=2),
    st.integers(0, 1 << 32),
)
def test_no_executor_says_what_the_reference_does_not(real, routes, listener, policies, seed):
    random = Random(seed)
    index = index_of(routes)
    judges = Judges(real, plan(listener, index, policies, LIMITS))
    try:
        for _ in range(100):
            check(judges, index, LIMITS, a_head(random))
    finally:
        judges.close()
