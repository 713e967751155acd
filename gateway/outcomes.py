"""What becomes of a route once its parents and its rules are known: its section, its status, and
what it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gateway import services
from gateway.annotations import client_headers, misused
from gateway.attachment import Attached, Parent
from gateway.conditions import Problem, condition, make, problem_text
from gateway.keys import ClusterRef, MeshListener, RouteKey, mesh_listener
from gateway.mixed import Candidate
from gateway.node import Mesh
from gateway.routes import Translation
from mesh.model.derive import View
from mesh.model.grpcroute import GRPCRoute
from mesh.model.httproute import HTTPRoute
from mesh.model.meta import Condition, ObjectKey
from mesh.model.references import RouteParentStatus, RouteStatus
from mesh.model.routeconfig import Attachment, RouteSection
from mesh.model.section import route_key


class Route(NamedTuple):
    """A route that is served. `listeners`: those it counts as attached to; `gateways` and
    `clusters`: between which it leads."""

    section: RouteSection
    listeners: frozenset[str]
    gateways: frozenset[ObjectKey]
    clusters: frozenset[ClusterRef]


def candidates(view: View, key: RouteKey) -> Candidate | None:
    """Where a route would serve what, if no listener rejected it; None: nowhere."""
    if _all_refused(view.get("translations", key)):
        return None
    hostnames = _hostnames(view.get("parents", key))
    if not hostnames:
        return None
    return Candidate(view.get("Route", key).metadata.creation_timestamp or "", hostnames)


def _hostnames(attached: Attached) -> dict[str, tuple[str, ...]]:
    """By listener, over all parents that accept the route. Several may name one listener; the
    hostnames are the same each time."""
    return {
        attachment.listener: attachment.hostnames
        for parent in attached.parents
        if parent.problem is None
        for attachment in parent.attachments
    }


def routes(view: View, key: RouteKey) -> Route | None:
    attached: Attached = view.get("attached", key)
    translation: Translation = view.get("translations", key)
    hostnames = _hostnames(attached)
    if not hostnames:
        return None
    route: HTTPRoute | GRPCRoute = view.get("Route", key)
    section = RouteSection(
        kind=key.kind,
        namespace=key.namespace,
        name=key.name,
        created=route.metadata.creation_timestamp or "",
        attachments=tuple(Attachment(id, names) for id, names in sorted(hostnames.items())),
        rules=translation.rules,
        client_headers=client_headers(route),
    )
    gateways = frozenset(
        parent.gateway
        for parent in attached.parents
        if parent.problem is None and parent.gateway is not None
    )
    # What the data plane refuses keeps its last good version; what is refused here stays to answer
    # 500, lest another route's wider rule serve its requests. Neither counts as attached.
    refused = _all_refused(translation) or view.get("refusals", route_key(*key)) is not None
    listeners = frozenset[str]() if refused else frozenset(hostnames)
    return Route(section, listeners, gateways, translation.clusters)


def sections(view: View, key: RouteKey) -> RouteSection:
    route: Route = view.get("routes", key)
    return route.section


def route_listeners(key: RouteKey, route: Route) -> frozenset[str]:
    """The listeners a route is attached to (for an index)."""
    return route.listeners


def mesh_listeners(key: RouteKey, route: Route) -> Iterator[MeshListener]:
    """The Service ports that a route stands at, to answer 500 if it must (for an index)."""
    for attachment in route.section.attachments:
        if (listener := mesh_listener(attachment.listener)) is not None:
            yield listener


def route_clusters(key: RouteKey, route: Route) -> frozenset[ClusterRef]:
    """The clusters a route uses (for an index)."""
    return route.clusters


def service_gateways(key: RouteKey, route: Route) -> Iterator[tuple[ObjectKey, ObjectKey]]:
    """Service and Gateway, where a route leads from one to the other (for an index)."""
    for service in {cluster.service for cluster in route.clusters}:
        for gateway in route.gateways:
            yield service, gateway


def _all_refused(translation: Translation) -> bool:
    return len({number for number, _ in translation.refused}) == len(translation.rules)


def route_status(controller_name: str, mesh: Mesh) -> Callable[[View, RouteKey], RouteStatus]:
    def compute(view: View, key: RouteKey) -> RouteStatus:
        attached: Attached = view.get("attached", key)
        translation: Translation = view.get("translations", key)
        route: HTTPRoute | GRPCRoute = view.get("Route", key)
        generation = route.metadata.generation
        shared = _shared(view, key, translation, generation)
        refused: Problem | None = None
        if _all_refused(translation):
            problems = [problem for _, problem in translation.refused]
            text = f"{problem_text(problems)}; until that is mended, its requests get 500"
            refused = Problem(problems[0].reason, text)
        elif reason := view.get("refusals", route_key(*key)):
            refused = Problem("UnsupportedValue", f"the data plane refused this route: {reason}")
        return RouteStatus(
            parents=tuple(
                RouteParentStatus(
                    parent_ref=parent.ref,
                    controller_name=controller_name,
                    conditions=(_accepted(view, mesh, route, parent, refused), *shared),
                )
                for parent in attached.parents
            )
        )

    return compute


def _accepted(
    view: View,
    mesh: Mesh,
    route: HTTPRoute | GRPCRoute,
    parent: Parent,
    refused: Problem | None,
) -> Condition:
    generation = route.metadata.generation
    problem = parent.problem or refused
    if problem is None and parent.ref.kind == "Service":
        trouble = services.trouble(view, mesh, parent.attachments)
        if trouble is not None and trouble.pending:
            return make("Accepted", "Unknown", *trouble.problem, generation)
        problem = trouble.problem if trouble is not None else None
        if problem is None:
            remarks = list(misused(route))
            if route.spec.hostnames:
                remarks.append("spec.hostnames does not count for requests to a Service")
            message = "; ".join(remarks)
            return make("Accepted", "True", "Accepted", message, generation)
    return condition("Accepted", generation, problem)


def _shared(
    view: View, key: RouteKey, translation: Translation, generation: int | None
) -> tuple[Condition, ...]:
    """The conditions that are the same for every parent."""
    unresolved = list(translation.unresolved)
    for cluster in sorted(translation.clusters):
        if reason := view.get("refusals", cluster.section):
            message = f"the data plane refused Service {cluster.service}: {reason}"
            unresolved.append(Problem("UnsupportedValue", message))
    problem = Problem(unresolved[0].reason, problem_text(unresolved)) if unresolved else None
    resolved = condition("ResolvedRefs", generation, problem)
    if not translation.refused or _all_refused(translation):
        return (resolved,)
    numbers = ", ".join(str(number) for number in sorted({n for n, _ in translation.refused}))
    text = problem_text([problem for _, problem in translation.refused])
    message = f"Dropped Rule(s) {numbers}: requests that match them get 500. {text}"
    reason = translation.refused[0][1].reason
    return resolved, make("PartiallyInvalid", "True", reason, message, generation)
