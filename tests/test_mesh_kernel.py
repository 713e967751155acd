"""A real worker on the real redirect path: what it is told by the kernel, and what the kernel does
with what it sends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from bpf_world import needs_bpf
from redirect_world import NODE, VIP, World, redirect_world
from support.mesh import mesh_route, service, workload
from support.proxy import WorkerProcess, get, ok, read_message, rule, to

from bpf import settings
from bpf.proxy import HANDLES, PAIR_HANDLES, descriptors
from bpf.reasons import Reason
from l7proxy.redirect import LONG, MOST
from mesh.model.channel import Handles, Listen, PortAddress, send_control
from mesh.model.nodeconfig import (
    MESH_HTTP_PORT,
    MESH_RELAY_PORT,
    ClusterSection,
    Endpoint,
    EntryBackend,
    MeshPort,
    Settings,
)
from mesh.model.section import SETTINGS_KEY, cluster_key, port_key

pytestmark = needs_bpf
MIB = 1024 * 1024
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("mesh")) as made:
        yield made


class Node:
    """A worker in the proxy's cgroup, configured; backends and clients are workloads."""

    def __init__(self, world: World, proxy: WorkerProcess) -> None:
        self.world = world
        self.proxy = proxy

    async def serve(self, port: int, *, sockmap: bool = True, **rest: object) -> None:
        """Service shop/web at VIP:80 with this backend, and routes of its own."""
        self.world.frontend(VIP, 80, http=True, sockmap=sockmap)
        own = EntryBackend(NODE, port, sockmap=sockmap)
        self.world.frontend(NODE, port, own, http=True, sockmap=sockmap)
        endpoints = (Endpoint(NODE, port, "web-0"),)
        put = (
            service("web", VIP, producers=True)
            | mesh_route("r", rule(to("web")), client_headers=True)
            | workload("client", NODE, "front", spiffe_id="spiffe://cluster.local/ns/front/sa/x")
            | {cluster_key("Service", "default", "web", 80): ClusterSection(endpoints)}
            | {SETTINGS_KEY: Settings(**rest)}  # type: ignore[arg-type]
        )
        assert await self.proxy.apply(put) == {}


def hand_over(world: World, proxy: WorkerProcess) -> None:
    """The kernel's handles, to the worker."""
    handles = descriptors(world.pin)
    send_control(proxy.control, Handles(tuple(handles)), tuple(handles.values()))
    for fd in handles.values():
        os.close(fd)


@contextlib.asynccontextmanager
async def node(world: World) -> AsyncIterator[Node]:
    ports = ((NODE, MESH_HTTP_PORT), (NODE, MESH_RELAY_PORT))
    settings.steer_to_proxy(world.pin, ports, sockmap=True)
    proxy = WorkerProcess()
    with world.as_proxy():
        await proxy.start()
        for port, kind in ((MESH_HTTP_PORT, "http"), (MESH_RELAY_PORT, "relay")):
            with world.listen(NODE, port) as server:
                bound = PortAddress(NODE, port)
                send_control(proxy.control, Listen(bound), (server.fileno(),))
            section = MeshPort(NODE, port, kind)  # type: ignore[arg-type]
            assert await proxy.apply({port_key(NODE, port): section}) == {}
    hand_over(world, proxy)
    try:
        yield Node(world, proxy)
    finally:
        await proxy.stop()


@contextlib.asynccontextmanager
async def served(serve: Serve, **options: int) -> AsyncIterator[int]:
    """A workload's server; its port."""
    sock = socket.create_server((NODE, 0), backlog=128)
    for name, value in options.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, sock=sock)
    try:
        yield sock.getsockname()[1]
    finally:
        server.close()


@contextlib.asynccontextmanager
async def client(
    address: str = VIP, port: int = 80
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(address, port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def scenario(world: World, test: Callable[[World], Awaitable[None]]) -> None:
    async def limited(world: World) -> None:
        async with asyncio.timeout(60 + float(os.environ.get("WEFT_STRESS_S", "0"))):
            await test(world)

    world.run(lambda world: asyncio.run(limited(world)))


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the request's body, or with what the request's target says: so many bytes."""
    while (message := await read_message(reader)) is not None:
        method, target, _ = message.start.split()
        body = message.body if method == "PUT" else bytes(int(target[1:]))
        told = message.header("x-forwarded-client-cert") or ""
        writer.write(ok(body, f"x-told: {told}"))
        await writer.drain()


def test_a_workload_is_answered_by_redirect_on_both_hops(world):
    async def test(world: World) -> None:
        async with node(world) as here, served(echo) as port:
            await here.serve(port)
            before = {one: world.counted(one) for one in (Reason.ENROLLED, Reason.UNPAIRED)}
            chance = random.Random(1)
            async with client() as (reader, writer):
                for size in (0, 1, 1000, 70_000, MIB, 5 * MIB):
                    data = chance.randbytes(size)
                    writer.write(
                        b"PUT / HTTP/1.1\r\nhost: web\r\ncontent-length: %d\r\n\r\n" % size
                    )
                    writer.write(data)
                    message = await read_message(reader)
                    assert message is not None
                    assert message.body == data
                    assert message.header("x-told") == ("URI=spiffe://cluster.local/ns/front/sa/x")
            # The client's end and the backend's.
            assert world.counted(Reason.ENROLLED) == before[Reason.ENROLLED] + 2
            assert world.counted(Reason.UNPAIRED) == before[Reason.UNPAIRED]
            flows = (await here.proxy.flows()).records
            assert {flow.service for flow in flows} == {"shop/web:80"}

    scenario(world, test)


def test_memory_of_a_client_that_does_not_read_is_bounded(world):
    async def test(world: World) -> None:
        async with node(world) as here, served(echo) as port:
            await here.serve(port)
            handles = world.handles()
            loop = asyncio.get_running_loop()
            with socket.socket() as own:
                own.setblocking(False)
                await loop.sock_connect(own, (VIP, 80))
                cookie = int.from_bytes(own.getsockopt(socket.SOL_SOCKET, 57, 8), "little")
                await loop.sock_sendall(own, get(f"/{64 * MIB}", "web").encode())
                # Until it moves no more: the worker then only looks.
                most, still = 0, 0
                while still < 50:
                    await asyncio.sleep(0.01)
                    now = handles.queued(cookie)
                    still = still + 1 if now == most and now else 0
                    most = max(most, now)
                assert LONG < most < 2 * MOST
                received = 0
                while received < 64 * MIB:
                    data = await loop.sock_recv(own, MIB)
                    assert data
                    received += len(data)
                    assert handles.queued(cookie) < 2 * MOST

    scenario(world, test)


def test_a_client_that_never_reads_is_cut_off(world):
    async def test(world: World) -> None:
        async with node(world) as here, served(echo) as port:
            await here.serve(port, body_timeout_s=0.3)
            loop = asyncio.get_running_loop()
            with socket.socket() as own:
                own.setblocking(False)
                await loop.sock_connect(own, (VIP, 80))
                await loop.sock_sendall(own, get(f"/{64 * MIB}", "web").encode())
                refused = 'weft_downstream_refused_total{reason="write_timeout"}'
                await here.proxy.metric(refused, lambda value: value == 1)
                received = 0
                with contextlib.suppress(ConnectionResetError):
                    while data := await loop.sock_recv(own, MIB):
                        received += len(data)
                assert received < 2 * MOST

    scenario(world, test)


def test_clients_that_go_in_the_middle_cost_nobody_else(world):
    """The worker's writes then fail in the kernel: it may say nothing unexpected (`stop`)."""

    async def test(world: World) -> None:
        async with node(world) as here, served(echo) as port:
            await here.serve(port)

            async def one(number: int) -> None:
                async with client() as (reader, writer):
                    writer.write(get(f"/{MIB}", "web").encode() * 3)
                    await reader.readexactly(number * 1000)

            await asyncio.gather(*(one(number) for number in range(40)))
            async with client() as (reader, writer):
                writer.write(get("/10", "web").encode())
                message = await read_message(reader)
                assert message is not None
                assert message.body == bytes(10)

    scenario(world, test)


def test_a_backend_that_shows_itself_late_is_reached_by_tcp(world):
    async def test(world: World) -> None:
        async with node(world) as here, served(echo, TCP_DEFER_ACCEPT=5) as port:
            await here.serve(port)
            async with client() as (reader, writer):
                for _ in range(2):
                    writer.write(get("/10", "web").encode())
                    message = await read_message(reader)
                    assert message is not None
                    assert (message.status, message.body) == (200, bytes(10))
            assert here.proxy.metrics()["weft_upstream_plain_total"] == 1

    scenario(world, test)


def test_a_pod_asked_for_by_its_address(world):
    async def test(world: World) -> None:
        async with node(world) as here, served(echo) as port:
            await here.serve(port)
            async with client(NODE, port) as (reader, writer):
                writer.write(get("/10", "pod").encode())
                message = await read_message(reader)
                assert message is not None
                assert (message.status, message.body) == (200, bytes(10))
                assert message.header("x-told") == ""

    scenario(world, test)


def test_handles_are_replaced_and_let_go_after_their_last_connection(world):
    async def test(world: World) -> None:
        async with node(world) as here, served(echo) as port:
            await here.serve(port)

            def held() -> int:
                """Descriptors of maps and programs that the worker has."""
                files = f"/proc/{here.proxy.process.pid}/fd"
                count = 0
                for name in os.listdir(files):
                    with contextlib.suppress(OSError):
                        count += "bpf" in os.readlink(f"{files}/{name}")
                return count

            async with client() as (reader, writer):
                writer.write(get("/1", "web").encode())
                await read_message(reader)
                assert held() == len(HANDLES + PAIR_HANDLES)
                hand_over(world, here.proxy)
                writer.write(get(f"/{MIB}", "web").encode())
                message = await read_message(reader)
                assert message is not None
                assert len(message.body) == MIB
                assert held() == 2 * len(HANDLES + PAIR_HANDLES)
            # Connections to backends stay for some seconds.
            while held() != len(HANDLES + PAIR_HANDLES):
                hand_over(world, here.proxy)
                await asyncio.sleep(0.2)

    scenario(world, test)


def test_a_stranger_on_the_mesh_ports_is_closed(world):
    async def test(world: World) -> None:
        async with node(world), client(NODE, MESH_HTTP_PORT) as (reader, writer):
            writer.write(get("/", "web").encode())
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""

    scenario(world, test)


def test_relayed_connections(world):
    async def mirror(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(100_000))
        await writer.drain()

    async def test(world: World) -> None:
        async with node(world), served(mirror) as port:
            world.frontend(VIP, 5432, EntryBackend(NODE, port, remote=True))
            data = random.Random(2).randbytes(100_000)
            async with client(VIP, 5432) as (reader, writer):
                writer.write(data)
                assert await reader.read(-1) == data

    scenario(world, test)
