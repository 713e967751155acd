"""HTTPRoute, gateway.networking.k8s.io/v1 and v1beta1 (apis/v1/httproute_types.go)."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from mesh.model import scalars as s
from mesh.model.meta import Model, ObjectMeta
from mesh.model.references import BackendObjectReference, LocalObjectReference, RouteStatus
from mesh.model.routes import (
    Hostnames,
    HTTPHeaderFilter,
    HTTPRequestMirrorFilter,
    ParentRefs,
    SessionPersistence,
)

HTTPMethod: TypeAlias = Literal[
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"
]
HTTPMethodWithWildcard: TypeAlias = Literal[
    "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "*"
]

# --- matches -------------------------------------------------------------------------------------


class HTTPPathMatch(Model, frozen=True, kw_only=True):
    type: Literal["Exact", "PathPrefix", "RegularExpression"] = "PathPrefix"
    value: s.Text1024 = "/"


class HTTPHeaderMatch(Model, frozen=True, kw_only=True):
    type: Literal["Exact", "RegularExpression"] = "Exact"
    name: s.HeaderName
    value: s.HeaderValue


class HTTPQueryParamMatch(Model, frozen=True, kw_only=True):
    type: Literal["Exact", "RegularExpression"] = "Exact"
    name: s.HeaderName
    value: s.QueryParamMatchValue


class HTTPRouteMatch(Model, frozen=True, kw_only=True):
    """All of it must hold. `method` None is any."""

    path: HTTPPathMatch = HTTPPathMatch()
    headers: Annotated[
        tuple[HTTPHeaderMatch, ...], Meta(max_length=16, extra={"list_map_keys": ("name",)})
    ] = ()
    query_params: Annotated[
        tuple[HTTPQueryParamMatch, ...], Meta(max_length=16, extra={"list_map_keys": ("name",)})
    ] = ()
    method: HTTPMethod | None = None


# --- filters -------------------------------------------------------------------------------------


class HTTPPathModifier(Model, frozen=True, kw_only=True):
    type: Literal["ReplaceFullPath", "ReplacePrefixMatch"]
    replace_full_path: s.Text1024 | None = None
    replace_prefix_match: s.Text1024 | None = None


class HTTPRequestRedirectFilter(Model, frozen=True, kw_only=True):
    scheme: Literal["http", "https"] | None = None
    hostname: s.PreciseHostname | None = None
    path: HTTPPathModifier | None = None
    port: s.PortNumber | None = None
    status_code: Literal[301, 302, 303, 307, 308] = 302


class HTTPURLRewriteFilter(Model, frozen=True, kw_only=True):
    hostname: s.PreciseHostname | None = None
    path: HTTPPathModifier | None = None


CORSHeaders: TypeAlias = Annotated[
    tuple[s.HeaderName, ...], Meta(max_length=64, extra={"set": True})
]
TextSet: TypeAlias = Annotated[tuple[str, ...], Meta(max_length=64, extra={"set": True})]


class HTTPCORSFilter(Model, frozen=True, kw_only=True):
    """`max_age` in seconds."""

    allow_origins: Annotated[
        tuple[s.CORSOrigin, ...], Meta(max_length=64, extra={"set": True})
    ] = ()
    allow_credentials: bool | None = None
    allow_methods: Annotated[
        tuple[HTTPMethodWithWildcard, ...], Meta(max_length=9, extra={"set": True})
    ] = ()
    allow_headers: CORSHeaders = ()
    expose_headers: CORSHeaders = ()
    max_age: s.PositiveInt32 = 5


class GRPCAuthConfig(Model, frozen=True, kw_only=True):
    allowed_headers: TextSet = ()


class HTTPAuthConfig(Model, frozen=True, kw_only=True):
    path: s.ExternalAuthPath | None = None
    allowed_headers: TextSet = ()
    allowed_response_headers: TextSet = ()


class ForwardBodyConfig(Model, frozen=True, kw_only=True):
    """`max_size` in bytes."""

    max_size: s.Int64 | None = None


class HTTPExternalAuthFilter(Model, frozen=True, kw_only=True):
    protocol: Literal["HTTP", "GRPC"]
    backend_ref: BackendObjectReference
    grpc: GRPCAuthConfig | None = None
    http: HTTPAuthConfig | None = None
    forward_body: ForwardBodyConfig | None = None


class HTTPRouteFilter(Model, frozen=True, kw_only=True):
    """A union: exactly the field that `type` names is set."""

    type: Literal[
        "RequestHeaderModifier",
        "ResponseHeaderModifier",
        "RequestMirror",
        "RequestRedirect",
        "URLRewrite",
        "ExtensionRef",
        "CORS",
        "ExternalAuth",
    ]
    request_header_modifier: HTTPHeaderFilter | None = None
    response_header_modifier: HTTPHeaderFilter | None = None
    request_mirror: HTTPRequestMirrorFilter | None = None
    request_redirect: HTTPRequestRedirectFilter | None = None
    url_rewrite: HTTPURLRewriteFilter | None = None
    cors: HTTPCORSFilter | None = None
    external_auth: HTTPExternalAuthFilter | None = None
    extension_ref: LocalObjectReference | None = None


HTTPRouteFilters: TypeAlias = Annotated[tuple[HTTPRouteFilter, ...], Meta(max_length=16)]

# --- rules ---------------------------------------------------------------------------------------


class HTTPBackendRef(Model, frozen=True, kw_only=True):
    group: s.Group = ""
    kind: s.Kind = "Service"
    name: s.ObjectName
    namespace: s.Namespace | None = None
    port: s.PortNumber | None = None
    weight: s.BackendWeight = 1
    filters: HTTPRouteFilters = ()


class HTTPRouteTimeouts(Model, frozen=True, kw_only=True):
    request: s.Duration | None = None
    backend_request: s.Duration | None = None


class HTTPRouteRetry(Model, frozen=True, kw_only=True):
    codes: Annotated[tuple[s.HTTPRouteRetryStatusCode, ...], Meta(extra={"set": True})] = ()
    attempts: s.PositiveInt | None = None
    backoff: s.Duration | None = None


class HTTPRouteRule(Model, frozen=True, kw_only=True):
    """`matches` empty (written as []) matches every request, as the default does."""

    name: s.SectionName | None = None
    matches: Annotated[tuple[HTTPRouteMatch, ...], Meta(max_length=64)] = (HTTPRouteMatch(),)
    filters: HTTPRouteFilters = ()
    backend_refs: Annotated[tuple[HTTPBackendRef, ...], Meta(max_length=16)] = ()
    timeouts: HTTPRouteTimeouts | None = None
    retry: HTTPRouteRetry | None = None
    session_persistence: SessionPersistence | None = None


class HTTPRouteSpec(Model, frozen=True, kw_only=True):
    parent_refs: ParentRefs = ()
    use_default_gateways: Literal["All", "None"] | None = None
    hostnames: Hostnames = ()
    rules: Annotated[tuple[HTTPRouteRule, ...], Meta(min_length=1, max_length=16)] = (
        HTTPRouteRule(),
    )


class HTTPRoute(Model, frozen=True, kw_only=True):
    api_version: str = "gateway.networking.k8s.io/v1"
    kind: Literal["HTTPRoute"] = "HTTPRoute"
    metadata: ObjectMeta
    spec: HTTPRouteSpec
    status: RouteStatus | None = None
