"""NetworkPolicy, networking.k8s.io/v1, and the label selectors that policies of all kinds have.

Sources: the published API (https://kubernetes.io/docs/reference/kubernetes-api/policy-resources/
network-policy-v1/) and its description (.../docs/concepts/services-networking/network-policies/).
Shapes only; what they mean is mesh.policy's.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from mesh.model import scalars as s
from mesh.model.core import Protocol
from mesh.model.meta import Condition, Model, ObjectMeta


class SelectorRequirement(Model, frozen=True, kw_only=True):
    """metav1.LabelSelectorRequirement, with the operators that there are."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()


class Selector(Model, frozen=True, kw_only=True):
    """metav1.LabelSelector: all of it must hold, so an empty one selects everything."""

    match_labels: dict[str, s.LabelValue] = msgspec.field(default_factory=dict)
    match_expressions: tuple[SelectorRequirement, ...] = ()


class PodSelector(Selector, frozen=True, kw_only=True):
    """A selector of Kubernetes' own kinds, whose keys are labels' names."""


class IPBlock(Model, frozen=True, kw_only=True):
    """`except_` are ranges within `cidr` that are not meant."""

    cidr: str
    except_: tuple[str, ...] = msgspec.field(default=(), name="except")


class NetworkPolicyPeer(Model, frozen=True, kw_only=True):
    """Pods (of the policy's namespace, or of those that `namespace_selector` selects), or
    addresses."""

    pod_selector: PodSelector | None = None
    namespace_selector: PodSelector | None = None
    ip_block: IPBlock | None = None


class NetworkPolicyPort(Model, frozen=True, kw_only=True):
    """`port` None: all of the protocol; text: a name among the ports of the pods' containers."""

    protocol: Protocol = "TCP"
    port: s.Int64 | str | None = None
    end_port: s.Int64 | None = None


class NetworkPolicyIngressRule(Model, frozen=True, kw_only=True):
    """An empty `from_` is everybody, empty `ports` are all."""

    from_: tuple[NetworkPolicyPeer, ...] = msgspec.field(default=(), name="from")
    ports: tuple[NetworkPolicyPort, ...] = ()


class NetworkPolicyEgressRule(Model, frozen=True, kw_only=True):
    to: tuple[NetworkPolicyPeer, ...] = ()
    ports: tuple[NetworkPolicyPort, ...] = ()


class NetworkPolicySpec(Model, frozen=True, kw_only=True):
    """`policy_types` (): Ingress, and Egress if there are egress rules."""

    pod_selector: PodSelector = PodSelector()
    policy_types: tuple[Literal["Ingress", "Egress"], ...] = ()
    ingress: tuple[NetworkPolicyIngressRule, ...] = ()
    egress: tuple[NetworkPolicyEgressRule, ...] = ()


class NetworkPolicyStatus(Model, frozen=True, kw_only=True):
    """Kubernetes had it from 1.24 to 1.27; Weft says there what is in force."""

    conditions: tuple[Condition, ...] = ()


class NetworkPolicy(Model, frozen=True, kw_only=True):
    api_version: str = "networking.k8s.io/v1"
    kind: Literal["NetworkPolicy"] = "NetworkPolicy"
    metadata: ObjectMeta
    spec: NetworkPolicySpec = NetworkPolicySpec()
    status: NetworkPolicyStatus | None = None
