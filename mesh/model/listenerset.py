"""ListenerSet, gateway.networking.k8s.io/v1 (apis/v1/listenerset_types.go)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from mesh.model import scalars as s
from mesh.model.gateway import AllowedRoutes, ListenerTLSConfig
from mesh.model.meta import Model, ObjectMeta
from mesh.model.references import GROUP, Conditions, RouteGroupKind, pending


class ParentGatewayReference(Model, frozen=True, kw_only=True):
    group: s.Group = GROUP
    kind: s.Kind = "Gateway"
    name: s.ObjectName
    namespace: s.Namespace | None = None


class ListenerEntry(Model, frozen=True, kw_only=True):
    name: s.SectionName
    hostname: s.Hostname | None = None
    port: s.PortNumber
    protocol: s.ProtocolType
    tls: ListenerTLSConfig | None = None
    allowed_routes: AllowedRoutes = AllowedRoutes()


class ListenerSetSpec(Model, frozen=True, kw_only=True):
    parent_ref: ParentGatewayReference
    listeners: Annotated[
        tuple[ListenerEntry, ...],
        Meta(min_length=1, max_length=64, extra={"list_map_keys": ("name",)}),
    ]


class ListenerEntryStatus(Model, frozen=True, kw_only=True):
    name: s.SectionName
    supported_kinds: Annotated[tuple[RouteGroupKind, ...], Meta(max_length=8)] = ()
    attached_routes: s.Int32
    conditions: Conditions


class ListenerSetStatus(Model, frozen=True, kw_only=True):
    conditions: Conditions = (pending("Accepted"), pending("Programmed"))
    listeners: Annotated[
        tuple[ListenerEntryStatus, ...], Meta(max_length=64, extra={"list_map_keys": ("name",)})
    ] = ()


class ListenerSet(Model, frozen=True, kw_only=True):
    api_version: str = "gateway.networking.k8s.io/v1"
    kind: Literal["ListenerSet"] = "ListenerSet"
    metadata: ObjectMeta
    spec: ListenerSetSpec
    status: ListenerSetStatus = ListenerSetStatus()
