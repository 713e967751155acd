"""Which routes attach to which listeners: ParentReferences, AllowedRoutes, hostnames.

The reasons are those of the specification's RouteConditionReason. Knows no rules and no backends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gateway import mixed, services
from gateway.conditions import Problem
from gateway.grants import namespace_matches
from gateway.hostnames import intersection
from gateway.keys import RouteKey
from gateway.listeners import Door, Doors
from gateway.node import Mesh
from mesh.model.derive import View
from mesh.model.grpcroute import GRPCRoute
from mesh.model.httproute import HTTPRoute
from mesh.model.meta import ObjectKey
from mesh.model.references import GROUP, ParentReference
from mesh.model.routeconfig import Attachment


class Parent(NamedTuple):
    """One parentRef that is ours to answer. `problem`: why the route is not accepted there;
    `gateway`: the Gateway behind it, None for a Service."""

    ref: ParentReference
    gateway: ObjectKey | None
    attachments: tuple[Attachment, ...]
    problem: Problem | None


class Attached(NamedTuple):
    """The parents of a route that are ours to answer."""

    parents: tuple[Parent, ...]


def parents(mesh: Mesh) -> Callable[[View, RouteKey], Attached | None]:
    def compute(view: View, key: RouteKey) -> Attached | None:
        """None: no parent of the route is ours."""
        route: HTTPRoute | GRPCRoute = view.get("Route", key)
        refs = list(route.spec.parent_refs)
        if route.spec.use_default_gateways == "All":
            named = {(ref.kind, ref.namespace or key.namespace, ref.name) for ref in refs}
            refs += [
                ParentReference(namespace=gateway.namespace, name=gateway.name)
                for gateway in sorted(view.bucket("default_gateways", "All"))
                if ("Gateway", *gateway) not in named
            ]
        found = [_parent(view, mesh, key, route, ref) for ref in refs]
        ours = tuple(parent for parent in found if parent is not None)
        return Attached(ours) if ours else None

    return compute


def _parent(
    view: View, mesh: Mesh, key: RouteKey, route: HTTPRoute | GRPCRoute, ref: ParentReference
) -> Parent | None:
    target = ObjectKey(ref.namespace or key.namespace, ref.name)
    if (ref.group, ref.kind) == ("", "Service"):
        return Parent(ref, None, *services.attach(view, mesh, key.namespace, ref, target))
    if ref.group != GROUP or ref.kind not in ("Gateway", "ListenerSet"):
        return None
    table = "gateway_doors" if ref.kind == "Gateway" else "set_doors"
    parent: Doors | None = view.get(table, target)
    if parent is None:
        if view.get(ref.kind, target) is not None:
            return None
        message = f"{ref.kind} {target} does not exist"
        return Parent(ref, None, (), Problem("NoMatchingParent", message))
    attachments, problem = _attach(view, key, route, ref, target, parent)
    return Parent(ref, parent.gateway, attachments, parent.problem or problem)


def _attach(
    view: View,
    key: RouteKey,
    route: HTTPRoute | GRPCRoute,
    ref: ParentReference,
    target: ObjectKey,
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
        message = f"{ref.kind} {target} has no listener {wish} (it has {has})"
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


def attached(view: View, key: RouteKey) -> Attached:
    """The parents, less what listeners reject for a route of the other kind (gateway.mixed)."""
    found: Attached = view.get("parents", key)
    return Attached(tuple(_less_rejected(view, key, parent) for parent in found.parents))


def _less_rejected(view: View, key: RouteKey, parent: Parent) -> Parent:
    left: list[Attachment] = []
    lost: RouteKey | None = None
    for attachment in parent.attachments:
        winner = mixed.winner(view, attachment.listener, key)
        lost = lost or winner
        if winner is None:
            left.append(attachment)
    if lost is None:
        return parent
    if left:
        return parent._replace(attachments=tuple(left))
    name = f"{lost.kind} {lost.namespace}/{lost.name}"
    if parent.ref.kind == "Service":
        message = f"{name} is attached to this Service port, and GRPCRoutes come before HTTPRoutes"
    else:
        message = (
            f"{name} has its hostname on this listener and is older;"
            " HTTPRoutes and GRPCRoutes cannot share one"
        )
    return parent._replace(attachments=(), problem=Problem("Conflicted", message))
