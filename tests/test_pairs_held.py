"""The backends' connections that are held for clients whose requests pass by the proxy: others may
need them, and they get old. A real worker, real programs, workloads' real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from bpf_world import needs_bpf
from redirect_world import NODE, World, redirect_world
from support.mesh import mesh_route
from support.proxy import get, ok, read_message, rule, to
from test_mesh_kernel import Node, node, scenario, served
from test_pairs_kernel import (
    Backend,
    Counts,
    Paired,
    change,
    configure,
    paired,
    second,
    with_backend,
)

from l7proxy.holdoff import IN_A_ROW
from l7proxy.normalise import HOP_BY_HOP
from mesh.model.nodeconfig import ClusterSection, Endpoint, EntryBackend
from mesh.model.routeconfig import PathMatch, RouteMatch
from mesh.model.section import cluster_key

pytestmark = needs_bpf
# For what would never come.
_PATIENCE_S = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("held"), "--pairs") as made:
        yield made


async def limit(here: Node, connections: int) -> None:
    """The endpoint may have so many."""
    endpoints = (Endpoint(NODE, here.own_port, "web-0"),)  # type: ignore[attr-defined]
    section = ClusterSection(endpoints, max_connections_per_endpoint=connections)
    await change(here, {cluster_key("Service", "default", "web", 80): section})


async def pending(here: Node, requests: int) -> None:
    """So many wait for a connection."""
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            found = here.proxy.metrics().items()
            if requests == sum(value for name, value in found if "upstream_pending" in name):
                return
            await asyncio.sleep(0.01)


async def answered(own: Paired, target: str) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        assert (await own.answer()).body == target.encode()


def test_who_waits_gets_a_connection_that_would_be_held_from_now_on(world):
    async def test(here: Node, backend: Backend) -> None:
        await limit(here, 1)
        async with paired(world, first=False) as own, paired(world, first=False) as other:
            own.writer.write(get("/slow", "web").encode())
            await backend.reached.wait()
            other.writer.write(get("/a", "web").encode())
            await pending(here, 1)
            backend.go_on.set()
            await answered(own, "/slow")
            await answered(other, "/a")

    with_backend(world, test)


def test_who_waits_does_not_wait_for_the_rest_of_another_one_s_request(world):
    async def test(here: Node, backend: Backend) -> None:
        await limit(here, 1)
        async with paired(world) as own, paired(world, first=False) as other:
            own.writer.write(get("/slow", "web").encode())
            await backend.reached.wait()
            own.writer.write(get("/a", "web").encode()[:9])
            await own.offered(stands=False)
            other.writer.write(get("/b", "web").encode())
            await pending(here, 1)
            backend.go_on.set()
            await answered(own, "/slow")
            await answered(other, "/b")
            own.writer.write(get("/a", "web").encode()[9:])
            await answered(own, "/a")

    with_backend(world, test, head_timeout_s=60)


def test_who_waits_does_not_wait_for_what_another_endpoint_answers(world):
    """A client's connection is held while its request, past the proxy, is with another endpoint."""

    async def test(here: Node, backend: Backend) -> None:
        async with second(here) as (slow, put):
            await limit(here, 1)
            paths = [RouteMatch(PathMatch("PathPrefix", one)) for one in ("/slow", "/")]
            rules = (rule(to("second"), matches=paths[:1]), rule(to("web"), matches=paths[1:]))
            await change(here, put | mesh_route("r", *rules))
            slow.go_on.set()
            async with paired(world) as own, paired(world, first=False) as other:
                own.writer.write(get("/slow", "web").encode())
                await answered(own, "/slow")
                await own.offered()
                slow.go_on.clear()
                slow.reached.clear()
                own.writer.write(get("/slow", "web").encode())
                await slow.reached.wait()
                other.writer.write(get("/a", "web").encode())
                await answered(other, "/a")
                slow.go_on.set()
                await answered(own, "/slow")

    with_backend(world, test)


def test_many_clients_and_few_connections(world):
    async def test(here: Node, backend: Backend) -> None:
        await limit(here, 4)

        async def ask(own: Paired, number: int) -> None:
            for turn in range(10):
                own.writer.write(get(f"/a/{number}/{turn}", "web").encode())
                await answered(own, f"/a/{number}/{turn}")

        async with contextlib.AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(paired(world, first=False)) for _ in range(200)
            ]
            async with asyncio.TaskGroup() as group:
                for number, own in enumerate(clients):
                    group.create_task(ask(own, number))
            assert len(backend.targets) == len(set(backend.targets)) == 2000
            # And who comes alone may have its requests pass.
            counts = Counts(world)
            for own in clients:
                for _ in "ab":
                    own.writer.write(get("/b", "web").encode())
                    await answered(own, "/b")
                    await own.offered()
            assert counts.since == (200, 200, 0)

    with_backend(world, test)


class Impatient:
    """A backend that closes what has been idle for as long as with Node.js, httpd and uvicorn."""

    def __init__(self) -> None:
        self.closed = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                async with asyncio.timeout(5):
                    message = await read_message(reader)
            except TimeoutError:
                self.closed += 1
                return
            if message is None:
                return
            writer.write(ok(message.start.split(" ")[1].encode()))


def test_what_is_held_is_not_held_until_its_backend_closes_it(world):
    """Clients pause, or go on with another endpoint."""

    async def run(world: World) -> None:
        backend, other = Impatient(), Impatient()
        async with node(world) as here, served(backend) as port, served(other) as its:
            own_backend = EntryBackend(NODE, its, sockmap=True)
            world.frontend(NODE, its, own_backend, http=True, sockmap=True)
            paths = [RouteMatch(PathMatch("PathPrefix", one)) for one in ("/b", "/")]
            rules = (rule(to("second"), matches=paths[:1]), rule(to("web"), matches=paths[1:]))
            section = ClusterSection((Endpoint(NODE, its, "web-0"),))
            key = cluster_key("Service", "default", "second", 80)
            await configure(here, port, {key: section}, mesh_route("r", *rules))

            async def pauses(seconds: float) -> None:
                async with paired(world) as own:
                    await asyncio.sleep(seconds)
                    own.writer.write(get("/a", "web").encode())
                    await answered(own, "/a")

            async def leaves() -> None:
                async with paired(world) as own:
                    await asyncio.sleep(3)
                    own.writer.write_eof()
                    assert await own.ended()

            async def goes_on() -> None:
                async with paired(world) as own:
                    own.writer.write(get("/b", "web").encode())
                    await answered(own, "/b")
                    for _ in range(60):
                        own.writer.write(get("/a", "web").encode())
                        await answered(own, "/a")
                        await asyncio.sleep(0.1)

            async with asyncio.TaskGroup() as group:
                group.create_task(goes_on())
                group.create_task(leaves())
                for number in range(16):
                    group.create_task(pauses(3.6 + number / 8))
            assert (backend.closed, other.closed) == (0, 0)

    scenario(world, run)


def test_responses_that_cannot_pass_are_not_tried_again_and_again(world):
    """By number of those that came to the proxy after their requests had passed by it."""

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own, paired(world) as other:
            counts = Counts(world)
            for _ in range(IN_A_ROW):  # in a row these are not
                for target in ("/chunked", "/a"):
                    assert (await own.ask(get(target, "web"))).status == 200
                    await own.offered()
            assert counts.since == (2 * IN_A_ROW, IN_A_ROW, IN_A_ROW)
            for _ in range(IN_A_ROW):
                await own.offered()
                assert (await own.ask(get("/chunked", "web"))).body == b"abc"
            for asker in (own, other):
                for _ in range(100):
                    assert (await asker.ask(get("/chunked", "web"))).body == b"abc"
            # The other one's pair stood already.
            assert counts.since == (3 * IN_A_ROW + 1, IN_A_ROW, 2 * IN_A_ROW + 1)
            found = here.proxy.metrics()
            assert [v for k, v in found.items() if k.startswith("weft_http_pairs_paused")] == [1]

    with_backend(world, test)


def test_what_a_backend_says_of_its_connection_does_not_pass(world):
    fields = sorted(HOP_BY_HOP - {b"connection", b"transfer-encoding", b"upgrade"})

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (message := await read_message(reader)) is not None:
            field = message.start.split(" ")[1].removeprefix("/a").removeprefix("/")
            writer.write(ok(b"/first", *((f"{field}: timeout=5",) if field else ())))

    async def run(world: World) -> None:
        async with node(world) as here, served(serve) as port:
            await configure(here, port)
            async with paired(world) as own:
                counts = Counts(world)
                for number, field in enumerate(fields, 1):
                    for name in (field, field.title()):
                        message = await own.ask(get(f"/a/{name.decode()}", "web"))
                        assert field.decode() not in dict(message.headers)
                        await own.pair()
                    assert counts.since[2] == 2 * number

    scenario(world, run)
