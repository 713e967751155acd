"""The CEL rules of GatewayClass, Gateway, ListenerSet and BackendTLSPolicy, as checks. The wording
of a rule is the CRD's."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from mesh.model.backendtlspolicy import (
    BackendTLSPolicySpec,
    BackendTLSPolicyValidation,
    LocalPolicyTargetReferenceWithSectionName,
    SubjectAltName,
)
from mesh.model.gateway import (
    GatewayInfrastructure,
    GatewaySpec,
    GatewaySpecAddress,
    GatewayStatusAddress,
    Listener,
    ListenerTLSConfig,
)
from mesh.model.gatewayclass import GatewayClassSpec
from mesh.model.listenerset import ListenerEntry, ListenerSetSpec
from mesh.model.rules import Check, Finding, Transition, duplicates
from mesh.model.scalars import LABEL_KEY, WILDCARD_DOMAIN
from mesh.model.schema import found

# --- listeners -----------------------------------------------------------------------------------

_PLAIN = ("HTTP", "TCP", "UDP")
Listeners = Sequence[Listener | ListenerEntry]


def _each(
    wrong: Callable[[Listener | ListenerEntry], bool], advice: str
) -> Callable[[Listeners], Finding]:
    """A check of single listeners, reported on the list as the CRD does, naming them."""

    def find(listeners: Listeners) -> Finding:
        names = [found(listener.name) for listener in listeners if wrong(listener)]
        return f"listener {', '.join(names)}: {advice}" if names else None

    return find


def _listeners_unique(listeners: Listeners) -> Finding:
    keys = [(listener.port, listener.protocol, listener.hostname) for listener in listeners]
    for first, later in duplicates(keys):
        port, protocol, hostname = keys[later]
        return (
            f"listeners {found(listeners[first].name)} and {found(listeners[later].name)} are both"
            f" {protocol} on port {port} for {hostname or 'every host'}; change or remove one"
        )
    return None


_LISTENERS: tuple[tuple[str, Callable[[Listeners], Finding]], ...] = (
    (
        "tls must not be specified for protocols ['HTTP', 'TCP', 'UDP']",
        _each(lambda one: one.protocol in _PLAIN and one.tls is not None, "remove tls"),
    ),
    (
        "tls mode must be Terminate for protocol HTTPS",
        _each(
            lambda one: (
                one.protocol == "HTTPS" and one.tls is not None and one.tls.mode != "Terminate"
            ),
            "use mode Terminate, or protocol TLS",
        ),
    ),
    (
        "tls mode must be set for protocol TLS",
        _each(lambda one: one.protocol == "TLS" and one.tls is None, "add tls with its mode"),
    ),
    (
        "hostname must not be specified for protocols ['TCP', 'UDP']",
        _each(
            lambda one: one.protocol in ("TCP", "UDP") and one.hostname is not None,
            "remove the hostname",
        ),
    ),
    (
        "Combination of port, protocol and hostname must be unique for each listener",
        _listeners_unique,
    ),
)


def _certificates(tls: ListenerTLSConfig) -> Finding:
    if tls.mode == "Terminate" and not tls.certificate_refs and not tls.options:
        return "has neither; add a certificateRef"
    return None


# --- addresses -----------------------------------------------------------------------------------

_HOSTNAME = re.compile(WILDCARD_DOMAIN)
_MATCHING = r"(matching ^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$)"


def is_ip(text: str) -> bool:
    """Whether it is an IPv4 or IPv6 address, without a zone."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return "%" not in text


def _ip_value(address: GatewaySpecAddress | GatewayStatusAddress) -> Finding:
    if address.type == "IPAddress" and address.value is not None and not is_ip(address.value):
        return f"found {found(address.value)}; write an address, or use type Hostname"
    return None


def _hostname_value(address: GatewaySpecAddress | GatewayStatusAddress) -> Finding:
    value = address.value
    if address.type == "Hostname" and value is not None and not _HOSTNAME.search(value):
        return f"found {found(value)}; write a DNS name in lower case"
    return None


def _values_unique(kind: str) -> Callable[[Sequence[GatewaySpecAddress]], Finding]:
    def find(addresses: Sequence[GatewaySpecAddress]) -> Finding:
        values = [a.value for a in addresses if a.type == kind and a.value is not None]
        for first, _later in duplicates(values):
            return f"{found(values[first])} stands twice; remove one"
        return None

    return find


# --- infrastructure ------------------------------------------------------------------------------

_KEY = re.compile(LABEL_KEY)


def _key_form(labels: Mapping[str, str]) -> Finding:
    return _keys(key for key in labels if not _KEY.search(key))


def _key_prefix(labels: Mapping[str, str]) -> Finding:
    return _keys(key for key in labels if len(key.split("/")[0]) >= 253)


def _keys(wrong: Iterable[str]) -> Finding:
    names = [found(key) for key in wrong]
    return f"found {', '.join(names)}; write it as in example.com/name" if names else None


# --- BackendTLSPolicy ----------------------------------------------------------------------------

Targets = Sequence[LocalPolicyTargetReferenceWithSectionName]


def _targets_told_apart(refs: Targets) -> Finding:
    whole: dict[Hashable, bool] = {}
    for index, ref in enumerate(refs):
        shape = ref.section_name is None
        if whole.setdefault((ref.group, ref.kind, ref.name), shape) != shape:
            return (
                f"[{index}] and one before it name the {ref.kind} {found(ref.name)}, only one of"
                " them with sectionName; give it to all of them or to none"
            )
    return None


def _targets_unique(refs: Targets) -> Finding:
    keys = [(ref.group, ref.kind, ref.name, ref.section_name) for ref in refs]
    for first, later in duplicates(keys):
        return f"[{first}] and [{later}] are the same target; remove one"
    return None


def _one_authority(validation: BackendTLSPolicyValidation) -> Finding:
    if validation.ca_certificate_refs and validation.well_known_ca_certificates is not None:
        return "has both; remove one"
    return None


def _some_authority(validation: BackendTLSPolicyValidation) -> Finding:
    if not validation.ca_certificate_refs and validation.well_known_ca_certificates is None:
        return "has neither; name a ConfigMap with ca.crt, or use wellKnownCACertificates: System"
    return None


def _san_needs(kind: str, attribute: str) -> Callable[[SubjectAltName], Finding]:
    def find(name: SubjectAltName) -> Finding:
        if name.type == kind and getattr(name, attribute) is None:
            return f"{attribute} is missing; add it"
        return None

    return find


def _san_allows(kind: str, attribute: str) -> Callable[[SubjectAltName], Finding]:
    def find(name: SubjectAltName) -> Finding:
        if name.type != kind and getattr(name, attribute) is not None:
            return f"the type is {name.type}; remove {attribute}, or change the type"
        return None

    return find


# --- the table -----------------------------------------------------------------------------------


def _immutable(old: str, new: str) -> Finding:
    if old == new:
        return None
    return f"was {found(old)}, is {found(new)}; delete the object and create it anew"


_SAME_TARGET = "when targetRefs includes 2 or more references to the same target"

CHECKS: tuple[Check, ...] = (
    *(
        Check(spec, "listeners", rule, find)
        for spec in (GatewaySpec, ListenerSetSpec)
        for rule, find in _LISTENERS
    ),
    Check(
        ListenerTLSConfig,
        None,
        "certificateRefs or options must be specified when mode is Terminate",
        _certificates,
    ),
    *(
        Check(GatewaySpec, "addresses", f"{kind} values must be unique", _values_unique(kind))
        for kind in ("IPAddress", "Hostname")
    ),
    *(
        Check(model, None, "an IPAddress must be of format ipv4 or ipv6", _ip_value)
        for model in (GatewaySpecAddress, GatewayStatusAddress)
    ),
    Check(
        GatewaySpecAddress,
        None,
        f"Hostname value must be empty or contain only valid characters {_MATCHING}",
        _hostname_value,
    ),
    Check(
        GatewayStatusAddress,
        None,
        f"Hostname value must only contain valid characters {_MATCHING}",
        _hostname_value,
    ),
    *(
        check
        for attribute, name in (("annotations", "annotation"), ("labels", "label"))
        for check in (
            Check(
                GatewayInfrastructure,
                attribute,
                f"{name.capitalize()} keys must be in the form of an optional DNS subdomain prefix"
                " followed by a required name segment of up to 63 characters.",
                _key_form,
            ),
            Check(
                GatewayInfrastructure,
                attribute,
                f"If specified, the {name} key's prefix must be a DNS subdomain not longer than"
                " 253 characters in total.",
                _key_prefix,
            ),
        )
    ),
    Check(
        BackendTLSPolicySpec,
        "target_refs",
        f"sectionName must be specified {_SAME_TARGET}",
        _targets_told_apart,
    ),
    Check(
        BackendTLSPolicySpec,
        "target_refs",
        f"sectionName must be unique {_SAME_TARGET}",
        _targets_unique,
    ),
    Check(
        BackendTLSPolicyValidation,
        None,
        "must not contain both CACertificateRefs and WellKnownCACertificates",
        _one_authority,
    ),
    Check(
        BackendTLSPolicyValidation,
        None,
        "must specify either CACertificateRefs or WellKnownCACertificates",
        _some_authority,
    ),
    *(
        check
        for kind, attribute in (("Hostname", "hostname"), ("URI", "uri"))
        for check in (
            Check(
                SubjectAltName,
                None,
                f"SubjectAltName element must contain {kind}, if Type is set to {kind}",
                _san_needs(kind, attribute),
            ),
            Check(
                SubjectAltName,
                None,
                f"SubjectAltName element must not contain {kind}, if Type is not set to {kind}",
                _san_allows(kind, attribute),
            ),
        )
    ),
)

TRANSITIONS: tuple[Transition, ...] = (
    Transition(GatewayClassSpec, "controller_name", "Value is immutable", _immutable),
)
