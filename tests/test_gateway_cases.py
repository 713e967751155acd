"""The status assertions of Gateway API's own conformance cases, on the derivation alone.

`make acceptance` runs the cases whole, with traffic; this takes seconds and says where the
derivation is wrong. A case is followed up to its first step that only a runner can take.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from gateway.control import Options
from mesh.model.decode import KINDS, decode, key_of
from mesh.model.meta import ObjectKey
from tests.gateway_world import World, authority, conditions

SHARED = Path(__file__).parents[2] / "shared" / "gateway-api"
INFRA = "gateway-conformance-infra"
CONTROLLER = "weft.dev/gateway-controller"
MODELLED = {kind for _, kind in KINDS}

# What the suite makes in code (README.md of the shared folder); the names matter to no status.
SECRETS = [
    ("gateway-conformance-web-backend", "certificate"),
    (INFRA, "tls-validity-checks-certificate"),
    (INFRA, "tls-validity-checks-client-certificate"),
    (INFRA, "tls-checks-certificate"),
    (INFRA, "tls-checks-client-certificate"),
]
CONFIG_MAPS = [
    "web-backend-cm",
    "tls-validity-checks-ca-certificate",
    "tls-validity-checks-per-port-ca-certificate",
    "tls-checks-ca-certificate",
    "mismatch-ca-certificate",
]


def cases() -> list[Any]:
    if not (SHARED / "cases.json").exists():
        return []
    tests = json.loads((SHARED / "cases.json").read_text())["tests"]
    profiles = {"GATEWAY-HTTP", "GATEWAY-GRPC"}
    return [
        pytest.param(case, id=case["shortName"]) for case in tests if profiles & {*case["profiles"]}
    ]


class Runner:
    def __init__(self) -> None:
        # 198.51.100.0/24 plays the addresses that no host has.
        self.world = World(
            Options(addresses=("127.8.0.0/24",)), unbindable={"198.51.100.3": "no such address"}
        )
        self.raw: dict[tuple[str, ObjectKey], dict[str, Any]] = {}
        leaf = _leaf()
        for namespace, name in SECRETS:
            data = {"tls.crt": leaf.cert_chain_pems[0], "tls.key": leaf.private_key_pem}
            encoded = {key: base64.b64encode(pem.bytes()).decode() for key, pem in data.items()}
            self._put("Secret", namespace, name, {"type": "kubernetes.io/tls", "data": encoded})
        ca = {"data": {"ca.crt": authority().cert_pem.bytes().decode()}}
        for name in CONFIG_MAPS:
            self._put("ConfigMap", INFRA, name, ca)
        spec = {"spec": {"controllerName": CONTROLLER}}
        self.apply(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "GatewayClass",
                "metadata": {"name": "weft"},
                **spec,
            }
        )
        self.manifest("conformance/base/manifests.yaml")

    def _put(self, kind: str, namespace: str, name: str, rest: dict[str, Any]) -> None:
        metadata = {"namespace": namespace, "name": name}
        self.apply({"apiVersion": "v1", "kind": kind, "metadata": metadata, **rest})

    def manifest(self, path: str) -> None:
        text = (SHARED / path).read_text()
        for name, value in {
            "{GATEWAY_CLASS_NAME}": "weft",
            "{GATEWAY_CONTROLLER_NAME}": CONTROLLER,
            "PLACEHOLDER_UNUSABLE_ADDRS": "198.51.100.3",
            "PLACEHOLDER_USABLE_ADDRS": "127.8.0.77",
        }.items():
            text = text.replace(name, value)
        for raw in yaml.safe_load_all(text):
            if raw and raw["kind"] in MODELLED:
                self.apply(raw)

    def apply(self, raw: dict[str, Any]) -> None:
        """As the API server: the generation grows."""
        generation = raw["metadata"].get("generation", 0) + 1
        raw = {**raw, "metadata": {**raw["metadata"], "generation": generation}}
        obj = decode(raw)
        self.raw[obj.kind, key_of(obj)] = raw
        self.world.change({obj.kind: {key_of(obj): obj}})

    def patch(self, kind: str, key: ObjectKey, changes: list[dict[str, Any]]) -> None:
        raw = json.loads(json.dumps(self.raw[kind, key]))
        for change in changes:
            *path, last = (change.get("path") or change["append"]).split(".")
            place = raw
            for part in path:
                place = place[part]
            if "append" in change:
                place[last] = [*place[last], *change["values"]]
            else:
                place[last] = change["value"]
        self.apply(raw)

    # --- assertions --------------------------------------------------------------------------

    def status(self, kind: str, name: dict[str, str]) -> Any:
        namespace = "" if kind == "GatewayClass" else name.get("namespace", INFRA)
        return self.world.statuses[kind, ObjectKey(namespace, name["name"])]

    def check(self, fn: str, args: dict[str, Any]) -> None:
        kind = max((k for k in MODELLED if fn.startswith(k)), key=len, default="")
        if "MustBeAccepted" in fn:
            self._accepted(args)
        elif fn in ("HTTPRouteMustHaveCondition", "GRPCRouteMustHaveCondition"):
            holds(self._parent(kind, args["routeNN"], args["gwNN"]), [args["condition"]])
        elif fn == "HTTPRouteMustHaveResolvedRefsConditionsTrue":
            expected = [{"type": "ResolvedRefs", "status": "True"}]
            holds(self._parent(kind, args["routeNN"], args["gwNN"]), expected)
        elif fn == "HTTPRouteMustHaveParents":
            parents = self.status(kind, args["routeName"]).parents
            assert len(parents) == len(args["parents"])
            for parent, expected in zip(parents, args["parents"], strict=True):
                assert parent.parent_ref.namespace == expected["parentRef"]["namespace"]
                holds(parent, expected["conditions"])
        elif fn == "HTTPRouteMustHaveNoAcceptedParents":
            for parent in self.status(kind, args["routeName"]).parents:
                assert conditions(parent.conditions)["Accepted"].startswith("False")
        elif fn in ("GatewayMustHaveCondition", "ListenerSetMustHaveCondition"):
            name = args.get("gwNN") or args["lsNN"]
            holds(self.status(kind, name), [args["expectedCondition"]])
        elif fn.endswith("MustHaveLatestConditions"):
            name = next(iter(args.values()))
            self._latest(kind, name["$live"]["name"] if "$live" in name else name)
        elif fn.endswith("StatusMustHaveListeners"):
            self._listeners(self.status(kind, args.get("gwNN") or args["lsNN"]), args["listeners"])
        elif fn.endswith(("ListenerMustHaveConditions", "ListenersMustHaveConditions")):
            status = self.status(kind, args.get("gwName") or args["lsName"])
            for name in args.get("listenerNames") or [args["lName"]]:
                holds(listener(status, name), args["conditions"])
        elif fn == "GatewayMustHaveAttachedListeners":
            found = self.status(kind, args["gwName"]).attached_listener_sets
            assert found == args["expectedCount"]
        elif fn == "GatewayMustHaveZeroRoutes":
            found = self.status(kind, args["gwName"]).listeners
            assert [one.attached_routes for one in found] == [0] * len(found)
        elif fn == "BackendTLSPolicyMustHaveCondition":
            ancestors = self.status(kind, args["policyNN"]).ancestors
            (one,) = [a for a in ancestors if a.ancestor_ref.name == args["gwNN"]["name"]]
            holds(one, [args["condition"]])
        elif fn == "GWCMustHaveAcceptedConditionAny":
            assert conditions(self.status("GatewayClass", {"name": args["gwcName"]}).conditions)[
                "Accepted"
            ]
        elif fn == "WaitForGatewayAddress":
            assert self.status("Gateway", args["gwRef"]["gateway"]).addresses
        else:
            assert fn == "NamespacesMustBeReady", f"{fn} is not checked"

    def _accepted(self, args: dict[str, Any]) -> None:
        kind = args.get("routeType", {}).get("$kind", "HTTPRoute")
        parent = args["gw"]["gateway"] if args.get("gw") else args["resource"]["name"]
        for route in args["routeNNs"]:
            found = kind if (kind, key(route)) in self.world.statuses else "GRPCRoute"
            holds(self._parent(found, route, parent), [{"type": "Accepted", "status": "True"}])

    def _parent(self, kind: str, route: dict[str, str], parent: dict[str, str]) -> Any:
        found = [
            one for one in self.status(kind, route).parents if one.parent_ref.name == parent["name"]
        ]
        assert found, f"{route} has no parent {parent}"
        return found[0]

    def _latest(self, kind: str, name: dict[str, str]) -> None:
        status = self.status(kind, name)
        namespace = "" if kind == "GatewayClass" else name.get("namespace", INFRA)
        generation = self.raw[kind, ObjectKey(namespace, name["name"])]["metadata"]["generation"]
        parts = getattr(status, "ancestors", None) or getattr(status, "parents", None) or [status]
        for part in parts:
            assert {one.observed_generation for one in part.conditions} == {generation}

    def _listeners(self, status: Any, expected: list[dict[str, Any]]) -> None:
        assert len(status.listeners) == len(expected)
        for wanted in expected:
            found = listener(status, wanted["name"])
            holds(found, wanted["conditions"])
            assert found.attached_routes == wanted["attachedRoutes"]
            kinds = {one.kind for one in found.supported_kinds}
            asked = {one["kind"] for one in wanted["supportedKinds"]}
            assert asked <= kinds
            assert bool(asked) == bool(kinds)


def _leaf() -> trustme.LeafCert:
    return authority().issue_cert("example.org", "*.example.org")


def key(name: dict[str, str]) -> ObjectKey:
    return ObjectKey(name.get("namespace", INFRA), name["name"])


def listener(status: Any, name: str) -> Any:
    return next(one for one in status.listeners if one.name == name)


def holds(part: Any, expected: list[dict[str, str]]) -> None:
    found = {one.type: one for one in part.conditions}
    for wanted in expected:
        one = found[wanted["type"]]
        assert one.status == wanted["status"], one
        assert wanted.get("reason", "") in ("", one.reason), one


@pytest.mark.skipif(not cases(), reason="needs ../shared/gateway-api")
@pytest.mark.parametrize("case", cases())
def test_statuses(case: dict[str, Any]) -> None:
    runner = Runner()
    for path in case["manifests"]:
        runner.manifest(path)
    for step in case["steps"]:
        if step["op"] == "k8s_assert":
            runner.check(step["fn"], step["args"])
        elif step["op"] == "k8s_delete":
            found = step["object"]["metadata"]
            runner.world.delete(step["kind"], found["name"], found["namespace"])
        elif step["op"] == "k8s_patch" and "$" not in json.dumps(step["set"]):
            name = step["name"]
            namespace = "" if step["kind"] == "GatewayClass" else name.get("namespace", INFRA)
            runner.patch(step["kind"], ObjectKey(namespace, name["name"]), step["set"])
        elif step["op"] in ("custom", "k8s_patch", "k8s_apply"):
            return
