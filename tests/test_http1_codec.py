"""The codecs: every input fed whole, byte by byte, and with a tail; and there and back again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l7proxy.http1_codec import ClientCodec, ServerCodec
from l7proxy.message import (
    BodyLength,
    Data,
    EndOfMessage,
    Framing,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
)
from mesh.model.nodeconfig import Settings

SETTINGS = Settings(max_head_bytes=600, max_headers=10, max_body_bytes=100)
GET = b"GET /x HTTP/1.1\r\nHost: a\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def bytewise(data: bytes) -> Iterator[bytes]:
    for index in range(len(data)):
        yield data[index : index + 1]


FEEDS = pytest.mark.parametrize("feed", [whole, bytewise])
Feed = Callable[[bytes], Iterator[bytes]]


def messages(
    codec: ServerCodec | ClientCodec, pieces: Iterator[bytes]
) -> tuple[RequestHead | ResponseHead | None, bytes, Headers | None]:
    """One final head, its body, and its trailers once it has ended."""
    head, body, trailers = None, b"", None
    for piece in pieces:
        codec.receive(piece)
        while (event := codec.next_event()) is not None:
            if isinstance(event, Data):
                body += event.data
            elif isinstance(event, EndOfMessage):
                trailers = event.trailers
            else:
                head = event
    return head, body, trailers


def server() -> ServerCodec:
    return ServerCodec(b"http", SETTINGS)


@FEEDS
@pytest.mark.parametrize("tail", [b"", GET, b"\x00garbage"])
@pytest.mark.parametrize(
    ("data", "body", "trailers"),
    [
        (GET, b"", []),
        (b"\r\n" + GET, b"", []),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", b"hello", []),
        (CHUNKED + b"0\r\n\r\n", b"", []),
        (CHUNKED + b'2\r\nhi\r\n008;x;y=z;q="\\""\r\n, world!\r\n000\r\n\r\n', b"hi, world!", []),
        (CHUNKED + b"1\r\n\r\r\n0\r\nX-Sum: 1\r\nHost: evil\r\n\r\n", b"\r", [(b"x-sum", b"1")]),
        (CHUNKED + b"A\r\n0\r\n\r\n01234\r\n0\r\n\r\n", b"0\r\n\r\n01234", []),
    ],
)  # fmt: skip
def test_request(feed: Feed, data: bytes, body: bytes, trailers: Headers, tail: bytes) -> None:
    codec = server()
    head, got, ended = messages(codec, feed(data + tail))
    assert isinstance(head, RequestHead)
    assert (got, ended) == (body, trailers)
    assert codec.request_complete
    assert codec.buffer.peek() == tail  # kept for later, and not looked at


@FEEDS
def test_pipelined_requests_wait_for_their_turn(feed: Feed) -> None:
    codec = server()
    first = b"POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
    head, body, ended = messages(codec, feed(first + GET + b"\r\n" + GET))
    assert (head.path, body, ended) == (b"/1", b"hi", [])
    for _ in range(2):
        assert codec.next_event() is None
        codec.response(ResponseHead(204, []))
        codec.next_request()
        head, body, ended = messages(codec, iter((b"",)))
        assert (head.path, body, ended) == (b"/x", b"", [])
    codec.next_request()
    assert codec.next_event() is None
    assert codec.between_requests


@FEEDS
@pytest.mark.parametrize(
    ("data", "status", "reason"),
    [
        (b"\r\n\r\n" + GET, 400, "bad_request_line"),
        (b"\n", 400, "bad_request_line"),
        (b"\x16\x03\x01\x00", 400, "bad_request_line"),
        (b" GET", 400, "bad_request_line"),
        (b"GET / HTTP/1.1\n", 400, "bare_lf"),
        (b"GET / HTTP/1.1\r\nHost: a\n", 400, "bare_lf"),
        (b"GET / HTTP/1.1\r\nHost: a\rb", 400, "bare_cr"),
        (b"GET / HTTP/1.1\r\nHost: \0", 400, "nul_byte"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n b", 400, "obs_fold"),
        (b"GET /" + b"a" * 600, 414, "target_too_long"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 600, 431, "head_too_large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 600 + b"\r\n\r\n", 431, "head_too_large"),
        (CHUNKED + b"g\r\n", 400, "bad_chunk"),
        (CHUNKED + b"\r\n\r\n", 400, "bad_chunk"),
        (CHUNKED + b" 0\r\n\r\n", 400, "bad_chunk"),
        (CHUNKED + b"0 \r\n\r\n", 400, "bad_chunk"),
        (CHUNKED + b"0x1\r\n", 400, "bad_chunk"),
        (CHUNKED + b"+1\r\n", 400, "bad_chunk"),
        (CHUNKED + b"-1\r\n", 400, "bad_chunk"),
        (CHUNKED + b"1_0\r\n", 400, "bad_chunk"),
        (CHUNKED + b"1\nZ", 400, "bad_chunk"),
        (CHUNKED + b"1\r\r;a\r\n", 400, "bad_chunk"),
        (CHUNKED + b"1;a\x00\r\n", 400, "bad_chunk"),
        (CHUNKED + b"1;a\nb\r\n", 400, "bad_chunk"),
        (CHUNKED + b'1;a="b\r\n', 400, "bad_chunk"),
        (CHUNKED + b"1" * 16 + b"\r\n", 400, "bad_chunk"),
        (CHUNKED + b"1\r\nab\r\n", 400, "bad_chunk"),
        (CHUNKED + b"1\r\na\n0\r\n", 400, "bad_chunk"),
        (CHUNKED + b"1\r\na\rX", 400, "bad_chunk"),
        (CHUNKED + b"1;" + b"a" * 1100, 400, "chunk_line_too_long"),
        (CHUNKED + b"1;" + b"a" * 1100 + b"\r\n", 400, "chunk_line_too_long"),
        (CHUNKED + b"0\r\nX : y\r\n\r\n", 400, "space_before_colon"),
        (CHUNKED + b"0\r\nX:POST / HTTP/1.1\n\r\n\r\n", 400, "bare_lf"),
        (CHUNKED + b"0\r\n" + b"x: y\r\n" * 11 + b"\r\n", 431, "too_many_headers"),
        (CHUNKED + b"0\r\nx: " + b"y" * 600, 431, "trailers_too_large"),
        (CHUNKED + b"65\r\n", 413, "body_too_large"),
        (CHUNKED + b"64\r\n" + b"a" * 100 + b"\r\n1\r\n", 413, "body_too_large"),
    ],
)
def test_refused_request(feed: Feed, data: bytes, status: int, reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages(server(), feed(data))
    assert (caught.value.status, caught.value.reason) == (status, reason)


@pytest.mark.parametrize("size", [599, 600])
def test_head_of_just_the_limit(size: int) -> None:
    frame = b"GET / HTTP/1.1\r\nHost: a\r\nX: %b\r\n\r\n"
    block = frame % (b"a" * (size + 2 - len(frame)))
    assert len(block) == size
    assert messages(server(), whole(block))[0] is not None


# --- responses to clients -------------------------------------------------------------------------


def answered(
    request: bytes, head: ResponseHead, body: bytes = b"", trailers: Headers | None = None
) -> tuple[bytes, bool]:
    """The bytes of an answer, and whether the connection goes on."""
    codec = server()
    messages(codec, whole(request))
    sent = [codec.response(head), *codec.data(body), codec.end(trailers or [])]
    return b"".join(sent), codec.keep_alive


DATE = (b"date", b"x")
GET10 = b"GET / HTTP/1.0\r\n\r\n"
HEAD = GET.replace(b"GET", b"HEAD")


@pytest.mark.parametrize(
    ("request_bytes", "status", "length", "body", "expected", "keep_alive"),
    [
        (GET, 200, 2, b"ok", b"200 OK|content-length: 2||ok", True),
        (GET, 200, Framing.NONE, b"", b"200 OK|content-length: 0||", True),
        (GET, 200, Framing.STREAM, b"ok", b"200 OK|transfer-encoding: chunked||2|ok|0||", True),
        (GET, 200, Framing.CLOSE, b"ok", b"200 OK|transfer-encoding: chunked||2|ok|0||", True),
        (GET, 204, 0, b"", b"204 No Content||", True),
        (GET, 304, 5, b"", b"304 Not Modified|content-length: 5||", True),
        (GET, 304, Framing.NONE, b"", b"304 Not Modified||", True),
        (GET, 799, 0, b"", b"799 |content-length: 0||", True),
        (HEAD, 200, 2, b"ok", b"200 OK|content-length: 2||", True),
        (HEAD, 200, Framing.STREAM, b"ok", b"200 OK|transfer-encoding: chunked||", True),
        (HEAD, 200, Framing.CLOSE, b"", b"200 OK||", True),
        (GET10, 200, 2, b"ok", b"200 OK|content-length: 2|connection: close||ok", False),
        (GET10, 200, Framing.STREAM, b"ok", b"200 OK|connection: close||ok", False),
    ],
)
def test_response(
    request_bytes: bytes,
    status: int,
    length: BodyLength,
    body: bytes,
    expected: bytes,
    keep_alive: bool,
) -> None:
    sent, kept = answered(request_bytes, ResponseHead(status, [DATE], length), body)
    assert sent.replace(b"date: x\r\n", b"") == b"HTTP/1.1 " + expected.replace(b"|", b"\r\n")
    assert kept is keep_alive


def test_http10_keep_alive() -> None:
    request = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    sent, kept = answered(request, ResponseHead(200, [], 0))
    assert kept
    assert b"\r\nconnection: keep-alive\r\n" in sent
    sent, kept = answered(request, ResponseHead(200, [], Framing.STREAM), b"x")
    assert not kept
    assert b"\r\nconnection: close\r\n" in sent


def test_trailers_and_date() -> None:
    sent, _ = answered(
        GET, ResponseHead(200, [], Framing.STREAM), b"", [(b"x-sum", b"1"), (b"host", b"evil")]
    )
    assert sent.endswith(b"\r\n\r\n0\r\nx-sum: 1\r\n\r\n")
    assert sent.count(b"\r\ndate: ") == 1


def test_a_body_of_another_length_than_declared_is_an_error() -> None:
    codec = server()
    messages(codec, whole(GET))
    codec.response(ResponseHead(200, [], 2))
    with pytest.raises(ValueError, match="longer"):
        codec.data(b"abc")
    codec.response(ResponseHead(200, [], 2))
    with pytest.raises(ValueError, match="shorter"):
        codec.end([])


@pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0b"])
def test_no_field_breaks_out_of_its_line(value: bytes) -> None:
    codec = server()
    messages(codec, whole(GET))
    with pytest.raises(ValueError, match="CR, LF or NUL"):
        codec.response(ResponseHead(200, [(b"x", value)]))
    head = RequestHead(b"GET", b"http", b"a", b"/", None, [(b"x", value)])
    with pytest.raises(ValueError, match="CR, LF or NUL"):
        ClientCodec(SETTINGS).request(head)


@pytest.mark.parametrize("path", [b"/a b", b"/a HTTP/1.1\r\nx: y\r\n\r\nGET /"])
def test_no_path_breaks_out_of_the_request_line(path: bytes) -> None:
    with pytest.raises(ValueError, match=r"blanks|CR, LF"):
        ClientCodec(SETTINGS).request(RequestHead(b"GET", b"http", b"a", path, None, []))


def test_informational_responses() -> None:
    codec = server()
    messages(codec, whole(GET))
    hints = ResponseHead(103, [(b"link", b"</x>")])
    assert codec.informational(hints) == b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n"
    codec = server()
    messages(codec, whole(GET10))
    assert codec.informational(hints) == b""


@FEEDS
def test_tunnel(feed: Feed) -> None:
    codec = server()
    upgrade = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
    head, _, _ = messages(codec, feed(upgrade))
    assert isinstance(head, RequestHead)
    sent = codec.response(ResponseHead(101, [], upgrade=head.upgrade))
    assert sent == b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"
    assert codec.data(b"\x00\x01") == (b"\x00\x01",)
    assert messages(codec, feed(b"\r\n\x00" + GET))[1] == b"\r\n\x00" + GET
    assert codec.end([]) == b""


# --- the backend's side ---------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"


def client(method: bytes = b"GET", upgrade: bytes | None = None) -> ClientCodec:
    codec = ClientCodec(SETTINGS)
    codec.request(RequestHead(method, b"http", b"a", b"/", None, [], upgrade=upgrade))
    return codec


@FEEDS
@pytest.mark.parametrize("tail", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"\n"])
@pytest.mark.parametrize(
    ("data", "method", "status", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"GET", 200, b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b"HEAD", 200, b""),
        (b"HTTP/1.1 204 No\r\n\r\n", b"GET", 204, b""),
        (b"HTTP/1.1 304 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"GET", 304, b""),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2;x\r\nok\r\n0\r\n\r\n", b"GET", 200, b"ok"),
        (b"HTTP/1.1 100 C\r\n\r\n" + OK + b"Content-Length: 0\r\n\r\n", b"GET", 200, b""),
    ],
)  # fmt: skip
def test_backend_response(
    feed: Feed, data: bytes, method: bytes, status: int, body: bytes, tail: bytes
) -> None:
    codec = client(method)
    head, got, ended = messages(codec, feed(data + tail))
    assert isinstance(head, ResponseHead)
    assert (head.status, got, ended) == (status, body, [])
    assert not codec.response_due
    assert codec.buffer.peek() == tail


@FEEDS
def test_backend_response_until_close(feed: Feed) -> None:
    codec = client()
    head, body, ended = messages(codec, feed(b"HTTP/1.1 200 OK\r\n\r\nall of it\r\n"))
    assert (head.body, body, ended) == (Framing.CLOSE, b"all of it\r\n", None)
    assert codec.receive_eof() == EndOfMessage()
    assert codec.receive_eof() is None
    codec = client()
    messages(codec, feed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhal"))
    assert codec.receive_eof() is None


@FEEDS
def test_backend_upgrade(feed: Feed) -> None:
    codec = client(upgrade=b"x")
    head, body, _ = messages(
        codec, feed(b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: X\r\n\r\n\x01\x02")
    )
    assert (head.status, head.upgrade, body) == (101, b"x", b"\x01\x02")
    assert codec.data(b"raw") == (b"raw",)


@FEEDS
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"SSH-2.0-x\r\n", "bad_status_line"),
        (b"\r\nHTTP/1.1 200 OK\r\n\r\n", "bad_status_line"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 600, "head_too_large"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 60, "too_many_informational"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "bad_chunk"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\na b: c\r\n\r\n", "bad_header"),
    ],
)
def test_refused_backend_response(feed: Feed, data: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        messages(client(), feed(data))
    assert (caught.value.status, caught.value.reason) == (502, reason)


def test_request_fields() -> None:
    head = RequestHead(
        b"POST", b"https", b"a:1", b"/x", b"y=z", [(b"k", b"v")], Framing.STREAM,
        expect_continue=True, trailers_ok=True,
    )  # fmt: skip
    sent = ClientCodec(SETTINGS).request(head)
    assert sent == (
        b"POST /x?y=z HTTP/1.1\r\nhost: a:1\r\ntransfer-encoding: chunked\r\nte: trailers\r\n"
        b"connection: te\r\nexpect: 100-continue\r\nk: v\r\n\r\n"
    )
    head = RequestHead(b"POST", b"http", b"", b"/", None, [], upgrade=b"x")
    assert ClientCodec(SETTINGS).request(head) == (
        b"POST / HTTP/1.1\r\nhost: \r\ncontent-length: 0\r\nupgrade: x\r\n"
        b"connection: upgrade\r\n\r\n"
    )


# --- there and back -------------------------------------------------------------------------------

_NAMES = st.sampled_from([b"x-a", b"x_b", b"accept", b"cookie", b"!"])
_VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=10).map(
    lambda text: text.strip().encode()
)
_HEADERS = st.lists(st.tuples(_NAMES, _VALUES), max_size=5)
_BODIES = st.lists(st.binary(min_size=1, max_size=30), max_size=3)


@given(
    st.sampled_from([b"GET", b"POST", b"X"]),
    st.sampled_from([b"a", b"a.b:8080", b"[::1]"]),
    st.sampled_from([b"/", b"/a/b%2Fc", b"/a;b"]),
    st.none() | st.just(b"") | st.just(b"x=1&y"),
    _HEADERS,
    _BODIES,
    st.booleans(),
    st.booleans(),
)
def test_request_there_and_back(
    method: bytes,
    authority: bytes,
    path: bytes,
    query: bytes | None,
    headers: Headers,
    chunks: list[bytes],
    chunked: bool,
    slowly: bool,
) -> None:
    """What the upstream codec writes, the downstream codec reads as the same request."""
    length = Framing.STREAM if chunked else len(b"".join(chunks))
    head = RequestHead(method, b"http", authority, path, query, headers, length)
    codec = ClientCodec(SETTINGS)
    sent = [codec.request(head), *(b"".join(codec.data(chunk)) for chunk in chunks), codec.end([])]
    feed = bytewise if slowly else whole
    got, body, ended = messages(server(), feed(b"".join(sent)))
    assert (got, body, ended) == (head, b"".join(chunks), [])


@given(st.integers(200, 599), _HEADERS, _BODIES, st.booleans(), st.booleans())
def test_response_there_and_back(
    status: int, headers: Headers, chunks: list[bytes], chunked: bool, slowly: bool
) -> None:
    if status in (204, 304):
        chunks = []
    length = Framing.STREAM if chunked else len(b"".join(chunks))
    codec = server()
    messages(codec, whole(GET))
    sent = [
        codec.response(ResponseHead(status, [*headers, DATE], length)),
        *(b"".join(codec.data(chunk)) for chunk in chunks),
        codec.end([]),
    ]
    feed = bytewise if slowly else whole
    got, body, ended = messages(client(), feed(b"".join(sent)))
    assert isinstance(got, ResponseHead)
    assert (got.status, got.headers) == (status, [*headers, DATE])
    assert (body, ended) == (b"".join(chunks), [])
    assert got.body == (Framing.NONE if status == 204 else length)
