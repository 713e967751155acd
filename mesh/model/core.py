"""Kubernetes' own kinds that Weft reads: Namespace, Service, EndpointSlice, Secret, ConfigMap.

Source: the published API of core/v1 and discovery.k8s.io/v1, whose field names are all here, so
that a field nobody knows is refused by name. Defaults are the API server's.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from mesh.model import scalars as s
from mesh.model.meta import Condition, Model, ObjectMeta

Protocol: TypeAlias = Literal["TCP", "UDP", "SCTP"]


# --- Namespace -----------------------------------------------------------------------------------


class NamespaceSpec(Model, frozen=True, kw_only=True):
    finalizers: tuple[str, ...] = ()


class NamespaceCondition(Model, frozen=True, kw_only=True):
    type: str
    status: Literal["True", "False", "Unknown"]
    last_transition_time: s.Timestamp | None = None
    reason: str | None = None
    message: str | None = None


class NamespaceStatus(Model, frozen=True, kw_only=True):
    phase: str | None = None
    conditions: tuple[NamespaceCondition, ...] = ()


class Namespace(Model, frozen=True, kw_only=True):
    api_version: str = "v1"
    kind: Literal["Namespace"] = "Namespace"
    metadata: ObjectMeta
    spec: NamespaceSpec | None = None
    status: NamespaceStatus | None = None


# --- Service -------------------------------------------------------------------------------------


class ServicePort(Model, frozen=True, kw_only=True):
    """`target_port` None is the same as `port`; a string is the name of a port of the pods."""

    name: str = ""
    protocol: Protocol = "TCP"
    app_protocol: str | None = None
    port: s.PortNumber
    target_port: s.Int64 | str | None = None
    node_port: s.NonNegativeInt32 | None = None


class ClientIPConfig(Model, frozen=True, kw_only=True):
    timeout_seconds: s.Int32 | None = None


class SessionAffinityConfig(Model, frozen=True, kw_only=True):
    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(Model, frozen=True, kw_only=True):
    """`cluster_ip` is "None" for a headless Service and None where no address is assigned."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"] = "ClusterIP"
    ports: tuple[ServicePort, ...] = ()
    selector: dict[str, str] = msgspec.field(default_factory=dict)
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    cluster_ips: tuple[str, ...] = msgspec.field(default=(), name="clusterIPs")
    external_ips: tuple[str, ...] = msgspec.field(default=(), name="externalIPs")
    external_name: str | None = None
    session_affinity: Literal["None", "ClientIP"] = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    load_balancer_ip: str | None = msgspec.field(default=None, name="loadBalancerIP")
    load_balancer_source_ranges: tuple[str, ...] = ()
    load_balancer_class: str | None = None
    allocate_load_balancer_node_ports: bool | None = None
    external_traffic_policy: Literal["Cluster", "Local"] | None = None
    internal_traffic_policy: Literal["Cluster", "Local"] | None = None
    traffic_distribution: str | None = None
    health_check_node_port: s.NonNegativeInt32 | None = None
    publish_not_ready_addresses: bool = False
    ip_families: tuple[Literal["IPv4", "IPv6"], ...] = ()
    ip_family_policy: Literal["SingleStack", "PreferDualStack", "RequireDualStack"] | None = None


class PortStatus(Model, frozen=True, kw_only=True):
    port: s.Int32
    protocol: Protocol
    error: str | None = None


class LoadBalancerIngress(Model, frozen=True, kw_only=True):
    ip: str | None = None
    hostname: str | None = None
    ip_mode: str | None = None
    ports: tuple[PortStatus, ...] = ()


class LoadBalancerStatus(Model, frozen=True, kw_only=True):
    ingress: tuple[LoadBalancerIngress, ...] = ()


class ServiceStatus(Model, frozen=True, kw_only=True):
    load_balancer: LoadBalancerStatus | None = None
    conditions: tuple[Condition, ...] = ()


class Service(Model, frozen=True, kw_only=True):
    api_version: str = "v1"
    kind: Literal["Service"] = "Service"
    metadata: ObjectMeta
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus | None = None


# --- EndpointSlice -------------------------------------------------------------------------------


class ObjectReference(Model, frozen=True, kw_only=True):
    api_version: str | None = None
    kind: str | None = None
    namespace: str | None = None
    name: str | None = None
    uid: str | None = None
    resource_version: str | None = None
    field_path: str | None = None


class EndpointConditions(Model, frozen=True, kw_only=True):
    """None is unknown: take `ready` and `serving` as true then, `terminating` as false."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForZone(Model, frozen=True, kw_only=True):
    name: str


class ForNode(Model, frozen=True, kw_only=True):
    name: str


class EndpointHints(Model, frozen=True, kw_only=True):
    for_zones: tuple[ForZone, ...] = ()
    for_nodes: tuple[ForNode, ...] = ()


class Endpoint(Model, frozen=True, kw_only=True):
    addresses: tuple[str, ...]
    conditions: EndpointConditions = EndpointConditions()
    hostname: str | None = None
    target_ref: ObjectReference | None = None
    deprecated_topology: dict[str, str] = msgspec.field(default_factory=dict)
    node_name: str | None = None
    zone: str | None = None
    hints: EndpointHints | None = None


class EndpointPort(Model, frozen=True, kw_only=True):
    """`port` None is every port of the endpoints."""

    name: str = ""
    protocol: Protocol = "TCP"
    port: s.PortNumber | None = None
    app_protocol: str | None = None


class EndpointSlice(Model, frozen=True, kw_only=True):
    """discovery.k8s.io/v1. Its Service is named by the label `kubernetes.io/service-name`."""

    api_version: str = "discovery.k8s.io/v1"
    kind: Literal["EndpointSlice"] = "EndpointSlice"
    metadata: ObjectMeta
    address_type: Literal["IPv4", "IPv6", "FQDN"]
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[EndpointPort, ...] = ()


# --- Secret and ConfigMap ------------------------------------------------------------------------


class Secret(Model, frozen=True, kw_only=True):
    """`data` holds decoded bytes, `stringData` merged in. Its representation never shows them, nor
    the annotations, one of which kubectl fills with the whole manifest."""

    api_version: str = "v1"
    kind: Literal["Secret"] = "Secret"
    metadata: ObjectMeta
    type: str = "Opaque"
    data: dict[str, bytes] = msgspec.field(default_factory=dict)
    immutable: bool | None = None

    def __repr__(self) -> str:
        key = f"{self.metadata.namespace}/{self.metadata.name}"
        return f"Secret({key}, type={self.type!r}, keys={sorted(self.data)})"

    def __rich_repr__(self) -> tuple[tuple[str, str], ...]:  # type: ignore[override]
        return (("", repr(self)),)


class ConfigMap(Model, frozen=True, kw_only=True):
    api_version: str = "v1"
    kind: Literal["ConfigMap"] = "ConfigMap"
    metadata: ObjectMeta
    data: dict[str, str] = msgspec.field(default_factory=dict)
    binary_data: dict[str, bytes] = msgspec.field(default_factory=dict)
    immutable: bool | None = None
