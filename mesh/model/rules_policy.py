"""What the API server asks of policies beyond their schemas.

Sources: Kubernetes' validation of networking.k8s.io/v1 NetworkPolicy; the CRD of
CiliumNetworkPolicy. What only Cilium's agent asks of its policies is asked in mesh.policy.cilium,
for a policy that breaks it must still fail closed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from mesh.model.ciliumnetworkpolicy import CIDRRule, CiliumPolicySpec
from mesh.model.networkpolicy import (
    IPBlock,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    NetworkPolicySpec,
    PodSelector,
    SelectorRequirement,
)
from mesh.model.rules import Check, Finding, duplicates
from mesh.model.scalars import LABEL_KEY
from mesh.model.schema import found

_KEY = re.compile(LABEL_KEY)
PORT_NAME = re.compile(r"(?=.{1,15}\Z)(?=.*[a-z])(?!.*--)[a-z0-9]([a-z0-9-]*[a-z0-9])?\Z")


def _values(requirement: SelectorRequirement) -> Finding:
    wants = requirement.operator in ("In", "NotIn")
    if wants and not requirement.values:
        return f"operator {requirement.operator} has no values; add some"
    if not wants and requirement.values:
        return f"operator {requirement.operator} has values; remove them"
    return None


def _keys(selector: PodSelector) -> Finding:
    keys = (*selector.match_labels, *(one.key for one in selector.match_expressions))
    wrong = [
        found(key) for key in keys if len(key.rpartition("/")[0]) > 253 or not _KEY.search(key)
    ]
    return f"found {', '.join(wrong)}; write it as in example.com/name" if wrong else None


def _peer(peer: NetworkPolicyPeer) -> Finding:
    selectors = peer.pod_selector is not None or peer.namespace_selector is not None
    if peer.ip_block is None:
        return (
            None if selectors else "has none; add one, or leave out the peer's list for everybody"
        )
    return "has ipBlock and a selector; make them two peers" if selectors else None


def _block(block: IPBlock) -> Finding:
    """`cidr` is one, and each of `except` is within it, and not all of it."""
    try:
        whole = ipaddress.ip_network(block.cidr)
    except ValueError as error:
        return f"cidr is {found(block.cidr)}: {error}"
    for index, text in enumerate(block.except_):
        try:
            part = ipaddress.ip_network(text)
        except ValueError as error:
            return f"except[{index}] is {found(text)}: {error}"
        if part.version != whole.version or part == whole or not part.subnet_of(whole):  # type: ignore[arg-type]
            return f"except[{index}] is {text}, which is not a part of {block.cidr}"
    return None


def _port(port: NetworkPolicyPort) -> Finding:
    number = port.port
    if isinstance(number, str):
        return None if PORT_NAME.match(number) else f"port is {found(number)}"
    if number is not None and not 1 <= number <= 65535:
        return f"port is {number}"
    return None


def _end_port(port: NetworkPolicyPort) -> Finding:
    if port.end_port is None:
        return None
    if not isinstance(port.port, int):
        return "endPort goes with a port number; add it"
    if not port.port <= port.end_port <= 65535:
        return f"endPort is {port.end_port}, port {port.port}"
    return None


def _types(types: Sequence[str]) -> Finding:
    return "one stands twice; remove one" if duplicates(types) else None


def _one_selector(spec: CiliumPolicySpec) -> Finding:
    given = sum(one is not None for one in (spec.endpoint_selector, spec.node_selector))
    return None if given == 1 else f"has {given or 'none'} of them"


def _one_cidr(rule: CIDRRule) -> Finding:
    given = sum(one is not None for one in (rule.cidr, rule.cidr_group_ref))
    return None if given == 1 else f"has {given or 'none'} of them"


CHECKS: tuple[Check, ...] = (
    Check(SelectorRequirement, None, "In and NotIn have values, others none", _values),
    Check(PodSelector, None, "keys must be qualified names", _keys),
    Check(
        NetworkPolicyPeer,
        None,
        "a peer is selectors, or an ipBlock alone",
        _peer,
    ),
    Check(IPBlock, None, "cidr must be a CIDR, except CIDRs that are parts of it", _block),
    Check(NetworkPolicyPort, None, "port must be 1 to 65535 or a port's name", _port),
    Check(NetworkPolicyPort, None, "endPort must be port or above", _end_port),
    Check(NetworkPolicySpec, "policy_types", "must be unique", _types),
    Check(
        CiliumPolicySpec,
        None,
        "exactly one of endpointSelector and nodeSelector is required",
        _one_selector,
    ),
    Check(CIDRRule, None, "exactly one of cidr and cidrGroupRef is required", _one_cidr),
)
