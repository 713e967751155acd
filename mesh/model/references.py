"""Parts that several Gateway API kinds share: references, route status, policy status.

Source: Gateway API v1.6.1, apis/v1/shared_types.go, object_reference_types.go, policy_types.go.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

from mesh.model import scalars as s
from mesh.model.meta import Condition, Model

GROUP = "gateway.networking.k8s.io"

# Status conditions: at most eight, one of each type.
Conditions: TypeAlias = Annotated[
    tuple[Condition, ...], Meta(max_length=8, extra={"list_map_keys": ("type",)})
]
SomeConditions: TypeAlias = Annotated[
    tuple[Condition, ...], Meta(min_length=1, max_length=8, extra={"list_map_keys": ("type",)})
]


def pending(type: str, reason: str = "Pending") -> Condition:
    """A condition as the CRDs' status defaults write it."""
    return Condition(
        type=type,
        status="Unknown",
        reason=reason,
        message="Waiting for controller",
        last_transition_time="1970-01-01T00:00:00Z",
    )


class LocalObjectReference(Model, frozen=True, kw_only=True):
    group: s.Group
    kind: s.Kind
    name: s.ObjectName


class LocalParametersReference(Model, frozen=True, kw_only=True):
    group: s.Group
    kind: s.Kind
    name: s.ObjectName


class ParametersReference(Model, frozen=True, kw_only=True):
    group: s.Group
    kind: s.Kind
    name: s.ObjectName
    namespace: s.Namespace | None = None


class ObjectReference(Model, frozen=True, kw_only=True):
    group: s.Group
    kind: s.Kind
    name: s.ObjectName
    namespace: s.Namespace | None = None


class SecretObjectReference(Model, frozen=True, kw_only=True):
    group: s.Group = ""
    kind: s.Kind = "Secret"
    name: s.ObjectName
    namespace: s.Namespace | None = None


class BackendObjectReference(Model, frozen=True, kw_only=True):
    group: s.Group = ""
    kind: s.Kind = "Service"
    name: s.ObjectName
    namespace: s.Namespace | None = None
    port: s.PortNumber | None = None


class ParentReference(Model, frozen=True, kw_only=True):
    group: s.Group = GROUP
    kind: s.Kind = "Gateway"
    namespace: s.Namespace | None = None
    name: s.ObjectName
    section_name: s.SectionName | None = None
    port: s.PortNumber | None = None


class RouteGroupKind(Model, frozen=True, kw_only=True):
    group: s.Group = GROUP
    kind: s.Kind


class RouteParentStatus(Model, frozen=True, kw_only=True):
    parent_ref: ParentReference
    controller_name: s.GatewayController
    conditions: SomeConditions


class RouteStatus(Model, frozen=True, kw_only=True):
    parents: Annotated[tuple[RouteParentStatus, ...], Meta(max_length=32)]


class PolicyAncestorStatus(Model, frozen=True, kw_only=True):
    ancestor_ref: ParentReference
    controller_name: s.GatewayController
    conditions: SomeConditions


class PolicyStatus(Model, frozen=True, kw_only=True):
    ancestors: Annotated[tuple[PolicyAncestorStatus, ...], Meta(max_length=16)]
