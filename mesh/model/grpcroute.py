"""GRPCRoute, gateway.networking.k8s.io/v1 (apis/v1/grpcroute_types.go)."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from mesh.model import scalars as s
from mesh.model.meta import Model, ObjectMeta
from mesh.model.references import LocalObjectReference, RouteStatus
from mesh.model.routes import (
    Hostnames,
    HTTPHeaderFilter,
    HTTPRequestMirrorFilter,
    ParentRefs,
    SessionPersistence,
)


class GRPCMethodMatch(Model, frozen=True, kw_only=True):
    """`service` or `method` None is any."""

    type: Literal["Exact", "RegularExpression"] = "Exact"
    service: s.Text1024 | None = None
    method: s.Text1024 | None = None


class GRPCHeaderMatch(Model, frozen=True, kw_only=True):
    type: Literal["Exact", "RegularExpression"] = "Exact"
    name: s.HeaderName
    value: s.HeaderMatchValue


class GRPCRouteMatch(Model, frozen=True, kw_only=True):
    method: GRPCMethodMatch | None = None
    headers: Annotated[
        tuple[GRPCHeaderMatch, ...], Meta(max_length=16, extra={"list_map_keys": ("name",)})
    ] = ()


class GRPCRouteFilter(Model, frozen=True, kw_only=True):
    """A union: exactly the field that `type` names is set."""

    type: Literal[
        "ResponseHeaderModifier", "RequestHeaderModifier", "RequestMirror", "ExtensionRef"
    ]
    request_header_modifier: HTTPHeaderFilter | None = None
    response_header_modifier: HTTPHeaderFilter | None = None
    request_mirror: HTTPRequestMirrorFilter | None = None
    extension_ref: LocalObjectReference | None = None


GRPCRouteFilters: TypeAlias = Annotated[tuple[GRPCRouteFilter, ...], Meta(max_length=16)]


class GRPCBackendRef(Model, frozen=True, kw_only=True):
    group: s.Group = ""
    kind: s.Kind = "Service"
    name: s.ObjectName
    namespace: s.Namespace | None = None
    port: s.PortNumber | None = None
    weight: s.BackendWeight = 1
    filters: GRPCRouteFilters = ()


class GRPCRouteRule(Model, frozen=True, kw_only=True):
    """No `matches`: every gRPC request."""

    name: s.SectionName | None = None
    matches: Annotated[tuple[GRPCRouteMatch, ...], Meta(max_length=64)] = ()
    filters: GRPCRouteFilters = ()
    backend_refs: Annotated[tuple[GRPCBackendRef, ...], Meta(max_length=16)] = ()
    session_persistence: SessionPersistence | None = None


class GRPCRouteSpec(Model, frozen=True, kw_only=True):
    parent_refs: ParentRefs = ()
    use_default_gateways: Literal["All", "None"] | None = None
    hostnames: Hostnames = ()
    rules: Annotated[tuple[GRPCRouteRule, ...], Meta(max_length=16)] = ()


class GRPCRoute(Model, frozen=True, kw_only=True):
    api_version: str = "gateway.networking.k8s.io/v1"
    kind: Literal["GRPCRoute"] = "GRPCRoute"
    metadata: ObjectMeta
    spec: GRPCRouteSpec
    status: RouteStatus | None = None
