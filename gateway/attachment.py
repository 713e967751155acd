"""Which routes attach to which listeners (ParentReference, AllowedRoutes, hostnames), and what
becomes of a route: its section, its status, and what it uses.

The reasons are those of the specification's RouteConditionReason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gateway.conditions import Problem, condition, make, problem_text
from gateway.grants import namespace_matches
from gateway.hostnames import intersection
from gateway.keys import ClusterRef, RouteKey
from gateway.listeners import Door, Doors
from gateway.routes import Translation
from mesh.model.derive import View
from mesh.model.grpcroute import GRPCRoute
from mesh.model.httproute import HTTPRoute
from mesh.model.meta import Condition, ObjectKey
from mesh.model.nodeconfig import Attachment, RouteSection, route_key
from mesh.model.references import GROUP, ParentReference, RouteParentStatus, RouteStatus


class Parent(NamedTuple):
    """One parentRef that is ours to answer. `problem`: why the route is not accepted there;
    `gateway`: the Gateway behind it."""

    ref: ParentReference
    gateway: ObjectKey | None
    attachments: tuple[Attachment, ...]
    problem: Problem | None


class Attached(NamedTuple):
    """The parents of a route that are ours to answer."""

    parents: tuple[Parent, ...]


def parents(view: View, key: RouteKey) -> Attached | None:
    """None: no parent of the route is ours."""
    route: HTTPRoute | GRPCRoute = view.get("Route", key)
    found = [_parent(view, key, route, ref) for ref in route.spec.parent_refs]
    ours = tuple(parent for parent in found if parent is not None)
    return Attached(ours) if ours else None


def _parent(
    view: View, key: RouteKey, route: HTTPRoute | GRPCRoute, ref: ParentReference
) -> Parent | None:
    target = ObjectKey(ref.namespace or key.namespace, ref.name)
    if (ref.group, ref.kind) == ("", "Service"):
        message = f"parentRef to Service {target}: mesh routing is not supported yet; use a Gateway"
        return Parent(ref, None, (), Problem("UnsupportedValue", message))
    if ref.group != GROUP or ref.kind not in ("Gateway", "ListenerSet"):
        return None
    table = "gateway_doors" if ref.kind == "Gateway" else "set_doors"
    parent: Doors | None = view.get(table, target)
    if parent is None:
        if view.get(ref.kind, target) is not None:
            return None
        message = f"{ref.kind} {target} does not exist"
        return Parent(ref, None, (), Problem("NoMatchingParent", message))
    attachments, problem = _attach(view, key, route, ref, parent)
    return Parent(ref, parent.gateway, attachments, parent.problem or problem)


def _attach(
    view: View,
    key: RouteKey,
    route: HTTPRoute | GRPCRoute,
    ref: ParentReference,
    parent: Doors,
) -> tuple[tuple[Attachment, ...], Problem | None]:
    selected = [
        door
        for door in parent.doors
        if ref.section_name in (None, door.name) and ref.port in (None, door.port)
    ]
    if not selected:
        wish = " ".join(
            f"{what} {value}"
            for what, value in (("named", ref.section_name), ("on port", ref.port))
            if value is not None
        )
        has = ", ".join(f"{door.name} ({door.port})" for door in parent.doors)
        message = f"{ref.kind} {ref.name} has no listener {wish} (it has {has})"
        return (), Problem("NoMatchingParent", message)
    allowed = [door for door in selected if _allows(view, door, key)]
    if not allowed:
        return (), Problem("NotAllowedByListeners", _not_allowed(selected, key))
    attachments = tuple(
        Attachment(door.id, hostnames)
        for door in allowed
        if (hostnames := intersection(door.hostname, route.spec.hostnames))
    )
    if not attachments:
        theirs = ", ".join(sorted({door.hostname or "*" for door in allowed}))
        message = (
            f"no hostname of the route ({', '.join(route.spec.hostnames)}) is within those of the"
            f" listeners ({theirs})"
        )
        return (), Problem("NoMatchingListenerHostname", message)
    return attachments, None


def _allows(view: View, door: Door, key: RouteKey) -> bool:
    return key.kind in door.kinds and namespace_matches(
        view, door.source, door.selector, door.namespace, key.namespace
    )


def _not_allowed(selected: list[Door], key: RouteKey) -> str:
    door = selected[0]
    if key.kind not in door.kinds:
        return f"listener {door.name} allows no {key.kind}"
    return (
        f"listener {door.name} allows no routes of namespace {key.namespace}"
        f" (allowedRoutes.namespaces.from is {door.source})"
    )


class Route(NamedTuple):
    """A route joined with its rules. `section` None: nothing of it is served."""

    section: RouteSection | None
    listeners: frozenset[str]
    gateways: frozenset[ObjectKey]
    clusters: frozenset[ClusterRef]


def routes(view: View, key: RouteKey) -> Route:
    attached: Attached = view.get("parents", key)
    translation: Translation = view.get("translations", key)
    if _all_refused(translation):
        return Route(None, frozenset(), frozenset(), frozenset())
    accepted = [parent for parent in attached.parents if parent.problem is None]
    hostnames: dict[str, dict[str, None]] = {}
    for parent in accepted:
        for attachment in parent.attachments:
            hostnames.setdefault(attachment.listener, {}).update(
                dict.fromkeys(attachment.hostnames)
            )
    if not hostnames:
        return Route(None, frozenset(), frozenset(), frozenset())
    route: HTTPRoute | GRPCRoute = view.get("Route", key)
    section = RouteSection(
        kind=key.kind,
        namespace=key.namespace,
        name=key.name,
        created=route.metadata.creation_timestamp or "",
        attachments=tuple(Attachment(id, tuple(names)) for id, names in sorted(hostnames.items())),
        rules=translation.rules,
    )
    gateways = frozenset(parent.gateway for parent in accepted if parent.gateway is not None)
    # A refused section keeps its last good version, but the route does not count as attached.
    refused = view.get("refusals", route_key(*key)) is not None
    listeners = frozenset[str]() if refused else frozenset(hostnames)
    return Route(section, listeners, gateways, translation.clusters)


def sections(view: View, key: RouteKey) -> RouteSection | None:
    route: Route = view.get("routes", key)
    return route.section


def route_listeners(key: RouteKey, route: Route) -> frozenset[str]:
    """The listeners a route is attached to (for an index)."""
    return route.listeners


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


def route_status(controller_name: str) -> Callable[[View, RouteKey], RouteStatus]:
    def compute(view: View, key: RouteKey) -> RouteStatus:
        attached: Attached = view.get("parents", key)
        translation: Translation = view.get("translations", key)
        generation = view.get("Route", key).metadata.generation
        shared = _shared(view, key, translation, generation)
        refused: Problem | None = None
        if _all_refused(translation):
            problems = [problem for _, problem in translation.refused]
            refused = Problem(problems[0].reason, problem_text(problems))
        elif reason := view.get("refusals", route_key(*key)):
            refused = Problem("UnsupportedValue", f"the data plane refused this route: {reason}")
        return RouteStatus(
            parents=tuple(
                RouteParentStatus(
                    parent_ref=parent.ref,
                    controller_name=controller_name,
                    conditions=(
                        condition("Accepted", generation, parent.problem or refused),
                        *shared,
                    ),
                )
                for parent in attached.parents
            )
        )

    return compute


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
