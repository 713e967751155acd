"""The echo backends over real sockets: acceptance and other tests rely on what they say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
import trustme
from acceptance.client import TLS, Request, Response, pem_files, round_trip
from echo import grpc
from echo.answer import Pod, duration
from echo.server import EchoServers, server_context

POD = Pod("shop-v1-6b8f-x2x7q", "storefront", "127.0.0.1")


@pytest_asyncio.fixture
async def servers() -> AsyncIterator[EchoServers]:
    result = EchoServers()
    yield result
    await result.close()


def body(response: Response) -> dict[str, object]:
    found = json.loads(response.body)
    assert isinstance(found, dict)
    return found


async def test_http1_tells_what_it_saw(servers: EchoServers) -> None:
    port = await servers.http(POD, 0)
    response = await round_trip(
        Request(
            "127.0.0.1",
            port,
            "POST",
            "/a%20b?x=1&y=%2F",
            "shop.example.test",
            (("X-Two", "a"), ("x-two", "b")),
            b"hello",
        )
    )
    assert response.status == 200
    seen = body(response)
    assert (seen["method"], seen["path"], seen["host"], seen["proto"]) == (
        "POST",
        "/a%20b?x=1&y=%2F",
        "shop.example.test",
        "HTTP/1.1",
    )
    assert seen["headers"]["X-Two"] == ["a", "b"]
    assert (seen["pod"], seen["namespace"]) == (POD.name, POD.namespace)
    assert seen["httpPort"] == str(port)
    assert "tls" not in seen


async def test_h2c_tells_what_it_saw(servers: EchoServers) -> None:
    port = await servers.h2c(POD, 0)
    request = Request("127.0.0.1", port, "GET", "/x?q", "h.test", protocol="H2C_PRIOR_KNOWLEDGE")
    seen = body(await round_trip(request))
    assert (seen["path"], seen["host"], seen["proto"]) == ("/x?q", "h.test", "HTTP/2.0")


async def test_status_delay_and_wanted_headers(servers: EchoServers) -> None:
    port = await servers.http(POD, 0)
    request = Request(
        "127.0.0.1",
        port,
        target="/status/418?delay=1ms",
        host="h",
        headers=(("X-Echo-Set-Header", "a:1,b:2, a: 3"),),
    )
    response = await round_trip(request)
    assert response.status == 418
    assert response.headers["a"] == ["1", "3"]
    assert response.header("b") == "2"
    health = await round_trip(Request("127.0.0.1", port, target="/health", host="h"))
    assert (health.status, health.body) == (200, b"OK")


async def test_retry_counts_tries_of_each_uuid(servers: EchoServers) -> None:
    port = await servers.http(POD, 0)

    async def status(uuid: str) -> int:
        target = f"/retry/some?uuid={uuid}&succeedAfter=2&responseCode=503"
        return (await round_trip(Request("127.0.0.1", port, target=target, host="h"))).status

    assert [await status("a") for _ in range(4)] == [503, 503, 200, 200]
    assert await status("b") == 503


async def test_log_is_looked_up_by_pod_and_uri(servers: EchoServers) -> None:
    port = await servers.http(POD, 0)
    await round_trip(Request("127.0.0.1", port, target="/mirror?id=7", host="h"))
    assert servers.memory.echoed("shop-v1", "storefront", "/mirror?id=7")
    assert not servers.memory.echoed("shop-v1", "elsewhere", "/mirror?id=7")
    assert not servers.memory.echoed("shop-v2", "storefront", "/mirror?id=7")
    assert not servers.memory.echoed("shop-v1", "storefront", "/mirror?id=8")


async def test_tls_shows_server_name_and_client_certificate(servers: EchoServers) -> None:
    authority = trustme.CA()
    served = authority.issue_cert("abc.example.test", "other.example.test")
    client = authority.issue_cert("client@example.test")
    ca_pem = authority.cert_pem.bytes().decode()
    chain = served.cert_chain_pems[0].bytes().decode()
    with pem_files(chain, served.private_key_pem.bytes().decode()) as files:
        context = server_context(*files, ca_pem)
    port = await servers.http(POD, 0, context)
    client_chain = client.cert_chain_pems[0].bytes().decode()
    client_key = client.private_key_pem.bytes().decode()
    plain = TLS("abc.example.test", ca_pem)
    seen = body(await round_trip(Request("127.0.0.1", port, host="h", tls=plain)))
    assert seen["tls"]["serverName"] == "abc.example.test"
    assert seen["tls"]["negotiatedProtocol"] == "http/1.1"
    assert seen["tls"]["peerCertificates"] == []
    with_certificate = TLS("other.example.test", ca_pem, client_chain, client_key)
    seen = body(await round_trip(Request("127.0.0.1", port, host="h", tls=with_certificate)))
    assert seen["tls"]["serverName"] == "other.example.test"
    assert [pem.strip() for pem in seen["tls"]["peerCertificates"]] == [client_chain.strip()]


async def test_grpc_methods_and_unknown_ones(servers: EchoServers) -> None:
    port = await servers.h2c(POD, 0, grpc_too=True)

    async def call(method: str) -> Response:
        return await round_trip(
            Request(
                "127.0.0.1",
                port,
                "POST",
                method,
                "h",
                (("content-type", "application/grpc"), ("te", "trailers")),
                grpc.frame(b""),
                "H2C_PRIOR_KNOWLEDGE",
            )
        )

    for method in grpc.METHODS:
        response = await call(method)
        assert response.trailers["grpc-status"] == ["0"]
        assert grpc.seen_by(response.body) == (method, POD.namespace, POD.name)
    assert (await call("/other/Method")).header("grpc-status") == "12"


async def test_websocket_echoes(servers: EchoServers) -> None:
    port = await servers.http(POD, 0)
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"http://127.0.0.1:{port}/ws") as socket,
    ):
        await socket.send_str("hello")
        assert await socket.receive_str() == "hello"
        await socket.send_bytes(b"\0\1")
        assert await socket.receive_bytes() == b"\0\1"


async def test_many_h2c_streams_at_once_with_bodies_over_the_window(servers: EchoServers) -> None:
    port = await servers.h2c(POD, 0)
    big = "v" * 8000
    request = Request(
        "127.0.0.1",
        port,
        host="h",
        headers=tuple((f"x-{number}", big) for number in range(6)),
        protocol="H2C_PRIOR_KNOWLEDGE",
    )
    responses = await asyncio.gather(*(round_trip(request) for _ in range(8)))
    assert all(len(response.body) > 48_000 for response in responses)


def test_durations() -> None:
    assert [duration(text) for text in ("500ms", "1s", "1.5s", "2m")] == [0.5, 1, 1.5, 120]
    with pytest.raises(ValueError, match="soon"):
        duration("soon")
