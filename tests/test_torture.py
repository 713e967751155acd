"""The torture test, short; and that its comparison sees what it is there to see."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bpf_world import needs_bpf
from lab_world import lab_of, needs_root
from support.running import free_port
from torture.clients import Client, Loss, Totals, unexplained
from torture.kills import Kill
from torture.programs import Programs, build
from torture.run import Goal, torture
from torture.scene import Target, make_scene
from torture.sockets import Sockets
from torture.verdict import QUEUE_BOUND, REDIRECT_BOUND, Evidence, Paths, problems

from bpf.reasons import Reason
from mesh.lab.kernel import create_netns, inside, remove_netns, write_sysctls
from mesh.lab.plan import NETNS_DIR

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
needs_peers = pytest.mark.skipif(
    not (shutil.which("nginx") and shutil.which("haproxy")), reason="needs nginx and haproxy"
)
pytestmark = needs_gcc

# How long a relay waits for more of a stream before it passes on what it has.
_MORE_S = 0.05
# What a relay makes of the pieces that it read at one time.
Change = Callable[[list[bytes]], list[bytes]]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return build(tmp_path_factory.mktemp("programs"))


def _readable(source: socket.socket) -> bool:
    return bool(select.select([source], [], [], _MORE_S)[0])


def _copy(source: socket.socket, sink: socket.socket, change: Change) -> None:
    with contextlib.suppress(OSError):
        while piece := source.recv(1000):
            pieces = [piece]
            # Enough of one stream for pieces that can be told apart, if there is more: the end of a
            # message may lie just here, and then nothing comes before it has been passed on.
            while len(piece) == 1000 and len(pieces) < 4 and _readable(source):
                piece = source.recv(1000)
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
    port = free_port()
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
    client = Client("here", "here", {"127.0.0.1": frozenset({"here"})})
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
    assert (client.totals.by_redirect, client.mixed) == (0, [])
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
    worker = Kill("a", "weft-worker", before=100, after=110, served=120)
    a, b, both = frozenset("a"), frozenset("b"), frozenset("ab")
    losses = [
        Loss("a", b, 50, 105, "its connection"),
        Loss("b", both, 50, 105, "its end of a tunnel"),
        Loss("a", a, 105, 200, "opened while it died, and noticed late"),
        Loss("b", a, 115, 200, "a tunnel that nobody answered"),
        Loss("b", b, 50, 105, "of the other node"),
        Loss("a", b, 50, 99, "before"),
        Loss("a", b, 111, 200, "of the next worker"),
        Loss("b", a, 121, 200, "of the next worker's tunnels"),
    ]
    kills = [worker, Kill("b", "weft-agent", 40, 60)]
    assert [loss.text for loss in unexplained(losses, kills)] == [
        "of the other node",
        "before",
        "of the next worker",
        "of the next worker's tunnels",
    ]


GOOD = Evidence(
    totals=Totals(complete=10, broken=1, by_redirect=5, by_tcp=5),
    said_wrong=[],
    mixed=[],
    losses=[],
    kills=[],
    paths={"r/echo": Paths(3, 3), "r/off": Paths(0, 6)},
    pairs={"r/echo": 10},
    queue=(QUEUE_BOUND, "r/echo"),
    redirect_queue=(REDIRECT_BOUND, "r/echo"),
    counts={
        "a": {**dict.fromkeys(Reason, 0), Reason.REDIRECT_MISSED: 1, Reason.PAIR_REQUEST: 1},
        "b": dict.fromkeys(Reason, 0),
    },
    passing={"a"},
)
TARGETS = (Target("echo/80", ("r/echo",), True), Target("off/80", ("r/off",), False))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"queue": (QUEUE_BOUND + 1, "r/echo")}, "a connection of r/echo was charged for 4096 KiB"),
        (
            {"redirect_queue": (REDIRECT_BOUND + 1, "r/echo")},
            "a connection of r/echo was charged for 4096 KiB that came by redirect",
        ),
        ({"mixed": ["r/c: 5 bytes"]}, "by redirect and by TCP: r/c: 5 bytes"),
        ({"totals": GOOD.totals._replace(by_redirect=0)}, "no client got anything by redirect"),
        ({"totals": GOOD.totals._replace(broken=0)}, "1 redirects missed, and only 0 transfers"),
        ({"paths": {**GOOD.paths, "r/echo": Paths(0, 6)}}, "echo/80 got nothing by redirect"),
        ({"paths": {**GOOD.paths, "r/off": Paths(1, 6)}}, "off/80 is not kept off the fast path"),
        ({"pairs": {"r/echo": 0}}, "the loopback pair of r/echo has not run"),
        (
            {"counts": {**GOOD.counts, "a": {**GOOD.counts["a"], Reason.UNPAIRED: 2}}},
            "node a: UNPAIRED 2: a message of the proxy came before",
        ),
        ({"passing": {"a", "b"}}, "node b: no request has passed by the proxy"),
        ({"totals": GOOD.totals._replace(complete=11)}, "only 1 requests have passed by the proxy"),
    ],
)
def test_what_is_not_as_it_should_be_is_told(change: dict[str, Any], problem: str | None) -> None:
    found = list(problems(GOOD._replace(**change), TARGETS))
    assert len(found) == (problem is not None)
    assert not problem or found[0].startswith(problem)


@needs_root
def test_sockets_are_seen_from_outside() -> None:
    netns = NETNS_DIR / f"weft-torture-test-{os.getpid()}"
    create_netns(netns)
    try:
        with inside(netns):
            write_sysctls({"net.ipv6.conf.lo.disable_ipv6": 1})
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            server = socket.create_server(("127.0.0.1", 0))
            client = socket.create_connection(server.getsockname())
        sockets = Sockets({"there": netns})
        with server, client, server.accept()[0] as reader:
            client.sendall(bytes(100_000))
            seen = {one.port: one for one in sockets.look()}
            here, there = (seen[one.getsockname()[1]] for one in (reader, client))
            assert here.inode == os.fstat(reader.fileno()).st_ino
            assert (here.where, here.sent, here.received) == ("there", 0, 100_000)
            assert 100_000 <= here.queue < 1_000_000
            assert (there.queue, there.received) == (0, 0)
            assert 0 < there.sent <= 100_000  # acknowledgements may be late
            assert not here.redirected
            assert len(reader.recv(100_000, socket.MSG_WAITALL)) == 100_000
            assert {one.queue for one in sockets.look()} == {0}
        sockets.close()
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
        evidence = asyncio.run(torture(lab, scene, programs, goal, 1, print))
    assert (evidence.wrong, list(problems(evidence, scene.targets))) == ([], [])
    assert evidence.totals.complete >= goal.transfers
    assert evidence.totals.broken
    assert {kill.process for kill in evidence.kills} == {"weft-agent", "weft-worker"}
