"""The CEL rules of HTTPRoute and GRPCRoute outside filters, as checks. The wording of a rule is the
CRD's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from mesh.model.grpcroute import GRPCBackendRef, GRPCMethodMatch, GRPCRouteRule, GRPCRouteSpec
from mesh.model.httproute import (
    HTTPBackendRef,
    HTTPPathMatch,
    HTTPPathModifier,
    HTTPRouteFilter,
    HTTPRouteRule,
    HTTPRouteSpec,
    HTTPRouteTimeouts,
)
from mesh.model.meta import parse_duration
from mesh.model.references import BackendObjectReference, ParentReference
from mesh.model.routes import SessionPersistence
from mesh.model.rules import Check, Finding, duplicates
from mesh.model.schema import found

MAX_MATCHES = 128

# --- parents and backends ------------------------------------------------------------------------


def _parent(ref: ParentReference) -> tuple[str, str, str, str]:
    return ref.group, ref.kind, ref.namespace or "", ref.name


def _parents_told_apart(refs: Sequence[ParentReference]) -> Finding:
    shapes: dict[tuple[str, str, str, str], tuple[bool, bool]] = {}
    for index, ref in enumerate(refs):
        shape = (not ref.section_name, not ref.port)
        if shapes.setdefault(_parent(ref), shape) != shape:
            return (
                f"[{index}] and one before it name the {ref.kind} {found(ref.name)}, only one of"
                " them with sectionName (or port); give it to all of them or to none"
            )
    return None


def _parents_unique(refs: Sequence[ParentReference]) -> Finding:
    keys = [(*_parent(ref), ref.section_name or "", ref.port or 0) for ref in refs]
    for first, later in duplicates(keys):
        return f"[{first}] and [{later}] are the same parent; remove one"
    return None


def _service_port(
    ref: BackendObjectReference | HTTPBackendRef | GRPCBackendRef,
) -> Finding:
    if ref.group == "" and ref.kind == "Service" and ref.port is None:
        return f"the reference to Service {found(ref.name)} has no port; add the Service's port"
    return None


# --- rules of a route ----------------------------------------------------------------------------


def _few_matches(rules: Sequence[HTTPRouteRule | GRPCRouteRule]) -> Finding:
    total = sum(len(rule.matches) for rule in rules)
    return f"has {total}; split the route" if total > MAX_MATCHES else None


def _names_unique(rules: Sequence[HTTPRouteRule | GRPCRouteRule]) -> Finding:
    named = [(index, rule.name) for index, rule in enumerate(rules) if rule.name is not None]
    for first, later in duplicates([name for _, name in named]):
        index, name = named[later]
        return f"[{named[first][0]}] and [{index}] are both named {found(name)}; rename one"
    return None


def _redirect_alone(rule: HTTPRouteRule) -> Finding:
    if rule.backend_refs and any(f.request_redirect is not None for f in rule.filters):
        return "has both; a redirect answers by itself, so remove the backendRefs or the filter"
    return None


def _needs_one_prefix(
    applies: Callable[[HTTPRouteRule], bool],
) -> Callable[[HTTPRouteRule], Finding]:
    def find(rule: HTTPRouteRule) -> Finding:
        if not applies(rule):
            return None
        if len(rule.matches) != 1:
            return f"has {len(rule.matches)} matches; give each its own rule"
        if rule.matches[0].path.type != "PathPrefix":
            return f"the match's path is of type {rule.matches[0].path.type}; use PathPrefix"
        return None

    return find


def _replaces_prefix(path: HTTPPathModifier | None) -> bool:
    return (
        path is not None
        and path.type == "ReplacePrefixMatch"
        and path.replace_prefix_match is not None
    )


def _redirects_prefix(filters: Sequence[HTTPRouteFilter]) -> bool:
    return _exactly_one(
        f.request_redirect is not None and _replaces_prefix(f.request_redirect.path)
        for f in filters
    )


def _rewrites_prefix(filters: Sequence[HTTPRouteFilter]) -> bool:
    return _exactly_one(
        f.url_rewrite is not None and _replaces_prefix(f.url_rewrite.path) for f in filters
    )


def _exactly_one(flags: Iterable[bool]) -> bool:
    return sum(flags) == 1


# --- matches -------------------------------------------------------------------------------------

_PATH = re.compile(r"(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|[%][0-9a-fA-F]{2})+")
_LITERAL = " when type one of ['Exact', 'PathPrefix']"


def _literal(wrong: Callable[[str], bool], advice: str) -> Callable[[HTTPPathMatch], Finding]:
    """A check of paths that are no regular expressions."""

    def find(path: HTTPPathMatch) -> Finding:
        if path.type != "RegularExpression" and wrong(path.value):
            return f"found {found(path.value)}; {advice}"
        return None

    return find


def _without(part: str) -> Check:
    advice = "write the path as it is after normalisation"
    find = _literal(lambda value: part in value, advice)
    return Check(HTTPPathMatch, None, f"must not contain '{part}'{_LITERAL}", find)


def _not_ending(part: str) -> Check:
    advice = "write the path as it is after normalisation"
    find = _literal(lambda value: value.endswith(part), advice)
    return Check(HTTPPathMatch, None, f"must not end with '{part}'{_LITERAL}", find)


_GRPC_SERVICE = re.compile(r"\.?[a-z_][a-z_0-9]*(\.[a-z_][a-z_0-9]*)*", re.ASCII | re.IGNORECASE)
_GRPC_METHOD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")


def _grpc_named(match: GRPCMethodMatch) -> Finding:
    if match.service is None and match.method is None:
        return "has neither; add one"
    return None


def _grpc_service(match: GRPCMethodMatch) -> Finding:
    service = match.service
    if match.type == "Exact" and service is not None and not _GRPC_SERVICE.fullmatch(service):
        return f"found {found(service)}; write it as in foo.bar.Service"
    return None


def _grpc_method(match: GRPCMethodMatch) -> Finding:
    method = match.method
    if match.type == "Exact" and method is not None and not _GRPC_METHOD.fullmatch(method):
        return f"found {found(method)}; write the method's name alone"
    return None


# --- sessions and timeouts -----------------------------------------------------------------------


def _permanent_has_timeout(session: SessionPersistence) -> Finding:
    cookie = session.cookie_config
    if cookie and cookie.lifetime_type == "Permanent" and session.absolute_timeout is None:
        return "absoluteTimeout is missing; add it, or use lifetimeType Session"
    return None


def _cookie_of_cookie(session: SessionPersistence) -> Finding:
    if session.cookie_config is not None and session.type != "Cookie":
        return f"the type is {session.type}; remove cookieConfig, or use type Cookie"
    return None


def _backend_within_request(timeouts: HTTPRouteTimeouts) -> Finding:
    if timeouts.request is None or timeouts.backend_request is None:
        return None
    request = parse_duration(timeouts.request)
    if request != 0 and parse_duration(timeouts.backend_request) > request:
        return f"backendRequest {timeouts.backend_request}, request {timeouts.request}; lower it"
    return None


# --- the table -----------------------------------------------------------------------------------

_SAME_PARENT = "when parentRefs includes 2 or more references to the same parent"
_TOO_MANY = (
    "While 16 rules and 64 matches per rule are allowed, the total number of matches across all"
    " rules in a route must be less than 128"
)
_ONE_PREFIX = "path.replacePrefixMatch, exactly one PathPrefix match must be specified"

CHECKS: tuple[Check, ...] = (
    *(
        check
        for spec in (HTTPRouteSpec, GRPCRouteSpec)
        for check in (
            Check(
                spec,
                "parent_refs",
                f"sectionName or port must be specified {_SAME_PARENT}",
                _parents_told_apart,
            ),
            Check(
                spec,
                "parent_refs",
                f"sectionName or port must be unique {_SAME_PARENT}",
                _parents_unique,
            ),
            Check(spec, "rules", _TOO_MANY, _few_matches),
            Check(spec, "rules", "Rule name must be unique within the route", _names_unique),
        )
    ),
    *(
        Check(model, None, "Must have port for Service reference", _service_port)
        for model in (BackendObjectReference, HTTPBackendRef, GRPCBackendRef)
    ),
    Check(
        HTTPRouteRule,
        None,
        "RequestRedirect filter must not be used together with backendRefs",
        _redirect_alone,
    ),
    Check(
        HTTPRouteRule,
        None,
        f"When using RequestRedirect filter with {_ONE_PREFIX}",
        _needs_one_prefix(lambda rule: _redirects_prefix(rule.filters)),
    ),
    Check(
        HTTPRouteRule,
        None,
        f"When using URLRewrite filter with {_ONE_PREFIX}",
        _needs_one_prefix(lambda rule: _rewrites_prefix(rule.filters)),
    ),
    Check(
        HTTPRouteRule,
        None,
        f"Within backendRefs, when using RequestRedirect filter with {_ONE_PREFIX}",
        _needs_one_prefix(
            lambda rule: _exactly_one(_redirects_prefix(ref.filters) for ref in rule.backend_refs)
        ),
    ),
    Check(
        HTTPRouteRule,
        None,
        f"Within backendRefs, When using URLRewrite filter with {_ONE_PREFIX}",
        _needs_one_prefix(
            lambda rule: _exactly_one(_rewrites_prefix(ref.filters) for ref in rule.backend_refs)
        ),
    ),
    Check(
        HTTPPathMatch,
        None,
        f"value must be an absolute path and start with '/'{_LITERAL}",
        _literal(lambda value: not value.startswith("/"), "put a '/' in front"),
    ),
    *(_without(part) for part in ("//", "/./", "/../", "%2f", "%2F", "#")),
    *(_not_ending(part) for part in ("/..", "/.")),
    Check(
        HTTPPathMatch,
        None,
        "must only contain valid characters"
        " (matching ^(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|[%][0-9a-fA-F]{2})+$)"
        " for types ['Exact', 'PathPrefix']",
        _literal(lambda value: not _PATH.fullmatch(value), "percent-encode what is not allowed"),
    ),
    Check(
        GRPCMethodMatch,
        None,
        "One or both of 'service' or 'method' must be specified",
        _grpc_named,
    ),
    Check(
        GRPCMethodMatch,
        None,
        "service must only contain valid characters"
        r" (matching ^(?i)\.?[a-z_][a-z_0-9]*(\.[a-z_][a-z_0-9]*)*$)",
        _grpc_service,
    ),
    Check(
        GRPCMethodMatch,
        None,
        "method must only contain valid characters (matching ^[A-Za-z_][A-Za-z_0-9]*$)",
        _grpc_method,
    ),
    Check(
        SessionPersistence,
        None,
        "AbsoluteTimeout must be specified when cookie lifetimeType is Permanent",
        _permanent_has_timeout,
    ),
    Check(
        SessionPersistence,
        None,
        "cookieConfig can only be set with type Cookie",
        _cookie_of_cookie,
    ),
    Check(
        HTTPRouteTimeouts,
        None,
        "backendRequest timeout cannot be longer than request timeout",
        _backend_within_request,
    ),
)
