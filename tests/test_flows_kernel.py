"""Flow records of what the eBPF programs decide: a workload connects, and people read of it."""

from __future__ import annotations

import http.client
import json
import os
import signal

import msgspec
import pytest
from bpf_world import needs_bpf, new_actor, new_cgroup, pin_directory
from support.running import free_port, running, service

from mesh.agent.flows import Line
from mesh.cli.client import ask_stream

pytestmark = needs_bpf
VIP, EMPTY = "10.96.0.10", "10.96.0.11"


@pytest.fixture
def world(tmp_path):
    """A workload that is steered: VIP is served by it, EMPTY by nobody; and /metrics."""
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    admin = free_port()
    with (
        new_cgroup() as cgroup,
        pin_directory(tmp_path) as pins,
        new_actor(cgroup) as workload,
    ):
        target = workload("serve_tcp", "127.0.0.1", "one")
        served, endpoints = service("served", target=target).split("\n---\n")
        empty, _ = service("empty").split("\n---\n")
        parts = [with_address(served, VIP), endpoints, with_address(empty, EMPTY)]
        (manifests / "services.yaml").write_text("\n---\n".join(parts))
        with running(
            tmp_path / "run",
            f"--manifests={manifests}",
            f"--admin=127.0.0.1:{admin}",
            "--workers=1",
            f"--steer={cgroup}",
            f"--pins={pins}",
        ) as weft:
            weft.await_line("are steered")
            weft.await_status(lambda status: status["ready"])
            yield weft, workload, target, admin


def with_address(manifest: str, address: str) -> str:
    plain = json.loads(manifest)
    plain["spec"] |= {"clusterIP": address, "clusterIPs": [address]}
    return json.dumps(plain)


def seen(weft, count: int):
    return weft.await_status(
        lambda s: sum(s["flows"]["seen"].values()) + s["flows"]["lost"]["kernel"] >= count
    )


def flows(weft):
    lines = ask_stream(weft.run_dir.path, "/flows")
    return [msgspec.json.decode(line, type=Line).flow for line in lines if line is not None]


def test_connections_of_workloads_are_told(world):
    weft, workload, target, admin = world
    assert workload("connect", VIP, 80)["name"] == "one"
    assert workload("connect", EMPTY, 80) == {"errno": "ECONNREFUSED"}
    assert workload("connect", "192.0.2.77", 81) == {"errno": "ENETUNREACH"}
    status = seen(weft, 3)
    balanced, refused, passed = flows(weft)

    assert (balanced.verdict, balanced.reason) == ("FORWARDED", "")
    assert (balanced.destination.address, balanced.destination.port) == ("127.0.0.1", target)
    assert (balanced.service, balanced.protocol) == ("default/served:80", "TCP")
    assert (refused.verdict, refused.reason) == ("DROPPED", "NO_BACKENDS")
    assert (refused.destination.address, refused.destination.port) == (EMPTY, 80)
    assert refused.service == "default/empty:80"
    assert (passed.verdict, passed.service) == ("FORWARDED", "")
    assert (passed.destination.address, passed.destination.port) == ("192.0.2.77", 81)
    times = [flow.time for flow in (balanced, refused, passed)]
    assert times == sorted(times)
    assert status["agent"]["started"] * 1e9 < times[0]

    assert status["datapath"]["BALANCED"] >= 1
    assert status["datapath"]["NO_BACKENDS"] == 1
    connection = http.client.HTTPConnection("127.0.0.1", admin, timeout=20)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    assert 'weft_datapath_events_total{reason="NO_BACKENDS"} 1.0' in lines
    assert 'weft_flows_total{verdict="DROPPED"} 1.0' in lines


def test_what_the_kernel_could_not_keep_is_counted(world):
    """While the agent stands still, more happens than the ring buffer holds."""
    weft, workload, _, _ = world
    agent = weft.await_status(lambda status: status["ready"])["agent"]["pid"]
    often = 9000
    os.kill(agent, signal.SIGSTOP)
    assert workload("connect_often", EMPTY, 80, often) == {"ECONNREFUSED": often}
    os.kill(agent, signal.SIGCONT)
    found = seen(weft, often)["flows"]
    assert found["lost"]["kernel"] > 0
    assert sum(found["seen"].values()) + found["lost"]["kernel"] == often
    # And it goes on.
    workload("connect", VIP, 80)
    seen(weft, often + 1)
    assert flows(weft)[-1].service == "default/served:80"


def test_what_happened_between_two_agents_is_told_by_the_second(world):
    weft, workload, _, _ = world
    agent = weft.await_status(lambda status: status["ready"])["agent"]["pid"]
    os.kill(agent, signal.SIGSTOP)
    workload("connect", EMPTY, 80)
    os.kill(agent, signal.SIGKILL)
    workload("connect", EMPTY, 80)
    weft.await_line("are steered")
    seen(weft, 2)
    assert [flow.reason for flow in flows(weft)] == ["NO_BACKENDS", "NO_BACKENDS"]
