"""A worker under bytes that mean it ill: smuggling, random bytes, what must not leak or pass."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
from contextlib import suppress
from pathlib import Path

import pytest
from support.proxy import (
    backend,
    certificate,
    client_context,
    cluster,
    connection,
    fetch,
    get,
    http_port,
    https_port,
    ok,
    over_tls,
    proxy_fixture,
    route,
    rule,
    serve,
    to,
)

from certs.selfsigned import Authority
from mesh.model.nodeconfig import Settings
from mesh.model.section import SETTINGS_KEY

proxy = proxy_fixture


async def test_what_is_wrong_inside_is_not_told_to_clients(proxy, unused_tcp_port):
    port = await serve(proxy, cluster("one", unused_tcp_port), route("r", rule(to("one"))))
    answer = await fetch(port)
    assert (answer.status, answer.body) == (503, b"connect_refused\n")


@pytest.mark.parametrize("protocol", ["h2c", "foo", "tls/1.2", "h2c, foo"])
async def test_only_websockets_are_upgraded_to(proxy, protocol):
    async with backend() as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        answer = await fetch(
            port, get("/", "a", "Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}",
                      "HTTP2-Settings: AAMAAABkAAQAAP__")
        )  # fmt: skip
    assert answer.status == 200
    assert one.requests[0].header("upgrade") is None
    assert one.requests[0].header("http2-settings") is None


SMUGGLING = Path(__file__).parent.parent.parent / "shared/http/smuggling-requests.json"


@pytest.mark.skipif(not SMUGGLING.exists(), reason="../shared is not there")
async def test_published_smuggling_requests(proxy):
    cases = [base64.b64decode(item) for item in json.loads(SMUGGLING.read_text())]
    assert cases
    async with backend(lambda request: ok(b"judged")) as one:
        port = await serve(
            proxy,
            cluster("one", one.port),
            route("r", rule(to("one"))),
            {SETTINGS_KEY: Settings(head_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=0.2)},
        )

        async def send(data: bytes) -> int:
            """How many requests were answered by the backend."""
            received = b""
            with suppress(OSError):
                async with connection(port) as (reader, writer):
                    writer.write(data)
                    received = await reader.read()
            return received.count(b"judged")

        answered = 0
        for start in range(0, len(cases), 50):
            answered += sum(
                await asyncio.gather(*(send(case) for case in cases[start : start + 50]))
            )
        # Nothing has reached the backend beside what was judged and answered.
        assert len(one.requests) <= answered + sum(b"HEAD" in case for case in cases)
        for request in one.requests:
            names = [name.lower() for name, _ in request.headers]
            assert names.count("host") == 1
            assert names.count("content-length") + names.count("transfer-encoding") <= 1


def hostile(chance: random.Random) -> bytes:
    """Requests, pieces of them, and what must not be in them, thrown together."""
    pieces = (
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"POST /x HTTP/1.1\r\n", b"Host: a\r\n", b"Host: b",
        b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n", b"\r\n\r\n", b"\n",
        b"5\r\nhello\r\n", b"0\r\n\r\n", b"hello", b"Connection: close, host\r\n", b"\x00", b" ",
        b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"TE: x\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\0\4\0\0\0\0\0",
        b"\0\0\4\1\5\0\0\0\1\x82\x86\x84\x41",
        b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 300 + b"\r\n", b"\xff\xfe", b"Cookie: a=b\r\n",
    )  # fmt: skip
    data = bytearray(b"".join(chance.choice(pieces) for _ in range(chance.randrange(1, 12))))
    for _ in range(chance.choice((0, 0, 1, 3))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("alpn", [None, "http/1.1", "h2"])
async def test_hostile_bytes_reach_nobody(proxy, alpn):
    """Whatever comes, backends see whole requests with one Host and one framing."""
    chance = random.Random(11)
    authority = Authority.create("test")

    async with backend(lambda request: ok(b"judged")) as one:
        await serve(
            proxy,
            cluster("one", one.port),
            route("r", rule(to("one"))),
            certificate(authority, "a.x"),
            {SETTINGS_KEY: Settings(head_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=0.2,
                                    access_log="off")},
        )  # fmt: skip
        port = proxy.listen()
        await proxy.apply(http_port(port) if alpn is None else https_port(port))
        context = None
        if alpn is not None:
            context = client_context(authority, alpn)
        name = {"server_hostname": "a.x"} if alpn is not None else {}

        async def attack(data: bytes) -> None:
            with suppress(OSError):
                async with connection(port, ssl=context, **name) as (reader, writer):
                    writer.write(data)
                    await reader.read()

        frames = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if alpn == "h2" else b""
        for _ in range(15 if alpn is None else 5):
            await asyncio.gather(*(attack(frames + hostile(chance)) for _ in range(20)))
        for request in one.requests:
            names = [name.lower() for name, _ in request.headers]
            assert names.count("host") == 1
            assert names.count("content-length") + names.count("transfer-encoding") <= 1
            assert re.fullmatch(r"[!-~]+ [!-~]+ HTTP/1\.1", request.start)
    assert proxy.metrics().get('weft_http_local_replies_total{reason="internal"}') is None
    assert proxy.process.returncode is None


async def test_no_handshake_but_bytes_at_a_tls_port(proxy):
    chance = random.Random(5)
    authority = Authority.create("test")
    port = proxy.listen()
    await proxy.apply(
        https_port(port)
        | certificate(authority, "a.x")
        | {SETTINGS_KEY: Settings(head_timeout_s=0.3)}
    )

    async def attack(data: bytes) -> None:
        with suppress(OSError):
            async with connection(port) as (reader, writer):
                writer.write(data)
                await reader.read()

    await asyncio.gather(
        *(attack(hostile(chance)) for _ in range(50)),
        *(attack(b"\x16\x03\x01\0\x10" + chance.randbytes(40)) for _ in range(50)),
    )
    assert await over_tls(port, client_context(authority)) == 404
    assert proxy.error_log() == ""
