"""Agent and controller as deploy/ starts them: exactly its arguments, mounts, users, capabilities;
let in by the tokens of their pods, with the rights of their roles; in a network of their own."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from apiserver.server import ApiServer
from kube_world import CRDS, GROUP, gateway, needs_crds, route
from lab_world import needs_root

from mesh.install import manifests
from mesh.lab.kernel import CLONE_NEWNET, join, unshare
from tests.support.running import PROJECT
from tests.test_agent_end_to_end import WAIT_S, Client, backend

NAMESPACE = manifests.NAMESPACE
POD_IP = "10.244.1.5"
pytestmark = [needs_crds, needs_root]


@pytest.fixture
def network(tmp_path):
    """An address of a pod in it, as far as the agent can tell of another node."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    unshare(CLONE_NEWNET)
    try:
        for command in ("link set lo up", f"address add {POD_IP}/32 dev lo"):
            subprocess.run(["ip", *command.split()], check=True)
        yield
    finally:
        join(Path(f"/proc/thread-self/fd/{home}"), CLONE_NEWNET)
        os.close(home)


@pytest.fixture
async def server(network):
    async with ApiServer(tls=True, bookmark_s=0.1) as found:
        found.install_crds(CRDS)
        for obj in manifests.objects():
            found.create(obj)
        found.auth.rbac = True
        yield found


def by_kind(kind):
    (found,) = [one for one in manifests.objects() if one["kind"] == kind]
    return found["spec"]["template"]["spec"]


# What a kubelet mounts. $1: the service account's files, $2: a copy of /etc. The checkout stays
# where it is, also where one of the empty directories is mounted above it.
_MOUNTS = """
set -e
mount --make-rprivate /
mount -t tmpfs none /run
mkdir -p /run/secrets/kubernetes.io
cp -a "$1" /run/secrets/kubernetes.io/serviceaccount
mount --bind "$2" /etc
shift 2
mkdir /run/checkout
mount --bind "$CHECKOUT" /run/checkout
for directory in $DIRECTORIES; do mkdir -p "$directory"; mount -t tmpfs none "$directory"; done
mkdir -p "$CHECKOUT"
mount --bind /run/checkout "$CHECKOUT"
exec "$@"
"""


class Deployed:
    """A pod of the manifests, on node a. `said`: what its container has said."""

    def __init__(self, kind, server, directory):
        self.said = directory / "said"
        pod = by_kind(kind)
        (container,) = pod["containers"]
        given = {"NODE_NAME": "a", "POD_NAMESPACE": NAMESPACE}
        assert {one["name"] for one in container["env"]} <= given.keys()
        args = [re.sub(r"\$\((\w+)\)", lambda m: given[m[1]], one) for one in container["args"]]
        account = pod["serviceAccountName"]
        command = ["unshare", "--mount", "sh", "-c", _MOUNTS, "sh"]
        command += [self._token(account, server, directory), self._etc(pod, directory)]
        command += [*_as_user(pod, container), str(Path(sys.executable).with_name("weft")), *args]
        mounted = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        empty = [mounted[one["name"]] for one in pod["volumes"] if "configMap" not in one]
        host, port = "127.0.0.1", str(server.port)
        env = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
        env |= {"CHECKOUT": str(PROJECT), "DIRECTORIES": " ".join(empty)}
        env |= {"PATH": os.environ["PATH"], "HOME": "/"}
        with self.said.open("w") as said:
            self.process = subprocess.Popen(command, env=env, stderr=said, stdout=said, cwd=PROJECT)

    def _token(self, account, server, directory):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{account}-1", "namespace": NAMESPACE},
            "spec": {"nodeName": "a", "serviceAccountName": account},
        }
        uid = server.create(pod)["metadata"]["uid"]
        about = "authentication.kubernetes.io/pod"
        extra = {f"{about}-name": [f"{account}-1"], f"{about}-uid": [uid]}
        server.auth.service_account(account, NAMESPACE, account, extra=extra)
        files = directory / "account"
        files.mkdir()
        (files / "token").write_text(account)
        (files / "ca.crt").write_bytes(server._authority.cert_pem.bytes())
        return files

    def _etc(self, pod, directory):
        copy = directory / "etc"
        subprocess.run(["cp", "-a", "/etc", copy], check=True)
        for volume in pod["volumes"]:
            if "configMap" in volume:
                (files,) = [
                    one["data"] for one in manifests.objects() if one["kind"] == "ConfigMap"
                ]
                (copy / "weft").mkdir()
                for name, text in files.items():
                    (copy / "weft" / name).write_text(text)
        return copy

    async def ready(self, probe):
        """Until a kubelet would say so."""
        port = probe["httpGet"]["port"]
        async with asyncio.timeout(WAIT_S):
            while await _get(port, probe["httpGet"]["path"]) != 200:
                assert self.process.poll() is None, self.said.read_text()
                await asyncio.sleep(0.05)

    def end(self):
        """By more than one signal, so that nothing is waited for."""
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.3)


async def _get(port, path):
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return None
    with contextlib.closing(writer):
        writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        return int((await reader.readline()).split()[1])


def _as_user(pod, container):
    of_container, of_pod = container["securityContext"], pod.get("securityContext", {})
    kept = [f"+{one.lower()}" for one in of_container["capabilities"].get("add", ())]
    capabilities = ",".join(("-all", *kept))
    user = of_container.get("runAsUser", of_pod.get("runAsUser"))
    result = ["setpriv", f"--bounding-set={capabilities}", "--no-new-privs"]
    result += [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    return result


@pytest.fixture
async def deployed(server, tmp_path):
    started = []

    def start(kind):
        directory = tmp_path / kind
        directory.mkdir()
        started.append(Deployed(kind, server, directory))
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
            (container,) = by_kind(kind)["containers"]
            await pod.ready(container["readinessProbe"])
            assert await _get(container["livenessProbe"]["httpGet"]["port"], "/healthz") == 200
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
