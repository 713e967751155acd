"""ReferenceGrant, gateway.networking.k8s.io/v1 and v1beta1 (apis/v1/referencegrant_types.go)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mesh.model import scalars as s
from mesh.model.meta import Model, ObjectMeta


class ReferenceGrantFrom(Model, frozen=True, kw_only=True):
    group: s.Group
    kind: s.Kind
    namespace: s.Namespace


class ReferenceGrantTo(Model, frozen=True, kw_only=True):
    """`name` None is every object of that kind in the grant's namespace."""

    group: s.Group
    kind: s.Kind
    name: s.ObjectName | None = None


class ReferenceGrantSpec(Model, frozen=True, kw_only=True):
    from_: Annotated[tuple[ReferenceGrantFrom, ...], Meta(min_length=1, max_length=16)] = (
        msgspec.field(name="from")
    )
    to: Annotated[tuple[ReferenceGrantTo, ...], Meta(min_length=1, max_length=16)]


class ReferenceGrant(Model, frozen=True, kw_only=True):
    api_version: str = "gateway.networking.k8s.io/v1"
    kind: Literal["ReferenceGrant"] = "ReferenceGrant"
    metadata: ObjectMeta
    spec: ReferenceGrantSpec
