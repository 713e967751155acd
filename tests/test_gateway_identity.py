"""What nodes, SPIFFE identities and mTLS modes become in a node's configuration."""

from __future__ import annotations

import msgspec
import pytest

from gateway.control import Options
from mesh.model.nodeconfig import (
    MeshPort,
    MtlsMode,
    NodeSection,
    Settings,
    WorkloadSection,
)
from tests.gateway_world import GATEWAY, World, join

MESH = Options(node="n1", mesh_addresses=("127.0.0.1", "::1"), authority=True)
NODE = """
kind: Node
metadata: {name: n2}
spec: {podCIDR: 10.0.2.0/24}
status:
  nodeInfo: {kernelVersion: "6.18"}
  addresses:
  - {type: InternalIP, address: 192.0.2.2}
  - {type: ExternalIP, address: 198.51.100.2}
  - {type: Hostname, address: n2}
  - {type: InternalIP, address: '2001:DB8::0:2'}
  - {type: InternalIP, address: 192.0.2.2}
"""


def pod(annotations: str = "{}", name: str = "p", namespace: str = "default") -> str:
    return f"""
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, annotations: {annotations}}}
spec: {{nodeName: n1, serviceAccountName: cart}}
status: {{podIP: 10.0.0.1}}
"""


def namespace(annotations: str, name: str = "default") -> str:
    return f"{{kind: Namespace, metadata: {{name: {name}, annotations: {annotations}}}}}"


def world(*texts: str, options: Options = MESH) -> World:
    result = World(options)
    result.apply(join(*texts))
    return result


def workload(world: World, key: str = "default/p") -> WorkloadSection:
    section = world.sections[f"workload/{key}"]
    assert isinstance(section, WorkloadSection)
    return section


# --- nodes ----------------------------------------------------------------------------------------


def test_a_node_is_where_its_internal_addresses_are() -> None:
    found = world(NODE)
    assert found.of("node") == {"node/n2": NodeSection("n2", ("192.0.2.2", "2001:db8::2"))}
    found.apply("{kind: Node, metadata: {name: n2}}")
    assert found.of("node") == {}
    found.apply(NODE)
    found.delete("Node", "n2", namespace="")
    assert found.of("node") == {}


def test_an_address_is_the_younger_nodes() -> None:
    def named(name: str, created: str, addresses: str) -> str:
        listed = ", ".join(f"{{type: InternalIP, address: {one}}}" for one in addresses.split())
        return f"""
kind: Node
metadata: {{name: {name}, creationTimestamp: '{created}T00:00:00Z'}}
status: {{addresses: [{listed}]}}
"""

    old = named("old", "2024-01-01", "192.0.2.1 192.0.2.9")
    new = named("new", "2024-01-02", "192.0.2.1")
    for order in ((old, new), (new, old)):
        found = World(MESH)
        for text in order:
            found.apply(text)
        assert found.of("node") == {
            "node/old": NodeSection("old", ("192.0.2.9",)),
            "node/new": NodeSection("new", ("192.0.2.1",)),
        }
    (problem,) = found.told("Node", "old", "")
    assert problem.startswith("address 192.0.2.1 is Node new's, which is younger")
    found.delete("Node", "new", "")
    assert found.of("node") == {"node/old": NodeSection("old", ("192.0.2.1", "192.0.2.9"))}
    assert found.problems == {}


def test_a_nodes_address_is_no_pods() -> None:
    text = NODE.replace("2001:DB8::0:2", "10.0.0.1")
    found = world(pod(), text)
    assert found.of("workload") == {}
    (problem,) = found.told("Pod", "p")
    assert problem.startswith("address 10.0.0.1 is a Node's")
    found.delete("Node", "n2", "")
    assert workload(found).addresses == ("10.0.0.1",)
    assert found.problems == {}


def test_pods_of_nodes_that_are_nowhere_are_told_of() -> None:
    far = pod().replace("nodeName: n1", "nodeName: n2")
    found = world(far)
    (problem,) = found.told("Pod", "p")
    assert problem.startswith("spec.nodeName is n2, and there is no Node of that name")
    found.apply(NODE)
    assert found.problems == {}
    # Without an authority nobody is reached by mutual TLS anyway.
    assert world(far, options=Options(node="n1", mesh_addresses=("::1",))).problems == {}


# --- identities -----------------------------------------------------------------------------------


def test_with_an_authority_workloads_and_gateways_have_identities() -> None:
    options = Options(authority=True, trust_domain="shop.example")
    found = world(pod(), options=options)
    assert workload(found).spiffe_id == "spiffe://shop.example/ns/default/sa/cart"
    settings = found.sections["settings"]
    assert isinstance(settings, Settings)
    assert settings.gateway_spiffe_id == "spiffe://shop.example/ns/weft-system/sa/weft-gateway"


def test_a_pod_without_a_service_account_has_no_identity() -> None:
    static = pod().replace("serviceAccountName: cart", 'serviceAccountName: ""')
    found = world(static, options=Options(authority=True))
    assert workload(found).spiffe_id == ""


def test_without_an_authority_nobody_is_vouched_for() -> None:
    # A settings file cannot say it either.
    settings = Settings(gateway_spiffe_id="spiffe://other/ns/weft-system/sa/weft-gateway")
    options = Options(node="n1", mesh_addresses=("127.0.0.1",), settings=settings)
    found = world(pod(), options=options)
    assert workload(found).spiffe_id == ""
    assert found.sections["settings"] == Settings()
    assert "port/127.0.0.1|15008" not in found.sections


def test_tunnels_end_on_each_mesh_address_and_no_gateway_takes_their_port() -> None:
    listener = GATEWAY.replace("port: 80", "port: 15008")
    found = world(listener)
    ports = {key: one for key, one in found.of("port").items() if isinstance(one, MeshPort)}
    tunnels = {key: one for key, one in ports.items() if one.kind == "tunnel"}
    assert tunnels == {
        "port/127.0.0.1|15008": MeshPort("127.0.0.1", 15008, "tunnel"),
        "port/::1|15008": MeshPort("::1", 15008, "tunnel"),
    }
    assert len(ports) == 6
    assert found.listener("http")["Accepted"] == "False PortUnavailable"
    without = world(listener, options=Options(node="n1", mesh_addresses=("127.0.0.1",)))
    assert without.listener("http")["Programmed"] == "True"


# --- modes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_namespace", "of_pod", "mode", "ports"),
    [
        ("{}", "{}", "PERMISSIVE", {}),
        ("{weft.dev/mtls: STRICT}", "{}", "STRICT", {}),
        ("{}", "{weft.dev/mtls: DISABLE}", "DISABLE", {}),
        ("{weft.dev/mtls: STRICT}", "{weft.dev/mtls: PERMISSIVE}", "PERMISSIVE", {}),
        # What is none is STRICT, whatever the namespace says.
        ("{weft.dev/mtls: strict}", "{}", "STRICT", {}),
        ("{weft.dev/mtls: DISABLE}", "{weft.dev/mtls: ''}", "STRICT", {}),
        ("{weft.dev/mtls: off}", "{weft.dev/mtls: DISABLE}", "DISABLE", {}),
        (
            "{weft.dev/mtls: STRICT}",
            "{weft.dev/mtls-ports: '8080=DISABLE, 9090=PERMISSIVE'}",
            "STRICT",
            {8080: "DISABLE", 9090: "PERMISSIVE"},
        ),
        ("{}", "{weft.dev/mtls-ports: ' '}", "PERMISSIVE", {}),
        ("{}", "{weft.dev/mtls-ports: ' 80 = STRICT'}", "PERMISSIVE", {80: "STRICT"}),
    ],
)
def test_modes_of_namespace_pod_and_port(
    of_namespace: str, of_pod: str, mode: MtlsMode, ports: dict[int, MtlsMode]
) -> None:
    annotations = of_namespace.replace("off", "'off'")
    for texts in ((namespace(annotations), pod(of_pod)), (pod(of_pod), namespace(annotations))):
        found = World(MESH)
        for text in texts:
            found.apply(text)
        section = workload(found)
        assert (section.mtls, section.mtls_ports) == (mode, ports)


def test_modes_that_are_none_are_told() -> None:
    found = world(namespace("{weft.dev/mtls: Strict}"), pod("{weft.dev/mtls: none}"))
    assert found.told("Namespace", "default", "") == (
        "annotation weft.dev/mtls is 'Strict', not 'STRICT' or 'PERMISSIVE' or 'DISABLE'; until"
        " that is mended, the pods of this namespace must be connected to by mutual TLS (STRICT)",
    )
    (problem,) = found.told("Pod", "p")
    assert "'none'" in problem


def required(ports: str = "", where: str = "ingress", selects: str = "app: web") -> str:
    """A policy that asks for proof of who connects."""
    return f"""
kind: CiliumNetworkPolicy
metadata: {{name: p}}
spec:
  endpointSelector: {{matchLabels: {{{selects}}}}}
  {where}:
  - authentication: {{mode: required}}
    {f"toPorts: [{{ports: [{ports}]}}]" if ports else "{}"}
"""


@pytest.mark.parametrize(
    ("policy", "mode", "ports"),
    [
        (required("{port: '80'}, {port: '81', endPort: 82}"), "DISABLE", (80, 81, 82)),
        (required("{port: main, protocol: TCP}"), "DISABLE", (8080,)),
        (required("{port: other}"), "DISABLE", ()),
        (required("{port: '1', endPort: 9000}"), "STRICT", None),
        (required().replace("{}", "fromEntities: [all]"), "STRICT", None),
        (required("{port: '80'}", selects="app: api"), "DISABLE", ()),
        (required("{port: '80'}", "egress"), "DISABLE", ()),
        (required("{port: '80'}").replace("required", "disabled"), "DISABLE", ()),
        (
            required("{port: '80'}").replace("{name: p}", "{name: p, annotations: {AUDIT}}"),
            "DISABLE",
            (),
        ),
    ],
)
def test_policy_asks_for_mutual_tls_at_the_ports_that_it_selects(
    policy: str, mode: MtlsMode, ports: tuple[int, ...] | None
) -> None:
    """Whatever the pod says, and on all nodes."""
    policy = policy.replace("AUDIT", 'weft.dev/policy-audit: "true"')
    here = pod("{weft.dev/mtls: DISABLE, weft.dev/mtls-ports: '80=PERMISSIVE, 7=DISABLE'}")
    here = here.replace("name: p,", "name: p, labels: {app: web},").replace(
        "spec: {", "spec: {containers: [{name: c, ports: [{name: main, containerPort: 8080}]}], "
    )
    said = {7: "DISABLE", 80: "PERMISSIVE"}
    for node in ("n1", "n2"):
        found = World(msgspec.structs.replace(MESH, node=node))
        for text in (here, policy):
            found.apply(text)
        section = workload(found)
        expected = {} if ports is None else {**said, **dict.fromkeys(ports, "STRICT")}
        assert (section.mtls, section.mtls_ports) == (mode, expected)
        found.delete("CiliumNetworkPolicy", "p")
        section = workload(found)
        assert (section.mtls, section.mtls_ports) == ("DISABLE", said)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (MESH, ""),
        (Options(node="n1", mesh_addresses=("127.0.0.1",)), "there is no authority on this node"),
        (Options(authority=True), "there is no mesh on this node"),
    ],
)
def test_strict_that_cannot_be_had_is_told_where_it_is_asked_for(
    options: Options, why: str
) -> None:
    ports = pod("{weft.dev/mtls-ports: 80=STRICT}", "q")
    off = pod("{weft.dev/mtls: PERMISSIVE}", "r")
    found = world(namespace("{weft.dev/mtls: STRICT}"), pod(), ports, off, options=options)
    told = {(kind, key.name): said for (kind, key), said in found.problems.items()}
    if why:
        assert told.keys() == {("Namespace", "default"), ("Pod", "q")}
        assert all(why in one for said in told.values() for one in said)
    else:
        assert told == {}


def test_datagrams_to_strict_ports_are_told_of_their_service() -> None:
    dns = """
kind: Service
metadata: {name: dns}
spec:
  clusterIP: 10.96.0.10
  ports:
  - {name: dns, port: 53, protocol: UDP}
  - {name: dns-tcp, port: 53, protocol: TCP}
---
kind: EndpointSlice
metadata: {name: dns-1, labels: {kubernetes.io/service-name: dns}}
addressType: IPv4
ports: [{name: dns, port: 5353, protocol: UDP}, {name: dns-tcp, port: 5353}]
endpoints: [{addresses: [10.0.0.1]}]
"""
    found = world(dns, pod())
    assert found.told("Service", "dns") == ()
    found.apply(pod("{weft.dev/mtls-ports: 53=STRICT}"))
    assert found.told("Service", "dns") == ()
    found.apply(namespace("{weft.dev/mtls: STRICT}"))
    (problem,) = found.told("Service", "dns")
    assert problem.startswith("port 53/UDP leads to pods that must be connected to by mutual TLS")
    assert "what other nodes send to default/p is dropped" in problem
    found.apply(pod("{weft.dev/mtls-ports: 5353=PERMISSIVE}"))
    assert found.told("Service", "dns") == ()


@pytest.mark.parametrize(
    "value",
    [
        "8080",
        "8080=",
        "8080=off",
        "8080=DISABLE,",
        "=DISABLE",
        "0=DISABLE",
        "65536=DISABLE",
        "-1=DISABLE",
        "٨=DISABLE",
        "80=DISABLE, 80=STRICT",
        "80=DISABLE; 81=STRICT",
    ],
)
def test_ports_that_are_none_make_all_of_a_pod_strict(value: str) -> None:
    text = pod(f"{{weft.dev/mtls: DISABLE, weft.dev/mtls-ports: '{value}'}}")
    found = world(text)
    section = workload(found)
    assert (section.mtls, section.mtls_ports) == ("STRICT", {})
    (problem,) = found.told("Pod", "p")
    assert problem.startswith(f"annotation weft.dev/mtls-ports is {value!r}, not PORT=MODE")
    assert problem.endswith("this pod must be connected to by mutual TLS (STRICT)")
    found.apply(pod())
    assert found.problems == {}


def test_a_namespaces_mode_is_told_to_its_own_pods_only() -> None:
    found = world(
        namespace("{weft.dev/mtls: STRICT}", "a"),
        pod(namespace="a").replace("10.0.0.1", "10.0.0.2"),
        pod(namespace="b"),
    )
    assert [workload(found, f"{name}/p").mtls for name in "ab"] == ["STRICT", "PERMISSIVE"]
    found.delete("Namespace", "a", namespace="")
    assert workload(found, "a/p").mtls == "PERMISSIVE"
