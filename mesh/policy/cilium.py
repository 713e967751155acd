"""CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy to what they say, or why they are not
enforced.

Sources: the CRDs' descriptions, https://docs.cilium.io/en/stable/security/policy/, and what Cilium
itself asks beyond the schema (pkg/policy/api/rule_validation.go, pkg/k8s/apis/cilium.io/utils).
What Weft does not enforce is refused as well; every problem begins with the field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from mesh.model import ciliumnetworkpolicy as c
from mesh.model.networkpolicy import Selector as CiliumSelector
from mesh.policy.cidr import canonical, covers
from mesh.policy.cilium_http import http_rules
from mesh.policy.cilium_ports import icmp_ports, port_specs
from mesh.policy.kubernetes import selector
from mesh.policy.problems import Problems
from mesh.policy.spec import (
    Cidr,
    LabelKey,
    Peers,
    Rulebook,
    RuleSpec,
    Selector,
    ServiceRef,
    Side,
    Spec,
    Term,
    refused,
)

_Policy: TypeAlias = c.CiliumNetworkPolicy | c.CiliumClusterwideNetworkPolicy
_Ingress: TypeAlias = c.IngressRule | c.IngressDenyRule
_Egress: TypeAlias = c.EgressRule | c.EgressDenyRule

_NAMESPACE = LabelKey("namespace")

_NO_NODES = "policies are enforced at pods; selecting nodes is not supported"
# Fields of rules that nothing here enforces.
_UNSUPPORTED = {
    "from_nodes": ("fromNodes", _NO_NODES),
    "to_nodes": ("toNodes", _NO_NODES),
    "from_groups": ("fromGroups", "groups of cloud providers are not supported"),
    "to_groups": ("toGroups", "groups of cloud providers are not supported"),
    "to_fqdns": ("toFQDNs", "names of the DNS are not supported; use toCIDR or toServices"),
}


def translate(policy: _Policy) -> Rulebook:
    """Never fails: what cannot be enforced is in the rulebook's problems, and it fails closed."""
    problems = Problems()
    given = ([("spec", policy.spec)] if policy.spec is not None else []) + [
        (f"specs[{i}]", one) for i, one in enumerate(policy.specs)
    ]
    if not given:
        problems.add("spec", "is missing, and so is specs: nothing is said")
    specs = tuple(_Reader(policy, place, problems).spec(spec) for place, spec in given)
    return refused(specs, problems.found) if problems.found else Rulebook(specs)


class _Reader:
    """One spec of a policy."""

    def __init__(self, policy: _Policy, place: str, problems: Problems) -> None:
        self._namespace = policy.metadata.namespace
        self._place = place
        self._problems = problems

    def spec(self, spec: c.CiliumPolicySpec) -> Spec:
        if spec.node_selector is not None:
            self._problems.add(f"{self._place}.nodeSelector", _NO_NODES)
        deny = spec.enable_default_deny
        rules = (spec.ingress, spec.ingress_deny, spec.egress, spec.egress_deny)
        if not any(rules):
            self._problems.add(self._place, "has no rules of either direction")
        ingress = self._side(
            bool(spec.ingress or spec.ingress_deny) if deny.ingress is None else deny.ingress,
            [
                *(self._ingress(f"ingress[{i}]", rule) for i, rule in enumerate(spec.ingress)),
                *(
                    self._ingress(f"ingressDeny[{i}]", rule)
                    for i, rule in enumerate(spec.ingress_deny)
                ),
            ],
            [rule.from_requires for rule in spec.ingress],
        )
        egress = self._side(
            bool(spec.egress or spec.egress_deny) if deny.egress is None else deny.egress,
            [
                *(self._egress(f"egress[{i}]", rule) for i, rule in enumerate(spec.egress)),
                *(
                    self._egress(f"egressDeny[{i}]", rule)
                    for i, rule in enumerate(spec.egress_deny)
                ),
            ],
            [rule.to_requires for rule in spec.egress],
        )
        return Spec(self._subject(spec), ingress, egress)

    def _side(
        self,
        default_deny: bool,
        rules: Sequence[tuple[RuleSpec, ...]],
        requires: Sequence[tuple[CiliumSelector, ...] | None],
    ) -> Side:
        return Side(
            default_deny,
            tuple(one for group in rules for one in group),
            tuple(self._peer(one) for group in requires for one in group or ()),
        )

    # --- selectors ------------------------------------------------------------------------------

    def _subject(self, spec: c.CiliumPolicySpec) -> Selector:
        if spec.endpoint_selector is None:
            return Selector((Term(_NAMESPACE, "DoesNotExist"),))
        terms = list(_terms(spec.endpoint_selector))
        field = f"{self._place}.endpointSelector"
        if any(term.key.kind == "reserved" for term in terms):
            self._problems.add(
                field, "selects what is no pod (reserved:); policies are enforced at pods"
            )
        if self._namespace:
            other = [t for t in terms if t.key == _NAMESPACE and not t.holds(self._namespace)]
            if other:
                self._problems.add(
                    field, f"selects pods outside of the policy's namespace, {self._namespace}"
                )
            terms = [term for term in terms if term not in other]
            terms.append(Term(_NAMESPACE, "In", (self._namespace,)))
        return selector((*terms, Term(_NAMESPACE, "Exists")))

    def _peer(self, given: CiliumSelector) -> Selector:
        """Pods of the policy's namespace, or of all for a clusterwide one, unless it says of which.
        What is no pod only where it is asked for."""
        terms = list(_terms(given))
        if not any(term.key == _NAMESPACE or term.key.kind == "reserved" for term in terms):
            scope = ("In", (self._namespace,)) if self._namespace else ("Exists", ())
            terms.append(Term(_NAMESPACE, *scope))
        return selector(terms)

    # --- rules ----------------------------------------------------------------------------------

    def _ingress(self, place: str, rule: _Ingress) -> tuple[RuleSpec, ...]:
        kinds = {
            "fromEndpoints": rule.from_endpoints,
            "fromCIDR": rule.from_cidr,
            "fromCIDRSet": rule.from_cidr_set,
            "fromEntities": rule.from_entities,
            "fromNodes": rule.from_nodes,
            "fromGroups": rule.from_groups,
        }
        self._check(place, kinds, rule)
        peers = self._peers(
            place,
            rule.from_endpoints,
            rule.from_cidr,
            ("fromCIDRSet", rule.from_cidr_set),
            rule.from_entities,
            (),
        )
        nothing = all(one is None for one in kinds.values())
        return tuple(self._rules(place, None if nothing else peers, rule))

    def _egress(self, place: str, rule: _Egress) -> tuple[RuleSpec, ...]:
        kinds = {
            "toEndpoints": rule.to_endpoints,
            "toCIDR": rule.to_cidr,
            "toCIDRSet": rule.to_cidr_set,
            "toEntities": rule.to_entities,
            "toServices": rule.to_services,
            "toFQDNs": rule.to_fqdns if isinstance(rule, c.EgressRule) else None,
            "toNodes": rule.to_nodes,
            "toGroups": rule.to_groups,
        }
        self._check(place, kinds, rule)
        peers = self._peers(
            place,
            rule.to_endpoints,
            rule.to_cidr,
            ("toCIDRSet", rule.to_cidr_set),
            rule.to_entities,
            rule.to_services or (),
        )
        nothing = all(one is None for one in kinds.values())
        return tuple(self._rules(place, None if nothing else peers, rule))

    def _check(self, place: str, kinds: Mapping[str, object], rule: _Ingress | _Egress) -> None:
        where = f"{self._place}.{place}"
        for attribute, (name, why) in _UNSUPPORTED.items():
            if getattr(rule, attribute, None):
                self._problems.add(f"{where}.{name}", why)
        several = [name for name, value in kinds.items() if value]
        if len(several) > 1:
            self._problems.add(
                f"{where}.{several[1]}",
                f"does not go together with {several[0]}; make them two rules",
            )
        if rule.icmps and rule.to_ports:
            self._problems.add(
                f"{where}.icmps", "does not go together with toPorts; make them two rules"
            )
        if _authentication(rule) == "test-always-fail":
            self._problems.add(f"{where}.authentication.mode", "test-always-fail is not supported")
        if isinstance(rule, c.IngressDenyRule) and "host" in (rule.from_entities or ()):
            self._problems.add(
                f"{where}.fromEntities",
                "host cannot be denied: a pod's own node may always reach it",
            )
        side = "from" if isinstance(rule, c.IngressRule | c.IngressDenyRule) else "to"
        if _denies(rule) and getattr(rule, f"{side}_requires"):
            self._problems.add(f"{where}.{side}Requires", "is not supported in a deny rule")

    def _rules(
        self, place: str, peers: Peers | None, rule: _Ingress | _Egress
    ) -> Iterator[RuleSpec]:
        """One for each group of ports, for these may have rules of their own about requests. A rule
        that says nothing at all allows nothing."""
        deny, required = _denies(rule), _authentication(rule) == "required"
        where = f"{self._place}.{place}"
        if rule.icmps:
            ports = icmp_ports(rule.icmps, f"{where}.icmps", self._problems)
            yield RuleSpec(self._named(place), peers, ports, deny, None, required)
        for index, group in enumerate(rule.to_ports or ()):
            here = f"{where}.toPorts[{index}]"
            ports = port_specs(group.ports, here, self._problems)
            rules = (
                http_rules(group, here, self._problems) if isinstance(group, c.PortRule) else None
            )
            name = self._named(
                f"{place}.toPorts[{index}]" if len(rule.to_ports or ()) > 1 else place
            )
            yield RuleSpec(name, peers, ports, deny, rules, required)
        if not rule.icmps and not rule.to_ports and peers is not None:
            yield RuleSpec(self._named(place), peers, (), deny, None, required)

    def _named(self, place: str) -> str:
        return place if self._place == "spec" else f"{self._place}.{place}"

    # --- peers ----------------------------------------------------------------------------------

    def _peers(
        self,
        place: str,
        endpoints: tuple[CiliumSelector, ...] | None,
        cidrs: tuple[str, ...] | None,
        cidr_set: tuple[str, tuple[c.CIDRRule, ...] | None],
        entities: tuple[str, ...] | None,
        services: tuple[c.ServiceRule, ...],
    ) -> Peers:
        side = "from" if place.startswith("ingress") else "to"
        where = f"{self._place}.{place}"
        found = [
            Cidr(cidr)
            for i, text in enumerate(cidrs or ())
            if (cidr := self._cidr(f"{where}.{side}CIDR[{i}]", text)) is not None
        ]
        name, ranges = cidr_set
        for i, one in enumerate(ranges or ()):
            if (whole := self._range(f"{where}.{name}[{i}]", one)) is not None:
                found.append(whole)
        return Peers(
            tuple(map(self._peer, endpoints or ())),
            entities or (),
            tuple(found),
            tuple(
                ref
                for i, service in enumerate(services)
                for ref in self._service(f"{where}.toServices[{i}]", service)
            ),
        )

    def _cidr(self, field: str, text: str) -> str | None:
        try:
            return canonical(text)
        except ValueError as error:
            self._problems.add(field, f"{text!r} is no CIDR: {error}")
            return None

    def _range(self, field: str, rule: c.CIDRRule) -> Cidr | None:
        if rule.cidr is None:
            self._problems.add(
                f"{field}.cidrGroupRef", "CiliumCIDRGroups are not supported; write the CIDRs here"
            )
            return None
        whole = self._cidr(f"{field}.cidr", rule.cidr)
        excepts = []
        for i, text in enumerate(rule.except_):
            part = self._cidr(f"{field}.except[{i}]", text)
            if part is None or whole is None:
                continue
            if not covers(whole, part):
                self._problems.add(f"{field}.except[{i}]", f"{part} is no part of {whole}")
            excepts.append(part)
        return Cidr(whole, tuple(excepts)) if whole is not None else None

    def _service(self, field: str, rule: c.ServiceRule) -> Iterator[ServiceRef]:
        by_name, by_labels = rule.k8s_service, rule.k8s_service_selector
        if by_name is not None:
            namespace = by_name.namespace or self._namespace
            if not by_name.service_name:
                self._problems.add(f"{field}.k8sService.serviceName", "is missing")
            elif not namespace:
                self._problems.add(f"{field}.k8sService.namespace", "is missing")
            else:
                yield ServiceRef(namespace, by_name.service_name)
        if by_labels is not None:
            terms = (
                Term(LabelKey("label", key), "In", (value,))
                for key, value in by_labels.selector.match_labels.items()
            )
            more = (
                Term(LabelKey("label", one.key), one.operator, tuple(sorted(set(one.values))))
                for one in by_labels.selector.match_expressions
            )
            yield ServiceRef(by_labels.namespace, selector=selector((*terms, *more)))
        if by_name is None and by_labels is None:
            self._problems.add(field, "names no Service")


def _denies(rule: _Ingress | _Egress) -> bool:
    return isinstance(rule, c.IngressDenyRule | c.EgressDenyRule)


def _authentication(rule: _Ingress | _Egress) -> str | None:
    if isinstance(rule, c.IngressRule | c.EgressRule) and rule.authentication is not None:
        return rule.authentication.mode
    return None


def _terms(given: CiliumSelector) -> Iterator[Term]:
    for key, value in given.match_labels.items():
        yield Term(label_key(key), "In", (value,))
    for one in given.match_expressions:
        yield Term(label_key(one.key), one.operator, tuple(sorted(set(one.values))))


_ACCOUNT = "io.cilium.k8s.policy.serviceaccount"
_POD_NAMESPACE = "io.kubernetes.pod.namespace"
_NAMESPACE_LABELS = "io.cilium.k8s.namespace.labels."


def label_key(text: str) -> LabelKey:
    """A key as Cilium writes it: "source:name"; of pods all labels are of source k8s, "any" is any
    source, and so is none."""
    source, colon, name = text.partition(":")
    if not colon:
        name = source
    elif source == "reserved":
        return LabelKey("reserved", name)
    elif source not in ("k8s", "any"):
        return LabelKey("other", text)
    if name == _POD_NAMESPACE:
        return _NAMESPACE
    if name == _ACCOUNT:
        return LabelKey("account")
    if name.startswith(_NAMESPACE_LABELS):
        return LabelKey("namespace label", name.removeprefix(_NAMESPACE_LABELS))
    return LabelKey("label", name)
