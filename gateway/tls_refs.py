"""What Gateways and ListenerSets refer to for TLS: certificates, client validation, and the client
certificate toward backends. Everything broken is broken closed.

`keypairs` are judged once per Secret, and only Secrets that some permitted reference names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from certs.keypair import BadCertificate, check_keypair
from gateway.backend_tls import ca_bundle
from gateway.conditions import Problem, problem_text
from gateway.grants import not_permitted, permitted
from gateway.listeners import Merged
from mesh.model.core import Secret
from mesh.model.derive import View
from mesh.model.gateway import FrontendTLSValidation, Gateway
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import CertificateSection, ClientValidation
from mesh.model.references import SecretObjectReference


class SecretRefs(NamedTuple):
    """The Secrets that a Gateway's listeners (by id) and its backend TLS refer to, or why they may
    not."""

    listeners: dict[str, tuple[ObjectKey | Problem, ...]]
    client: ObjectKey | Problem | None


class Keypair(NamedTuple):
    """A Secret's certificate, or what is wrong with it."""

    section: CertificateSection | None
    problem: str


class Frontend(NamedTuple):
    """Client validation of a port. `resolved`: a reference is broken; `accepted`: all are."""

    validation: ClientValidation
    resolved: Problem | None
    accepted: Problem | None


class GatewayTLS(NamedTuple):
    """`certificates`: per listener id the Secrets to serve and what is broken; `frontends`: per
    port; `client`: the Secret shown to backends, or what is broken."""

    certificates: dict[str, tuple[tuple[ObjectKey, ...], Problem | None]]
    frontends: dict[int, Frontend]
    client: ObjectKey | Problem | None


def secret_refs(view: View, key: ObjectKey) -> SecretRefs:
    listeners: tuple[Merged, ...] = view.get("merged", key)
    gateway: Gateway = view.get("gateways", key).gateway
    refs = {
        one.id: tuple(
            _secret(view, one.owner.kind, one.owner.namespace, ref, "InvalidCertificateRef")
            for ref in one.spec.tls.certificate_refs
        )
        for one in listeners
        if one.spec.protocol == "HTTPS" and one.spec.tls is not None
    }
    backend = gateway.spec.tls.backend if gateway.spec.tls is not None else None
    client_ref = backend.client_certificate_ref if backend is not None else None
    client = None
    if client_ref is not None:
        client = _secret(view, "Gateway", key.namespace, client_ref, "InvalidClientCertificateRef")
    return SecretRefs(refs, client)


def wanted_secrets(key: ObjectKey, refs: SecretRefs) -> Iterator[ObjectKey]:
    """The Secrets to look at (for an index)."""
    for found in refs.listeners.values():
        yield from (ref for ref in found if isinstance(ref, ObjectKey))
    if isinstance(refs.client, ObjectKey):
        yield refs.client


def keypairs(view: View, key: ObjectKey) -> Keypair:
    secret: Secret | None = view.get("Secret", key)
    if secret is None:
        return Keypair(None, f"Secret {key} does not exist")
    if secret.type != "kubernetes.io/tls":
        return Keypair(None, f"Secret {key} is of type {secret.type}, not kubernetes.io/tls")
    try:
        # A Secret of this type has both, or it would not have been decoded.
        chain, private = (secret.data[name].decode() for name in ("tls.crt", "tls.key"))
        check_keypair(chain, private)
    except UnicodeDecodeError:
        return Keypair(None, f"Secret {key}: tls.crt and tls.key must be PEM text")
    except BadCertificate as error:
        return Keypair(None, f"Secret {key}: {error}")
    return Keypair(CertificateSection(chain, private), "")


def certificates(view: View, key: ObjectKey) -> CertificateSection | None:
    keypair: Keypair = view.get("keypairs", key)
    return keypair.section


def gateway_tls(view: View, key: ObjectKey) -> GatewayTLS:
    refs: SecretRefs = view.get("secret_refs", key)
    listeners: tuple[Merged, ...] = view.get("merged", key)
    served: dict[str, tuple[tuple[ObjectKey, ...], Problem | None]] = {}
    for one in listeners:
        if one.spec.protocol == "HTTPS":
            good: list[ObjectKey] = []
            problems: list[Problem] = []
            for ref in refs.listeners.get(one.id, ()):
                found = _usable(view, ref, "InvalidCertificateRef")
                if isinstance(found, Problem):
                    problems.append(found)
                else:
                    good.append(found)
            if not good and not problems:
                problems.append(
                    Problem("InvalidCertificateRef", "tls.certificateRefs names no certificate")
                )
            served[one.id] = (tuple(good), _combined(problems))
    ports = {one.spec.port for one in listeners if one.spec.protocol == "HTTPS"}
    gateway: Gateway = view.get("gateways", key).gateway
    frontends = {
        port: _frontend(view, key, validation)
        for port in sorted(ports)
        if (validation := _validation(gateway, port)) is not None
    }
    client = refs.client
    if client is not None:
        client = _usable(view, client, "InvalidClientCertificateRef")
    return GatewayTLS(served, frontends, client)


def _secret(
    view: View, from_kind: str, from_namespace: str, ref: SecretObjectReference, reason: str
) -> ObjectKey | Problem:
    if ref.group or ref.kind != "Secret":
        kind = f"{ref.group}/{ref.kind}" if ref.group else ref.kind
        return Problem(reason, f"{kind} {ref.name}: use a Secret of type kubernetes.io/tls")
    target = ObjectKey(ref.namespace or from_namespace, ref.name)
    if not permitted(view, from_kind, from_namespace, "Secret", target):
        message = not_permitted(from_kind, from_namespace, "Secret", target)
        return Problem("RefNotPermitted", message)
    return target


def _usable(view: View, ref: ObjectKey | Problem, reason: str) -> ObjectKey | Problem:
    if isinstance(ref, Problem):
        return ref
    keypair: Keypair = view.get("keypairs", ref)
    return ref if keypair.section is not None else Problem(reason, keypair.problem)


def _validation(gateway: Gateway, port: int) -> FrontendTLSValidation | None:
    """spec.tls.frontend: what is said for the port, else the default."""
    frontend = gateway.spec.tls.frontend if gateway.spec.tls is not None else None
    if frontend is None:
        return None
    for per_port in frontend.per_port:
        if per_port.port == port:
            return per_port.tls.validation
    return frontend.default.validation


def _frontend(view: View, key: ObjectKey, validation: FrontendTLSValidation) -> Frontend:
    bundles: list[str] = []
    problems: list[Problem] = []
    for ref in validation.ca_certificate_refs:
        target = ObjectKey(ref.namespace or key.namespace, ref.name)
        found: str | Problem
        if not permitted(view, "Gateway", key.namespace, ref.kind, target):
            message = not_permitted("Gateway", key.namespace, ref.kind, target)
            found = Problem("RefNotPermitted", message)
        else:
            found = ca_bundle(view, ref.group, ref.kind, target, "InvalidCACertificateKind")
        if isinstance(found, Problem):
            problems.append(found)
        else:
            bundles.append(found)
    if bundles:
        ca = ClientValidation("".join(bundles), validation.mode)
        return Frontend(ca, _combined(problems), None)
    nothing = Problem("NoValidCACertificate", problem_text(problems))
    return Frontend(ClientValidation("", "RefuseAll"), _combined(problems), nothing)


def _combined(problems: list[Problem]) -> Problem | None:
    return Problem(problems[0].reason, problem_text(problems)) if problems else None
