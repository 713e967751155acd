"""A lab on the real kernel, used as a user does. Needs root."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bpf_world import needs_bpf
from lab_world import LIMIT_S, Lab, host_links, lab_of, needs_root, processes_with, until

from mesh.lab.cgroups import cgroup_root
from mesh.lab.state import LabDir
from mesh.sources.directory import Manifests

pytestmark = needs_root

_FAMILIES = ("AF_INET", "AF_INET6")
_ECHO = """
import os, socket
server = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)
print("listening", flush=True)
while True:
    connection, client = server.accept()
    connection.sendall(f"{os.environ['POD_NAME']} {client[0]}".encode())
    connection.close()
"""
_ASK = """
import socket, sys
with socket.create_connection((sys.argv[1], 8080), timeout=5) as connection:
    print(connection.recv(100).decode())
"""
_RESOLVE = """
import json, socket, sys
answer = {}
for name in sys.argv[1:]:
    try:
        found = socket.getaddrinfo(name, 80, type=socket.SOCK_STREAM)
        answer[name] = sorted(one[4][0] for one in found)
    except socket.gaierror as error:
        answer[name] = error.errno
print(json.dumps(answer))
"""
CONFIG = f"""
nodes: [{{name: a}}, {{name: b}}]
outside: [{{name: client}}]
pods:
  - name: echo
    replicas: 2
    namespace: apps
    serviceAccount: echo
    command: [python3, -c, {json.dumps(_ECHO)}]
    ports: [{{port: 8080}}]
  - {{name: idle, namespace: apps, node: a}}
  - {{name: far, node: b}}
services:
  - {{name: echo, namespace: apps, ports: [{{port: 8080}}]}}
  - {{name: all, namespace: apps, headless: true, selector: {{app: echo}}}}
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    links = host_links()
    with lab_of(tmp_path_factory.mktemp("lab"), "t", CONFIG) as lab:
        done = lab.up()
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith(f"lab {lab.name} is up: 2 nodes, 4 pods, 2 services in ")
        assert host_links() == links
        yield lab


ECHO_1, ECHO_2 = ("10.244.0.2", "fd00:10:244::2"), ("10.244.1.2", "fd00:10:244:1::2")
IDLE = ("10.244.0.3", "fd00:10:244::3")
NODE_A, NODE_B = ("172.18.0.2", "fd00:172:18::2"), ("172.18.0.3", "fd00:172:18::3")


@pytest.mark.parametrize("family", [0, 1])
def test_pods_and_nodes_reach_pods_of_every_node(lab: Lab, family: int) -> None:
    prefix = ("::ffff:", "")[family]
    for where, pod, addresses, client in (
        ("idle", "echo-1", ECHO_1, IDLE),
        # A pod's port that a Service leads to: through a tunnel, which ends at the pod's node.
        ("idle", "echo-2", ECHO_2, NODE_B),
        ("node/a", "echo-1", ECHO_1, NODE_A),
        ("node/a", "echo-2", ECHO_2, NODE_A),
    ):
        answer = lab.python(where, _ASK, addresses[family])
        assert answer == f"{pod} {prefix}{client[family]}"


@pytest.mark.parametrize("family", [0, 1])
def test_a_client_outside_reaches_nodes_and_no_pods(lab: Lab, family: int) -> None:
    bind = f"""
import socket
server = socket.create_server(("{NODE_B[family]}", 7000), family=socket.{_FAMILIES[family]})
print(flush=True)
server.accept()[0].sendall(b"node b")
"""
    arguments = lab.arguments("exec", "node/b", "--", "python3", "-c", bind)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        ask = _ASK.replace("8080", "7000")
        assert lab.python("client", ask, NODE_B[family]) == "node b"
    done = lab.run("client", "python3", "-c", _ASK, ECHO_1[family])
    assert done.returncode == 1
    assert "unreachable" in done.stderr


@pytest.mark.parametrize("family", [0, 1])
def test_a_pod_cannot_send_from_an_address_of_another(lab: Lab, family: int) -> None:
    """A datagram from its own address, sent after the spoofed one, arrives alone."""
    kind = _FAMILIES[family]
    length = (32, 128)[family]
    receive = f"""
import socket
server = socket.socket(socket.{kind}, socket.SOCK_DGRAM)
server.bind(("", 7001))
print(flush=True)
print(server.recvfrom(100)[1][0], flush=True)
"""
    send = f"""
import socket, sys
from pyroute2 import IPRoute
with IPRoute() as netlink:
    link = netlink.link_lookup(ifname="eth0")[0]
    what = dict(index=link, address="{ECHO_1[family]}", prefixlen={length}, flags=2 * {family})
    netlink.addr("add", **what)
    for source in ("{ECHO_1[family]}", "{IDLE[family]}"):
        with socket.socket(socket.{kind}, socket.SOCK_DGRAM) as client:
            client.bind((source, 0))
            try:
                client.sendto(b"x", (sys.argv[1], 7001))
            except OSError:
                pass
    netlink.addr("del", index=link, address="{ECHO_1[family]}", prefixlen={length})
"""
    arguments = lab.arguments("exec", "echo-2", "--", "python3", "-c", receive)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        lab.python("idle", send, ECHO_2[family])
        assert server.stdout.readline().strip() == IDLE[family]


def test_names_resolve_as_in_a_cluster(lab: Lab) -> None:
    service = ["10.96.0.10", "fd00:10:96::a"]
    names = ["echo", "echo.apps", "echo.apps.svc", "echo.apps.svc.cluster.local"]
    others = ["all", "localhost", "example.org", "idle"]
    answer = json.loads(lab.python("idle", _RESOLVE, *names, *others))
    assert {name: answer[name] for name in names} == dict.fromkeys(names, service)
    assert answer["all"] == sorted([*ECHO_1, *ECHO_2])
    assert "127.0.0.1" in answer["localhost"]
    assert answer["idle"] == sorted(IDLE)
    assert isinstance(answer["example.org"], int)
    # From another namespace on the other node.
    answer = json.loads(lab.python("far", _RESOLVE, "echo", "echo.apps"))
    assert isinstance(answer["echo"], int)
    assert answer["echo.apps"] == service


def test_exec_is_in_the_pod(lab: Lab) -> None:
    program = """
import json, os, socket
print(json.dumps({
    "cgroup": [line.strip() for line in open("/proc/self/cgroup") if line.startswith("0::")],
    "host": socket.gethostname(),
    "netns": os.stat("/proc/self/ns/net").st_ino,
    "mounts": os.readlink("/proc/self/ns/mnt"),
    "pod": os.environ["POD_NAMESPACE"] + "/" + os.environ["POD_NAME"],
    "account": os.environ["SERVICE_ACCOUNT"],
}))
"""
    seen = json.loads(lab.python("echo-2", program))
    pid = next(one["status"]["pid"] for one in status_of(lab)["pods"] if one["name"] == "echo-2")
    assert seen == {
        "cgroup": [f"0::/{lab.name}/b/apps.echo-2"],
        "host": "echo-2",
        "netns": os.stat(f"/proc/{pid}/ns/net").st_ino,
        "mounts": os.readlink(f"/proc/{pid}/ns/mnt"),
        "pod": "apps/echo-2",
        "account": "echo",
    }


def test_exec_passes_on_exit_code_and_input(lab: Lab) -> None:
    assert lab.run("idle", "sh", "-c", "exit 7").returncode == 7
    arguments = lab.arguments("exec", "idle", "--", "cat")
    done = subprocess.run(arguments, input=b"through", capture_output=True, timeout=LIMIT_S)
    assert done.stdout == b"through"
    done = lab.run("idle", "no-such-program")
    assert done.returncode == 127
    assert done.stderr == "weft: apps/idle has no program no-such-program\n"
    done = lab.run("nobody", "true")
    assert done.returncode == 1
    assert "has no 'nobody': it has apps/echo-1, " in done.stderr


def test_exec_on_a_terminal(lab: Lab) -> None:
    ours, theirs = pty.openpty()
    arguments = lab.arguments("exec", "idle", "--", "sh")
    with subprocess.Popen(
        arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as shell:
        os.close(theirs)
        guard = threading.Timer(LIMIT_S, shell.kill)
        guard.start()
        os.write(ours, b"test -t 0 && echo on a $((40 + 2)) terminal; exit 3\n")
        seen = b""
        while b"on a 42 terminal" not in seen:
            seen += os.read(ours, 1000)
        assert shell.wait() == 3
        guard.cancel()
    os.close(ours)


def status_of(lab: Lab) -> dict:
    return json.loads(lab.weft("status", "-o", "json").stdout)


def test_status(lab: Lab) -> None:
    status = status_of(lab)
    assert status["complete"]
    assert {node["name"]: node["running"] for node in status["nodes"]} == {"a": True, "b": True}
    pods = {pod["name"]: pod for pod in status["pods"]}
    assert pods["echo-1"]["labels"] == {"app": "echo"}
    assert pods["echo-1"]["serviceAccount"] == "echo"
    assert all(pod["status"]["ready"] for pod in pods.values())
    text = lab.weft("status").stdout
    assert "apps        echo-2   True    Running   b      10.244.1.2,fd00:10:244:1::2" in text
    assert lab.weft("status", "-o", "yaml").returncode == 0


def test_logs(lab: Lab) -> None:
    assert lab.weft("logs", "echo-1").stdout == "listening\n"
    assert lab.weft("logs", "node/a").stdout == ""
    assert lab.weft("logs", "client").returncode == 1


def test_a_second_up_is_refused(lab: Lab) -> None:
    done = lab.up()
    assert done.returncode == 1
    assert done.stderr == (f"weft: lab {lab.name} is up: remove it with 'weft lab down' first\n")
    assert lab.weft("status").returncode == 0
    # Nor is it taken over from another run directory.
    other = Lab(lab.run_dir.parent / "other", lab.name, CONFIG)
    done = other.up()
    assert done.returncode == 1
    assert "exists and is not of a lab in this run directory" in done.stderr


def test_endpoints_follow_the_process(tmp_path: Path) -> None:
    wait = """
import signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
server = socket.create_server(("", 80))
while True:
    signal.pause()
"""
    config = f"""
nodes: [{{name: a}}]
pods:
  - {{name: p, command: [python3, -c, {json.dumps(wait)}], ports: [{{port: 80}}]}}
  - {{name: done, command: ["true"]}}
services: [{{name: p, ports: [{{port: 80}}]}}]
"""

    def ready() -> set[bool | None]:
        slices = Manifests(lab.run_dir / lab.name / "manifests").scan().changes["EndpointSlice"]
        return {one.conditions.ready for part in slices.values() for one in part.endpoints}

    with lab_of(tmp_path, "ends", config) as lab:
        assert lab.up().returncode == 0
        assert ready() == {True}
        pods = {pod["name"]: pod["status"] for pod in status_of(lab)["pods"]}
        assert (pods["done"]["phase"], pods["done"]["exitCode"]) == ("Exited", 0)
        gone = os.pidfd_open(pods["p"]["pid"])
        signal.pidfd_send_signal(gone, signal.SIGTERM)
        os.close(gone)
        until(lambda: ready() == {False})
        until(lambda: "Exited 5" in lab.weft("status").stdout)
        assert lab.weft("status").returncode == 1
        assert lab.weft("start", "p").returncode == 0
        assert ready() == {True}
        now = next(pod["status"] for pod in status_of(lab)["pods"] if pod["name"] == "p")
        assert (now["phase"], now["exitCode"]) == ("Running", None)


def test_a_pod_stops_and_starts_as_in_a_cluster(tmp_path: Path) -> None:
    serve = """
import signal, socket, sys
server = socket.create_server(("", 80))
signal.signal(signal.SIGTERM, lambda *_: (server.accept()[0].send(b"last"), sys.exit()))
server.listen()
while True:
    signal.pause()
"""
    config = f"""
nodes: [{{name: a}}]
pods:
  - {{name: p, command: [python3, -c, {json.dumps(serve)}], ports: [{{port: 80}}]}}
  - {{name: q}}
services: [{{name: p, ports: [{{port: 80}}]}}, {{name: h, headless: true, selector: {{app: p}}}}]
"""

    def conditions() -> set[tuple[bool | None, ...]]:
        manifests = lab.run_dir / lab.name / "manifests"
        slices = Manifests(manifests).scan().changes.get("EndpointSlice", {}).values()
        found = [one.conditions for part in slices for one in part.endpoints]
        return {(one.ready, one.serving, one.terminating) for one in found}

    def state() -> dict:
        return next(pod["status"] for pod in status_of(lab)["pods"] if pod["name"] == "p")

    with lab_of(tmp_path, "stops", config) as lab:
        assert lab.up().returncode == 0
        assert conditions() == {(True, True, False)}
        assert json.loads(lab.python("q", _RESOLVE, "h"))["h"] == ["10.244.0.2", "fd00:10:244::2"]
        done = lab.weft("start", "p")
        assert (done.returncode, done.stderr) == (1, "weft: default/p is running: stop it first\n")
        links = lab.run("node/a", "ls", "/proc/self/net/dev_snmp6").stdout.split()
        with subprocess.Popen(lab.arguments("stop", "p"), stderr=subprocess.DEVNULL) as stopping:
            until(lambda: conditions() == {(False, True, True)})
            # While it is terminating it serves who comes to its address, and has no name any more.
            assert isinstance(json.loads(lab.python("q", _RESOLVE, "h"))["h"], int)
            assert lab.python("q", _ASK.replace("8080", "80"), "10.244.0.2") == "last"
            assert stopping.wait(LIMIT_S) == 0
        assert conditions() == set()
        assert state()["phase"] == "Stopped"
        assert lab.weft("status").returncode == 0
        gone = lab.run("node/a", "ls", "/proc/self/net/dev_snmp6").stdout.split()
        assert len(gone) == len(links) - 1
        assert not (cgroup_root() / lab.name / "a" / "default.p").exists()
        assert not Path(f"/run/netns/weft.{lab.name}.pod.default.p").exists()
        assert "default/p is stopped: start it" in lab.run("p", "true").stderr
        assert lab.weft("stop", "p").returncode == 0
        done = lab.weft("start", "p")
        assert (done.returncode, done.stderr) == (0, "default/p is ready\n")
        assert conditions() == {(True, True, False)}


def test_a_nodes_weft_runs_until_it_is_stopped(tmp_path: Path) -> None:
    config = """
nodes: [{name: a}]
outside: [{name: client}]
"""

    def pid() -> int | None:
        return (run_dir.holder() or {}).get("pid")

    def weft() -> str:
        return status_of(lab)["nodes"][0]["weft"]

    def ready() -> bool:
        return bool(json.loads(lab.node("a", "status", "-o", "json").stdout or "{}").get("ready"))

    with lab_of(tmp_path, "px-weft", config) as lab:
        assert lab.up().returncode == 0
        run_dir = LabDir(lab.run_dir, lab.name).weft("a")
        first = pid()
        assert first is not None
        os.kill(first, signal.SIGKILL)
        until(lambda: pid() not in (first, None))
        until(ready)
        assert weft() == "Running"
        proxies = cgroup_root() / lab.name / "_system" / "a" / "proxy"
        assert proxies.is_dir()
        for _ in range(2):  # stopped it may be stopped again
            done = lab.weft("stop", "node/a")
            assert (done.returncode, done.stderr) == (0, "node/a is stopped\n")
            assert (pid(), weft(), lab.weft("status").returncode) == (None, "Stopped", 0)
        assert not proxies.exists()
        assert not run_dir.api_socket.exists()
        done = lab.weft("start", "node/a")
        assert (done.returncode, done.stderr) == (0, "node/a is ready\n")
        assert ready()
        assert lab.weft("start", "node/a").returncode == 1
        assert lab.weft("stop", "outside/client").returncode == 1
        # Without a supervisor nobody starts it again.
        supervisor = json.loads((run_dir.path.parent / "a.json").read_text())["pid"]
        for process in (supervisor, pid()):
            os.kill(process, signal.SIGKILL)
        until(lambda: pid() is None)
        assert (weft(), lab.weft("status").returncode) == ("Ended", 1)


def test_pods_that_fail_are_told(tmp_path: Path) -> None:
    config = """
nodes: [{name: a}]
pods:
  - {name: p, command: [no-such-program]}
  - {name: q, command: [sleep, "100"], ports: [{port: 1}]}
"""
    with lab_of(tmp_path, "fails", config) as lab:
        done = lab.up("--wait", "7")
        assert done.returncode == 1
        assert (
            "! default/p is not ready (Failed: [Errno 2] No such file or directory: "
            "'no-such-program'): see 'weft lab logs default/p'" in done.stderr
        )
        assert "! default/q is not ready (Running)" in done.stderr


def test_two_labs_with_the_same_addresses(lab: Lab, tmp_path: Path) -> None:
    with lab_of(tmp_path, "t-second", CONFIG) as second:
        assert second.up().returncode == 0
        assert second.python("idle", _ASK, ECHO_2[0]).startswith("echo-2 ")
    assert lab.python("idle", _ASK, ECHO_2[0]).startswith("echo-2 ")


def test_down_leaves_nothing(tmp_path: Path) -> None:
    links = host_links()
    with lab_of(tmp_path, "gone", CONFIG) as lab:
        assert lab.up().returncode == 0
        # A process that nobody knows any more, in a session of its own.
        mark = f"weft-test-{lab.name}"
        lab.run("idle", "sh", "-c", f"MARK={mark} setsid sleep 1000 >/dev/null 2>&1 &")
        until(lambda: len(processes_with(mark)) == 1)
        done = lab.weft("down")
        assert (done.returncode, done.stderr) == (0, f"lab {lab.name} is gone\n")
        assert [*lab.leftovers(), *processes_with(mark)] == []
        assert host_links() == links
        done = lab.weft("down")
        assert (done.returncode, done.stderr) == (1, f"weft: no lab {lab.name} in {lab.run_dir}\n")
        assert lab.leftovers() == []
        assert lab.weft("exec", "p", "--", "true").returncode == 1


def test_the_example_comes_up(tmp_path: Path) -> None:
    file = Path(__file__).parents[1] / "examples" / "lab" / "lab.yaml"
    with lab_of(tmp_path, "example", file.read_text()) as lab:
        done = lab.weft("up", str(file))
        assert done.returncode == 0, done.stderr
        ask = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1]).read().decode())"
        answer = json.loads(lab.python("web-1", ask, "http://recommender:8080/x"))
        assert answer["saw"] == "GET /x"


@needs_bpf
def test_a_lab_of_24_services_leaves_nothing(tmp_path: Path) -> None:
    """All of it works at once, and all of it goes: also what pins have of it."""
    serve = """
import os, socket
server = socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True)
while True:
    connection, _ = server.accept()
    connection.sendall(os.environ["POD_NAME"].encode())
    connection.close()
"""
    ask = """
import socket
for number in range(24):
    with socket.create_connection((f"service-{number}", 80), timeout=5) as connection:
        print(connection.recv(100).decode())
"""
    names = [f"service-{number}" for number in range(24)]
    config = {
        "nodes": [{"name": "a"}, {"name": "b"}],
        "outside": [{"name": "client"}],
        "pods": [
            {
                "name": name,
                "replicas": 2,
                "command": ["python3", "-c", serve],
                "ports": [{"name": "tcp", "port": 8080}],
            }
            for name in names
        ]
        + [{"name": "idle"}],
        "services": [
            {"name": name, "ports": [{"port": 80, "targetPort": "tcp"}]} for name in names
        ],
    }
    links = host_links()
    with lab_of(tmp_path, "many", json.dumps(config)) as lab:
        done = lab.up()
        assert done.returncode == 0, done.stderr
        answers = lab.python("idle", ask).split()
        assert [answer.rpartition("-")[0] for answer in answers] == names
        pins = [lab.run_dir / lab.name / "nodes" / f"{node}.weft" / "bpf" for node in "ab"]
        assert [len(list((path / "links").glob("weft*_pod_*gress"))) for path in pins] == [50, 48]
        done = lab.weft("down")
        assert (done.returncode, done.stderr) == (0, f"lab {lab.name} is gone\n")
        assert lab.leftovers() == []
        assert host_links() == links
