"""Where policies ask about requests: the addresses and ports of pods to which connections must go
through a proxy that reads HTTP, whatever their Services declare.

Functions of the derivation. Of pods of this node those whose ingress rules ask, of all pods those
that egress rules of a pod of this node ask about. Addresses that are no pod's are not reached by
the proxy; what rules about requests allow there is refused. In audit mode nothing is changed for
the sake of rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import WorkloadSection
from mesh.model.policyconfig import PortRange
from mesh.policy.audit import audited
from mesh.policy.peers import Identities
from mesh.policy.sections import Resolved, ResolvedSpec, numbers
from mesh.policy.spec import SpecKey

Place: TypeAlias = tuple[str, int]

# Of a range of ports so many are looked at; connections to further ones are refused.
_MOST = 64


def judged(view: View, key: SpecKey) -> frozenset[Place] | None:
    spec: ResolvedSpec | None = view.get("resolved", key)
    if spec is None or spec.audit:
        return None
    if not any(one.rule.http for side in (spec.ingress, spec.egress) for one in side.rules):
        return None
    subjects = _pods(view, view.get("subjects", key) or ())
    local = [pod for pod in subjects if pod.local and not _audited(view, pod)]
    found = {place for pod in local for place in _ingress(view, spec.ingress, pod)}
    if local:
        found.update(_egress(view, spec.egress))
    return frozenset(found) or None


def places(key: SpecKey, found: frozenset[Place]) -> frozenset[Place]:
    """For an index."""
    return found


def _ingress(view: View, side: Resolved, pod: WorkloadSection) -> Iterator[Place]:
    names = view.get("port_names", (pod.namespace, pod.name)) or frozenset()
    for one in side.rules:
        if one.rule.http:
            yield from _at(pod, one.rule.ports + numbers(one.names, names))


def _egress(view: View, side: Resolved) -> Iterator[Place]:
    for one in side.rules:
        if one.rule.http:
            peers = one.rule.peers
            for pod in _pods(view, peers if peers is not None else _everybody(view)):
                yield from _at(pod, one.rule.ports)


def _at(pod: WorkloadSection, ports: Iterable[PortRange]) -> Iterator[Place]:
    for ports_ in ports:
        if ports_.protocol == "TCP":
            for port in range(ports_.first, min(ports_.last + 1, ports_.first + _MOST)):
                for address in pod.addresses:
                    yield address, port


def _pods(view: View, identities: Iterable[int]) -> Iterator[WorkloadSection]:
    for identity in identities:
        for pod in view.bucket("pods_of_identity", identity):
            yield view.get("workloads", pod)


def _audited(view: View, pod: WorkloadSection) -> bool:
    namespace = view.get("Namespace", ObjectKey("", pod.namespace))
    return namespace is not None and audited(namespace)


def _everybody(view: View) -> Identities:
    return frozenset(view.get("identities", one) for one in view.bucket("labelled", ("", "", "")))
