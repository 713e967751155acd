"""CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy, cilium.io/v2.

Source: Cilium's published CRDs. All their fields are here, also those that Weft does not enforce:
mesh.policy refuses these by name. Of fields that came later, `endPort` is here as well. Where the
CRD tells an empty list from an absent one (`fromEndpoints: []` is nobody), absent is None. Shapes
only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

from mesh.model import scalars as s
from mesh.model.meta import Condition, Model, ObjectMeta
from mesh.model.networkpolicy import Selector

Entity: TypeAlias = Literal[
    "all",
    "world",
    "cluster",
    "host",
    "init",
    "ingress",
    "unmanaged",
    "remote-node",
    "health",
    "none",
    "kube-apiserver",
]
CiliumProtocol: TypeAlias = Literal["TCP", "UDP", "SCTP", "ANY"]
# The CRD's pattern is anchored at one end of each alternative only, and its second alternative is
# exponential in Python; mesh.policy reads the port.
PortText: TypeAlias = Annotated[str, Meta(min_length=1, max_length=63)]


# --- layer 7 and ports ---------------------------------------------------------------------------


class SecretRef(Model, frozen=True, kw_only=True):
    name: str
    namespace: str | None = None


class HeaderMatch(Model, frozen=True, kw_only=True):
    """`mismatch` None: the request does not match the rule; else the rule holds, and this is
    done."""

    name: str
    value: str | None = None
    secret: SecretRef | None = None
    mismatch: Literal["LOG", "ADD", "DELETE", "REPLACE"] | None = None


class PortRuleHTTP(Model, frozen=True, kw_only=True):
    """`method`, `path`, `host`: regular expressions; None or "": any. `headers`: "Name: value", or
    "Name" for any value."""

    method: str | None = None
    path: str | None = None
    host: str | None = None
    headers: tuple[str, ...] = ()
    header_matches: tuple[HeaderMatch, ...] = ()


class L7Rules(Model, frozen=True, kw_only=True):
    http: tuple[PortRuleHTTP, ...] | None = None
    dns: tuple[dict[str, Any], ...] | None = None
    kafka: tuple[dict[str, Any], ...] | None = None
    l7: tuple[dict[str, Any], ...] | None = None
    l7proto: str | None = None


class PortProtocol(Model, frozen=True, kw_only=True):
    """`port`: a number (0: all), or a name among the ports of the pods' containers."""

    port: PortText
    end_port: s.Int32 | None = None
    protocol: CiliumProtocol = "ANY"


class PortDenyRule(Model, frozen=True, kw_only=True):
    ports: tuple[PortProtocol, ...] = ()


class PortRule(PortDenyRule, frozen=True, kw_only=True):
    rules: L7Rules | None = None
    listener: dict[str, Any] | None = None
    originating_tls: dict[str, Any] | None = msgspec.field(default=None, name="originatingTLS")
    terminating_tls: dict[str, Any] | None = msgspec.field(default=None, name="terminatingTLS")
    server_names: tuple[str, ...] = ()


class ICMPField(Model, frozen=True, kw_only=True):
    family: Literal["IPv4", "IPv6"] = "IPv4"
    type: s.Int32 | str


class ICMPRule(Model, frozen=True, kw_only=True):
    fields: tuple[ICMPField, ...] = ()


class Authentication(Model, frozen=True, kw_only=True):
    mode: Literal["disabled", "required", "test-always-fail"]


# --- peers ---------------------------------------------------------------------------------------


class CIDRRule(Model, frozen=True, kw_only=True):
    cidr: str | None = None
    cidr_group_ref: str | None = None
    except_: tuple[str, ...] = msgspec.field(default=(), name="except")


class K8sService(Model, frozen=True, kw_only=True):
    service_name: str = ""
    namespace: str = ""


class K8sServiceSelector(Model, frozen=True, kw_only=True):
    selector: Selector
    namespace: str = ""


class ServiceRule(Model, frozen=True, kw_only=True):
    k8s_service: K8sService | None = None
    k8s_service_selector: K8sServiceSelector | None = None


class IngressDenyRule(Model, frozen=True, kw_only=True):
    from_endpoints: tuple[Selector, ...] | None = None
    from_requires: tuple[Selector, ...] | None = None
    from_cidr: tuple[str, ...] | None = msgspec.field(default=None, name="fromCIDR")
    from_cidr_set: tuple[CIDRRule, ...] | None = msgspec.field(default=None, name="fromCIDRSet")
    from_entities: tuple[Entity, ...] | None = None
    from_nodes: tuple[Selector, ...] | None = None
    from_groups: tuple[dict[str, Any], ...] | None = None
    icmps: tuple[ICMPRule, ...] | None = None
    to_ports: tuple[PortDenyRule, ...] | None = None


class IngressRule(Model, frozen=True, kw_only=True):
    from_endpoints: tuple[Selector, ...] | None = None
    from_requires: tuple[Selector, ...] | None = None
    from_cidr: tuple[str, ...] | None = msgspec.field(default=None, name="fromCIDR")
    from_cidr_set: tuple[CIDRRule, ...] | None = msgspec.field(default=None, name="fromCIDRSet")
    from_entities: tuple[Entity, ...] | None = None
    from_nodes: tuple[Selector, ...] | None = None
    from_groups: tuple[dict[str, Any], ...] | None = None
    icmps: tuple[ICMPRule, ...] | None = None
    to_ports: tuple[PortRule, ...] | None = None
    authentication: Authentication | None = None


class EgressDenyRule(Model, frozen=True, kw_only=True):
    to_endpoints: tuple[Selector, ...] | None = None
    to_requires: tuple[Selector, ...] | None = None
    to_cidr: tuple[str, ...] | None = msgspec.field(default=None, name="toCIDR")
    to_cidr_set: tuple[CIDRRule, ...] | None = msgspec.field(default=None, name="toCIDRSet")
    to_entities: tuple[Entity, ...] | None = None
    to_services: tuple[ServiceRule, ...] | None = None
    to_nodes: tuple[Selector, ...] | None = None
    to_groups: tuple[dict[str, Any], ...] | None = None
    icmps: tuple[ICMPRule, ...] | None = None
    to_ports: tuple[PortDenyRule, ...] | None = None


class EgressRule(Model, frozen=True, kw_only=True):
    to_endpoints: tuple[Selector, ...] | None = None
    to_requires: tuple[Selector, ...] | None = None
    to_cidr: tuple[str, ...] | None = msgspec.field(default=None, name="toCIDR")
    to_cidr_set: tuple[CIDRRule, ...] | None = msgspec.field(default=None, name="toCIDRSet")
    to_entities: tuple[Entity, ...] | None = None
    to_services: tuple[ServiceRule, ...] | None = None
    to_fqdns: tuple[dict[str, Any], ...] | None = msgspec.field(default=None, name="toFQDNs")
    to_nodes: tuple[Selector, ...] | None = None
    to_groups: tuple[dict[str, Any], ...] | None = None
    icmps: tuple[ICMPRule, ...] | None = None
    to_ports: tuple[PortRule, ...] | None = None
    authentication: Authentication | None = None


# --- policies ------------------------------------------------------------------------------------


class DefaultDeny(Model, frozen=True, kw_only=True):
    """None: yes, if there are rules of that direction."""

    ingress: bool | None = None
    egress: bool | None = None


class PolicyLabel(Model, frozen=True, kw_only=True):
    key: str
    source: str | None = None
    value: str | None = None


class CiliumPolicySpec(Model, frozen=True, kw_only=True):
    """api.Rule."""

    description: str | None = None
    labels: tuple[PolicyLabel, ...] = ()
    endpoint_selector: Selector | None = None
    node_selector: Selector | None = None
    enable_default_deny: DefaultDeny = DefaultDeny()
    ingress: tuple[IngressRule, ...] = ()
    ingress_deny: tuple[IngressDenyRule, ...] = ()
    egress: tuple[EgressRule, ...] = ()
    egress_deny: tuple[EgressDenyRule, ...] = ()


class CiliumPolicyStatus(Model, frozen=True, kw_only=True):
    """What Cilium's agents write is not read. `conditions` came with a later CRD."""

    nodes: dict[str, Any] = msgspec.field(default_factory=dict)
    derivative_policies: dict[str, Any] = msgspec.field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()


class CiliumNetworkPolicy(Model, frozen=True, kw_only=True):
    """`spec` and `specs` are in force together."""

    api_version: str = "cilium.io/v2"
    kind: Literal["CiliumNetworkPolicy"] = "CiliumNetworkPolicy"
    metadata: ObjectMeta
    spec: CiliumPolicySpec | None = None
    specs: tuple[CiliumPolicySpec, ...] = ()
    status: CiliumPolicyStatus | None = None


class CiliumClusterwideNetworkPolicy(Model, frozen=True, kw_only=True):
    api_version: str = "cilium.io/v2"
    kind: Literal["CiliumClusterwideNetworkPolicy"] = "CiliumClusterwideNetworkPolicy"
    metadata: ObjectMeta
    spec: CiliumPolicySpec | None = None
    specs: tuple[CiliumPolicySpec, ...] = ()
    status: CiliumPolicyStatus | None = None
