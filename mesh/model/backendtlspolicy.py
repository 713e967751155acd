"""BackendTLSPolicy, gateway.networking.k8s.io/v1 and v1alpha3.

Source: apis/v1/backendtlspolicy_types.go.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from mesh.model import scalars as s
from mesh.model.gateway import TLSOptions
from mesh.model.meta import Model, ObjectMeta
from mesh.model.references import LocalObjectReference, PolicyStatus


class LocalPolicyTargetReferenceWithSectionName(Model, frozen=True, kw_only=True):
    """`section_name` names a port of the Service; None is all of them."""

    group: s.Group
    kind: s.Kind
    name: s.ObjectName
    section_name: s.SectionName | None = None


class SubjectAltName(Model, frozen=True, kw_only=True):
    type: Literal["Hostname", "URI"]
    hostname: s.Hostname | None = None
    uri: s.AbsoluteURI | None = None


class BackendTLSPolicyValidation(Model, frozen=True, kw_only=True):
    ca_certificate_refs: Annotated[tuple[LocalObjectReference, ...], Meta(max_length=8)] = ()
    well_known_ca_certificates: s.WellKnownCACertificates | None = msgspec.field(
        default=None, name="wellKnownCACertificates"
    )
    hostname: s.PreciseHostname
    subject_alt_names: Annotated[tuple[SubjectAltName, ...], Meta(max_length=5)] = ()


class BackendTLSPolicySpec(Model, frozen=True, kw_only=True):
    target_refs: Annotated[
        tuple[LocalPolicyTargetReferenceWithSectionName, ...], Meta(min_length=1, max_length=16)
    ]
    validation: BackendTLSPolicyValidation
    options: TLSOptions = msgspec.field(default_factory=dict)


class BackendTLSPolicy(Model, frozen=True, kw_only=True):
    api_version: str = "gateway.networking.k8s.io/v1"
    kind: Literal["BackendTLSPolicy"] = "BackendTLSPolicy"
    metadata: ObjectMeta
    spec: BackendTLSPolicySpec
    status: PolicyStatus | None = None
