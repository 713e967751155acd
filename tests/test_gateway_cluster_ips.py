"""Which of the cluster IPs that Services ask for they have, and what is said of the others."""

from __future__ import annotations

import itertools

import pytest

from gateway.control import Options
from tests.gateway_world import GATEWAY, World, join

MESH = Options(node="n1", mesh_addresses=("192.0.2.1", "2001:db8::1"), advertise=("192.0.2.1",))
NODE = """
kind: Node
metadata: {name: n2}
status: {addresses: [{type: InternalIP, address: 10.1.0.2}, {type: ExternalIP, address: 10.1.0.3}]}
"""
POD = """
kind: Pod
metadata: {name: p, namespace: shop}
spec: {nodeName: n1}
status: {podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: 'fd00:0::1'}]}
"""


def service(name: str, *addresses: str, port: int = 80, created: str = "2024-01-01") -> str:
    asked = ", ".join(f"'{one}'" for one in addresses)
    return f"""
kind: Service
metadata: {{name: {name}, creationTimestamp: '{created}T00:00:00Z'}}
spec: {{clusterIP: '{addresses[0]}', clusterIPs: [{asked}], ports: [{{name: http, port: {port}}}]}}
"""


def world(*texts: str) -> World:
    result = World(MESH)
    result.apply(join(*texts))
    return result


def frontends(found: World) -> dict[str, str]:
    return {key.removeprefix("entry/"): one.source for key, one in found.of("entry").items()}


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("10.1.0.2", "is the address of Node n2"),
        ("10.0.0.1", "is the address of Pod shop/p"),
        ("fd00::1", "is the address of Pod shop/p"),
        ("FD00:0:0::1", "is the address of Pod shop/p"),
        ("::ffff:10.0.0.1", "is the address of Pod shop/p"),
        ("192.0.2.1", "is this node's mesh address"),
        ("2001:db8::1", "is this node's mesh address"),
        ("127.0.0.1", "is a loopback address"),
        ("::1", "is a loopback address"),
        ("0.0.0.0", "is the unspecified address"),
        ("224.0.0.1", "is a multicast address"),
        ("169.254.20.10", "is a link-local address"),
        ("fe80::1", "is a link-local address"),
        ("255.255.255.255", "is the broadcast address"),
        ("10.96.0.1", "belongs to Service default/first, which comes first"),
    ],
)
def test_addresses_that_a_service_does_not_get(address: str, why: str) -> None:
    first = service("first", "10.96.0.1", created="2023-01-01")
    found = world(NODE, POD, first, service("s", "10.96.0.2", address))
    (problem,) = found.told("Service", "s")
    assert f" {why}" in problem
    assert problem.endswith("nobody is sent to this Service by it; give the Service another")
    assert frontends(found) == {
        "10.96.0.1|80/TCP": "Service/default/first",
        "10.96.0.2|80/TCP": "Service/default/s",
    }
    section = found.sections["service/default/s/80"]
    assert section.addresses == ("10.96.0.2",)  # type: ignore[union-attr]
    assert found.told("Service", "first") == ()


def test_of_two_services_with_one_address_the_older_has_it_whatever_the_ports() -> None:
    texts = (
        service("a", "10.96.0.1", port=81, created="2024-01-02"),
        service("b", "10.96.0.1"),
        service("c", "10.96.0.1", port=82),
    )
    for order in itertools.permutations(texts):
        found = World(MESH)
        for text in order:
            found.apply(text)
        assert frontends(found) == {"10.96.0.1|80/TCP": "Service/default/b"}
        assert {key.name for _, key in found.problems} == {"a", "c"}
    found.delete("Service", "b")
    assert frontends(found) == {"10.96.0.1|82/TCP": "Service/default/c"}
    found.delete("Service", "c")
    assert frontends(found) == {"10.96.0.1|81/TCP": "Service/default/a"}
    assert found.problems == {}


def test_addresses_are_given_back_when_pods_and_nodes_have_gone() -> None:
    found = world(NODE, POD, service("a", "10.0.0.1"), service("b", "10.1.0.2"))
    assert frontends(found) == {}
    found.delete("Pod", "p", "shop")
    found.delete("Node", "n2", "")
    assert frontends(found) == {
        "10.0.0.1|80/TCP": "Service/default/a",
        "10.1.0.2|80/TCP": "Service/default/b",
    }
    assert found.problems == {}
    found.apply(POD)
    assert frontends(found) == {"10.1.0.2|80/TCP": "Service/default/b"}


def test_addresses_are_compared_as_what_they_are_not_as_they_are_written() -> None:
    found = world(service("a", "fd96::0:1"), service("b", "FD96:0::1"))
    assert frontends(found) == {"fd96::1|80/TCP": "Service/default/a"}
    assert len(found.told("Service", "b")) == 1


def test_a_route_to_a_service_that_has_no_address_is_not_accepted() -> None:
    found = world(
        POD,
        service("s", "10.0.0.1"),
        """
kind: HTTPRoute
metadata: {name: route}
spec:
  parentRefs: [{group: '', kind: Service, name: s}]
  rules: [{backendRefs: [{name: s, port: 80}]}]
""",
    )
    assert found.route("route")["Accepted"] == "False UnsupportedValue"
    assert "is the address of Pod shop/p" in found.message("HTTPRoute", "route", "Accepted")


@pytest.mark.parametrize(
    ("address", "owner"), [("10.0.0.1", "Pod shop/p"), ("10.96.0.1", "Service default/s")]
)
def test_a_gateway_does_not_get_what_pods_and_services_have(address: str, owner: str) -> None:
    wants = GATEWAY + f"  addresses: [{{value: {address}}}]"
    found = world(wants)
    assert found.gateway()["Programmed"] == "True"
    assert frontends(found) == {f"{address}|80/TCP": "Gateway/default/gw"}
    found.apply(join(POD, service("s", "10.96.0.1")))
    assert found.gateway()["Programmed"] == "False AddressNotUsable"
    assert f"is the address of {owner}" in found.message("Gateway", "gw", "Programmed")
    assert frontends(found) == {"10.96.0.1|80/TCP": "Service/default/s"}


def test_a_wildcard_gateway_leaves_services_the_addresses_that_the_host_has_too() -> None:
    """kube-proxy in its IPVS mode gives a host the cluster IPs of all Services."""
    found = World(Options(advertise=("192.0.2.7", "10.96.0.1")))
    found.apply(join(GATEWAY, service("s", "10.96.0.1")))
    assert frontends(found) == {
        "192.0.2.7|80/TCP": "Gateway/default/gw",
        "10.96.0.1|80/TCP": "Service/default/s",
    }
    found.delete("Gateway", "gw")
    assert frontends(found) == {"10.96.0.1|80/TCP": "Service/default/s"}
