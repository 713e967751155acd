"""The mesh part of the acceptance runner: what it compares must be able to fail."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from acceptance import outcomes, run_mesh
from acceptance.cases import SHARED, Case, load_cases, load_objects
from acceptance.client import Request, Response
from acceptance.exchange import Mismatch, check_known, grpc_method
from acceptance.mesh_cases import MESH, load_mesh_cases
from acceptance.mesh_exchange import compare_mesh, completed, split_host, to_mesh_request
from acceptance.mesh_lab import NODES, deployment_of, lab_config, why_not
from acceptance.mesh_own import own_mesh_cases
from acceptance.mesh_steps import OPERATIONS, PROTOCOLS
from acceptance.outcomes import FAIL, NOT_SUPPORTED, PASS, Outcome, failed, summary
from acceptance.shares import wrong_shares
from acceptance.statuses import CONTROLLER, NotYet, mesh_routes_accepted
from lab_world import needs_root, processes_with

from mesh.lab.cgroups import cgroup_root
from mesh.lab.config import read_config
from mesh.lab.plan import make_plan
from mesh.model.decode import decode

needs_data = pytest.mark.skipif(
    not (SHARED / "cases.json").exists(), reason="no shared test data here"
)

CASE = {
    "Request": {"Path": "/a?x=1", "Host": "echo", "Headers": {"X-A": "1"}, "Method": "GET"},
    "Response": {"StatusCodes": [200]},
    "Backend": "echo-v1",
}
SEEN: dict[str, Any] = {
    "path": "/a?x=1",
    "host": "echo",
    "method": "GET",
    "namespace": "ns",
    "pod": "echo-v1-1",
    "headers": {"X-A": ["1"], "Connection": ["close"]},
}


def compare(case: dict[str, Any], **changes: Any) -> None:
    complete = completed(case, "ns")
    request = to_mesh_request(complete, socket.AF_INET)
    body = json.dumps({**SEEN, **changes}).encode()
    compare_mesh(complete, request, Response(200, {"content-type": ["application/json"]}, body))


def test_the_expected_exchange_passes() -> None:
    compare(CASE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "/a"}, "path"),
        ({"host": "echo-v1"}, "host"),
        ({"namespace": "other"}, "namespace"),
        ({"pod": "echo-v2-1"}, "pod"),
        ({"headers": {}}, "X-A"),
        ({"headers": {"X-A": ["1"], "Via": ["1.1 proxy"]}}, "via"),
    ],
)
def test_what_a_case_leaves_open_is_compared_too(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Mismatch, match=said):
        compare(CASE, **changes)


def test_an_expected_request_keeps_the_host_that_was_sent() -> None:
    case = {**CASE, "ExpectedRequest": {"Request": {"Path": "/b", "Headers": {"X-B": "2"}}}}
    headers = {"X-A": ["1"], "X-B": ["2"]}
    compare(case, path="/b", headers=headers)
    with pytest.raises(Mismatch, match="host"):
        compare(case, path="/b", headers=headers, host="echo-v1")


def test_the_namespace_is_that_of_the_service_asked_for() -> None:
    def namespace(host: str) -> str:
        return str(completed({"Request": {"Host": host}}, "ns")["Namespace"])

    assert namespace("echo") == "ns"
    assert namespace("echo-v1:8080") == "ns"
    assert namespace("echo.other") == "other"
    assert namespace("echo.other.svc.cluster.local:80") == "other"
    assert completed({"Request": {}, "Namespace": "given"}, "ns")["Namespace"] == "given"


def test_a_host_header_is_sent_to_the_service_that_the_case_names() -> None:
    case = {"Request": {"Host": "echo-v2:8080", "Headers": {"Host": "echo-v1"}}}
    complete = completed(case, "ns")
    request = to_mesh_request(complete, socket.AF_INET6)
    assert request == Request("echo-v2", 8080, "GET", "/", "echo-v1", (), family=socket.AF_INET6)
    assert complete["ExpectedRequest"]["Request"]["Host"] == "echo-v1"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("echo", ("echo", 80)),
        ("echo.ns:8080", ("echo.ns", 8080)),
        ("10.0.0.1:8080", ("10.0.0.1", 8080)),
        ("[fd00::1]:8080", ("fd00::1", 8080)),
        ("[fd00::1]", ("fd00::1", 80)),
    ],
)
def test_authorities(text: str, parts: tuple[str, int]) -> None:
    assert split_host(text) == parts


def test_redirects_default_to_the_service_asked_for() -> None:
    case = {
        "Request": {"Host": "echo", "Path": "/port"},
        "Response": {"StatusCodes": [302]},
        "RedirectRequest": {"Port": "8083"},
    }
    complete = completed(case, "ns")
    request = to_mesh_request(complete, 0)

    def redirected(location: str) -> None:
        compare_mesh(complete, request, Response(302, {"location": [location]}))

    redirected("http://echo:8083/port")
    for wrong in ("http://echo/port", "http://echo-v1:8083/port", "http://echo:8083/"):
        with pytest.raises(Mismatch):
            redirected(wrong)


ROUTE: dict[str, Any] = {
    "kind": "HTTPRoute",
    "metadata": {"name": "r", "namespace": "ns", "generation": 2},
    "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "echo", "port": 80}]},
}


class Stored:
    def __init__(self, route: dict[str, Any]) -> None:
        self._route = route

    def objects(self, kind: str, namespace: str = "", name: str = "") -> list[dict[str, Any]]:
        return [self._route] if kind == "HTTPRoute" else []


def test_a_service_must_have_accepted_the_route() -> None:
    ref = ROUTE["spec"]["parentRefs"][0]
    conditions = [
        {"type": kind, "status": "True", "reason": kind, "observedGeneration": 2}
        for kind in ("Accepted", "ResolvedRefs")
    ]
    good = {"parentRef": ref, "controllerName": CONTROLLER, "conditions": conditions}

    def check(*parents: dict[str, Any]) -> None:
        status = {"parents": copy.deepcopy(parents)}
        mesh_routes_accepted(Stored({**ROUTE, "status": status}), ROUTE)

    check(good)
    check({**good, "parentRef": {**ref, "namespace": "ns"}})
    stale = [{**conditions[0], "observedGeneration": 1}, conditions[1]]
    for wrong in (
        {"parentRef": {**ref, "port": 8080}},
        {"parentRef": {**ref, "kind": "Gateway"}},
        {"parentRef": {**ref, "namespace": "other"}},
        {"controllerName": "someone.else/controller"},
        {"conditions": conditions[:1]},
        {"conditions": stale},
        {"conditions": [{**conditions[0], "status": "False"}, conditions[1]]},
    ):
        with pytest.raises(NotYet):
            check({**good, **wrong})
    with pytest.raises(NotYet):
        check()


def test_shares_must_be_near_their_weights() -> None:
    step = {"weights": {"a": 0.7, "b": 0.3, "c": 0.0}, "total_requests": 100, "tolerance": 0.05}
    assert not wrong_shares(Counter(a=72, b=28), step)
    for counts in ({"a": 80, "b": 20}, {"a": 70, "b": 29, "c": 1}, {"a": 70, "d": 30}):
        assert wrong_shares(Counter(counts), step)


def test_the_summary_counts_mesh_tests_that_are_in_no_profile() -> None:
    def outcome(result: str, *profiles: str, own: bool = False) -> Outcome:
        return Outcome("T", profiles, result, "", 0.0, own, mesh=True)

    some = [
        outcome(PASS, "MESH-HTTP", "MESH-GRPC"),
        outcome(FAIL, "MESH-HTTP", own=True),
        outcome(NOT_SUPPORTED),
    ]
    assert summary(some) == [
        "MESH-HTTP 1/2 (1 FAIL, 1 with steps of our own)",
        "MESH-GRPC 1/1",
        "MESH, in no profile 0/1 (1 not supported)",
    ]
    assert failed(some)
    assert not failed([outcome(FAIL, "MESH-GRPC"), outcome(FAIL), outcome(PASS, "MESH-HTTP")])


async def test_what_goes_wrong_in_a_test_fails_it() -> None:
    async def attempt() -> None:
        raise Mismatch("seen")

    case = Case("T", ("MESH-HTTP",), ("Mesh",), (), ())
    outcome = await outcomes.of_running(case, attempt)
    assert (outcome.result, outcome.detail, outcome.mesh) == (FAIL, "seen", True)


@needs_data
def test_every_mesh_test_of_the_suite_has_steps_that_are_handled() -> None:
    cases = load_mesh_cases()
    assert len(cases) == 22
    assert sum("MESH-HTTP" in case.profiles for case in cases) == 14
    assert sum("MESH-GRPC" in case.profiles for case in cases) == 2
    for case in cases:
        assert case.steps, case.name
        # Without objects or manifests, and with a route to test, it would pass without the route.
        assert case.all_objects({}) or case.name == "MeshBasic"
        for step in case.steps:
            assert step["op"] in OPERATIONS, case.name
            asked = step.get("case") or step["sender"]["case"]
            if step["op"] == "mesh_request":
                check_known(asked)
            elif step["op"] == "grpc_request":
                grpc_method(asked)


@needs_data
def test_mesh_tests_of_the_data_are_run_as_they_are() -> None:
    ours = {case.name: case for case in load_mesh_cases()}
    given = [case for case in load_cases() if case.mesh]
    assert len(given) == 11
    for case in given:
        assert not ours[case.name].own
        assert ours[case.name].profiles == case.profiles
        assert ours[case.name].features == case.features
        if case.steps:
            assert ours[case.name] == case


def test_mesh_tests_beyond_the_suite_have_steps_that_are_handled() -> None:
    for case in own_mesh_cases():
        assert case.own
        assert case.mesh
        assert {step["op"] for step in case.steps} <= set(OPERATIONS), case.name
        for step in case.steps:
            if step["op"] == "mesh_request":
                check_known(step["case"])
            else:
                assert step["protocol"] in PROTOCOLS


@needs_data
def test_objects_of_our_own_are_valid_and_meshed() -> None:
    for case in (*load_mesh_cases(), *own_mesh_cases()):
        for obj in case.objects:
            decode(obj)
            assert obj["metadata"]["namespace"].startswith(MESH)
            assert {ref["kind"] for ref in obj["spec"]["parentRefs"]} == {"Service"}
            assert "infra" not in json.dumps(obj)
        assert "infra" not in json.dumps(case.steps)


@needs_data
def test_the_lab_has_a_pod_of_each_deployment_on_each_node(tmp_path: Path) -> None:
    objects = load_objects(SHARED / "conformance/mesh/manifests.yaml", {})
    file = tmp_path / "lab.yaml"
    file.write_text(json.dumps(lab_config(objects, tmp_path, tmp_path)))
    plan = make_plan(read_config(file), "test", tmp_path, Path("/sys/fs/cgroup"))
    where = {(pod.namespace, deployment_of(pod.name), pod.node) for pod in plan.pods}
    deployments = {
        (obj["metadata"]["namespace"], obj["metadata"]["name"])
        for obj in objects
        if obj["kind"] == "Deployment"
    }
    assert where == {(*deployment, node) for deployment in deployments for node in NODES}
    assert len(plan.pods) == len(where)
    echo = next(service for service in plan.services if service.name == "echo")
    http = echo.ports[0]
    assert (http.name, http.port, http.target_port, http.app_protocol) == ("http", 80, 8080, "http")
    assert sum(echo.selects(pod) for pod in plan.pods) == 4
    sample = next(pod for pod in plan.pods if pod.name == "echo-v1-1")
    assert f"--crt={tmp_path}/cert.crt" in sample.command
    assert os.path.isdir(sample.env["PYTHONPATH"])


@needs_data
@needs_root
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "")
async def test_cases_are_run_in_a_lab_that_leaves_nothing() -> None:
    named = {case.name: case for case in load_mesh_cases()}
    ports = named["MeshPorts"]
    # The same requests without the route: what they expect must not come true by itself.
    without = dataclasses.replace(ports, name="without", manifests=(), objects=())
    claims_more = dataclasses.replace(ports, name="more", features=("Mesh", "MeshOfTomorrow"))
    args = argparse.Namespace(wait=1.0, verbose=False, source="directory")
    # pytest's own directories have names too long for sockets.
    with tempfile.TemporaryDirectory(prefix="weft-test-") as scratch:
        found = await run_mesh.run(
            [named["MeshBasic"], ports, without, claims_more], args, Path(scratch)
        )
        assert [(one.test, one.result) for one in found] == [
            ("MeshBasic", PASS),
            ("MeshPorts", PASS),
            ("without", FAIL),
            ("more", NOT_SUPPORTED),
        ], found
        assert "X-Header-Set" in found[2].detail
        assert list((Path(scratch) / "lab").iterdir()) == []
        assert processes_with(scratch) == []
    lab = f"accept-{os.getpid()}"
    assert [*Path("/run/netns").glob(f"weft.{lab}.*"), *cgroup_root().glob(lab)] == []
