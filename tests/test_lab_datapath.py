"""The data path of a node of a lab: while Weft is started anew, and while it cannot be loaded.
Needs root."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from bpf_world import needs_bpf
from lab_world import LIMIT_S, Lab, lab_of, needs_root, until

from bpf import maps, syscall
from bpf.attach import opened
from bpf.reasons import Reason
from mesh.lab.cgroups import cgroup_root, members
from mesh.lab.state import LabDir

pytestmark = [needs_root, needs_bpf]

# HTTP/1.0: the proxy makes a connection for each request.
_SERVE = """
import socketserver, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "100000")
        self.end_headers()
        self.wfile.write(bytes(100000))
threading.Thread(target=ThreadingHTTPServer(("", 8080), Handler).serve_forever).start()
class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(1000):
            self.request.sendall(data)
socketserver.ThreadingTCPServer(("", 7000), Echo).serve_forever()
"""
CONFIG = f"""
nodes: [{{name: a}}]
outside: [{{name: client}}]
pods:
  - name: web
    command: [python3, -c, {json.dumps(_SERVE)}]
    ports: [{{name: http, port: 8080}}, {{name: echo, port: 7000}}]
  - {{name: idle}}
services:
  - {{name: web, ports: [{{name: http, port: 80, targetPort: http}}]}}
  - {{name: echo, selector: {{app: web}}, ports: [{{name: echo, port: 7, targetPort: echo}}]}}
manifests: [gateway.yaml]
"""
_GATEWAY = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: weft}
spec: {controllerName: weft.dev/gateway-controller}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: front, namespace: default}
spec:
  gatewayClassName: weft
  listeners: [{name: http, port: 80, protocol: HTTP}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: default}
spec:
  parentRefs: [{name: front}]
  rules: [{backendRefs: [{name: web, port: 80}]}]
"""
# Requests one after another until standard input ends; what became of them, in the end.
_ASK = """
import http.client, json, select, sys
said = []
while not select.select([sys.stdin], [], [], 0)[0]:
    connection = http.client.HTTPConnection(sys.argv[1], timeout=10)
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        size = len(answer.read())
        said.append("ok" if (answer.status, size) == (200, 100000) else f"{answer.status} {size}")
    except ConnectionRefusedError:
        said.append("refused")
        select.select([sys.stdin], [], [], 0.005)
    except OSError as error:
        said.append(repr(error))
    connection.close()
print(json.dumps(said))
"""
# At each line of standard input something by the connection of the beginning, and by a new one.
_KEEP = """
import socket, sys
def echoed(connection):
    connection.sendall(b"x")
    return connection.recv(1) == b"x" and connection.getpeername() == (sys.argv[1], 7)
with socket.create_connection((sys.argv[1], 7)) as kept:
    print(echoed(kept), flush=True)
    for line in sys.stdin:
        with socket.create_connection((sys.argv[1], 7)) as new:
            print(echoed(kept), echoed(new), flush=True)
"""
_SPOOF = """
import socket, sys
from pyroute2 import IPRoute
with IPRoute() as netlink:
    netlink.addr("add", index=netlink.link_lookup(ifname="eth0")[0], address=sys.argv[1], mask=32)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.bind((sys.argv[1], 0))
    client.sendto(b"x", (sys.argv[2], 7))
"""
NODE, VIP, ECHO_VIP = "172.18.0.2", "10.96.0.10", "10.96.0.11"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with lab_of(tmp_path_factory.mktemp("lab"), "dp", CONFIG) as lab:
        (lab.file.parent / "gateway.yaml").write_text(_GATEWAY)
        (lab.file.parent / "patch").mkdir()
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PYTHONPATH", str(lab.file.parent / "patch"))
            lab.up()
        # On a machine with much else to do not everything is there by then.
        until(lambda: lab.weft("status").returncode == 0)
        yield lab


@contextlib.contextmanager
def asking(lab: Lab, where: str, address: str) -> Iterator[list[str]]:
    """Requests during the block; afterwards what became of them."""
    command = lab.arguments("exec", where, "--", "python3", "-c", _ASK, address)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    result: list[str] = []
    try:
        yield result
    finally:
        said, _ = process.communicate(timeout=LIMIT_S)
    result += json.loads(said)


def weft_of(lab: Lab) -> int:
    """Its supervisor."""
    for pid in members(cgroup_root() / lab.name / "_system" / "a" / "proxy"):
        if b"mesh.agent.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    raise AssertionError("no Weft runs")


def times_steered(lab: Lab) -> int:
    log = lab.run_dir / lab.name / "nodes" / "a.weft.log"
    return log.read_bytes().count(b"are steered")


def counters(lab: Lab) -> dict[str, int]:
    found: dict[str, int] = json.loads(lab.node("a", "status", "-o", "json").stdout)["datapath"]
    return found


def end_weft(lab: Lab, patch: str = "") -> None:
    """The node's Weft ends, and its supervisor starts another, whose every process runs `patch`
    first."""
    (lab.file.parent / "patch" / "sitecustomize.py").write_text(patch)
    pidfd = os.pidfd_open(weft_of(lab))
    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    assert select.select([pidfd], [], [], LIMIT_S)[0]
    os.close(pidfd)


def program_of(link: Path) -> int:
    """The id of the program of a pinned filter."""
    with opened(syscall.pinned(str(link))) as fd:
        return syscall.tcx_link(fd).program


def since_the_first(said: list[str]) -> list[str]:
    """What was said from the first answer on."""
    start = next((index for index, one in enumerate(said) if one != "refused"), 0)
    return sorted(set(said[start:]))


@pytest.mark.parametrize(
    "patch", ["", "from bpf import constants; constants.PLAIN *= 2"], ids=["same", "other layout"]
)
def test_requests_through_the_gateway_while_weft_starts_anew(lab: Lab, patch: str) -> None:
    before = times_steered(lab)
    end_weft(lab, patch)
    with asking(lab, "client", NODE) as said:
        until(lambda: times_steered(lab) > before)
        until(lambda: counters(lab)["REDIRECTED"] > 0)
    assert since_the_first(said) == ["ok"]
    assert lab.weft("status").returncode == 0


def test_a_pod_that_could_not_be_filtered_is_tried_again(lab: Lab) -> None:
    files = LabDir(lab.run_dir, lab.name).weft("a")
    record, another = files.pods.glob("*.json")
    [link] = [
        one for one in (files.pins / "links").iterdir() if one.name == f"{record.stem}_pod_egress"
    ]
    # Nor can connections be steered: another pod is filtered by the new programs all the same.
    steering, other = link.with_name("connect4"), link.with_name(f"{another.stem}_pod_ingress")
    before = program_of(other)
    for one in (link, steering):
        one.unlink()
        one.mkdir()  # in its place
    end_weft(lab)

    def degraded() -> list[str]:
        found = json.loads(lab.node("a", "status", "-o", "json").stdout or "{}")
        return list(found.get("degraded", ["not there"]))

    until(lambda: any(f"attach the filter to {record.stem}" in text for text in degraded()))
    assert any("connect4" in text for text in degraded())
    assert program_of(other) != before
    steering.rmdir()
    link.rmdir()
    until(lambda: degraded() == [])
    assert link.is_file()


def test_the_kernel_goes_on_when_all_of_weft_is_killed(lab: Lab) -> None:
    files = LabDir(lab.run_dir, lab.name)
    node, pod = files.existing_plan().node("a"), "default/web"
    [address] = [one.addresses[0] for one in files.existing_plan().pods if one.key == pod]
    keeper = int(json.loads((files.nodes / "a.json").read_text())["pid"])
    command = lab.arguments("exec", "idle", "--", "python3", "-c", _KEEP, ECHO_VIP)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        assert client.stdout.readline() == "True\n"
        os.kill(keeper, signal.SIGSTOP)  # else it starts another at once
        try:
            for pid in members(cgroup_root() / node.proxy_cgroup):
                os.kill(pid, signal.SIGKILL)
            until(lambda: not members(cgroup_root() / node.proxy_cgroup))
            client.stdin.write("\n")
            assert client.stdout.readline() == "True True\n"
            before = maps.counters(files.weft("a").pins)[Reason.SPOOFED]
            lab.python("idle", _SPOOF, "192.0.2.99", address)
            assert maps.counters(files.weft("a").pins)[Reason.SPOOFED] == before + 1
        finally:
            os.kill(keeper, signal.SIGCONT)
        until(lambda: lab.weft("status").returncode == 0)
        client.stdin.write("\n")
        assert client.stdout.readline() == "True True\n"
        client.stdin.close()
    assert client.returncode == 0


def test_a_data_path_that_comes_late(tmp_path: Path) -> None:
    """Debian's python3-bpfcc is not there at first."""
    (tmp_path / "missing").mkdir()
    bcc = tmp_path / "missing" / "bcc.py"
    bcc.write_text("raise ModuleNotFoundError('No module named bcc')")
    with lab_of(tmp_path, "dplate", CONFIG) as lab, pytest.MonkeyPatch.context() as environment:
        (tmp_path / "gateway.yaml").write_text(_GATEWAY)
        environment.setenv("PYTHONPATH", str(bcc.parent))
        done = lab.up()
        environment.undo()
        # The node serves, and runs no pod whose policy it could not enforce.
        assert done.returncode == 1
        assert "! node a is not steered: no: programs: " in done.stderr
        assert "! default/web is not ready (Pending: " in done.stderr
        assert "steered:    no: programs: " in lab.node("a", "status").stdout
        records = lab.run_dir / lab.name / "nodes" / "a.weft" / "pods"
        assert list(records.iterdir()) == []
        bcc.unlink()
        until(lambda: lab.weft("status").returncode == 0)
        with asking(lab, "idle", VIP) as said:
            until(lambda: counters(lab)["REDIRECTED"] > 0)
        assert sorted(set(said)) == ["ok"]
        assert counters(lab)["FILTER_FROM_POD"] > 0
        assert lab.weft("stop", "idle").returncode == 0
        assert len(list(records.iterdir())) == 1
