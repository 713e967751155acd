"""HTTPRoutes and GRPCRoutes on one listener: where their hostnames intersect, exactly one of two is
accepted, the older, then the first by name (HTTPRouteSpec and GRPCRouteSpec.hostnames). On a
Service port, where hostnames do not count, it is the GRPCRoute (GEP-1426, Route types).

Costs a listener without GRPCRoutes nothing, and others only where hostnames intersect.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from gateway.hostnames import covers
from gateway.keys import RouteKey, mesh_listener
from mesh.model.derive import View

Place: TypeAlias = tuple[str, str]  # listener, hostname


class Candidate(NamedTuple):
    """A route that would be attached: by listener, the hostnames it would serve."""

    created: str
    listeners: dict[str, tuple[str, ...]]


class Rejection(NamedTuple):
    route: RouteKey
    winner: RouteKey


def grpc_listeners(key: RouteKey, candidate: Candidate) -> Iterator[str]:
    """The listeners that a GRPCRoute would be attached to (for an index)."""
    if key.kind == "GRPCRoute":
        yield from candidate.listeners


def http_at(key: RouteKey, candidate: Candidate) -> Iterator[Place]:
    """Where an HTTPRoute stands (for an index)."""
    if key.kind == "HTTPRoute":
        for listener, hostnames in candidate.listeners.items():
            for hostname in hostnames:
                yield listener, hostname


def http_under(key: RouteKey, candidate: Candidate) -> Iterator[Place]:
    """The wider hostnames above those of an HTTPRoute (for an index)."""
    for listener, hostname in http_at(key, candidate):
        for wider in _wider(hostname):
            yield listener, wider


def _wider(hostname: str) -> Iterator[str]:
    """Every hostname that covers this one, itself left out."""
    if hostname == "*":
        return
    yield "*"
    labels = hostname.removeprefix("*.").split(".")
    for start in range(0 if hostname.startswith("*.") else 1, len(labels)):
        wider = "*." + ".".join(labels[start:])
        if wider != hostname:
            yield wider


def mixed(view: View, listener: str) -> frozenset[Rejection]:
    """The routes that a listener rejects."""
    keys: set[RouteKey] = set(view.bucket("grpc_listeners", listener))
    for key in tuple(keys):
        for hostname in view.get("candidates", key).listeners[listener]:
            keys |= view.bucket("http_at", (listener, hostname))
            keys |= view.bucket("http_under", (listener, hostname))
            for wider in _wider(hostname):
                keys |= view.bucket("http_at", (listener, wider))
    found: list[tuple[RouteKey, Candidate]] = [(key, view.get("candidates", key)) for key in keys]
    found.sort(key=lambda one: (one[1].created, one[0].namespace, one[0].name, one[0].kind))
    if mesh_listener(listener) is not None:
        found.sort(key=lambda one: one[0].kind != "GRPCRoute")
    accepted: list[tuple[RouteKey, tuple[str, ...]]] = []
    rejections: set[Rejection] = set()
    for key, candidate in found:
        mine = candidate.listeners[listener]
        winner = next(
            (other for other, theirs in accepted if other.kind != key.kind and _meet(mine, theirs)),
            None,
        )
        if winner is None:
            accepted.append((key, mine))
        else:
            rejections.add(Rejection(key, winner))
    return frozenset(rejections)


def rejected(listener: str, rejections: frozenset[Rejection]) -> Iterator[tuple[str, RouteKey]]:
    """Listener and route, where one rejects the other (for an index)."""
    for rejection in rejections:
        yield listener, rejection.route


def winner(view: View, listener: str, key: RouteKey) -> RouteKey | None:
    """The route of the other kind for which a listener rejects this one."""
    if not view.bucket("rejected", (listener, key)):
        return None
    rejections: frozenset[Rejection] = view.get("mixed", listener)
    return next(rejection.winner for rejection in rejections if rejection.route == key)


def _meet(some: tuple[str, ...], others: tuple[str, ...]) -> bool:
    return any(covers(a, b) or covers(b, a) for a in some for b in others)
