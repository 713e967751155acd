"""`weft up --kubeconfig` and `weft controller` as processes on an API server: from an object to
traffic, and back to its status; with the real kubectl where there is one."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml
from apiserver.server import ApiServer
from kube_world import CRDS, GROUP, KUBECTL, needs_crds, needs_kubectl

from l7proxy.tasks import spawn
from mesh.model.nodereport import ANNOTATION, decode_report
from tests.support.running import PROJECT, free_port, gateway, route, running, service
from tests.test_agent_end_to_end import WAIT_S, Client, backend, busy

NAMESPACE = "weft-system"
pytestmark = needs_crds


@pytest.fixture
async def server():
    async with ApiServer(bookmark_s=0.2) as found:
        found.install_crds(CRDS)
        found.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
        yield found


def create(server, *texts):
    for text in "\n---\n".join(texts).split("\n---\n"):
        obj = json.loads(text)
        if obj["kind"] != "GatewayClass":
            obj["metadata"].setdefault("namespace", "default")
        server.create(obj)


@asynccontextmanager
async def controller(kubeconfig, *, ends=0):
    """`ends`: its exit code, once it has been ended."""
    process = await asyncio.create_subprocess_exec(
        *(Path(sys.executable).with_name("weft"), "controller", f"--kubeconfig={kubeconfig}"),
        "--advertise=192.0.2.1",
        cwd=PROJECT,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(WAIT_S):
            assert await process.wait() == ends


async def until(server, plural, name, holds):
    """Until the status of an object on the server holds."""
    queue = server.store.watch(f"{GROUP}/{plural}")
    async with asyncio.timeout(WAIT_S):
        while True:
            status = server.get(f"{GROUP}/{plural}", name).get("status", {})
            conditions = {one["type"]: one["status"] for one in status.get("conditions", ())}
            for parent in status.get("parents", ()):
                conditions |= {one["type"]: one["status"] for one in parent["conditions"]}
            if holds(conditions):
                return status
            await queue.get()


async def test_from_an_object_to_traffic_and_back_to_its_status(server, tmp_path):
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    port = free_port()
    async with backend() as target:
        create(server, gateway(port), service(target=target), route("r"))
        name = socket.gethostname().lower()
        about = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        node = server.create(about)
        for number in range(100):
            server.create({**about, "metadata": {"name": f"other{number}"}})
        options = (f"--kubeconfig={kubeconfig}", "--workers=1", "--admin=off")
        options += ("--drain-timeout=0.1", "--drain-delay=0.5")
        with running(tmp_path / "run", *options, stub=False) as weft:
            status = await asyncio.to_thread(weft.await_status, lambda status: status["ready"])
            async with controller(kubeconfig) as leader:
                await until(server, "gateways", "gw", lambda c: c.get("Programmed") == "True")
                for pid in (leader.pid, status["workers"][0]["pid"]):  # there are keys
                    limits = Path(f"/proc/{pid}/limits").read_text()
                    assert re.search(r"Max core file size +0 +0 ", limits)
                await until(server, "httproutes", "r", lambda c: c.get("Accepted") == "True")
                client = Client()
                await client.connect(port)
                assert client.statuses == {200}
                # A status that says Accepted is true: the route serves.
                began, before = time.monotonic(), _reports(server)
                for number in range(2):
                    create(server, route(f"new{number}", path=f"/new{number}", service="nothing"))
                    new = f"new{number}"
                    await until(server, "httproutes", new, lambda c: c.get("Accepted") == "True")
                    assert await client.ask(f"/new{number}") == 500
                # That the node has come so far is told seldomer the more nodes there are: of a
                # hundred not more often than every two seconds.
                assert _reports(server) - before <= (time.monotonic() - began) / 2 + 1
                client.close()
            assert _report(server).ready
            # It first says that it leaves: who is sent to it until everybody knows is served.
            leases = server.store.watch(LEASES)
            stopping = spawn(asyncio.to_thread(weft.stop), name="stop")
            async with asyncio.timeout(WAIT_S):
                while _report(server).ready:
                    await leases.get()
            client = Client()
            await client.connect(port)
            assert client.statuses == {200}
            client.close()
            await stopping
            # A node that has ended in good order is waited for by nobody.
            assert not _report(server).ready
            # Its Lease goes with the Node.
            (owner,) = _lease(server)["metadata"]["ownerReferences"]
            assert (owner["kind"], owner["uid"]) == ("Node", node["metadata"]["uid"])
            server.delete(about)
            assert _lease(server) is None


def _reports(server):
    return sum(
        method == "PATCH" and "/leases/weft-node." in path for method, path in server.requests
    )


LEASES = "coordination.k8s.io/leases"


def _lease(server):
    return server.get(LEASES, f"weft-node.{socket.gethostname().lower()}", NAMESPACE)


def _report(server):
    return decode_report(_lease(server)["metadata"]["annotations"][ANNOTATION])


async def test_nothing_drops_while_the_server_is_away(server, tmp_path):
    """Nor while something else answers in its place; the agent lives on."""
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")
    port = free_port()
    async with backend() as target:
        create(server, gateway(port), service(target=target), route("r"))
        options = (f"--kubeconfig={kubeconfig}", "--workers=1", "--admin=off")
        with running(tmp_path / "run", *options, "--drain-timeout=0.1", stub=False) as weft:
            await asyncio.to_thread(weft.await_status, lambda status: status["ready"])
            async with busy(port, 2) as clients:
                server.faults.away = True
                await server.stop_listening()
                await asyncio.to_thread(weft.await_line, "cannot report to the cluster")
                for client in clients:
                    await client.more()
                agent = (await asyncio.to_thread(weft.ask, "/status"))["agent"]
                server.faults.garbage = {"": b'{"kind": "Status"'}
                server.faults.away = False
                await server.listen()
                await asyncio.to_thread(weft.await_line, "not JSON")
                server.faults.garbage = {}
                create(server, route("late", path="/late", service="nothing"))
                other = Client()
                await other.connect(port)
                async with asyncio.timeout(WAIT_S):
                    while await other.ask("/late") != 500:
                        await asyncio.sleep(0.05)
                other.close()
                for client in clients:
                    await client.more()
                assert (await asyncio.to_thread(weft.ask, "/status"))["agent"] == agent
            await asyncio.to_thread(weft.stop)


@needs_kubectl
async def test_kubectl_gets_applies_and_deletes(server, tmp_path):
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig")

    async def kubectl(*arguments, text="", fails=False):
        process = await asyncio.create_subprocess_exec(
            *(KUBECTL, f"--kubeconfig={kubeconfig}", f"--cache-dir={tmp_path}/cache"),
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        async with asyncio.timeout(WAIT_S):
            # Older ones take several documents in YAML only.
            documents = [json.loads(one) for one in text.split("\n---\n")] if text else []
            said, _ = await process.communicate(yaml.safe_dump_all(documents).encode())
        assert bool(process.returncode) == fails, said.decode()
        return said.decode()

    manifests = "\n---\n".join((gateway(80), service(), route("r")))
    assert await kubectl("apply", "-f", "-", text=manifests) == (
        "gatewayclass.gateway.networking.k8s.io/weft created\n"
        "gateway.gateway.networking.k8s.io/gw created\n"
        "service/s created\n"
        "endpointslice.discovery.k8s.io/s created\n"
        "httproute.gateway.networking.k8s.io/r created\n"
    )
    changed = manifests.replace('"value": "/"', '"value": "/a"').replace("9000", "9001")
    before = server.get(f"{GROUP}/gateways", "gw")
    said = await kubectl("apply", "-f", "-", text=changed)
    # For kubectl the Gateway differs by what the server filled in; its patch changes nothing.
    assert said.count("configured") == 3
    assert said.count("unchanged") == 2
    assert server.get(f"{GROUP}/gateways", "gw") == before
    got = json.loads(await kubectl("get", "httproute", "r", "-o", "json"))
    assert got["spec"]["rules"][0]["matches"][0]["path"]["value"] == "/a"
    assert got["metadata"]["generation"] == 2
    table = await kubectl("get", "gtw,httproute,svc", "-A")
    assert "gateway.gateway.networking.k8s.io/gw" in table
    await kubectl("label", "gateway", "gw", "a=b")
    assert "gw" in await kubectl("get", "gtw", "-l", "a=b", "-o", "name")
    wrong = route("wrong").replace('"port": 80', '"port": 99999')
    assert "is invalid" in await kubectl("apply", "-f", "-", text=wrong, fails=True)
    await kubectl("patch", "service", "s", "-p", '{"metadata": {"labels": {"c": "d"}}}')
    said = await kubectl("apply", "--server-side", "-f", "-", text=service("t"))
    assert said.count("serverside-applied") == 2
    await kubectl("delete", "-f", "-", text=changed)
    assert server.get(f"{GROUP}/httproutes", "r") is None
