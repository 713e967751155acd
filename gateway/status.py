"""Statuses of GatewayClasses, Gateways and ListenerSets, from the derived states and from what the
data plane says: ports that are bound or not ("binds"), sections it refused ("refusals").

Nothing is Programmed that the data plane has not taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import msgspec

from gateway.classes import OurClass, Ours
from gateway.conditions import Problem, condition, make, problem_text
from gateway.features import supported
from gateway.keys import ParentKey, PortKey
from gateway.listeners import SetParent
from gateway.node import Mesh
from gateway.places import Places
from gateway.states import GatewayState, ListenerState
from mesh.model.derive import View
from mesh.model.gateway import Gateway, GatewayStatus, ListenerStatus
from mesh.model.gatewayclass import GatewayClassStatus, SupportedFeature
from mesh.model.listenerset import ListenerEntryStatus, ListenerSet, ListenerSetStatus
from mesh.model.meta import Condition, ObjectKey
from mesh.model.references import GROUP, RouteGroupKind
from mesh.model.section import port_key

Status = TypeVar("Status", bound=msgspec.Struct)
AnyListenerStatus = TypeVar("AnyListenerStatus", ListenerStatus, ListenerEntryStatus)


class Programmed(NamedTuple):
    """Whether the data plane serves something. Neither a problem nor pending: it does."""

    problem: Problem | None = None
    pending: str = ""

    def condition(self, generation: int | None) -> Condition:
        if self.problem is None and self.pending:
            return make("Programmed", "Unknown", "Pending", self.pending, generation)
        return condition("Programmed", generation, self.problem)

    @property
    def ok(self) -> bool:
        return self.problem is None and not self.pending


# --- GatewayClass --------------------------------------------------------------------------------


def class_status(mesh: Mesh) -> Callable[[View, ObjectKey], GatewayClassStatus]:
    features = tuple(SupportedFeature(name=name) for name in supported(mesh.on))

    def compute(view: View, key: ObjectKey) -> GatewayClassStatus:
        ours: OurClass = view.get("classes", key)
        generation = view.get("GatewayClass", key).metadata.generation
        return GatewayClassStatus(
            conditions=(
                condition("Accepted", generation, ours.problem),
                condition("SupportedVersion", generation),
            ),
            supported_features=features,
        )

    return compute


# --- listeners -----------------------------------------------------------------------------------


def _programmed(view: View, one: ListenerState) -> Programmed:
    if one.conflict is not None:
        return Programmed(one.conflict)
    if one.accepted is not None:
        return Programmed(Problem("Invalid", one.accepted.message))
    if not one.served:
        # Without a problem of its own, the Gateway has no address for it.
        text = one.resolved.message if one.resolved else "the Gateway has no address to listen on"
        return Programmed(Problem("Invalid", text))
    waiting: list[PortKey] = []
    for port in one.ports:
        if refusal := view.get("refusals", port_key(*port)):
            message = f"the data plane refused port {port[1]} on {port[0]}: {refusal}"
            return Programmed(Problem("Invalid", message))
        bound: str | None = view.get("binds", port)
        if bound is None:
            waiting.append(port)
        elif bound:
            # Why, and what to do, is the supervisor's to say.
            message = f"cannot listen on port {port[1]} of {port[0]}: {bound}"
            return Programmed(Problem("PortUnavailable", message))
    for certificate in one.certificates:
        if refusal := view.get("refusals", certificate):
            message = f"the data plane refused {certificate}: {refusal}"
            return Programmed(Problem("Invalid", message))
    if waiting:
        places = ", ".join(f"{address}:{port}" for address, port in waiting)
        return Programmed(pending=f"waiting for {places} to be bound")
    return Programmed()


def _listener(
    status: type[AnyListenerStatus],
    view: View,
    one: ListenerState,
    programmed: Programmed,
    generation: int | None,
) -> AnyListenerStatus:
    conflict = one.conflict
    return status(
        name=one.name,
        supported_kinds=tuple(RouteGroupKind(group=GROUP, kind=kind) for kind in one.kinds),
        attached_routes=len(view.bucket("routes_on", one.id)),
        conditions=(
            condition("Accepted", generation, one.accepted),
            programmed.condition(generation),
            condition("ResolvedRefs", generation, one.resolved),
            make("Conflicted", "True", conflict.reason, conflict.message, generation)
            if conflict is not None
            else make("Conflicted", "False", "NoConflicts", "", generation),
        ),
    )


# --- Gateway -------------------------------------------------------------------------------------


def gateway_status(view: View, key: ObjectKey) -> GatewayStatus:
    ours: Ours = view.get("gateways", key)
    state: GatewayState = view.get("states", key)
    place: Places | None = view.get("places", key)
    generation = ours.gateway.metadata.generation
    own = [one for one in state.listeners if one.owner.kind == "Gateway"]
    programmed = {one.id: _programmed(view, one) for one in state.listeners}
    dead = _dead(view, state, place)
    accepted = _accepted(ours, own, generation)
    conditions = [
        accepted,
        _gateway_programmed(accepted, place, dead, programmed).condition(generation),
        condition("ResolvedRefs", generation, state.client_problem),
    ]
    if _insecure(ours.gateway):
        message = (
            "spec.tls.frontend has mode AllowInsecureFallback: clients without a valid certificate"
            " are let in"
        )
        conditions.append(
            make(
                "InsecureFrontendValidationMode",
                "True",
                "ConfigurationChanged",
                message,
                generation,
            )
        )
    by_set: dict[ParentKey, list[ListenerState]] = {}
    for one in state.listeners:
        if one.owner.kind == "ListenerSet":
            by_set.setdefault(one.owner, []).append(one)
    return GatewayStatus(
        addresses=tuple(one for one in place.status if one.value not in dead) if place else (),
        conditions=tuple(conditions),
        listeners=tuple(
            _listener(ListenerStatus, view, one, programmed[one.id], generation) for one in own
        ),
        attached_listener_sets=sum(any(map(_valid, ones)) for ones in by_set.values()),
    )


def _valid(one: ListenerState) -> bool:
    return one.accepted is None and one.resolved is None


def _invalid_listeners(own: Iterable[ListenerState]) -> Problem | None:
    invalid = [one for one in own if not _valid(one)]
    if not invalid:
        return None
    names = "; ".join(
        f"listener {one.name}: {problem.message}"
        for one in invalid
        if (problem := one.accepted or one.resolved) is not None
    )
    return Problem("ListenersNotValid", names)


def _accepted(ours: Ours, own: list[ListenerState], generation: int | None) -> Condition:
    if ours.problem is not None:
        return condition("Accepted", generation, ours.problem)
    invalid = _invalid_listeners(own)
    if invalid is None:
        return condition("Accepted", generation)
    if all(one.accepted is not None for one in own):
        return condition("Accepted", generation, invalid)
    return make("Accepted", "True", invalid.reason, invalid.message, generation)


def _gateway_programmed(
    accepted: Condition,
    place: Places | None,
    dead: dict[str, str],
    programmed: dict[str, Programmed],
) -> Programmed:
    if accepted.status == "False":
        return Programmed(Problem("Invalid", accepted.message))
    if place is not None and place.problem is not None:
        return Programmed(place.problem)
    if dead:
        text = "; ".join(f"cannot listen on {address}: {why}" for address, why in dead.items())
        return Programmed(Problem("AddressNotUsable", f"spec.addresses: {text}"))
    results = list(programmed.values())
    if any(one.ok for one in results):
        return Programmed()
    problems = [one.problem for one in results if one.problem is not None]
    if len(problems) < len(results):
        return next(one for one in results if one.problem is None)
    return Programmed(Problem("Invalid", problem_text(problems)))


def _dead(view: View, state: GatewayState, place: Places | None) -> dict[str, str]:
    """The requested addresses on which no port can be bound, and why."""
    result: dict[str, str] = {}
    for address in sorted(place.requested) if place is not None else ():
        tried = [view.get("binds", port) for port in sorted(state.served) if port[0] == address]
        if tried and all(tried):
            result[address] = tried[0]
    return result


def _insecure(gateway: Gateway) -> bool:
    frontend = gateway.spec.tls.frontend if gateway.spec.tls is not None else None
    if frontend is None:
        return False
    configs = [frontend.default, *(per_port.tls for per_port in frontend.per_port)]
    return any(
        config.validation is not None and config.validation.mode == "AllowInsecureFallback"
        for config in configs
    )


# --- ListenerSet ---------------------------------------------------------------------------------


def listener_set_status(view: View, key: ObjectKey) -> ListenerSetStatus:
    parent: SetParent = view.get("set_parents", key)
    listener_set: ListenerSet = view.get("ListenerSet", key)
    generation = listener_set.metadata.generation
    ours: Ours | None = view.get("gateways", parent.gateway)
    problem = parent.problem
    if problem is None and ours is not None and ours.problem is not None:
        message = f"Gateway {parent.gateway} is not accepted; see its status"
        problem = Problem("ParentNotAccepted", message)
    if parent.problem is not None:
        return ListenerSetStatus(
            conditions=(
                condition("Accepted", generation, problem),
                condition("Programmed", generation, problem),
            ),
        )
    state: GatewayState = view.get("states", parent.gateway)
    owner = ParentKey("ListenerSet", *key)
    own = [one for one in state.listeners if one.owner == owner]
    programmed = {one.id: _programmed(view, one) for one in own}
    return ListenerSetStatus(
        conditions=_set_conditions(problem, own, list(programmed.values()), generation),
        listeners=tuple(
            _listener(ListenerEntryStatus, view, one, programmed[one.id], generation) for one in own
        ),
    )


def _set_conditions(
    problem: Problem | None,
    own: list[ListenerState],
    programmed: list[Programmed],
    generation: int | None,
) -> tuple[Condition, Condition]:
    invalid = _invalid_listeners(own)
    if problem is None and not any(map(_valid, own)):
        problem = invalid
    if problem is not None:
        return (
            condition("Accepted", generation, problem),
            condition("Programmed", generation, problem),
        )
    accepted = condition("Accepted", generation)
    if invalid is not None:
        accepted = make("Accepted", "True", invalid.reason, invalid.message, generation)
    if any(one.ok for one in programmed):
        return accepted, condition("Programmed", generation)
    pending = next((one for one in programmed if one.pending), None)
    if pending is not None:
        return accepted, pending.condition(generation)
    text = problem_text([one.problem for one in programmed if one.problem is not None])
    return accepted, condition("Programmed", generation, Problem("Invalid", text))


# --- transition times ----------------------------------------------------------------------------


def with_transition_times(old: Status | None, new: Status, now: str) -> Status:
    """`new` with every condition's lastTransitionTime filled in: that of the same condition in
    `old` where its status is the same, else `now` (RFC 3339).

    Listeners are the same by name, a route's parents and a policy's ancestors by their reference.
    """
    changes: dict[str, Any] = {}
    for field in new.__struct_fields__:
        value = getattr(new, field)
        before = getattr(old, field, ()) if old is not None else ()
        if field == "conditions":
            changes[field] = _timed(before, value, now)
        elif field in ("listeners", "parents", "ancestors"):
            known = {_identity(part): part for part in before}
            changes[field] = tuple(
                with_transition_times(known.get(_identity(part)), part, now) for part in value
            )
    return msgspec.structs.replace(new, **changes)


def _identity(part: Any) -> tuple[Any, ...]:
    return tuple(
        getattr(part, field)
        for field in ("name", "parent_ref", "ancestor_ref", "controller_name")
        if hasattr(part, field)
    )


def _timed(
    old: tuple[Condition, ...], new: tuple[Condition, ...], now: str
) -> tuple[Condition, ...]:
    before = {one.type: one for one in old}
    return tuple(
        msgspec.structs.replace(
            one,
            last_transition_time=before[one.type].last_transition_time
            if one.type in before and before[one.type].status == one.status
            else now,
        )
        for one in new
    )
