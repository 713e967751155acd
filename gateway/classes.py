"""GatewayClasses and Gateways that are ours, and whether they may be served at all.

Other controllers' classes and their Gateways have no entry here, and so cost nothing further on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gateway.annotations import ADDRESS_POOL, address_pool
from gateway.conditions import Problem
from mesh.model.derive import View
from mesh.model.gateway import Gateway
from mesh.model.gatewayclass import GatewayClass
from mesh.model.meta import ObjectKey


class Ours(NamedTuple):
    """A Gateway of one of our classes. `problem`: why it is not accepted; `pool`: its class's."""

    gateway: Gateway
    problem: Problem | None
    pool: tuple[str, ...] = ()


class OurClass(NamedTuple):
    """`pool`: the addresses for its Gateways, if it says so."""

    problem: Problem | None
    pool: tuple[str, ...] = ()


def classes(controller_name: str) -> Callable[[View, ObjectKey], OurClass | None]:
    def compute(view: View, key: ObjectKey) -> OurClass | None:
        gateway_class: GatewayClass = view.get("GatewayClass", key)
        if gateway_class.spec.controller_name != controller_name:
            return None
        reference = gateway_class.spec.parameters_ref
        if reference is None:
            try:
                return OurClass(None, address_pool(gateway_class))
            except ValueError as error:
                text = f"annotation {ADDRESS_POOL}: {error}; give 192.0.2.0/28, say"
                return OurClass(Problem("InvalidParameters", text))
        return OurClass(_parameters("spec.parametersRef", reference.kind, reference.name))

    return compute


def gateways(view: View, key: ObjectKey) -> Ours | None:
    gateway: Gateway = view.get("Gateway", key)
    name = gateway.spec.gateway_class_name
    our_class: OurClass | None = view.get("classes", ObjectKey("", name))
    if our_class is None:
        return None
    return Ours(gateway, _problem(gateway, our_class), our_class.pool)


def default_scope(key: ObjectKey, ours: Ours) -> tuple[str, ...]:
    """The scope in which routes attach to a Gateway without naming it (for an index)."""
    scope = ours.gateway.spec.default_scope
    return (scope,) if scope not in (None, "None") else ()


def _problem(gateway: Gateway, our_class: OurClass) -> Problem | None:
    spec = gateway.spec
    if our_class.problem:
        return Problem(
            "Pending", f"GatewayClass {spec.gateway_class_name} is not accepted; see its status"
        )
    infrastructure = spec.infrastructure
    if infrastructure is not None and infrastructure.parameters_ref is not None:
        reference = infrastructure.parameters_ref
        return _parameters("spec.infrastructure.parametersRef", reference.kind, reference.name)
    for number, address in enumerate(spec.addresses):
        if address.type != "IPAddress":
            return Problem(
                "UnsupportedAddress",
                f"spec.addresses[{number}].type {address.type} is not supported; use IPAddress",
            )
    return None


def _parameters(field: str, kind: str, name: str) -> Problem:
    return Problem(
        "InvalidParameters",
        f"{field}: {kind} {name} cannot be used, this implementation takes no parameters;"
        " remove the field",
    )
