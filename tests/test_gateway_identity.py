"""What nodes, SPIFFE identities and mTLS modes become in a node's configuration."""

from __future__ import annotations

import pytest

from gateway.annotations import misused
from gateway.control import Options
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import (
    MeshPort,
    MtlsMode,
    NodeSection,
    Settings,
    WorkloadSection,
)
from tests.gateway_world import GATEWAY, World, join, objects

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


# --- identities -----------------------------------------------------------------------------------


def test_with_an_authority_workloads_and_gateways_have_identities() -> None:
    options = Options(authority=True, trust_domain="shop.example")
    found = world(pod(), options=options)
    assert workload(found).spiffe_id == "spiffe://shop.example/ns/default/sa/cart"
    settings = found.sections["settings"]
    assert isinstance(settings, Settings)
    assert settings.gateway_spiffe_id == "spiffe://shop.example/ns/weft-system/sa/weft-gateway"


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
    section = workload(world(text))
    assert (section.mtls, section.mtls_ports) == ("STRICT", {})
    (problem,) = misused(objects(text)["Pod"][ObjectKey("default", "p")])
    assert problem.startswith(f"annotation weft.dev/mtls-ports is {value!r}, not PORT=MODE")
    assert problem.endswith("this pod must be connected to by mutual TLS (STRICT)")


def test_a_namespaces_mode_is_told_to_its_own_pods_only() -> None:
    found = world(
        namespace("{weft.dev/mtls: STRICT}", "a"),
        pod(namespace="a").replace("10.0.0.1", "10.0.0.2"),
        pod(namespace="b"),
    )
    assert [workload(found, f"{name}/p").mtls for name in "ab"] == ["STRICT", "PERMISSIVE"]
    found.delete("Namespace", "a", namespace="")
    assert workload(found, "a/p").mtls == "PERMISSIVE"
