"""`weft up --steer`: workloads of a cgroup reach Services by ClusterIP.

The workload has a network namespace of its own, so that nothing leaves it where steering fails.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from bpf_world import needs_bpf, new_actor, new_cgroup, pin_directory
from lab_world import until
from support.running import PROJECT, free_port, gateway, running, service

from bpf import constants, pins, syscall
from bpf.attach import adopt, is_member, opened
from bpf.maps import PinnedMap
from bpf.structs import Config, Number
from mesh.model.nodeconfig import MESH_HTTP_PORT

pytestmark = needs_bpf
# BPF_MOV64_IMM r0, 0; BPF_EXIT.
_RETURN_0 = b"\xb7" + bytes(7) + b"\x95" + bytes(7)
VIP = "10.96.0.10"


def write(directory, target: int, vip: str = VIP, name: str = "s") -> None:
    """A Service with a ClusterIP, and its one endpoint."""
    first, second = service(name, target=target).split("\n---\n")
    manifest = json.loads(first)
    manifest["spec"] |= {"clusterIP": vip, "clusterIPs": [vip]}
    draft = directory / "draft"
    draft.write_text(f"{json.dumps(manifest)}\n---\n{second}")
    draft.rename(directory / f"{name}.yaml")


@pytest.fixture
def world(tmp_path):
    """Manifests, a workload in a cgroup, and the arguments that steer it."""
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    with (
        new_cgroup() as cgroup,
        pin_directory(tmp_path) as pin,
        new_actor(cgroup) as workload,
    ):
        arguments = (f"--manifests={manifests}", "--admin=off", "--workers=1")
        yield manifests, workload, (*arguments, f"--steer={cgroup}", f"--pins={pin}")


def test_workload_reaches_a_cluster_ip_and_follows_its_endpoints(tmp_path, world):
    manifests, workload, arguments = world
    one, two = (workload("serve_tcp", "127.0.0.1", name) for name in ("one", "two"))
    write(manifests, one)
    with running(tmp_path / "run", *arguments) as weft:
        weft.await_line("are steered")
        kept = workload("connect", VIP, 80, True)
        assert (kept["name"], kept["peer"]) == ("one", [VIP, 80])

        before = time.monotonic_ns()
        write(manifests, two)
        version = weft.await_status(lambda status: status["config"]["version"] > 1)
        assert version["steered"]
        assert version["degraded"] == []
        # The kernel follows once the workers have acknowledged.
        weft.await_status(lambda _: workload("connect", VIP, 80)["name"] == "two")
        # Nor do requests pass any more that a worker has offered by the configuration before.
        pin = Path(arguments[-1].removeprefix("--pins="))
        with contextlib.closing(PinnedMap(pin, "generation", Number, Number)) as generation:
            made = generation.get(Number(2))
        assert made is not None
        assert before < made.value < time.monotonic_ns()
        assert workload("echo", kept["id"], "still here") == ["still here", [VIP, 80]]


def test_kernel_goes_on_without_agent_and_the_next_agent_takes_over(tmp_path, world):
    manifests, workload, arguments = world
    one, two = (workload("serve_tcp", "127.0.0.1", name) for name in ("one", "two"))
    write(manifests, one)
    with running(tmp_path / "run", *arguments) as weft:
        weft.await_line("are steered")
        agent = weft.await_status(lambda status: status["ready"])["agent"]["pid"]
        os.kill(agent, signal.SIGKILL)
        assert workload("connect", VIP, 80)["name"] == "one"
        weft.await_line("are steered")
        assert workload("connect", VIP, 80)["name"] == "one"
    # All of Weft has ended, and the world has changed when it comes back.
    assert workload("connect", VIP, 80)["name"] == "one"
    write(manifests, two, vip="10.96.0.11")
    with running(tmp_path / "run", *arguments) as weft:
        weft.await_line("are steered")
        assert workload("connect", "10.96.0.11", 80)["name"] == "two"
        assert workload("connect", VIP, 80) == {"errno": "ENETUNREACH"}


def test_an_orderly_end_leaves_what_is_in_force_and_nothing_else(tmp_path, world):
    manifests, workload, arguments = world
    write(manifests, workload("serve_tcp", "127.0.0.1", "one"))
    steer, pin = (Path(argument.partition("=")[2]) for argument in arguments[-2:])
    proxies = steer.with_name(f"{steer.name}.proxy")
    with running(tmp_path / "run", *arguments) as weft:
        weft.await_line("are steered")
        assert is_member(proxies, weft.process.pid)
    assert not proxies.exists()
    assert not (tmp_path / "run" / "agent.sock").exists()
    assert workload("connect", VIP, 80)["name"] == "one"

    def attached_to() -> int:
        with opened(syscall.pinned(str(pins.link_path(pin, "proxies", pins.version())))) as link:
            return syscall.cgroup_of_link(link)

    until(lambda: attached_to() == 0)  # the kernel takes its time
    # The next Weft's proxies are known to what is in force before its agent is.
    proxies.mkdir()
    adopt(pin, proxies)
    assert attached_to() == proxies.stat().st_ino


def test_service_without_endpoints_refuses_at_once(tmp_path, world):
    manifests, workload, arguments = world
    write(manifests, 9)
    (manifests / "s.yaml").write_text((manifests / "s.yaml").read_text().split("\n---\n")[0])
    with running(tmp_path / "run", *arguments) as weft:
        weft.await_line("are steered")
        assert workload("connect", VIP, 80) == {"errno": "ECONNREFUSED"}


def test_what_failed_is_tried_again_until_it_is_in_force(tmp_path, world):
    """Here first the self-test, then the loader."""
    manifests, workload, arguments = world
    write(manifests, workload("serve_tcp", "127.0.0.1", "one"))
    (manifests / "routes.yaml").write_text(_MESH_ROUTE.replace("name: s,", "name: other,"))
    write(manifests, 9, "10.96.0.11", "other")
    pin = Path(arguments[-1].removeprefix("--pins="))
    cgroup = Path(arguments[-2].removeprefix("--steer="))
    in_the_way = pin.with_name(f"{cgroup.name}.proxy.selftest") / "file"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    pins.prepare(pin)
    wrong = pins.map_path(pin, "backends")
    with running(tmp_path / "run", *arguments) as weft:
        weft.await_line("in it have to go first")
        status = weft.await_status(lambda status: status["ready"])
        assert status["steered"] is None
        assert status["notSteered"].startswith("no: programs: cannot remove the pin directory")
        assert accepted(weft)["status"] == "False"
        # A program where a map should be.
        syscall.pin(syscall.load_program("x", 3, 0, _RETURN_0, "GPL"), wrong)
        in_the_way.unlink()
        weft.await_line("the map pinned at")
        wrong.unlink()
        weft.await_line("are steered")
        status = weft.await_status(lambda status: status["steered"] == str(cgroup))
        assert status["notSteered"] is None
        assert not any("not steered" in text for text in status["degraded"])
        assert workload("connect", VIP, 80)["name"] == "one"
        weft.await_status(lambda _: accepted(weft)["status"] == "True")


# In all processes: what FIONREAD says on a kernel with the regression.
_NO_REDIRECT = """
import fcntl
asked = fcntl.ioctl
def ioctl(fd, request, *rest):
    return bytes(4) if request == 0x541B else asked(fd, request, *rest)
fcntl.ioctl = ioctl
"""


def patched(directory: Path, text: str) -> dict[str, str]:
    """An environment whose processes run this first."""
    (directory / "patch").mkdir()
    (directory / "patch" / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join((str(directory / "patch"), str(PROJECT)))}


def test_a_kernel_that_redirects_no_more_is_told_at_once(tmp_path, world):
    """By an agent that then cannot load, so that the programs of the one before it stay."""
    manifests, workload, arguments = world
    write(manifests, workload("serve_tcp", "127.0.0.1", "one"))
    pin = Path(arguments[-1].removeprefix("--pins="))

    def config() -> Config:
        with contextlib.closing(PinnedMap(pin, "config", Number, Config)) as found:
            value = found.get(Number(0))
        assert value is not None
        return value

    with running(tmp_path / "run", *arguments) as weft:
        weft.await_line("proxies answer them by redirect")
        before = config()
        assert before.flags == constants.CONFIG_SOCKMAP
    syscall.pin(syscall.load_program("x", 3, 0, _RETURN_0, "GPL"), pins.map_path(pin, "x"))
    wrong = pins.map_path(pin, "counters")
    wrong.unlink()
    pins.map_path(pin, "x").rename(wrong)
    with running(tmp_path / "run", *arguments, env=patched(tmp_path, _NO_REDIRECT)) as weft:
        weft.await_line("self-test: fionread")
        weft.await_line("the map pinned at")
        status = weft.await_status(lambda status: status["ready"])
        assert status["notSteered"].startswith("only as an earlier Weft left it: the map pinned")
        assert config() == before._replace(flags=0)
        assert workload("connect", VIP, 80)["name"] == "one"


# In all processes: a kernel that changes requests on their way past the proxy.
_NO_PAIRS = """
import socket
received = socket.socket.recv
def recv(self, *args):
    return received(self, *args).replace(b"GET /weft", b"GET /left")
socket.socket.recv = recv
"""


def exchange_attached(arguments) -> bool:
    pin = Path(arguments[-1].removeprefix("--pins="))
    return pins.link_path(pin, "exchange", pins.version()).exists()


def settings(weft) -> bool:
    return bool(weft.ask("/config")["sections"]["settings"].get("http_in_kernel"))


def test_requests_pass_by_the_proxy_where_the_kernel_does_it_right(tmp_path, world):
    manifests, workload, arguments = world
    write(manifests, workload("serve_tcp", "127.0.0.1", "one"))
    with running(tmp_path / "run", *arguments, "--http-in-kernel=auto") as weft:
        weft.await_line("are steered")
        status = weft.await_status(lambda status: status["ready"] and status["steered"])
        assert (status["notInKernel"], status["degraded"]) == (None, [])
        assert status["kernelRules"] == {}
        assert settings(weft)
        assert exchange_attached(arguments)
    # Nor is that an error where it was not asked for, or cannot be.
    for more, why in (("off", None), ("auto --datapath=proxy", "--datapath=proxy")):
        options = (*arguments, *f"--http-in-kernel={more}".split())
        with running(tmp_path / "run", *options) as weft:
            weft.await_line("are steered")
            status = weft.await_status(lambda status: status["ready"] and status["steered"])
            assert (status["notInKernel"], status["degraded"]) == (why, [])
            assert status["kernelRules"] is None
            assert not settings(weft)
            assert not exchange_attached(arguments)


def test_all_requests_go_through_the_proxy_where_the_kernel_does_it_wrong(tmp_path, world):
    """Sending by redirect goes on."""
    manifests, workload, arguments = world
    write(manifests, workload("serve_tcp", "127.0.0.1", "one"))
    env = patched(tmp_path, _NO_PAIRS)
    with running(tmp_path / "run", *arguments, "--http-in-kernel=auto", env=env) as weft:
        weft.await_line("self-test: pairs")
        weft.await_line("proxies answer them by redirect")
        status = weft.await_status(lambda status: status["ready"] and status["steered"])
        assert status["notInKernel"].startswith("pairs: ")
        assert status["degraded"] == [
            f"all requests go through the proxy: {status['notInKernel']}",
        ]
        weft.await_status(lambda _: not settings(weft))
        assert not exchange_attached(arguments)
        assert workload("connect", VIP, 80)["name"] == "one"


def test_nothing_is_steered_where_the_kernel_does_wrong_what_is_insisted_on(tmp_path, world):
    manifests, _, arguments = world
    write(manifests, 9)
    env = patched(tmp_path, _NO_PAIRS)
    with running(tmp_path / "run", *arguments, "--http-in-kernel=on", env=env) as weft:
        status = weft.await_status(lambda status: status["ready"])
        assert status["notSteered"].startswith("no: --http-in-kernel=on, and pairs: ")
        assert status["notInKernel"].startswith("pairs: ")
        assert not settings(weft)


def test_programs_are_attached_once_the_workers_can_ask_about_their_sockets(tmp_path, world):
    manifests, workload, arguments = world
    one, two = (workload("serve_tcp", "127.0.0.1", name) for name in ("one", "two"))
    write(manifests, one)
    hurried = "import mesh.agent.rollout; mesh.agent.rollout.ACK_LIMIT_S = 0.2"
    with running(tmp_path / "run", *arguments, env=patched(tmp_path, hurried)) as weft:
        status = weft.await_status(lambda status: any(one["version"] for one in status["workers"]))
        worker = status["workers"][0]["pid"]
        os.kill(worker, signal.SIGSTOP)
        try:
            # One that never answers must not hold up the others.
            steps = "not all workers have taken the data path's descriptors", "are steered"
            for step in steps:
                weft.await_line(step)
            said = [step for line in weft.said for step in steps if step in line]
            assert said == list(steps)
            # Nor later; it is named.
            write(manifests, two)
            behind = f"worker 0 (pid {worker}) does not acknowledge configurations; it has version"
            weft.await_status(lambda now: any(text.startswith(behind) for text in now["degraded"]))
            assert workload("connect", VIP, 80)["name"] == "two"
        finally:
            os.kill(worker, signal.SIGCONT)


def test_what_cannot_be_steered_is_said_and_the_gateway_goes_on(tmp_path):
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    with running(
        tmp_path / "run", f"--manifests={manifests}", "--admin=off", f"--steer={tmp_path}"
    ) as weft:
        weft.await_line("not a cgroup v2 directory")
        status = weft.await_status(lambda status: status["ready"])
        assert any("not a cgroup v2 directory" in text for text in status["degraded"])


_ELSEWHERE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: default}
spec:
  parentRefs: [{name: gw}]
  rules: [{filters: [{type: RequestRedirect, requestRedirect: {hostname: there.example}}]}]
"""


def test_without_bpf_rights_the_gateway_runs_and_says_so(tmp_path, world):
    manifests, _, arguments = world
    port = free_port()
    (manifests / "gateway.yaml").write_text(f"{gateway(port)}\n---\n{_ELSEWHERE}")
    through = ("setpriv", "--bounding-set=-sys_admin,-bpf,-perfmon,-net_admin")
    options = (*arguments, "--bind-address=127.0.0.1")
    with running(tmp_path / "run", *options, stub=False, through=through) as weft:
        status = weft.await_status(lambda status: status["ready"] and status["degraded"])
        assert any("not steered" in text for text in status["degraded"])
        assert not status["steered"]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/")
        answer = connection.getresponse()
        location = f"http://there.example:{port}/"
        assert (answer.status, answer.headers["location"]) == (302, location)
        connection.close()


_MESH_ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: default}
spec:
  parentRefs: [{group: "", kind: Service, name: s, port: 80}]
  rules: [{backendRefs: [{name: s, port: 80}]}]
"""


def accepted(weft) -> dict[str, str]:
    """The condition Accepted of the mesh route."""
    weft.await_status(lambda status: status["ready"])
    [route] = weft.ask("/objects", kind="HTTPRoute")["items"]
    conditions = route["status"]["parents"][0]["conditions"]
    return next(one for one in conditions if one["type"] == "Accepted")


def test_mesh_routes_are_accepted_where_workloads_are_steered(tmp_path, world):
    manifests, _, arguments = world
    write(manifests, 9)
    (manifests / "route.yaml").write_text(_MESH_ROUTE)
    with running(tmp_path / "run", *arguments) as weft:
        weft.await_line("are steered")
        assert accepted(weft)["status"] == "True"


def test_mesh_routes_are_not_accepted_where_nothing_is_steered(tmp_path):
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    write(manifests, 9)
    (manifests / "route.yaml").write_text(_MESH_ROUTE)
    arguments = (f"--manifests={manifests}", "--admin=off", "--workers=1")
    with running(tmp_path / "run", *arguments, f"--steer={tmp_path}") as weft:
        condition = accepted(weft)
        assert condition["status"] == "False"
        assert "not steered here" in condition["message"]
        assert "not a cgroup v2 directory" in condition["message"]


_POLICY = """
apiVersion: v1
kind: Pod
metadata: {name: p, namespace: default}
spec: {nodeName: n1, containers: [{name: c}]}
status: {podIP: 10.244.0.2, phase: Running}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: r, namespace: default}
spec: {podSelector: {}}
"""


def test_policies_are_not_programmed_where_nothing_is_steered(tmp_path):
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    (manifests / "policy.yaml").write_text(_POLICY)
    arguments = (f"--manifests={manifests}", "--admin=off", "--workers=1", "--node=n1")
    with running(tmp_path / "run", *arguments, f"--steer={tmp_path}") as weft:
        weft.await_status(lambda status: status["ready"])
        [policy] = weft.ask("/objects", kind="NetworkPolicy")["items"]
        conditions = {one["type"]: one for one in policy["status"]["conditions"]}
        assert conditions["Accepted"]["status"] == "True"
        assert conditions["Programmed"]["status"] == "False"
        assert "not a cgroup v2 directory" in conditions["Programmed"]["message"]


def test_proxies_that_the_kernel_would_not_know_are_not_steered_to(tmp_path, world):
    """Nobody can join a cgroup whose type is not one for processes."""
    manifests, _, arguments = world
    write(manifests, 9)
    with new_cgroup() as parent:
        threaded = parent / "threaded"
        threaded.mkdir()
        try:
            (threaded / "cgroup.type").write_text("threaded")
            invalid = threaded / "invalid"
            invalid.mkdir()
            try:
                proxy = f"--proxy-cgroup={invalid}"
                with running(tmp_path / "run", *arguments, proxy) as weft:
                    weft.await_line("Weft's own processes are not in")
                    status = weft.await_status(lambda status: status["ready"])
                    assert any("not steered" in text for text in status["degraded"])
            finally:
                invalid.rmdir()
        finally:
            threaded.rmdir()


def test_one_gateway_at_a_time_has_the_pins(tmp_path, world):
    manifests, workload, arguments = world
    write(manifests, workload("serve_tcp", "127.0.0.1", "one"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with running(tmp_path / "run", *arguments) as weft:
        weft.await_line("are steered")
        others = (f"--manifests={empty}", *arguments[1:])
        with running(tmp_path / "other", *others) as other:
            other.await_line("another gateway steers by the pins")
            other.await_status(lambda status: status["ready"])
            assert workload("connect", VIP, 80)["name"] == "one"
        assert workload("connect", VIP, 80)["name"] == "one"


def test_the_kernel_sends_nobody_to_ports_that_are_somebody_elses(tmp_path, world):
    manifests, _, arguments = world
    write(manifests, 9)
    pin = Path(arguments[-1].removeprefix("--pins="))

    def http4() -> bytes:
        with contextlib.closing(PinnedMap(pin, "config", Number, Config)) as config:
            found = config.get(Number(0))
        assert found is not None
        return found.http4

    with (
        socket.create_server(("127.0.0.1", MESH_HTTP_PORT)) as foreign,
        running(tmp_path / "run", *arguments) as weft,
    ):
        weft.await_line("are steered")
        assert not any(http4())
        foreign.close()
        # The supervisor tries again by itself, and the kernel follows.
        weft.await_line(f"listening on 127.0.0.1 port {MESH_HTTP_PORT}")
        weft.await_status(lambda _: any(http4()))
