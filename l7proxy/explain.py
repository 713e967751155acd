"""Why a request would go where it goes: the matcher's answer, and why the other rules did not win.

Pure functions over the same compiled rules as `routing` uses, for `weft explain`. Nothing is sent
anywhere; what depends on chance or on connections (which backend by weight, which endpoint,
sessions, timeouts) is told as what may happen.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import msgspec

from l7proxy import filters, forwarding
from l7proxy.explain_words import describe, mismatches
from l7proxy.message import ProtocolError, RequestHead
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
from l7proxy.routing import PortIndex, Refused, RouteIndex, host_patterns
from l7proxy.streams import ConnectionInfo
from mesh.model.nodeconfig import (
    SETTINGS_KEY,
    ClusterSection,
    Listener,
    PortSection,
    RouteSection,
    Section,
    SectionKey,
    Settings,
    WeightedBackend,
)

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
    "<kind>/<namespace>/<name>", `rule` its name or index; `candidates` have the nearest first."""

    gateway: str = ""
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


def explain(
    sections: Mapping[SectionKey, Section],
    *,
    method: str,
    scheme: str,
    host: str,
    port: int,
    path: str,
    headers: Sequence[tuple[str, str]],
    address: str | None = None,
) -> Explanation:
    """Explain one request. `host` is the authority as sent, port included if there is one; `path`
    includes the query; `address` tells Gateways on the same port apart. The client is taken to be
    on this host and, with TLS, to send `host` as SNI. The answer depends on the arguments alone."""
    settings = sections.get(SETTINGS_KEY)
    if not isinstance(settings, Settings):
        settings = Settings()
    try:
        head = _head(method, scheme, host, path, headers, settings)
    except ProtocolError as error:
        return Explanation(status=error.status, detail=error.detail)
    # As in a worker: what a client of this host would be believed. The identifier is random.
    identifier = [item for item in head.headers if item[0] == b"x-request-id"]
    client = ConnectionInfo(("127.0.0.1", 0), (address or "", port), tls=scheme == "https")
    trusted = forwarding.apply(head, client, settings).trusted
    head.headers = [item for item in head.headers if item[0] != b"x-request-id"]
    head.headers += identifier if trusted else []
    ports = [
        section
        for _, section in sorted(sections.items())
        if isinstance(section, PortSection)
        and section.port == port
        and section.protocol.lower() == scheme
        and (address is None or section.address in (address, "0.0.0.0", "::"))
    ]
    if not ports:
        where = f"port {port}" if address is None else f"{address} port {port}"
        return Explanation(
            detail=f"nothing listens on {where} for {scheme}; there is {_listening(sections)}"
        )
    routes, refused = _routes(sections, ports)
    answers = [_on_port(sections, section, routes, head) for section in ports]
    # Without an address, the first port that has most to say stands for all.
    best = max(answers, key=lambda answer: (bool(answer.route), bool(answer.listener)))
    others = [c for answer in answers if answer is not best for c in answer.candidates]
    return msgspec.structs.replace(best, candidates=(*refused, *best.candidates, *others))


def _head(
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


def _listening(sections: Mapping[SectionKey, Section]) -> str:
    ports = [section for section in sections.values() if isinstance(section, PortSection)]
    found = sorted((port.port, port.protocol.lower(), port.address) for port in ports)
    return ", ".join(f"{scheme} on {at} port {port}" for port, scheme, at in found) or "no listener"


def _routes(
    sections: Mapping[SectionKey, Section], ports: Iterable[PortSection]
) -> tuple[RouteIndex, list[Candidate]]:
    """The routes attached to these ports' listeners, and those that cannot be in force."""
    listeners = {listener.id for port in ports for listener in port.listeners}
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


def _on_port(
    sections: Mapping[SectionKey, Section],
    port: PortSection,
    routes: RouteIndex,
    head: RequestHead,
) -> Explanation:
    index = PortIndex(port)
    listener = index.select(head.host, _sni(head.host))
    found = routes.match(listener.id, head) if listener is not None else None
    ranked = sorted(_candidates(port, listener, routes, head, found), key=lambda pair: pair[0])
    candidates = tuple(candidate for _, candidate in ranked)
    if listener is None:
        return Explanation(
            gateway=port.gateway,
            status=404,
            detail=f"no listener is for host {head.host.decode()}",
            candidates=candidates,
        )
    if found is None:
        return Explanation(
            gateway=port.gateway,
            listener=listener.id,
            status=404,
            detail="no route matches",
            candidates=candidates,
        )
    section = sections[found.route.key]
    assert isinstance(section, RouteSection)
    rule = section.rules[found.rule.index]
    status, detail = _own_answer(found, head, port)
    return Explanation(
        gateway=port.gateway,
        listener=listener.id,
        route=found.route.label,
        rule=found.rule.label,
        rule_index=found.rule.index,
        match_index=found.match_index,
        status=status,
        detail=detail,
        backends=tuple(
            _backend(sections, backend, found.rule.total_weight) for backend in rule.backends
        ),
        filters=tuple(map(describe, rule.filters)),
        candidates=candidates,
    )


def _sni(host: bytes) -> str | None:
    """What a TLS client sends: no addresses (RFC 6066 §3)."""
    text = host.decode()
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return text
    return None


def _own_answer(
    found: RouteMatchResult, head: RequestHead, port: PortSection
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


def _backend(
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


def _candidates(
    port: PortSection,
    selected: Listener | None,
    routes: RouteIndex,
    head: RequestHead,
    found: RouteMatchResult | None,
) -> Iterator[tuple[int, Candidate]]:
    """Every rule on the port but the one found, by listener, route and rule; each with its
    distance."""
    view = RequestView(head)
    patterns = list(host_patterns(head.host))
    attached: dict[str, list[tuple[CompiledRoute, set[bytes]]]] = {}
    for route in routes.routes():
        places: dict[str, set[bytes]] = {}
        for name, pattern in route.places:
            places.setdefault(name, set()).add(pattern)
        for name, hosts in places.items():
            attached.setdefault(name, []).append((route, hosts))
    winner = None
    if found is not None and selected is not None:
        winner = _winner(attached[selected.id], patterns, found)
    for listener in port.listeners:
        for route, hosts in attached.get(listener.id, ()):
            rules: dict[int, list[CompiledMatch]] = {}
            for match in route.matches:
                rules.setdefault(match.result.rule.index, []).append(match)
            for matches in rules.values():
                rule = matches[0].result.rule
                if found is not None and listener is selected and rule is found.rule:
                    continue
                if listener is not selected:
                    distance, reason = _OTHER_LISTENER, _not_selected(listener, selected, head)
                else:
                    distance, reason = _reason(matches, hosts, patterns, view, winner)
                yield distance, Candidate(listener.id, route.ref.label, rule.label, reason)


def _winner(
    attached: Iterable[tuple[CompiledRoute, set[bytes]]],
    patterns: list[bytes],
    found: RouteMatchResult,
) -> _Rank:
    return next(
        _rank(match, hosts, patterns)
        for route, hosts in attached
        for match in route.matches
        if match.result is found
    )


def _rank(match: CompiledMatch, hosts: set[bytes], patterns: list[bytes]) -> _Rank:
    host = next(i for i, pattern in enumerate(patterns) if pattern in hosts)
    return (host, _PATH_RANK[match.path_type], match.order)


def _not_selected(listener: Listener, selected: Listener | None, head: RequestHead) -> str:
    own = f"its listener is for hostname {listener.hostname or '*'}"
    if selected is None:
        return f"{own}, host is {head.host.decode()}"
    return f"{own}; host {head.host.decode()} belongs to {selected.id}"


def _reason(
    matches: list[CompiledMatch],
    hosts: set[bytes],
    patterns: list[bytes],
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
