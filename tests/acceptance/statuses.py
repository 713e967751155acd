"""The suite's status helpers: what each asks of an object's status.

A helper either returns or raises NotYet with what is missing; whoever calls it tries again until
its time is over. Written after the helpers of the same names in Gateway API v1.6.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Json = dict[str, Any]
GROUP = "gateway.networking.k8s.io"
SKIP_READINESS = "gateway-api/skip-this-for-readiness"
CONTROLLER = "weft.dev/gateway-controller"


class NotYet(Exception):
    """What an object's status does not say."""


class Objects(Protocol):
    """Where objects with their status come from."""

    def objects(self, kind: str, namespace: str = "", name: str = "") -> list[Json]: ...


Helper = Callable[[Objects, Json], None]


def fetch(source: Objects, kind: str, ident: Json) -> Json:
    found = source.objects(kind, ident.get("namespace", ""), ident["name"])
    if not found:
        raise NotYet(f"there is no {kind} {ident.get('namespace', '')}/{ident['name']}")
    return {"status": {}, **found[0]}


def has(conditions: list[Json], wanted: Json) -> bool:
    """An empty or absent status or reason stands for any."""
    return any(
        condition["type"] == wanted["type"]
        and wanted.get("status", "") in ("", condition["status"])
        and wanted.get("reason", "") in ("", condition["reason"])
        for condition in conditions
    )


def require(conditions: list[Json], wanted: list[Json], where: str) -> None:
    for condition in wanted:
        if not has(conditions, condition):
            seen = [
                f"{c['type']}={c['status']} ({c['reason']}: {c.get('message', '')})"
                for c in conditions
            ]
            raise NotYet(f"{where}: wanted {_text(condition)}, has {'; '.join(seen) or 'none'}")


def _text(condition: Json) -> str:
    reason = condition.get("reason") or "any reason"
    return f"{condition['type']}={condition.get('status') or 'any'} ({reason})"


def require_latest(obj: Json, conditions: list[Json], where: str) -> None:
    """Every condition is about the object's present generation."""
    generation = obj["metadata"].get("generation")
    for condition in conditions:
        if condition.get("observedGeneration") != generation:
            raise NotYet(
                f"{where}: {condition['type']} is about generation "
                f"{condition.get('observedGeneration')}, the object is at {generation}"
            )


def latest(source: Objects, kind: str, ident: Json) -> Json:
    """The object, once it has conditions and they are about its present generation."""
    obj = fetch(source, kind, ident)
    conditions = obj["status"].get("conditions", [])
    if not conditions:
        raise NotYet(f"{kind} {ident['name']} has no conditions")
    require_latest(obj, conditions, f"{kind} {ident['name']}")
    return obj


# --- Gateways ------------------------------------------------------------------------------------


def namespaces_must_be_ready(source: Objects, args: Json) -> None:
    for namespace in args["namespaces"]:
        for gateway in source.objects("Gateway", namespace):
            metadata = gateway["metadata"]
            if (metadata.get("annotations") or {}).get(SKIP_READINESS) == "true":
                continue
            conditions = gateway.get("status", {}).get("conditions", [])
            where = f"Gateway {metadata['name']}"
            require_latest(gateway, conditions, where)
            wanted = [{"type": kind, "status": "True"} for kind in ("Accepted", "Programmed")]
            require(conditions, wanted, where)


def gateway_class_accepted_any(source: Objects, args: Json) -> None:
    obj = latest(source, "GatewayClass", {"name": args["gwcName"]})
    require(obj["status"].get("conditions", []), [{"type": "Accepted"}], "GatewayClass")


def gateway_class_latest(source: Objects, args: Json) -> None:
    latest(source, "GatewayClass", args["gwcNN"])


def gateway_latest(source: Objects, args: Json) -> None:
    latest(source, "Gateway", args["gwNN"])


def gateway_condition(source: Objects, args: Json) -> None:
    gateway = latest(source, "Gateway", args["gwNN"])
    conditions = gateway["status"].get("conditions", [])
    require(conditions, [args["expectedCondition"]], f"Gateway {args['gwNN']['name']}")


def gateway_address(source: Objects, gateway: Json, listeners: list[str]) -> tuple[str, int]:
    """The first address in status, and the first listener's port (that of the first of the
    named ones)."""
    obj = latest(source, "Gateway", gateway)
    addresses = [item for item in obj["status"].get("addresses", []) if item.get("type")]
    if not addresses:
        raise NotYet(f"Gateway {gateway['name']} has no address in its status")
    specs = obj["spec"]["listeners"]
    port = next((spec["port"] for spec in specs if spec["name"] in listeners[:1]), specs[0]["port"])
    return addresses[0]["value"], port


def wait_for_gateway_address(source: Objects, args: Json) -> None:
    gateway_address(source, args["gwRef"]["gateway"], args["gwRef"]["listeners"])


def gateway_listener_conditions(source: Objects, args: Json) -> None:
    _listeners(source, "Gateway", args["gwName"], args["conditions"], [args["lName"]])


def gateway_listeners_conditions(source: Objects, args: Json) -> None:
    names = args.get("listenerNames", [])
    _listeners(source, "Gateway", args["gwName"], args["conditions"], names)


def listener_set_listeners_conditions(source: Objects, args: Json) -> None:
    latest(source, "ListenerSet", args["lsName"])
    names = args.get("listenerNames", [])
    _listeners(source, "ListenerSet", args["lsName"], args["conditions"], names)


def _listeners(
    source: Objects, kind: str, ident: Json, wanted: list[Json], names: list[str]
) -> None:
    """The listeners (the named ones, all without names) have these conditions."""
    listeners = fetch(source, kind, ident)["status"].get("listeners", [])
    for name in names:
        if name not in [listener["name"] for listener in listeners]:
            raise NotYet(f"{kind} {ident['name']} has no listener {name} in its status")
    for listener in listeners:
        if not names or listener["name"] in names:
            where = f"listener {listener['name']} of {kind} {ident['name']}"
            require(listener.get("conditions", []), wanted, where)


def gateway_zero_routes(source: Objects, args: Json) -> None:
    listeners = latest(source, "Gateway", args["gwName"])["status"].get("listeners", [])
    if len(listeners) > 1 or any(listener.get("attachedRoutes", 0) for listener in listeners):
        raise NotYet(f"Gateway {args['gwName']['name']} has routes: {listeners}")


def gateway_attached_listener_sets(source: Objects, args: Json) -> None:
    gateway = latest(source, "Gateway", args["gwName"])
    count = gateway["status"].get("attachedListenerSets", 0)
    if count != args["expectedCount"]:
        raise NotYet(
            f"Gateway {args['gwName']['name']} has {count} attached ListenerSets, "
            f"not {args['expectedCount']}"
        )


def gateway_listeners(source: Objects, args: Json) -> None:
    _match_listeners(latest(source, "Gateway", args["gwNN"]), args["listeners"])


def listener_set_listeners(source: Objects, args: Json) -> None:
    _match_listeners(latest(source, "ListenerSet", args["lsNN"]), args["listeners"])


def _match_listeners(obj: Json, wanted: list[Json]) -> None:
    """Status has exactly these listeners; each has at least these kinds and conditions."""
    actual = {listener["name"]: listener for listener in obj["status"].get("listeners", [])}
    name = obj["metadata"]["name"]
    if len(actual) != len(wanted):
        raise NotYet(f"{name}: listeners in status: {sorted(actual)}, wanted {len(wanted)}")
    for listener in wanted:
        got = actual.get(listener["name"])
        if got is None:
            raise NotYet(f"{name}: no listener {listener['name']} in status")
        where = f"listener {listener['name']} of {name}"
        kinds = {(kind.get("group", GROUP), kind["kind"]) for kind in got.get("supportedKinds", [])}
        expected = {(kind.get("group", GROUP), kind["kind"]) for kind in listener["supportedKinds"]}
        if not expected <= kinds or (kinds and not expected):
            raise NotYet(f"{where}: supportedKinds {sorted(kinds)}, wanted {sorted(expected)}")
        if got.get("attachedRoutes", 0) != listener["attachedRoutes"]:
            raise NotYet(
                f"{where}: attachedRoutes {got.get('attachedRoutes', 0)}, "
                f"wanted {listener['attachedRoutes']}"
            )
        require(got.get("conditions", []), listener["conditions"], where)


def listener_set_condition(source: Objects, args: Json) -> None:
    obj = latest(source, "ListenerSet", args["lsNN"])
    conditions = obj["status"].get("conditions", [])
    require(conditions, [args["expectedCondition"]], f"ListenerSet {args['lsNN']['name']}")


# --- routes --------------------------------------------------------------------------------------

_ACCEPTED = {"type": "Accepted", "status": "True", "reason": "Accepted"}


def gateway_and_routes_accepted(source: Objects, args: Json) -> None:
    gateway = args["gw"]
    gateway_address(source, gateway["gateway"], gateway["listeners"])
    kind = args.get("routeType", {}).get("$kind", "HTTPRoute")
    _routes_accepted(source, "Gateway", gateway["gateway"], kind, args["routeNNs"])


def routes_and_parent_accepted(source: Objects, args: Json) -> None:
    parent = args["resource"]
    kind = args["routeType"]["$kind"]
    _routes_accepted(source, parent["groupKind"]["kind"], parent["name"], kind, args["routeNNs"])


def _routes_accepted(
    source: Objects, parent_kind: str, parent: Json, route_kind: str, routes: list[Json]
) -> None:
    """Every route is accepted by the parent, and all listeners of the parent are in order."""
    expected = {
        "parentRef": {"group": GROUP, "kind": parent_kind, **parent},
        "controllerName": CONTROLLER,
        "conditions": [_ACCEPTED],
    }
    for ident in routes:
        route = fetch(source, route_kind, ident)
        other = ident["namespace"] != parent["namespace"]
        _match_parents(route, route_kind, [expected], namespace_required=other)
    wanted = [
        {"type": kind, "status": "True"} for kind in ("ResolvedRefs", "Accepted", "Programmed")
    ]
    _listeners(source, parent_kind, parent, wanted, [])


def route_parents(source: Objects, args: Json) -> None:
    route = fetch(source, "HTTPRoute", args["routeName"])
    parents = [{**parent, "controllerName": CONTROLLER} for parent in args["parents"]]
    _match_parents(route, "HTTPRoute", parents, namespace_required=args["namespaceRequired"])


def _match_parents(
    route: Json, kind: str, expected: list[Json], *, namespace_required: bool
) -> None:
    actual = route["status"].get("parents", [])
    where = f"{kind} {route['metadata']['name']}"
    for parent in actual:
        require_latest(route, parent.get("conditions", []), where)
    for wanted in expected:
        if not any(_parent_matches(wanted, parent, namespace_required) for parent in actual):
            raise NotYet(f"{where}: no parent in status like {wanted}; there are {actual}")


def _parent_matches(wanted: Json, actual: Json, namespace_required: bool) -> bool:
    ref, got = wanted["parentRef"], actual["parentRef"]
    if actual["controllerName"] != wanted["controllerName"] or got["name"] != ref["name"]:
        return False
    # An API server would have filled in the defaults of group and kind.
    if (got.get("group", GROUP), got.get("kind", "Gateway")) != (ref["group"], ref["kind"]):
        return False
    namespace = got.get("namespace")
    if namespace != ref.get("namespace") and (namespace_required or namespace is not None):
        return False
    return all(has(actual.get("conditions", []), condition) for condition in wanted["conditions"])


def route_condition(source: Objects, args: Json) -> None:
    _parent_condition(source, args, args["condition"])


def route_resolved_refs(source: Objects, args: Json) -> None:
    wanted = {"type": "ResolvedRefs", "status": "True", "reason": "ResolvedRefs"}
    _parent_condition(source, args, wanted)


def _parent_condition(source: Objects, args: Json, wanted: Json) -> None:
    """For the parent of this name, whatever its kind, the route has the condition."""
    route = fetch(source, "HTTPRoute", args["routeNN"])
    parents = route["status"].get("parents", [])
    where = f"HTTPRoute {args['routeNN']['name']}"
    for parent in parents:
        require_latest(route, parent.get("conditions", []), where)
    mine = [parent for parent in parents if _named(parent["parentRef"], args["gwNN"])]
    if not any(has(parent.get("conditions", []), wanted) for parent in mine):
        raise NotYet(f"{where}: wanted {_text(wanted)} of {args['gwNN']['name']}, has {mine}")


def _named(ref: Json, ident: Json) -> bool:
    return (
        ref["name"] == ident["name"]
        and ref.get("namespace", ident["namespace"]) == ident["namespace"]
    )


def mesh_routes_accepted(source: Objects, route: Json) -> None:
    """Every Service that is a parent of the route has accepted it with all its references. The
    suite leaves this to the requests."""
    metadata, kind = route["metadata"], route["kind"]
    found = fetch(source, kind, metadata)
    parents = found["status"].get("parents", [])
    where = f"{kind} {metadata['name']}"
    wanted = [_ACCEPTED, {"type": "ResolvedRefs", "status": "True", "reason": "ResolvedRefs"}]
    for parent in parents:
        require_latest(found, parent.get("conditions", []), where)
    for ref in route["spec"]["parentRefs"]:
        mine = [
            parent
            for parent in parents
            if parent["controllerName"] == CONTROLLER
            and _service_ref(parent["parentRef"], metadata) == _service_ref(ref, metadata)
        ]
        if not mine:
            raise NotYet(f"{where}: no parent in status like {ref}; there are {parents}")
        require(mine[0].get("conditions", []), wanted, where)


def _service_ref(ref: Json, route: Json) -> tuple[object, ...]:
    namespace = ref.get("namespace", route["namespace"])
    return (
        ref.get("group", GROUP),
        ref.get("kind", "Gateway"),
        namespace,
        *(ref.get(name) for name in ("name", "port", "sectionName")),
    )


def route_no_accepted_parents(source: Objects, args: Json) -> None:
    """No parent in status, or a single one that has not accepted the route."""
    route = fetch(source, "HTTPRoute", args["routeName"])
    parents = route["status"].get("parents", [])
    where = f"HTTPRoute {args['routeName']['name']}"
    if len(parents) > 1:
        raise NotYet(f"{where}: {len(parents)} parents in status")
    for parent in parents:
        require_latest(route, parent.get("conditions", []), where)
        require(parent.get("conditions", []), [{"type": "Accepted", "status": "False"}], where)


# --- policies ------------------------------------------------------------------------------------


def policy_condition(source: Objects, args: Json) -> None:
    policy = fetch(source, "BackendTLSPolicy", args["policyNN"])
    ancestors = policy["status"].get("ancestors", [])
    where = f"BackendTLSPolicy {args['policyNN']['name']}"
    for ancestor in ancestors:
        require_latest(policy, ancestor.get("conditions", []), where)
    mine = [ancestor for ancestor in ancestors if _named(ancestor["ancestorRef"], args["gwNN"])]
    if not any(has(ancestor.get("conditions", []), args["condition"]) for ancestor in mine):
        raise NotYet(f"{where}: wanted {_text(args['condition'])}, has {ancestors}")


def policy_latest(source: Objects, args: Json) -> None:
    policy = fetch(source, "BackendTLSPolicy", args["r"]["$live"]["name"])
    for ancestor in policy["status"].get("ancestors", []):
        require_latest(policy, ancestor.get("conditions", []), "BackendTLSPolicy")


HELPERS: dict[str, Helper] = {
    "NamespacesMustBeReady": namespaces_must_be_ready,
    "GWCMustHaveAcceptedConditionAny": gateway_class_accepted_any,
    "GatewayClassMustHaveLatestConditions": gateway_class_latest,
    "GatewayMustHaveLatestConditions": gateway_latest,
    "GatewayMustHaveCondition": gateway_condition,
    "WaitForGatewayAddress": wait_for_gateway_address,
    "GatewayListenerMustHaveConditions": gateway_listener_conditions,
    "GatewayListenersMustHaveConditions": gateway_listeners_conditions,
    "GatewayMustHaveZeroRoutes": gateway_zero_routes,
    "GatewayMustHaveAttachedListeners": gateway_attached_listener_sets,
    "GatewayStatusMustHaveListeners": gateway_listeners,
    "ListenerSetStatusMustHaveListeners": listener_set_listeners,
    "ListenerSetMustHaveCondition": listener_set_condition,
    "ListenerSetListenersMustHaveConditions": listener_set_listeners_conditions,
    "GatewayAndRoutesMustBeAccepted": gateway_and_routes_accepted,
    "GatewayAndHTTPRoutesMustBeAccepted": gateway_and_routes_accepted,
    "RoutesAndParentMustBeAccepted": routes_and_parent_accepted,
    "HTTPRouteMustHaveParents": route_parents,
    "HTTPRouteMustHaveCondition": route_condition,
    "HTTPRouteMustHaveResolvedRefsConditionsTrue": route_resolved_refs,
    "HTTPRouteMustHaveNoAcceptedParents": route_no_accepted_parents,
    "BackendTLSPolicyMustHaveCondition": policy_condition,
    "BackendTLSPolicyMustHaveLatestConditions": policy_latest,
}
