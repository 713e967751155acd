"""BackendTLSPolicy: which policy is in force for a Service port, and its status per Gateway.

A policy that cannot be enforced yields UpstreamTLS.broken: connections fail, never fall back to
plain text. Only the oldest policy counts for a Service, or for a port that policies name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from certs.keypair import BadCertificate, check_ca_bundle
from gateway.conditions import Problem, condition, problem_text
from mesh.model.backendtlspolicy import (
    BackendTLSPolicy,
    LocalPolicyTargetReferenceWithSectionName,
)
from mesh.model.core import ConfigMap, Service, ServicePort
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import SubjectAltName, UpstreamTLS
from mesh.model.references import GROUP, ParentReference, PolicyAncestorStatus, PolicyStatus

# The CRD's limit on status.ancestors.
MAX_ANCESTORS = 16


class PolicyState(NamedTuple):
    """A policy with its references resolved. `accepted`, `resolved`: why not, if not."""

    created: str
    generation: int | None
    targets: tuple[LocalPolicyTargetReferenceWithSectionName, ...]
    tls: UpstreamTLS
    accepted: Problem | None
    resolved: Problem | None


def targets(key: ObjectKey, policy: BackendTLSPolicy) -> Iterator[ObjectKey]:
    """The Services a policy names (for an index)."""
    for target in policy.spec.target_refs:
        if target.group == "" and target.kind == "Service":
            yield ObjectKey(key.namespace, target.name)


def policies(view: View, key: ObjectKey) -> PolicyState:
    policy: BackendTLSPolicy = view.get("BackendTLSPolicy", key)
    validation = policy.spec.validation
    accepted: Problem | None = None
    ca_pem: str | None = None
    problems: list[Problem] = []
    if validation.ca_certificate_refs:
        bundles: list[str] = []
        for ref in validation.ca_certificate_refs:
            bundle = ca_bundle(view, ref.group, ref.kind, ObjectKey(key.namespace, ref.name))
            if isinstance(bundle, Problem):
                problems.append(bundle)
            else:
                bundles.append(bundle)
        if not bundles:
            accepted = Problem("NoValidCACertificate", problem_text(problems))
        ca_pem = "".join(bundles)
    elif validation.well_known_ca_certificates != "System":
        accepted = Problem(
            "Invalid",
            f"wellKnownCACertificates {validation.well_known_ca_certificates!r} is not known;"
            ' use "System" or caCertificateRefs',
        )
    if policy.spec.options:
        names = ", ".join(sorted(policy.spec.options))
        accepted = accepted or Problem("Invalid", f"spec.options: {names} not supported")
    sans = tuple(
        SubjectAltName("Hostname", san.hostname or "")
        if san.type == "Hostname"
        else SubjectAltName("URI", san.uri or "")
        for san in validation.subject_alt_names
    )
    broken = f"BackendTLSPolicy {key}: {accepted.message}" if accepted else None
    return PolicyState(
        policy.metadata.creation_timestamp or "",
        policy.metadata.generation,
        policy.spec.target_refs,
        UpstreamTLS(validation.hostname, None if broken else ca_pem, sans, broken),
        accepted,
        Problem(problems[0].reason, problem_text(problems)) if problems else None,
    )


def ca_bundle(
    view: View, group: str, kind: str, target: ObjectKey, kind_reason: str = "InvalidKind"
) -> str | Problem:
    """The PEM certificates that a CA reference names, or why there are none."""
    if group or kind != "ConfigMap":
        what = f"{group}/{kind}" if group else kind
        return Problem(kind_reason, f"{what} {target}: use a ConfigMap with the key ca.crt")
    config_map: ConfigMap | None = view.get("ConfigMap", target)
    if config_map is None:
        return Problem("InvalidCACertificateRef", f"ConfigMap {target} does not exist")
    pem = config_map.data.get("ca.crt")
    if pem is None:
        return Problem("InvalidCACertificateRef", f"ConfigMap {target} has no key ca.crt")
    try:
        return check_ca_bundle(pem)
    except BadCertificate as error:
        return Problem("InvalidCACertificateRef", f"ConfigMap {target}, key ca.crt: {error}")


def in_force(view: View, service: ObjectKey, port: ServicePort) -> ObjectKey | None:
    """The policy that counts for a Service port: one that names the port before one that names the
    Service, the older before the younger, then by name."""
    ranked = [
        (target.section_name is None, state.created, key)
        for key in view.bucket("policies_on", service)
        for state in [view.get("policies", key)]
        for target in state.targets
        if target.kind == "Service"
        and target.group == ""
        and target.name == service.name
        and target.section_name in (None, port.name)
    ]
    return min(ranked)[2] if ranked else None


def upstream_tls(view: View, service: ObjectKey, port: ServicePort) -> UpstreamTLS | None:
    key = in_force(view, service, port)
    if key is None:
        return None
    state: PolicyState = view.get("policies", key)
    return state.tls


def policy_status(controller_name: str) -> Callable[[View, ObjectKey], PolicyStatus | None]:
    def compute(view: View, key: ObjectKey) -> PolicyStatus | None:
        state: PolicyState = view.get("policies", key)
        gateways = sorted(
            {
                gateway
                for target in state.targets
                for _, gateway in view.bucket(
                    "gateways_of_service", ObjectKey(key.namespace, target.name)
                )
            }
        )
        if not gateways:
            return None
        accepted = state.accepted or misses(view, key, state)
        conditions = (
            condition("Accepted", state.generation, accepted),
            condition("ResolvedRefs", state.generation, state.resolved),
        )
        return PolicyStatus(
            ancestors=tuple(
                PolicyAncestorStatus(
                    ancestor_ref=ParentReference(
                        group=GROUP, kind="Gateway", namespace=gateway.namespace, name=gateway.name
                    ),
                    controller_name=controller_name,
                    conditions=conditions,
                )
                for gateway in gateways[:MAX_ANCESTORS]
            )
        )

    return compute


def misses(view: View, key: ObjectKey, state: PolicyState) -> Problem | None:
    """Why a policy counts for none of its targets: an older one has each of them, or it names a
    Service or port that is not there, or what is no Service."""
    problems = [_miss(view, key, target) for target in state.targets]
    found = [problem for problem in problems if problem is not None]
    if len(found) < len(problems):
        return None
    return Problem(found[0].reason, problem_text(found))


def _miss(
    view: View, key: ObjectKey, target: LocalPolicyTargetReferenceWithSectionName
) -> Problem | None:
    service_key, section = ObjectKey(key.namespace, target.name), target.section_name
    if target.group or target.kind != "Service":
        kind = f"{target.group}/{target.kind}" if target.group else target.kind
        message = f"targetRef {kind} {target.name}: a policy is for a Service; use one"
        return Problem("Invalid", message)
    service: Service | None = view.get("Service", service_key)
    if service is None:
        return Problem("TargetNotFound", f"Service {service_key} does not exist")
    if section is not None and section not in [port.name for port in service.spec.ports]:
        message = f"Service {service_key} has no port named {section}"
        return Problem("TargetNotFound", message)
    winner = _winner(view, service_key, section)
    if winner == key:
        return None
    message = f"BackendTLSPolicy {winner} is older and has Service {service_key}"
    return Problem("Conflicted", message + (f", port {section}" if section is not None else ""))


def _winner(view: View, service: ObjectKey, section: str | None) -> ObjectKey:
    """The oldest of the policies that select the same target and section."""
    rivals: list[tuple[str, ObjectKey]] = [
        (state.created, key)
        for key in view.bucket("policies_on", service)
        for state in [view.get("policies", key)]
        if any(
            (t.group, t.kind, t.name, t.section_name) == ("", "Service", service.name, section)
            for t in state.targets
        )
    ]
    return min(rivals)[1]
