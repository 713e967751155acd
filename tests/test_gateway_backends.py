"""Clusters: Services, EndpointSlices and BackendTLSPolicies."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.model.nodeconfig import ClusterSection, UpstreamTLS
from tests.gateway_world import (
    BACKEND,
    GATEWAY,
    ROUTE,
    World,
    ca_config_map,
    ca_pem,
    conditions,
    join,
    plain,
)

CLUSTER = "cluster/Service/default/backend/80"

SERVICE = """
kind: Service
metadata: {name: backend}
spec:
  ports: [{name: http, port: 80, targetPort: 8080}, {name: admin, port: 81, targetPort: adm}]
"""


def piece(
    name: str,
    endpoints: str,
    *,
    family: str = "IPv4",
    ports: str = "[{name: http, port: 8080}]",
    service: str = "backend",
) -> str:
    return f"""
kind: EndpointSlice
metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {service}}}}}
addressType: {family}
ports: {ports}
endpoints: {endpoints}
"""


def world_with(*texts: str) -> World:
    world = World()
    world.apply(join(GATEWAY, ROUTE, *texts))
    return world


def cluster(world: World, key: str = CLUSTER) -> ClusterSection:
    section = world.sections[key]
    assert isinstance(section, ClusterSection)
    return section


def endpoints(*pieces: str) -> list[str]:
    found = cluster(world_with(SERVICE, *pieces)).endpoints
    return [f"{one.name}@{one.address}:{one.port}" for one in found]


# --- endpoints ------------------------------------------------------------------------------------


def test_only_ready_endpoints() -> None:
    assert endpoints(
        piece(
            "a",
            "[{addresses: [10.0.0.9]}, {addresses: [10.0.0.2], conditions: {ready: true}},"
            " {addresses: [10.0.0.3], conditions: {ready: false}},"
            " {addresses: [10.0.0.4], conditions:"
            " {ready: false, serving: true, terminating: true}},"
            " {addresses: [10.0.0.5], conditions: {ready: true, terminating: true}}]",
        )
    ) == ["@10.0.0.2:8080", "@10.0.0.9:8080"]


def test_slices_of_a_service_are_joined_and_those_of_others_are_not() -> None:
    assert endpoints(
        piece("a", "[{addresses: [10.0.0.2]}]"),
        piece("b", "[{addresses: [10.0.0.1]}, {addresses: [10.0.0.2]}]"),
        piece("c", "[{addresses: [10.0.0.7]}]", service="another"),
    ) == ["@10.0.0.1:8080", "@10.0.0.2:8080"]


def test_ports_go_by_name() -> None:
    ports = "[{name: adm, port: 9}, {name: http, port: 8081}]"
    assert endpoints(piece("a", "[{addresses: [10.0.0.1]}]", ports=ports)) == ["@10.0.0.1:8081"]
    assert endpoints(piece("a", "[{addresses: [10.0.0.1]}]", ports="[{port: 8081}]")) == []
    # Without a number, the slice stands for every port.
    ports = "[{name: http}]"
    assert endpoints(piece("a", "[{addresses: [10.0.0.1]}]", ports=ports)) == ["@10.0.0.1:8080"]


def test_dual_stack_pods_stand_once() -> None:
    pod = "targetRef: {kind: Pod, name: p}"
    assert endpoints(
        piece("six", f"[{{addresses: ['fd00::1'], {pod}}}]", family="IPv6"),
        piece("four", f"[{{addresses: [10.0.0.1], {pod}}}]"),
        piece("manual", "[{addresses: ['fd00::2']}]", family="IPv6"),
        piece("names", "[{addresses: [x.example.com]}]", family="FQDN"),
    ) == ["p@10.0.0.1:8080", "@fd00::2:8080"]


def test_endpoints_come_and_go_without_touching_the_route() -> None:
    world = world_with(SERVICE)
    assert cluster(world).endpoints == ()
    before = world.sections["route/HTTPRoute/default/route"]
    world.apply(piece("a", "[{addresses: [10.0.0.1]}]"))
    assert len(cluster(world).endpoints) == 1
    assert world.sections["route/HTTPRoute/default/route"] is before
    world.delete("EndpointSlice", "a")
    assert cluster(world).endpoints == ()


def test_only_referenced_ports_are_clusters() -> None:
    world = world_with(BACKEND, SERVICE.replace("name: backend", "name: unused"))
    assert list(world.of("cluster")) == [CLUSTER]
    world.delete("HTTPRoute", "route")
    assert not world.of("cluster")


@pytest.mark.parametrize(
    ("app_protocol", "protocol"),
    [
        ("http", "http"),
        ("HTTP", "http"),
        ("kubernetes.io/h2c", "h2c"),
        ("kubernetes.io/ws", "ws"),
    ],
)
def test_app_protocol(app_protocol: str, protocol: str) -> None:
    text = f"""
kind: Service
metadata: {{name: backend}}
spec: {{ports: [{{port: 80, appProtocol: {app_protocol}}}]}}
"""
    assert cluster(world_with(text)).protocol == protocol


def test_headless_service() -> None:
    text = SERVICE.replace("spec:", "spec:\n  clusterIP: None")
    world = world_with(text, piece("a", "[{addresses: [10.0.0.1]}]"))
    assert [one.address for one in cluster(world).endpoints] == ["10.0.0.1"]
    assert list(world.of("entry")) == ["entry/192.0.2.10|80/TCP"]


# --- BackendTLSPolicy -----------------------------------------------------------------------------


def policy(
    name: str = "tls",
    *,
    section: str = "",
    created: str = "2024-01-01T00:00:00Z",
    validation: str = "caCertificateRefs: [{group: '', kind: ConfigMap, name: ca}]",
    hostname: str = "in.example.com",
    more: str = "{}",
) -> str:
    port = f", sectionName: {section}" if section else ""
    return f"""
kind: BackendTLSPolicy
metadata: {{name: {name}, creationTimestamp: '{created}'}}
spec:
  targetRefs: [{{group: "", kind: Service, name: backend{port}}}]
  validation: {{hostname: {hostname}, {validation}}}
  options: {more}
"""


def answer(world: World, name: str = "tls") -> dict[str, str]:
    status = world.status("BackendTLSPolicy", name)
    assert len(status.ancestors) == 1
    assert status.ancestors[0].controller_name == "weft.dev/gateway-controller"
    return conditions(status.ancestors[0].conditions)


def test_policy_reaches_the_cluster() -> None:
    world = world_with(BACKEND, ca_config_map("ca"), policy())
    assert cluster(world).tls == UpstreamTLS("in.example.com", ca_pem())
    assert answer(world) == {"Accepted": "True", "ResolvedRefs": "True"}
    assert plain(world.status("BackendTLSPolicy", "tls").ancestors[0].ancestor_ref) == {
        "group": "gateway.networking.k8s.io",
        "kind": "Gateway",
        "namespace": "default",
        "name": "gw",
    }
    world.delete("HTTPRoute", "route")
    assert world.status("BackendTLSPolicy", "tls") is None


def test_system_authorities_and_names() -> None:
    validation = (
        "wellKnownCACertificates: System, subjectAltNames: [{type: Hostname, hostname: a.test},"
        " {type: URI, uri: 'spiffe://td/a'}]"
    )
    tls = cluster(world_with(BACKEND, policy(validation=validation))).tls
    assert tls is not None
    assert tls.ca_pem is None
    assert tls.broken is None
    assert [(san.type, san.value) for san in tls.sans] == [
        ("Hostname", "a.test"),
        ("URI", "spiffe://td/a"),
    ]


@pytest.mark.parametrize(
    ("policy_text", "accepted", "resolved"),
    [
        (
            policy(validation="caCertificateRefs: [{group: '', kind: ConfigMap, name: gone}]"),
            "NoValidCACertificate",
            "InvalidCACertificateRef",
        ),
        (
            policy(validation="caCertificateRefs: [{group: '', kind: ConfigMap, name: bad}]"),
            "NoValidCACertificate",
            "InvalidCACertificateRef",
        ),
        (
            policy(validation="caCertificateRefs: [{group: '', kind: Secret, name: ca}]"),
            "NoValidCACertificate",
            "InvalidKind",
        ),
        (policy(validation="wellKnownCACertificates: example.com/mine"), "Invalid", ""),
        (policy(more="{example.com/minimum: '1.3'}"), "Invalid", ""),
    ],
)
def test_policy_that_cannot_be_enforced_lets_nothing_through(
    policy_text: str, accepted: str, resolved: str
) -> None:
    bad = "kind: ConfigMap\nmetadata: {name: bad}\ndata: {ca.crt: garbage}"
    world = world_with(BACKEND, ca_config_map("ca"), bad, policy_text)
    tls = cluster(world).tls
    assert tls is not None
    assert tls.ca_pem is None
    assert tls.broken is not None
    assert tls.broken.startswith("BackendTLSPolicy default/tls: ")
    assert answer(world) == {
        "Accepted": f"False {accepted}",
        "ResolvedRefs": f"False {resolved}" if resolved else "True",
    }


def test_bundle_that_heals() -> None:
    world = world_with(BACKEND, policy())
    assert cluster(world).tls == UpstreamTLS(
        "in.example.com",
        broken="BackendTLSPolicy default/tls: ConfigMap default/ca does not exist",
    )
    world.apply(ca_config_map("ca"))
    assert cluster(world).tls == UpstreamTLS("in.example.com", ca_pem())


def test_the_oldest_policy_counts_and_the_loser_is_told() -> None:
    world = world_with(
        BACKEND,
        ca_config_map("ca"),
        policy("a-young", created="2024-02-01T00:00:00Z", hostname="young.test"),
        policy("b-old", hostname="old.test"),
        policy("c-twin", hostname="twin.test"),
        policy("d-port", section="http", created="2024-03-01T00:00:00Z", hostname="port.test"),
        policy("e-port", section="gone", hostname="gone.test"),
    )
    found = {name: answer(world, name)["Accepted"] for name in ("a-young", "b-old", "c-twin")}
    assert found == {
        "a-young": "False Conflicted",
        "b-old": "True",
        "c-twin": "False Conflicted",
    }
    assert "BackendTLSPolicy default/b-old" in world.message(
        "BackendTLSPolicy", "a-young", "Accepted"
    )
    # A policy for the port comes before those for the Service, and conflicts with none of them.
    assert answer(world, "d-port")["Accepted"] == "True"
    assert answer(world, "e-port")["Accepted"] == "False TargetNotFound"

    def hostname() -> Any:
        tls = cluster(world).tls
        return tls.hostname if tls is not None else None

    assert hostname() == "port.test"
    world.delete("BackendTLSPolicy", "d-port")
    assert hostname() == "old.test"
    world.delete("BackendTLSPolicy", "b-old")
    assert hostname() == "twin.test"
    assert answer(world, "c-twin")["Accepted"] == "True"


def test_a_broken_policy_still_takes_precedence() -> None:
    """Falling back to a younger policy would let another author decide whom to trust."""
    world = world_with(
        BACKEND,
        policy("old"),
        policy(
            "young", created="2024-02-01T00:00:00Z", validation="wellKnownCACertificates: System"
        ),
    )
    tls = cluster(world).tls
    assert tls is not None
    assert tls.broken is not None


def test_encrypted_app_protocols_need_a_policy() -> None:
    text = """
kind: Service
metadata: {name: backend}
spec: {ports: [{port: 80, appProtocol: kubernetes.io/wss}]}
"""
    world = world_with(text)
    assert world.route("route")["ResolvedRefs"] == "False UnsupportedProtocol"
    world.apply(policy(validation="wellKnownCACertificates: System"))
    assert world.route("route")["ResolvedRefs"] == "True"
    assert cluster(world).protocol == "wss"
    world.delete("BackendTLSPolicy", "tls")
    assert world.route("route")["ResolvedRefs"] == "False UnsupportedProtocol"


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("{group: '', kind: Service, name: gone}", "Service default/gone does not exist"),
        (
            "{group: '', kind: Service, name: backend, sectionName: x}",
            "Service default/backend has no port named x",
        ),
        ("{group: x.test, kind: Thing, name: t}", "targetRef x.test/Thing t: a policy is for a"),
    ],
)
def test_a_policy_that_no_gateway_goes_by_is_told_of_as_a_problem(target: str, why: str) -> None:
    world = World()
    world.apply(
        f"""
kind: BackendTLSPolicy
metadata: {{name: tls}}
spec:
  targetRefs: [{target}]
  validation: {{hostname: a.test, wellKnownCACertificates: System}}
"""
    )
    world.apply(BACKEND)
    (problem,) = world.told("BackendTLSPolicy", "tls")
    assert problem.startswith(why)


def test_a_broken_policy_of_a_service_that_only_the_mesh_uses_is_told_of() -> None:
    policy = """
kind: BackendTLSPolicy
metadata: {name: tls}
spec:
  targetRefs: [{group: '', kind: Service, name: backend}]
  validation:
    hostname: a.test
    caCertificateRefs: [{group: '', kind: ConfigMap, name: ca}]
"""
    world = World()
    world.apply(join(BACKEND, policy))
    assert world.told("BackendTLSPolicy", "tls") == ("ConfigMap default/ca does not exist",)
    # What a status says is not said again.
    world.apply(join(GATEWAY, ROUTE))
    assert world.told("BackendTLSPolicy", "tls") == ()
    assert world.status("BackendTLSPolicy", "tls") is not None


def test_targets_that_are_no_services_spoil_nothing_for_those_that_are() -> None:
    world = World()
    world.apply(
        join(
            GATEWAY,
            ROUTE,
            BACKEND,
            """
kind: BackendTLSPolicy
metadata: {name: tls}
spec:
  targetRefs:
  - {group: x.test, kind: Thing, name: t}
  - {group: '', kind: Service, name: backend}
  validation: {hostname: a.test, wellKnownCACertificates: System}
""",
        )
    )
    (ancestor,) = world.status("BackendTLSPolicy", "tls").ancestors
    assert conditions(ancestor.conditions)["Accepted"] == "True"
