"""Parts that HTTPRoute and GRPCRoute share: header modifiers, mirrors, session persistence.

Source: Gateway API v1.6.1, apis/v1/httproute_types.go and shared_types.go.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

from mesh.model import scalars as s
from mesh.model.meta import Model
from mesh.model.references import BackendObjectReference, ParentReference

ParentRefs: TypeAlias = Annotated[tuple[ParentReference, ...], Meta(max_length=32)]
Hostnames: TypeAlias = Annotated[tuple[s.Hostname, ...], Meta(max_length=16)]


class HTTPHeader(Model, frozen=True, kw_only=True):
    name: s.HeaderName
    value: s.HeaderValue


HTTPHeaders: TypeAlias = Annotated[
    tuple[HTTPHeader, ...], Meta(max_length=16, extra={"list_map_keys": ("name",)})
]


class HTTPHeaderFilter(Model, frozen=True, kw_only=True):
    set: HTTPHeaders = ()
    add: HTTPHeaders = ()
    remove: Annotated[tuple[str, ...], Meta(max_length=16, extra={"set": True})] = ()


class Fraction(Model, frozen=True, kw_only=True):
    numerator: s.NonNegativeInt32
    denominator: s.PositiveInt32 = 100


class HTTPRequestMirrorFilter(Model, frozen=True, kw_only=True):
    """Neither `percent` nor `fraction`: all requests are mirrored."""

    backend_ref: BackendObjectReference
    percent: s.Percent | None = None
    fraction: Fraction | None = None


class CookieConfig(Model, frozen=True, kw_only=True):
    lifetime_type: Literal["Permanent", "Session"] = "Session"


class SessionPersistence(Model, frozen=True, kw_only=True):
    session_name: Annotated[str, Meta(max_length=128)] | None = None
    absolute_timeout: s.Duration | None = None
    type: Literal["Cookie", "Header"] = "Cookie"
    cookie_config: CookieConfig | None = None
