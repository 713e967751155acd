"""LoadBalancerEntries for what clients may ask pods for directly: each address of a pod with each
port that a Service leads to, headless or not, ready or not; the pod itself is the only backend.

A port about whose requests a policy has rules is HTTP as well, unless a Service says otherwise.

Routes say nothing here: they are about a Service's cluster IP. So what a pod's port speaks is what
Services declare. Where several lead to one port of a pod, those that declare nothing do not count;
it is HTTP if all others say so, and HTTP/1 if all others say that: in doubt a connection is passed
on as it is, and a proxy never reads as HTTP what may be something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from gateway.backends import numbers, slice_service
from gateway.declared import Speaks, speaks
from gateway.entries import backend
from gateway.keys import PortKey
from gateway.node import Mesh
from gateway.workloads import Holder
from mesh.model.core import EndpointSlice, Service
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import Endpoint, LoadBalancerEntry


class Said(NamedTuple):
    """Some Service says what is spoken at a pod's address and port; "judged": a policy has rules
    about requests there."""

    address: str
    port: int
    speaks: Speaks | Literal["judged"]


def slice_ports(mesh: Mesh) -> Callable[[View, ObjectKey], frozenset[Said] | None]:
    def compute(view: View, key: ObjectKey) -> frozenset[Said] | None:
        piece: EndpointSlice = view.get("EndpointSlice", key)
        if not mesh.on or piece.address_type == "FQDN":
            return None
        addresses = [one.addresses[0] for one in piece.endpoints if one.addresses]
        services: list[Service | None] = [
            view.get("Service", name) for name in slice_service(key, piece)
        ]
        return frozenset(
            Said(address, number, said)
            for service in services
            if service is not None
            for port in service.spec.ports
            if port.protocol == "TCP"
            for said in (speaks(port),)
            for number in numbers(piece, port)
            for address in addresses
        )

    return compute


def said_by_policy(key: object, places: frozenset[tuple[str, int]]) -> Iterator[Said]:
    """What policies say (for an index)."""
    for address, port in places:
        yield Said(address, port, "judged")


def said_in_slice(key: ObjectKey, said: frozenset[Said]) -> frozenset[Said]:
    """What a slice says (for an index)."""
    return said


def said_at(said: Said, _: object) -> Iterator[PortKey]:
    """The address and port that something is said of (for an index)."""
    yield said.address, said.port


def pod_entry(mesh: Mesh) -> Callable[[View, PortKey], LoadBalancerEntry | None]:
    def compute(view: View, place: PortKey) -> LoadBalancerEntry | None:
        address, port = place
        holder: Holder | None = view.get("holders", address)
        if holder is None or view.bucket("service_frontends", (address, port, "TCP")):
            return None
        declared = {one.speaks for one in view.bucket("said_at", place)} - {""}
        http = bool(declared) and "other" not in declared and mesh.at(address) is not None
        sockmap = http and declared - {"judged"} == {"http1"}
        return LoadBalancerEntry(
            address=address,
            port=port,
            protocol="TCP",
            backends=(backend(view, mesh, Endpoint(address, port), sockmap),),
            source=f"Pod/{holder.pod}",
            http=http,
            sockmap=sockmap,
        )

    return compute
