"""What ends that requests pass by the proxy, each under load: nothing is lost or changed, and
nothing passes afterwards that was not to.

WEFT_STRESS_S: for how long, in seconds (0.4; `make torture` asks for more).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from bpf_world import needs_bpf
from redirect_world import NODE, OTHER, VIP, World, redirect_world
from support import policy as policies
from support.mesh import mesh_route, service
from support.proxy import get, ok, read_message, rule, to
from support.two_nodes import Authority, life
from test_mesh_kernel import Node, node, scenario, served
from test_pairs_kernel import FRONT, SHOP, allowed, change, configure

from bpf.automaton import Automata
from bpf.reasons import Reason
from mesh.model.nodeconfig import ClusterSection, Endpoint, EntryBackend, Settings
from mesh.model.routeconfig import PathMatch, RouteMatch
from mesh.model.section import SETTINGS_KEY, cluster_key, policy_key, route_key, svid_key

pytestmark = needs_bpf
_SECONDS = min(float(os.environ.get("WEFT_STRESS_S", "0.4")), 5)
_CLIENTS = 16
_SIZES = (0, 30, 3_000, 30_000)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("ended"), "--pairs") as made:
        yield made


class Backend:
    """Answers with what it was asked for; remembers that, by the first word of the path."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (message := await read_message(reader)) is not None:
            target = message.start.split(" ")[1]
            self.asked[target.split("/")[1]] += 1
            if len(target) % 3 == 0:
                await asyncio.sleep(0.001)
            writer.write(ok(message.body or target.encode()))
            await writer.drain()


class Load:
    """Clients that ask for /a, now and then /b, one after another, over connections that last.
    `wants` says which status each must have, None: any; so may what was asked before it changed."""

    def __init__(self, **wants: int | None) -> None:
        self.wants = wants
        self.changed_at = 0.0
        self.statuses: Counter[tuple[str, int]] = Counter()
        self.answered = 0
        self.ended = 0  # connections, between two requests
        self.wrong: list[str] = []
        self._over = False

    def changes(self, **wants: int | None) -> None:
        """From now on."""
        self.statuses.clear()
        self.changed_at = time.monotonic()
        self.wants = wants

    async def client(self, number: int) -> None:
        while not self._over:
            try:
                reader, writer = await asyncio.open_connection(VIP, 80, local_addr=(OTHER, 0))
            except OSError:  # nobody listens (any more)
                await asyncio.sleep(0.02)
                continue
            try:
                await self._ask(number, reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                if isinstance(error, asyncio.IncompleteReadError) and error.partial:
                    self.wrong.append(f"cut short: {error.partial[:80]!r}")
                self.ended += 1
            finally:
                writer.transport.abort()

    async def _ask(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        asked = 0
        while not self._over:
            asked += 1
            word = "aaab"[asked % 4]  # after a /b that is refused none is offered
            target = f"/{word}/{number}-{asked}"
            size = _SIZES[asked // 4 % len(_SIZES)]
            body = (f"{target};".encode() * (size // len(target) + 1))[:size]
            began = time.monotonic()
            if size:
                head = f"PUT {target} HTTP/1.1\r\nHost: web\r\nContent-Length: {size}\r\n\r\n"
                writer.write(head.encode())
                await asyncio.sleep(0)
                writer.write(body)
            else:
                writer.write(get(target, "web").encode())
            message = await read_message(reader)
            if message is None:
                self.ended += 1
                return
            if began >= self.changed_at:
                self.statuses[word, message.status] += 1
                if message.status != (self.wants[word] or message.status):
                    self.wrong.append(f"{target}: {message.status}, not {self.wants[word]}")
            if message.status == 200:
                self.answered += 1
                if message.body != (body or target.encode()):
                    self.wrong.append(f"{target}: another's answer: {message.body[:80]!r}")
            if message.header("connection") == "close":
                return

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Before and after what is done in it requests are made."""
        clients = [asyncio.ensure_future(self.client(number)) for number in range(_CLIENTS)]
        await asyncio.sleep(_SECONDS / 2)
        try:
            yield
            await asyncio.sleep(_SECONDS / 2)
        finally:
            self._over = True
            async with asyncio.timeout(10):
                await asyncio.gather(*clients)
        assert not self.wrong, self.wrong[:3]


Test = Callable[[Node, Backend, int], Awaitable[None]]
_BOTH = tuple(RouteMatch(PathMatch("PathPrefix", path)) for path in ("/a", "/b"))


def run(world: World, test: Test) -> None:
    async def with_backend(world: World) -> None:
        backend = Backend()
        async with node(world) as here, served(backend) as port:
            await configure(here, port, mesh_route("r", rule(to("web"), matches=_BOTH)))
            await test(here, backend, port)

    scenario(world, with_backend)


def passed(world: World) -> int:
    return world.counted(Reason.PAIR_REQUEST)


async def pass_again(world: World) -> None:
    """Until requests pass."""
    before = passed(world)
    async with asyncio.timeout(5):
        while passed(world) < before + _CLIENTS:
            await asyncio.sleep(0.01)


async def none_passes(world: World) -> None:
    """From now on."""
    before = passed(world)
    await asyncio.sleep(_SECONDS / 2)
    assert passed(world) == before


def test_a_change_of_routes(world: World) -> None:
    async def test(here: Node, backend: Backend, port: int) -> None:
        load = Load(a=200, b=200)
        async with load.running():
            for _ in range(3):
                await pass_again(world)
                load.changes(a=200, b=None)
                await change(here, mesh_route("r", rule(to("web"), matches=_BOTH[:1])))
                load.changes(a=200, b=404)
                before = backend.asked["b"]
                await pass_again(world)
                # Some were on their way.
                assert backend.asked["b"] - before <= _CLIENTS
                load.changes(a=200, b=None)
                await change(here, mesh_route("r", rule(to("web"), matches=_BOTH)))
                load.changes(a=200, b=200)
        assert not load.ended

    run(world, test)


def test_a_route_that_is_removed(world: World) -> None:
    async def test(here: Node, backend: Backend, port: int) -> None:
        await change(here, mesh_route("r", rule(to("web"), matches=_BOTH[:1])))
        load = Load(a=200, b=404)
        async with load.running():
            await pass_again(world)
            load.changes(a=200, b=None)
            await change(here, service("web", VIP), (route_key("HTTPRoute", "shop", "r"),))
            load.changes(a=200, b=200)
            await pass_again(world)
        assert not load.ended

    run(world, test)


def test_a_policy_that_is_removed_and_one_that_comes(world: World) -> None:
    async def test(here: Node, backend: Backend, port: int) -> None:
        some = policies.rule("a", 301, http=policies.http(path="/a/.*"))
        load = Load(a=200, b=200)
        async with load.running():
            await pass_again(world)
            load.changes(a=200, b=None)
            await change(here, allowed(some))
            load.changes(a=200, b=403)
            before = backend.asked["b"]
            await pass_again(world)
            assert backend.asked["b"] - before <= _CLIENTS
            load.changes(a=200, b=None)
            await change(here, {}, (policy_key("shop", "web-0"),))
            load.changes(a=200, b=200)
            await pass_again(world)
        assert not load.ended

    run(world, test)


def test_a_certificate_that_expires_and_one_that_is_withdrawn(world: World) -> None:
    authority = Authority("cluster.local")

    async def test(here: Node, backend: Backend, port: int) -> None:
        left = _SECONDS / 2 + 3  # requests are to pass before
        until = time.time() + left
        load = Load(a=200, b=200)
        await change(
            here, authority.svid(FRONT) | authority.svid(SHOP, life(left)) | authority.bundle()
        )
        async with load.running():
            await pass_again(world)
            while time.time() < until:
                await asyncio.sleep(0.05)
            await none_passes(world)
            await change(here, authority.svid(SHOP))
            await pass_again(world)
            await change(here, {}, (svid_key(FRONT),))
            await asyncio.sleep(0.2)  # for those that are passing
            await none_passes(world)
        assert not load.ended

    run(world, test)


def test_an_endpoint_that_ends(world: World) -> None:
    """One of two: it gets no request any more, and its last ones are answered."""

    async def test(here: Node, backend: Backend, port: int) -> None:
        other = Backend()
        key = cluster_key("Service", "default", "web", 80)
        load = Load(a=200, b=200)
        async with served(other) as its_port, load.running():
            here.world.frontend(
                NODE, its_port, EntryBackend(NODE, its_port, sockmap=True), http=True, sockmap=True
            )
            await pass_again(world)
            own, its = (Endpoint(NODE, one, "web-0") for one in (port, its_port))
            await change(here, {key: ClusterSection((own, its))})
            await pass_again(world)
            await pass_again(world)
            assert other.asked.total()
            await change(here, {key: ClusterSection((its,))})
            await asyncio.sleep(0.2)  # for those that are passing
            before = backend.asked.total()
            await pass_again(world)
            assert backend.asked.total() == before
        assert not load.ended
        assert backend.asked.total() + other.asked.total() == load.answered

    run(world, test)


def test_the_agent_says_so(world: World) -> None:
    """By a setting; or by taking the tables away, which asks no worker."""

    async def test(here: Node, backend: Backend, port: int) -> None:
        load = Load(a=200, b=200)
        async with load.running():
            await pass_again(world)
            await change(here, {SETTINGS_KEY: Settings()})
            await asyncio.sleep(0.2)  # for those that are passing
            await none_passes(world)
            await change(here, {SETTINGS_KEY: Settings(http_in_kernel=True)})
        async with Load(a=200, b=200).running():
            await pass_again(world)
            with contextlib.closing(Automata(world.pin)) as automata:
                for generation in automata.generations():
                    automata.remove(generation)
            await asyncio.sleep(0.05)  # for those that are passing
            await none_passes(world)
        assert not load.ended

    run(world, test)


def test_an_upgrade(world: World) -> None:
    """The worker drains: every request that has reached the backend is answered, once."""

    async def test(here: Node, backend: Backend, port: int) -> None:
        load = Load(a=200, b=200)
        async with load.running():
            await pass_again(world)
            here.proxy.drain(5)
            async with asyncio.timeout(10):
                await here.proxy.process.wait()
            await none_passes(world)
        assert backend.asked.total() == load.answered

    run(world, test)
