"""Gateway, gateway.networking.k8s.io/v1 and v1beta1 (apis/v1/gateway_types.go), and the listener
parts it shares with ListenerSet."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from mesh.model import scalars as s
from mesh.model.meta import LabelSelector, Model, ObjectMeta
from mesh.model.references import (
    Conditions,
    LocalParametersReference,
    ObjectReference,
    RouteGroupKind,
    SecretObjectReference,
    pending,
)

TLSOptions: TypeAlias = Annotated[dict[str, s.AnnotationValue], Meta(max_length=16)]

# --- listeners -----------------------------------------------------------------------------------


class RouteNamespaces(Model, frozen=True, kw_only=True):
    from_: Literal["All", "Selector", "Same"] = msgspec.field(default="Same", name="from")
    selector: LabelSelector | None = None


class AllowedRoutes(Model, frozen=True, kw_only=True):
    namespaces: RouteNamespaces = RouteNamespaces()
    kinds: Annotated[tuple[RouteGroupKind, ...], Meta(max_length=8)] = ()


class ListenerTLSConfig(Model, frozen=True, kw_only=True):
    mode: Literal["Terminate", "Passthrough"] = "Terminate"
    certificate_refs: Annotated[tuple[SecretObjectReference, ...], Meta(max_length=64)] = ()
    options: TLSOptions = msgspec.field(default_factory=dict)


class Listener(Model, frozen=True, kw_only=True):
    name: s.SectionName
    hostname: s.Hostname | None = None
    port: s.PortNumber
    protocol: s.ProtocolType
    tls: ListenerTLSConfig | None = None
    allowed_routes: AllowedRoutes = AllowedRoutes()


class ListenerStatus(Model, frozen=True, kw_only=True):
    name: s.SectionName
    supported_kinds: Annotated[tuple[RouteGroupKind, ...], Meta(max_length=8)] = ()
    attached_routes: s.Int32
    conditions: Conditions


# --- Gateway -------------------------------------------------------------------------------------


class GatewaySpecAddress(Model, frozen=True, kw_only=True):
    type: s.AddressType = "IPAddress"
    value: Annotated[str, Meta(max_length=253)] | None = None


class GatewayInfrastructure(Model, frozen=True, kw_only=True):
    labels: Annotated[dict[str, s.LabelValue], Meta(max_length=8)] = msgspec.field(
        default_factory=dict
    )
    annotations: Annotated[dict[str, s.AnnotationValue], Meta(max_length=16)] = msgspec.field(
        default_factory=dict
    )
    parameters_ref: LocalParametersReference | None = None


class ListenerNamespaces(Model, frozen=True, kw_only=True):
    from_: Literal["All", "Selector", "Same", "None"] = msgspec.field(default="None", name="from")
    selector: LabelSelector | None = None


class AllowedListeners(Model, frozen=True, kw_only=True):
    """Which ListenerSets may attach."""

    namespaces: ListenerNamespaces = ListenerNamespaces()


class FrontendTLSValidation(Model, frozen=True, kw_only=True):
    ca_certificate_refs: Annotated[tuple[ObjectReference, ...], Meta(min_length=1, max_length=16)]
    mode: Literal["AllowValidOnly", "AllowInsecureFallback"] = "AllowValidOnly"


class TLSConfig(Model, frozen=True, kw_only=True):
    validation: FrontendTLSValidation | None = None


class TLSPortConfig(Model, frozen=True, kw_only=True):
    port: s.PortNumber
    tls: TLSConfig


class FrontendTLSConfig(Model, frozen=True, kw_only=True):
    default: TLSConfig
    per_port: Annotated[
        tuple[TLSPortConfig, ...], Meta(max_length=64, extra={"list_map_keys": ("port",)})
    ] = ()


class GatewayBackendTLS(Model, frozen=True, kw_only=True):
    client_certificate_ref: SecretObjectReference | None = None


class GatewayTLSConfig(Model, frozen=True, kw_only=True):
    backend: GatewayBackendTLS | None = None
    frontend: FrontendTLSConfig | None = None


class GatewaySpec(Model, frozen=True, kw_only=True):
    gateway_class_name: s.ObjectName
    listeners: Annotated[
        tuple[Listener, ...],
        Meta(min_length=1, max_length=64, extra={"list_map_keys": ("name",)}),
    ]
    addresses: Annotated[tuple[GatewaySpecAddress, ...], Meta(max_length=16)] = ()
    infrastructure: GatewayInfrastructure | None = None
    allowed_listeners: AllowedListeners | None = None
    tls: GatewayTLSConfig | None = None
    default_scope: Literal["All", "None"] | None = None


class GatewayStatusAddress(Model, frozen=True, kw_only=True):
    type: s.AddressType = "IPAddress"
    value: s.ObjectName


class GatewayStatus(Model, frozen=True, kw_only=True):
    addresses: Annotated[tuple[GatewayStatusAddress, ...], Meta(max_length=16)] = ()
    conditions: Conditions = (pending("Accepted"), pending("Programmed"))
    listeners: Annotated[
        tuple[ListenerStatus, ...], Meta(max_length=64, extra={"list_map_keys": ("name",)})
    ] = ()
    attached_listener_sets: s.Int32 | None = None


class Gateway(Model, frozen=True, kw_only=True):
    api_version: str = "gateway.networking.k8s.io/v1"
    kind: Literal["Gateway"] = "Gateway"
    metadata: ObjectMeta
    spec: GatewaySpec
    status: GatewayStatus = GatewayStatus()
