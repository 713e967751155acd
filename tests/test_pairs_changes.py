"""Which changes of what is in force end that requests pass by the proxy: those of what they were
decided by, and no others. A real worker, real programs, workloads' real sockets."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import msgspec
import pytest
from bpf_world import needs_bpf
from redirect_world import NODE, OTHER, VIP, World, redirect_world
from support import policy as policies
from support.mesh import mesh_route, service, workload
from support.proxy import get, rule, to
from support.two_nodes import Authority
from test_mesh_kernel import Node
from test_pairs_kernel import FRONT, MATCHES, SHOP, Backend, Counts, change, paired, with_backend

from bpf.settings import Generation
from mesh.model.nodeconfig import (
    ClusterSection,
    Endpoint,
    NodeSection,
    Section,
    Settings,
)
from mesh.model.policyconfig import CidrSection
from mesh.model.section import (
    SETTINGS_KEY,
    SectionKey,
    cidr_key,
    cluster_key,
    node_key,
    policy_key,
    workload_key,
)

pytestmark = needs_bpf
_ELSEWHERE = "10.244.9.9"
_WEB = cluster_key("Service", "default", "web", 80)
_OTHER = cluster_key("Service", "default", "other", 80)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("changes"), "--pairs") as made:
        yield made


async def in_force(
    here: Node, put: dict[SectionKey, Section], remove: tuple[SectionKey, ...] = ()
) -> None:
    """At the worker, and then as the agent tells the kernel."""
    await change(here, put, remove)
    with contextlib.closing(Generation(here.world.pin)) as generation:
        generation.end_offers(here.proxy.config.made_ns)


def test_what_is_about_others_ends_nothing(world):
    """And the pair that stood by the first configuration ends by what is about it all the same."""
    rules = policies.rule("get", 301, http=policies.http(method="GET"))
    steps: list[tuple[dict[SectionKey, Section], tuple[SectionKey, ...]]] = [
        (workload("new", _ELSEWHERE, "front", node="far", identity=400), ()),
        (workload("new", _ELSEWHERE, "front", node="far", identity=401), ()),
        (policies.policy("new", _ELSEWHERE, 400, ingress=policies.closed(rules)), ()),
        ({_OTHER: ClusterSection((Endpoint(_ELSEWHERE, 80, "new"),))}, ()),
        ({_OTHER: ClusterSection()}, (workload_key("front", "new"), policy_key("shop", "new"))),
        ({}, (_OTHER,)),
        ({}, ()),
    ]

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            for number, (put, remove) in enumerate(steps, 1):
                await in_force(here, put, remove)
                assert (await own.ask(get("/a", "web"))).body == b"/a"
                assert counts.since == (number, number, 0)
            await in_force(here, mesh_route("r", rule(to("web", weight=0))))
            assert (await own.ask(get("/a", "web"))).status == 500
            assert counts.since == (len(steps), len(steps), 0)

    with_backend(world, test)


def changes(port: int) -> dict[str, tuple[dict[SectionKey, Section], tuple[SectionKey, ...]]]:
    """Each of what requests from client to web-0 are decided by."""
    client = workload(
        "client", OTHER, "front", local=True, node="n", identity=301, labels={"a": "b"}
    )
    web = workload("web-0", NODE, "shop", local=True, node="n", identity=300, labels={"a": "b"})
    asked = policies.closed(policies.rule("get", 301, http=policies.http(method="GET")))
    everybody = policies.closed(policies.rule("all", 300))
    authority = Authority("cluster.local")
    endpoint = Endpoint(NODE, port, "web-0")
    return {
        "client": (client, ()),
        "another with the client's address": (workload("x", OTHER, "front", identity=301), ()),
        "endpoint": (web, ()),
        "another with the endpoint's address": (workload("x", NODE, "shop", identity=300), ()),
        "policy of the endpoint": (policies.policy("web-0", NODE, 300, ingress=asked), ()),
        "policy of the client": (policies.policy("client", OTHER, 301, egress=everybody), ()),
        "endpoints": ({_WEB: ClusterSection((endpoint,), max_pending=7)}, ()),
        "route": (mesh_route("r", rule(to("web"), matches=MATCHES[:1])) | mesh_route("q"), ()),
        "service": (service("web", VIP, port=81, producers=True), ()),
        "settings": ({SETTINGS_KEY: Settings(http_in_kernel=True, max_headers=99)}, ()),
        "node": ({node_key("far"): NodeSection("far", ("10.0.0.9",))}, ()),
        "range": ({cidr_key("10.9.0.0/16"): CidrSection("10.9.0.0/16", 1 << 31)}, ()),
        "identities": (authority.svid(FRONT) | authority.svid(SHOP) | authority.bundle(), ()),
    }


@pytest.mark.parametrize("which", changes(1))
def test_what_is_about_a_pair_ends_it(world, which):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)
            await in_force(here, *changes(here.own_port)[which])  # type: ignore[attr-defined]
            await own.ask(get("/a", "web"))
            assert counts.since == (1, 1, 0)

    with_backend(world, test)


def test_an_agent_that_comes_after_another_ends_nothing(world):
    """It sends the whole, and nothing of it is another."""

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            here.proxy.config = msgspec.structs.replace(
                here.proxy.config, made_ns=time.monotonic_ns()
            )
            await here.proxy.connect()
            with contextlib.closing(Generation(world.pin)) as generation:
                generation.end_offers(here.proxy.config.made_ns)
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)

    with_backend(world, test)


def test_what_pods_nobody_has_told_of_may_do_ends_their_pairs(world):
    """They are judged by what stands at the address that no pod has."""

    async def test(here: Node, backend: Backend) -> None:
        await in_force(here, {}, (workload_key("front", "client"),))
        async with paired(world) as own:
            counts = Counts(world)
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)
            unknown = policies.policy("", "::", 2, egress=policies.closed(), namespace="")
            await in_force(here, unknown)
            assert (await own.ask(get("/a", "web"))).status == 403
            assert counts.since == (1, 1, 0)

    with_backend(world, test)
