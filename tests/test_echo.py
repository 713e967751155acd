"""The echo backends over real sockets: acceptance and other tests rely on what they say."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio
import trustme
from acceptance.client import TLS, Request, RequestFailed, Response, pem_files, round_trip
from acceptance.inside import send_from, socket_of, take_requests
from echo import grpc
from echo import pod as echo_pod
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


async def test_a_pod_listens_as_its_arguments_say(servers: EchoServers, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("echo")
    crt, key = tmp_path / "crt", tmp_path / "key"
    certificate.cert_chain_pems[0].write_to_path(crt)
    certificate.private_key_pem.write_to_path(key)
    arguments = ["--tcp=9090", "--port=8080", "--grpc=7070", "--port=8443", "--tls=8443"]
    args = echo_pod.parse([*arguments, f"--crt={crt}", f"--key={key}"])
    assert echo_pod.ports(args) == [7070, 8080, 8443, 9090]
    assert echo_pod.ports(echo_pod.parse([])) == [8080]
    # An address that nothing else in the tests has: the ports are given.
    pod = Pod("echo-v1-1", "mesh", "127.77.0.1")
    await echo_pod.serve(servers, pod, args)
    plain = body(await round_trip(Request(pod.address, 8080, host="echo")))
    assert (plain["pod"], plain["httpPort"], "tls" in plain) == (pod.name, "8080", False)
    tls = TLS("echo", authority.cert_pem.bytes().decode())
    inside_tls = body(await round_trip(Request(pod.address, 8443, host="echo", tls=tls)))
    assert inside_tls["tls"]["serverName"] == "echo"
    method = grpc.METHODS[0]
    call = Request(
        pod.address,
        7070,
        "POST",
        method,
        "echo",
        (("content-type", "application/grpc"), ("te", "trailers")),
        grpc.frame(b""),
        "H2C_PRIOR_KNOWLEDGE",
    )
    assert grpc.seen_by((await round_trip(call)).body) == (method, pod.namespace, pod.name)
    reader, writer = await asyncio.open_connection(pod.address, 9090)
    writer.write(b"hello\n")
    assert await reader.readline() == b"echo-v1-1 hello\n"
    writer.close()
    await writer.wait_closed()


async def test_requests_are_made_where_the_socket_is_served(
    servers: EchoServers, tmp_path: Path
) -> None:
    port = await servers.http(POD, 0)
    path = socket_of(tmp_path, "mesh", "echo-v1-1")
    server = await take_requests(path)
    request = Request("localhost", port, "POST", "/a", "echo", (("X-A", "1"),), b"\0\xff")
    response = await send_from(path, dataclasses.replace(request, family=socket.AF_INET))
    seen = body(response)
    assert (response.status, seen["path"], seen["headers"]["X-A"]) == (200, "/a", ["1"])
    with pytest.raises(RequestFailed, match="ConnectionRefusedError"):
        await send_from(path, Request("127.0.0.1", 1))
    server.close()
    await server.wait_closed()
    with pytest.raises(RequestFailed, match="takes no requests"):
        await send_from(path.with_name("none"), request)
