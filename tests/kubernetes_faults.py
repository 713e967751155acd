"""What takes minutes (`make faults`): the API server away for two of them under traffic, a leading
controller that is killed while it writes, 5,000 routes that change while everything is read anew.

Not collected by itself; prints what it counted. `WEFT_OUTAGE_S`: how long the server is away.
"""

import asyncio
import os
import signal
import time

import pytest
from apiserver.server import ApiServer
from kube_world import CRDS, GROUP, following, needs_crds
from kube_world import route as plain_route

from tests.support.running import free_port, gateway, route, running, service
from tests.test_agent_end_to_end import Client, backend, busy
from tests.test_kubernetes_end_to_end import NAMESPACE, controller, create, until

OUTAGE_S = float(os.environ.get("WEFT_OUTAGE_S", "120"))
LEASE = "coordination.k8s.io/leases"
pytestmark = needs_crds


@pytest.fixture
async def server():
    async with ApiServer(bookmark_s=0.2) as found:
        found.install_crds(CRDS)
        found.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        yield found


async def test_the_api_server_is_away_for_minutes_under_traffic(server, tmp_path):
    """Nothing drops, though the agent is killed meanwhile; what has changed then takes effect."""
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    port = free_port()
    async with backend() as target:
        create(server, gateway(port), service(target=target), route("r"))
        options = (f"--kubeconfig={kubeconfig}", "--workers=1", "--admin=off")
        with running(tmp_path / "run", *options, "--drain-timeout=0.1", stub=False) as weft:
            await asyncio.to_thread(weft.await_status, lambda status: status["ready"])
            async with controller(kubeconfig):
                await until(server, "gateways", "gw", lambda c: c.get("Programmed") == "True")
                async with busy(port, 4) as clients:
                    server.faults.away = True
                    await server.stop_listening()
                    began, answered = time.monotonic(), sum(one.answered for one in clients)
                    await asyncio.sleep(OUTAGE_S / 2)
                    status = weft.ask("/status")
                    os.kill(status["agent"]["pid"], signal.SIGKILL)
                    await asyncio.sleep(OUTAGE_S / 2)
                    for client in clients:
                        await client.more()
                    # And who comes anew.
                    late = Client()
                    await late.connect(port)
                    late.close()
                    answered = sum(one.answered for one in clients) - answered
                    away_s = time.monotonic() - began
                    create(server, route("late", path="/late", service="nothing"))
                    server.faults.away = False
                    await server.listen()
                    back = time.monotonic()
                    other = Client()
                    await other.connect(port)
                    while await other.ask("/late") != 500:
                        await asyncio.sleep(0.05)
                    other.close()
                    served_s = time.monotonic() - back
                    await until(server, "httproutes", "late", lambda c: c.get("Accepted") == "True")
                    told_s = time.monotonic() - back
    print(
        f"\nAPI server away for {away_s:.0f} s, agent killed meanwhile: {answered} requests"
        f" answered 200, none otherwise; back, a route made meanwhile is served after"
        f" {served_s:.1f} s, its status there after {told_s:.1f} s"
    )


async def test_a_leading_controller_is_killed_while_it_writes(server, tmp_path):
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    count = 400
    create(server, gateway(free_port()), service())
    options = (f"--kubeconfig={kubeconfig}", "--workers=1", "--admin=off")
    with running(tmp_path / "run", *options, stub=False) as weft:
        await asyncio.to_thread(weft.await_status, lambda status: status["ready"])
        async with controller(kubeconfig, ends=-signal.SIGKILL) as first:
            await until(server, "gateways", "gw", lambda c: c.get("Programmed") == "True")
            leader = server.get(LEASE, "weft-controller", NAMESPACE)["spec"]["holderIdentity"]
            async with controller(kubeconfig):
                written = server.store.watch(f"{GROUP}/httproutes")
                create(server, *(route(f"r{n}", path=f"/r{n}") for n in range(count)))
                told = 0
                while told < count // 4:
                    event = await written.get()
                    told += bool(event.new.get("status"))
                first.kill()
                killed = time.monotonic()
                async with asyncio.timeout(60):
                    while not all(_accepted(server, n) for n in range(count)):
                        await written.get()
                took_s = time.monotonic() - killed
    now = server.get(LEASE, "weft-controller", NAMESPACE)["spec"]["holderIdentity"]
    assert now != leader
    routes = [server.get(f"{GROUP}/httproutes", f"r{n}") for n in range(count)]
    assert all(len(one["status"]["parents"]) == 1 for one in routes)
    print(
        f"\nleader killed after {told} of {count} statuses; the next one had written all after"
        f" {took_s:.1f} s (a Lease of 15 s)"
    )


def _accepted(server, number):
    status = server.get(f"{GROUP}/httproutes", f"r{number}").get("status", {})
    conditions = [one for parent in status.get("parents", ()) for one in parent["conditions"]]
    return any((one["type"], one["status"]) == ("Accepted", "True") for one in conditions)


async def test_everything_is_read_anew_while_5000_routes_change(server, tmp_path):
    count = 5000
    for number in range(count):
        server.create(plain_route(f"r{number}", "/0"))
    async with following(server, tmp_path, kinds=frozenset(("HTTPRoute",))) as source:
        before, lists = len(source.told), _lists(server)
        began = time.monotonic()
        for number in range(count):
            server.change(plain_route(f"r{number}"), {"metadata": {"labels": {"n": "1"}}})
            if number % 500 == 100:
                server.faults.about, server.faults.cut_watches = "httproutes", 1
                server.cut_connections()
                server.store.compact()
            if number % 3 == 0:
                await asyncio.sleep(0)
        async with asyncio.timeout(120):
            await source.until(
                lambda: all(obj.metadata.labels for obj in source.state["HTTPRoute"].values())
            )
        took_s = time.monotonic() - began
    told = [name for _, name, obj in source.told[before:] if obj is not None]
    assert len(source.told) - before == len(told) == len(set(told)) == count
    relists = _lists(server) - lists
    assert relists > 1
    print(
        f"\n{count} routes changed while all was read anew {relists} times: each told once, in"
        f" {took_s:.1f} s"
    )


def _lists(server):
    return sum(
        "/httproutes?" in path and "watch" not in path and "continue" not in path
        for _, path in server.requests
    )
