"""Nodes, and Pods as workloads: who stands behind an address, on which node, with which identity,
and how it wants to be connected to.

Knows Nodes, Namespaces and Pods, and nothing of Services. A pod in its host's network has no
address of its own, and one that has ended has none any more: neither is a workload. An address that
two pods claim is the younger's (addresses of deleted pods are given out again).
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from gateway.annotations import may_use_sockmap, mtls, mtls_ports
from gateway.node import Mesh
from mesh.model.core import Namespace
from mesh.model.derive import View
from mesh.model.identity import FIRST_WORKLOAD, WORKLOAD_BITS
from mesh.model.meta import ObjectKey
from mesh.model.node import Node
from mesh.model.nodeconfig import MtlsMode, NodeSection, WorkloadSection
from mesh.model.pod import Pod

_DEFAULT: MtlsMode = "PERMISSIVE"


class LabelSet(NamedTuple):
    """What tells workloads apart: pods with the same are one identity."""

    namespace: str
    service_account: str
    labels: tuple[tuple[str, str], ...]

    @property
    def number(self) -> int:
        """24 bits that follow from the set alone, so that all nodes and restarts agree."""
        digest = hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=8).digest()
        room = (1 << WORKLOAD_BITS) - FIRST_WORKLOAD
        return FIRST_WORKLOAD + int.from_bytes(digest, "big") % room


class Mtls(NamedTuple):
    """`mode` holds for ports that do not stand in `ports`; None: the namespace's."""

    mode: MtlsMode | None
    ports: tuple[tuple[int, MtlsMode], ...] = ()


class PodState(NamedTuple):
    """A pod that is a workload."""

    created: str
    addresses: tuple[str, ...]
    node: str
    sockmap: bool
    labels: LabelSet
    mtls: Mtls


class Holder(NamedTuple):
    """The pod that has an address."""

    pod: ObjectKey
    node: str
    sockmap: bool

    def remote(self, mesh: Mesh) -> bool:
        return bool(mesh.node) and self.node not in ("", mesh.node)

    def local(self, mesh: Mesh) -> bool:
        return bool(mesh.node) and self.node == mesh.node


def nodes(view: View, key: ObjectKey) -> NodeSection | None:
    """None: nothing is known of where it is."""
    node: Node = view.get("Node", key)
    found = dict.fromkeys(
        # As all other addresses are written, that they may be compared.
        str(ipaddress.ip_address(one.address))
        for one in node.status.addresses
        if one.type == "InternalIP"
    )
    return NodeSection(key.name, tuple(found)) if found else None


def namespaces(view: View, key: ObjectKey) -> MtlsMode:
    """How the pods of a namespace are connected to if they say nothing."""
    namespace: Namespace = view.get("Namespace", key)
    return mtls(namespace) or _DEFAULT


def pods(view: View, key: ObjectKey) -> PodState | None:
    pod: Pod = view.get("Pod", key)
    status = pod.status
    found = dict.fromkeys((status.pod_ip, *(one.ip for one in status.pod_ips)))
    addresses = tuple(address for address in found if address)
    if not addresses or pod.spec.host_network or status.phase in ("Succeeded", "Failed"):
        return None
    account = pod.spec.service_account_name or "default"
    return PodState(
        pod.metadata.creation_timestamp or "",
        addresses,
        pod.spec.node_name or "",
        may_use_sockmap(pod),
        LabelSet(key.namespace, account, tuple(sorted(pod.metadata.labels.items()))),
        _mtls(pod),
    )


def _mtls(pod: Pod) -> Mtls:
    ports = mtls_ports(pod)
    return Mtls("STRICT") if ports is None else Mtls(mtls(pod), tuple(sorted(ports.items())))


def pods_at(key: ObjectKey, pod: PodState) -> tuple[str, ...]:
    """The addresses of a pod (for an index)."""
    return pod.addresses


def holders(view: View, address: str) -> Holder:
    found: list[tuple[PodState, ObjectKey]] = [
        (view.get("pods", key), key) for key in view.bucket("pods_at", address)
    ]
    pod, key = max(found, key=lambda one: (one[0].created, one[1]))
    return Holder(key, pod.node, pod.sockmap)


def label_sets(key: ObjectKey, pod: PodState) -> Iterator[LabelSet]:
    """The labels of a pod (for an index)."""
    yield pod.labels


def numbers(view: View, labels: LabelSet) -> int:
    return labels.number


def sets_of_number(labels: LabelSet, number: int) -> Iterator[int]:
    """The number of a set of labels (for an index)."""
    yield number


def identities(view: View, labels: LabelSet) -> int:
    """The number, with what tells it from others of the same number above its 24 bits: all sets
    with one number are known, so the same ones always get the same identities."""
    number: int = view.get("set_numbers", labels)
    rivals = view.bucket("sets_of_number", number)
    rank = sorted(rivals).index(labels) if len(rivals) > 1 else 0
    return number | rank << WORKLOAD_BITS


def workloads(mesh: Mesh) -> Callable[[View, ObjectKey], WorkloadSection | None]:
    def compute(view: View, key: ObjectKey) -> WorkloadSection | None:
        pod: PodState = view.get("pods", key)
        held = (view.get("holders", address) for address in pod.addresses)
        addresses = tuple(
            address
            for address, holder in zip(pod.addresses, held, strict=True)
            if holder.pod == key
        )
        if not addresses:
            return None
        return WorkloadSection(
            namespace=key.namespace,
            name=key.name,
            addresses=addresses,
            node=pod.node,
            local=bool(mesh.node) and pod.node == mesh.node,
            service_account=pod.labels.service_account,
            labels=dict(pod.labels.labels),
            identity=view.get("identities", pod.labels),
            sockmap=pod.sockmap,
            spiffe_id=mesh.spiffe_id(key.namespace, pod.labels.service_account),
            mtls=pod.mtls.mode or view.get("namespaces", ObjectKey("", key.namespace)) or _DEFAULT,
            mtls_ports=dict(pod.mtls.ports),
        )

    return compute
