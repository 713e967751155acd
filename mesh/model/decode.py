"""The kinds that Weft reads, and the way from plain data to objects and back.

Decoding is whole: schema, defaults, names, and every rule of the CRDs (`mesh.model.rules`). No I/O,
no knowledge of where the data came from.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import msgspec

from mesh.model import rules_core, rules_filters, rules_gateway, rules_policy, rules_routes
from mesh.model.backendtlspolicy import BackendTLSPolicy
from mesh.model.ciliumnetworkpolicy import (
    CiliumClusterwideNetworkPolicy,
    CiliumNetworkPolicy,
)
from mesh.model.core import ConfigMap, EndpointSlice, Namespace, Secret, Service
from mesh.model.errors import FieldError, InvalidObject, UnsupportedKind
from mesh.model.gateway import Gateway
from mesh.model.gatewayclass import GatewayClass
from mesh.model.grpcroute import GRPCRoute
from mesh.model.httproute import HTTPRoute
from mesh.model.listenerset import ListenerSet
from mesh.model.meta import Model, ObjectKey
from mesh.model.networkpolicy import NetworkPolicy
from mesh.model.node import Node
from mesh.model.pod import Pod
from mesh.model.referencegrant import ReferenceGrant
from mesh.model.references import GROUP
from mesh.model.rules import Rules
from mesh.model.rules_core import LABEL, LABEL_1035, SUBDOMAIN, NameForm, metadata_errors
from mesh.model.schema import read

__all__ = [
    "KINDS",
    "FieldError",
    "InvalidObject",
    "KindInfo",
    "Object",
    "UnsupportedKind",
    "decode",
    "encode",
    "key_of",
    "parse",
    "update_errors",
]

RULES = Rules(
    rules_core.CHECKS
    + rules_gateway.CHECKS
    + rules_routes.CHECKS
    + rules_filters.CHECKS
    + rules_policy.CHECKS,
    rules_gateway.TRANSITIONS,
)

Object: TypeAlias = (
    Namespace
    | Service
    | EndpointSlice
    | Secret
    | ConfigMap
    | Pod
    | Node
    | GatewayClass
    | Gateway
    | ListenerSet
    | HTTPRoute
    | GRPCRoute
    | ReferenceGrant
    | BackendTLSPolicy
    | NetworkPolicy
    | CiliumNetworkPolicy
    | CiliumClusterwideNetworkPolicy
)


class KindInfo(NamedTuple):
    """`versions` are those that are accepted, the preferred one first; `plural` and `short` are
    the names people use on a command line."""

    model: type[Object]
    kind: str
    namespaced: bool
    versions: tuple[str, ...]
    plural: str
    short: tuple[str, ...] = ()
    name_form: NameForm = SUBDOMAIN


# By API group ("" is core) and kind.
KINDS: dict[tuple[str, str], KindInfo] = {
    (group, info.kind): info
    for group, info in (
        ("", KindInfo(Namespace, "Namespace", False, ("v1",), "namespaces", ("ns",), LABEL)),
        ("", KindInfo(Service, "Service", True, ("v1",), "services", ("svc",), LABEL_1035)),
        ("", KindInfo(Secret, "Secret", True, ("v1",), "secrets")),
        ("", KindInfo(ConfigMap, "ConfigMap", True, ("v1",), "configmaps", ("cm",))),
        ("", KindInfo(Pod, "Pod", True, ("v1",), "pods", ("po",))),
        ("", KindInfo(Node, "Node", False, ("v1",), "nodes", ("no",))),
        (
            "discovery.k8s.io",
            KindInfo(EndpointSlice, "EndpointSlice", True, ("v1",), "endpointslices"),
        ),
        (
            GROUP,
            KindInfo(
                GatewayClass, "GatewayClass", False, ("v1", "v1beta1"), "gatewayclasses", ("gc",)
            ),
        ),
        (GROUP, KindInfo(Gateway, "Gateway", True, ("v1", "v1beta1"), "gateways", ("gtw",))),
        (GROUP, KindInfo(ListenerSet, "ListenerSet", True, ("v1",), "listenersets", ("lset",))),
        (GROUP, KindInfo(HTTPRoute, "HTTPRoute", True, ("v1", "v1beta1"), "httproutes")),
        (GROUP, KindInfo(GRPCRoute, "GRPCRoute", True, ("v1",), "grpcroutes")),
        (
            GROUP,
            KindInfo(
                ReferenceGrant,
                "ReferenceGrant",
                True,
                ("v1", "v1beta1"),
                "referencegrants",
                ("refgrant",),
            ),
        ),
        (
            GROUP,
            KindInfo(
                BackendTLSPolicy,
                "BackendTLSPolicy",
                True,
                ("v1", "v1alpha3"),
                "backendtlspolicies",
                ("btlspolicy",),
            ),
        ),
        (
            "networking.k8s.io",
            KindInfo(NetworkPolicy, "NetworkPolicy", True, ("v1",), "networkpolicies", ("netpol",)),
        ),
        (
            "cilium.io",
            KindInfo(
                CiliumNetworkPolicy,
                "CiliumNetworkPolicy",
                True,
                ("v2",),
                "ciliumnetworkpolicies",
                ("cnp", "ciliumnp"),
            ),
        ),
        (
            "cilium.io",
            KindInfo(
                CiliumClusterwideNetworkPolicy,
                "CiliumClusterwideNetworkPolicy",
                False,
                ("v2",),
                "ciliumclusterwidenetworkpolicies",
                ("ccnp",),
            ),
        ),
    )
}


def decode(raw: Mapping[str, Any]) -> Object:
    """The object that `raw` (a manifest's data) describes, with defaults filled in; a namespaced
    one without a namespace is in "default". InvalidObject lists what is wrong with it;
    UnsupportedKind: another kind, or a version that is not served."""
    obj = parse(raw)
    info = _info(raw)
    errors = metadata_errors(obj.metadata, info.name_form, info.namespaced) + RULES.errors(obj)
    if errors:
        raise InvalidObject(tuple(errors))
    return obj


def parse(raw: Mapping[str, Any], *, lenient: bool = False) -> Object:
    """The first half of `decode`: schema and defaults, not yet names and rules. `lenient`: fields
    that are not known are passed over."""
    info = _info(raw)
    metadata = raw.get("metadata")
    if info.namespaced and isinstance(metadata, Mapping) and not metadata.get("namespace"):
        raw = {**raw, "metadata": {**metadata, "namespace": "default"}}
    if info.model is Secret:
        raw = _secret_data(raw)
    return read(raw, info.model, quote=info.model is not Secret, lenient=lenient)


def update_errors(old: Object, new: Object) -> tuple[FieldError, ...]:
    """What forbids `new` to take the place of `old`, an object of the same kind and key: changes
    of fields that may not change. Empty: nothing."""
    return tuple(RULES.update_errors(old, new))


def key_of(obj: Object) -> ObjectKey:
    """The object's key within its kind."""
    return ObjectKey(obj.metadata.namespace, obj.metadata.name)


def encode(obj: Object) -> dict[str, Any]:
    """The object as plain data with the manifests' names, for people and programs to read. What
    is absent is left out. A Secret's values are redacted, so it does not decode back."""
    data = _plain(obj)
    assert isinstance(data, dict)
    if isinstance(obj, Secret):
        data["data"] = {key: f"<{len(value)} bytes>" for key, value in obj.data.items()}
        data["metadata"].pop("annotations", None)
    return data


def _info(raw: Mapping[str, Any]) -> KindInfo:
    if not isinstance(raw, Mapping):
        raise InvalidObject(
            (FieldError("", "type: object", f"found a {type(raw).__name__}, not an object"),)
        )
    api_version, kind = raw.get("apiVersion"), raw.get("kind")
    missing = tuple(
        FieldError(name, "required", "is missing or not a plain string; every object has it")
        for name, value in (("apiVersion", api_version), ("kind", kind))
        if not isinstance(value, str) or not value or not value.isprintable()
    )
    if missing:
        raise InvalidObject(missing)
    group, _, version = str(api_version).rpartition("/")
    info = KINDS.get((group, str(kind)))
    if info is None or version not in info.versions:
        raise UnsupportedKind(str(api_version), str(kind))
    return info


def _secret_data(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """`data` decoded and `stringData` merged in, as the API server does. Wrong types are left for
    the schema to find."""
    raw = dict(raw)
    data, text = raw.get("data"), raw.pop("stringData", None)
    merged: dict[Any, Any] = {}
    errors = []
    for key, value in (data or {}).items() if isinstance(data, Mapping) else ():
        if not isinstance(value, str):
            merged[key] = value
            continue
        try:
            # Line breaks are allowed, as in Go's decoder: YAML block text has them.
            merged[key] = base64.b64decode("".join(value.split("\n")), validate=True)
        except (binascii.Error, ValueError):
            errors.append(
                FieldError(
                    f"data[{key}]",
                    "base64",
                    "is not base64; encode the value, or write it under stringData",
                )
            )
    if isinstance(text, Mapping):
        for key, value in text.items():
            merged[key] = value.encode() if isinstance(value, str) else value
    elif text is not None:
        errors.append(FieldError("stringData", "type: object", "is not a map of strings"))
    if errors:
        raise InvalidObject(tuple(errors))
    if data is None or isinstance(data, Mapping):
        raw["data"] = merged
    return raw


@cache
def _fields(model: type[Model]) -> tuple[tuple[str, str, bool], ...]:
    """Attribute, name in manifests, and whether an empty value there is the same as none."""
    return tuple(
        (field.name, field.encode_name, field.default == () or field.default_factory is dict)
        for field in msgspec.structs.fields(model)
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Model):
        result = {}
        for attribute, name, optional in _fields(type(value)):
            item = getattr(value, attribute)
            if item is not None and (item or not optional):
                result[name] = _plain(item)
        return result
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value
