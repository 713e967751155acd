"""Relayed connections: bytes, ends, resets, limits, what is told of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import uvloop
from loops import on_both_loops
from support.http1 import raw_backend, reset, shutdown
from support.mesh import CLIENT, MeshProxy, connected, mesh_proxy
from support.running import free_port
from test_mesh_flows import agent_of

from l7proxy.dial import RECEIVE_BUFFER
from mesh.model.flow import Flow, Peer
from mesh.model.nodeconfig import Settings
from mesh.model.section import SETTINGS_KEY

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
MIB = 1024 * 1024
_SO_MEMINFO = 55  # asm-generic/socket.h: SK_MEMINFO_RMEM_ALLOC comes first


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    shutdown(writer)
    await reader.read()


@asynccontextmanager
async def relayed(
    answer: Answer = echo, settings: Settings | None = None
) -> AsyncIterator[tuple[MeshProxy, int, int]]:
    """A relay port whose clients reach this backend: proxy, port, the backend's port."""
    async with mesh_proxy() as mesh, raw_backend(answer) as backend:
        mesh.origins.steer(asked=("10.96.0.9", 5432), backend=("127.0.0.1", backend))
        port = mesh.serve({SETTINGS_KEY: settings or Settings()}, kind="relay")
        yield mesh, port, backend


@on_both_loops
async def test_bytes_pass_both_ways_and_ends_one_by_one():
    async with relayed() as (mesh, port, backend), agent_of(mesh) as agent:
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
        (flow,) = await agent.records(1)
        assert flow == Flow(
            flow.time, "FORWARDED", Peer(CLIENT, own), Peer("127.0.0.1", backend),
            bytes_in=len(data), bytes_out=len(data),
        )  # fmt: skip
        assert mesh.proxy._admission.total == 0


@on_both_loops
async def test_a_backend_may_end_first_and_still_be_sent_to():
    received = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"first word")
        await writer.drain()
        shutdown(writer)
        received.set_result(await reader.read(-1))

    async with relayed(answer) as (_, port, _), connected(port) as (reader, writer):
        assert await reader.read(-1) == b"first word"
        writer.write(b"last word")
        await writer.drain()
        shutdown(writer)
        assert await received == b"last word"


@on_both_loops
async def test_a_client_that_does_not_read_holds_the_backend_back():
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

    async with relayed(answer) as (_, port, _), connected(port, limit=65536) as (reader, writer):
        await stuck.wait()
        assert sent < 32 * MIB  # the kernel's buffers and a little of ours
        total = 0
        while data := await reader.read(MIB):
            total += len(data)
        assert total == 64 * MIB
        writer.close()


@on_both_loops
@pytest.mark.parametrize("reads", ["client", "backend"])
async def test_what_has_not_been_read_is_bounded(reads):
    """However fast the reader was before it stopped, which is what the kernel makes room for."""
    gate = asyncio.Event()

    async def pump(writer: asyncio.StreamWriter) -> None:
        writer.transport.set_write_buffer_limits(0)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while True:
                writer.write(bytes(MIB))
                async with asyncio.timeout(0.5):  # what nobody takes never ends by itself
                    await writer.drain()
        gate.set()

    async def read(reader: asyncio.StreamReader) -> None:
        for _ in range(64):
            await reader.readexactly(MIB)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await (read(reader) if reads == "backend" else pump(writer))
        await asyncio.Event().wait()

    async with relayed(answer) as (_, port, backend), connected(port) as (reader, writer):
        await (read(reader) if reads == "client" else pump(writer))
        await gate.wait()
        held = [unread(fd) for fd in sockets_of_proxy(port, backend)]
        assert len(held) == 2
        assert sum(held) > 0
        assert max(held) <= 2 * RECEIVE_BUFFER + 65536 * 2  # and a piece more
        writer.transport.abort()


def sockets_of_proxy(port: int, backend: int) -> Iterator[int]:
    """The descriptors of its connections, which are this process's too."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(FileNotFoundError):
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            if sock.family != socket.AF_INET:
                continue
            if backend == sock.getpeername()[1] or port == sock.getsockname()[1]:
                yield fd


def unread(fd: int) -> int:
    """The memory that a socket is charged for."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        memory = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4)
        return int.from_bytes(memory, sys.byteorder)


@on_both_loops
async def test_resets_are_passed_on_as_resets():
    backend_saw = asyncio.get_running_loop().create_future()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        command = await reader.readline()
        if command == b"reset\n":
            writer.write(b"half of an answ")
            await writer.drain()
            await reader.readline()
            reset(writer)
            return
        try:
            backend_saw.set_result(await reader.read(-1))
        except ConnectionResetError as error:
            backend_saw.set_result(error)

    async with relayed(answer) as (mesh, port, _), agent_of(mesh) as agent:
        async with connected(port) as (reader, writer):
            writer.write(b"reset\n")
            assert await reader.readexactly(15) == b"half of an answ"
            writer.write(b"now\n")
            with pytest.raises(ConnectionResetError):
                await reader.read(-1)
        async with connected(port) as (_, writer):
            writer.write(b"wait\n")
            while not writer.is_closing() and not mesh.proxy._admission.total:
                await asyncio.sleep(0)
            await writer.drain()
            reset(writer)
        assert isinstance(await backend_saw, ConnectionResetError)
        flows = await agent.records(2)
        assert [(flow.verdict, flow.reason) for flow in flows] == [
            ("ERROR", "backend_reset"), ("ERROR", "client_reset")
        ]  # fmt: skip


@on_both_loops
async def test_what_cannot_be_connected_to_is_reset():
    async with mesh_proxy() as mesh, agent_of(mesh) as agent:
        mesh.origins.steer("127.0.1.1", backend=("127.0.0.1", free_port()))
        mesh.origins.steer("127.0.1.2")
        port = mesh.serve(kind="relay")
        for client in ("127.0.1.1", "127.0.1.2"):
            with pytest.raises(ConnectionResetError):
                async with connected(port, client) as (reader, _):
                    await reader.read(1)
        flows = await agent.records(2)
        assert [(flow.verdict, flow.reason) for flow in flows] == [
            ("ERROR", "connect_refused"), ("DROPPED", "no_backend")
        ]  # fmt: skip
        assert mesh.proxy._admission.total == 0


@on_both_loops
async def test_limits_count_relayed_connections():
    async with (
        relayed(settings=Settings(max_connections_per_client=1)) as (_, port, _),
        connected(port) as (reader, writer),
        connected(port) as (refused, _),
    ):
        assert await refused.read(1) == b""
        writer.write(b"a")
        assert await reader.read(1) == b"a"


@on_both_loops
async def test_a_drain_lets_them_go_on_until_its_deadline():
    async with relayed() as (mesh, port, _), agent_of(mesh) as agent:
        async with connected(port) as (reader, writer):
            writer.write(b"a")
            assert await reader.read(1) == b"a"
            draining = asyncio.ensure_future(mesh.proxy.drain(0.2))
            await asyncio.sleep(0)
            writer.write(b"b")
            assert await reader.read(1) == b"b"
            assert await draining == 1
            with pytest.raises(ConnectionResetError):
                await reader.read(1)
        (flow,) = await agent.records(1)
        assert (flow.reason, flow.bytes_in, flow.bytes_out) == ("drain_deadline", 2, 2)


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
                    position += step
                    await writer.drain()
                if end == "half close":
                    shutdown(writer)

            sending = asyncio.ensure_future(send())
            if end == "half close":
                assert await reader.read(-1) == data
                await sending
                return
            with contextlib.suppress(asyncio.IncompleteReadError):
                half = await reader.readexactly(len(data) // 2)
                assert half == data[: len(data) // 2]
            sending.cancel()
            if end == "reset":
                reset(writer)

    async with relayed() as (mesh, port, _):
        await asyncio.gather(*(client(port, seed) for seed in range(60)))
        while mesh.proxy._admission.total:  # the last ends are on their way
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_killed_worker_ends_its_connections_by_resets(loop):
    """Both sides had ended nothing: neither may take what it has for the whole."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        read, write = os.pipe()

        async def work() -> None:
            async with mesh_proxy() as mesh:
                mesh.origins.steer(backend=listening.getsockname())
                os.write(write, str(mesh.serve(kind="relay")).encode())
                await asyncio.Event().wait()

        worker = os.fork()
        if not worker:
            try:
                with asyncio.Runner(loop_factory=loop) as runner:
                    runner.run(work())
            finally:
                os._exit(1)
        try:
            port = int(os.read(read, 10))
            client = socket.create_connection(("127.0.0.1", port), 10, source_address=(CLIENT, 0))
            backend, _ = listening.accept()
            with client, backend:
                client.sendall(b"question")
                assert backend.recv(8, socket.MSG_WAITALL) == b"question"
                backend.sendall(b"half of an answ")
                assert client.recv(15, socket.MSG_WAITALL) == b"half of an answ"
                os.kill(worker, signal.SIGKILL)
                for end in (client, backend):
                    with pytest.raises(ConnectionResetError):
                        end.recv(1)
        finally:
            os.close(read)
            os.close(write)
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)


def test_no_descriptor_is_kept():
    before = set(os.listdir("/proc/self/fd"))
    test_many_at_once_with_ends_by_chance(asyncio.new_event_loop)
    assert set(os.listdir("/proc/self/fd")) <= before
