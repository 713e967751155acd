"""Targets, authorities, connection options: what comes out is the one form there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.message import ProtocolError
from l7proxy.normalise import (
    check_header,
    filter_trailers,
    normalise_authority,
    normalise_target,
    strip_hop_by_hop,
)
from mesh.model.nodeconfig import Settings

MERGE = Settings()
KEEP = Settings(merge_slashes=False)


@pytest.mark.parametrize(
    ("raw", "path", "query"),
    [
        (b"/", b"/", None),
        (b"/a/b", b"/a/b", None),
        (b"/a/b/", b"/a/b/", None),
        (b"/a?", b"/a", b""),
        (b"/a?x=1&y=%zz?/../..//", b"/a", b"x=1&y=%zz?/../..//"),
        (b"/%7Euser/%41%2d%2E%5f", b"/~user/A-._", None),
        (b"/a%2fb%3f%c3%a9", b"/a%2Fb%3F%C3%A9", None),
        (b"/%2541", b"/%2541", None),
        (b"/a/./b/../c", b"/a/c", None),
        (b"/a/%2e/b/%2E%2e/c", b"/a/c", None),
        (b"/a/..", b"/", None),
        (b"/a/b/..", b"/a/", None),
        (b"/a/.", b"/a/", None),
        (b"/.", b"/", None),
        (b"/.hidden/...", b"/.hidden/...", None),
        (b"//a///b//", b"/a/b/", None),
        (b"/a//../b", b"/b", None),
        (b"/a;p=1/b", b"/a;p=1/b", None),
        (b'/"<>[]^`{|}', b"/%22%3C%3E%5B%5D%5E%60%7B%7C%7D", None),
        (b"/!$&'()*+,;=:@", b"/!$&'()*+,;=:@", None),
        (b"/a%5cb", b"/a%5Cb", None),
    ],
)
def test_target(raw: bytes, path: bytes, query: bytes | None) -> None:
    assert normalise_target(raw, MERGE) == (path, query)


def test_slashes_are_kept_on_request() -> None:
    assert normalise_target(b"//a///b//", KEEP) == (b"//a///b//", None)
    assert normalise_target(b"/a//../b", KEEP) == (b"/a/b", None)


def test_asterisk_is_for_options_only() -> None:
    assert normalise_target(b"*", MERGE, b"OPTIONS") == (b"*", None)
    for raw, method in [(b"*", b"GET"), (b"*?a", b"OPTIONS"), (b"*/", b"OPTIONS")]:
        with pytest.raises(ProtocolError):
            normalise_target(raw, MERGE, method)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "bad_target"),
        (b"a", "bad_target"),
        (b"?a", "bad_target"),
        (b"/a#b", "bad_target"),
        (b"/a?b#c", "bad_target"),
        (b"/a b", "bad_target"),
        (b"/a?b c", "bad_target"),
        (b"/a\x00", "bad_target"),
        (b"/a\x7f", "bad_target"),
        (b"/a?\x01", "bad_target"),
        (b"/\xc3\xa9", "bad_target"),
        (b"/?\xc3\xa9", "bad_target"),
        (b"/a\\b", "bad_target"),
        (b"/a\r\n", "bad_target"),
        (b"/\n", "bad_target"),
        (b"/%", "bad_escape"),
        (b"/%4", "bad_escape"),
        (b"/%zz", "bad_escape"),
        (b"/%u0041", "bad_escape"),
        (b"/a%00b", "bad_escape"),
        (b"/..", "path_above_root"),
        (b"/a/../../b", "path_above_root"),
        (b"/%2e%2E/b", "path_above_root"),
        (b"/..;/b", "hidden_dot_segment"),
        (b"/a/.;x/b", "hidden_dot_segment"),
        (b"/a/..%2fb", "hidden_dot_segment"),
        (b"/a%2f..", "hidden_dot_segment"),
        (b"/a%5C%2e./b", "hidden_dot_segment"),
        (b"/a/..%5cb", "hidden_dot_segment"),
    ],
)
def test_refused_target(raw: bytes, reason: str) -> None:
    for settings in (MERGE, KEEP):
        with pytest.raises(ProtocolError) as caught:
            normalise_target(raw, settings)
        assert (caught.value.status, caught.value.reason) == (400, reason)


_TARGETS = st.lists(
    st.sampled_from(
        [
            b"/",
            b"//",
            b"a",
            b"B",
            b".",
            b"..",
            b"%2e",
            b"%2F",
            b"%41",
            b"%25",
            b";",
            b"[",
            b"?",
            b"%c3",
        ]
    ),
    max_size=14,
).map(lambda parts: b"/" + b"".join(parts))


@given(_TARGETS | st.binary(max_size=20).map(lambda raw: b"/" + raw), st.booleans())
def test_normalising_twice_changes_nothing(raw: bytes, merge: bool) -> None:
    settings = MERGE if merge else KEEP
    try:
        path, query = normalise_target(raw, settings)
    except ProtocolError:
        return
    again = path if query is None else path + b"?" + query
    assert normalise_target(again, settings) == (path, query)
    segments = path.split(b"/")
    assert b"." not in segments
    assert b".." not in segments
    assert not merge or b"//" not in path
    assert again.isascii()
    assert again.decode().isprintable()


@pytest.mark.parametrize(
    ("raw", "authority"),
    [
        (b"Example.COM", b"example.com"),
        (b"example.com.", b"example.com"),
        (b"example.com.:8080", b"example.com:8080"),
        (b"a:", b"a"),
        (b"a:65535", b"a:65535"),
        (b"10.0.0.1:80", b"10.0.0.1:80"),
        (b"[::FFFF:10.0.0.1]:80", b"[::ffff:10.0.0.1]:80"),
        (b"[::1]:", b"[::1]"),
        (b"with_underscore.x", b"with_underscore.x"),
    ],
)
def test_authority(raw: bytes, authority: bytes) -> None:
    assert normalise_authority(raw) == authority
    assert normalise_authority(authority) == authority


@pytest.mark.parametrize(
    "raw",
    [
        b"", b".", b":80", b"a b", b"a..b", b".a", b"a.b..", b"a:0", b"a:080", b"a:65536",
        b"a:123456", b"a:b", b"a:1:2", b"user@a", b"a/b", b"a?b", b"a#b", b"a,b", b"a%41",
        b"[::1", b"::1", b"[::1]x", b"[fe80::1%25eth0]", b"[1]", b"[]", b"a\x00", b"a\n", b"\xe9",
        b"a" * 300, b"[::1].",
    ],
)  # fmt: skip
def test_refused_authority(raw: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        normalise_authority(raw)
    assert (caught.value.status, caught.value.reason) == (400, "bad_host")


@given(st.text("aA.-:[]0189_", max_size=20).map(str.encode))
def test_authority_twice(raw: bytes) -> None:
    try:
        once = normalise_authority(raw)
    except ProtocolError:
        return
    assert normalise_authority(once) == once


def test_end_to_end_fields_stay_in_order() -> None:
    headers = [(b"a", b"1"), (b"b_c", b"2"), (b"a", b"3"), (b"trailer", b"x")]
    kept = strip_hop_by_hop(headers)
    assert kept == (headers, frozenset(), None, False)


def test_connection_takes_away_what_it_names() -> None:
    kept = strip_hop_by_hop(
        [
            (b"x-one", b"1"),
            (b"connection", b"close, X-One ,,x-absent"),
            (b"keep-alive", b"timeout=5"),
            (b"proxy-connection", b"keep-alive"),
            (b"proxy-authorization", b"basic x"),
            (b"transfer-encoding", b"chunked"),
            (b"te", b"gzip;q=0.5, trailers"),
            (b"x-two", b"2"),
            (b"connection", b"upgrade"),
            (b"upgrade", b"h2c, WebSocket"),
        ]
    )
    assert kept.headers == [(b"x-two", b"2")]
    assert {b"close", b"upgrade", b"x-one"} <= kept.connection
    assert kept.upgrade == b"websocket"
    assert kept.trailers_ok


@pytest.mark.parametrize("offer", [b"h2c", b"HTTP/2.0", b"TLS/1.0", b"h2c,", b"a b", b""])
def test_no_upgrade_past_the_proxy(offer: bytes) -> None:
    kept = strip_hop_by_hop([(b"connection", b"upgrade"), (b"upgrade", offer)])
    assert kept.upgrade is None


def test_upgrade_needs_connection() -> None:
    assert strip_hop_by_hop([(b"upgrade", b"websocket")]).upgrade is None


@pytest.mark.parametrize(
    "value",
    [
        b"Host", b"close, content-length", b"Authorization", b"cookie", b"X-Forwarded-For",
        b"forwarded", b"VIA", b"x-request-id", b"Sec-WebSocket-Key", b"a b", b"close;q=1", b'"x"',
    ],
)  # fmt: skip
def test_connection_must_not_name_what_others_rely_on(value: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        strip_hop_by_hop([(b"connection", value)])
    assert (caught.value.status, caught.value.reason) == (400, "bad_connection")


@pytest.mark.parametrize(
    ("name", "value"),
    [(b"a", b""), (b"X_y", b"a b\tc"), (b"a", b"\x80\xff"), (b"!#$%&'*+-.^_`|~", b"!")],
)
def test_good_header(name: bytes, value: bytes) -> None:
    check_header(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"", b"a"), (b"a b", b""), (b"a:", b""), (b"a\n", b""), (b"\xe9", b""), (b":path", b"/"),
        (b"a", b" b"), (b"a", b"b\t"), (b"a", b"b\n"), (b"a", b"\r"), (b"a", b"\x00"),
        (b"a", b"x\x7f"), (b"a", b"x\x0by"),
    ],
)  # fmt: skip
def test_bad_header(name: bytes, value: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_header(name, value)
    assert caught.value.status == 400


def test_trailers_carry_nothing_that_matters_before_the_body() -> None:
    good = [(b"grpc-status", b"0"), (b"etag", b'"x"'), (b"x-checksum", b"1")]
    bad = [
        (name, b"x")
        for name in (
            b"content-length", b"transfer-encoding", b"host", b"authorization", b"set-cookie",
            b"x-forwarded-for", b"connection", b"te", b"content-type", b"if-match", b"trailer",
        )
    ]  # fmt: skip
    assert filter_trailers(bad + good + bad) == good
