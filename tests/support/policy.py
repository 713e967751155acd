"""Sections of policy for tests of the proxy: who is who is said by hand."""

from __future__ import annotations

from typing import Any

from mesh.model.nodeconfig import Section, WorkloadSection
from mesh.model.policyconfig import Direction, HttpRule, PolicyRule, PolicySection, PortRange
from mesh.model.section import SectionKey, policy_key, workload_key

FREE = Direction()


def pod(
    name: str, address: str, identity: int, namespace: str = "shop", **rest: Any
) -> dict[SectionKey, Section]:
    """A workload of this node."""
    section = WorkloadSection(
        namespace, name, (address,), node="n1", local=True, identity=identity, **rest
    )
    return {workload_key(namespace, name): section}


def closed(*rules: PolicyRule, audit: bool = False) -> Direction:
    """Default deny but for these."""
    return Direction(True, audit, ("NetworkPolicy shop/p",), rules)


def policy(
    name: str,
    address: str,
    identity: int,
    *,
    ingress: Direction = FREE,
    egress: Direction = FREE,
    namespace: str = "shop",
) -> dict[SectionKey, Section]:
    section = PolicySection(namespace, name, identity, (address,), ingress, egress)
    return {policy_key(namespace, name): section}


def rule(source: str, *peers: int, port: int | None = None, **rest: Any) -> PolicyRule:
    """No peers: everybody; no port: all of them."""
    ports = (PortRange("TCP", port, port),) if port is not None else ()
    return PolicyRule(source, frozenset(peers) if peers else None, ports, **rest)


def http(**parts: Any) -> tuple[HttpRule, ...]:
    return (HttpRule(**parts),)
