"""The models of Cilium's policies against its published CRDs, and of what Kubernetes validates.

Reads ../shared/cilium/crds and skips without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from test_model_crds import Comparison

from mesh.model.decode import KINDS, InvalidObject, decode

CRDS = Path(__file__).parents[2] / "shared/cilium/crds"

# Where the models differ, by the field, and why.
DIFFERENCES = {
    # Not enforced, and refused by name: what is inside does not matter.
    "toFQDNs[]": "refused", "toGroups[]": "refused", "fromGroups[]": "refused",
    "dns[]": "refused", "kafka[]": "refused", "l7[]{}": "refused", "listener": "refused",
    "originatingTLS": "refused", "terminatingTLS": "refused", "cidrGroupRef": "refused",
    # mesh.policy reads these itself, so that what is wrong in them still fails closed.
    "cidr": "read", "except[]": "read", "toCIDR[]": "read", "fromCIDR[]": "read",
    "port": "read", "host": "read", "type": "read",
    # The same as the CRD's oneOf: mesh.model.rules_policy.
    "spec": "rule", "specs[]": "rule", "toCIDRSet[]": "rule", "fromCIDRSet[]": "rule",
    # A default where the CRD has none, and absent means the same.
    "protocol": "default", "namespace": "default", "serviceName": "default",
    "enableDefaultDeny": "default",
    # Of later CRDs.
    "endPort": "later", "conditions": "later",
    # What others write there is not read.
    "derivativePolicies{}": "status", "nodes{}": "status",
}  # fmt: skip


@pytest.mark.skipif(not CRDS.exists(), reason="no ../shared/cilium")
@pytest.mark.parametrize("kind", ["CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"])
def test_models_differ_from_the_crds_only_where_it_is_meant(kind: str) -> None:
    (crd,) = yaml.safe_load_all((CRDS / f"{kind.lower().removesuffix('y')}ies.yaml").read_text())
    (version,) = crd["spec"]["versions"]
    info = KINDS["cilium.io", kind]
    assert (crd["spec"]["names"]["plural"], version["name"]) == (info.plural, info.versions[0])
    assert set(crd["spec"]["names"]["shortNames"]) == set(info.short)
    assert (crd["spec"]["scope"] == "Namespaced") == info.namespaced
    comparison = Comparison(standard=False)
    comparison.model(version["schema"]["openAPIV3Schema"], info.model, "")
    found = {line.partition(": ")[0].rpartition(".")[2] for line in comparison.differences}
    assert found == DIFFERENCES.keys()


# --- what Kubernetes validates -------------------------------------------------------------------


def network_policy(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p"},
        "spec": {"podSelector": {}, **spec},
    }


def peer(**fields: Any) -> dict[str, Any]:
    return network_policy(ingress=[{"from": [fields]}])


def port(**fields: Any) -> dict[str, Any]:
    return network_policy(ingress=[{"ports": [fields]}])


def expression(**fields: Any) -> dict[str, Any]:
    return peer(podSelector={"matchExpressions": [{"key": "a", **fields}]})


def cilium(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p"},
        "spec": spec,
    }


INGRESS = "spec.ingress[0]"
FROM = f"{INGRESS}.from[0]"


@pytest.mark.parametrize(
    ("good", "bad", "where"),
    [
        (peer(podSelector={}), peer(), FROM),
        (peer(podSelector={}), peer(ipBlock={"cidr": "10.0.0.1"}, podSelector={}), FROM),
        (peer(ipBlock={"cidr": "10.0.0.0/8"}), peer(ipBlock={"cidr": "ten"}), f"{FROM}.ipBlock"),
        (
            peer(ipBlock={"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}),
            peer(ipBlock={"cidr": "10.0.0.0/8", "except": ["11.1.0.0/16"]}),
            f"{FROM}.ipBlock",
        ),
        (
            peer(ipBlock={"cidr": "fd00::/8", "except": ["fd00::/16"]}),
            peer(ipBlock={"cidr": "fd00::/8", "except": ["fd00::/8"]}),
            f"{FROM}.ipBlock",
        ),
        (port(port=80, endPort=90), port(port=80, endPort=79), f"{INGRESS}.ports[0]"),
        (port(port="http"), port(port="http", endPort=90), f"{INGRESS}.ports[0]"),
        (port(port="http"), port(port="no name"), f"{INGRESS}.ports[0]"),
        (port(port=65535), port(port=65536), f"{INGRESS}.ports[0]"),
        (port(protocol="SCTP"), port(protocol="ICMP"), f"{INGRESS}.ports[0].protocol"),
        (
            network_policy(policyTypes=["Egress"]),
            network_policy(policyTypes=["Egress", "Egress"]),
            "spec.policyTypes",
        ),
        (
            expression(operator="In", values=["b"]),
            expression(operator="In"),
            f"{FROM}.podSelector.matchExpressions[0]",
        ),
        (
            expression(operator="Exists"),
            expression(operator="Exists", values=["b"]),
            f"{FROM}.podSelector.matchExpressions[0]",
        ),
        (
            peer(podSelector={"matchLabels": {"a.example/b": "c"}}),
            peer(podSelector={"matchLabels": {"k8s:a": "c"}}),
            f"{FROM}.podSelector",
        ),
        (cilium(endpointSelector={}), cilium(), "spec"),
        (cilium(nodeSelector={}), cilium(nodeSelector={}, endpointSelector={}), "spec"),
        (
            cilium(endpointSelector={}, egress=[{"toCIDRSet": [{"cidr": "10.0.0.0/8"}]}]),
            cilium(endpointSelector={}, egress=[{"toCIDRSet": [{"except": []}]}]),
            "spec.egress[0].toCIDRSet[0]",
        ),
    ],
)  # fmt: skip
def test_rules_of_policies(good: dict[str, Any], bad: dict[str, Any], where: str) -> None:
    decode(good)
    with pytest.raises(InvalidObject) as refused:
        decode(bad)
    assert [one.path for one in refused.value.errors] == [where]
