"""`weft lab up` killed at any moment: the next `up` or `down` cleans up. Needs root."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from bpf_world import needs_bpf
from lab_world import LIMIT_S, Lab, host_links, lab_of, needs_root, until

from bpf import pins
from mesh.lab.cgroups import cgroup_root, members

pytestmark = needs_root

CONFIG = """
nodes: [{name: a}, {name: b}]
outside: [{name: client}]
pods: [{name: p, replicas: 6, command: [sleep, "1000"]}]
services: [{name: p, ports: [{port: 80}]}]
"""


@pytest.fixture(scope="module")
def whole_s(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long an undisturbed `up` takes on this machine."""
    with lab_of(tmp_path_factory.mktemp("lab"), "whole", CONFIG) as lab:
        start = time.monotonic()
        assert lab.up().returncode == 0
        return time.monotonic() - start


def kill_up(lab: Lab, after_s: float) -> None:
    kill(lab.arguments("up", str(lab.file)), after_s)


def kill(command: list[str], after_s: float) -> None:
    """Start a command, and kill -9 it after a while."""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after_s)
        process.kill()


# Moments spread over the whole of it, and a little past.
@pytest.mark.parametrize("part", [part / 7 for part in range(1, 9)])
def test_down_after_a_kill(tmp_path: Path, whole_s: float, part: float) -> None:
    links = host_links()
    with lab_of(tmp_path, "killed", CONFIG) as lab:
        kill_up(lab, whole_s * (part + random.uniform(-0.05, 0.05)))
        done = lab.weft("down")
        assert done.returncode == 0 or "no lab" in done.stderr
        assert lab.leftovers() == []
        assert host_links() == links


def supervisors(lab: Lab, node: str) -> list[int]:
    """Of a node; its Weft runs beside them."""
    found = []
    for pid in members(cgroup_root() / lab.name / "_system" / node):
        with contextlib.suppress(OSError):
            if b"mesh.lab.supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_up_after_kills(tmp_path: Path, whole_s: float) -> None:
    with lab_of(tmp_path, "again", CONFIG) as lab:
        for _ in range(5):
            kill_up(lab, whole_s * random.uniform(0.2, 0.9))
        done = lab.up()
        # The last kill may have come too late.
        assert done.returncode == 0 or "is up" in done.stderr
        status = json.loads(lab.weft("status", "-o", "json").stdout)
        assert all(pod["status"]["ready"] for pod in status["pods"])
        # Just one supervisor in each node, and one process in each pod.
        assert {len(supervisors(lab, node)) for node in "ab"} == {1}
        assert {len(members(pod["cgroup"])) for pod in status["pods"]} == {1}


def test_down_after_kills_of_down(tmp_path: Path, whole_s: float) -> None:
    with lab_of(tmp_path, "halfway", CONFIG) as lab:
        assert lab.up().returncode == 0
        for part in (0.2, 0.3, 0.4):
            kill(lab.arguments("down"), whole_s * part * random.uniform(0.8, 1.2))
        lab.weft("down")
        assert lab.leftovers() == []


def test_interrupted_up_removes_what_it_made(tmp_path: Path) -> None:
    config = CONFIG.replace("[sleep", '[sh, -c, "exec sleep 1000", x').replace(
        "replicas: 6", "replicas: 1, ports: [{port: 1}]"
    )
    with lab_of(tmp_path, "cut", config) as lab:
        with subprocess.Popen(
            lab.arguments("up", str(lab.file)), stderr=subprocess.PIPE
        ) as process:
            # Waiting for a port that never opens.
            until(lambda: '"Running"' in status_text(lab))
            process.send_signal(signal.SIGINT)
            assert process.wait(LIMIT_S) != 0
        assert lab.leftovers() == []


def status_text(lab: Lab) -> str:
    return lab.weft("status", "-o", "json").stdout


def test_only_one_makes_a_lab(tmp_path: Path) -> None:
    with lab_of(tmp_path, "once", CONFIG) as lab:
        starting = [
            subprocess.Popen(lab.arguments("up", str(lab.file)), stderr=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        told = [process.communicate(timeout=LIMIT_S)[1] for process in starting]
        assert sorted(process.returncode for process in starting) == [0, 1, 1]
        told.remove(next(text for text in told if "nodes" in text))
        assert all("another 'weft lab' command" in text or "is up" in text for text in told)
        assert lab.weft("status").returncode == 0


def test_a_lab_whose_supervisor_died_is_replaced(tmp_path: Path) -> None:
    with lab_of(tmp_path, "headless", CONFIG) as lab:
        assert lab.up().returncode == 0
        (pid,) = supervisors(lab, "a")
        os.kill(pid, signal.SIGKILL)
        until(lambda: not supervisors(lab, "a"))
        status = lab.weft("status")
        assert status.returncode == 1
        assert "False" in status.stdout
        assert lab.up().returncode == 0
        assert lab.weft("status").returncode == 0


@needs_bpf
def test_down_removes_what_a_killed_self_test_had_mounted(tmp_path: Path) -> None:
    with lab_of(tmp_path, "tested", CONFIG) as lab:
        assert lab.up().returncode == 0
        left = lab.run_dir / lab.name / "nodes" / "a.weft" / "proxy.selftest"
        pins.prepare(left)
        done = lab.weft("down")
        assert done.returncode == 0, done.stderr
        assert not os.path.ismount(left)
        assert lab.leftovers() == []
