"""What a policy says, in the one form that NetworkPolicy and Cilium's kinds become.

Selectors are not resolved yet: nothing here depends on pods. Shapes only.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from mesh.model.meta import ObjectKey
from mesh.model.policyconfig import HttpRule, PolicyProtocol


class LabelKey(NamedTuple):
    """What a requirement is about: a pod's label by name, its namespace or service account, a label
    of its namespace by name, or who it is if it is no pod ("reserved": host, world, …). "other": a
    source of labels that nothing here has."""

    kind: Literal["label", "namespace", "account", "namespace label", "reserved", "other"]
    name: str = ""


class Term(NamedTuple):
    """One requirement. `values` are sorted, and empty but for In and NotIn."""

    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()

    def holds(self, value: str | None) -> bool:
        """`value` None: there is no such label."""
        match self.operator:
            case "In":
                return value in self.values
            case "NotIn":
                return value not in self.values
            case "Exists":
                return value is not None
            case "DoesNotExist":
                return value is None


class Selector(NamedTuple):
    """All terms must hold. Equal ones are one, however they were written."""

    terms: tuple[Term, ...]


class Cidr(NamedTuple):
    """Addresses in `cidr` and in none of `excepts`, which lie within it."""

    cidr: str
    excepts: tuple[str, ...] = ()


class ServiceRef(NamedTuple):
    """The endpoints of a Service by `name`, or of those that `selector` selects by their labels, in
    all namespaces if `namespace` is ""."""

    namespace: str
    name: str = ""
    selector: Selector | None = None


class Peers(NamedTuple):
    """The other side of a connection: any of these. With nothing in it: nobody."""

    selectors: tuple[Selector, ...] = ()
    entities: tuple[str, ...] = ()
    cidrs: tuple[Cidr, ...] = ()
    services: tuple[ServiceRef, ...] = ()


class PortSpec(NamedTuple):
    """`name`: that of a port among those of the pods' containers, and no number."""

    protocol: PolicyProtocol
    first: int = 0
    last: int = 65535
    name: str = ""


class RuleSpec(NamedTuple):
    """`place`: where in the policy it stands. `peers` None: everybody; `ports` empty: all; `http`
    and `authenticated` as in PolicyRule."""

    place: str
    peers: Peers | None = None
    ports: tuple[PortSpec, ...] = ()
    deny: bool = False
    http: tuple[HttpRule, ...] | None = None
    authenticated: bool = False


class Side(NamedTuple):
    """One direction of a policy. `requires`: what peers that rules select by labels must be as
    well, in whichever policy those rules stand (fromRequires, toRequires)."""

    default_deny: bool = False
    rules: tuple[RuleSpec, ...] = ()
    requires: tuple[Selector, ...] = ()


class Spec(NamedTuple):
    """What a policy says about the pods that `subject` selects."""

    subject: Selector
    ingress: Side = Side()
    egress: Side = Side()


class Rulebook(NamedTuple):
    """A policy. `problems`: why it is refused, each beginning with the field; its specs then refuse
    all that it might have refused, and allow nothing."""

    specs: tuple[Spec, ...]
    problems: tuple[str, ...] = ()


class PolicyKey(NamedTuple):
    kind: str
    namespace: str
    name: str

    @property
    def object(self) -> ObjectKey:
        return ObjectKey(self.namespace, self.name)

    def __str__(self) -> str:
        return f"{self.kind} {self.object}"


# One spec of a policy, by its place among them.
SpecKey: TypeAlias = tuple[PolicyKey, int]

# No policy needs more, and every rule costs the nodes of all pods that it is about.
MAX_RULES = 1000
# HTTP rules with their headers: a proxy asks each of them at a request, and all others wait.
MAX_HTTP = 2000
MAX_CIDRS = 5000

KINDS = ("NetworkPolicy", "CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy")


def oversized(specs: tuple[Spec, ...]) -> tuple[str, ...]:
    """Why a policy is too large, as problems."""
    sides = [side for one in specs for side in (one.ingress, one.egress)]
    rules = [rule for side in sides for rule in side.rules]
    cidrs = [one for rule in rules if rule.peers is not None for one in rule.peers.cidrs]
    ranges = sum(1 + len(one.excepts) for one in cidrs)
    found = []
    if len(rules) > MAX_RULES:
        found.append(f"{len(rules)} rules, {MAX_RULES} are the most; make several policies")
    http = sum(1 + len(one.headers) for rule in rules for one in rule.http or ())
    if http > MAX_HTTP:
        found.append(f"{http} HTTP rules and headers, {MAX_HTTP} are the most")
    if ranges > MAX_CIDRS:
        found.append(f"{ranges} CIDRs, {MAX_CIDRS} are the most")
    return tuple(f"spec: has {one}" for one in found)


def refused(specs: tuple[Spec, ...], problems: tuple[str, ...]) -> Rulebook:
    """The rulebook of a policy that is not enforced: it fails closed. Refusing by default does, but
    where a rule could have stood above other policies', or have made a port STRICT, everything is
    denied."""

    def close(side: Side) -> Side:
        strict = side.requires or any(rule.deny or rule.authenticated for rule in side.rules)
        rules = (RuleSpec("refused, so it denies", deny=True),) if strict else ()
        return Side(side.default_deny, rules)

    closed = (Spec(one.subject, close(one.ingress), close(one.egress)) for one in specs)
    return Rulebook(tuple(closed), problems)
