"""What C says of heads against the proxy's own parsers: it may say less, never anything else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_http1_hostile import SMUGGLING

from l7proxy import native
from l7proxy.automaton import compile_rules
from l7proxy.automaton_rules import Limits, Rule
from l7proxy.http1_head import has_body, parse_request, parse_response
from l7proxy.message import Framing
from mesh.model.nodeconfig import Settings

pytestmark = pytest.mark.skipif(bool(native.available()), reason=native.available())

SETTINGS = Settings(max_headers=12)
LIMITS = Limits(8000, SETTINGS.max_headers, None)


@pytest.fixture(scope="module")
def requests():
    table = native.Table(compile_rules([[Rule((), 1)]], LIMITS).table)
    return native.Requests(table, 0, 0)


@pytest.fixture(scope="module")
def responses():
    return native.Responses(4096, SETTINGS.max_headers)


def check_request(requests: native.Requests, data: bytes) -> bool:
    if not requests.judge(data):
        return False
    end = data.index(b"\r\n\r\n") + 4
    head, keep_alive = parse_request(data[:end], b"http", SETTINGS)
    assert keep_alive
    assert (head.upgrade, head.expect_continue) == (None, False), data
    assert len(data) == end + (head.body if isinstance(head.body, int) else 0), data
    found = requests.found()
    assert found[9] == end
    assert data[: found[8]] == head.method
    assert head.body is not Framing.NONE or head.method not in (b"POST", b"PUT", b"PATCH")
    assert data[found[2] : found[3]] == head.target
    assert data[found[4] : found[5]] == head.authority
    said = [value for name, value in head.headers if name == b"x-request-id"]
    assert data[found[6] : found[7]] == (said[0] if said else b"")
    return True


def check_response(responses: native.Responses, data: bytes, method: bytes) -> bool:
    status = responses.status(data, bodiless=method == b"HEAD")
    if not status:
        return False
    size, dated, left, drop, dropped = responses.found()
    block, rest = data[:size], data[size:]
    assert block.endswith(b"\r\n\r\n"), data
    assert b"\r\n\r\n" not in block[:-2], data
    head, keep_alive = parse_response(block, method, None, SETTINGS.max_headers)
    assert (head.status, keep_alive) == (status, True), data
    body = head.body if has_body(status, method) else 0
    assert isinstance(body, int), data
    assert left == body - len(rest), data
    assert bool(dated) == any(name == b"date" for name, _ in head.headers), data
    # What goes on is what the parser would have sent on, but for a lone keep-alive.
    fields = (block[:drop] + block[dropped:] if dropped else block)[:-4].split(b"\r\n")[1:]
    sent = [one.partition(b":")[::2] for one in fields]
    kept = [(name.lower(), value.strip(b" \t")) for name, value in sent]
    own = [one for one in kept if one[0] == b"content-length"]
    others = [one for one in kept if one[0] != b"content-length"]
    assert [one for one in others if one[0] != b"connection"] == head.headers, data
    assert {value.lower() for name, value in others if name == b"connection"} <= {b"keep-alive"}
    assert own == ([(b"content-length", b"%d" % head.body)] if isinstance(head.body, int) else [])
    return True


FIELDS = [
    b"Host: a", b"Host: a.example:80", b"Date: x", b"Content-Length: 0", b"Content-Length: 5",
    b"content-length:  12\t", b"Content-Length: 05", b"Connection: keep-alive",
    b"Connection: close", b"connection:KEEP-alive ", b"Connection: keep-alive, x",
    b"Keep-Alive: timeout=5", b"Keep-Alive:", b"Transfer-Encoding: chunked", b"Trailer: x",
    b"TE: trailers", b"Upgrade: h2c", b"X-Request-Id: a", b"X-REQUEST-ID:  b c ", b"X-Request-Id:",
    b"Proxy-Authenticate: x", b"X: \xe4\xff", b"X-Empty:", b"X: \t a \t", b"X : a", b": a",
    b" X: a", b"X", b"X: \x00", b"X: \x7f", b"X: a\rb", b"X: a\nb", b"Dates: x",
    b"X-Forwarded-Client-Cert: a", b"Content-Lengths: 5", b"Expect: 100-continue",
]  # fmt: skip
REQUEST_LINES = [
    f"{line}\r\nHost: a".encode()
    for line in (
        "GET / HTTP/1.1", "HEAD /a?b=c HTTP/1.1", "POST / HTTP/1.1", "PUT /x HTTP/1.1",
        "PATCH /x HTTP/1.1", "PATCHES /x HTTP/1.1", "OPTIONS * HTTP/1.1", "GET /%41 HTTP/1.1",
        "GET http://a/ HTTP/1.1", "GET / HTTP/1.0", "GET  / HTTP/1.1", "TRACE / HTTP/1.1",
    )
]  # fmt: skip
STATUS_LINES = [
    b"HTTP/1.1 200 OK", b"HTTP/1.1 200", b"HTTP/1.1 200 ", b"HTTP/1.1 204 No Content",
    b"HTTP/1.1 205 Reset", b"HTTP/1.1 304 Not Modified", b"HTTP/1.1 404 \xe4", b"HTTP/1.1 503 x",
    b"HTTP/1.1 599 x", b"HTTP/1.1 600 x", b"HTTP/1.1 100 Continue", b"HTTP/1.1 101 x",
    b"HTTP/1.0 200 OK", b"HTTP/1.1 20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1  200 OK",
    b"HTTP/1.1 2x0", b"HTTP/1.1 200OK", b"http/1.1 200 OK",
]  # fmt: skip
BYTES = b"\r\n :\t\0Aa0\x7f\xff"


def heads(lines: list[bytes]) -> st.SearchStrategy[bytes]:
    """Whole heads, most of them in order, and some with a byte changed, lost or added."""

    def build(line: bytes, fields: list[bytes], body: bytes, change: tuple[int, int, int]) -> bytes:
        data = b"\r\n".join((line, *fields)) + b"\r\n\r\n" + body
        kind, at, byte = change
        at %= len(data)
        changed = (data, data[:at] + bytes((byte,)) + data[at + 1 :], data[:at] + data[at + 1 :])
        return (*changed, data[:at] + bytes((byte,)) + data[at:], data[:at])[max(0, kind - 4)]

    return st.builds(
        build,
        st.sampled_from(lines),
        st.lists(st.sampled_from(FIELDS), max_size=5),
        st.sampled_from([b"", b"", b"hello", b"helloHTTP/1.1 200 OK"]),
        st.tuples(
            st.integers(0, 8), st.integers(0, 400), st.sampled_from(b"\r\n :\t\0Aa0\x7f\xff")
        ),
    )


@settings(max_examples=400, deadline=None)
@given(heads(REQUEST_LINES))
def test_requests_are_what_the_parser_reads(requests, data):
    check_request(requests, data)


@settings(max_examples=400, deadline=None)
@given(heads(STATUS_LINES), st.sampled_from([b"GET", b"HEAD"]))
def test_responses_are_what_the_parser_reads(responses, data, method):
    check_response(responses, data, method)


def test_what_is_common_is_understood(requests, responses):
    assert check_request(requests, b"GET /a?b HTTP/1.1\r\nHost: a\r\nX-Request-Id: 1\r\n\r\n")
    plain = b"HTTP/1.1 200 OK\r\nDate: x\r\nContent-Length: 2\r\nKeep-Alive: a\r\n\r\nok"
    assert check_response(responses, plain, b"GET")
    assert check_response(responses, plain[:-1], b"GET")
    assert check_response(responses, plain[:-2], b"HEAD")
    assert check_response(responses, b"HTTP/1.1 204\r\n\r\n", b"GET")
    for end in range(len(plain) - 2):
        assert not check_response(responses, plain[:end], b"GET")
    many = b"".join(b"X: y\r\n" for _ in range(12))
    assert not check_response(responses, plain.replace(b"Date: x\r\n", many), b"GET")
    long = b"X: %b\r\n" % (b"y" * 4096)
    assert not check_response(responses, plain.replace(b"Date: x\r\n", long), b"GET")


@pytest.mark.skipif(not SMUGGLING, reason="../shared/http is not there")
def test_published_smuggling_is_read_as_the_parser_does(requests):
    for data in SMUGGLING:
        for end in range(len(data)):
            check_request(requests, data[: end + 1])


def test_a_library_of_other_sources_is_none(tmp_path):
    for package in ("bpf", "l7proxy"):
        shutil.copytree(
            Path(native.__file__).parents[1] / package,
            tmp_path / package,
            ignore=shutil.ignore_patterns("*.so"),
        )

    def run(code: str) -> str:
        command = (sys.executable, "-c", f"from l7proxy import native; {code}")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert "no compiled automaton" in run("print(native.available())")
    assert run("print(native.build() + native.available())") == ""
    with open(tmp_path / "l7proxy/native.c", "a") as source:
        source.write("/* judges otherwise */\n")
    assert "no compiled automaton" in run("print(native.available())")
    assert run("print(native.build() + native.available())") == ""
    assert len(list((tmp_path / "l7proxy").glob("*.so"))) == 1


_SANITIZED = """
import random, sys
from pathlib import Path
import test_native as t
from l7proxy import native
native.LIBRARY = Path(sys.argv[1])
requests = native.Requests(native.Table(t.compile_rules([[t.Rule((), 1)]], t.LIMITS).table), 0, 0)
responses = native.Responses(4096, 12)
chance = random.Random(7)
for lines, read in ((t.REQUEST_LINES, requests.judge), (t.STATUS_LINES, responses.status)):
    for _ in range(2000):
        fields = chance.choices(t.FIELDS, k=chance.randrange(5))
        data = bytearray(b"\\r\\n".join((chance.choice(lines), *fields)) + b"\\r\\n\\r\\nok")
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        data = bytes(data[: chance.randrange(len(data) + 1)])
        read(data) if read == requests.judge else read(data, bodiless=chance.random() < 0.3)
print("read all")
"""


def test_nothing_is_read_beyond_what_is_given(tmp_path):
    """Under the address and undefined-behaviour sanitizers."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    library, found = tmp_path / "libweft.so", {}
    for name in ("libasan.so", "libubsan.so"):
        said = subprocess.run(
            (compiler, f"-print-file-name={name}"), capture_output=True, text=True
        )
        found[name] = said.stdout.strip()
    if not all(map(Path.is_absolute, map(Path, found.values()))):
        pytest.skip("no sanitizers")
    source = Path(native.__file__).with_name("native.c")
    flags = ("-fsanitize=address,undefined", "-fno-sanitize=alignment", "-fno-sanitize-recover=all")
    subprocess.run(
        (compiler, *native._FLAGS, *native._QUIET, *flags, "-g", "-o", library, source), check=True
    )
    done = subprocess.run(
        (sys.executable, "-c", _SANITIZED, library),
        env={
            "LD_PRELOAD": ":".join(found.values()),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
            "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "read all\n", done.stderr[-3000:]
