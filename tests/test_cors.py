"""CORS by the text of HTTPCORSFilter and the Fetch standard."""

from __future__ import annotations

import pytest

from l7proxy.cors import compile_cors, preflight, respond
from l7proxy.field_rules import Refused
from l7proxy.message import Framing, Headers, RequestHead, ResponseHead
from mesh.model.routeconfig import Cors

ORIGIN = "https://www.foo.com"


def head(method: str = "GET", **fields: str) -> RequestHead:
    headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in fields.items()]
    return RequestHead(method.encode(), b"https", b"api.com", b"/", None, headers)


def ask(cors: Cors, origin: str = ORIGIN, method: str = "PUT", headers: str = "") -> Headers:
    """The headers of a preflight's answer, Vary aside."""
    fields = {"origin": origin, "access_control_request_method": method}
    if headers:
        fields["access_control_request_headers"] = headers
    answer = preflight(compile_cors(cors, "f"), head("OPTIONS", **fields))
    assert answer is not None
    assert (answer.status, answer.body) == (204, Framing.NONE)
    names = [name for name, _ in answer.headers]
    assert len(set(names)) == len(names)
    assert b"Origin" in dict(answer.headers)[b"vary"]
    return {
        name.decode().removeprefix("access-control-"): value.decode()
        for name, value in answer.headers
        if name != b"vary"
    }


def test_a_preflight_is_answered_in_full() -> None:
    cors = Cors(
        allow_origins=("https://other.com", ORIGIN),
        allow_credentials=True,
        allow_methods=("GET", "PUT"),
        allow_headers=("X-One", "x-two"),
        expose_headers=("x-three",),
        max_age_s=3600,
    )
    assert ask(cors) == {
        "allow-origin": ORIGIN,
        "allow-credentials": "true",
        "allow-methods": "GET, PUT",
        "allow-headers": "X-One, x-two",
        "max-age": "3600",
    }


def test_what_is_not_configured_is_not_sent() -> None:
    assert ask(Cors(allow_origins=(ORIGIN,))) == {"allow-origin": ORIGIN, "max-age": "5"}


def test_other_origins_learn_nothing() -> None:
    cors = Cors(allow_origins=(ORIGIN,), allow_methods=("*",), allow_credentials=True)
    assert ask(cors, "https://evil.com") == {}


def test_wildcards_without_credentials() -> None:
    cors = Cors(allow_origins=("*",), allow_methods=("*",), allow_headers=("*",))
    assert ask(cors) == {
        "allow-origin": "*", "allow-methods": "*", "allow-headers": "*", "max-age": "5",
    }  # fmt: skip
    # The names asked for: "*" would not cover Authorization.
    assert ask(cors, headers="authorization,x-a")["allow-headers"] == "authorization, x-a"


def test_wildcards_with_credentials_are_never_sent_as_such() -> None:
    cors = Cors(
        allow_origins=("*",), allow_methods=("*",), allow_headers=("*",), allow_credentials=True
    )
    assert ask(cors, method="PATCH", headers="X-A , b\x00d, x-b") == {
        "allow-origin": ORIGIN,
        "allow-credentials": "true",
        "allow-methods": "PATCH",
        "allow-headers": "X-A, x-b",
        "max-age": "5",
    }
    assert "allow-headers" not in ask(cors)
    assert "allow-methods" not in ask(cors, method="NOT A METHOD")


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("GET", {"origin": ORIGIN, "access_control_request_method": "PUT"}),
        ("OPTIONS", {"origin": ORIGIN}),
        ("OPTIONS", {"access_control_request_method": "PUT"}),
    ],
)
def test_other_requests_are_no_preflights(method: str, fields: dict[str, str]) -> None:
    cors = compile_cors(Cors(allow_origins=("*",)), "f")
    assert preflight(cors, head(method, **fields)) is None


@pytest.mark.parametrize(
    ("configured", "origin", "allowed"),
    [
        ("*", "https://a.com", True),
        ("*", "null", True),
        ("https://a.com", "https://a.com", True),
        ("https://A.com", "https://a.com", True),
        ("https://a.com", "http://a.com", False),
        ("https://a.com", "https://a.com.evil.org", False),
        ("https://a.com", "https://evil.org/https://a.com", False),
        ("https://a.com", "null", False),
        ("https://a.com", "https://a.com:443", True),
        ("https://a.com:443", "https://a.com", True),
        ("http://a.com:80", "http://a.com", True),
        ("https://a.com", "https://a.com:8443", False),
        ("https://a.com:8443", "https://a.com", False),
        ("https://*.a.com", "https://b.a.com", True),
        ("https://*.a.com", "https://c.b.a.com", True),
        ("https://*.a.com", "https://a.com", False),
        ("https://*.a.com", "https://.a.com", False),
        ("https://*.a.com", "https://xa.com", False),
        ("https://*.a.com", "http://b.a.com", False),
        ("https://*.a.com", "https://b.a.com:8443", False),
        ("https://*.a.com:8443", "https://b.a.com:8443", True),
        ("https://*.a.com", "https://user@b.a.com", False),
        ("https://*.a.com", "https://evil.com/.a.com", False),
        ("https://*.a.com", "https://evil.com?.a.com", False),
        ("https://*.a.com", "https://evil.com\\.a.com", False),
        ("https://*.a.com", "https://*.a.com", False),
        ("http://*", "http://anything.org", True),
        ("http://*", "http://[::1]", True),
        ("http://*", "https://anything.org", False),
        ("http://*:8080", "http://anything.org:8080", True),
        ("http://*:8080", "http://anything.org", False),
    ],
)
def test_origins(configured: str, origin: str, allowed: bool) -> None:
    cors = Cors(allow_origins=(configured,), allow_credentials=True)
    assert (ask(cors, origin).get("allow-origin") == origin) is allowed


@pytest.mark.parametrize(
    "origin", ["a.com", "ftp://a.com", "https://a*b.com", "https://a.com/", ""]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(Refused, match=r"f\.allowOrigins\[1\]"):
        compile_cors(Cors(allow_origins=("https://b.com", origin)), "f")


@pytest.mark.parametrize("field", ["allow_methods", "allow_headers", "expose_headers"])
def test_lists_that_would_break_the_message_are_refused(field: str) -> None:
    with pytest.raises(Refused):
        compile_cors(Cors(**{field: ("a\r\nb",)}), "f")


# --- actual responses ---------------------------------------------------------------------------


def answered(cors: Cors, headers: Headers, **request: str) -> Headers:
    response = ResponseHead(200, list(headers))
    respond(compile_cors(cors, "f"), head(**request), response)
    return response.headers


def test_actual_responses_are_shared_with_allowed_origins() -> None:
    cors = Cors(allow_origins=(ORIGIN,), allow_credentials=True, expose_headers=("x-a", "x-b"))
    assert answered(cors, [(b"x-a", b"1")], origin=ORIGIN) == [
        (b"x-a", b"1"),
        (b"vary", b"Origin"),
        (b"access-control-allow-origin", ORIGIN.encode()),
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-expose-headers", b"x-a, x-b"),
    ]


def test_the_filter_speaks_for_the_backend() -> None:
    backend = [
        (b"access-control-allow-origin", b"*"),
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-expose-headers", b"secret"),
    ]
    cors = Cors(allow_origins=(ORIGIN,))
    assert answered(cors, backend, origin="https://evil.com") == [(b"vary", b"Origin")]
    assert answered(cors, backend) == [(b"vary", b"Origin")]
    assert answered(cors, backend, origin=ORIGIN) == [
        (b"vary", b"Origin"),
        (b"access-control-allow-origin", ORIGIN.encode()),
    ]


def test_an_answer_for_everybody_does_not_vary() -> None:
    cors = Cors(allow_origins=("*",), expose_headers=("*",))
    assert answered(cors, [], origin=ORIGIN) == [
        (b"access-control-allow-origin", b"*"),
        (b"access-control-expose-headers", b"*"),
    ]


def test_with_credentials_exposed_names_are_listed() -> None:
    cors = Cors(allow_origins=("*",), expose_headers=("*",), allow_credentials=True)
    backend = [(b"x-b", b"1"), (b"set-cookie", b"c=1"), (b"x-a", b"1"), (b"x-b", b"2")]
    exposed = dict(answered(cors, backend, origin=ORIGIN))
    assert exposed[b"access-control-allow-origin"] == ORIGIN.encode()
    names = exposed[b"access-control-expose-headers"].split(b", ")
    assert {b"x-a", b"x-b"} <= set(names)
    assert b"set-cookie" not in names


@pytest.mark.parametrize("vary", [b"*", b"Accept, origin"])
def test_vary_is_not_said_twice(vary: bytes) -> None:
    after = answered(Cors(allow_origins=(ORIGIN,)), [(b"vary", vary)])
    assert after == [(b"vary", vary)]
    after = answered(Cors(allow_origins=(ORIGIN,)), [(b"vary", b"Accept")])
    assert after == [(b"vary", b"Accept"), (b"vary", b"Origin")]
