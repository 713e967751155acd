"""Clusters that speak HTTP/2: requests share connections, up to what the endpoint allows."""

from __future__ import annotations

import asyncio
import contextlib

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from loops import advance, on_both_loops, on_virtual_loop
from upstream_backend import finish

from l7proxy.pool import IDLE_S
from l7proxy.streams import StreamReset
from l7proxy.upstream import Cluster, Clusters, ClusterStats
from mesh.model.nodeconfig import ClusterSection, Endpoint, Settings


class _Connection(asyncio.Protocol):
    """Answers every request with 200 and "h2" when told to."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.server.open.append(self)
        self.server.connections += 1
        limit = {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: self.server.streams}
        self.h2.local_settings = h2.settings.Settings(client=False, initial_values=limit)
        self.h2.initiate_connection()
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.open.remove(self)

    def data_received(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                self.server.waiting.append((self, event.stream_id))
        if self.server.answering:
            self.server.answer()
        self.flush()

    def go_away(self) -> None:
        self.h2.close_connection(last_stream_id=0)
        self.flush()

    def flush(self) -> None:
        self.transport.write(self.h2.data_to_send())


class Server:
    """`streams` is what a connection allows at once."""

    def __init__(self, streams: int) -> None:
        self.streams = streams
        self.connections = 0
        self.open: list[_Connection] = []
        self.waiting: list[tuple[_Connection, int]] = []
        self.answering = True

    def answer(self) -> None:
        waiting, self.waiting = self.waiting, []
        for connection, stream in waiting:
            connection.h2.send_headers(stream, [(":status", "200")])
            connection.h2.send_data(stream, b"h2", end_stream=True)
            connection.flush()


@contextlib.asynccontextmanager
async def serving(streams: int = 100, **more: object):
    server = Server(streams)
    listening = await asyncio.get_running_loop().create_server(
        lambda: _Connection(server), "127.0.0.1", 0
    )
    endpoint = Endpoint(*listening.sockets[0].getsockname())
    clusters = Clusters(Settings())
    clusters.put("c", ClusterSection((endpoint,), protocol="h2c", **more))  # type: ignore[arg-type]
    yield server, clusters.get("c")
    clusters.close()
    while server.open:
        await asyncio.sleep(0)
    listening.close()
    await listening.wait_closed()


async def ask(cluster: Cluster) -> str:
    return await finish(await cluster.acquire())


async def until_waiting(server: Server, count: int) -> None:
    while len(server.waiting) < count:
        await asyncio.sleep(0)


@on_both_loops
async def test_requests_at_once_share_one_connection():
    async with serving() as (server, cluster):
        server.answering = False
        asked = [asyncio.ensure_future(ask(cluster)) for _ in range(50)]
        await until_waiting(server, 50)
        assert cluster.stats() == ClusterStats(1, 0, 0, 0)
        server.answer()
        assert await asyncio.gather(*asked) == ["h2"] * 50
        assert server.connections == 1
        assert cluster.stats() == ClusterStats(1, 1, 0, 0)


@on_both_loops
async def test_beyond_what_a_connection_allows_there_is_another():
    async with serving(streams=3) as (server, cluster):
        assert await ask(cluster) == "h2"  # from now on the limit is known
        server.answering = False
        asked = [asyncio.ensure_future(ask(cluster)) for _ in range(6)]
        await until_waiting(server, 6)
        assert server.connections == 2
        server.answer()
        assert await asyncio.gather(*asked) == ["h2"] * 6


@on_both_loops
async def test_who_finds_all_streams_taken_waits_for_one():
    async with serving(streams=2, max_connections_per_endpoint=1) as (server, cluster):
        assert await ask(cluster) == "h2"
        server.answering = False
        asked = [asyncio.ensure_future(ask(cluster)) for _ in range(5)]
        await until_waiting(server, 2)
        assert cluster.stats() == ClusterStats(1, 0, 3, 0)
        server.answering = True
        server.answer()
        assert await asyncio.gather(*asked) == ["h2"] * 5
        assert server.connections == 1


@on_both_loops
async def test_after_goaway_requests_take_another_connection():
    async with serving() as (server, cluster):
        assert await ask(cluster) == "h2"
        server.answering = False
        asked = asyncio.ensure_future(ask(cluster))
        await until_waiting(server, 1)
        server.open[0].go_away()
        with pytest.raises(StreamReset) as caught:
            await asked
        assert caught.value.unprocessed
        server.waiting.clear()
        server.answering = True
        assert await ask(cluster) == "h2"
        assert server.connections == 2


@on_both_loops
async def test_a_reset_stream_counts_though_its_connection_was_used_before():
    async with serving() as (_, cluster):
        assert await ask(cluster) == "h2"
        lease = await cluster.acquire()
        lease.stream.abort("test")
        lease.failed("reset")
        lease.release()
        (member,) = cluster._balancer.members.values()
        assert member.failures == 1


@on_virtual_loop
async def test_only_idle_connections_expire():
    async with serving() as (server, cluster):
        assert await ask(cluster) == "h2"
        server.answering = False
        asked = asyncio.ensure_future(ask(cluster))
        await until_waiting(server, 1)
        advance(IDLE_S * 2)
        for _ in range(3):
            await asyncio.sleep(0)
        server.answer()
        assert await asked == "h2"
        advance(IDLE_S + 0.1)
        while cluster.stats().connections:
            await asyncio.sleep(0)
        while server.open:
            await asyncio.sleep(0)


@on_both_loops
async def test_a_failed_connect_is_told_to_all_who_wait_for_it_and_counted_once():
    clusters = Clusters(Settings(ejection_failures=2))
    clusters.put(
        "c", ClusterSection((Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 2)), protocol="h2c")
    )
    cluster = clusters.get("c")
    results = await asyncio.gather(
        *(cluster.acquire(prefer="127.0.0.1:1") for _ in range(10)), return_exceptions=True
    )
    assert {result.reason for result in results} == {"connect_refused"}
    assert cluster.stats() == ClusterStats(0, 0, 0, 0)
    clusters.close()
