"""Supervisor, agent and real workers under traffic: what a client notices of changes and deaths."""

import asyncio
import contextlib
import os
import signal
import subprocess
from contextlib import asynccontextmanager

import pytest

from tests.support.running import free_port, gateway, route, running, service

WAIT_S = 20
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Client:
    """One keep-alive connection that asks again and again until told to stop."""

    def __init__(self):
        self.stopping = False
        self.answered = 0
        self.statuses = set()

    async def connect(self, port):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port)
        await self.ask("/")

    async def ask(self, path):
        self.writer.write(f"GET {path} HTTP/1.1\r\nhost: h\r\n\r\n".encode())
        async with asyncio.timeout(WAIT_S):
            head = await self.reader.readuntil(b"\r\n\r\n")
            fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:-2])
            await self.reader.readexactly(int(fields[b"content-length"]))
        status = int(head.split()[1])
        self.statuses.add(status)
        self.answered += 1
        return status

    async def run(self):
        while not self.stopping:
            await self.ask("/")

    async def more(self):
        """Until a request that was sent after now has been answered."""
        goal = self.answered + 2
        async with asyncio.timeout(WAIT_S):
            while self.answered < goal:
                await asyncio.sleep(0)

    def close(self):
        self.writer.close()


@asynccontextmanager
async def backend(address="127.0.0.1"):
    async def serve(reader, writer):
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, address, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def busy(port, count):
    """Clients that are busy all the time; none may see anything but 200."""
    clients = [Client() for _ in range(count)]
    for client in clients:
        await client.connect(port)
    async with asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(client.run())
        try:
            yield clients
            for client in clients:
                await client.more()
        finally:
            for client in clients:
                client.stopping = True
    assert {status for client in clients for status in client.statuses} == {200}
    for client in clients:
        client.close()


@pytest.fixture
def manifests(tmp_path):
    path = tmp_path / "manifests"
    path.mkdir()
    return path


@asynccontextmanager
async def weft(tmp_path, manifests, workers):
    """The gateway with a route to a backend, and its port."""
    port = free_port()
    async with backend() as target:
        (manifests / "gateway.yaml").write_text(gateway(port))
        (manifests / "route.yaml").write_text(f"{route('r')}\n---\n{service(target=target)}")
        options = (f"--manifests={manifests}", f"--workers={workers}", "--admin=off")
        with running(tmp_path / "run", *options, "--drain-timeout=5", stub=False) as instance:
            await asyncio.to_thread(instance.await_status, is_healthy)
            yield instance, port
            assert await asyncio.to_thread(instance.stop) == 0


def is_healthy(status):
    version = status["config"]["version"]
    whole = len(status["workers"]) == status["expectedWorkers"]
    return (
        status["ready"]
        and not status["degraded"]
        and whole
        and all(worker["version"] == version for worker in status["workers"])
    )


async def await_status(path, client, wanted):
    async with asyncio.timeout(WAIT_S):
        while await client.ask(path) != wanted:
            pass


async def test_changes_and_the_death_of_the_agent_go_unnoticed(tmp_path, manifests):
    async with (
        weft(tmp_path, manifests, 2) as (instance, port),
        busy(port, 8) as clients,
    ):
        prober = Client()
        await prober.connect(port)
        for number in range(5):
            more = route(f"r{number}", path=f"/r{number}", service="none")
            (manifests / f"r{number}.yaml").write_text(more)
            await await_status(f"/r{number}", prober, 500)
        before = instance.ask("/status")
        os.kill(before["agent"]["pid"], signal.SIGKILL)
        for client in clients:
            await client.more()
        (manifests / "r1.yaml").write_text("[")
        (manifests / "r0.yaml").unlink()
        await await_status("/r0", prober, 200)
        # What is broken meanwhile stays in force.
        assert await prober.ask("/r1") == 500
        after = await asyncio.to_thread(instance.await_status, is_healthy)
        assert after["agent"] != before["agent"]
        assert after["workers"] != []
        assert [w["pid"] for w in after["workers"]] == [w["pid"] for w in before["workers"]]
        prober.close()


async def test_the_death_of_a_worker_costs_only_its_own_connections(tmp_path, manifests):
    async with weft(tmp_path, manifests, 2) as (instance, port):
        victim, survivor = (worker["pid"] for worker in instance.ask("/status")["workers"])
        os.kill(victim, signal.SIGSTOP)
        clients = busy(port, 4)
        others = await clients.__aenter__()
        os.kill(survivor, signal.SIGSTOP)
        os.kill(victim, signal.SIGCONT)
        unlucky = Client()
        await unlucky.connect(port)
        os.kill(survivor, signal.SIGCONT)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await unlucky.ask("/")
        unlucky.close()
        for client in others:
            await client.more()
        status = await asyncio.to_thread(
            instance.await_status,
            lambda status: is_healthy(status) and victim not in pids(status),
        )
        assert survivor in pids(status)
        await clients.__aexit__(None, None, None)


def fill(disk):
    with open(disk / "fill", "ab", 0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
async def test_a_full_disk_under_the_run_directory_stops_nothing(tmp_path, manifests):
    disk = tmp_path / "run"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    try:
        async with weft(tmp_path, manifests, 2) as (instance, port):
            fill(disk)
            victim = instance.ask("/status")["workers"][0]["pid"]
            os.kill(victim, signal.SIGKILL)

            def is_whole(status):
                return len(status["workers"]) == 2 and victim not in pids(status)

            status = await asyncio.to_thread(instance.await_status, is_whole)
            fill(disk)  # the files of the one that was killed have gone
            (told,) = instance.ask("/status")["degraded"]
            assert told.startswith(f"the disk under {disk} is full")
            async with busy(port, 8):
                pass
            assert pids(instance.ask("/status")) == pids(status)
            prober = Client()
            await prober.connect(port)
            (manifests / "more.yaml").write_text(route("more", path="/more", service="none"))
            await await_status("/more", prober, 500)
            prober.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def pids(status):
    return {worker["pid"] for worker in status["workers"]}


async def test_a_stop_lets_the_request_finish_and_takes_no_new_ones(tmp_path, manifests):
    async with weft(tmp_path, manifests, 1) as (instance, port):
        client = Client()
        await client.connect(port)
        client.writer.write(b"GET / HTTP/1.1\r\nho")  # half a head: a request has begun
        instance.process.terminate()
        await asyncio.to_thread(instance.await_line, "draining")
        async with asyncio.timeout(WAIT_S):
            while await is_open(port):
                pass
        client.writer.write(b"st: h\r\n\r\n")
        assert (await client.reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200 ")
        await asyncio.to_thread(instance.process.wait, WAIT_S)
        client.close()


async def is_open(port):
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return False
    writer.close()
    return True
