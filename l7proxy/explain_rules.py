"""What becomes of a request once it is known whose routes count, and why the other rules did not
win: the part of explanations that Gateways and the mesh share.

Pure functions over the same compiled rules as `routing` uses. What depends on chance or on
connections (which backend by weight, which endpoint, sessions, timeouts) is told as what may
happen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import TypeAlias

import msgspec

from l7proxy import filters
from l7proxy.explain_words import describe, mismatches
from l7proxy.filters import ListeningPort
from l7proxy.message import RequestHead
from l7proxy.normalise import (
    check_header,
    normalise_authority,
    normalise_target,
    strip_hop_by_hop,
)
from l7proxy.route_compile import (
    CompiledMatch,
    CompiledRoute,
    Order,
    RouteMatchResult,
)
from l7proxy.route_match import RequestView
from l7proxy.routing import Refused, RouteIndex, host_patterns
from mesh.model.nodeconfig import ClusterSection, Section, Settings
from mesh.model.routeconfig import RouteSection, WeightedBackend
from mesh.model.section import SETTINGS_KEY, SectionKey

# How far a rule is from being chosen, for the order in which the others are told: 0 lost to another
# match, n is n things of its match that do not hold, then these.
_OTHER_HOST, _OTHER_LISTENER = 100, 101
# Smaller wins: the hostname's place among those that match, the type of path, the match's order.
_Rank: TypeAlias = tuple[int, int, Order]
_PATH_RANK = {"Exact": 0, "RegularExpression": 1, "PathPrefix": 2}
# Why a smaller rank won, by its place in it.
_WINS = (
    "more specific hostname",
    "exact path before expression before prefix",
    "longer path",
    "has a method match",
    "more header matches",
    "more query parameter matches",
    "older route",
    'first by "namespace/name"',
    "first by kind",
    "earlier rule",
)


class ExplainedBackend(msgspec.Struct, frozen=True):
    """`share` of the rule's requests, 0 to 1; `endpoints` as "address:port (pod)"; `note` is why
    requests to it are answered with an error, "" if they are not."""

    cluster: str | None
    weight: int
    share: float
    endpoints: tuple[str, ...]
    filters: tuple[str, ...]
    note: str


class Candidate(msgspec.Struct, frozen=True):
    """A rule on the port that the request does not get."""

    listener: str
    route: str
    rule: str
    reason: str


class Explanation(msgspec.Struct, frozen=True):
    """What a request gets. `status` is set where the proxy answers itself, with `detail` saying
    why; then the fields below what was not reached are "" or empty. `route` is
    "<kind>/<namespace>/<name>", `rule` its name or index; `candidates` have the nearest first. In
    the mesh, `service` is the Service port asked for, "<ns>/<name>:<port>", `way` says whose
    routes count or why none do, and `kernel` whether the kernel decides such requests."""

    gateway: str = ""
    service: str = ""
    way: str = ""
    kernel: str = ""
    listener: str = ""
    route: str = ""
    rule: str = ""
    rule_index: int | None = None
    match_index: int | None = None
    status: int | None = None
    detail: str = ""
    backends: tuple[ExplainedBackend, ...] = ()
    filters: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = ()


def settings_of(sections: Mapping[SectionKey, Section]) -> Settings:
    found = sections.get(SETTINGS_KEY)
    return found if isinstance(found, Settings) else Settings()


def head_of(
    method: str,
    scheme: str,
    host: str,
    path: str,
    headers: Sequence[tuple[str, str]],
    settings: Settings,
) -> RequestHead:
    """The head as codecs would hand it over."""
    target, query = normalise_target(path.encode(), settings, method.encode())
    authority = normalise_authority(host.encode())
    fields = [(name.lower().encode(), value.encode()) for name, value in headers]
    for name, value in fields:
        check_header(name, value)
    end_to_end = strip_hop_by_hop(fields)
    return RequestHead(
        method.encode(),
        scheme.encode(),
        authority,
        target,
        query,
        end_to_end.headers,
        upgrade=end_to_end.upgrade,
    )


def attached_routes(
    sections: Mapping[SectionKey, Section], listeners: Set[str]
) -> tuple[RouteIndex, list[Candidate]]:
    """The routes attached to these listeners, and those that cannot be in force."""
    index, refused = RouteIndex(), []
    for key, section in sorted(sections.items()):
        if not isinstance(section, RouteSection):
            continue
        attached = [a.listener for a in section.attachments if a.listener in listeners]
        if not attached:
            continue
        try:
            index.put(key, section)
        except Refused as error:
            label = f"{section.kind}/{section.namespace}/{section.name}"
            refused += [Candidate(on, label, "", f"refused: {error}") for on in attached]
    return index, refused


def answer(
    sections: Mapping[SectionKey, Section],
    found: RouteMatchResult,
    head: RequestHead,
    port: ListeningPort,
    base: Explanation,
) -> Explanation:
    """`base` and what the request gets by the rule that was found."""
    section = sections[found.route.key]
    assert isinstance(section, RouteSection)
    rule = section.rules[found.rule.index]
    status, detail = _own_answer(found, head, port)
    return msgspec.structs.replace(
        base,
        route=found.route.label,
        rule=found.rule.label,
        rule_index=found.rule.index,
        match_index=found.match_index,
        status=status,
        detail=detail,
        backends=tuple(
            explain_backend(sections, backend, found.rule.total_weight) for backend in rule.backends
        ),
        filters=tuple(map(describe, rule.filters)),
    )


def _own_answer(
    found: RouteMatchResult, head: RequestHead, port: ListeningPort
) -> tuple[int | None, str]:
    """The status that the proxy answers whatever the backends do."""
    rule = found.rule
    if rule.error_status is not None:
        return rule.error_status, "the rule is not whole; see the route's status"
    if rule.redirect is not None:
        answer = filters.redirect(rule.redirect, head, port, found)
        location = next(value for name, value in answer.headers if name == b"location")
        return answer.status, f"redirect to {location.decode()}"
    if not rule.total_weight:
        return 500, "the rule has no backend with a weight"
    return None, ""


def explain_backend(
    sections: Mapping[SectionKey, Section], backend: WeightedBackend, total: int
) -> ExplainedBackend:
    cluster = sections.get(backend.cluster or "")
    endpoints: tuple[str, ...] = ()
    note = ""
    if backend.cluster is None:
        note = "500: the reference does not resolve; see ResolvedRefs in the route's status"
    elif not isinstance(cluster, ClusterSection) or not cluster.endpoints:
        note = "503: no ready endpoints"
    else:
        endpoints = tuple(
            f"{e.address}:{e.port}" + (f" ({e.name})" if e.name else "") for e in cluster.endpoints
        )
        if cluster.tls is not None and cluster.tls.broken is not None:
            note = f"502: {cluster.tls.broken}"
    return ExplainedBackend(
        cluster=backend.cluster,
        weight=backend.weight,
        share=backend.weight / total if total else 0.0,
        endpoints=endpoints,
        filters=tuple(map(describe, backend.filters)),
        note=note,
    )


# --- the others ---------------------------------------------------------------------------------


def candidates(
    listeners: Mapping[str, str],
    routes: RouteIndex,
    head: RequestHead,
    found: RouteMatchResult | None,
) -> tuple[Candidate, ...]:
    """Every rule on some listeners but the one found, the nearest first. `listeners`: by id, why
    the request does not belong to it, "" for the one that it belongs to."""
    ranked = sorted(_ranked(listeners, routes, head, found), key=lambda pair: pair[0])
    return tuple(candidate for _, candidate in ranked)


def _ranked(
    listeners: Mapping[str, str],
    routes: RouteIndex,
    head: RequestHead,
    found: RouteMatchResult | None,
) -> Iterator[tuple[int, Candidate]]:
    view = RequestView(head)
    patterns = host_patterns(head.host)
    attached: dict[str, list[tuple[CompiledRoute, set[bytes]]]] = {}
    for route in routes.routes():
        places: dict[str, set[bytes]] = {}
        for name, pattern in route.places:
            places.setdefault(name, set()).add(pattern)
        for name, hosts in places.items():
            attached.setdefault(name, []).append((route, hosts))
    winner = None
    if found is not None:
        selected = next(id for id, elsewhere in listeners.items() if not elsewhere)
        winner = _winner(attached[selected], patterns, found)
    for listener, elsewhere in listeners.items():
        for route, hosts in attached.get(listener, ()):
            rules: dict[int, list[CompiledMatch]] = {}
            for match in route.matches:
                rules.setdefault(match.result.rule.index, []).append(match)
            for matches in rules.values():
                rule = matches[0].result.rule
                if found is not None and not elsewhere and rule is found.rule:
                    continue
                if elsewhere:
                    distance, reason = _OTHER_LISTENER, elsewhere
                else:
                    distance, reason = _reason(matches, hosts, patterns, view, winner)
                yield distance, Candidate(listener, route.ref.label, rule.label, reason)


def _winner(
    attached: Iterable[tuple[CompiledRoute, set[bytes]]],
    patterns: tuple[bytes, ...],
    found: RouteMatchResult,
) -> _Rank:
    return next(
        _rank(match, hosts, patterns)
        for route, hosts in attached
        for match in route.matches
        if match.result is found
    )


def _rank(match: CompiledMatch, hosts: set[bytes], patterns: tuple[bytes, ...]) -> _Rank:
    host = next(i for i, pattern in enumerate(patterns) if pattern in hosts)
    return (host, _PATH_RANK[match.path_type], match.order)


def _reason(
    matches: list[CompiledMatch],
    hosts: set[bytes],
    patterns: tuple[bytes, ...],
    view: RequestView,
    winner: _Rank | None,
) -> tuple[int, str]:
    if not hosts.intersection(patterns):
        names = " and ".join(host.decode() for host in sorted(hosts))
        return _OTHER_HOST, f"hostname {names} does not match {view.head.host.decode()}"
    holding: list[CompiledMatch] = []
    failures: dict[str, int] = {}
    for match in matches:
        wrong = list(mismatches(match, view))
        if wrong:
            failures[", ".join(wrong)] = len(wrong)
        else:
            holding.append(match)
    if not holding:
        return min(failures.values()), "; ".join(failures)
    assert winner is not None
    ours = min(_rank(match, hosts, patterns) for match in holding)
    pairs = zip((*winner[:2], *winner[2]), (*ours[:2], *ours[2]), strict=True)
    at = next(i for i, (won, lost) in enumerate(pairs) if won != lost)
    return 0, f"a more specific match won: {_WINS[at]}"
