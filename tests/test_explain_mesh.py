"""Explanations of requests in the mesh, on sections that the control plane makes of manifests."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.control import Options
from l7proxy.explain_mesh import explain_mesh
from l7proxy.explain_rules import Explanation
from tests.gateway_world import GATEWAY, World, join

SCENE = """
kind: Service
metadata: {name: cart, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, 'fd96::1']
  ports: [{name: http, port: 80, targetPort: 8080}, {name: tcp, port: 90}]
---
kind: Service
metadata: {name: cart-v2, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{name: http, port: 80}]}
---
kind: Service
metadata: {name: pods, namespace: shop}
spec: {clusterIP: None, ports: [{name: http, port: 8080}]}
---
kind: EndpointSlice
metadata: {name: cart-1, namespace: shop, labels: {kubernetes.io/service-name: cart}}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: tcp, port: 90}]
endpoints: [{addresses: [10.0.0.1], targetRef: {kind: Pod, name: cart-a}}]
---
kind: Pod
metadata: {name: cart-a, namespace: shop}
status: {podIP: 10.0.0.1}
---
kind: Pod
metadata: {name: client, namespace: shop}
status: {podIP: 10.0.0.2}
---
kind: Pod
metadata: {name: client, namespace: web}
status: {podIP: 10.0.0.3}
"""
PRODUCER = """
kind: HTTPRoute
metadata: {name: producer, namespace: shop}
spec:
  parentRefs: [{group: '', kind: Service, name: cart, port: 80}]
  rules:
  - matches: [{path: {value: /v2}}]
    backendRefs: [{name: cart-v2, port: 80}]
  - matches: [{path: {value: /old}}]
    filters: [{type: RequestRedirect, requestRedirect: {path:
      {type: ReplaceFullPath, replaceFullPath: /new}}}]
"""
CONSUMER = """
kind: HTTPRoute
metadata: {name: consumer, namespace: web}
spec:
  parentRefs: [{group: '', kind: Service, name: cart, namespace: shop}]
  rules: [{backendRefs: [{name: cart, namespace: shop, port: 80}]}]
"""


def world(*texts: str) -> World:
    result = World(Options(mesh_addresses=("127.0.0.1", "::1"), advertise=("192.0.2.10",)))
    result.apply(join(SCENE, *texts))
    return result


def ask(
    world: World, server: str = "cart.shop", path: str = "/", client: str = "shop", **other: Any
) -> Explanation:
    arguments = {"method": "GET", "scheme": "http", "port": 80, "host": server, "headers": ()}
    return explain_mesh(
        world.sections,
        client=(client, "client"),
        server=server,
        path=path,
        **arguments | other,  # type: ignore[arg-type]
    )


def backends(found: Explanation) -> list[tuple[str | None, tuple[str, ...], str]]:
    return [(one.cluster, one.endpoints, one.note) for one in found.backends]


OWN = ("cluster/Service/shop/cart/80", ("10.0.0.1:8080 (cart-a)",), "")


def test_without_a_route_its_own_endpoints_answer() -> None:
    found = ask(world())
    assert (found.service, found.listener, found.route) == ("shop/cart:80", "", "")
    assert "no route is attached" in found.way
    assert backends(found) == [OWN]


def test_producer_routes_are_for_everybody() -> None:
    for client in ("shop", "web"):
        found = ask(world(PRODUCER), path="/v2/x", client=client)
        assert found.listener == "Service/shop/cart/80"
        assert found.way.startswith("producer routes")
        assert (found.route, found.rule_index, found.status) == (
            "HTTPRoute/shop/producer",
            0,
            None,
        )
        assert backends(found) == [
            ("cluster/Service/shop/cart-v2/80", (), "503: no ready endpoints")
        ]
        assert [(one.rule, one.reason) for one in found.candidates] == [
            ("1", "path is /v2/x, not under /old")
        ]


def test_what_no_rule_is_for() -> None:
    found = ask(world(PRODUCER), path="/other")
    assert (found.status, found.detail) == (404, "no route matches")
    assert len(found.candidates) == 2


def test_redirects_go_to_the_port_that_was_asked_for() -> None:
    found = ask(world(PRODUCER), path="/old", host="cart.shop")
    assert (found.status, found.detail) == (302, "redirect to http://cart.shop/new")


def test_consumer_routes_come_instead_for_their_namespace() -> None:
    both = world(PRODUCER, CONSUMER)
    theirs = ask(both, path="/v2", client="web")
    assert theirs.listener == "Service/shop/cart/80/web"
    assert theirs.way == "consumer routes of namespace web"
    assert theirs.route == "HTTPRoute/web/consumer"
    assert backends(theirs) == [OWN]
    assert {one.reason for one in theirs.candidates} == {
        "namespace web has routes of its own to this Service, which come instead"
    }
    ours = ask(both, path="/v2")
    assert ours.route == "HTTPRoute/shop/producer"
    assert ours.candidates[-1].reason == "it is for clients of namespace web"
    alone = ask(world(CONSUMER))
    assert backends(alone) == [OWN]
    assert [one.reason for one in alone.candidates] == ["it is for clients of namespace web"]


@pytest.mark.parametrize(
    ("server", "client"),
    [
        ("cart", "shop"),
        ("cart.shop", "web"),
        ("cart.shop.svc", "web"),
        ("cart.shop.svc.cluster.local", "web"),
        ("cart.shop.svc.cluster.local.", "web"),
        ("10.96.0.1", "web"),
        ("fd96::1", "web"),
        ("FD96:0::1", "web"),
    ],
)
def test_names_and_addresses_of_a_service(server: str, client: str) -> None:
    found = ask(world(PRODUCER), server, "/v2", client, host="anything")
    assert (found.service, found.route) == ("shop/cart:80", "HTTPRoute/shop/producer")


@pytest.mark.parametrize(
    ("server", "port", "client", "detail"),
    [
        ("cart", 80, "web", "cart names no Service with a cluster IP for a pod of namespace web"),
        ("x.example.com", 80, "web", "names no Service"),
        ("pods.shop", 8080, "web", "names no Service"),
        ("cart.shop", 81, "web", "Service/shop/cart has no TCP port 81 (it has 80, 90)"),
        ("192.0.2.9", 80, "web", "nothing is known of 192.0.2.9 port 80"),
        ("192.0.2.10", 80, "web", "Gateway/default/gw listens there"),
        ("cart.shop", 80, "nowhere", "there is no pod nowhere/client"),
    ],
)
def test_what_leads_nowhere(server: str, port: int, client: str, detail: str) -> None:
    found = ask(world(GATEWAY), server, client=client, port=port)
    assert detail in found.detail
    assert not found.backends


def test_a_pod_that_is_asked_for_itself() -> None:
    found = ask(world(PRODUCER), "10.0.0.1", "/v2", port=8080)
    assert (found.service, found.route) == ("Pod/shop/cart-a:8080", "")
    assert found.way == "a pod is asked for itself: no routes count"
    assert backends(found) == [("Pod/shop/cart-a", ("10.0.0.1:8080",), "")]


def test_ports_that_are_not_http() -> None:
    found = ask(world(), port=90)
    assert found.way.startswith("the kernel connects to a backend")
    assert backends(found) == [("Service/shop/cart", ("10.0.0.1:90",), "")]
    empty = ask(
        world(
            "kind: Service\nmetadata: {name: e}\nspec: {clusterIP: 10.96.0.9, ports: [{port: 1}]}"
        ),
        "e.default",
        port=1,
    )
    assert backends(empty) == [
        ("Service/default/e", (), "connections are refused: no ready endpoints")
    ]
    assert ask(world(), port=90, scheme="https").backends


def test_requests_that_the_proxy_would_refuse() -> None:
    assert ask(world(), path="/%zz").status == 400
    assert ask(world(), scheme="https").status == 400
