"""Cluster IPs: which of those that a Service asks for it has.

An address means one thing to everybody: where a Service asks for one that is a pod's or a node's,
or that no Service can have, or that another Service has (the older, then the first by name), it
does not get it, nobody is steered to it by that address, and it is told why.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, TypeAlias

from gateway.addresses import canonical
from gateway.node import Mesh
from gateway.workloads import Holder
from mesh.model.core import Service
from mesh.model.derive import View
from mesh.model.meta import ObjectKey

Frontend: TypeAlias = tuple[str, int, Literal["TCP", "UDP"]]


class Claim(NamedTuple):
    """Sorts by age, then name."""

    created: str
    key: ObjectKey
    addresses: tuple[str, ...]


class ClusterIPs(NamedTuple):
    """`addresses`: those that a Service has; `ports`: what is reached there; `refused`: why it does
    not have the others."""

    addresses: tuple[str, ...]
    ports: tuple[tuple[int, Literal["TCP", "UDP"]], ...]
    refused: tuple[str, ...] = ()


def claims(view: View, key: ObjectKey) -> Claim | None:
    """None: the Service is headless or an ExternalName, or has no address yet."""
    service: Service = view.get("Service", key)
    if service.spec.type == "ExternalName":
        return None
    asked = service.spec.cluster_ips or (service.spec.cluster_ip,)
    found = dict.fromkeys(canonical(one) for one in asked if one and one != "None")
    if not found:
        return None
    return Claim(service.metadata.creation_timestamp or "", key, tuple(found))


def claimed(key: ObjectKey, claim: Claim) -> tuple[str, ...]:
    """The addresses that a Service asks for (for an index)."""
    return claim.addresses


def owners(view: View, address: str) -> ObjectKey:
    """The Service that comes first where several ask for an address."""
    found: list[Claim] = [
        view.get("service_claims", key) for key in view.bucket("claimed_by", address)
    ]
    return min(found).key


def cluster_ips(mesh: Mesh) -> Callable[[View, ObjectKey], ClusterIPs]:
    def compute(view: View, key: ObjectKey) -> ClusterIPs:
        claim: Claim = view.get("service_claims", key)
        service: Service = view.get("Service", key)
        found = {one: _refusal(view, mesh, key, one) for one in claim.addresses}
        ports = ((port.port, port.protocol) for port in service.spec.ports)
        return ClusterIPs(
            tuple(address for address, why in found.items() if not why),
            tuple((number, protocol) for number, protocol in ports if protocol != "SCTP"),
            tuple(
                f"cluster IP {address} {why}, so nobody is sent to this Service by it; give the"
                " Service another"
                for address, why in found.items()
                if why
            ),
        )

    return compute


def addresses(key: ObjectKey, found: ClusterIPs) -> tuple[str, ...]:
    """The addresses that a Service has (for an index)."""
    return found.addresses


def frontends(key: ObjectKey, found: ClusterIPs) -> Iterator[Frontend]:
    """The frontends of a Service (for an index): each address that it has with each port."""
    for address in found.addresses:
        for number, protocol in found.ports:
            yield address, number, protocol


def whose(view: View, address: str) -> str:
    """The Pod or Service that has an address; "": neither."""
    holder: Holder | None = view.get("holders", address)
    if holder is not None:
        return f"Pod {holder.pod}"
    return "".join(f"Service {key}" for key in view.bucket("cluster_ips_at", address))


def _refusal(view: View, mesh: Mesh, key: ObjectKey, address: str) -> str:
    """Why the Service does not have the address; "": it has."""
    ip = ipaddress.ip_address(address)
    for what, applies in (
        ("the unspecified", ip.is_unspecified),
        ("a loopback", ip.is_loopback),
        ("a link-local", ip.is_link_local),
        ("a multicast", ip.is_multicast),
        ("the broadcast", address == "255.255.255.255"),
    ):
        if applies:
            return f"is {what} address, which no Service can have"
    if address in mesh.addresses:
        return "is this node's mesh address"
    if nodes := view.bucket("nodes_at", address):
        return f"is the address of Node {min(nodes).name}"
    holder: Holder | None = view.get("holders", address)
    if holder is not None:
        return f"is the address of Pod {holder.pod}"
    owner: ObjectKey = view.get("service_owners", address)
    return "" if owner == key else f"belongs to Service {owner}, which comes first (age, then name)"
