"""Requests that pass by the proxy where the kernel's maps have no room: nothing fails, what does
not pass goes through the proxy, and counters say so."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from bpf_world import needs_bpf
from redirect_world import World, redirect_world
from support.mesh import mesh_route
from support.proxy import get, rule, to
from test_mesh_kernel import Node
from test_pairs_kernel import Backend, Counts, change, paired, with_backend

from bpf import maps, pins, syscall
from bpf.constants import PAIR_WAYS
from bpf.passed import Leftovers
from bpf.reasons import Reason
from bpf.structs import Exchange, Number
from mesh.agent import passed as agent_passed
from mesh.agent.flow_peers import Peers
from mesh.agent.flows import FlowStore
from mesh.model.routeconfig import PathMatch, RouteMatch

pytestmark = needs_bpf
# Cookies of sockets that were never there.
_NOBODY = 1 << 62


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("full"), "--pairs") as made:
        yield made


def fill(world: World, name: str, *, per_cpu: bool = False) -> list[bytes]:
    """Until there is no room; the keys. As killed workers might leave it."""
    spec = maps.MAPS[name]
    assert spec.key is not None
    assert spec.value is not None
    value = bytes(spec.value.size * (maps.possible_cpus() if per_cpu else 1))
    fd = maps.open_pinned(world.pin, name)
    keys = []
    try:
        for number in itertools.count(_NOBODY):
            key = number.to_bytes(8, "little").ljust(spec.key.size, b"\0")
            try:
                syscall.update(fd, key, value)
            except OSError as error:
                if error.errno == errno.E2BIG:
                    return keys
                if error.errno != errno.ENOMEM:
                    raise
                time.sleep(0.001)  # the kernel gets more of it meanwhile
            else:
                keys.append(key)
    finally:
        os.close(fd)
    raise AssertionError


def refused(here: Node) -> float:
    return here.proxy.metrics().get("weft_http_pairs_refused_total", 0)


def swept(world: World) -> None:
    """As the agent does it."""
    with contextlib.closing(Leftovers(world.pin)) as leftovers:
        leftovers.sweep()
        leftovers.sweep()


def test_a_client_that_is_idle_while_very_many_others_begin_passes_on(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            fill(world, "exchanges")
            counts = Counts(world)
            for _ in range(3):
                assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (3, 3, 0)
        swept(world)

    with_backend(world, test)


@pytest.mark.parametrize("name", ["exchanges", "pairs", "paired"])
def test_where_a_map_is_full_the_proxy_serves_and_counts_it(world, name):
    """Until it is swept."""

    async def test(here: Node, backend: Backend) -> None:
        fill(world, name)
        counts = Counts(world)
        async with paired(world, first=False) as own:
            for target in ("/a", "/b", "/a"):
                assert (await own.ask(get(target, "web"))).body == target.encode()
            assert counts.since == (0, 0, 0)
            async with asyncio.timeout(5):
                while refused(here) < 3:
                    await asyncio.sleep(0.01)
            swept(world)
            await own.pair()
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)

    with_backend(world, test)


def test_a_connection_of_which_nothing_is_known_any_more_is_closed_without_a_word(world):
    async def test(here: Node, backend: Backend) -> None:
        exchanges = maps.PinnedMap(world.pin, "exchanges", Number, Exchange)
        with contextlib.closing(exchanges):
            async with paired(world) as own:
                exchanges.remove(Number(own.cookie))
                assert await own.ended()  # it looks now and then
            async with paired(world) as own:
                own.writer.write(get("/slow", "web").encode())
                await backend.reached.wait()
                exchanges.remove(Number(own.cookie))
                backend.go_on.set()
                assert await own.ended()
            async with paired(world) as own:
                assert (await own.ask(get("/a", "web"))).body == b"/a"

    with_backend(world, test)


def test_requests_that_there_is_no_room_to_count_pass_and_are_told_of(world):
    async def test(here: Node, backend: Backend) -> None:
        keys = fill(world, "passed", per_cpu=True)
        try:
            async with paired(world) as own:
                counts, before = Counts(world), world.counted(Reason.PAIR_UNCOUNTED)
                for _ in range(3):
                    assert (await own.ask(get("/a", "web"))).body == b"/a"
                assert counts.since == (3, 3, 0)
                assert world.counted(Reason.PAIR_UNCOUNTED) == before + 3
        finally:
            fd = maps.open_pinned(world.pin, "passed")
            for key in keys:
                syscall.delete(fd, key)
            os.close(fd)

    with_backend(world, test)


def test_requests_of_which_nobody_could_be_told_are_counted_as_lost_flows(
    world, tmp_path, monkeypatch
):
    """The agent takes others out too seldom."""
    monkeypatch.setattr(agent_passed, "_TAKE_S", 1)

    async def test(here: Node, backend: Backend) -> None:
        store = FlowStore(Peers())
        async with paired(world) as own:
            passed = agent_passed.PassedBy(world.pin, Path(here.proxy.metrics_dir), store, None)
            passed.start()
            before = world.counted(Reason.PAIR_UNTOLD)
            async with asyncio.timeout(30):
                while world.counted(Reason.PAIR_UNTOLD) < before + 5:
                    for _ in range(50):
                        await own.ask(get("/a", "web"))
                untold = world.counted(Reason.PAIR_UNTOLD) - before
                while store.lost["kernel"] < untold:
                    await asyncio.sleep(0.01)
            assert store.lost["kernel"] == untold
            passed.close()

    with_backend(world, test)


def test_an_agent_that_cannot_see_what_passes_holds_nothing_and_tries_again(world, tmp_path):
    async def test(here: Node, backend: Backend) -> None:
        passed = agent_passed.PassedBy(
            world.pin, Path(here.proxy.metrics_dir), FlowStore(Peers()), None
        )
        ring = pins.map_path(world.pin, "passings")
        ring.rename(ring.with_name("away"))
        before = os.listdir("/proc/self/fd")
        passed.start()
        assert os.listdir("/proc/self/fd") == before
        ring.with_name("away").rename(ring)
        passed.start()
        async with paired(world) as own:
            await own.ask(get("/a", "web"))
            async with asyncio.timeout(5):
                while not passed.counted():
                    await asyncio.sleep(0.01)
        passed.close()

    with_backend(world, test)


def test_more_rules_than_ways(world):
    """The newest have theirs, and the others' requests go through the proxy."""
    count = PAIR_WAYS + 8

    async def test(here: Node, backend: Backend) -> None:
        matches = [RouteMatch(PathMatch("PathPrefix", f"/a/{number}")) for number in range(count)]
        rules = [rule(to("web"), matches=(match,)) for match in (*matches, RouteMatch())]
        await change(here, mesh_route("r", *rules[:16]) | mesh_route("r2", *rules[16:32]))
        await change(here, mesh_route("r3", *rules[32:]))
        async with paired(world) as own:

            async def ask(numbers: Iterable[int]) -> int:
                counts = Counts(world)
                for number in numbers:
                    assert (await own.ask(get(f"/a/{number}", "web"))).body == b"/a/%d" % number
                    await own.offered()
                return counts.since[1]

            assert await ask(range(count)) == 0
            assert await ask(range(8, count)) == PAIR_WAYS
            assert await ask(range(8)) == 0
            assert await ask(range(8)) == 8
            assert await ask(range(16, count)) == PAIR_WAYS - 8

    with_backend(world, test)
