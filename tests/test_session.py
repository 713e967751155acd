"""Session persistence: what is issued is understood, by every worker, until it ends."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.field_rules import Refused
from l7proxy.message import Headers, RequestHead
from l7proxy.session import CompiledSession, compile_session, endpoint_for, response_header
from mesh.model.routeconfig import SessionPersistence

NOW = 1_700_000_000.0
ENDPOINT = "10.0.0.7:8080"


def head(headers: Headers | None = None) -> RequestHead:
    return RequestHead(b"GET", b"http", b"a.com", b"/", None, headers or [])


def session(**fields: object) -> CompiledSession:
    return compile_session(SessionPersistence(**fields), "rules[0].sessionPersistence")


def issue(
    rule: CompiledSession,
    now: float = NOW,
    *,
    secure: bool = False,
    request: RequestHead | None = None,
) -> tuple[bytes, bytes]:
    header = response_header(rule, ENDPOINT, now, secure=secure, request=request or head())
    assert header is not None
    return header


def returned(header: tuple[bytes, bytes]) -> RequestHead:
    """The request of a client that does as told."""
    name, value = header
    if name != b"set-cookie":
        return head([header])
    return head([(b"cookie", b"other=1; " + value.partition(b";")[0] + b"; more=2")])


@pytest.mark.parametrize("kind", ["Cookie", "Header"])
def test_a_session_comes_back_to_its_endpoint(kind: str) -> None:
    rule = session(type=kind, name="My-Session")
    assert endpoint_for(head(), rule, NOW) is None
    request = returned(issue(rule))
    assert endpoint_for(request, rule, NOW + 10**6) == ENDPOINT
    assert response_header(rule, ENDPOINT, NOW + 5, secure=False, request=request) is None


def test_another_endpoint_begins_another_session() -> None:
    rule = session(absolute_timeout_s=100)
    request = returned(issue(rule))
    later = response_header(rule, "10.0.0.8:80", NOW + 90, secure=False, request=request)
    assert later is not None
    assert endpoint_for(returned(later), rule, NOW + 150) == "10.0.0.8:80"


def test_cookie_attributes() -> None:
    name, value = issue(session(name="s", path="/api"), secure=True)
    pair, *attributes = value.split(b"; ")
    assert name == b"set-cookie"
    assert pair.startswith(b"s=")
    assert attributes == [b"Path=/api", b"HttpOnly", b"SameSite=Lax", b"Secure"]
    assert ENDPOINT.encode() not in pair
    _, value = issue(session(permanent=True, absolute_timeout_s=3600.0))
    assert value.split(b"; ")[1:] == [b"Path=/", b"HttpOnly", b"SameSite=Lax", b"Max-Age=3600"]


def test_the_absolute_timeout_runs_from_the_first_response() -> None:
    rule = session(absolute_timeout_s=100, idle_timeout_s=60, permanent=True)
    first = returned(issue(rule))
    assert endpoint_for(first, rule, NOW + 59) == ENDPOINT
    prolonged = issue(rule, NOW + 50, request=first)
    assert b"Max-Age=50" in prolonged[1]
    again = returned(prolonged)
    assert endpoint_for(again, rule, NOW + 99) == ENDPOINT
    assert endpoint_for(again, rule, NOW + 100) is None


def test_the_idle_timeout_runs_from_the_last_response() -> None:
    rule = session(idle_timeout_s=60)
    request = returned(issue(rule))
    assert endpoint_for(request, rule, NOW + 60) is None
    for step in range(1, 10):
        request = returned(issue(rule, NOW + step * 50, request=request))
        assert endpoint_for(request, rule, NOW + step * 50 + 59) == ENDPOINT


def token(text: str) -> bytes:
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=")


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"!",
        b"a",
        token("no dots"),
        token("1.1."),
        token("x.0.10.0.0.7:80"),
        token(f"{int(NOW) + 10_000:x}.0.10.0.0.7:80"),
        token(f"{int(NOW):x}.{10_000:x}.10.0.0.7:80"),
        token(f"{int(NOW):x}.-5.10.0.0.7:80"),
        token(f"{int(NOW):x}.0." + "a" * 1000),
        base64.urlsafe_b64encode(b"1.1.\xff\xfe"),
    ],
)
def test_values_that_were_never_issued_are_ignored(value: bytes) -> None:
    rule = session(name="s")
    assert endpoint_for(head([(b"cookie", b"s=" + value)]), rule, NOW) is None
    request = returned(issue(rule))
    request.headers.insert(0, (b"cookie", b"s=" + value))
    assert endpoint_for(request, rule, NOW) == ENDPOINT


@given(st.binary(max_size=600))
def test_no_value_makes_it_fail(value: bytes) -> None:
    for kind in ("Cookie", "Header"):
        rule = session(type=kind, name="s", absolute_timeout_s=10)
        for request in (head([(b"s", value)]), head([(b"cookie", b"s=" + value)])):
            found = endpoint_for(request, rule, NOW)
            assert found is None or isinstance(found, str)


def test_names_and_places_are_told_apart() -> None:
    rule = session(name="s")
    name, value = issue(rule)
    pair = value.partition(b";")[0]
    assert endpoint_for(head([(b"cookie", b"x" + pair)]), rule, NOW) is None
    assert endpoint_for(head([(b"s", pair[2:])]), rule, NOW) is None
    assert endpoint_for(head([(b"cookie", b's="' + pair[2:] + b'"')]), rule, NOW) == ENDPOINT
    assert name == b"set-cookie"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": "a b"}, "sessionName"),
        ({"name": "a;b"}, "sessionName"),
        ({"type": "Header", "name": "Content-Length"}, "sessionName"),
        ({"path": "/a;b"}, "'/a;b' cannot be a cookie's path"),
        ({"path": "/a\r\n"}, "cannot be a cookie's path"),
        ({"permanent": True}, "absoluteTimeout"),
    ],
)
def test_sessions_that_cannot_be_kept_are_refused(fields: dict[str, object], field: str) -> None:
    with pytest.raises(Refused) as refusal:
        session(**fields)
    assert field in str(refusal.value)
