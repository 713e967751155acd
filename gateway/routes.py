"""HTTPRoutes and GRPCRoutes: their rules, translated to nodeconfig.

A rule that asks for something the data plane does not do answers 500 (its matches stay, so that no
less specific rule takes its requests), and the route's status names the field. Knows nothing of
parents; attachment is in gateway.attachment.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gateway import filters
from gateway.backends import resolve
from gateway.conditions import Problem
from gateway.keys import ClusterRef, RouteKey
from mesh.model.derive import View
from mesh.model.grpcroute import GRPCBackendRef, GRPCRoute, GRPCRouteMatch, GRPCRouteRule
from mesh.model.httproute import HTTPBackendRef, HTTPRoute, HTTPRouteMatch, HTTPRouteRule
from mesh.model.meta import parse_duration
from mesh.model.routeconfig import (
    PathMatch,
    Redirect,
    Retry,
    RouteMatch,
    RouteRule,
    SessionPersistence,
    ValueMatch,
    WeightedBackend,
)
from mesh.model.routes import SessionPersistence as SessionSpec


class Translation(NamedTuple):
    """`unresolved`: references that lead nowhere; `refused`: rules (by number) that answer 500, and
    why; `rules` has them all the same."""

    rules: tuple[RouteRule, ...]
    clusters: frozenset[ClusterRef]
    unresolved: tuple[Problem, ...]
    refused: tuple[tuple[int, Problem], ...]


def translate(view: View, key: RouteKey) -> Translation:
    route: HTTPRoute | GRPCRoute = view.get("Route", key)
    rules: list[RouteRule] = []
    clusters: set[ClusterRef] = set()
    unresolved: list[Problem] = []
    refused: list[tuple[int, Problem]] = []
    # A GRPCRoute without rules is one that matches everything and leads nowhere.
    specs: Sequence[HTTPRouteRule | GRPCRouteRule] = route.spec.rules or (GRPCRouteRule(),)
    for number, rule in enumerate(specs):
        translated = _rule(view, key, number, rule)
        clusters |= translated.clusters
        unresolved += translated.unresolved
        refused += translated.refused
        rules += translated.rules
    return Translation(tuple(rules), frozenset(clusters), tuple(unresolved), tuple(refused))


def _rule(
    view: View, key: RouteKey, number: int, rule: HTTPRouteRule | GRPCRouteRule
) -> Translation:
    where = f"spec.rules[{number}]"
    translated = filters.translate(view, key, rule.filters, where)
    clusters = set(translated.clusters)
    unresolved = list(translated.unresolved)
    refused = list(translated.refused)
    backends: list[WeightedBackend] = []
    refs: Sequence[HTTPBackendRef | GRPCBackendRef] = rule.backend_refs
    for position, ref in enumerate(refs):
        own = filters.translate(view, key, ref.filters, f"{where}.backendRefs[{position}]")
        clusters.update(own.clusters)
        unresolved += own.unresolved
        refused += own.refused
        cluster = resolve(view, key, ref)
        if isinstance(cluster, Problem):
            unresolved.append(cluster)
            backends.append(WeightedBackend(None, ref.weight))
        else:
            clusters.add(cluster)
            backends.append(WeightedBackend(cluster.section, ref.weight, own.filters))
    http = rule if isinstance(rule, HTTPRouteRule) else None
    timeouts = http.timeouts if http is not None else None
    matches = tuple(map(_match, rule.matches)) or (RouteMatch(),)
    answers = bool(backends) or any(isinstance(one, Redirect) for one in translated.filters)
    translation = RouteRule(
        matches=matches,
        name=rule.name,
        filters=translated.filters,
        backends=tuple(backends),
        request_timeout_ms=_duration(timeouts.request if timeouts else None),
        backend_timeout_ms=_duration(timeouts.backend_request if timeouts else None),
        retry=_retry(http) if http is not None else None,
        session=_session(key, number, rule.name, rule.session_persistence, matches),
        error_status=None if answers else 500,
    )
    if refused:
        clusters.clear()
        translation = RouteRule(matches=matches, name=rule.name, error_status=500)
    return Translation(
        (translation,),
        frozenset(clusters),
        tuple(unresolved),
        tuple((number, problem) for problem in refused),
    )


def _match(match: HTTPRouteMatch | GRPCRouteMatch) -> RouteMatch:
    if isinstance(match, GRPCRouteMatch):
        headers = _first(ValueMatch(h.name.lower(), h.value, h.type) for h in match.headers)
        return RouteMatch(path=_grpc_path(match), headers=headers)
    return RouteMatch(
        path=PathMatch(match.path.type, match.path.value),
        method=match.method,
        headers=_first(ValueMatch(h.name.lower(), h.value, h.type) for h in match.headers),
        query=_first(ValueMatch(q.name, q.value, q.type) for q in match.query_params),
    )


def _grpc_path(match: GRPCRouteMatch) -> PathMatch:
    """gRPC requests have the path /Service/Method."""
    method = match.method
    if method is None or (method.service is None and method.method is None):
        return PathMatch()
    if method.type == "RegularExpression":
        parts = (method.service, method.method)
        service, name = (f"(?:{part})" if part else "[^/]+" for part in parts)
        return PathMatch("RegularExpression", f"/{service}/{name}")
    if method.method is None:
        return PathMatch("PathPrefix", f"/{method.service}/")
    if method.service is None:
        return PathMatch("RegularExpression", f"/[^/]+/{re.escape(method.method)}")
    return PathMatch("Exact", f"/{method.service}/{method.method}")


def _first(matches: Iterable[ValueMatch]) -> tuple[ValueMatch, ...]:
    """Of matches with one name, only the first counts (HTTPHeaderMatch, HTTPQueryParamMatch)."""
    by_name: dict[str, ValueMatch] = {}
    for match in matches:
        by_name.setdefault(match.name, match)
    return tuple(by_name.values())


def _duration(text: str | None) -> int | None:
    """Milliseconds; 0s means no limit (HTTPRouteTimeouts), as None does."""
    return (parse_duration(text) or None) if text else None


def _retry(rule: HTTPRouteRule) -> Retry | None:
    retry = rule.retry
    if retry is None:
        return None
    return Retry(
        tuple(sorted(retry.codes)),
        1 if retry.attempts is None else retry.attempts,
        parse_duration(retry.backoff) if retry.backoff else 0,
    )


def _session(
    key: RouteKey,
    number: int,
    rule_name: str | None,
    spec: SessionSpec | None,
    matches: tuple[RouteMatch, ...],
) -> SessionPersistence | None:
    if spec is None:
        return None
    timeout = spec.absolute_timeout
    path = "/"
    if len(matches) == 1 and matches[0].path.type != "RegularExpression":
        path = matches[0].path.value
    # Rules under one path must not overwrite each other's sessions.
    seed = "/".join((*key, rule_name or str(number)))
    own = hashlib.blake2b(seed.encode(), digest_size=4).hexdigest()
    return SessionPersistence(
        type=spec.type,
        name=spec.session_name or f"weft-session-{own}",
        absolute_timeout_s=parse_duration(timeout) / 1000 if timeout else None,
        permanent=spec.cookie_config is not None
        and spec.cookie_config.lifetime_type == "Permanent",
        path=path,
    )
