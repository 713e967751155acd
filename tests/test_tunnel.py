"""Connections between two nodes' proxies: HTTP and bytes through tunnels."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl

import pytest
from http2_peer import ServerUnderTest
from loops import on_both_loops
from support.http1 import raw_backend, reset, shutdown
from support.mesh import CLIENT, ask, connected
from support.proxy import Message, backend, cluster, get, ok, read_message
from support.two_nodes import WEB, spiffe, two_nodes
from test_mesh_flows import agent_of
from test_mesh_relay import echo
from upstream_backend import backend as tls_backend

from certs.selfsigned import Authority
from l7proxy.tls import load_certificate
from mesh.model.flow import Peer
from mesh.model.nodeconfig import CertificateSection, Settings, UpstreamTLS

MIB = 1024 * 1024


@on_both_loops
async def test_requests_go_through_a_tunnel():
    async with two_nodes() as nodes, backend() as web, agent_of(nodes.a) as agent:
        port = nodes.http(web.port)
        async with connected(port) as (reader, writer):
            for path in ("/one", "/two"):
                writer.write(get(path, "web").encode())
                message = await read_message(reader)
                assert message is not None
                assert (message.status, message.body) == (200, f"GET {path} HTTP/1.1".encode())
        assert web.connections == 1
        flow = (await agent.records(2))[1]
        assert (flow.encryption, flow.verdict) == ("mtls", "FORWARDED")
        assert flow.source.spiffe_id == spiffe("client")
        assert flow.destination == Peer(
            WEB, web.port, "", f"web-{web.port}", spiffe_id=spiffe("web")
        )
        log = await nodes.a.close()
        assert [(line["encryption"], line["client_identity"]) for line in log] == [
            ("mtls", spiffe("client"))
        ] * 2
        assert log[0]["endpoint_identity"] == spiffe("web")


@on_both_loops
async def test_bytes_pass_both_ways_and_ends_one_by_one():
    async with (
        two_nodes() as nodes, raw_backend(echo) as web,
        agent_of(nodes.a) as ours, agent_of(nodes.b) as theirs,
    ):  # fmt: skip
        port = nodes.relay(web)
        data = random.Random(1).randbytes(3 * MIB)
        async with connected(port) as (reader, writer):
            own = writer.get_extra_info("sockname")[1]

            async def send() -> None:
                for start in range(0, len(data), 70_001):
                    writer.write(data[start : start + 70_001])
                    await writer.drain()
                shutdown(writer)

            sending = asyncio.ensure_future(send())
            assert await reader.read(-1) == data
            await sending
        for agent in (ours, theirs):
            (flow,) = await agent.records(1)
            assert (flow.verdict, flow.reason, flow.encryption) == ("FORWARDED", "", "mtls")
            assert flow.source == Peer(CLIENT, own, spiffe_id=spiffe("client"))
            assert flow.destination == Peer(WEB, web, spiffe_id=spiffe("web"))
            assert (flow.bytes_in, flow.bytes_out) == (len(data), len(data))
        assert nodes.a.proxy._admission.total == nodes.b.proxy._admission.total == 0


@on_both_loops
async def test_a_backend_may_end_first_and_still_be_sent_to():
    received = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"first word")
        await writer.drain()
        shutdown(writer)
        received.set_result(await reader.read(-1))

    async with (
        two_nodes() as nodes,
        raw_backend(answer) as web,
        connected(nodes.relay(web)) as (reader, writer),
    ):
        assert await reader.read(-1) == b"first word"
        writer.write(b"last word")
        await writer.drain()
        shutdown(writer)
        assert await received == b"last word"


@on_both_loops
async def test_resets_are_passed_on_as_resets():
    backend_saw = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline() == b"reset\n":
            writer.write(b"half of an answ")
            await writer.drain()
            await reader.readline()
            reset(writer)
            return
        writer.write(b"yes\n")
        try:
            backend_saw.set_result(await reader.read(-1))
        except ConnectionResetError as error:
            backend_saw.set_result(error)

    async with two_nodes() as nodes, raw_backend(answer) as web, agent_of(nodes.b) as agent:
        port = nodes.relay(web)
        async with connected(port) as (reader, writer):
            writer.write(b"reset\n")
            assert await reader.readexactly(15) == b"half of an answ"
            writer.write(b"now\n")
            with pytest.raises(ConnectionResetError):
                await reader.read(-1)
        async with connected(port) as (reader, writer):
            writer.write(b"wait\n")
            await reader.readline()
            reset(writer)
            assert isinstance(await backend_saw, ConnectionResetError)
        flows = await agent.records(2)
        assert [(flow.verdict, flow.reason) for flow in flows] == [
            ("ERROR", "backend_reset"), ("ERROR", "client_reset")
        ]  # fmt: skip


@on_both_loops
async def test_what_the_pod_refuses_is_told_as_without_a_tunnel():
    async with two_nodes() as nodes, raw_backend(echo) as web:
        pass
    async with two_nodes() as nodes, agent_of(nodes.a) as agent:
        with pytest.raises(ConnectionResetError):
            async with connected(nodes.relay(web)) as (reader, _):
                await reader.read(1)
        (flow,) = await agent.records(1)
        assert (flow.verdict, flow.reason) == ("ERROR", "connect_refused")
        assert (await ask(nodes.http(web))).status == 503


# --- what HTTP carries ----------------------------------------------------------------------------


@on_both_loops
async def test_large_bodies_both_ways_and_the_connection_is_kept():
    async def answer(request: Message) -> bytes:
        return ok(request.body[::-1])

    async with two_nodes() as nodes, backend(answer) as web:
        data = random.Random(2).randbytes(2 * MIB)
        async with connected(nodes.http(web.port)) as (reader, writer):
            for size in (0, 1, 16 * 1024, 16 * 1024 + 1, len(data)):
                head = f"PUT / HTTP/1.1\r\nHost: web\r\nContent-Length: {size}\r\n\r\n"
                writer.write(head.encode() + data[:size])
                message = await read_message(reader)
                assert message is not None
                assert message.body == data[:size][::-1]
        assert web.connections == 1


@on_both_loops
@pytest.mark.parametrize("end", [shutdown, reset])
async def test_a_response_that_ends_with_its_connection(end):
    """Whole if the pod closed it in order, and not if it was reset, on its node or between them."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc")
        await writer.drain()
        await asked.wait()
        end(writer)

    asked = asyncio.Event()
    async with (
        two_nodes() as nodes,
        raw_backend(answer) as web,
        connected(nodes.http(web)) as (reader, writer),
    ):
        writer.write(get("/", "web").encode())
        message = await read_message(reader, head_only=True)
        assert message is not None
        assert message.header("transfer-encoding") == "chunked"
        assert await reader.readexactly(8) == b"3\r\nabc\r\n"
        asked.set()
        rest = await reader.read(5)
        assert rest == (b"0\r\n\r\n" if end is shutdown else b"")


@on_both_loops
async def test_http2_shares_one_tunnel_of_a_pod():
    async with two_nodes() as nodes, ServerUnderTest(settings=Settings()) as web:
        port = nodes.http(web.port, protocol="h2c")
        answers = await asyncio.gather(*(ask(port) for _ in range(20)))
        assert {message.status for message in answers} == {200}
        assert len(web.connections) == 1
        await nodes.grow_old()  # it makes way for another
        assert (await ask(port)).status == 200
        assert len(web.connections) == 2
        for proxy in (nodes.a, nodes.b):
            await proxy.close()


@on_both_loops
async def test_websockets_end_half_by_half():
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        await echo(reader, writer)

    async with (
        two_nodes() as nodes,
        raw_backend(answer) as web,
        connected(nodes.http(web, protocol="ws")) as (reader, writer),
    ):
        writer.write(get("/", "web", "Connection: Upgrade", "Upgrade: websocket").encode())
        message = await read_message(reader, head_only=True)
        assert message is not None
        assert message.status == 101
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        writer.write(b"last")
        shutdown(writer)
        assert await reader.read(-1) == b"last"


@on_both_loops
async def test_a_backend_that_speaks_tls_itself_does_so_inside():
    authority = Authority.create("backends")
    section = CertificateSection(*authority.issue(dns=["web.test"]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_certificate(context, section, "test")
    policy = UpstreamTLS("web.test", authority.certificate_pem)
    wrong = UpstreamTLS("other.test", authority.certificate_pem)
    async with two_nodes() as nodes, tls_backend(context=context) as web:
        port = nodes.http(web.endpoint.port, tls=policy)
        for _ in range(2):
            assert (await ask(port)).body == b"a"
        assert web.connections == 1
        nodes.a.apply(cluster("web", web.endpoint.port, tls=wrong))
        assert (await ask(port)).status == 502


@on_both_loops
async def test_who_does_not_read_holds_the_other_back():
    sent = 0
    stuck = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.transport.set_write_buffer_limits(0)
        with contextlib.suppress(TimeoutError):
            while sent < 64 * MIB:
                writer.write(bytes(65536))
                sent += 65536
                async with asyncio.timeout(0.5):  # what nobody takes never ends by itself
                    await writer.drain()
        stuck.set()
        while sent < 64 * MIB:
            await writer.drain()
            writer.write(bytes(65536))
            sent += 65536
        await writer.drain()
        shutdown(writer)
        await reader.read()

    async with (
        two_nodes() as nodes,
        raw_backend(answer) as web,
        connected(nodes.relay(web), limit=65536) as (reader, _),
    ):
        await stuck.wait()
        assert sent < 48 * MIB  # the kernel's buffers of three connections and a little of ours
        total = 0
        while data := await reader.read(MIB):
            total += len(data)
        assert total == 64 * MIB


@on_both_loops
async def test_many_at_once_with_ends_by_chance():
    """Every byte that arrives is the next one, however the connections end."""

    async def client(port: int, seed: int) -> None:
        chance = random.Random(seed)
        data = chance.randbytes(chance.choice((1, 1000, 300_000, 900_000)))
        end = chance.choice(("half close", "close", "reset"))
        async with connected(port) as (reader, writer):

            async def send() -> None:
                position = 0
                while position < len(data):
                    step = chance.randrange(1, 100_000)
                    writer.write(data[position : position + step])
                    await writer.drain()
                    position += step
                if end == "half close":
                    shutdown(writer)

            sending = asyncio.ensure_future(send())
            if end == "half close":
                assert await reader.read(-1) == data
                await sending
                return
            position, enough = 0, chance.randrange(len(data))
            while position < enough and (piece := await reader.read(65536)):
                assert data[position : position + len(piece)] == piece
                position += len(piece)
            sending.cancel()
            if end == "reset":
                reset(writer)

    async with two_nodes() as nodes, raw_backend(echo) as web:
        port = nodes.relay(web)
        await asyncio.gather(*(client(port, seed) for seed in range(40)))
        while nodes.a.proxy._admission.total or nodes.b.proxy._admission.total:
            await asyncio.sleep(0)
