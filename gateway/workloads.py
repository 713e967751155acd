"""Nodes, and Pods as workloads: who stands behind an address, on which node, with which identity,
and how it wants to be connected to.

Knows Nodes, Namespaces and Pods, and nothing of Services. A pod in its host's network has no
address of its own, and one that has ended has none any more: neither is a workload. An address that
two pods or two nodes claim is the younger's (addresses of what is gone are given out again).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from gateway.addresses import canonical
from gateway.annotations import APART, client_headers, may_use_sockmap, meshed, mtls, mtls_ports
from gateway.node import Mesh
from gateway.pod_ports import spoken
from mesh.model.core import Namespace
from mesh.model.derive import View
from mesh.model.identity import FIRST_WORKLOAD, WORKLOAD_BITS
from mesh.model.meta import ObjectKey
from mesh.model.node import Node
from mesh.model.nodeconfig import MtlsMode, NodeSection, WorkloadSection
from mesh.model.pod import Pod
from mesh.policy.demands import ALL

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


class NodeState(NamedTuple):
    created: str
    addresses: tuple[str, ...]


class NamespaceState(NamedTuple):
    """What holds for pods of a namespace that say nothing."""

    mtls: MtlsMode
    meshed: bool


class PodState(NamedTuple):
    """A pod that is a workload. `mtls` holds for ports that do not stand in `mtls_ports`; `meshed`:
    it is not left alone."""

    created: str
    addresses: tuple[str, ...]
    node: str
    sockmap: bool
    labels: LabelSet
    mtls: MtlsMode = "PERMISSIVE"
    mtls_ports: tuple[tuple[int, MtlsMode], ...] = ()
    meshed: bool = True
    client_headers: bool = False
    uid: str = ""


class Holder(NamedTuple):
    """The pod that has an address."""

    pod: ObjectKey
    node: str
    sockmap: bool
    meshed: bool

    def remote(self, mesh: Mesh) -> bool:
        """A meshed pod of another node."""
        return self.meshed and bool(mesh.node) and self.node not in ("", mesh.node)

    def local(self, mesh: Mesh) -> bool:
        return bool(mesh.node) and self.node == mesh.node


def node_states(view: View, key: ObjectKey) -> NodeState | None:
    """None: nothing is known of where it is."""
    node: Node = view.get("Node", key)
    found = dict.fromkeys(
        canonical(one.address) for one in node.status.addresses if one.type == "InternalIP"
    )
    return NodeState(node.metadata.creation_timestamp or "", tuple(found)) if found else None


def nodes_at(key: ObjectKey, node: NodeState) -> tuple[str, ...]:
    """The addresses of a node (for an index)."""
    return node.addresses


def node_holders(view: View, address: str) -> ObjectKey:
    found: list[tuple[str, ObjectKey]] = [
        (view.get("node_states", key).created, key) for key in view.bucket("nodes_at", address)
    ]
    return max(found)[1]


def nodes(view: View, key: ObjectKey) -> NodeSection | None:
    """None: all its addresses are others'."""
    node: NodeState = view.get("node_states", key)
    own = tuple(one for one in node.addresses if view.get("node_holders", one) == key)
    return NodeSection(key.name, own) if own else None


def namespaces(view: View, key: ObjectKey) -> NamespaceState:
    namespace: Namespace = view.get("Namespace", key)
    said = meshed(namespace)
    return NamespaceState(
        mtls(namespace) or _DEFAULT, key.name not in APART if said is None else said
    )


def of_namespace(view: View, name: str) -> NamespaceState:
    """Whether there is a Namespace object or not."""
    found: NamespaceState | None = view.get("namespaces", ObjectKey("", name))
    return found or NamespaceState(_DEFAULT, name not in APART)


def pods(view: View, key: ObjectKey) -> PodState | None:
    pod: Pod = view.get("Pod", key)
    status = pod.status
    written = (status.pod_ip, *(one.ip for one in status.pod_ips))
    # What is a node's stays a node's: the mesh must not take its own traffic for a pod's.
    addresses = tuple(
        address
        for address in dict.fromkeys(canonical(one) for one in written if one)
        if not view.bucket("nodes_at", address)
    )
    if not addresses or pod.spec.host_network or status.phase in ("Succeeded", "Failed"):
        return None
    state = PodState(
        pod.metadata.creation_timestamp or "",
        addresses,
        pod.spec.node_name or "",
        may_use_sockmap(pod),
        LabelSet(
            key.namespace,
            pod.spec.service_account_name,
            tuple(sorted(pod.metadata.labels.items())),
        ),
        client_headers=client_headers(pod),
        uid=pod.metadata.uid or "",
    )
    namespace = of_namespace(view, key.namespace)
    said = meshed(pod)
    if not (namespace.meshed if said is None else said):
        return state._replace(sockmap=False, mtls="DISABLE", meshed=False)
    ports = mtls_ports(pod)
    if ports is None:
        return state._replace(mtls="STRICT")
    return state._replace(mtls=mtls(pod) or namespace.mtls, mtls_ports=tuple(sorted(ports.items())))


def pods_at(key: ObjectKey, pod: PodState) -> tuple[str, ...]:
    """The addresses of a pod (for an index)."""
    return pod.addresses


def holders(view: View, address: str) -> Holder:
    found: list[tuple[PodState, ObjectKey]] = [
        (view.get("pods", key), key) for key in view.bucket("pods_at", address)
    ]
    pod, key = max(found, key=lambda one: (one[0].created, one[1]))
    return Holder(key, pod.node, pod.sockmap, pod.meshed)


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
        mode, modes = _modes(pod, view.get("demanded", key))
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
            spiffe_id=mesh.spiffe_id(key.namespace, pod.labels.service_account)
            if pod.meshed
            else "",
            mtls=mode,
            mtls_ports=modes,
            meshed=pod.meshed,
            client_headers=pod.client_headers,
            uid=pod.uid,
        )

    return compute


def sections(view: View, key: ObjectKey) -> WorkloadSection:
    """With what Services say of its ports, where that is asked for."""
    workload: WorkloadSection = view.get("workloads", key)
    if not workload.client_headers:
        return workload
    places = {(at, one.port) for at in workload.addresses for one in view.bucket("said_of", at)}
    ports = {place[1] for place in places if spoken(view, place) in ("http1", "http2")}
    return msgspec.structs.replace(workload, http_ports=tuple(sorted(ports)))


def _modes(pod: PodState, demanded: frozenset[int] | None) -> tuple[MtlsMode, dict[int, MtlsMode]]:
    """How a pod is connected to, and at which ports otherwise. `demanded`: where policy asks for
    mutual TLS."""
    ports = dict(pod.mtls_ports)
    if not demanded or not pod.meshed:
        return pod.mtls, ports
    if ALL in demanded:
        return "STRICT", {}
    return pod.mtls, {**ports, **dict.fromkeys(sorted(demanded), "STRICT")}
