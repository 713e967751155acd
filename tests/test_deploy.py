"""Agent and controller as deploy/gateway-only starts them (deploy_world); as deploy/manifests does:
tests/test_cni_deployed.py."""

import asyncio

import pytest
from apiserver.server import ApiServer
from deploy_world import Deployed, get, network, pod_of
from kube_world import CRDS, GROUP, gateway, needs_crds, route
from lab_world import needs_root

from mesh.install import manifests
from tests.test_agent_end_to_end import WAIT_S, Client, backend

POD_IP = "10.244.1.5"
pytestmark = [needs_crds, needs_root]


@pytest.fixture
def node():
    """An address of a pod in it, as far as the agent can tell of another node."""
    with network(POD_IP):
        yield


@pytest.fixture
async def server(node):
    async with ApiServer(tls=True, bookmark_s=0.1) as found:
        found.install_crds(CRDS)
        for obj in manifests.objects(steer=False):
            found.create(obj)
        found.auth.rbac = True
        yield found


@pytest.fixture
async def deployed(server, tmp_path):
    started = []

    def start(kind):
        directory = tmp_path / kind
        directory.mkdir()
        pod = pod_of(kind, steer=False)
        started.append(Deployed(pod, server, directory, tmp_path / "node"))
        return started[-1]

    yield start
    for one in started:
        await asyncio.to_thread(one.end)


def _objects(target):
    """A route to a pod of another node."""
    for name, address in (("a", "127.0.0.1"), ("b", "127.0.0.2")):
        status = {"addresses": [{"type": "InternalIP", "address": address}]}
        about = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}
        yield about, {"status": status}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"nodeName": "b", "containers": [{"name": "c"}]},
    }
    ready = [{"type": "Ready", "status": "True"}]
    running = {"phase": "Running", "podIP": POD_IP, "podIPs": [{"ip": POD_IP}]}
    yield pod, {"status": {**running, "conditions": ready}}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"ports": [{"port": 80, "targetPort": target}]},
    }
    yield service, None
    slice_ = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "web-1",
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"port": target}],
        "endpoints": [
            {
                "addresses": [POD_IP],
                "nodeName": "b",
                "targetRef": {"kind": "Pod", "namespace": "default", "name": "web"},
                "conditions": {"ready": True},
            }
        ],
    }
    yield slice_, None
    with_backend = route("web")
    with_backend["spec"]["rules"][0]["backendRefs"] = [{"name": "web", "port": 80}]
    for obj in (gateway(), with_backend):
        yield obj, None


async def test_as_deployed_a_request_reaches_a_pod_of_another_node(server, deployed):
    async with backend(POD_IP) as target:
        for obj, status in _objects(target):
            made = server.create(obj)
            if status:
                server.change(made, status, "status")
        agent, controller = deployed("DaemonSet"), deployed("Deployment")
        for kind, pod in (("DaemonSet", agent), ("Deployment", controller)):
            (container,) = pod_of(kind, steer=False)["containers"]
            await pod.ready(container["readinessProbe"])
            assert await get(container["livenessProbe"]["httpGet"]["port"], "/healthz") == 200
        written = server.store.watch(f"{GROUP}/gateways")
        async with asyncio.timeout(WAIT_S):
            while not _programmed(server):
                await written.get()
        # An unprivileged process has bound its port.
        client = Client()
        await client.connect(80)
        client.close()
        assert client.statuses == {200}
    assert server.auth.denied == []


def _programmed(server):
    status = server.get(f"{GROUP}/gateways", "gw")["status"]
    return ("Programmed", "True") in {
        (one["type"], one["status"]) for one in status.get("conditions", ())
    }
