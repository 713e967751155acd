"""What is in force for each pod of this node: PolicySections and CidrSections.

Functions of the derivation (mesh.policy.tables). What a spec says is resolved once for all pods
that it selects, which then share it; only named ports of ingress rules are the pod's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import msgspec

from mesh.model.derive import View
from mesh.model.identity import Reserved
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import WorkloadSection
from mesh.model.pod import Pod
from mesh.model.policyconfig import (
    CidrSection,
    Direction,
    PolicyProtocol,
    PolicyRule,
    PolicySection,
    PortRange,
)
from mesh.policy.audit import audited
from mesh.policy.peers import Identities, ranges, resolve
from mesh.policy.spec import PolicyKey, PortSpec, RuleSpec, Selector, Side, SpecKey

# Kubelet's probes come from there, and whoever has the node has its pods.
_OWN_NODE = PolicyRule("(a pod's own node is always allowed)", frozenset({Reserved.HOST}))


_UNKNOWN = "(a pod that is not known yet is denied the directions in which some policy denies)"


class NamedPort(NamedTuple):
    """A name among the ports of a pod's containers, in lower case."""

    name: str
    protocol: PolicyProtocol
    port: int


class _Rule(NamedTuple):
    """`names`: ports that a pod has yet to say the numbers of; `labelled`: those of its peers that
    are selected by labels, for whom `requires` counts."""

    rule: PolicyRule
    names: tuple[PortSpec, ...]
    labelled: Identities


class Resolved(NamedTuple):
    """One direction of a spec."""

    default_deny: bool
    rules: tuple[_Rule, ...]
    requires: tuple[Identities, ...]


class ResolvedSpec(NamedTuple):
    policy: PolicyKey
    audit: bool
    ingress: Resolved
    egress: Resolved


# --- pods ----------------------------------------------------------------------------------------


def port_names(view: View, key: ObjectKey) -> frozenset[NamedPort] | None:
    """The named ports of a pod; None: it has none."""
    pod: Pod = view.get("Pod", key)
    found = (port for container in pod.spec.containers for port in container.ports)
    return (
        frozenset(
            NamedPort(port.name.lower(), port.protocol, port.container_port)
            for port in found
            if port.name
        )
        or None
    )


def identity_of(key: ObjectKey, workload: WorkloadSection) -> Iterator[int]:
    """The identity of a pod (for an index)."""
    yield workload.identity


def subject_identities(key: SpecKey, found: Identities) -> Identities:
    """Whom a spec is about (for an index)."""
    return found


def subjects(view: View, key: SpecKey) -> Identities | None:
    selector: Selector = view.get("specs", key).subject
    return view.get("selected", selector)  # type: ignore[no-any-return]


# --- specs ---------------------------------------------------------------------------------------


def resolved(everything_audited: bool) -> Callable[[View, SpecKey], ResolvedSpec]:
    def compute(view: View, key: SpecKey) -> ResolvedSpec:
        policy, _ = key
        spec = view.get("specs", key)
        audit = everything_audited or audited(view.get("Policy", policy))
        return ResolvedSpec(
            policy,
            audit,
            _side(view, policy, spec.ingress, audit, egress=False),
            _side(view, policy, spec.egress, audit, egress=True),
        )

    return compute


def _side(view: View, policy: PolicyKey, side: Side, audit: bool, *, egress: bool) -> Resolved:
    return Resolved(
        side.default_deny,
        tuple(
            one
            for rule in side.rules
            for one in _rules(view, policy, rule, audit=audit, egress=egress)
        ),
        tuple(view.get("selected", selector) or frozenset() for selector in side.requires),
    )


def _rules(
    view: View, policy: PolicyKey, rule: RuleSpec, *, audit: bool, egress: bool
) -> Iterator[_Rule]:
    """For egress a named port is a number for each peer by itself, so there may be several."""
    whom = resolve(view, rule.peers)
    numbered = tuple(PortRange(*port[:3]) for port in rule.ports if not port.name)
    names = tuple(port for port in rule.ports if port.name)
    selectors = rule.peers.selectors if rule.peers is not None else ()
    labelled = frozenset[int]().union(*(view.get("selected", one) or () for one in selectors))
    base = PolicyRule(
        source=f"{policy} {rule.place}",
        peers=whom,
        ports=numbered,
        deny=rule.deny,
        http=rule.http,
        authenticated=rule.authenticated,
        audit=audit,
    )
    if not rule.ports or numbered or (names and not egress):
        yield _Rule(base, () if egress else names, labelled)
    if egress and names:
        for ports, those in _by_named_ports(view, whom, names, rule.deny).items():
            narrowed = msgspec.structs.replace(base, peers=frozenset(those), ports=ports)
            yield _Rule(narrowed, (), labelled)


def _by_named_ports(
    view: View, whom: Identities | None, names: tuple[PortSpec, ...], deny: bool
) -> dict[tuple[PortRange, ...], set[int]]:
    """Identities by what the names are for their pods: what no pod has a name for is no port. Where
    pods of one identity do not agree, what all of them say is allowed, and what any says denied."""
    if whom is None:
        whom = frozenset(view.get("identities", one) for one in view.bucket("labelled", ("",) * 3))
    result: dict[tuple[PortRange, ...], set[int]] = {}
    for identity in sorted(whom):
        found = [
            frozenset(numbers(names, view.get("port_names", pod) or ()))
            for pod in view.bucket("pods_of_identity", identity)
        ]
        if found:
            ports = frozenset.union(*found) if deny else frozenset.intersection(*found)
            if ports:
                result.setdefault(tuple(sorted(ports, key=msgspec.structs.astuple)), set()).add(
                    identity
                )
    return result


def numbers(names: Iterable[PortSpec], known: Iterable[NamedPort]) -> tuple[PortRange, ...]:
    """The ports that a pod has by these names."""
    wanted = {(spec.name.lower(), spec.protocol) for spec in names}
    found = {(one.protocol, one.port) for one in known if (one.name, one.protocol) in wanted}
    return tuple(PortRange(protocol, port, port) for protocol, port in sorted(found))


# --- sections ------------------------------------------------------------------------------------


def pod_policies(view: View, key: ObjectKey) -> PolicySection | None:
    """None: the pod is not this node's, or no policy selects it."""
    workload: WorkloadSection = view.get("workloads", key)
    if not workload.local:
        return None
    keys: list[SpecKey] = sorted(view.bucket("specs_on", workload.identity))
    if not keys:
        return None
    specs: list[ResolvedSpec] = [view.get("resolved", one) or _closed(one) for one in keys]
    namespace = view.get("Namespace", ObjectKey("", key.namespace))
    all_audited = namespace is not None and audited(namespace)
    names: frozenset[NamedPort] = view.get("port_names", key) or frozenset()
    ingress = _direction([(one, one.ingress) for one in specs], all_audited, names)
    if ingress.default_deny:
        ingress = msgspec.structs.replace(ingress, rules=(_OWN_NODE, *ingress.rules))
    return PolicySection(
        namespace=key.namespace,
        pod=key.name,
        identity=workload.identity,
        addresses=workload.addresses,
        ingress=ingress,
        egress=_direction([(one, one.egress) for one in specs], all_audited, names),
    )


def _closed(key: SpecKey) -> ResolvedSpec:
    """Of a spec that could not be resolved, which is a defect."""
    policy, _ = key
    rule = PolicyRule(f"{policy} (a defect in Weft, so it denies)", deny=True)
    side = Resolved(True, (_Rule(rule, (), frozenset()),), ())
    return ResolvedSpec(policy, audit=False, ingress=side, egress=side)


def closing(key: SpecKey, spec: ResolvedSpec) -> Iterator[str]:
    """What a spec denies, by default or by a rule (for an index): directions, and "" for either."""
    if not spec.audit:
        sides = {"ingress": spec.ingress, "egress": spec.egress}
        found = [
            name
            for name, side in sides.items()
            if side.default_deny or any(one.rule.deny for one in side.rules)
        ]
        yield from (*found, *([""] if found else ()))


def unknown(view: View, key: str) -> PolicySection | None:
    """For pods that nobody has told of yet, at the address that none has: as long as some pods are
    denied something, these are denied all."""
    if key:
        return None

    def side(name: str, *rules: PolicyRule) -> Direction:
        if not view.bucket("closing", name):
            return Direction()
        return Direction(default_deny=True, selected_by=(_UNKNOWN,), rules=rules)

    return PolicySection(
        namespace="",
        pod="",
        identity=int(Reserved.INIT),
        addresses=("::",),
        ingress=side("ingress", _OWN_NODE),
        egress=side("egress"),
    )


def _direction(
    specs: list[tuple[ResolvedSpec, Resolved]], all_audited: bool, names: frozenset[NamedPort]
) -> Direction:
    denying = [spec for spec, side in specs if side.default_deny]
    enforced = [one for spec, side in specs if not spec.audit for one in side.requires]
    rules = []
    for spec, side in specs:
        # What only tells what it would do counts with what is only told.
        requires = enforced if not spec.audit else [r for _, one in specs for r in one.requires]
        for one in side.rules:
            rule = _own(one, names, requires)
            if rule is not None:
                audit = rule.audit or all_audited
                rules.append(msgspec.structs.replace(rule, audit=True) if audit else rule)
    return Direction(
        default_deny=bool(denying),
        audit=bool(denying) and (all_audited or all(spec.audit for spec in denying)),
        selected_by=tuple(dict.fromkeys(str(spec.policy) for spec in denying)),
        rules=tuple(rules),
    )


def _own(one: _Rule, names: frozenset[NamedPort], requires: list[Identities]) -> PolicyRule | None:
    """The rule for one pod. None: its named ports are none of the pod's, so it says nothing."""
    rule = one.rule
    if one.names:
        ports = rule.ports + numbers(one.names, names)
        if not ports:
            return None
        rule = msgspec.structs.replace(rule, ports=ports)
    if one.labelled and requires and not rule.deny and rule.peers is not None:
        lacking = one.labelled - one.labelled.intersection(*requires)
        rule = msgspec.structs.replace(rule, peers=rule.peers - lacking)
    return rule


def hosted(key: ObjectKey, workload: WorkloadSection) -> Iterator[int]:
    """The identity of a pod of this node (for an index)."""
    if workload.local:
        yield workload.identity


def named_here(view: View, key: SpecKey) -> frozenset[str] | None:
    """The ranges that a spec names; None: there are none, or it selects no pod of this node."""
    found = frozenset(ranges(key, view.get("specs", key)))
    if found and any(view.bucket("hosted", one) for one in view.get("subjects", key) or ()):
        return found
    return None


def range_here(view: View, text: str) -> int | None:
    """The identity of a range, where there are addresses that have it; None: no policy names it."""
    number: int | None = view.get("range_identities", text)
    return number


def cidr_sections(view: View, text: str) -> CidrSection | None:
    """None: the range is a node's own address, which has that node's identity, unless it is the API
    server's as well."""
    if view.bucket("node_at", text) and not view.bucket("api_range", text):
        return None
    if view.bucket("pod_ranges", text):
        return CidrSection(text, int(Reserved.INIT))
    here = bool(view.bucket("ranges_here", text))
    number: int | None = view.get("range_identities", text)
    return CidrSection(text, number, here) if number is not None else None
