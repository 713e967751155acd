"""Pods as workloads: who stands behind an address, on which node, with which identity.

Knows Pods and nothing of Services. A pod in its host's network has no address of its own, and one
that has ended has none any more: neither is a workload. An address that two pods claim is the
younger's (addresses of deleted pods are given out again).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from gateway.annotations import may_use_sockmap
from gateway.node import Mesh
from mesh.model.derive import View
from mesh.model.identity import FIRST_WORKLOAD, WORKLOAD_BITS
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import WorkloadSection
from mesh.model.pod import Pod


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


class PodState(NamedTuple):
    """A pod that is a workload."""

    created: str
    addresses: tuple[str, ...]
    node: str
    sockmap: bool
    labels: LabelSet


class Holder(NamedTuple):
    """The pod that has an address."""

    pod: ObjectKey
    node: str
    sockmap: bool

    def remote(self, mesh: Mesh) -> bool:
        return bool(mesh.node) and self.node not in ("", mesh.node)

    def local(self, mesh: Mesh) -> bool:
        return bool(mesh.node) and self.node == mesh.node


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
    )


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
        )

    return compute
