"""The CEL rules of the filters of HTTPRoute and GRPCRoute, as checks. The wording of a rule is the
CRD's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mesh.model.grpcroute import GRPCBackendRef, GRPCRouteFilter, GRPCRouteRule
from mesh.model.httproute import (
    HTTPBackendRef,
    HTTPCORSFilter,
    HTTPExternalAuthFilter,
    HTTPPathModifier,
    HTTPRouteFilter,
    HTTPRouteRule,
)
from mesh.model.meta import Model
from mesh.model.routes import Fraction, HTTPRequestMirrorFilter
from mesh.model.rules import Check, Finding

HTTP_FILTERS = {
    "RequestHeaderModifier": "request_header_modifier",
    "ResponseHeaderModifier": "response_header_modifier",
    "RequestMirror": "request_mirror",
    "RequestRedirect": "request_redirect",
    "URLRewrite": "url_rewrite",
    "ExtensionRef": "extension_ref",
    "CORS": "cors",
    "ExternalAuth": "external_auth",
}
GRPC_FILTERS = {
    kind: HTTP_FILTERS[kind]
    for kind in (
        "RequestHeaderModifier",
        "ResponseHeaderModifier",
        "RequestMirror",
        "ExtensionRef",
    )
}
HTTP_ONCE = (
    "RequestHeaderModifier",
    "ResponseHeaderModifier",
    "RequestRedirect",
    "URLRewrite",
    "CORS",
)
GRPC_ONCE = ("RequestHeaderModifier", "ResponseHeaderModifier")


def _field_of_type(model: type[Model], kind: str, attribute: str) -> tuple[Check, Check]:
    """The two checks of a union's member: set if, and only if, the type says so."""
    name = dict(zip(model.__struct_fields__, model.__struct_encode_fields__, strict=True))[
        attribute
    ]

    def foreign(filter: HTTPRouteFilter | GRPCRouteFilter) -> Finding:
        if filter.type != kind and getattr(filter, attribute) is not None:
            return f"the type is {filter.type}; remove {name}, or change the type"
        return None

    def absent(filter: HTTPRouteFilter | GRPCRouteFilter) -> Finding:
        if filter.type == kind and getattr(filter, attribute) is None:
            return f"{name} is missing; add it"
        return None

    return (
        Check(model, None, f"filter.{name} must be nil if the filter.type is not {kind}", foreign),
        Check(model, None, f"filter.{name} must be specified for {kind} filter.type", absent),
    )


def _once(kind: str) -> Callable[[Sequence[HTTPRouteFilter | GRPCRouteFilter]], Finding]:
    def find(filters: Sequence[HTTPRouteFilter | GRPCRouteFilter]) -> Finding:
        places = [f"[{index}]" for index, filter in enumerate(filters) if filter.type == kind]
        return f"stands at {', '.join(places)}; merge them" if len(places) > 1 else None

    return find


def _redirect_or_rewrite(filters: Sequence[HTTPRouteFilter]) -> Finding:
    if {"RequestRedirect", "URLRewrite"} <= {filter.type for filter in filters}:
        return "has both; remove one"
    return None


def _filter_list(model: type[Model], kinds: Sequence[str]) -> list[Check]:
    return [
        Check(model, "filters", f"{kind} filter cannot be repeated", _once(kind)) for kind in kinds
    ]


def _one_share(mirror: HTTPRequestMirrorFilter) -> Finding:
    if mirror.percent is not None and mirror.fraction is not None:
        return "has both; remove one"
    return None


def _proper_fraction(fraction: Fraction) -> Finding:
    if fraction.numerator > fraction.denominator:
        return f"found {fraction.numerator}/{fraction.denominator}"
    return None


def _star_alone(values: Sequence[str]) -> Finding:
    if "*" in values and len(values) > 1:
        return f"found {', '.join(values)}; '*' already allows all of them"
    return None


def _auth_needs(kind: str, attribute: str) -> Callable[[HTTPExternalAuthFilter], Finding]:
    def find(auth: HTTPExternalAuthFilter) -> Finding:
        if auth.protocol == kind and getattr(auth, attribute) is None:
            return f"{attribute} is missing; add it ({{}} will do)"
        return None

    return find


def _auth_allows(kind: str, attribute: str) -> Callable[[HTTPExternalAuthFilter], Finding]:
    def find(auth: HTTPExternalAuthFilter) -> Finding:
        if getattr(auth, attribute) is not None and auth.protocol != kind:
            return f"the protocol is {auth.protocol}; remove {attribute}, or change the protocol"
        return None

    return find


def _modifier_needs(kind: str, attribute: str, name: str) -> Callable[[HTTPPathModifier], Finding]:
    def find(path: HTTPPathModifier) -> Finding:
        if path.type == kind and getattr(path, attribute) is None:
            return f"{name} is missing; add it"
        return None

    return find


def _modifier_allows(kind: str, attribute: str, name: str) -> Callable[[HTTPPathModifier], Finding]:
    def find(path: HTTPPathModifier) -> Finding:
        if getattr(path, attribute) is not None and path.type != kind:
            return f"the type is {path.type}; remove {name}, or change the type"
        return None

    return find


CHECKS: tuple[Check, ...] = (
    *(
        check
        for model, kinds in ((HTTPRouteFilter, HTTP_FILTERS), (GRPCRouteFilter, GRPC_FILTERS))
        for kind, attribute in kinds.items()
        for check in _field_of_type(model, kind, attribute)
    ),
    *(
        check
        for model in (HTTPRouteRule, HTTPBackendRef)
        for check in (
            *_filter_list(model, HTTP_ONCE),
            Check(
                model,
                "filters",
                "May specify either httpRouteFilterRequestRedirect or"
                " httpRouteFilterRequestRewrite, but not both",
                _redirect_or_rewrite,
            ),
        )
    ),
    *(
        check
        for model in (GRPCRouteRule, GRPCBackendRef)
        for check in _filter_list(model, GRPC_ONCE)
    ),
    Check(
        HTTPRequestMirrorFilter,
        None,
        "Only one of percent or fraction may be specified in HTTPRequestMirrorFilter",
        _one_share,
    ),
    Check(
        Fraction,
        None,
        "numerator must be less than or equal to denominator",
        _proper_fraction,
    ),
    *(
        Check(
            HTTPCORSFilter,
            attribute,
            f"{name} cannot contain '*' alongside other {others}",
            _star_alone,
        )
        for attribute, name, others in (
            ("allow_headers", "AllowHeaders", "methods"),
            ("allow_methods", "AllowMethods", "methods"),
            ("allow_origins", "AllowOrigins", "origins"),
        )
    ),
    *(
        check
        for kind, attribute in (("GRPC", "grpc"), ("HTTP", "http"))
        for check in (
            Check(
                HTTPExternalAuthFilter,
                None,
                f"{attribute} must be specified when protocol is set to '{kind}'",
                _auth_needs(kind, attribute),
            ),
            Check(
                HTTPExternalAuthFilter,
                None,
                f"protocol must be '{kind}' when {attribute} is set",
                _auth_allows(kind, attribute),
            ),
        )
    ),
    *(
        check
        for kind, attribute, name in (
            ("ReplaceFullPath", "replace_full_path", "replaceFullPath"),
            ("ReplacePrefixMatch", "replace_prefix_match", "replacePrefixMatch"),
        )
        for check in (
            Check(
                HTTPPathModifier,
                None,
                f"{name} must be specified when type is set to '{kind}'",
                _modifier_needs(kind, attribute, name),
            ),
            Check(
                HTTPPathModifier,
                None,
                f"type must be '{kind}' when {name} is set",
                _modifier_allows(kind, attribute, name),
            ),
        )
    ),
)
