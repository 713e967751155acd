"""The CNI plugin as a runtime runs it: behind Debian's own plugins, in the namespace of a node,
with a real agent and the real programs."""

import contextlib
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from bpf_world import needs_bpf, new_cgroup, pin_directory

from mesh.cni import shim
from mesh.lab.kernel import create_netns, inside, remove_netns
from tests.support.running import running

PLUGINS = Path("/usr/lib/cni")
UID = "3f0c"
pytestmark = [
    needs_bpf,
    pytest.mark.skipif(not (PLUGINS / "bridge").exists(), reason="no containernetworking-plugins"),
]


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
def agent(node, tmp_path):
    """Starts one; the same pins and cgroup for all."""
    (tmp_path / "manifests").mkdir()
    with pin_directory(tmp_path) as pins, new_cgroup() as cgroup:
        options = [f"--steer={cgroup}", f"--pins={pins}", f"--manifests={tmp_path / 'manifests'}"]
        options += ["--node=n", "--admin=off", "--workers=1", "--datapath=proxy"]
        yield lambda: running(node.run_dir, *options)


def in_force(instance):
    instance.await_status(lambda status: status["steered"])


def received(node, source, target, address):
    """Whether a datagram of a pod reaches another."""
    with inside(node.netns[target]):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("", 0))
        server.settimeout(5)
    with server, inside(node.netns[source]), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as c:
        c.sendto(b"hello", (address, server.getsockname()[1]))
        return server.recv(9) == b"hello"


def test_pods_of_other_plugins_are_filtered_from_add_to_del(node, agent, tmp_path):
    kinds = {"one": "bridge", "two": "bridge", "three": "ptp"}
    results = {pod: node.connect(kind, pod, node.netns[pod]) for pod, kind in kinds.items()}
    given = {
        pod: {"pod": pod, "netns": node.netns[pod], "prevResult": results[pod]} for pod in kinds
    }
    status, said = node.weft("ADD", **given["one"])
    assert (status, said["code"], said["cniVersion"]) == (1, 11, "1.0.0")
    assert "does not answer" in said["msg"]
    with agent() as instance:
        in_force(instance)
        for pod in kinds:
            assert node.weft("ADD", **given[pod]) == (0, results[pod])
            assert node.weft("CHECK", **given[pod]) == (0, None)
        assert {one["about"] for one in node.records()} == {f"ns/{pod}/{UID}" for pod in kinds}
        address = results["two"]["ips"][0]["address"].partition("/")[0]
        assert received(node, "one", "two", address)
    # Nobody hears of its end, and it is gone once an agent is there again.
    node.call(PLUGINS / "bridge", "DEL", "two", node.netns["two"], **node.network)
    assert node.weft("DEL", pod="two") == (0, None)
    assert node.weft("STATUS")[1]["code"] == 50
    assert node.weft("VERSION")[1]["supportedVersions"] == ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    assert len(node.records()) == 3
    with agent() as instance:
        in_force(instance)
        about = {one["about"] for one in node.records()}
        assert about == {f"ns/one/{UID}", f"ns/three/{UID}"}
        assert node.weft("CHECK", **given["one"]) == (0, None)
        assert node.weft("STATUS") == (0, None)
        for _ in range(2):
            assert node.weft("DEL", pod="one", netns=node.netns["one"]) == (0, None)
        assert {one["about"] for one in node.records()} == {f"ns/three/{UID}"}
        assert node.weft("CHECK", **given["one"])[1]["code"] == 101
        check_codes(node, given["one"], tmp_path)
        assert node.weft("ADD", **given["one"])[0] == 0
        assert node.weft("GC", **{"cni.dev/valid-attachments": []}) == (0, None)
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
