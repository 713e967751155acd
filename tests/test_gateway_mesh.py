"""Mesh routes: Services as parents of HTTPRoutes and GRPCRoutes (GAMMA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.control import ControlPlane, Options
from gateway.keys import RouteKey
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import ClusterSection, LoadBalancerEntry, ServiceSection
from mesh.model.routeconfig import RouteSection
from tests.gateway_world import GATEWAY, World, conditions, join, objects, plain

MESH = Options(node="n1", mesh_addresses=("127.0.0.1", "::1"), advertise=("192.0.2.10",))

CART = """
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: api, port: 81, targetPort: 8081}
  - {name: tcp, port: 90}
  - {name: dns, port: 53, protocol: UDP}
---
kind: Service
metadata: {name: cart-v2, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{name: http, port: 80}]}
---
kind: Service
metadata: {name: other, namespace: shop}
spec: {clusterIP: None, ports: [{name: http, port: 80}]}
---
kind: Service
metadata: {name: outside, namespace: shop}
spec: {type: ExternalName, externalName: x.example.com, ports: [{port: 80}]}
---
kind: Service
metadata: {name: young, namespace: shop}
spec: {ports: [{name: http, port: 80}]}
---
kind: Service
metadata: {name: six, namespace: shop}
spec: {clusterIP: 'fd96::6', ports: [{name: http, port: 80}]}
---
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.0.0.1]}]
"""
CART_SERVICE = "kind: Service, group: '', name: cart"


def route(
    name: str = "route",
    *,
    kind: str = "HTTPRoute",
    parent: str = CART_SERVICE,
    namespace: str = "shop",
    to: str = "{name: cart-v2, port: 80}",
    created: str = "2024-01-01T00:00:00Z",
    spec: str = "",
    annotations: str = "{}",
) -> str:
    return f"""
kind: {kind}
metadata: {{name: {name}, namespace: {namespace}, creationTimestamp: '{created}',
  annotations: {annotations}}}
spec: {{parentRefs: [{{{parent}}}], rules: [{{backendRefs: [{to}]}}]{spec}}}
"""


def world(*texts: str, options: Options = MESH, **more: Any) -> World:
    result = World(options, **more)
    result.apply(join(CART, *texts))
    return result


def said(
    world: World,
    name: str = "route",
    parent: int = 0,
    *,
    kind: str = "HTTPRoute",
    namespace: str = "shop",
) -> dict[str, str]:
    return conditions(world.status(kind, name, namespace).parents[parent].conditions)


def why(world: World, name: str = "route", parent: int = 0, *, namespace: str = "shop") -> str:
    found = world.status("HTTPRoute", name, namespace).parents[parent].conditions
    return str(next(one.message for one in found if one.type == "Accepted"))


def section(
    world: World, name: str = "route", kind: str = "HTTPRoute", namespace: str = "shop"
) -> RouteSection:
    found = world.sections[f"route/{kind}/{namespace}/{name}"]
    assert isinstance(found, RouteSection)
    return found


def attached(world: World, *args: str) -> dict[str, tuple[str, ...]]:
    return {one.listener: one.hostnames for one in section(world, *args).attachments}


def service(world: World, name: str = "cart", port: int = 80) -> ServiceSection:
    found = world.sections[f"service/shop/{name}/{port}"]
    assert isinstance(found, ServiceSection)
    return found


def entry(world: World, place: str) -> LoadBalancerEntry:
    found = world.sections[f"entry/{place}/TCP"]
    assert isinstance(found, LoadBalancerEntry)
    return found


# --- without routes -------------------------------------------------------------------------------


def test_the_proxys_ports_are_wanted() -> None:
    control = ControlPlane(MESH)
    outcome = control.apply({})
    assert outcome.ports == {(a, p) for a in ("127.0.0.1", "::1") for p in (15001, 15002)}
    assert {key: plain(one) for key, one in outcome.put.items() if key != "settings"} == {
        f"port/{address}|{port}": {
            "type": "mesh-port",
            "address": address,
            "port": port,
            "kind": kind,
        }
        for address in ("127.0.0.1", "::1")
        for port, kind in ((15001, "http"), (15002, "relay"))
    }
    assert control.apply({}).ports == outcome.ports
    assert ControlPlane(Options()).apply({}).ports == frozenset()


@pytest.mark.parametrize(
    ("addresses", "why"),
    [
        (("127.0.0.1", "127.0.0.2"), "one of each family"),
        (("0.0.0.0",), "cannot be sent there"),
        (("::", "127.0.0.1"), "cannot be sent there"),
        (("localhost",), "does not appear to be"),
    ],
)
def test_mesh_addresses_that_cannot_be_used(addresses: tuple[str, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ControlPlane(Options(mesh_addresses=addresses))


def test_a_service_that_speaks_http_is_routed_to_its_own_endpoints() -> None:
    found = world()
    assert sorted(found.of("service")) == [
        "service/shop/cart-v2/80",
        "service/shop/cart/80",
        "service/shop/six/80",
    ]
    assert plain(service(found)) == {
        "type": "service",
        "namespace": "shop",
        "name": "cart",
        "port": 80,
        "addresses": ["10.96.0.1"],
        "cluster": "cluster/Service/shop/cart/80",
    }
    cluster = found.sections["cluster/Service/shop/cart/80"]
    assert isinstance(cluster, ClusterSection)
    assert [one.address for one in cluster.endpoints] == ["10.0.0.1"]
    assert entry(found, "10.96.0.1|80").http
    assert not entry(found, "10.96.0.1|81").http


def test_what_only_the_name_says_holds_for_the_endpoints_too() -> None:
    """A port named grpc has HTTP/2 behind it."""
    found = world(
        "kind: Service\nmetadata: {name: g, namespace: shop}\n"
        "spec: {clusterIP: 10.96.0.9, ports: [{name: grpc, port: 70}]}"
    )
    cluster = found.sections[service(found, "g", 70).cluster]
    assert isinstance(cluster, ClusterSection)
    assert cluster.protocol == "h2c"


def test_routes_and_services_share_a_cluster() -> None:
    found = world(GATEWAY, route(parent="name: gw, namespace: default"))
    assert "cluster/Service/shop/cart-v2/80" in found.sections
    found.delete("HTTPRoute", "route", "shop")
    assert "cluster/Service/shop/cart-v2/80" in found.sections
    found.apply(route(parent="name: gw, namespace: default"))
    found.apply(CART.replace("{name: http, port: 80}", "{name: tcp, port: 80}"))
    assert "service/shop/cart-v2/80" not in found.sections
    assert found.of("cluster").keys() == {"cluster/Service/shop/cart/80"}


# --- attachment -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parent", "ports"),
    [
        (CART_SERVICE, [80, 81]),
        (f"{CART_SERVICE}, namespace: shop", [80, 81]),
        (f"{CART_SERVICE}, port: 80", [80]),
        (f"{CART_SERVICE}, sectionName: api", [81]),
        (f"{CART_SERVICE}, sectionName: api, port: 81", [81]),
        (f"{CART_SERVICE}, sectionName: api, port: 80", "NoMatchingParent has no TCP port"),
        (f"{CART_SERVICE}, sectionName: nothing", "NoMatchingParent has no TCP port named nothing"),
        (f"{CART_SERVICE}, port: 82", "NoMatchingParent it has 80 (http), 81 (api), 90 (tcp)"),
        (f"{CART_SERVICE}, port: 53", "NoMatchingParent is not TCP"),
        (f"{CART_SERVICE}, port: 90", "UnsupportedValue appProtocol: http"),
        ("kind: Service, group: '', name: gone", "NoMatchingParent does not exist"),
        ("kind: Service, group: '', name: cart, namespace: nowhere", "NoMatchingParent not exist"),
        ("kind: Service, group: '', name: other", "UnsupportedValue is headless"),
        ("kind: Service, group: '', name: outside", "UnsupportedValue ExternalName"),
        ("kind: Service, group: '', name: young", "Pending no cluster IP yet"),
    ],
)
def test_parents(parent: str, ports: Any) -> None:
    found = world(route(parent=parent))
    if isinstance(ports, str):
        reason, _, message = ports.partition(" ")
        assert said(found)["Accepted"] == f"False {reason}"
        assert message in why(found)
        assert not found.of("route")
        return
    assert said(found) == {"Accepted": "True", "ResolvedRefs": "True"}
    assert attached(found) == {f"Service/shop/cart/{port}": ("*",) for port in ports}
    assert [port for port in (80, 81) if f"service/shop/cart/{port}" in found.sections] == sorted(
        {80, *ports}
    )
    for port in (80, 81):
        if port in ports:
            assert service(found, port=port).producers
            assert entry(found, f"10.96.0.1|{port}").http
            assert entry(found, f"10.96.0.1|{port}").sockmap is (port == 80)


def test_without_a_mesh_services_are_no_parents() -> None:
    found = world(route(), options=Options())
    assert said(found)["Accepted"] == "False UnsupportedValue"
    assert "start Weft with --steer" in why(found)
    assert not found.of("route")


def test_a_family_without_a_mesh_address() -> None:
    options = Options(mesh_addresses=("127.0.0.1",))
    found = world(route(parent="kind: Service, group: '', name: six"), options=options)
    assert said(found)["Accepted"] == "False UnsupportedValue"
    assert "--mesh-address" in why(found)


def test_a_port_that_another_service_has() -> None:
    rival = """
kind: Service
metadata: {name: rival, namespace: shop, creationTimestamp: '2024-01-01T00:00:00Z'}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}
"""
    found = world(rival, route(parent="kind: Service, group: '', name: rival"))
    assert said(found)["Accepted"] == "False UnsupportedValue"
    assert "cluster IP 10.96.0.1 belongs to Service shop/cart, which comes first" in why(found)
    found.apply(CART.replace("name: cart, namespace: shop}", "name: mine, namespace: shop}"))
    found.delete("Service", "cart", "shop")
    found.delete("Service", "mine", "shop")
    assert said(found)["Accepted"] == "True"
    assert service(found, "rival").producers


def test_an_attached_route_follows_its_service() -> None:
    found = world(route(parent=f"{CART_SERVICE}, port: 81"))
    assert entry(found, "10.96.0.1|81").http
    found.apply(CART.replace("port: 81,", "port: 82,"))
    assert said(found)["Accepted"] == "False NoMatchingParent"
    assert not found.of("route")
    assert not entry(found, "10.96.0.1|82").http
    found.apply(CART)
    assert said(found)["Accepted"] == "True"
    found.delete("HTTPRoute", "route", "shop")
    assert not entry(found, "10.96.0.1|81").http
    assert "service/shop/cart/81" not in found.sections


def test_affinity_gives_way_to_a_route() -> None:
    sticky = CART.replace("clusterIP: 10.96.0.2", "clusterIP: 10.96.0.2, sessionAffinity: ClientIP")
    found = world(sticky)
    assert not entry(found, "10.96.0.2|80").http
    found.apply(route(parent="kind: Service, group: '', name: cart-v2"))
    assert entry(found, "10.96.0.2|80").http


def test_hostnames_do_not_count_and_that_is_said() -> None:
    found = world(route(spec=", hostnames: [a.example.com]"))
    assert set(attached(found).values()) == {("*",)}
    assert said(found)["Accepted"] == "True"
    assert "hostnames does not count" in why(found)


# --- producers and consumers ----------------------------------------------------------------------


def test_routes_of_other_namespaces_are_for_their_own_clients() -> None:
    parent = f"{CART_SERVICE}, namespace: shop, port: 80"
    own = route("own", parent=f"{CART_SERVICE}, port: 80")
    theirs = [
        route("theirs", parent=parent, namespace=namespace, to="{name: x, port: 80}")
        for namespace in ("web", "app")
    ]
    found = world(own, *theirs)
    assert attached(found, "own") == {"Service/shop/cart/80": ("*",)}
    assert attached(found, "theirs", "HTTPRoute", "web") == {"Service/shop/cart/80/web": ("*",)}
    assert service(found).producers
    assert service(found).consumers == ("app", "web")
    found.delete("HTTPRoute", "own", "shop")
    found.delete("HTTPRoute", "theirs", "app")
    assert not service(found).producers
    assert service(found).consumers == ("web",)


@pytest.mark.parametrize(
    ("spec", "parent", "resolved"),
    [
        ("", "", True),
        ("", "}, {name: gw, namespace: default", False),
        (", useDefaultGateways: All", "", False),
        (", useDefaultGateways: None", "", True),
    ],
)
def test_consumer_routes_need_no_grant_for_the_way_back(
    spec: str, parent: str, resolved: bool
) -> None:
    found = world(
        GATEWAY,
        route(
            parent=f"{CART_SERVICE}, namespace: shop{parent}",
            namespace="web",
            to="{name: cart, namespace: shop, port: 80}",
            spec=spec,
        ),
    )
    expected = "True" if resolved else "False RefNotPermitted"
    assert said(found, namespace="web")["ResolvedRefs"] == expected


def test_consumer_routes_need_a_grant_for_third_namespaces() -> None:
    third = CART.replace("namespace: shop", "namespace: third")
    to = "{name: cart, namespace: third, port: 80}"
    found = world(third, route(parent=f"{CART_SERVICE}, namespace: shop", namespace="web", to=to))
    assert said(found, namespace="web")["ResolvedRefs"] == "False RefNotPermitted"
    producer = world(third, route(to=to))
    assert said(producer)["ResolvedRefs"] == "False RefNotPermitted"


def test_several_routes_of_a_service_are_all_attached() -> None:
    found = world(route("a"), route("b", created="2024-01-02T00:00:00Z"))
    assert attached(found, "a") == attached(found, "b")
    assert section(found, "a").created < section(found, "b").created


def test_gateways_and_services_may_be_parents_at_once() -> None:
    gateway = GATEWAY.replace("HTTP}]", "HTTP, allowedRoutes: {namespaces: {from: All}}}]")
    found = world(
        gateway,
        route(
            parent=f"name: gw, namespace: default}}, {{{CART_SERVICE}, port: 80",
            spec=", hostnames: [a.example.com]",
        ),
    )
    assert attached(found) == {
        "Gateway/default/gw/http": ("a.example.com",),
        "Service/shop/cart/80": ("*",),
    }
    assert said(found, parent=0)["Accepted"] == said(found, parent=1)["Accepted"] == "True"
    assert found.attached("http") == 1
    parents = found.status("HTTPRoute", "route", "shop").parents
    assert [one.parent_ref.kind for one in parents] == ["Gateway", "Service"]


# --- HTTPRoutes and GRPCRoutes --------------------------------------------------------------------


def test_grpc_routes_come_before_http_routes_on_a_port() -> None:
    """Unlike on a Gateway's listener, whichever is older."""
    grpc = route("rpc", kind="GRPCRoute", parent=f"{CART_SERVICE}, port: 81")
    old = route("old", created="2020-01-01T00:00:00Z")
    only = route("only", parent=f"{CART_SERVICE}, port: 81")
    found = world(old, only)
    assert said(found, "only")["Accepted"] == "True"
    found.apply(grpc)
    assert attached(found, "rpc", "GRPCRoute") == {"Service/shop/cart/81": ("*",)}
    assert said(found, "rpc", kind="GRPCRoute")["Accepted"] == "True"
    # On its other port it is served as before.
    assert said(found, "old")["Accepted"] == "True"
    assert attached(found, "old") == {"Service/shop/cart/80": ("*",)}
    assert said(found, "only")["Accepted"] == "False Conflicted"
    assert "GRPCRoute shop/rpc is attached to this Service port" in why(found, "only")
    found.delete("GRPCRoute", "rpc", "shop")
    assert said(found, "only")["Accepted"] == "True"


def test_producer_and_consumer_routes_do_not_conflict() -> None:
    grpc = route(
        "rpc", kind="GRPCRoute", parent=f"{CART_SERVICE}, namespace: shop", namespace="web"
    )
    found = world(route(), grpc)
    assert said(found)["Accepted"] == "True"
    assert said(found, "rpc", kind="GRPCRoute", namespace="web")["Accepted"] == "True"


def test_grpc_routes_send_http2() -> None:
    found = world(route("rpc", kind="GRPCRoute", to="{name: cart, port: 80}"))
    rules = section(found, "rpc", "GRPCRoute").rules
    assert rules[0].backends[0].cluster == "cluster/Service-grpc/shop/cart/80"
    assert service(found).cluster == "cluster/Service/shop/cart/80"
    assert found.of("cluster").keys() >= {service(found).cluster, rules[0].backends[0].cluster}


# --- rules ----------------------------------------------------------------------------------------


def test_rules_that_are_refused_answer_500() -> None:
    rules = (
        "kind: HTTPRoute\nmetadata: {name: route, namespace: shop}\nspec:\n"
        f"  parentRefs: [{{{CART_SERVICE}, port: 80}}]\n"
        "  rules:\n  - filters: [{type: ExtensionRef, extensionRef:"
        " {group: example.com, kind: X, name: x}}]\n"
        "    backendRefs: [{name: cart-v2, port: 80}]\n"
    )
    found = world(rules)
    assert said(found)["Accepted"] == "False UnsupportedValue"
    assert "requests get 500" in why(found)
    # Else they would reach the Service as if nobody had wanted to change anything.
    assert service(found).producers
    assert [one.error_status for one in section(found).rules] == [500]


def test_clients_are_named_in_headers_where_a_route_asks_for_it() -> None:
    for value, expected in (("'true'", True), ("'false'", False), ("'yes'", False)):
        found = world(route(annotations=f"{{weft.dev/client-headers: {value}}}"))
        assert section(found).client_headers is expected


# --- what the data plane says ---------------------------------------------------------------------


def test_accepted_only_where_the_proxy_listens() -> None:
    found = world(route())
    found.answer = False
    found.change({}, binds={("127.0.0.1", 15001): None})
    assert said(found)["Accepted"] == "Unknown Pending"
    assert "waiting for port 15001 of the mesh address 127.0.0.1" in why(found)
    found.change({}, binds={("127.0.0.1", 15001): ""})
    assert said(found)["Accepted"] == "True"
    found.change({}, binds={("127.0.0.1", 15001): "in use by nginx"})
    assert said(found)["Accepted"] == "False PortUnavailable"
    assert "cannot listen on port 15001 of the mesh address 127.0.0.1: in use" in why(found)


def test_only_the_families_of_a_service_count() -> None:
    found = world(
        route(),
        route("six", parent="kind: Service, group: '', name: six"),
        unbindable={"::1": "no IPv6 here"},
    )
    assert said(found)["Accepted"] == "True"
    assert said(found, "six")["Accepted"] == "False PortUnavailable"


@pytest.mark.parametrize(
    "key",
    [
        "service/shop/cart/80",
        "entry/10.96.0.1|80/TCP",
        "port/127.0.0.1|15001",
        "route/HTTPRoute/shop/route",
    ],
)
def test_refusals(key: str) -> None:
    found = world(route(parent=f"{CART_SERVICE}, port: 80"))
    found.refuse(key, "it is odd")
    assert said(found)["Accepted"] == "False UnsupportedValue"
    assert "it is odd" in why(found)
    assert service(found).producers
    found.refuse(key, None)
    assert said(found)["Accepted"] == "True"


@pytest.mark.parametrize(
    ("address", "port", "ours"),
    [
        ("0.0.0.0", 15001, True),
        ("127.0.0.1", 15002, True),
        ("192.0.2.1", 15001, False),
        ("0.0.0.0", 15003, False),
    ],
)
def test_gateways_keep_off_the_meshs_ports(address: str, port: int, ours: bool) -> None:
    options = Options(mesh_addresses=("127.0.0.1",), bind_address=address)
    found = World(options)
    found.apply(GATEWAY.replace("port: 80", f"port: {port}"))
    listener = found.listener("http")
    assert listener["Accepted"] == ("False PortUnavailable" if ours else "True")
    assert ((address, port) in found.bound) is (not ours or address == "127.0.0.1")
    if ours:
        assert "is the mesh's" in found.message("Gateway", "gw", "Accepted", "http")


# --- the conformance suite's manifests -----------------------------------------------------------

SHARED = Path(__file__).parents[2] / "shared/gateway-api/conformance"
MANIFESTS = sorted(SHARED.glob("tests/mesh/*.yaml"))


@pytest.mark.skipif(not MANIFESTS, reason="needs ../shared/gateway-api")
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_routes_of_the_suite_are_accepted(path: Path) -> None:
    found = World(MESH)
    ours = ("Namespace", "Service", "HTTPRoute", "GRPCRoute")
    for text in (SHARED / "mesh/manifests.yaml", path):
        for number, raw in enumerate(yaml.safe_load_all(text.read_text())):
            if raw and raw["kind"] in ours:
                if raw["kind"] == "Service":  # an API server gives it one
                    raw["spec"]["clusterIP"] = f"10.96.1.{number}"
                found.apply(yaml.safe_dump(raw))
    routes = [status for (kind, _), status in found.statuses.items() if kind.endswith("Route")]
    assert routes
    for status in routes:
        for parent in status.parents:
            assert conditions(parent.conditions) == {"Accepted": "True", "ResolvedRefs": "True"}
    # Ports that speak something else are left alone, whatever is attached to their Service.
    assert not [key for key in found.of("service") if key.endswith(("/443", "/9090"))]


# --- features and cost ----------------------------------------------------------------------------


def test_mesh_features_are_announced_where_there_is_a_mesh() -> None:
    def names(options: Options) -> list[str]:
        status = World(options).status("GatewayClass", "weft", "")
        return [one.name for one in status.supported_features]

    without, with_mesh = names(Options()), names(MESH)
    assert sorted(with_mesh) == with_mesh
    assert set(with_mesh) - set(without) == {
        "Mesh",
        "MeshClusterIPMatching",
        "MeshConsumerRoute",
        "MeshHTTPRouteBackendRequestHeaderModification",
        "MeshHTTPRouteNamedRouteRule",
        "MeshHTTPRouteQueryParamMatching",
        "MeshHTTPRouteRedirectPath",
        "MeshHTTPRouteRedirectPort",
        "MeshHTTPRouteRewritePath",
        "MeshHTTPRouteSchemeRedirect",
    }
    assert not any(name.startswith("Mesh") for name in without)


def test_an_added_mesh_route_costs_its_own_work_only() -> None:
    def added(there: int) -> dict[str, int]:
        found = world(*(route(f"r{number}") for number in range(there)))
        new = objects(route("new"))["HTTPRoute"][ObjectKey("shop", "new")]
        key = RouteKey("HTTPRoute", "shop", "new")
        changed = found.control._derivation.apply({"Route": {key: new}})
        return {table: len(changes) for table, changes in changed.items()}

    few, many = added(2), added(100)
    assert few == many
    assert set(few) <= {
        *("Route", "parents", "translations", "candidates", "attached", "routes", "sections"),
        "route_status",
    }
