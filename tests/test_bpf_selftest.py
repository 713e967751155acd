"""The self-test: it passes here, leaves nothing, and fails where a fact does not hold."""

from __future__ import annotations

import json
import subprocess
import sys

from bpf_world import ROOT, TIMEOUT_S, loader, needs_bpf, new_cgroup

from bpf import selftest, selftest_pairs
from l7proxy.native import Native

STEERING = {
    "connect4",
    "connect6",
    "mapped",
    "getpeername4",
    "getpeername6",
    "udp4",
    "udp6",
    "refusal",
}


def failed(checks: list[selftest.Check]) -> dict[str, str]:
    assert [check.name for check in checks] == list(selftest.FACTS)
    assert all(check.ok == (not check.why) for check in checks)
    return {check.name: check.why for check in checks if not check.ok}


@needs_bpf
def test_this_kernel_passes_and_nothing_stays(tmp_path):
    with new_cgroup() as cgroup:
        assert failed(selftest.run(tmp_path, cgroup)) == {}
        assert not (cgroup / "selftest").exists()
    assert list(tmp_path.iterdir()) == []


def test_its_table_is_one():
    native = Native(selftest_pairs.table())
    for head, rule in ((selftest_pairs.REQUEST, 1), (selftest_pairs.DENIED, 0)):
        assert native.judge(head).rule == rule
        assert native.judge(head).size == (len(head) if rule else 0)
        assert native.judge(head[:-1]).rule == 0
        assert native.judge(head.replace(b"GET", b"PUT")).rule == 0


@needs_bpf
def test_what_a_killed_one_left_does_not_matter(tmp_path):
    with new_cgroup() as cgroup:
        left = cgroup / "selftest"
        left.mkdir()
        try:
            assert loader("--pin", tmp_path / "selftest", "--cgroup", left).returncode == 0
        finally:
            checks = selftest.run(tmp_path, cgroup)
    assert failed(checks) == {}
    assert list(tmp_path.iterdir()) == []


@needs_bpf
def test_no_cgroup(tmp_path):
    why = failed(selftest.run(tmp_path, tmp_path))
    assert why.pop("cgroup").startswith(f"{tmp_path} is not a directory of cgroup v2")
    assert set(why.values()) == {"not tried, because of cgroup"}
    assert len(why) == len(selftest.FACTS) - 1


@needs_bpf
def test_no_place_for_pins(tmp_path):
    (tmp_path / "selftest").mkdir()
    (tmp_path / "selftest" / "precious").touch()
    with new_cgroup() as cgroup:
        why = failed(selftest.run(tmp_path, cgroup))
        assert not (cgroup / "selftest").exists()
    assert "cgroup" not in why
    assert "selftest" in why["programs"]
    assert (tmp_path / "selftest" / "precious").exists()


@needs_bpf
def test_without_rights_every_check_says_why(tmp_path):
    tmp_path.chmod(0o755)
    with new_cgroup() as cgroup:
        done = subprocess.run(
            [sys.executable, "-m", "bpf.selftest", "--directory", tmp_path, "--cgroup", cgroup],
            cwd=ROOT,
            user=65534,
            group=65534,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert done.returncode == 1
    assert done.stderr == ""
    first, *others = done.stdout.splitlines()
    assert first.startswith("FAIL cgroup")
    assert first.endswith("Permission denied: it takes root")
    assert len(others) == len(selftest.FACTS) - 1
    assert all("not tried, because of cgroup" in line for line in others)


@needs_bpf
def test_the_probe_notices_that_nothing_is_steered():
    with new_cgroup() as cgroup:
        done = subprocess.run(
            [sys.executable, "-m", "bpf.selftest_probe", cgroup, cgroup, "/nowhere"],
            cwd=ROOT,
            input="serve\nsteered\ndetached\n",
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert (done.returncode, done.stderr) == (0, "")
    _, steered, detached = done.stdout.splitlines()
    answers = json.loads(steered)
    assert answers.keys() == STEERING
    assert all("unreachable" in why for why in answers.values())
    assert json.loads(detached) == {"detach": ""}
