"""GatewayClass, gateway.networking.k8s.io/v1 and v1beta1 (apis/v1/gatewayclass_types.go)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from mesh.model import scalars as s
from mesh.model.meta import Model, ObjectMeta
from mesh.model.references import Conditions, ParametersReference, pending


class GatewayClassSpec(Model, frozen=True, kw_only=True):
    controller_name: s.GatewayController
    parameters_ref: ParametersReference | None = None
    description: Annotated[str, Meta(max_length=64)] | None = None


class SupportedFeature(Model, frozen=True, kw_only=True):
    name: str


class GatewayClassStatus(Model, frozen=True, kw_only=True):
    conditions: Conditions = (pending("Accepted"),)
    supported_features: Annotated[
        tuple[SupportedFeature, ...], Meta(max_length=64, extra={"list_map_keys": ("name",)})
    ] = ()


class GatewayClass(Model, frozen=True, kw_only=True):
    api_version: str = "gateway.networking.k8s.io/v1"
    kind: Literal["GatewayClass"] = "GatewayClass"
    metadata: ObjectMeta
    spec: GatewayClassSpec
    status: GatewayClassStatus = GatewayClassStatus()
