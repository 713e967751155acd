"""The acceptance runner's own pieces: what it compares must be able to fail."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from acceptance import statuses
from acceptance.cases import SHARED, Case, guarded, load_cases
from acceptance.client import Request, Response
from acceptance.exchange import Mismatch, check_known, compare, to_request, with_request_id
from acceptance.hand import STEPS
from acceptance.manifests import Ident, Manifests, assign, look_up
from acceptance.statuses import HELPERS, NotYet
from acceptance.steps import OPERATIONS, run_case
from acceptance.world import StepFailed

CASE = {
    "Request": {"Path": "/a?x=1", "Host": "h.test", "Headers": {"X-A": "1"}, "Method": "GET"},
    "Response": {"StatusCodes": [200], "Headers": {"X-R": "r"}, "AbsentHeaders": ["X-Gone"]},
    "Backend": "infra-backend-v1",
    "Namespace": "ns",
}
SEEN: dict[str, Any] = {
    "path": "/a?x=1",
    "host": "h.test",
    "method": "GET",
    "namespace": "ns",
    "pod": "infra-backend-v1-0123456789-00000",
    "headers": {"X-A": ["1"]},
}


def response(status: int = 200, **changes: Any) -> Response:
    headers = {"content-type": ["application/json"], "x-r": ["r"]}
    return Response(status, headers, json.dumps({**SEEN, **changes}).encode())


def request(case: dict[str, Any] = CASE) -> Request:
    return to_request(case, "127.0.0.1", 80, None)


def test_the_expected_exchange_passes() -> None:
    compare(CASE, request(), response())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "/a"}, "path"),
        ({"host": "other"}, "host"),
        ({"method": "POST"}, "method"),
        ({"namespace": "other"}, "namespace"),
        ({"pod": "infra-backend-v2-0-0"}, "pod"),
        ({"headers": {}}, "X-A"),
        ({"headers": {"X-A": ["1", "2"]}}, "X-A"),
    ],
)
def test_what_the_backend_saw_is_compared(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(Mismatch, match=said):
        compare(CASE, request(), response(**changes))


def test_status_and_response_headers_are_compared() -> None:
    with pytest.raises(Mismatch, match="status 404"):
        compare(CASE, request(), response(404))
    without = response()
    del without.headers["x-r"]
    with pytest.raises(Mismatch, match="X-R"):
        compare(CASE, request(), without)
    extra = response()
    extra.headers["x-gone"] = ["1"]
    with pytest.raises(Mismatch, match="X-Gone"):
        compare(CASE, request(), extra)


def test_headers_that_must_not_reach_the_backend() -> None:
    case = {**CASE, "ExpectedRequest": {"Request": CASE["Request"], "AbsentHeaders": ["x-a"]}}
    with pytest.raises(Mismatch, match="wanted none"):
        compare(case, request(), response())


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://h.test/a", ""),
        ("http://h.test:80/a", ""),
        ("/a", ""),
        ("https://h.test/a", "scheme"),
        ("http://other.test/a", "host"),
        ("http://h.test:8080/a", "port"),
        ("http://h.test/b", "path"),
    ],
)
def test_redirects_default_to_the_request(location: str, said: str) -> None:
    case = {**CASE, "Response": {"StatusCodes": [302]}, "RedirectRequest": {}}
    got = Response(302, {"location": [location]})
    if said:
        with pytest.raises(Mismatch, match=said):
            compare(case, request(), got)
    else:
        compare(case, request(), got)


def test_a_field_that_nothing_compares_is_an_error() -> None:
    check_known(CASE)
    with pytest.raises(Mismatch, match="Cookies"):
        check_known({**CASE, "Response": {"Cookies": []}})


def test_request_ids_differ_and_are_expected_at_the_backend() -> None:
    case = {**CASE, "ExpectedRequest": {"Request": {"Path": "/b"}}, "$request_id": True}
    one, two = with_request_id(case), with_request_id(case)
    assert one["Request"]["Path"] != two["Request"]["Path"]
    mark = one["Request"]["Path"].removeprefix("/a?x=1&")
    assert one["ExpectedRequest"]["Request"]["Path"] == f"/b?{mark}"


class Stored:
    """Objects as the gateway would show them."""

    def __init__(self, *objects: dict[str, Any]) -> None:
        self._objects = objects

    def objects(self, kind: str, namespace: str = "", name: str = "") -> list[dict[str, Any]]:
        return [
            obj
            for obj in self._objects
            if obj["kind"] == kind and name in ("", obj["metadata"]["name"])
        ]


GATEWAY: dict[str, Any] = {
    "kind": "Gateway",
    "metadata": {"name": "gw", "namespace": "ns", "generation": 2},
    "spec": {"listeners": [{"name": "a", "port": 80}, {"name": "b", "port": 8080}]},
    "status": {
        "addresses": [{"type": "IPAddress", "value": "127.64.0.1"}],
        "conditions": [
            {"type": "Accepted", "status": "True", "reason": "Accepted", "observedGeneration": 2}
        ],
        "listeners": [
            {
                "name": "a",
                "attachedRoutes": 1,
                "supportedKinds": [{"kind": "HTTPRoute"}],
                "conditions": [{"type": "Programmed", "status": "True", "reason": "Programmed"}],
            }
        ],
    },
}
IDENT = {"name": "gw", "namespace": "ns"}


def test_conditions_must_be_there_with_status_reason_and_generation() -> None:
    def check(obj: dict[str, Any], condition: dict[str, str]) -> None:
        args = {"gwNN": IDENT, "expectedCondition": condition}
        HELPERS["GatewayMustHaveCondition"](Stored(obj), args)

    check(GATEWAY, {"type": "Accepted", "status": "True", "reason": ""})
    for condition in (
        {"type": "Accepted", "status": "False"},
        {"type": "Accepted", "status": "True", "reason": "Other"},
        {"type": "Programmed", "status": "True"},
    ):
        with pytest.raises(NotYet):
            check(GATEWAY, condition)
    stale = copy.deepcopy(GATEWAY)
    stale["metadata"]["generation"] = 3
    with pytest.raises(NotYet, match="generation"):
        check(stale, {"type": "Accepted", "status": "True"})
    with pytest.raises(NotYet, match="no conditions"):
        check({**GATEWAY, "status": {}}, {"type": "Accepted"})


def test_listeners_in_status_are_compared_whole() -> None:
    wanted: dict[str, Any] = {
        "name": "a",
        "attachedRoutes": 1,
        "supportedKinds": [{"group": statuses.GROUP, "kind": "HTTPRoute"}],
        "conditions": [{"type": "Programmed", "status": "True", "reason": ""}],
    }

    def check(*listeners: dict[str, Any]) -> None:
        args = {"gwNN": IDENT, "listeners": list(listeners)}
        HELPERS["GatewayStatusMustHaveListeners"](Stored(GATEWAY), args)

    check(wanted)
    for wrong in (
        {"name": "b"},
        {"attachedRoutes": 2},
        {"supportedKinds": []},
        {"supportedKinds": [{"kind": "GRPCRoute"}]},
        {"conditions": [{"type": "Programmed", "status": "False"}]},
    ):
        with pytest.raises(NotYet):
            check({**wanted, **wrong})
    with pytest.raises(NotYet):
        check(wanted, {**wanted, "name": "b"})
    with pytest.raises(NotYet):
        check()


def test_address_and_port_of_a_gateway() -> None:
    source = Stored(GATEWAY)
    assert statuses.gateway_address(source, IDENT, []) == ("127.64.0.1", 80)
    assert statuses.gateway_address(source, IDENT, ["b", "a"]) == ("127.64.0.1", 8080)


def test_a_parent_must_have_accepted_the_route() -> None:
    parent: dict[str, Any] = {
        "parentRef": {"name": "gw"},
        "controllerName": statuses.CONTROLLER,
        "conditions": [
            {"type": "Accepted", "status": "True", "reason": "Accepted", "observedGeneration": 1}
        ],
    }

    def check(parents: list[dict[str, Any]]) -> None:
        route = {
            "kind": "HTTPRoute",
            "metadata": {"name": "r", "namespace": "ns", "generation": 1},
            "status": {"parents": parents},
        }
        args = {
            "gw": {"gateway": IDENT, "listeners": []},
            "routeNNs": [{"name": "r", "namespace": "ns"}],
        }
        gateway = copy.deepcopy(GATEWAY)
        gateway["status"]["listeners"][0]["conditions"] = [
            {"type": kind, "status": "True", "reason": "x"}
            for kind in ("ResolvedRefs", "Accepted", "Programmed")
        ]
        HELPERS["GatewayAndHTTPRoutesMustBeAccepted"](Stored(gateway, route), args)

    check([parent])
    for wrong in (
        [],
        [{**parent, "controllerName": "someone.else/controller"}],
        [{**parent, "parentRef": {"name": "other"}}],
        [{**parent, "parentRef": {"name": "gw", "kind": "ListenerSet"}}],
        [{**parent, "conditions": []}],
    ):
        with pytest.raises(NotYet):
            check(wrong)


def test_manifest_files_hold_exactly_what_was_put(tmp_path: Path) -> None:
    manifests = Manifests(tmp_path)
    one = {"kind": "A", "metadata": {"name": "x", "namespace": "n"}, "spec": {"l": [{"p": 1}]}}
    two = {"kind": "A", "metadata": {"name": "y"}}
    manifests.put("f", [one, two])
    ident = Ident("A", "n", "x")
    changed = manifests.get(ident)
    assign(changed, "data[ca.crt]", "pem")
    assert look_up(changed, "Data[ca.crt]") == "pem"
    manifests.apply("elsewhere", changed)
    assert manifests.get(ident)["data"] == {"ca.crt": "pem"}
    assert [path.name for path in tmp_path.iterdir()] == ["f.yaml"]
    manifests.delete(Ident("A", "", "y"))
    assert manifests.remove("f") == [ident]
    assert list(tmp_path.iterdir()) == []


async def test_a_step_that_nothing_handles_fails_its_case() -> None:
    case = Case("Some", (), (), (), ({"op": "custom", "why": "by hand"},))
    world: Any = type("World", (), {"generations": {}, "live": {}, "claimed": frozenset()})()
    with pytest.raises(StepFailed, match="nothing handles"):
        await run_case(world, case)
    with pytest.raises(StepFailed, match="no steps"):
        await run_case(world, Case("Some", (), (), (), ()))


def test_feature_guards() -> None:
    claimed = frozenset({"A"})
    assert guarded({}, claimed)
    assert guarded({"if": ["A", "not B"]}, claimed)
    assert not guarded({"if": ["B"]}, claimed)
    assert not guarded({"if": ["not A"]}, claimed)


@pytest.mark.skipif(not (SHARED / "cases.json").exists(), reason="no shared test data here")
def test_every_step_of_the_http_and_grpc_profiles_is_handled() -> None:
    wanted = {"GATEWAY-HTTP", "GATEWAY-GRPC"}
    cases = [case for case in load_cases() if wanted & set(case.profiles)]
    assert len(cases) > 60
    for case in cases:
        assert case.steps, case.name
        for number, step in enumerate(case.steps):
            if (case.name, number) in STEPS:
                continue
            assert step["op"] in OPERATIONS, (case.name, number)
            if step["op"] == "k8s_assert":
                assert step["fn"] in HELPERS, (case.name, number)
            if step["op"] in ("http_request", "tls_request"):
                check_known(step["case"])
