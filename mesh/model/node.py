"""Node, core/v1: the few fields of it that Weft reads.

As with Pods, what is not known in `spec` and `status` is passed over, and the status is input:
kubelet writes it, Weft reads which addresses the node has.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from mesh.model.meta import LenientModel, Model, ObjectMeta


class NodeAddress(LenientModel, frozen=True, kw_only=True):
    """`type`: InternalIP, ExternalIP, Hostname, InternalDNS or ExternalDNS; `address` is an IP
    address only where the type says so."""

    type: str
    address: str


class NodeStatus(LenientModel, frozen=True, kw_only=True):
    addresses: tuple[NodeAddress, ...] = ()


class NodeSpec(LenientModel, frozen=True, kw_only=True):
    """`pod_cidrs`: from which the node's pods have their addresses, if that is so planned."""

    pod_cidrs: tuple[str, ...] = msgspec.field(default=(), name="podCIDRs")


class Node(Model, frozen=True, kw_only=True):
    api_version: str = "v1"
    kind: Literal["Node"] = "Node"
    metadata: ObjectMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()
