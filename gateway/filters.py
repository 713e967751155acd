"""Filters of routes, translated to those of NodeConfig; what is not enforced is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gateway.backends import resolve
from gateway.conditions import Problem
from gateway.keys import ClusterRef, RouteKey
from mesh.model import routeconfig
from mesh.model.derive import View
from mesh.model.grpcroute import GRPCRouteFilter
from mesh.model.httproute import HTTPCORSFilter, HTTPPathModifier, HTTPRouteFilter
from mesh.model.routeconfig import Filter, HeaderModifier, HeaderValue
from mesh.model.routes import HTTPHeader, HTTPHeaderFilter, HTTPRequestMirrorFilter


class Filters(NamedTuple):
    """`refused`: filters that cannot be enforced, so the whole rule must not be; `unresolved`:
    mirrors without a backend, which are left out."""

    filters: tuple[Filter, ...]
    clusters: tuple[ClusterRef, ...]
    refused: tuple[Problem, ...]
    unresolved: tuple[Problem, ...]


def translate(
    view: View,
    route: RouteKey,
    filters: Sequence[HTTPRouteFilter | GRPCRouteFilter],
    where: str,
) -> Filters:
    """`where` is the field path of the filters, for messages."""
    result: list[Filter] = []
    clusters: list[ClusterRef] = []
    refused: list[Problem] = []
    unresolved: list[Problem] = []
    for number, one in enumerate(filters):
        if one.request_header_modifier is not None:
            result.append(_headers("request", one.request_header_modifier))
        elif one.response_header_modifier is not None:
            result.append(_headers("response", one.response_header_modifier))
        elif one.request_mirror is not None:
            cluster = resolve(view, route, one.request_mirror.backend_ref)
            if isinstance(cluster, Problem):
                unresolved.append(cluster)
            else:
                clusters.append(cluster)
                result.append(_mirror(one.request_mirror, cluster))
        else:
            translated = _http_only(one) if isinstance(one, HTTPRouteFilter) else None
            if translated is None:
                field = f"{where}.filters[{number}].type"
                refused.append(Problem("UnsupportedValue", f"{field} {one.type} is not supported"))
            else:
                result.append(translated)
    return Filters(tuple(result), tuple(clusters), tuple(refused), tuple(unresolved))


def _http_only(one: HTTPRouteFilter) -> Filter | None:
    if one.request_redirect is not None:
        redirect = one.request_redirect
        return routeconfig.Redirect(
            redirect.scheme,
            redirect.hostname,
            _path(redirect.path),
            redirect.port,
            redirect.status_code,
        )
    if one.url_rewrite is not None:
        return routeconfig.Rewrite(one.url_rewrite.hostname, _path(one.url_rewrite.path))
    if one.cors is not None:
        return _cors(one.cors)
    return None


def _headers(direction: str, modifier: HTTPHeaderFilter) -> HeaderModifier:
    return HeaderModifier(
        direction="request" if direction == "request" else "response",
        set=_values(modifier.set),
        add=_values(modifier.add),
        remove=tuple(name.lower() for name in modifier.remove),
    )


def _values(headers: tuple[HTTPHeader, ...]) -> tuple[HeaderValue, ...]:
    """Of names that differ only in case, the first counts (HTTPHeaderFilter)."""
    first: dict[str, HeaderValue] = {}
    for header in headers:
        name = header.name.lower()
        first.setdefault(name, HeaderValue(name, header.value))
    return tuple(first.values())


def _path(modifier: HTTPPathModifier | None) -> routeconfig.PathModifier | None:
    if modifier is None:
        return None
    if modifier.type == "ReplaceFullPath":
        return routeconfig.PathModifier("ReplaceFullPath", modifier.replace_full_path or "")
    return routeconfig.PathModifier("ReplacePrefixMatch", modifier.replace_prefix_match or "")


def _mirror(mirror: HTTPRequestMirrorFilter, cluster: ClusterRef) -> routeconfig.Mirror:
    numerator, denominator = 1, 1
    if mirror.fraction is not None:
        numerator, denominator = mirror.fraction.numerator, mirror.fraction.denominator
    elif mirror.percent is not None:
        numerator, denominator = mirror.percent, 100
    return routeconfig.Mirror(cluster.section, numerator, denominator)


def _cors(cors: HTTPCORSFilter) -> routeconfig.Cors:
    return routeconfig.Cors(
        cors.allow_origins,
        bool(cors.allow_credentials),
        tuple(cors.allow_methods),
        cors.allow_headers,
        cors.expose_headers,
        cors.max_age,
    )
