"""Flow records: what they say of requests, and what becomes of them when nobody reads."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from support.http1 import reset
from support.mesh import (
    CLIENT,
    SHOP,
    MeshProxy,
    ask,
    connected,
    mesh_proxy,
    mesh_route,
    service,
)
from support.proxy import (
    backend,
    cluster,
    fetch,
    get,
    proxy_fixture,
    route,
    rule,
    serve,
    to,
)

from l7proxy import metrics
from mesh.model.channel import FrameReader
from mesh.model.flow import Flow, Flows, HttpFlow, Peer
from mesh.model.routeconfig import PathMatch, RouteMatch

proxy = proxy_fixture
PREFIX_A = (RouteMatch(PathMatch("PathPrefix", "/a")),)


class Agent:
    """Reads a worker's config channel when it likes."""

    def __init__(self, mesh: MeshProxy, sock: socket.socket) -> None:
        self._mesh = mesh
        self._sock = sock
        self._frames = FrameReader()
        self.batches: list[Flows] = []

    async def records(self, count: int) -> list[Flow]:
        """The first so many records."""
        loop = asyncio.get_running_loop()
        while sum(len(batch.records) for batch in self.batches) < count:
            data = await loop.sock_recv(self._sock, 1 << 20)
            assert data, "the channel has ended"
            for message in self._frames.receive(data):
                assert isinstance(message, Flows)
                self.batches.append(message)
        return [flow for batch in self.batches for flow in batch.records][:count]


@asynccontextmanager
async def agent_of(mesh: MeshProxy) -> AsyncIterator[Agent]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
    mesh.flows.connect(transport)
    try:
        yield Agent(mesh, theirs)
    finally:
        mesh.flows.disconnect(transport)
        transport.abort()
        theirs.close()


def lost() -> float:
    return metrics.FLOWS_LOST._value.get()


async def test_a_mesh_request_in_full():
    async with mesh_proxy() as mesh, backend() as web, agent_of(mesh) as agent:
        port = mesh.serve(
            cluster("web", web.port), service(producers=True), mesh_route("r", rule(to("web")))
        )
        async with connected(port) as (reader, writer):
            own = writer.get_extra_info("sockname")[1]
            writer.write(get("/x?y=1", "web.shop", "X-Request-Id: mine").encode())
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(b"GET /x?y=1 HTTP/1.1"))
        (flow,) = await agent.records(1)
        assert flow.time > 1_700_000_000 * 10**9
        assert flow.http is not None
        assert flow.http.latency_ms > 0
        assert flow == Flow(
            time=flow.time,
            verdict="FORWARDED",
            source=Peer(CLIENT, own),
            destination=Peer("127.0.0.1", web.port, pod=f"web-{web.port}"),
            service="shop/web:80",
            http=HttpFlow(
                "GET", "web.shop", "/x?y=1", 200,
                latency_ms=flow.http.latency_ms, bytes_out=19, request_id="mine",
            ),
            route="HTTPRoute/shop/r",
        )  # fmt: skip


async def test_what_is_not_passed_on():
    async with mesh_proxy() as mesh, agent_of(mesh) as agent:
        only_a = mesh_route("r", rule(to("web"), matches=PREFIX_A))
        port = mesh.serve(cluster("web"), service(producers=True), only_a)
        await ask(port, get("/a"))
        await ask(port, get("/b"))
        for flow, verdict, reason, status in zip(
            await agent.records(2), ("ERROR", "DROPPED"), ("no_endpoints", "no_route"), (503, 404),
            strict=True,
        ):  # fmt: skip
            assert (flow.verdict, flow.reason) == (verdict, reason)
            assert flow.http is not None
            assert flow.http.status == status
            # Nobody got it: this is who would have been asked.
            assert flow.destination == Peer(SHOP, 80)


async def test_a_client_that_went_before_the_response():
    async with (
        mesh_proxy() as mesh,
        backend(lambda request: asyncio.Event().wait()) as web,
        agent_of(mesh) as agent,
    ):
        port = mesh.serve(cluster("web", web.port), service())
        async with connected(port) as (_, writer):
            writer.write(get().encode())
            await web.wait_for(1)
            reset(writer)
        (flow,) = await agent.records(1)
        assert (flow.verdict, flow.reason, flow.http.status) == ("ERROR", "client_gone", 0)
        assert flow.destination.port == web.port


async def test_batches_go_when_they_are_full():
    async with mesh_proxy() as mesh, backend() as web, agent_of(mesh) as agent:
        port = mesh.serve(cluster("web", web.port), service())
        async with connected(port) as (reader, writer):
            writer.write(get().encode() * 300)
            for _ in range(300):
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(b"GET / HTTP/1.1"))
        await agent.records(300)
        assert len(agent.batches[0].records) <= 256
        assert not any(batch.lost for batch in agent.batches)


async def test_without_a_channel_records_are_lost_and_the_next_reader_is_told():
    async with mesh_proxy() as mesh, backend() as web:
        port = mesh.serve(cluster("web", web.port), service())
        before = lost()
        await ask(port)
        await ask(port)
        assert lost() == before + 2
        async with agent_of(mesh) as agent:
            await ask(port, get("/seen"))
            (flow,) = await agent.records(1)
            assert flow.http.path == "/seen"
            assert agent.batches[0].lost == 2


async def test_an_agent_that_does_not_read_costs_no_more_than_a_bound():
    async with mesh_proxy() as mesh, backend() as web, agent_of(mesh) as agent:
        port = mesh.serve(cluster("web", web.port), service())
        before = lost()
        mesh.flows._transport.write(bytes(4 * 1024 * 1024))  # what it has not read yet
        await ask(port)
        assert lost() == before + 1
        # It reads on: what follows is sent, and says what is missing.
        left = 4 * 1024 * 1024
        while left:
            left -= len(await asyncio.get_running_loop().sock_recv(agent._sock, min(left, 1 << 20)))
        await ask(port, get("/seen"))
        (flow,) = await agent.records(1)
        assert (flow.http.path, agent.batches[0].lost) == ("/seen", 1)


async def test_requests_through_a_gateway_make_flows_too(proxy):
    async with backend() as one:
        port = await serve(
            proxy, cluster("one", one.port), route("r", rule(to("one"), matches=PREFIX_A))
        )
        await fetch(port, get("/a", "shop.example"))
        await fetch(port, get("/b"))
        records: list[Flow] = []
        while len(records) < 2:
            records += (await proxy.flows()).records
    first, second = records
    assert (first.verdict, first.gateway, first.route) == (
        "FORWARDED", "default/gw", "HTTPRoute/default/r"
    )  # fmt: skip
    assert first.source.address == "127.0.0.1"
    assert first.destination == Peer("127.0.0.1", one.port, pod=f"one-{one.port}")
    assert (second.verdict, second.reason) == ("DROPPED", "no_route")
    assert second.destination == Peer("127.0.0.1", port)


async def test_records_of_the_last_moment_are_sent_as_the_worker_ends(proxy):
    async with backend() as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        await fetch(port, get("/last"))
        proxy.drain(5)
        assert [flow.http.path for flow in (await proxy.flows()).records] == ["/last"]
        assert await proxy.process.wait() == 0
