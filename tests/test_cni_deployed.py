"""Weft as deploy/manifests starts it on a node whose pods a container runtime connects: by the list
of plugins that the agent has its place in, with Debian's bridge in front."""

import asyncio
import contextlib
import json
import os
import subprocess
from pathlib import Path

import pytest
from apiserver.server import ApiServer
from bpf_world import needs_bpf, new_actor, new_cgroup
from deploy_world import NAMESPACE, NODE_IP, Deployed, network, pod_of
from kube_world import CRDS, needs_crds

from mesh.cli.client import ask
from mesh.install import manifests
from mesh.lab.kernel import create_netns, remove_netns

PLUGINS = Path("/usr/lib/cni")
VIP = "10.96.0.1"
# Programs are compiled, where nobody has done that yet.
WAIT_S = 60
pytestmark = [
    needs_crds,
    needs_bpf,
    pytest.mark.skipif(not (PLUGINS / "bridge").exists(), reason="no containernetworking-plugins"),
]
# As a runtime sees the node: its own /run, with the agent's directory in it.
_AS_RUNTIME = """
mount --make-rprivate / && mount -t tmpfs none /run && mkdir /run/weft &&
mount --bind "$RUN" /run/weft && exec "$0"
"""


class Runtime:
    """What containerd does with a node's lists of plugins. `root`: the node's."""

    def __init__(self, root):
        self.root = root
        self.conf = root / "etc/cni/net.d"
        self.bin = root / "opt/cni/bin"
        self.netns = root / "run/netns"
        for one in (self.conf, self.bin, self.netns, root / "run/weft", root / "sys/fs/bpf"):
            one.mkdir(parents=True)
        ipam = {"type": "host-local", "dataDir": str(root / "ipam")}
        ipam["ranges"] = [[{"subnet": "10.9.0.0/24"}]]
        ipam["routes"] = [{"dst": "0.0.0.0/0"}]
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipam": ipam}
        self.original = {"cniVersion": "1.0.0", "name": "net", "plugins": [bridge]}
        self.write()
        self._pods = {}

    def write(self):
        draft = self.conf / "draft"
        draft.write_text(json.dumps(self.original))
        draft.rename(self.conf / "10-net.conflist")

    def listed(self):
        """What the first list says; files that are about to be one have another suffix."""
        first = min(self.conf.glob("*.conflist"))
        return json.loads(first.read_text())

    def types(self):
        return [one["type"] for one in self.listed()["plugins"]]

    def add(self, pod):
        """Its address."""
        create_netns(self.netns / pod)
        listed, result = self.listed(), None
        for plugin in listed["plugins"]:
            status, result = self._call("ADD", pod, listed, plugin, result)
            assert status == 0, result
        self._pods[pod] = listed, result
        return result["ips"][0]["address"].partition("/")[0]

    def delete(self, pod):
        """By the list that it was added by, as CRI-O does."""
        listed, result = self._pods.pop(pod)
        for plugin in reversed(listed["plugins"]):
            status, said = self._call("DEL", pod, listed, plugin, result)
            assert status == 0, said
        remove_netns(self.netns / pod)

    def _call(self, command, pod, listed, plugin, previous):
        ours, theirs = self.bin / plugin["type"], PLUGINS / plugin["type"]
        given = {**plugin, "cniVersion": listed["cniVersion"], "name": listed["name"]}
        if previous is not None:
            given["prevResult"] = previous
        env = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod,
            "CNI_IFNAME": "eth0",
            "CNI_NETNS": str(self.netns / pod),
            "CNI_PATH": str(PLUGINS),
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod}",
            "PATH": os.environ["PATH"],
            "RUN": str(self.root / "run/weft"),
        }
        program = str(ours if ours.exists() else theirs)
        command = ["unshare", "--mount", "sh", "-c", _AS_RUNTIME, program]
        done = subprocess.run(
            command, input=json.dumps(given).encode(), capture_output=True, env=env, timeout=60
        )
        assert not done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def records(self):
        found = (self.root / "run/weft/pods").glob("*.json")
        return {json.loads(one.read_text())["about"].split("/")[1] for one in found}


@pytest.fixture
def runtime(tmp_path):
    with contextlib.ExitStack() as stack:
        stack.enter_context(network(NODE_IP))
        found = Runtime(tmp_path / "node")
        yield found
        for pod in list(found._pods):
            found.delete(pod)
        subprocess.run(["umount", "-l", found.netns], check=False)


@pytest.fixture
def kubepods(runtime):
    """The node's cgroups and bpffs are where a node has them."""
    with new_cgroup() as root, contextlib.ExitStack() as stack:
        made = [root / "kubepods.slice", *(root / f"kubepods.slice/{n}" for n in ("agent", "pods"))]
        made += [root / f"kubepods.slice/agent/{container}" for container in ("first", "next")]
        for one in made:
            one.mkdir()
            stack.callback(one.rmdir)
        at = runtime.root / "sys/fs"
        (at / "cgroup").mkdir()
        for command, where in (
            (["mount", "--bind", root, at / "cgroup"], at / "cgroup"),
            (["mount", "-t", "bpf", "none", at / "bpf"], at / "bpf"),
        ):
            subprocess.run(command, check=True)
            stack.callback(subprocess.run, ["umount", "-l", where], check=True)
        yield root / "kubepods.slice"


@pytest.fixture
async def server(runtime):
    async with ApiServer(tls=True, bookmark_s=0.1) as found:
        found.install_crds(CRDS)
        for obj in manifests.objects():
            found.create(obj)
        found.auth.rbac = True
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a"}}
        made = found.create(node)
        status = {"addresses": [{"type": "InternalIP", "address": NODE_IP}]}
        found.change(made, {"status": status}, "status")
        yield found


@pytest.fixture
async def deployed(server, runtime, kubepods, tmp_path):
    started = []

    def start(kind, container="first"):
        directory = tmp_path / f"{kind}-{container}"
        directory.mkdir()
        cgroup = kubepods / "agent" / container if kind == "DaemonSet" else None
        started.append(Deployed(pod_of(kind), server, directory, runtime.root, cgroup))
        return started[-1]

    yield start
    for one in started:
        await asyncio.to_thread(one.end)


def running(server, name, address):
    """As kubelet says it."""
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {"nodeName": "a", "containers": [{"name": "c"}], "serviceAccountName": "default"},
    }
    status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}
    status["conditions"] = [{"type": "Ready", "status": "True"}]
    server.change(server.create(pod), {"status": status}, "status")


def objects(target, port, http_port):
    about = {"name": "two", "namespace": "default"}
    ports = [{"name": "tcp", "port": 5000, "targetPort": port}]
    ports += [{"name": "http", "port": 80, "targetPort": http_port}]
    spec = {"clusterIP": VIP, "clusterIPs": [VIP], "ports": ports}
    yield {"apiVersion": "v1", "kind": "Service", "metadata": about, "spec": spec}
    yield {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**about, "labels": {"kubernetes.io/service-name": "two"}},
        "addressType": "IPv4",
        "ports": [{"name": "tcp", "port": port}, {"name": "http", "port": http_port}],
        "endpoints": [{"addresses": [target], "conditions": {"ready": True}}],
    }
    yield {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": about,
        "spec": {
            "podSelector": {"matchLabels": {"app": "two"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "one"}}}]}],
        },
    }


async def until(holds, *processes):
    async with asyncio.timeout(WAIT_S):
        while not (found := holds()):
            for one in processes:
                assert one.process.poll() is None, one.said.read_text()
            await asyncio.sleep(0.02)
    return found


async def test_pods_are_steered_and_filtered_until_the_daemonset_goes(
    server, runtime, kubepods, deployed
):
    old = runtime.add("old")
    running(server, "old", old)
    agent, controller = deployed("DaemonSet"), deployed("Deployment")
    both = agent, controller
    await until(lambda: runtime.types() == ["bridge", "weft-cni"], *both)
    await until(lambda: runtime.records() == {"old"}, *both)
    addresses = {pod: await asyncio.to_thread(runtime.add, pod) for pod in ("one", "two")}
    assert runtime.records() == {"old", "one", "two"}
    for pod, address in addresses.items():
        running(server, pod, address)
    with contextlib.ExitStack() as stack:
        actors = {
            pod: stack.enter_context(new_actor(kubepods / "pods", runtime.netns / pod))
            for pod in ("old", "one", "two")
        }
        # A pod with its node's network.
        own = "/proc/self/ns/net"
        actors["host"] = stack.enter_context(new_actor(kubepods / "pods", own))
        port = actors["two"]("serve_tcp", addresses["two"], "two")
        http_port = actors["two"]("serve_http", addresses["two"], "two")
        for obj in objects(addresses["two"], port, http_port):
            server.create(obj)

        def reached(pod, address=VIP, at=5000):
            found = actors[pod]("connect", address, at)
            return found.get("name") or found["errno"]

        await until(lambda: reached("one") == "two", *both)
        await until(lambda: reached("old") == "EPERM", *both)
        # By the proxy, which is in a pod, and in the cgroup of all pods, itself.
        assert actors["one"]("http", VIP, 80) == {"status": 200, "body": "two"}
        assert actors["old"]("http", VIP, 80)["status"] == 403
        counted = ask(runtime.root / "run/weft", "/status", {}.items())["datapath"]
        assert counted["ENROLLED"] == 3
        for at in (5000, 80):
            assert reached("host", VIP, at) == "ENETUNREACH"
        assert reached("host", addresses["two"], port) == "two"
        # Another plugin renews its file, and there is a first one.
        runtime.write()
        await until(lambda: runtime.types() == ["bridge", "weft-cni"], *both)
        # An upgrade. The next pod is in another cgroup, and tests this kernel beside the programs
        # that are in force.
        await asyncio.to_thread(agent.end)
        assert runtime.types() == ["bridge", "weft-cni"]
        assert (reached("one"), reached("old")) == ("two", "EPERM")
        assert actors["one"]("http", VIP, 80) == {"errno": "ECONNREFUSED"}
        agent = deployed("DaemonSet", "next")
        await until(lambda: "are steered" in agent.said.read_text(), agent, controller)
        assert "self-test" not in agent.said.read_text()
        assert (reached("one"), reached("old")) == ("two", "EPERM")
        assert actors["one"]("http", VIP, 80)["status"] == 200
        # The end.
        found = server.get("apps/daemonsets", "weft-agent", NAMESPACE)
        server.delete(found)
        agent.process.terminate()
        await until(lambda: runtime.types() == ["bridge"])
        assert reached("old") == "EPERM"
        await asyncio.to_thread(agent.end)
        assert reached("old", addresses["two"], port) == "two"
    assert not (runtime.root / "sys/fs/bpf/weft").exists()
    assert list((runtime.root / "run/weft").glob("pods/*")) == []
    assert runtime.listed() == runtime.original
    # It stays for as long as a runtime may start it to end pods that came by it.
    assert (runtime.bin / "weft-cni").exists()
    for pod in ("one", "two"):
        runtime.delete(pod)
    assert server.auth.denied == []
