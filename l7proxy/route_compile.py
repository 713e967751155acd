"""Routes as the matcher and the exchange use them: checked, encoded, with their precedence.

Compiling is the one place where a route's section is judged; Refused names rule and field. Matches
carry everything that compares two of them (Gateway API HTTPRouteRule.matches), so that the index
only sorts. No I/O; nothing of listeners beyond their ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import re2

from l7proxy.cors import CompiledCors, compile_cors
from l7proxy.field_rules import Refused, check_name
from l7proxy.filters import (
    NO_FILTERS,
    CompiledFilters,
    CompiledRedirect,
    HeaderChange,
    RewriteChange,
    check_mirror,
    compile_headers,
    compile_redirect,
    compile_rewrite,
)
from l7proxy.message import ProtocolError
from l7proxy.normalise import HOP_BY_HOP, normalise_target
from l7proxy.session import CompiledSession, compile_session
from mesh.model.nodeconfig import Settings
from mesh.model.routeconfig import (
    Cors,
    Filter,
    HeaderModifier,
    Mirror,
    PathMatch,
    Redirect,
    Retry,
    Rewrite,
    RouteMatch,
    RouteRule,
    RouteSection,
    ValueMatch,
)
from mesh.model.section import SectionKey

# One expression may not take more than this: bytes of RE2's program and its lazily built automaton,
# and instructions, which bound the time per byte of the text where the automaton does not fit.
_REGEX_MEMORY = 512 * 1024
_REGEX_INSTRUCTIONS = 1_000

# Fields that codecs take out of `RequestHead.headers`: a match on them could never hold.
_UNMATCHABLE = HOP_BY_HOP - {b"upgrade"} | {b"expect"}
_PATH_FORM = Settings()

PathType: TypeAlias = Literal["Exact", "PathPrefix", "RegularExpression"]


class RouteRef(NamedTuple):
    """Which route: its section's key and its object."""

    key: SectionKey
    kind: str
    namespace: str
    name: str

    @property
    def label(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class CompiledBackend:
    """A backendRef. `cluster` None does not resolve: its share of requests gets 500. `label` is
    its name in metrics and logs."""

    cluster: SectionKey | None
    label: str
    weight: int = 1
    filters: CompiledFilters = NO_FILTERS
    redirect: CompiledRedirect | None = None
    mirrors: tuple[Mirror, ...] = ()


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule in force. `label` is its name, or its index where it has none. Timeouts in seconds.
    `client_headers` as in RouteSection."""

    index: int
    name: str | None
    backends: tuple[CompiledBackend, ...]
    total_weight: int
    filters: CompiledFilters = NO_FILTERS
    redirect: CompiledRedirect | None = None
    cors: CompiledCors | None = None
    mirrors: tuple[Mirror, ...] = ()
    request_timeout_s: float | None = None
    backend_timeout_s: float | None = None
    retry: Retry | None = None
    session: CompiledSession | None = None
    error_status: int | None = None
    client_headers: bool = False

    @property
    def label(self) -> str:
        return self.name or str(self.index)


class Regex:
    """A regular expression (RE2 syntax over bytes) that must match the whole text, in linear
    time."""

    __slots__ = ("_compiled", "source")

    def __init__(self, source: str, where: str) -> None:
        options = re2.Options()
        options.encoding = re2.Options.Encoding.LATIN1
        options.max_mem = _REGEX_MEMORY
        options.never_capture = True
        options.log_errors = False
        self.source = source
        try:
            self._compiled = re2.compile(source.encode(), options)
        except re2.error as error:
            why = error.args[0] if error.args else error
            why = why.decode(errors="replace") if isinstance(why, bytes) else why
            raise Refused(f"{where}: regular expression {source!r}: {why}") from None
        if (size := self._compiled.programsize) > _REGEX_INSTRUCTIONS:
            raise Refused(
                f"{where}: regular expression {source!r} compiles to {size} instructions; "
                f"{_REGEX_INSTRUCTIONS} is the most"
            )

    @property
    def size(self) -> int:
        """In RE2's instructions."""
        return int(self._compiled.programsize)

    def matches(self, text: bytes) -> bool:
        return self._compiled.fullmatch(text) is not None


class ValueCondition(NamedTuple):
    """A header (name lower case) or query parameter must have this value."""

    name: bytes
    value: bytes
    regex: Regex | None

    def holds(self, found: bytes | None) -> bool:
        """`found`: the request's value, None if it has none."""
        if found is None:
            return False
        return found == self.value if self.regex is None else self.regex.matches(found)


class RouteMatchResult(NamedTuple):
    """Which rule a request gets.

    `prefix` is the PathPrefix that matched, without its trailing "/" (b"" for "/"), None for other
    path matches. `match_index` counts the rule's matches.
    """

    route: RouteRef
    rule: CompiledRule
    prefix: bytes | None
    match_index: int


# The route of requests that no route is about.
NO_ROUTE = RouteRef("", "", "", "")


def straight_to(cluster: SectionKey, label: str) -> RouteMatchResult:
    """What a request gets that no route is about: this cluster, and nothing is changed."""
    rule = CompiledRule(0, None, (CompiledBackend(cluster, label),), total_weight=1)
    return RouteMatchResult(NO_ROUTE, rule, None, 0)


# Smaller comes first. Path length (negative), has no method, header and query matches (negative),
# creation, "namespace/name", kind, rule, match.
Order: TypeAlias = tuple[int, bool, int, int, str, str, str, int, int]


class CompiledMatch:
    """One HTTPRouteMatch; `path` is normalised, of prefixes without a trailing "/"."""

    __slots__ = ("headers", "method", "order", "path", "path_type", "query", "regex", "result")

    def __init__(
        self,
        *,
        path_type: PathType,
        path: bytes,
        regex: Regex | None,
        method: bytes | None,
        headers: tuple[ValueCondition, ...],
        query: tuple[ValueCondition, ...],
        order: Order,
        result: RouteMatchResult,
    ) -> None:
        self.path_type = path_type
        self.path = path
        self.regex = regex
        self.method = method
        self.headers = headers
        self.query = query
        self.order = order
        self.result = result


class CompiledRoute(NamedTuple):
    """A route: its matches, and where each stands: (listener, host pattern) pairs."""

    ref: RouteRef
    places: tuple[tuple[str, bytes], ...]
    matches: tuple[CompiledMatch, ...]


def compile_route(key: SectionKey, section: RouteSection) -> CompiledRoute:
    """Refused: something in the section cannot be put in force."""
    ref = RouteRef(key, section.kind, section.namespace, section.name)
    places = {
        (attachment.listener, normalise_host(hostname.encode()))
        for attachment in section.attachments
        for hostname in attachment.hostnames
    }
    matches: list[CompiledMatch] = []
    for i, rule in enumerate(section.rules):
        compiled = _compile_rule(rule, i, client_headers=section.client_headers)
        for j, match in enumerate(rule.matches or (RouteMatch(),)):
            where = f"rules[{i}].matches[{j}]"
            matches.append(_compile_match(match, j, where, compiled, ref, section.created))
    # A route without matches stands nowhere.
    return CompiledRoute(ref, tuple(sorted(places)) if matches else (), tuple(matches))


# --- matches ------------------------------------------------------------------------------------


def _compile_match(
    match: RouteMatch, index: int, where: str, rule: CompiledRule, ref: RouteRef, created: str
) -> CompiledMatch:
    path, regex = _compile_path(match.path, f"{where}.path.value")
    headers = _conditions(match.headers, f"{where}.headers", headers=True)
    query = _conditions(match.query, f"{where}.queryParams", headers=False)
    prefix = path if match.path.type == "PathPrefix" else None
    return CompiledMatch(
        path_type=match.path.type,
        path=path,
        regex=regex,
        method=match.method.encode() if match.method else None,
        headers=headers,
        query=query,
        order=(
            -len(path),
            match.method is None,
            -len(headers),
            -len(query),
            # An unknown time is later than every known one (RFC 3339 starts with a digit).
            created or "~",
            f"{ref.namespace}/{ref.name}",
            ref.kind,
            rule.index,
            index,
        ),
        result=RouteMatchResult(ref, rule, prefix, index),
    )


def _compile_path(match: PathMatch, where: str) -> tuple[bytes, Regex | None]:
    if match.type == "RegularExpression":
        return match.value.encode(), Regex(match.value, where)
    try:
        path, query = normalise_target(match.value.encode(), _PATH_FORM)
    except ProtocolError as error:
        raise Refused(f"{where}: {match.value!r}: {error.detail}") from None
    if query is not None:
        raise Refused(f"{where}: {match.value!r} has a query; use queryParams")
    return (path.rstrip(b"/") if match.type == "PathPrefix" else path), None


def _conditions(
    matches: tuple[ValueMatch, ...], where: str, *, headers: bool
) -> tuple[ValueCondition, ...]:
    """Of equivalent names the first counts (HTTPHeaderMatch.name, HTTPQueryParamMatch.name)."""
    conditions: dict[bytes, ValueCondition] = {}
    for i, match in enumerate(matches):
        if not headers:
            name = match.name.encode()
        elif match.name.lower() in ("host", ":authority"):
            name = b"host"
        else:
            name = check_name(match.name, f"{where}[{i}].name")
            if name in _UNMATCHABLE:
                raise Refused(
                    f"{where}[{i}].name: {match.name!r} belongs to one connection; routes cannot "
                    "match it"
                )
        regex = None
        if match.type == "RegularExpression":
            regex = Regex(match.value, f"{where}[{i}].value")
        conditions.setdefault(name, ValueCondition(name, match.value.encode(), regex))
    return tuple(conditions.values())


def normalise_host(host: bytes) -> bytes:
    """A host for comparing: lower case, without a trailing dot."""
    host = host.lower()
    return host[:-1] if host.endswith(b".") else host


# --- rules --------------------------------------------------------------------------------------


class _Compiled(NamedTuple):
    filters: CompiledFilters
    redirect: CompiledRedirect | None
    cors: CompiledCors | None
    mirrors: tuple[Mirror, ...]


def _compile_rule(rule: RouteRule, index: int, *, client_headers: bool) -> CompiledRule:
    where = f"rules[{index}]"
    prefixes_only = all(match.path.type == "PathPrefix" for match in rule.matches)
    filters = _compile_filters(rule.filters, where, prefixes_only)
    backends: list[CompiledBackend] = []
    for i, backend in enumerate(rule.backends):
        place = f"{where}.backendRefs[{i}]"
        if backend.weight < 0:
            raise Refused(f"{place}.weight: {backend.weight} is negative")
        own = _compile_filters(backend.filters, place, prefixes_only)
        if own.cors is not None:
            raise Refused(f"{place}.filters: CORS is answered before a backend is chosen; put the "
                          "filter on the rule")  # fmt: skip
        backends.append(
            CompiledBackend(
                cluster=backend.cluster,
                label=backend.cluster or "",
                weight=backend.weight,
                filters=own.filters,
                redirect=own.redirect,
                mirrors=own.mirrors,
            )
        )
    return CompiledRule(
        index=index,
        name=rule.name,
        filters=filters.filters,
        redirect=filters.redirect,
        cors=filters.cors,
        mirrors=filters.mirrors,
        backends=tuple(backends),
        total_weight=sum(backend.weight for backend in backends),
        request_timeout_s=_seconds(rule.request_timeout_ms),
        backend_timeout_s=_seconds(rule.backend_timeout_ms),
        retry=rule.retry,
        session=(
            compile_session(rule.session, f"{where}.sessionPersistence")
            if rule.session is not None
            else None
        ),
        error_status=rule.error_status,
        client_headers=client_headers,
    )


def _seconds(milliseconds: int | None) -> float | None:
    """Zero is no limit (HTTPRouteTimeouts)."""
    return milliseconds / 1000 if milliseconds else None


def _compile_filters(filters: tuple[Filter, ...], where: str, prefixes_only: bool) -> _Compiled:
    if not filters:
        return _Compiled(NO_FILTERS, None, None, ())
    request: list[HeaderChange] = []
    response: list[HeaderChange] = []
    mirrors: list[Mirror] = []
    rewrites: list[RewriteChange] = []
    redirects: list[CompiledRedirect] = []
    cors: list[CompiledCors] = []
    for i, item in enumerate(filters):
        place = f"{where}.filters[{i}]"
        match item:
            case HeaderModifier():
                changes = request if item.direction == "request" else response
                changes.append(compile_headers(item, place))
            case Rewrite():
                rewrites.append(compile_rewrite(item, place, prefixes_only=prefixes_only))
            case Redirect():
                redirects.append(compile_redirect(item, place, prefixes_only=prefixes_only))
            case Mirror():
                mirrors.append(check_mirror(item, place))
            case Cors():
                cors.append(compile_cors(item, place))
    if max(len(rewrites), len(redirects), len(cors)) > 1 or (rewrites and redirects):
        raise Refused(f"{where}.filters: at most one rewrite or redirect, and one CORS filter")
    return _Compiled(
        CompiledFilters(tuple(request), tuple(response), rewrites[0] if rewrites else None),
        redirects[0] if redirects else None,
        cors[0] if cors else None,
        tuple(mirrors),
    )
