"""Published hostile and odd messages (../shared/http): forwarded as judged, or refused."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from l7proxy.http1_codec import ClientCodec, ServerCodec
from l7proxy.message import Data, EndOfMessage, Framing, ProtocolError, RequestHead, ResponseHead
from l7proxy.streams import ConnectionInfo, ServerStream
from mesh.model.nodeconfig import Settings
from tests.support.http1 import peer_of, raw_backend, relay, serving, shutdown

SHARED = Path(__file__).parents[2] / "shared" / "http"
SETTINGS = Settings(head_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=5.0)


def load(name: str) -> list[Any]:
    path = SHARED / name
    return json.loads(path.read_text()) if path.exists() else []


LLHTTP = load("llhttp-strict.json")


def with_host(data: bytes) -> bytes:
    """Add the Host that many of them lack, so that this is not why they are refused."""
    head = data.partition(b"\r\n\r\n")[0]
    if re.search(rb"(?i)\nhost:", head) or not re.match(rb"[^\r\n]* HTTP/1\.1\r\n", data):
        return data
    line, end, rest = data.partition(b"\r\n")
    return line + end + b"Host: a\r\n" + rest


SMUGGLING = [base64.b64decode(text) for text in load("smuggling-requests.json")]
SMUGGLING += [with_host(data) for data in SMUGGLING if with_host(data) != data]


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(asyncio.wait_for(main(), 20))


async def exchange(data: bytes, pieces: int) -> tuple[list[tuple[bytes, ...]], list[bytes], bytes]:
    """Send `data` through server and client driver to a backend that records what it gets. Gives
    what was judged, what each backend connection received, and what the client got."""
    judged: list[tuple[bytes, ...]] = []
    recorded: list[bytearray] = []

    async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got = bytearray()
        recorded.append(got)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        while chunk := await reader.read(65536):
            got += chunk

    async with raw_backend(record) as backend:
        pass_on = relay(backend)

        async def judge(stream: ServerStream, info: ConnectionInfo) -> None:
            head = stream.head
            judged.append((head.method, head.target, head.authority))
            await pass_on(stream, info)

        async with serving(judge, SETTINGS) as server, peer_of(server.port) as (reader, writer):
            size = max(1, -(-len(data) // pieces))
            for start in range(0, len(data), size):
                writer.write(data[start : start + size])
                await asyncio.sleep(0)
            shutdown(writer)
            answer = await reader.read()
    return judged, [bytes(got) for got in recorded], answer


def requests_in(data: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """What a plain backend reads: whole requests one after another, and nothing else. It takes only
    what our codec is known to write."""
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, f"half a head: {head!r}"
        lines = head.split(b"\r\n")
        method, target, version = lines[0].split(b" ")
        assert version == b"HTTP/1.1"
        fields = [line.partition(b": ")[::2] for line in lines[1:]]
        hosts = [value for name, value in fields if name == b"host"]
        lengths = [value for name, value in fields if name == b"content-length"]
        codings = [value for name, value in fields if name == b"transfer-encoding"]
        assert len(hosts) == 1
        assert len(lengths) + len(codings) <= 1
        if lengths:
            assert len(data) >= int(lengths[0]), "half a body"
            data = data[int(lengths[0]) :]
        elif codings:
            assert codings == [b"chunked"]
            while True:
                size, _, data = data.partition(b"\r\n")
                count = int(size, 16)
                if not count:
                    break
                assert data[count : count + 2] == b"\r\n", "half a chunk"
                data = data[count + 2 :]
            while line := data.partition(b"\r\n")[0]:
                assert re.fullmatch(rb"[a-z-]+: [ -~]*", line), "not a trailer field"
                data = data[len(line) + 2 :]
            assert data.startswith(b"\r\n")
            data = data[2:]
        found.append((method, target, hosts[0]))
    return found


@pytest.mark.skipif(not SMUGGLING, reason="../shared/http is not there")
@pytest.mark.parametrize("pieces", [1, 1_000_000])
@pytest.mark.parametrize("data", SMUGGLING, ids=range(len(SMUGGLING)))
def test_smuggling(data: bytes, pieces: int) -> None:
    judged, recorded, answer = run(lambda: exchange(data, pieces))
    statuses = re.findall(rb"HTTP/1\.1 (\d\d\d) ", answer)
    refused = [status for status in statuses if status >= b"400"]
    complete: list[tuple[bytes, ...]] = []
    for got in recorded:
        try:
            complete += requests_in(got)
        except (AssertionError, ValueError):
            assert got is recorded[-1]
    assert complete == judged[: len(complete)]
    if len(complete) < len(judged):
        # A body that broke off: nothing follows, and the client was not told that all is well.
        assert len(complete) == len(judged) - 1
        assert statuses.count(b"200") < len(judged)
    if refused:
        assert statuses[-1:] == refused == [statuses[-1]]
        assert b"\r\nconnection: close\r\n" in answer[answer.rindex(b"HTTP/1.1 " + refused[0]) :]
    assert len(judged) == statuses.count(b"200") or refused or not statuses
    assert judged or refused


@pytest.mark.skipif(not SMUGGLING, reason="../shared/http is not there")
def test_most_smuggling_is_refused_outright() -> None:
    """What is not refused here is harmless, one by one: see the reasons."""
    reasons = {
        rb"User: \x85admin\xa0": "bytes from 0x80 on are opaque and are passed on as they are",
        rb"chunked\r\n\r\n0\r\nX:POST": "a well-formed trailer field, passed on as one",
        rb"chunked\r\n\r\n\Z": "half a message: it is never taken for whole",
    }
    passed = []
    for data in SMUGGLING:
        codec = ServerCodec(b"http", SETTINGS)
        codec.receive(data)
        try:
            while (event := codec.next_event()) is not None or codec.request_complete:
                if event is None:
                    codec.next_request()
                    if codec.between_requests:
                        break
            passed.append(data)
        except ProtocolError:
            continue
    assert len(passed) == len(reasons)
    for data in passed:
        assert any(re.search(mark, data) for mark in reasons)


# --- llhttp ---------------------------------------------------------------------------------------

# Cases that llhttp's strict mode refuses and we take, and why that is safe.
LAXER = {
    "Invalid method for HTTP/x.x request": "methods are extensible tokens (RFC 9110 §16.1)",
    "Expected space after method": "llhttp knows a list of methods; any token is one for us",
    "Data after `Connection: close`": "never looked at: we close after that response",
}


def taken(kind: str, data: bytes) -> bool:
    """Whether our codec reads the messages to their end, or to an upgrade, without objection."""
    if kind == "request":
        server = ServerCodec(b"http", Settings())
        server.receive(with_host(data))
        ended = False
        while True:
            event = server.next_event()
            if isinstance(event, RequestHead):
                if event.upgrade:
                    return True
            elif event is None:
                if not server.request_complete:
                    return ended and server.between_requests
                ended = True
                server.next_request()
            else:
                assert isinstance(event, Data | EndOfMessage)
    client = ClientCodec(Settings())
    client.receive(data)
    client.request(RequestHead(b"GET", b"http", b"a", b"/", None, [], Framing.NONE, upgrade=b"ws"))
    while (event := client.next_event()) is not None:
        if isinstance(event, ResponseHead) and event.status == 101:
            return True
    return not client.response_due or client.receive_eof() is not None


@pytest.mark.skipif(not LLHTTP, reason="../shared/http is not there")
@pytest.mark.parametrize("case", LLHTTP, ids=range(len(LLHTTP)))
def test_no_laxer_than_llhttp(case: dict[str, str]) -> None:
    verdict = case["llhttp"]
    data = base64.b64decode(case["bytes"])
    try:
        ours = taken(case["type"], data)
    except ProtocolError:
        ours = False
    if verdict not in ("ok", "Pause on CONNECT/Upgrade") and verdict not in LAXER:
        assert not ours


@pytest.mark.skipif(not LLHTTP, reason="../shared/http is not there")
def test_ordinary_messages_are_taken() -> None:
    """Strictness is no excuse: what people send goes through."""
    chunked = b"Transfer-Encoding: chunked\r\n"
    ordinary = [
        case
        for case in LLHTTP
        if case["llhttp"] == "ok" and chunked in base64.b64decode(case["bytes"])
    ]
    assert ordinary
    taken_ones = 0
    for case in ordinary:
        try:
            taken_ones += taken(case["type"], base64.b64decode(case["bytes"]))
        except ProtocolError:
            continue
    assert taken_ones >= len(ordinary) // 2
