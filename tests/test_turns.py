"""Relayed connections that take turns on a tunnel: what is passed on, and what ends a tunnel."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from loops import on_both_loops
from support.http1 import raw_backend, reset, shutdown
from support.mesh import CLIENT, connected
from support.policy import rule
from support.two_nodes import WEB, TwoNodes, peer_context, spiffe, two_nodes
from test_mesh_flows import agent_of
from test_mesh_relay import echo
from test_policy_tunnel import ME, identify, ingress
from test_tunnel_attacks import CLIENT_ID, FAST, WEB_ID, dialled, impostor, svid

from l7proxy import tunnel_wire
from l7proxy.tunnel_wire import Answer, Preface
from l7proxy.tunnels import Tunnel
from mesh.model.nodeconfig import MESH_TUNNEL_PORT, MeshPort

MIB = 1024 * 1024
END = bytes(4)


def resting(nodes: TwoNodes) -> list[Tunnel]:
    """Node a's, in the order in which they have begun to."""
    found = nodes.a.proxy._digger.rests._by_key.values()
    return [tunnel for one in found for tunnel in one if not tunnel.stream.is_closing()]


async def rest(nodes: TwoNodes) -> Tunnel:
    """The tunnel of which the turn is over."""
    while not resting(nodes):
        await asyncio.sleep(0)
    (tunnel,) = resting(nodes)
    return tunnel


async def say(port: int, data: bytes = b"hello") -> bytes:
    """What a connection of its own gets for it."""
    async with connected(port) as (reader, writer):

        async def send() -> None:
            writer.write(data)
            await writer.drain()
            shutdown(writer)

        sending = asyncio.ensure_future(send())
        try:
            return await reader.read(-1)
        finally:
            await sending


# --- what goes through ----------------------------------------------------------------------------


@on_both_loops
async def test_connections_take_turns_on_one_tunnel():
    async with (
        two_nodes() as nodes, raw_backend(echo) as web,
        agent_of(nodes.a) as ours, agent_of(nodes.b) as theirs,
    ):  # fmt: skip
        port = nodes.relay(web)
        chance = random.Random(3)
        found = set()
        sizes = (1, 4, 16 * 1024, 3 * MIB, 5)
        for size in sizes:
            data = chance.randbytes(size)
            assert await say(port, data) == data
            found.add(await rest(nodes))
            while nodes.a.proxy._admission.total or nodes.b.proxy._admission.total:
                await asyncio.sleep(0)
        assert len(found) == 1
        for agent in (ours, theirs):
            flows = await agent.records(len(sizes))
            assert [(flow.bytes_in, flow.bytes_out) for flow in flows] == [
                (size, size) for size in sizes
            ]
            assert {(flow.verdict, flow.reason, flow.encryption) for flow in flows} == {
                ("FORWARDED", "", "mtls")
            }
        ports = [[one.source.port for one in await a.records(len(sizes))] for a in (ours, theirs)]
        assert ports[0] == ports[1]


@on_both_loops
async def test_who_is_at_it_shares_it_with_nobody():
    async with two_nodes() as nodes, raw_backend(echo) as web:
        port = nodes.relay(web)
        answers = await asyncio.gather(*(say(port, bytes([n]) * 100_000) for n in range(20)))
        assert answers == [bytes([n]) * 100_000 for n in range(20)]
        while any(nodes.open_tunnels()) and nodes.open_tunnels() != (len(resting(nodes)),) * 2:
            await asyncio.sleep(0)
        assert 1 <= len(resting(nodes)) <= 20


@on_both_loops
@pytest.mark.parametrize("first", ["client", "backend"])
async def test_halves_end_one_by_one_and_only_then_another_has_its_turn(first: str):
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if first == "client":
            heard.append(await reader.read(-1))
            writer.write(b"answer" * 50_000)
            await writer.drain()
            shutdown(writer)
            return
        writer.write(b"answer" * 50_000)
        await writer.drain()
        shutdown(writer)
        heard.append(await reader.read(-1))

    async with two_nodes() as nodes, raw_backend(answer) as web:
        port = nodes.relay(web)
        for turn in range(3):
            async with connected(port) as (reader, writer):
                if first == "backend":
                    assert await reader.read(-1) == b"answer" * 50_000
                    assert not resting(nodes)
                writer.write(b"%d" % turn * 70_000)
                await writer.drain()
                shutdown(writer)
                if first == "client":
                    assert await reader.read(-1) == b"answer" * 50_000
                await rest(nodes)
                while len(heard) <= turn:
                    await asyncio.sleep(0)
                assert heard[turn] == b"%d" % turn * 70_000


@on_both_loops
@pytest.mark.parametrize("who", ["client", "backend"])
async def test_a_reset_is_passed_on_and_ends_the_tunnel(who: str):
    backend_saw: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readline()
        writer.write(line)
        if line == b"reset\n":
            await reader.readline()
            reset(writer)
        elif line == b"wait\n":
            try:
                backend_saw.set_result(await reader.read(-1))
            except ConnectionResetError as error:
                backend_saw.set_result(error)
        else:
            shutdown(writer)
            await reader.read()

    async with two_nodes() as nodes, raw_backend(answer) as web:
        port = nodes.relay(web)
        assert await say(port, b"one\n") == b"one\n"
        tunnel = await rest(nodes)
        async with connected(port) as (reader, writer):
            writer.write(b"reset\n" if who == "backend" else b"wait\n")
            await reader.readline()
            assert not resting(nodes)
            if who == "backend":
                writer.write(b"now\n")
                with pytest.raises(ConnectionResetError):
                    await reader.read(-1)
            else:
                reset(writer)
                assert isinstance(await backend_saw, ConnectionResetError)
        assert tunnel.stream.is_closing()
        assert await say(port, b"two\n") == b"two\n"
        assert await rest(nodes) is not tunnel


@on_both_loops
async def test_a_turn_that_is_whole_needs_its_tunnel_no_more():
    """Both ends have been said, and what the backend has not read yet is on its node."""
    go_on = asyncio.Event()
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        shutdown(writer)
        await go_on.wait()
        heard.set_result(await reader.read(-1))

    async with two_nodes() as nodes, raw_backend(answer) as web:
        own = nodes.b.proxy
        data = random.Random(4).randbytes(6 * MIB)
        async with connected(nodes.relay(web)) as (reader, writer):
            assert await reader.read(-1) == b""
            writer.write(data)
            while writer.transport.get_write_buffer_size() > 3 * MIB:
                await asyncio.sleep(0)
            go_on.set()
            await writer.drain()
            shutdown(writer)
            while nodes.a.proxy._admission.total:
                await asyncio.sleep(0)
            for found in tuple(nodes.a.proxy.tunnels._by_key.values()):
                for tunnel in tuple(found):
                    tunnel.stream.abort()
        assert await heard == data
        while own._admission.total:
            await asyncio.sleep(0)


# --- peers of another version, and others ---------------------------------------------------------


def context_of(nodes: TwoNodes, spiffe_id: str, *, server: bool) -> ssl.SSLContext:
    return peer_context(nodes.authority, svid(nodes.authority, spiffe_id), server=server)


async def test_a_node_that_knows_no_turns_is_connected_to_as_before():
    async def old(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"shop/client")
        await reader.readuntil(b"turns\xc3")
        writer.write(tunnel_wire.encode(Answer()))
        writer.write(await reader.readexactly(5))
        await reader.read(1)
        writer.close()

    async with (
        two_nodes(FAST) as nodes,
        impostor(nodes, context_of(nodes, WEB_ID, server=True), old),
    ):
        port = nodes.relay(1)
        for _ in range(2):
            async with connected(port) as (reader, writer):
                writer.write(b"plain")
                assert await reader.readexactly(5) == b"plain"
                reset(writer)
            while nodes.a.proxy._admission.total:
                await asyncio.sleep(0)
            assert not resting(nodes)


async def test_a_node_that_knows_no_turns_connects_as_before():
    async with (
        two_nodes(FAST) as nodes,
        raw_backend(echo) as web,
        dialled(nodes, context_of(nodes, CLIENT_ID, server=False)) as (reader, writer),
    ):
        writer.write(tunnel_wire.encode(Preface("shop/client", WEB, web)))
        answer = tunnel_wire.encode(Answer())
        assert await reader.readexactly(len(answer)) == answer
        writer.write(b"plain")
        assert await reader.readexactly(5) == b"plain"


@asynccontextmanager
async def by_hand(
    nodes: TwoNodes, web: int
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Turns as node a's, said by the test."""
    async with dialled(nodes, context_of(nodes, CLIENT_ID, server=False)) as (reader, writer):
        await ask_for_turn(reader, writer, web)
        yield reader, writer


async def ask_for_turn(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, web: int
) -> None:
    writer.write(tunnel_wire.encode(Preface("shop/client", WEB, web, turns=True)))
    answer = tunnel_wire.encode(Answer(turns=True))
    assert await reader.readexactly(len(answer)) == answer


def piece(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


@on_both_loops
async def test_pieces_are_read_however_they_come():
    async with (
        two_nodes() as nodes,
        raw_backend(echo) as web,
        by_hand(nodes, web) as (reader, writer),
    ):
        for turn in range(2):
            if turn:
                await ask_for_turn(reader, writer, web)
            for byte in piece(b"abc") + piece(b"d"):
                writer.write(bytes([byte]))
                await writer.drain()
            heard = b""
            while len(heard) < 4:
                size = int.from_bytes(await reader.readexactly(4), "big")
                heard += await reader.readexactly(size)
            assert heard == b"abcd"
            writer.write(piece(b"e" * 5) + END)
            assert await reader.readexactly(13) == piece(b"e" * 5) + END


@pytest.mark.parametrize(
    "words",
    [
        piece(b"a") + END + END,
        END + piece(b"a"),
        END + tunnel_wire.encode(Preface("shop/client", WEB, 1, turns=True)),
        b"\x7f\xff\xff\xff",
    ],
    ids=["two-ends", "after-the-end", "next-at-once", "long-piece"],
)
async def test_what_makes_no_sense_is_a_reset(words: bytes):
    saw: asyncio.Future[ConnectionError] = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(65536):
                pass
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0)
        except ConnectionError as error:
            saw.set_result(error)

    async with (
        two_nodes(FAST) as nodes,
        raw_backend(answer) as web,
        by_hand(nodes, web) as (reader, writer),
    ):
        writer.write(words)
        with contextlib.suppress(OSError):
            while await reader.read(65536):
                pass
        await saw


# --- between two turns ----------------------------------------------------------------------------


async def test_a_tunnel_that_is_closed_just_as_it_is_wanted_loses_nothing():
    """Because the far end's worker ends, say: the connection gets another tunnel."""
    made = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal made
        made += 1
        await reader.readuntil(b"turns\xc3")
        writer.write(tunnel_wire.encode(Answer(turns=True)))
        data = await reader.readuntil(END)
        writer.write(data)
        await reader.readuntil(b"turns\xc3")  # it has asked for the next turn
        if made == 1:
            writer.close()
        else:
            writer.transport.abort()

    async with (
        two_nodes(FAST) as nodes,
        impostor(nodes, context_of(nodes, WEB_ID, server=True), answer),
    ):
        port = nodes.relay(1)
        for number in range(1, 4):
            assert await say(port, b"hello") == b"hello"
            await rest(nodes)
            assert made == number


def renew_client(nodes: TwoNodes) -> None:
    nodes.hold("a", "client")


def renew_web(nodes: TwoNodes) -> None:
    nodes.hold("b", "web")


def other_roots(nodes: TwoNodes) -> None:
    for node in (nodes.a, nodes.b):
        assert node.apply(nodes.authority.bundle(type(nodes.authority)())) == {}


def other_pod(nodes: TwoNodes) -> None:
    """At the address of the one before, with an identity of its own."""
    nodes.hold("b", "other")
    nodes.pod("web", "127.0.0.9", "b")
    nodes.pod("other", WEB, "b")


def other_client(nodes: TwoNodes) -> None:
    nodes.hold("a", "other")
    nodes.pod("client", "127.0.1.9", "a")
    nodes.pod("other", CLIENT, "a")


def far_end_drains(nodes: TwoNodes) -> None:
    nodes.b.proxy._put_mesh_port(MeshPort(nodes.addresses["b"], MESH_TUNNEL_PORT, "tunnel"))


@on_both_loops
@pytest.mark.parametrize(
    "change",
    [renew_client, renew_web, other_roots, other_pod, other_client, far_end_drains],
)
async def test_what_changes_between_two_turns_makes_a_new_tunnel(
    change: Callable[[TwoNodes], None],
):
    async with two_nodes() as nodes, raw_backend(echo) as web, agent_of(nodes.b) as agent:
        port = nodes.relay(web)
        assert await say(port) == b"hello"
        tunnel = await rest(nodes)
        change(nodes)
        assert await say(port) == b"hello"
        assert await rest(nodes) is not tunnel
        assert tunnel.stream.is_closing()
        flows = await agent.records(2)
        assert [flow.verdict for flow in flows] == ["FORWARDED"] * 2
        who = (flows[1].source.spiffe_id, flows[1].destination.spiffe_id)
        assert who == (
            spiffe("other" if change is other_client else "client"),
            spiffe("other" if change is other_pod else "web"),
        )


async def test_policy_judges_each_turn():
    async with two_nodes() as nodes, raw_backend(echo) as web, agent_of(nodes.b) as agent:
        identify(nodes)
        ingress(nodes, rule("P", ME))
        port = nodes.relay(web)
        assert await say(port) == b"hello"
        await rest(nodes)
        ingress(nodes)
        with pytest.raises(ConnectionResetError):
            await say(port)
        assert not resting(nodes)
        flows = await agent.records(2)
        assert (flows[1].verdict, flows[1].reason) == ("DROPPED", "policy_denied")
        ingress(nodes, rule("P", ME))
        assert await say(port) == b"hello"


async def test_a_pod_that_has_gone_refuses_the_turn_as_it_would_a_connection():
    async with two_nodes() as nodes, agent_of(nodes.a) as agent:
        async with raw_backend(echo) as web:
            port = nodes.relay(web)
            assert await say(port) == b"hello"
            await rest(nodes)
        with pytest.raises(ConnectionResetError):
            await say(port)
        flows = await agent.records(2)
        assert (flows[1].verdict, flows[1].reason) == ("ERROR", "connect_refused")
