"""Nine pods in three namespaces, and strategies for policies over them, as manifests."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import strategies as st
from policy_model import Manifest, Outside, Pod, World

NAMESPACES = {"a": {"team": "red"}, "b": {"team": "blue"}, "c": {}}
PODS = [
    Pod(
        namespace,
        f"p{i}",
        f"10.{number}.0.{i + 1}",
        {"app": "xyz"[i], **({"tier": "web"} if i < 2 else {})},
        "builder" if i == 0 else "default",
        {"http": ("TCP", 80 if i == 0 else 8080), "dns": ("UDP", 53)},
    )
    for number, namespace in enumerate(NAMESPACES)
    for i in range(3)
]
OUTSIDE = [
    Outside("192.0.2.1"),
    Outside("192.0.2.200"),
    Outside("198.51.100.7"),
    Outside("2001:db8::1"),
    Outside("2001:db8:1::1"),
    Outside("172.18.0.1", "host"),
    Outside("172.18.0.2", "remote-node"),
]
SERVICES = {("a", "svc"): ["10.0.0.2", "192.0.2.200"], ("b", "svc"): ["10.1.0.1"]}
WHAT = [
    ("TCP", 80), ("TCP", 8080), ("TCP", 9090), ("UDP", 53), ("UDP", 80), ("SCTP", 80), ("ICMP", 8),
    ("ICMPv6", 128),
]  # fmt: skip

_APPS = st.sampled_from(["x", "y", "z", "none"])
# Mapped ranges are IPv4's where they hold nothing else, and else IPv6's.
_CIDRS = st.sampled_from(
    [
        "0.0.0.0/0", "192.0.2.0/24", "192.0.2.128/25", "198.51.100.7/32",
        "::ffff:192.0.2.128/121", "::ffff:198.51.100.7/128", "::ffc0:0:0/90",
        "::/0", "2001:db8::/32", "2001:db8::1/128",
    ]
)  # fmt: skip


@st.composite
def _expressions(draw: Any, keys: list[str]) -> Manifest:
    operator = draw(st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist"]))
    expression: Manifest = {"key": draw(st.sampled_from(keys)), "operator": operator}
    if operator in ("In", "NotIn"):
        values = st.sampled_from(["x", "y", "web", "red", "a", "b"])
        expression["values"] = draw(st.lists(values, min_size=1, max_size=2, unique=True))
    return expression


@st.composite
def selectors(draw: Any, prefix: str = "", namespaced: bool = False) -> Manifest:
    """Of pods' labels; of Cilium's kinds with a prefix, and (namespaced) of any namespace."""
    selector: Manifest = {}
    labels: dict[str, str] = {}
    if draw(st.booleans()):
        labels[prefix + "app"] = draw(_APPS)
    if namespaced and draw(st.booleans()):
        labels["k8s:io.kubernetes.pod.namespace"] = draw(st.sampled_from(["a", "b"]))
    if namespaced and draw(st.integers(0, 5)) == 0:
        labels["io.cilium.k8s.policy.serviceaccount"] = "builder"
    if labels:
        selector["matchLabels"] = labels
    if draw(st.integers(0, 2)) == 0:
        keys = [prefix + "app", prefix + "tier"]
        if namespaced:
            keys += ["k8s:io.kubernetes.pod.namespace", "k8s:io.cilium.k8s.namespace.labels.team"]
        selector["matchExpressions"] = [draw(_expressions(keys))]
    return selector


@st.composite
def _np_peers(draw: Any) -> Manifest:
    kind = draw(st.integers(0, 3))
    if kind == 0:
        block: Manifest = {"cidr": draw(_CIDRS)}
        if block["cidr"] == "192.0.2.0/24" and draw(st.booleans()):
            block["except"] = ["192.0.2.128/25"]
        return {"ipBlock": block}
    peer: Manifest = {}
    if kind != 2:
        peer["podSelector"] = draw(selectors())
    if kind >= 2:
        labels = draw(st.sampled_from([{}, {"team": "red"}, {"kubernetes.io/metadata.name": "c"}]))
        peer["namespaceSelector"] = {"matchLabels": labels} if labels else {}
    return peer


_NP_PORTS = st.sampled_from(
    [
        {"port": 80},
        {"port": "http"},
        {"port": "dns", "protocol": "UDP"},
        {"protocol": "UDP"},
        {"port": 8000, "endPort": 9000},
        {"port": 80, "protocol": "SCTP"},
    ]
)


def _np_rules(side: str) -> st.SearchStrategy[Manifest]:
    return st.fixed_dictionaries(
        {},
        optional={
            side: st.lists(_np_peers(), max_size=2),
            "ports": st.lists(_NP_PORTS, max_size=2),
        },
    )


@st.composite
def network_policies(draw: Any) -> Manifest:
    spec: Manifest = {"podSelector": draw(selectors())}
    if draw(st.booleans()):
        spec["policyTypes"] = draw(
            st.sampled_from([["Ingress"], ["Egress"], ["Ingress", "Egress"]])
        )
    if draw(st.booleans()):
        spec["ingress"] = draw(st.lists(_np_rules("from"), max_size=2))
    if draw(st.booleans()):
        spec["egress"] = draw(st.lists(_np_rules("to"), max_size=2))
    return {"kind": "NetworkPolicy", "metadata": draw(_metadata()), "spec": spec}


@st.composite
def _metadata(draw: Any, namespaced: bool = True) -> Manifest:
    metadata: Manifest = {"namespace": draw(st.sampled_from(["a", "b"]))} if namespaced else {}
    if draw(st.integers(0, 7)) == 0:
        metadata["annotations"] = {"weft.dev/policy-audit": "true"}
    return metadata


_PORTS = st.sampled_from(
    [
        {"port": "80", "protocol": "TCP"},
        {"port": "80"},
        {"port": "http", "protocol": "TCP"},
        {"port": "dns", "protocol": "ANY"},
        {"port": "8000", "endPort": 9000, "protocol": "TCP"},
        {"port": "0", "protocol": "UDP"},
    ]
)
_ICMPS = st.sampled_from(
    [
        {"type": 8},
        {"type": "EchoRequest"},
        {"type": 0, "family": "IPv4"},
        {"type": "EchoRequest", "family": "IPv6"},
    ]
)


@st.composite
def _cilium_rules(draw: Any, side: str, deny: bool) -> Manifest:
    rule: Manifest = {}
    prefix = draw(st.sampled_from(["", "k8s:", "any:"]))
    kind = draw(st.integers(0, 6 if side == "to" else 5))
    if kind <= 1:
        endpoints = st.lists(selectors(prefix, namespaced=True), max_size=2)
        rule[f"{side}Endpoints"] = draw(endpoints)
    elif kind == 2:
        entities = ["all", "world", "cluster", "host", "remote-node", "none", "ingress"]
        if deny and side == "from":
            entities.remove("host")  # is refused
        rule[f"{side}Entities"] = draw(st.lists(st.sampled_from(entities), max_size=2))
    elif kind == 3:
        rule[f"{side}CIDR"] = draw(st.lists(_CIDRS, min_size=1, max_size=2))
    elif kind == 4:
        rule[f"{side}CIDRSet"] = [{"cidr": "192.0.2.0/24", "except": ["192.0.2.128/25"]}]
    elif kind == 6:
        namespace = draw(st.sampled_from(["a", "b"]))
        rule["toServices"] = [{"k8sService": {"serviceName": "svc", "namespace": namespace}}]
    ports = draw(st.integers(0, 3))
    if ports == 1:
        rule["toPorts"] = [{"ports": draw(st.lists(_PORTS, min_size=1, max_size=2))}]
    elif ports == 2:
        rule["icmps"] = [{"fields": draw(st.lists(_ICMPS, min_size=1, max_size=2))}]
    if not deny and draw(st.integers(0, 5)) == 0:
        rule[f"{side}Requires"] = [draw(selectors(prefix, namespaced=True))]
    return rule


@st.composite
def _specs(draw: Any) -> Manifest:
    spec: Manifest = {"endpointSelector": draw(selectors())}
    names = ["ingress", "egress", "ingressDeny", "egressDeny"]
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    for name in chosen:
        side, deny = ("from" if name.startswith("ingress") else "to"), name.endswith("Deny")
        spec[name] = draw(st.lists(_cilium_rules(side, deny), min_size=1, max_size=2))
    if draw(st.integers(0, 3)) == 0:
        flags = st.fixed_dictionaries({"ingress": st.booleans(), "egress": st.booleans()})
        spec["enableDefaultDeny"] = draw(flags)
    return spec


@st.composite
def cilium_policies(draw: Any) -> Manifest:
    namespaced = draw(st.booleans())
    kind = "CiliumNetworkPolicy" if namespaced else "CiliumClusterwideNetworkPolicy"
    policy: Manifest = {"kind": kind, "metadata": draw(_metadata(namespaced))}
    if draw(st.booleans()):
        policy["spec"] = draw(_specs())
    else:
        policy["specs"] = draw(st.lists(_specs(), min_size=1, max_size=2))
    return policy


@st.composite
def policies(draw: Any, most: int = 6, least: int = 0) -> list[Manifest]:
    kinds = st.one_of(network_policies(), cilium_policies())
    found = draw(st.lists(kinds, min_size=least, max_size=most))
    for number, policy in enumerate(found):
        policy["metadata"] = {**policy["metadata"], "name": f"p{number}"}
    return found


def model(found: list[Manifest]) -> World:
    return World(PODS, NAMESPACES, found, SERVICES)


def manifests(found: list[Manifest], node: str = "n1") -> str:
    """All of the world as one text."""
    objects: list[Manifest] = [
        {"kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        for name, labels in NAMESPACES.items()
    ]
    for one in OUTSIDE:
        if one.entity != "world":
            name = node if one.entity == "host" else "n2"
            addresses = [{"type": "InternalIP", "address": one.address}]
            objects.append(
                {"kind": "Node", "metadata": {"name": name}, "status": {"addresses": addresses}}
            )
    for pod in PODS:
        ports = [
            {"name": name, "protocol": protocol, "containerPort": port}
            for name, (protocol, port) in pod.ports.items()
        ]
        objects.append(
            {
                "kind": "Pod",
                "metadata": {
                    "name": pod.name,
                    "namespace": pod.namespace,
                    "labels": dict(pod.labels),
                },
                "spec": {
                    "nodeName": node,
                    "serviceAccountName": pod.account,
                    "containers": [{"name": "c", "ports": ports}],
                },
                "status": {"podIP": pod.address},
            }
        )
    for (namespace, name), addresses in SERVICES.items():
        objects.append(
            {
                "kind": "Service",
                "metadata": {"name": name, "namespace": namespace},
                "spec": {"ports": [{"port": 80}]},
            }
        )
        objects.append(
            {
                "kind": "EndpointSlice",
                "metadata": {
                    "name": name,
                    "namespace": namespace,
                    "labels": {"kubernetes.io/service-name": name},
                },
                "addressType": "IPv4",
                "ports": [{"port": 80}],
                "endpoints": [{"addresses": [address]} for address in addresses],
            }
        )
    return yaml.safe_dump_all([*objects, *found])
