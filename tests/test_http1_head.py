"""Heads: what is understood, what is refused, and that h11 reads what we read."""

from __future__ import annotations

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.http1_head import _second_opinion, parse_request, parse_response
from l7proxy.message import (
    BodyLength,
    Framing,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
)
from mesh.model.nodeconfig import Settings

SETTINGS = Settings(max_headers=20, max_body_bytes=1000)


def request(text: str | bytes, scheme: bytes = b"http") -> RequestHead:
    return parse_request(raw(text), scheme, SETTINGS).head


def raw(text: str | bytes) -> bytes:
    """Lines to a head; bytes as they are."""
    return text if isinstance(text, bytes) else text.replace("\n", "\r\n").encode() + b"\r\n\r\n"


def refused(text: str | bytes) -> tuple[int, str]:
    with pytest.raises(ProtocolError) as caught:
        request(text)
    assert caught.value.detail
    return caught.value.status, caught.value.reason


def test_request_head() -> None:
    head = request(
        "GET /a/./b?q=1 HTTP/1.1\nHost: Example.com:8080\nX-One:  1 \nx-two:\nX-One: 3\n"
        "Connection: keep-alive, TE, x-gone\nX-Gone: 1\nTE: trailers"
    )
    assert head == RequestHead(
        b"GET", b"http", b"example.com:8080", b"/a/b", b"q=1",
        [(b"x-one", b"1"), (b"x-two", b""), (b"x-one", b"3")], trailers_ok=True,
    )  # fmt: skip
    assert head.host == b"example.com"


@pytest.mark.parametrize(
    ("text", "authority", "target"),
    [
        ("GET http://A/x?y HTTP/1.1\nHost: a", b"a", b"/x?y"),
        ("GET HTTP://a:81 HTTP/1.1\nHost: a:81", b"a:81", b"/"),
        ("GET http://a?x HTTP/1.1\nHost: a", b"a", b"/?x"),
        ("OPTIONS http://a HTTP/1.1\nHost: a", b"a", b"*"),
        ("OPTIONS * HTTP/1.1\nHost: a", b"a", b"*"),
        ("GET http://a/ HTTP/1.0", b"a", b"/"),
        ("GET / HTTP/1.0", b"", b"/"),
        ("GET / HTTP/1.0\nHost: a.", b"a", b"/"),
        ("get / HTTP/1.1\nHost: [::1]", b"[::1]", b"/"),
    ],
)
def test_destination(text: str, authority: bytes, target: bytes) -> None:
    head = request(text)
    assert (head.authority, head.target) == (authority, target)


@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("GET / HTTP/1.1\nHost: a", Framing.NONE),
        ("GET / HTTP/1.1\nHost: a\nContent-Length: 0", 0),
        ("POST / HTTP/1.0\nContent-Length: 5", 5),
        ("POST / HTTP/1.1\nHost: a\nContent-Length:\t1000 ", 1000),
        ("POST / HTTP/1.1\nHost: a\nTransfer-Encoding: Chunked", Framing.STREAM),
    ],
)
def test_body(text: str, body: BodyLength) -> None:
    assert request(text).body == body


@pytest.mark.parametrize(
    ("text", "keep_alive"),
    [
        ("GET / HTTP/1.1\nHost: a", True),
        ("GET / HTTP/1.1\nHost: a\nConnection: Close", False),
        ("GET / HTTP/1.1\nHost: a\nConnection: keep-alive, close", False),
        ("GET / HTTP/1.0", False),
        ("GET / HTTP/1.0\nConnection: Keep-Alive", True),
        ("GET / HTTP/1.0\nConnection: keep-alive, close", False),
    ],
)
def test_persistence(text: str, keep_alive: bool) -> None:
    assert parse_request(raw(text), b"http", SETTINGS).keep_alive is keep_alive


def test_expectation() -> None:
    head = request("PUT / HTTP/1.1\nHost: a\nContent-Length: 1\nExpect: 100-Continue")
    assert head.expect_continue
    assert not head.headers
    assert not request("GET / HTTP/1.1\nHost: a\nExpect: 100-continue").expect_continue
    assert not request("PUT / HTTP/1.0\nContent-Length: 1\nExpect: 100-continue").expect_continue
    assert refused("PUT / HTTP/1.1\nHost: a\nExpect: x") == (417, "bad_expectation")


def test_upgrade() -> None:
    wanted = "Host: a\nConnection: Upgrade\nUpgrade: WebSocket"
    assert request(f"GET / HTTP/1.1\n{wanted}").upgrade == b"websocket"
    assert request(f"GET / HTTP/1.0\n{wanted}").upgrade is None
    assert request(f"PUT / HTTP/1.1\n{wanted}\nContent-Length: 1").upgrade is None


HOST = "GET / HTTP/1.1\nHost: a\n"


@pytest.mark.parametrize(
    ("text", "status", "reason"),
    [
        ("GET / HTTP/1.1", 400, "no_host"),
        ("GET / HTTP/1.1\nHost:", 400, "bad_host"),
        ("GET / HTTP/1.1\nHost: a\nHost: a", 400, "several_hosts"),
        ("GET / HTTP/1.1\nHost: a b", 400, "bad_host"),
        ("GET / HTTP/1.1\nHost: a, b", 400, "bad_host"),
        ("GET http://b/ HTTP/1.1\nHost: a", 400, "host_conflict"),
        ("GET http://a:80/ HTTP/1.1\nHost: a", 400, "host_conflict"),
        ("GET http://u@a/ HTTP/1.1\nHost: a", 400, "bad_host"),
        ("GET http:///x HTTP/1.1\nHost: a", 400, "bad_host"),
        ("GET https://a/ HTTP/1.1\nHost: a", 400, "other_scheme"),
        ("GET ftp://a/ HTTP/1.1\nHost: a", 400, "bad_target"),
        ("GET a HTTP/1.1\nHost: a", 400, "bad_target"),
        ("GET * HTTP/1.1\nHost: a", 400, "bad_target"),
        ("GET /a#b HTTP/1.1\nHost: a", 400, "bad_target"),
        ("GET http://a/#b HTTP/1.1\nHost: a", 400, "bad_target"),
        ("CONNECT a:443 HTTP/1.1\nHost: a:443", 501, "method_not_served"),
        ("TRACE / HTTP/1.1\nHost: a", 501, "method_not_served"),
        ("GET / HTTP/1.2\nHost: a", 505, "bad_version"),
        ("GET / HTTP/2.0\nHost: a", 505, "bad_version"),
        ("GET / HTTP/0.9\nHost: a", 505, "bad_version"),
        ("GET / HTTP/1.32\nHost: a", 400, "bad_request_line"),
        ("GET / http/1.1\nHost: a", 400, "bad_request_line"),
        ("GET /", 400, "bad_request_line"),
        ("GET  / HTTP/1.1\nHost: a", 400, "bad_request_line"),
        ("GET /  HTTP/1.1\nHost: a", 400, "bad_request_line"),
        ("GET /\tHTTP/1.1\nHost: a", 400, "bad_request_line"),
        (" GET / HTTP/1.1\nHost: a", 400, "obs_fold"),
        ("G@T / HTTP/1.1\nHost: a", 400, "bad_request_line"),
        (HOST + "Content-Length: 1\nTransfer-Encoding: chunked", 400, "length_and_coding"),
        (HOST + "Content-Length: 5\nContent-Length: 5", 400, "several_lengths"),
        (HOST + "Content-Length: 5\nContent-Length: 6", 400, "several_lengths"),
        (HOST + "Content-Length: 5, 5", 400, "bad_length"),
        (HOST + "Content-Length: +5", 400, "bad_length"),
        (HOST + "Content-Length: -5", 400, "bad_length"),
        (HOST + "Content-Length: 010", 400, "bad_length"),
        (HOST + "Content-Length: 0x10", 400, "bad_length"),
        (HOST + "Content-Length: 1_0", 400, "bad_length"),
        (HOST + "Content-Length: 5 5", 400, "bad_length"),
        (HOST + "Content-Length:", 400, "bad_length"),
        (HOST + "Content-Length: 9" + "9" * 30, 400, "bad_length"),
        (HOST + "Content-Length: 1001", 413, "body_too_large"),
        (HOST + "Transfer-Encoding: identity", 400, "bad_coding"),
        (HOST + "Transfer-Encoding: ,chunked", 400, "bad_coding"),
        (HOST + "Transfer-Encoding: chunked, identity", 400, "bad_coding"),
        (HOST + "Transfer-Encoding: chunked\nTransfer-Encoding: chunked", 400, "bad_coding"),
        (HOST + "Transfer-Encoding:", 400, "bad_coding"),
        (HOST + "Transfer-Encoding: xchunked", 400, "bad_coding"),
        (HOST + "Transfer-Encoding: gzip, chunked", 501, "coding_not_served"),
        ("GET / HTTP/1.0\nTransfer-Encoding: chunked", 400, "coding_in_http10"),
        (HOST + "Connection: content-length", 400, "bad_connection"),
        (HOST + "X : y", 400, "space_before_colon"),
        (HOST + ": y", 400, "bad_header"),
        (HOST + "X", 400, "bad_header"),
        (HOST + "X y: z", 400, "bad_header"),
        (HOST + " folded: y", 400, "obs_fold"),
        (HOST + "X: y\n\tfolded", 400, "obs_fold"),
        (HOST + "X: a\x0bb", 400, "control_byte"),
        (HOST + "X: a\x7fb", 400, "control_byte"),
        (HOST + "X: a\x00b", 400, "nul_byte"),
        (HOST + "X: a\rY: b", 400, "bare_cr"),
        (HOST + "X\r: b", 400, "bare_cr"),
        (HOST + "é: b", 400, "bad_header"),
        (HOST + "\n".join(f"x{n}: 1" for n in range(20)), 431, "too_many_headers"),
        (b"GET / HTTP/1.1\r\nHost: a\nX: y\r\n\r\n", 400, "bare_lf"),
        (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400, "bare_lf"),
        (b"GET / HTTP/1.1\r\r\nHost: a\r\n\r\n", 400, "bare_cr"),
    ],
)
def test_refused(text: str | bytes, status: int, reason: str) -> None:
    assert refused(text) == (status, reason)


# --- h11 as oracle --------------------------------------------------------------------------------

_LINES = st.lists(
    st.sampled_from(
        [
            b"Content-Length: 5", b"Content-Length: 05", b"Transfer-Encoding: chunked", b"Host: b",
            b"Connection: close", b"connection: keep-alive, x", b"X: y", b"x:", b"X_y: \t z \t",
            b"Expect: 100-continue", b"X: \xe9", b"Upgrade: websocket", b" x: y", b"X : y",
            b"X: a\x01b", b"TE: trailers", b"!#$%&'*+-.^_`|~09: !",
        ]
    )
    | st.binary(max_size=12),
    max_size=5,
)  # fmt: skip
_STARTS = st.sampled_from(
    [b"GET / HTTP/1.1", b"P!ST /a?b HTTP/1.1", b"GET / HTTP/1.0", b"GET http://a/ HTTP/1.1"]
) | st.binary(max_size=8).map(lambda part: b"GET /" + part + b" HTTP/1.1")


@given(_STARTS, _LINES)
def test_h11_reads_what_we_read(start: bytes, lines: list[bytes]) -> None:
    """Whatever we take, h11 takes too and finds the same fields in it: also the plain heads that
    are not shown to it while serving."""
    block = b"\r\n".join([start, b"Host: a", *lines, b"", b""])
    if block.index(b"\r\n\r\n") != len(block) - 4:
        return
    try:
        head = parse_request(block, b"http", SETTINGS).head
    except ProtocolError:
        return
    oracle = h11.Connection(h11.SERVER)
    oracle.receive_data(block)
    event = oracle.next_event()
    assert isinstance(event, h11.Request)
    assert event.method == head.method
    assert [field for field in event.headers if field in head.headers] == head.headers
    framing = dict(event.headers).get(b"content-length", b"")
    assert framing == (b"%d" % head.body if isinstance(head.body, int) else b"")
    assert (b"transfer-encoding" in dict(event.headers)) == (head.body is Framing.STREAM)


@pytest.mark.parametrize(
    ("block", "fields", "reason"),
    [
        (raw("GET / HTTP/1.0\nX: 1"), [(b"x", b"2")], "ambiguous_head"),
        (raw("GET / HTTP/1.0\nX: 1"), [], "ambiguous_head"),
        (raw("GET / HTTP/1.0\nX"), [(b"x", b"")], "bad_head"),
    ],
)
def test_two_readings_are_one_too_many(block: bytes, fields: Headers, reason: str) -> None:
    """Were our own parser to err, the head would be refused."""
    with pytest.raises(ProtocolError) as caught:
        _second_opinion(block, b"GET", b"/", fields)
    assert (caught.value.status, caught.value.reason) == (400, reason)


# --- responses ------------------------------------------------------------------------------------


def response(
    text: str | bytes, method: bytes = b"GET", upgrade: bytes | None = None
) -> tuple[ResponseHead, bool]:
    return tuple(parse_response(raw(text), method, upgrade, 20))


@pytest.mark.parametrize(
    ("text", "method", "body", "keep_alive"),
    [
        ("HTTP/1.1 200 OK\nContent-Length: 5", b"GET", 5, True),
        ("HTTP/1.1 200\nContent-Length: 0", b"GET", 0, True),
        ("HTTP/1.1 200 Fine and\tg\xf6d\nContent-Length: 0", b"GET", 0, True),
        ("HTTP/1.1 200 OK\nTransfer-Encoding: chunked", b"GET", Framing.STREAM, True),
        ("HTTP/1.1 200 OK", b"GET", Framing.CLOSE, False),
        ("HTTP/1.1 200 OK", b"HEAD", Framing.NONE, True),
        ("HTTP/1.1 200 OK\nContent-Length: 5", b"HEAD", 5, True),
        ("HTTP/1.1 204 No Content", b"GET", Framing.NONE, True),
        ("HTTP/1.1 204 No Content\nContent-Length: 0", b"GET", Framing.NONE, True),
        ("HTTP/1.1 304 Not Modified\nContent-Length: 5", b"GET", 5, True),
        ("HTTP/1.1 100 Continue", b"GET", Framing.NONE, True),
        ("HTTP/1.1 200 OK\nContent-Length: 5\nConnection: close", b"GET", 5, False),
        ("HTTP/1.0 200 OK\nContent-Length: 5", b"GET", 5, False),
        ("HTTP/1.0 200 OK\nContent-Length: 5\nConnection: keep-alive", b"GET", 5, True),
        ("HTTP/1.0 200 OK", b"GET", Framing.CLOSE, False),
        ("HTTP/1.1 999 Odd\nContent-Length: 5", b"GET", 5, True),
    ],
)
def test_response(text: str, method: bytes, body: BodyLength, keep_alive: bool) -> None:
    head, kept = response(text, method)
    assert (head.body, head.headers, kept) == (body, [], keep_alive)


def test_response_to_an_upgrade() -> None:
    text = "HTTP/1.1 101 X\nConnection: upgrade\nUpgrade: WebSocket\nSec-WebSocket-Accept: x"
    head, _ = response(text, b"GET", b"websocket")
    assert head == ResponseHead(101, [(b"sec-websocket-accept", b"x")], Framing.NONE, b"websocket")
    for upgrade in (None, b"other"):
        with pytest.raises(ProtocolError) as caught:
            response(text, b"GET", upgrade)
        assert (caught.value.status, caught.value.reason) == (502, "bad_upgrade")
    refused_upgrade, _ = response(text.replace("101", "200") + "\nContent-Length: 0", b"GET")
    assert refused_upgrade.upgrade is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("HTTP/1.1 200 OK\nContent-Length: 1\nTransfer-Encoding: chunked", "length_and_coding"),
        ("HTTP/1.1 200 OK\nContent-Length: 1\nContent-Length: 1", "several_lengths"),
        ("HTTP/1.1 200 OK\nContent-Length: 1, 1", "bad_length"),
        ("HTTP/1.1 200 OK\nTransfer-Encoding: gzip, chunked", "coding_not_served"),
        ("HTTP/1.1 200 OK\nTransfer-Encoding: identity", "bad_coding"),
        ("HTTP/1.0 200 OK\nTransfer-Encoding: chunked", "coding_in_http10"),
        ("HTTP/1.1 204 No\nContent-Length: 5", "body_without_body"),
        ("HTTP/1.1 100 Continue\nTransfer-Encoding: chunked", "body_without_body"),
        ("HTTP/1.1 200 OK\nX : y", "space_before_colon"),
        ("HTTP/1.1 200 OK\nX: y\n z", "obs_fold"),
        ("HTTP/1.1 200 OK\nConnection: set-cookie", "bad_connection"),
        ("HTTP/1.1  200 OK", "bad_status_line"),
        ("HTTP/1.1 20 OK", "bad_status_line"),
        ("HTTP/1.1 2000 OK", "bad_status_line"),
        ("HTTP/1.1 099 OK", "bad_status_line"),
        ("HTTP/2.0 200 OK", "bad_status_line"),
        ("HTTP/1.2 200 OK", "bad_status_line"),
        ("ICY 200 OK", "bad_status_line"),
        (b"HTTP/1.1 200 OK\nX: y\r\n\r\n", "bare_lf"),
        (b"HTTP/1.1 200 O\0K\r\n\r\n", "nul_byte"),
    ],
)
def test_refused_response(text: str | bytes, reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        response(text)
    assert (caught.value.status, caught.value.reason) == (502, reason)
