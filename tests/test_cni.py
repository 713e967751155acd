"""The CNI plugin as a runtime runs it: behind Debian's own plugins, in the namespace of a node,
with the agent's part of it and the real programs. A whole agent: tests/test_cni_deployed.py."""

import asyncio
import contextlib
import json
import os
import select
import socket
import subprocess
from ipaddress import ip_address
from pathlib import Path

import msgspec
import pytest
from bpf_world import loader, needs_bpf, new_cgroup, pin_directory

from bpf import podfilter
from bpf.enforcement import Enforcement
from bpf.maps import counters
from bpf.reasons import Reason
from mesh.agent import cni_plugin
from mesh.agent.cni_plugin import CniPlugin
from mesh.agent.cni_socket import CniSocket
from mesh.agent.daemonset import DaemonSet
from mesh.agent.options import CniDirectories, Steering
from mesh.cni import kubepods, shim
from mesh.cni.adopt import adopt
from mesh.cni.plugin import Place
from mesh.lab.kernel import create_netns, inside, remove_netns
from mesh.sources.kubernetes_client import Client

PLUGINS = Path("/usr/lib/cni")
UID = "3f0c"
pytestmark = [
    needs_bpf,
    pytest.mark.skipif(not (PLUGINS / "bridge").exists(), reason="no containernetworking-plugins"),
]


@pytest.mark.parametrize(
    "pods", ["kubepods.slice", "kubepods", "kubelet.slice/kubelet-kubepods.slice"]
)
def test_where_the_pods_of_a_node_are(pods):
    """By systemd, by cgroupfs, and in kind; and this process as a pod's."""
    with new_cgroup() as root, contextlib.ExitStack() as stack:
        assert kubepods.find(root) == (root / "kubepods.slice", None)
        own = root / pods / "pod1/container"
        for one in reversed([own, *own.parents][: len(own.relative_to(root).parts)]):
            one.mkdir()
            stack.callback(one.rmdir)
        assert kubepods.find(root) == (root / pods, None)
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        before = next(line for line in lines if line.startswith("0::/")).removeprefix("0::/")
        (own / "cgroup.procs").write_text("0")
        try:
            assert kubepods.find(root) == (root / pods, own)
        finally:
            (root.parent / before / "cgroup.procs").write_text("0")


class Node:
    """A runtime: each call of a plugin is a process of its own."""

    def __init__(self, directory, netns, version="1.0.0"):
        self.run_dir, self.netns, self.version = directory / "run", netns, version
        ipam = {
            "type": "host-local",
            "dataDir": str(directory / "ipam"),
            "ranges": [[{"subnet": "10.9.0.0/24"}]],
        }
        self.network = {"bridge": "cni0", "isGateway": True, "ipam": ipam}

    def call(self, program, command, pod="one", netns=None, stdin=None, **config):
        """Exit status, and what it said."""
        pod_args = f"K8S_POD_NAMESPACE=ns;K8S_POD_NAME={pod};K8S_POD_UID={UID}"
        env = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod,
            "CNI_IFNAME": "eth0",
            "CNI_NETNS": str(netns or ""),
            "CNI_PATH": str(PLUGINS),
            "CNI_ARGS": f"IgnoreUnknown=1;{pod_args}",
            "PATH": os.environ["PATH"],
        }
        config = {"weftSocket": str(self.run_dir / "cni.sock"), **config}
        about = {"cniVersion": self.version, "name": "net", "type": Path(program).name, **config}
        given = json.dumps(about) if stdin is None else stdin
        done = subprocess.run(
            [program], input=given.encode(), capture_output=True, env=env, timeout=60
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else None

    def weft(self, command, **more):
        return self.call(shim.PROGRAM, command, **more)

    def connect(self, kind, pod, netns):
        """By the other plugin: its result."""
        status, result = self.call(PLUGINS / kind, "ADD", pod, netns, **self.network)
        assert status == 0, result
        return result

    def records(self):
        found = (self.run_dir / "pods").glob("*.json")
        return [json.loads(one.read_text()) for one in found]


@pytest.fixture
def node(tmp_path):
    assert shim.build() == ""
    prefix = f"/run/netns/weft-test-{os.getpid()}"
    paths = {name: Path(f"{prefix}-{name}") for name in ("node", "one", "two", "three", "empty")}
    with contextlib.ExitStack() as stack:
        for path in paths.values():
            create_netns(path)
            stack.callback(remove_netns, path)
        stack.enter_context(inside(paths["node"]))
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        yield Node(tmp_path, paths)


@pytest.fixture
def place(node, tmp_path):
    node.run_dir.mkdir()
    with pin_directory(tmp_path) as directory:
        done = loader("--pin", directory)
        assert done.returncode == 0, done.stderr
        yield Place(directory, node.run_dir / "pods")


@contextlib.asynccontextmanager
async def agent(node, place):
    """As it starts and ends."""
    podfilter.renew(place.pins, place.records)
    path = node.run_dir / "cni.sock"
    path.unlink(missing_ok=True)
    task = asyncio.ensure_future(CniSocket(path, place).run())
    while not path.exists():
        await asyncio.sleep(0)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_pods_of_other_plugins_are_filtered_from_add_to_del(
    node, place, tmp_path, monkeypatch
):
    kinds = {"one": "bridge", "two": "bridge", "three": "ptp"}
    results = {pod: node.connect(kind, pod, node.netns[pod]) for pod, kind in kinds.items()}
    given = {
        pod: {"pod": pod, "netns": node.netns[pod], "prevResult": results[pod]} for pod in kinds
    }
    status, said = node.weft("ADD", **given["one"])
    assert (status, said["code"], said["cniVersion"]) == (1, 11, "1.0.0")
    assert "does not answer" in said["msg"]

    async def weft(command, **more):
        return await asyncio.to_thread(node.weft, command, **more)

    async with agent(node, place):
        for pod in kinds:
            assert await weft("ADD", **given[pod]) == (0, results[pod])
            assert await weft("CHECK", **given[pod]) == (0, None)
        assert {one["about"] for one in node.records()} == {f"ns/{pod}/{UID}" for pod in kinds}
        check_bridge(node, place, results["two"]["ips"][0]["address"].split("/")[0])
    # Nobody hears of its end, and it is gone once an agent is there again.
    node.call(PLUGINS / "bridge", "DEL", "two", node.netns["two"], **node.network)
    assert node.weft("DEL", pod="two") == (0, None)
    assert node.weft("STATUS")[1]["code"] == 50
    assert node.weft("VERSION")[1]["supportedVersions"] == ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    assert len(node.records()) == 3
    async with agent(node, place):
        about = {one["about"] for one in node.records()}
        assert about == {f"ns/one/{UID}", f"ns/three/{UID}"}
        assert await weft("CHECK", **given["one"]) == (0, None)
        assert await weft("STATUS") == (0, None)
        for _ in range(2):
            assert await weft("DEL", pod="one", netns=node.netns["one"]) == (0, None)
        assert {one["about"] for one in node.records()} == {f"ns/three/{UID}"}
        assert (await weft("CHECK", **given["one"]))[1]["code"] == 101
        await asyncio.to_thread(check_codes, node, given["one"], tmp_path)
        assert (await weft("ADD", **given["one"]))[0] == 0
        assert await weft("GC", **{"cni.dev/valid-attachments": []}) == (0, None)
        assert node.records() == []
        await check_adoption(node, place, results, tmp_path)
    await check_the_end(node, place, tmp_path, monkeypatch)


def check_bridge(node, place, two):
    """What a pod sends reaches another one by that one's address, and by none that policies are not
    about."""
    enforcement = Enforcement(place.pins, None)
    assert enforcement.replace({}) == {}
    with contextlib.closing(enforcement), inside(node.netns["two"]):
        link = Path("/proc/net/if_inet6").read_text().splitlines()
        local = next(line.split()[0] for line in link if line.startswith("fe80"))
        receiver = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        receiver.bind(("::", 7000))
    with receiver, inside(node.netns["one"]):
        out = socket.if_nametoindex("eth0")
        link_local = (str(ip_address(bytes.fromhex(local))), 7000, 0, out)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as v4:
            v4.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            v4.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
            before = counters(place.pins)[Reason.UNJUDGED]
            v4.sendto(b"all", ("255.255.255.255", 7000))
            v4.sendto(b"group", ("224.0.0.251", 7000))
            with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as v6:
                v6.sendto(b"link", link_local)
            v4.sendto(b"one", (two, 7000))
        receiver.settimeout(20)
        assert receiver.recv(100) == b"one"
        assert counters(place.pins)[Reason.UNJUDGED] >= before + 2
        assert not select.select([receiver], [], [], 0)[0]


async def check_the_end(node, place, tmp_path, monkeypatch):
    """Pods that are not found are named. Nothing goes unless the DaemonSet is known to go."""
    conf, bin_dir = tmp_path / "net.d", tmp_path / "bin"
    for one in (conf, bin_dir):
        one.mkdir()
    about = {"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}
    (conf / "1.conflist").write_text(json.dumps(about))
    directories = CniDirectories(bin_dir, conf, tmp_path / "netns")
    steer = Steering(tmp_path, tmp_path, place.pins, place.records, "auto", cni=directories)
    daemonset = DaemonSet(Client(None), "weft-system")
    in_force, pods = asyncio.Event(), {"ns/four/1": ("10.9.0.99",)}
    plugin = CniPlugin(node.run_dir / "cni.sock", steer, in_force, lambda: pods, daemonset)
    monkeypatch.setattr(cni_plugin, "_LOOK_S", 0.01)
    task = asyncio.ensure_future(plugin.run())
    async with asyncio.timeout(20):
        while not (node.run_dir / "cni.sock").exists():
            await asyncio.sleep(0)
        assert not list(bin_dir.iterdir())
        in_force.set()
        while not plugin.failures:
            await asyncio.sleep(0.01)
    (why,) = plugin.failures
    assert why.startswith("pod ns/four is older than the CNI plugin")
    assert "restart it" in why
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    def types():
        return [one["type"] for one in json.loads((conf / "1.conflist").read_text())["plugins"]]

    assert not plugin.close()
    assert list(bin_dir.iterdir())
    assert types() == ["bridge", "weft-cni"]
    assert place.pins.exists()
    daemonset.unwanted.set()
    assert plugin.close()
    assert not list(bin_dir.iterdir())
    assert types() == ["bridge"]
    assert not place.pins.exists()
    assert not place.records.exists()


async def check_adoption(node, place, results, tmp_path):
    """Pods that nobody has announced: found by their addresses, ended by their namespaces."""
    directory = tmp_path / "netns"
    directory.mkdir()
    (directory / "broken").touch()
    for name, path in node.netns.items():
        (directory / name).symlink_to(path)
    pods = {
        f"ns/{pod}/{UID}": (result["ips"][0]["address"].partition("/")[0],)
        for pod, result in results.items()
    }

    def adopted():
        problems = adopt(place, directory, pods)
        return {one["about"].split("/")[1] for one in node.records()}, problems

    # As a pod may that has the right to.
    (theirs,) = pods[f"ns/one/{UID}"]
    with inside(node.netns["three"]):
        subprocess.run(["ip", "address", "add", f"{theirs}/32", "dev", "eth0"], check=True)
        found, problems = await asyncio.to_thread(adopted)
        assert found == {"three"}
        assert problems == {
            f"ns/one/{UID}": "several have its addresses",
            f"ns/two/{UID}": "its network namespace was not found",
        }
        subprocess.run(["ip", "address", "del", f"{theirs}/32", "dev", "eth0"], check=True)
    found, problems = await asyncio.to_thread(adopted)
    assert (found, problems.keys()) == ({"one", "three"}, {f"ns/two/{UID}"})
    (pod, *_) = (msgspec.convert(one, podfilter.Pod) for one in node.records())
    for _ in range(20):  # taken off and put on again at once
        podfilter.remove(place.pins, place.records, pod.interface)
        assert podfilter.add(place.pins, place.records, pod)
    about = {"pod": "one", "netns": node.netns["one"], "prevResult": results["one"]}
    for command, more in (("CHECK", about), ("GC", {"cni.dev/valid-attachments": []})):
        assert await asyncio.to_thread(node.weft, command, **more) == (0, None)
    assert len(node.records()) == 2
    await asyncio.to_thread(node.weft, "DEL", **about)
    assert len(node.records()) == 1
    # Of the other's end nobody tells.
    with inside(node.netns["three"]):
        subprocess.run(["ip", "link", "del", "eth0"], check=True)
    podfilter.tidy(place.pins, place.records)
    assert node.records() == []


def check_codes(node, given, tmp_path):
    """What cannot be done is said by the specification's codes, and leaves nothing."""
    before = node.records()
    plain = tmp_path / "plain"
    plain.touch()

    def code(command="ADD", **changed):
        status, said = node.weft(command, **{**given, **changed})
        assert status == 1
        assert said["msg"]
        return said["code"]

    assert code(stdin=f'no JSON: "weftSocket": "{node.run_dir}/cni.sock"') == 6
    assert code(cniVersion="9.9.9") == 1
    assert code(command="BEGIN") == 4
    assert code(pod="") == 4
    for netns in (plain, tmp_path / "none", node.netns["empty"]):
        assert code(netns=netns) == 4
    assert code(prevResult=None) == 7
    assert code(prevResult={**given["prevResult"], "ips": []}) == 7
    assert code(command="GC") == 7
    with inside(node.netns["empty"]):
        subprocess.run(["ip", "link", "add", "eth0", "type", "bridge"], check=True)
    assert code(netns=node.netns["empty"]) == 100
    assert node.records() == before
