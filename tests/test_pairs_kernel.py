"""Requests that pass by the proxy: a real worker, real programs, workloads' real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from bpf_world import needs_bpf
from redirect_world import NODE, VIP, World, redirect_world
from support.mesh import mesh_route, service, workload
from support.proxy import get, ok, read_message, rule, to
from test_mesh_kernel import Node, client, node, scenario, served

from bpf.automaton import Automata
from bpf.reasons import Reason
from l7proxy.automaton import compile_rules
from l7proxy.automaton_plan import plan
from l7proxy.routing import RouteIndex
from mesh.model.nodeconfig import ClusterSection, Endpoint, EntryBackend, Section, Settings
from mesh.model.routeconfig import RouteSection
from mesh.model.section import SETTINGS_KEY, cluster_key, service_listener

pytestmark = needs_bpf


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("pairs"), "--pairs") as made:
        yield made


async def configure(here: Node, port: int, *more: dict[str, Section], **rest: object) -> None:
    """Service shop/web at VIP:80 with a backend at `port`, its routes in the kernel's tables."""
    here.world.frontend(VIP, 80, http=True, sockmap=True)
    own = EntryBackend(NODE, port, sockmap=True)
    here.world.frontend(NODE, port, own, http=True, sockmap=True)
    endpoints = (Endpoint(NODE, port, "web-0"),)
    put = (
        service("web", VIP, producers=True)
        | mesh_route("r", rule(to("web")))
        | workload("client", NODE, "front", local=True, node="n", identity=300)
        | {cluster_key("Service", "default", "web", 80): ClusterSection(endpoints)}
        | {SETTINGS_KEY: Settings(http_in_kernel=True, **rest)}  # type: ignore[arg-type]
    )
    for one in more:
        put |= one
    tables(here.world, put)
    assert await here.proxy.apply(put) == {}


def tables(world: World, put: dict[str, Section]) -> None:
    routes = RouteIndex()
    for key, section in put.items():
        if isinstance(section, RouteSection):
            routes.put(key, section)
    settings = put[SETTINGS_KEY]
    assert isinstance(settings, Settings)
    with contextlib.closing(Automata(world.pin)) as automata:
        for listener in (service_listener("shop", "web", 80), ""):
            made = plan(listener, routes, (), settings)
            compiled = compile_rules(made.ordered, made.limits, made.generation)
            automata.put(made.generation, compiled.table)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with as many bytes as the target says, or with the request's body."""
    while (message := await read_message(reader)) is not None:
        method, target, _ = message.start.split()
        body = message.body if method == "PUT" else target.encode() * int(target[1:].split("/")[0])
        writer.write(ok(body))
        await writer.drain()


class Counts:
    """What has passed by the proxy since this was made."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._before = self._now()

    def _now(self) -> tuple[int, ...]:
        reasons = (Reason.PAIR_REQUEST, Reason.PAIR_RESPONSE, Reason.PAIR_HANDED)
        return tuple(self._world.counted(one) for one in reasons)

    @property
    def since(self) -> tuple[int, ...]:
        """Requests, responses, responses that were left to the proxy."""
        return tuple(
            now - before for now, before in zip(self._now(), self._before, strict=True)
        )


def test_later_requests_pass_by_the_proxy(world):
    async def test(world: World) -> None:
        async with node(world) as here, served(echo) as port:
            await configure(here, port)
            counts = Counts(world)
            async with client() as (reader, writer):
                for number in range(50):
                    writer.write(get(f"/{number}", "web").encode())
                    message = await read_message(reader)
                    assert message is not None
                    assert message.status == 200
                    assert message.body == f"/{number}".encode() * number
            assert counts.since == (49, 49, 0)

    scenario(world, test)
