"""Where policy asks for mutual TLS: the ports of pods at which an ingress rule says
`authentication.mode: required`.

Functions of the derivation (mesh.policy.tables). Such a port is STRICT, whatever the pod's
annotations say (gateway.workloads); whom the rule lets in there is for the pod's policy to say. In
audit mode nothing is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.policy.audit import audited
from mesh.policy.peers import Identities
from mesh.policy.sections import NamedPort, numbers
from mesh.policy.spec import PortSpec, Spec, SpecKey

# What stands for all ports of a pod.
ALL = 0
# A range of more is all of them.
_MANY = 1024
_ANY_PORT = PortSpec("ANY")


class Demand(NamedTuple):
    """Of a spec: at which ports of whom."""

    ports: tuple[PortSpec, ...]
    whom: Identities


def demands(everything_audited: bool) -> Callable[[View, SpecKey], Demand | None]:
    def compute(view: View, key: SpecKey) -> Demand | None:
        policy, _ = key
        spec: Spec = view.get("specs", key)
        ports = tuple(
            port
            for rule in spec.ingress.rules
            if rule.authenticated
            for port in rule.ports or (_ANY_PORT,)
            if not port.protocol.startswith("ICMP")
        )
        if not ports or everything_audited or audited(view.get("Policy", policy)):
            return None
        return Demand(ports, view.get("selected", spec.subject) or frozenset())

    return compute


def demanded(view: View, key: ObjectKey) -> frozenset[int] | None:
    """The ports of a pod, or ALL among them; None: there is none."""
    identity = view.get("identities", view.get("pods", key).labels)
    specs = view.bucket("demands_on", identity)
    if not specs:
        return None
    namespace = view.get("Namespace", ObjectKey("", key.namespace))
    if namespace is not None and audited(namespace):
        return None
    names: frozenset[NamedPort] = view.get("port_names", key) or frozenset()
    found: set[int] = set()
    for spec in specs:
        wanted: Demand = view.get("demands", spec)
        for port in wanted.ports:
            if port.name:
                found.update(one.first for one in numbers((port,), names))
            elif port.last - port.first < _MANY:
                found.update(range(port.first, port.last + 1))
            else:
                found.add(ALL)
    return frozenset(found) or None
