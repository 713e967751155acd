"""Connections between two nodes' proxies: HTTP and bytes through tunnels."""

from __future__ import annotations

import asyncio
import random

import pytest
from loops import on_both_loops
from support.http1 import raw_backend, reset, shutdown
from support.mesh import CLIENT, ask, connected
from support.proxy import backend, get, read_message
from support.two_nodes import WEB, spiffe, two_nodes
from test_mesh_flows import agent_of
from test_mesh_relay import echo

from mesh.model.flow import Peer

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
