"""Which listener and which rule a request gets: the reference matcher of the RouteTable.

`PortIndex` selects the listener, `RouteIndex` the rule among the routes attached to it, in the
precedence of Gateway API v1.6.1 (HTTPRouteRule.matches, HTTPRouteSpec.hostnames): the most specific
hostname first, and less specific ones where nothing matches there; then Exact paths before
RegularExpression (longer expressions first) before PathPrefix by length; then a method, the number
of headers, the number of query parameters; then the oldest route, its name, the rule's place.

Look-ups do not depend on the number of routes, but on the number of matches that share host and
path, and on the host's regular expressions. Nothing here does I/O or chooses endpoints.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from functools import lru_cache

from l7proxy.field_rules import Refused
from l7proxy.message import RequestHead
from l7proxy.route_compile import (
    CompiledBackend,
    CompiledMatch,
    CompiledRoute,
    CompiledRule,
    Order,
    RouteMatchResult,
    RouteRef,
    compile_route,
    normalise_host,
)
from l7proxy.route_match import RequestView, rest_holds
from mesh.model.nodeconfig import Listener, PortSection
from mesh.model.routeconfig import RouteSection
from mesh.model.section import SectionKey

__all__ = [
    "CompiledBackend",
    "CompiledMatch",
    "CompiledRoute",
    "CompiledRule",
    "PortIndex",
    "Refused",
    "RouteIndex",
    "RouteMatchResult",
    "RouteRef",
    "host_patterns",
    "pick_backend",
]

# No host name is longer (RFC 1035 §2.3.4); a longer one matches only "*".
_MAX_HOST = 253


@lru_cache(maxsize=1024)
def host_patterns(host: bytes) -> tuple[bytes, ...]:
    """The patterns that match a host, from the most specific: itself, "*.<suffix>" from the longest
    suffix, "*". A wildcard stands for one or more labels, never for none."""
    host = normalise_host(host)
    patterns = []
    if 0 < len(host) <= _MAX_HOST:
        patterns.append(host)
        dot = host.find(b".", 1)
        while dot != -1:
            patterns.append(b"*" + host[dot:])
            dot = host.find(b".", dot + 1)
    return (*patterns, b"*")


def _order(match: CompiledMatch) -> Order:
    return match.order


class _HostRoutes:
    """The matches under one hostname of a listener; every list is kept in order of precedence."""

    __slots__ = ("exact", "longest", "prefix", "regex")

    def __init__(self) -> None:
        self.exact: dict[bytes, list[CompiledMatch]] = {}
        self.prefix: dict[bytes, list[CompiledMatch]] = {}
        self.regex: list[CompiledMatch] = []
        # No prefix is longer; it may have been, which costs a few look-ups at most.
        self.longest = 0

    def find(self, view: RequestView) -> RouteMatchResult | None:
        path = view.head.path
        for match in self.exact.get(path, ()):
            if rest_holds(match, view):
                return match.result
        for match in self.regex:
            if match.regex is not None and match.regex.matches(path) and rest_holds(match, view):
                return match.result
        prefix = self.prefix
        if not prefix:
            return None
        # Whole segments only, from the longest; what no prefix can reach is not looked at, so that
        # a path of thousands of segments costs no more than the longest prefix has.
        end = len(path) if len(path) <= self.longest else path.rfind(b"/", 0, self.longest + 1)
        while end >= 0:
            for match in prefix.get(path[:end], ()):
                if rest_holds(match, view):
                    return match.result
            end = path.rfind(b"/", 0, end)
        return None

    def add(self, match: CompiledMatch) -> None:
        matches = self._list_of(match)
        matches.insert(bisect_left(matches, match.order, key=_order), match)
        if match.path_type == "PathPrefix":
            self.longest = max(self.longest, len(match.path))

    def discard(self, match: CompiledMatch) -> None:
        matches = self._list_of(match)
        del matches[bisect_left(matches, match.order, key=_order)]
        if not matches and match.path_type != "RegularExpression":
            del (self.exact if match.path_type == "Exact" else self.prefix)[match.path]

    def matches(self) -> Iterator[CompiledMatch]:
        """All, in no order."""
        for matches in (*self.exact.values(), self.regex, *self.prefix.values()):
            yield from matches

    @property
    def empty(self) -> bool:
        return not (self.exact or self.prefix or self.regex)

    def _list_of(self, match: CompiledMatch) -> list[CompiledMatch]:
        if match.path_type == "RegularExpression":
            return self.regex
        paths = self.exact if match.path_type == "Exact" else self.prefix
        return paths.setdefault(match.path, [])


class RouteIndex:
    """All routes in force, by listener."""

    def __init__(self) -> None:
        self._routes: dict[SectionKey, CompiledRoute] = {}
        self._listeners: dict[str, dict[bytes, _HostRoutes]] = {}

    def put(self, key: SectionKey, section: RouteSection) -> None:
        """Put a route in force in place of its former value. Refused: nothing has changed."""
        route = compile_route(key, section)
        self.remove(key)
        self._routes[key] = route
        for listener, host in route.places:
            hosts = self._listeners.setdefault(listener, {})
            routes = hosts.get(host)
            if routes is None:
                routes = hosts[host] = _HostRoutes()
            for match in route.matches:
                routes.add(match)

    def remove(self, key: SectionKey) -> None:
        """Take a route out; unknown keys are ignored."""
        route = self._routes.pop(key, None)
        if route is None:
            return
        for listener, host in route.places:
            hosts = self._listeners[listener]
            routes = hosts[host]
            for match in route.matches:
                routes.discard(match)
            if routes.empty:
                del hosts[host]
                if not hosts:
                    del self._listeners[listener]

    def routes(self) -> Iterator[CompiledRoute]:
        """The routes in force, in the order of their keys."""
        return (self._routes[key] for key in sorted(self._routes))

    def placed(self, listener: str) -> Iterator[tuple[bytes, CompiledMatch]]:
        """What stands on a listener, under which host pattern."""
        for pattern, routes in self._listeners.get(listener, {}).items():
            for match in routes.matches():
                yield pattern, match

    def match(self, listener: str, head: RequestHead) -> RouteMatchResult | None:
        """The rule for a request on a listener (its id); None: 404."""
        hosts = self._listeners.get(listener)
        if hosts is None:
            return None
        view = RequestView(head)
        for pattern in host_patterns(head.host):
            routes = hosts.get(pattern)
            if routes is not None and (found := routes.find(view)) is not None:
                return found
        return None


class PortIndex:
    """The listeners of a port by hostname."""

    def __init__(self, section: PortSection) -> None:
        self._listeners: dict[bytes, Listener] = {}
        for listener in section.listeners:
            pattern = normalise_host((listener.hostname or "*").encode())
            self._listeners.setdefault(pattern, listener)

    def select(self, host: bytes, sni: str | None) -> Listener | None:
        """The most specific listener for a request's host (without port), so that only its routes
        apply. A request without Host (HTTP/1.0) goes to the listener of the connection's SNI."""
        return self._select(host or (sni or "").encode())

    def misdirected(self, sni: str | None, host: bytes) -> bool:
        """Whether a request on a TLS connection must get 421 (Gateway API Listener.hostname).

        So it is where the host belongs to another listener than the one that the SNI selected. A
        host that belongs to none gets 404. Without SNI the connection is the listener's without a
        hostname.
        """
        if not host:
            return False
        wanted = self._select(host)
        return wanted is not None and wanted is not self._select((sni or "").encode())

    def _select(self, host: bytes) -> Listener | None:
        for pattern in host_patterns(host):
            if (listener := self._listeners.get(pattern)) is not None:
                return listener
        return None


def pick_backend(rule: CompiledRule, random: Callable[[], float]) -> CompiledBackend | None:
    """A backend by weight; `random` is uniform in [0, 1). None: no backend has weight, and the
    request gets 500, as it does for one whose `cluster` is None (HTTPRouteRule.backendRefs)."""
    at = random() * rule.total_weight
    for backend in rule.backends:
        if at < backend.weight:
            return backend
        at -= backend.weight
    return None
