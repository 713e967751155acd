"""The torture test, short; and that its comparison sees what it is there to see."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bpf_world import needs_bpf
from lab_world import lab_of, needs_root
from torture.clients import Client, Loss, unexplained
from torture.kills import Kill
from torture.memory import Queues
from torture.programs import Programs, build
from torture.run import QUEUE_BOUND, Goal, torture
from torture.scene import make_scene

from mesh.lab.kernel import create_netns, inside, remove_netns, write_sysctls

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
needs_peers = pytest.mark.skipif(
    not (shutil.which("nginx") and shutil.which("haproxy")), reason="needs nginx and haproxy"
)
pytestmark = needs_gcc

# What a relay makes of the pieces that it read at one time.
Change = Callable[[list[bytes]], list[bytes]]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return build(tmp_path_factory.mktemp("programs"))


def _copy(source: socket.socket, sink: socket.socket, change: Change) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1000):
            pieces = [piece]
            # Enough of one stream for pieces that can be told apart.
            while len(piece) == 1000 and len(pieces) < 4 and (piece := source.recv(1000)):
                pieces.append(piece)
            sink.sendall(b"".join(change(pieces) if len(pieces) == 4 else pieces))
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _relay(port: int, request: Change, response: Change) -> Iterator[int]:
    """Its port; in front of a backend's."""
    threads: list[threading.Thread] = []

    def start(target: Callable[..., None], *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args)
        thread.start()
        threads.append(thread)
        return thread

    def relay(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", port)) as backend:
            there = start(_copy, client, backend, request)
            _copy(backend, client, response)
            there.join()

    def serve(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                start(relay, server.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as server:
        start(serve, server)
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def _backend(programs: Programs, *options: str) -> Iterator[tuple[int, list[str]]]:
    """Its port, and, afterwards, what it said was wrong."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said: list[str] = []
    with subprocess.Popen(
        [programs.backend, *options, str(port)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        while process.poll() is None:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
        yield port, said
        process.terminate()
        said += [line for line in process.stdout if line.startswith("WRONG")]


async def _transfers(programs: Programs, port: int, letters: str) -> Client:
    """A client that has had some."""
    client = Client("here", "here")
    async with asyncio.TaskGroup() as tasks:
        await client.start(tasks, [programs.client, "1", "1", "8", f"127.0.0.1/{port}/{letters}"])
        while client.totals.complete < 100 and not (client.wrong or client.losses):
            await asyncio.sleep(0.05)
        client.stop()
        await client.ended(60)
    return client


def _same(pieces: list[bytes]) -> list[bytes]:
    return pieces


@pytest.mark.parametrize("habit", [[], ["-a"], ["-s"], ["-d"]])
def test_honest_bytes_are_not_called_wrong(programs: Programs, habit: list[str]) -> None:
    with _backend(programs, *habit) as (port, said), _relay(port, _same, _same) as relay:
        client = asyncio.run(_transfers(programs, relay, "dp"))
    assert (client.wrong, client.losses, said) == ([], [], [])
    assert client.totals.complete >= 100
    assert client.totals.broken
    assert (client.totals.by_redirect, client.totals.by_both) == (0, 0)
    assert client.totals.by_tcp


@pytest.mark.parametrize("requests", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda p: [p[0], p[1], p[3]], id="lost"),
        pytest.param(lambda p: [p[0], p[1], p[1], p[2], p[3]], id="repeated"),
        pytest.param(lambda p: [p[0], p[2], p[1], p[3]], id="swapped"),
        pytest.param(lambda p: [p[0], p[1], p[2][:1] + p[2], p[3]], id="one-byte-more"),
        pytest.param(lambda p: [p[0], p[1], bytes([p[2][0] ^ 1]) + p[2][1:], p[3]], id="flipped"),
    ],
)
def test_bytes_that_are_not_as_sent_are_seen(
    programs: Programs, change: Change, requests: bool
) -> None:
    ways = (change, _same) if requests else (_same, change)
    with _backend(programs) as (port, said), _relay(port, *ways) as relay:
        client = asyncio.run(_transfers(programs, relay, ""))
    if requests:
        assert said
        assert client.losses
    else:
        assert client.wrong


def test_only_the_worker_that_was_killed_excuses_a_loss() -> None:
    worker = Kill("a", "weft-worker", before=100, after=110)
    losses = [
        Loss("a", 50, 105, "its connection"),
        Loss("a", 105, 200, "opened while it died, and noticed late"),
        Loss("b", 50, 105, "of the other node"),
        Loss("a", 50, 99, "before"),
        Loss("a", 111, 200, "of the next worker"),
    ]
    kills = [worker, Kill("b", "weft-agent", 40, 60)]
    assert [loss.text for loss in unexplained(losses, kills)] == [
        "of the other node",
        "before",
        "of the next worker",
    ]


@needs_root
def test_receive_queues_are_seen(tmp_path: Path) -> None:
    netns = tmp_path / "netns"
    create_netns(netns)
    try:
        with inside(netns):
            write_sysctls({"net.ipv6.conf.lo.disable_ipv6": 1})
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            server = socket.create_server(("127.0.0.1", 0))
            client = socket.create_connection(server.getsockname())
        queues = Queues({"there": netns})
        assert queues.longest() == (0, "there")
        with server, client, server.accept()[0] as reader:
            client.sendall(bytes(100_000))
            size, where = queues.longest()
            assert where == "there"
            assert 100_000 <= size < 1_000_000
            assert len(reader.recv(100_000, socket.MSG_WAITALL)) == 100_000
            assert queues.longest()[0] == 0
        queues.close()
    finally:
        remove_netns(netns)


@needs_root
@needs_bpf
@needs_peers
def test_torture(programs: Programs, tmp_path: Path) -> None:
    scene = make_scene(programs, tmp_path / "backends", "torture")
    goal = Goal(transfers=2000, seconds=10, limit_s=120, kill_s=2)
    with lab_of(tmp_path, "torture", scene.config) as lab:
        done = lab.up()
        assert done.returncode == 0, done.stderr
        result = asyncio.run(torture(lab, scene, programs, goal, 1, print))
    assert (result.wrong, result.problems) == ([], [])
    assert result.totals.complete >= goal.transfers
    assert result.totals.broken
    assert {kill.process for kill in result.kills} == {"weft-agent", "weft-worker"}
    assert 0 < result.queue <= QUEUE_BOUND
