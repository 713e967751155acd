"""Listeners of a Gateway and its ListenerSets: the merged list, its conflicts, and what routes see.

Precedence (ListenerSet.spec.listeners): the Gateway's own listeners, then ListenerSets by age, then
by namespace and name. Knows no addresses and no TLS material.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gateway.classes import Ours
from gateway.conditions import Problem
from gateway.grants import namespace_matches
from gateway.keys import ROUTE_KINDS, ParentKey
from mesh.model.derive import View
from mesh.model.gateway import Gateway, Listener
from mesh.model.listenerset import ListenerEntry, ListenerSet
from mesh.model.meta import LabelSelector, ObjectKey
from mesh.model.references import GROUP

PROTOCOLS = ("HTTP", "HTTPS")


class SetParent(NamedTuple):
    """The Gateway of a ListenerSet. `problem`: why the set is not part of it."""

    gateway: ObjectKey
    problem: Problem | None


class Merged(NamedTuple):
    """A listener in the merged list. `problem`: its configuration is not supported; `conflict`:
    another listener has its place."""

    owner: ParentKey
    spec: Listener | ListenerEntry
    kinds: tuple[str, ...]
    bad_kinds: tuple[str, ...]
    problem: Problem | None
    conflict: Problem | None

    @property
    def id(self) -> str:
        return self.owner.listener(self.spec.name)


class Door(NamedTuple):
    """A listener as routes see it: what they may be to attach to it."""

    id: str
    name: str
    port: int
    hostname: str | None
    kinds: tuple[str, ...]
    namespace: str
    source: str
    selector: LabelSelector | None


class Doors(NamedTuple):
    """The listeners that routes reach through one parent, and the Gateway they belong to.
    `problem`: why none of them can be attached to."""

    gateway: ObjectKey
    doors: tuple[Door, ...]
    problem: Problem | None


def set_parents(view: View, key: ObjectKey) -> SetParent | None:
    listener_set: ListenerSet = view.get("ListenerSet", key)
    ref = listener_set.spec.parent_ref
    if ref.kind != "Gateway" or ref.group != GROUP:
        return None
    gateway_key = ObjectKey(ref.namespace or key.namespace, ref.name)
    ours: Ours | None = view.get("gateways", gateway_key)
    if ours is None:
        if view.get("Gateway", gateway_key) is not None:
            return None
        missing = Problem("ParentNotAccepted", f"Gateway {gateway_key} does not exist")
        return SetParent(gateway_key, missing)
    allowed = ours.gateway.spec.allowed_listeners
    source, selector = "None", None
    if allowed is not None:
        source, selector = allowed.namespaces.from_, allowed.namespaces.selector
    if namespace_matches(view, source, selector, gateway_key.namespace, key.namespace):
        return SetParent(gateway_key, None)
    message = (
        f"Gateway {gateway_key} allows no ListenerSets of namespace {key.namespace}"
        f" (spec.allowedListeners.namespaces.from is {source})"
    )
    return SetParent(gateway_key, Problem("NotAllowed", message))


def set_gateway(key: ObjectKey, parent: SetParent) -> Iterator[ObjectKey]:
    """The Gateway that a ListenerSet is part of (for an index)."""
    if parent.problem is None:
        yield parent.gateway


def merged(view: View, key: ObjectKey) -> tuple[Merged, ...]:
    """The listeners of a Gateway in precedence order. In the Gateway, or within one ListenerSet, no
    listener comes before another: of those that conflict, none is served."""
    gateway: Gateway = view.get("gateways", key).gateway
    owners: list[tuple[ParentKey, Sequence[Listener | ListenerEntry]]] = [
        (ParentKey("Gateway", *key), gateway.spec.listeners)
    ]
    sets = [(view.get("ListenerSet", k), k) for k in view.bucket("sets_of", key)]
    for listener_set, set_key in sorted(
        sets, key=lambda found: (found[0].metadata.creation_timestamp or "", found[1])
    ):
        owners.append((ParentKey("ListenerSet", *set_key), listener_set.spec.listeners))
    result: list[Merged] = []
    for owner, specs in owners:
        own = [_classify(owner, spec) for spec in specs]
        result += [
            one._replace(
                conflict=_conflict(one, result)
                or _conflict(one, [other for other in own if other is not one])
            )
            for one in own
        ]
    return tuple(result)


def _classify(owner: ParentKey, spec: Listener | ListenerEntry) -> Merged:
    if spec.protocol not in PROTOCOLS:
        message = f"protocol {spec.protocol} is not supported; use HTTP or HTTPS"
        return Merged(owner, spec, (), (), Problem("UnsupportedProtocol", message), None)
    problem = None
    if spec.protocol == "HTTPS" and spec.tls is not None and spec.tls.options:
        names = ", ".join(sorted(spec.tls.options))
        problem = Problem("UnsupportedValue", f"tls.options: {names} not supported")
    asked = spec.allowed_routes.kinds
    kinds = tuple(kind.kind for kind in asked if kind.group == GROUP and kind.kind in ROUTE_KINDS)
    bad = tuple(kind.kind for kind in asked if kind.group != GROUP or kind.kind not in ROUTE_KINDS)
    return Merged(owner, spec, kinds if asked else ROUTE_KINDS, bad, problem, None)


def _conflict(one: Merged, others: list[Merged]) -> Problem | None:
    """Does a listener claim a place that one of the others has? A port has one protocol, and a
    hostname stands once on it."""
    if one.problem is not None:
        return None
    for other in others:
        if other.problem or other.conflict or other.spec.port != one.spec.port:
            continue
        where = f"listener {other.spec.name} of {other.owner}"
        if other.spec.protocol != one.spec.protocol:
            message = f"{where} has port {one.spec.port} with protocol {other.spec.protocol}"
            return Problem("ProtocolConflict", message)
        if (other.spec.hostname or "").lower() == (one.spec.hostname or "").lower():
            host = f"hostname {one.spec.hostname}" if one.spec.hostname else "every hostname"
            return Problem("HostnameConflict", f"{where} has {host} on port {one.spec.port}")
    return None


def gateway_doors(view: View, key: ObjectKey) -> Doors:
    ours: Ours = view.get("gateways", key)
    owner = ParentKey("Gateway", *key)
    doors = tuple(_door(owner, spec) for spec in ours.gateway.spec.listeners)
    return Doors(key, doors, _closed(key, ours))


def _closed(key: ObjectKey, ours: Ours) -> Problem | None:
    """A Gateway that is not accepted serves nothing, and its routes say so."""
    if ours.problem is None:
        return None
    return Problem("Pending", f"Gateway {key} is not accepted; see its status")


def set_doors(view: View, key: ObjectKey) -> Doors:
    parent: SetParent = view.get("set_parents", key)
    listener_set: ListenerSet = view.get("ListenerSet", key)
    owner = ParentKey("ListenerSet", *key)
    doors = tuple(_door(owner, spec) for spec in listener_set.spec.listeners)
    problem: Problem | None
    if parent.problem is not None:
        message = f"ListenerSet {key} is not accepted: {parent.problem.message}"
        problem = Problem("NotAllowedByListeners", message)
    else:
        problem = _closed(parent.gateway, view.get("gateways", parent.gateway))
    return Doors(parent.gateway, doors, problem)


def _door(owner: ParentKey, spec: Listener | ListenerEntry) -> Door:
    listener = _classify(owner, spec)
    allowed = spec.allowed_routes.namespaces
    return Door(
        listener.id,
        spec.name,
        spec.port,
        spec.hostname,
        listener.kinds,
        owner.namespace,
        allowed.from_,
        allowed.selector,
    )
