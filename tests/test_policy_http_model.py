"""Generated HTTP rules and requests: what the real proxy lets pass is what the plain model of the
documentation says (tests/policy_model.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any, NamedTuple

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from policy_model import Manifest, Pod, World
from support.mesh import CLIENT, MeshProxy, connected, mesh_proxy, service
from support.proxy import Backend, backend, cluster, get, read_message

from gateway.control import Options
from l7proxy import lanes
from tests.gateway_world import World as ControlWorld

ME = Pod("shop", "client", CLIENT, {"app": "client"})
WEB = Pod("shop", "web", "127.0.0.1", {"app": "web"})
MESH = Options(node="n1", mesh_addresses=("127.0.0.1",))

PODS = "\n---\n".join(
    yaml.safe_dump(
        {
            "kind": "Pod",
            "metadata": {"name": pod.name, "namespace": pod.namespace, "labels": dict(pod.labels)},
            "spec": {"nodeName": "n1"},
            "status": {"podIP": pod.address},
        }
    )
    for pod in (ME, WEB)
)

PATHS = ["/", "/public", "/public/a", "/admin", "/a.b", "/axb"]
RULES = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["GET", "GET|HEAD", "P.*", "get"]),
        "path": st.sampled_from(
            ["/public", "/public.*", "/a.b", r"/a\.b", "/public$", "/|/admin", ""]
        ),
        "host": st.sampled_from(["web", "w.*", r"web\.shop", ".+shop"]),
        "headers": st.lists(st.sampled_from(["X-A: 1", "x-a", "X-B: 2"]), max_size=2),
        "headerMatches": st.lists(
            st.sampled_from(
                [
                    {"name": "x-a", "value": "1"},
                    {"name": "X-B", "value": "2", "mismatch": "LOG"},
                    {"name": "x-b"},
                    {"name": "x-a", "value": "1", "mismatch": "REPLACE"},
                ]
            ),
            max_size=1,
        ),
    },
)
REQUESTS = st.tuples(
    st.sampled_from(["GET", "POST", "PUT", "DELETE"]),
    st.sampled_from(["web", "web.shop", "shop"]),
    st.sampled_from(PATHS),
    st.lists(st.sampled_from([("x-a", "1"), ("x-a", "2"), ("X-B", "2"), ("x-a", "")]), max_size=2),
)  # fmt: skip


@st.composite
def policies(draw: Any) -> list[Manifest]:
    """`PORT` stands for the port of the backend."""
    found = []
    for number in range(draw(st.integers(1, 3))):
        direction = draw(st.sampled_from(["ingress", "egress"]))
        ports = draw(st.sampled_from([["PORT"], ["PORT", "1"], ["1"]]))
        group: Manifest = {"ports": [{"port": port, "protocol": "TCP"} for port in ports]}
        if draw(st.integers(0, 4)):
            group["rules"] = {"http": draw(st.lists(RULES, min_size=1, max_size=3))}
        rule: Manifest = {"toPorts": [group]}
        if draw(st.booleans()):
            side, who = ("from", "client") if direction == "ingress" else ("to", "web")
            labels = {"app": draw(st.sampled_from([who, "nobody"]))}
            rule[f"{side}Endpoints"] = [{"matchLabels": labels}]
        subject = "web" if direction == "ingress" else "client"
        spec = {"endpointSelector": {"matchLabels": {"app": subject}}, direction: [rule]}
        found.append(
            {
                "kind": "CiliumNetworkPolicy",
                "metadata": {"name": f"p{number}", "namespace": "shop"},
                "spec": spec,
            }
        )
    return found


class Running(NamedTuple):
    """A worker's data plane that goes on from example to example."""

    loop: asyncio.AbstractEventLoop
    mesh: MeshProxy
    web: Backend
    port: int


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    loop = asyncio.new_event_loop()
    stack = AsyncExitStack()

    async def start() -> Running:
        mesh = await stack.enter_async_context(mesh_proxy())
        web = await stack.enter_async_context(backend())
        return Running(loop, mesh, web, mesh.serve(cluster("web", web.port), service()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "WORTH", 1)  # the fast lane is open from the second request on
        found = loop.run_until_complete(start())
        yield found
        # Only there requests go on as their own bytes: Host comes first.
        assert any(one.headers[0][0] == "Host" for one in found.web.requests)
        assert any(one.headers[0][0] != "Host" for one in found.web.requests)
        loop.run_until_complete(stack.aclose())
    loop.close()


async def asked(running: Running, request: str) -> list[int]:
    """The statuses that it is answered with, again and again on one connection."""
    statuses = []
    async with connected(running.port) as (reader, writer):
        for _ in range(3):
            writer.write(request.encode())
            message = await read_message(reader)
            assert message is not None
            statuses.append(message.status)
            while any(task.get_name() == "compile an automaton" for task in asyncio.all_tasks()):
                await asyncio.sleep(0.001)
    return statuses


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(found=policies(), requests=st.lists(REQUESTS, min_size=1, max_size=4))
def test_every_request_passes_or_not_as_the_model_says(
    running: Running, found: list[Manifest], requests: list[Any]
) -> None:
    text = yaml.safe_dump_all(found).replace("PORT", str(running.web.port))
    found = [one for one in yaml.safe_load_all(text) if one]
    for policy in found:
        for rules in (policy["spec"].get("ingress"), policy["spec"].get("egress")):
            for group in (rules or [{}])[0].get("toPorts", ()):
                for port in group["ports"]:
                    port["port"] = str(port["port"])
    control = ControlWorld(MESH)
    control.apply(PODS + "\n---\n" + yaml.safe_dump_all(found))
    wanted = {
        key: section
        for key, section in control.sections.items()
        if key.startswith(("policy/", "cidr/", "workload/"))
    }
    mesh = running.mesh
    old = tuple(k for k in mesh.config.sections if k.startswith("policy/") and k not in wanted)
    assert mesh.apply(wanted, old) == {}
    meant = World([ME, WEB], {}, found)
    for request in requests:
        method, host, path, headers = request
        lines = [f"{name}: {value}" for name, value in headers]
        raw = get(path, host, *lines).replace("GET", method, 1)
        statuses = running.loop.run_until_complete(asked(running, raw))
        expected = meant.allowed(ME, WEB, "TCP", running.web.port, request)
        assert statuses == [200 if expected else 403] * 3, request
