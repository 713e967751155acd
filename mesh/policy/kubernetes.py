"""NetworkPolicy to what it says.

Source: https://kubernetes.io/docs/concepts/services-networking/network-policies/. Where it leaves
room: an ipBlock is about addresses that are neither a pod's nor a node's ("these should be
cluster-external IPs"). All fields are enforced.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.model import networkpolicy as k8s
from mesh.policy.cidr import canonical
from mesh.policy.spec import (
    Cidr,
    LabelKey,
    Peers,
    PortSpec,
    Rulebook,
    RuleSpec,
    Selector,
    Side,
    Spec,
    Term,
)

_NAMESPACE = LabelKey("namespace")
# "Traffic to and from the node where a Pod is running is always allowed." From there it is for all
# policies (mesh.policy.sections).
_OWN_NODE = RuleSpec("(a pod's own node is always allowed)", Peers(entities=("host",)))


def translate(policy: k8s.NetworkPolicy) -> Rulebook:
    spec, namespace = policy.spec, policy.metadata.namespace
    types = spec.policy_types or (("Ingress", "Egress") if spec.egress else ("Ingress",))
    ingress = egress = Side()
    if "Ingress" in types:
        rules = (
            _rule(f"ingress[{i}]", namespace, rule.from_, rule.ports)
            for i, rule in enumerate(spec.ingress)
        )
        ingress = Side(True, tuple(rules))
    if "Egress" in types:
        rules = (
            _rule(f"egress[{i}]", namespace, rule.to, rule.ports)
            for i, rule in enumerate(spec.egress)
        )
        egress = Side(True, (_OWN_NODE, *rules))
    return Rulebook((Spec(_pods(namespace, spec.pod_selector), ingress, egress),))


def _rule(
    place: str,
    namespace: str,
    peers: tuple[k8s.NetworkPolicyPeer, ...],
    ports: tuple[k8s.NetworkPolicyPort, ...],
) -> RuleSpec:
    return RuleSpec(
        place,
        _peers(namespace, peers) if peers else None,
        tuple(_port(port) for port in ports),
    )


def _peers(namespace: str, peers: tuple[k8s.NetworkPolicyPeer, ...]) -> Peers:
    selectors, cidrs = [], []
    for peer in peers:
        if peer.ip_block is not None:
            excepts = tuple(map(canonical, peer.ip_block.except_))
            cidrs.append(Cidr(canonical(peer.ip_block.cidr), excepts))
        elif peer.namespace_selector is not None:
            terms = (
                *_terms("namespace label", peer.namespace_selector),
                *_terms("label", peer.pod_selector or k8s.PodSelector()),
            )
            # Also an empty one selects pods only.
            selectors.append(selector((*terms, Term(_NAMESPACE, "Exists"))))
        elif peer.pod_selector is not None:
            selectors.append(_pods(namespace, peer.pod_selector))
    return Peers(selectors=tuple(selectors), cidrs=tuple(cidrs))


def _port(port: k8s.NetworkPolicyPort) -> PortSpec:
    if isinstance(port.port, str):
        return PortSpec(port.protocol, name=port.port)
    if port.port is None:
        return PortSpec(port.protocol)
    return PortSpec(port.protocol, port.port, port.end_port or port.port)


def _pods(namespace: str, pods: k8s.PodSelector) -> Selector:
    return selector((*_terms("label", pods), Term(_NAMESPACE, "In", (namespace,))))


def _terms(kind: str, pods: k8s.PodSelector) -> Iterable[Term]:
    for key, value in pods.match_labels.items():
        yield Term(LabelKey(kind, key), "In", (value,))  # type: ignore[arg-type]
    for one in pods.match_expressions:
        values = tuple(sorted(set(one.values)))
        yield Term(LabelKey(kind, one.key), one.operator, values)  # type: ignore[arg-type]


def selector(terms: Iterable[Term]) -> Selector:
    return Selector(tuple(sorted(set(terms))))
