"""What is spoken at the ports of pods: what the Services say whose endpoints they are.

Where several lead to one port of a pod, those that declare nothing do not count; it is HTTP if all
others say so, and HTTP/1 if all others say that: in doubt a connection is passed on as it is, and a
proxy never reads as HTTP what may be something else. A port that a BackendTLSPolicy is about speaks
TLS, whatever is inside. A port about whose requests a policy has rules is HTTP, unless a Service
says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from gateway.addresses import canonical
from gateway.backend_tls import in_force
from gateway.backends import numbers, slice_service
from gateway.declared import Speaks, speaks
from gateway.keys import PortKey
from gateway.node import Mesh
from mesh.model.core import EndpointSlice, Service
from mesh.model.derive import View
from mesh.model.meta import ObjectKey


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
        addresses = [canonical(one.addresses[0]) for one in piece.endpoints if one.addresses]
        services: list[tuple[ObjectKey, Service | None]] = [
            (name, view.get("Service", name)) for name in slice_service(key, piece)
        ]
        return frozenset(
            Said(address, number, said)
            for name, service in services
            if service is not None
            for port in service.spec.ports
            if port.protocol == "TCP"
            for said in ("other" if in_force(view, name, port) else speaks(port),)
            for number in numbers(piece, port)
            for address in addresses
        )

    return compute


def said_by_policy(key: object, places: frozenset[PortKey]) -> Iterator[Said]:
    """What policies say (for an index)."""
    for address, port in places:
        yield Said(address, port, "judged")


def said_in_slice(key: ObjectKey, said: frozenset[Said]) -> frozenset[Said]:
    """What a slice says (for an index)."""
    return said


def said_at(said: Said, _: object) -> Iterator[PortKey]:
    """The address and port that something is said of (for an index)."""
    yield said.address, said.port


def said_of(said: Said, _: object) -> Iterator[str]:
    """The address that something is said of (for an index)."""
    yield said.address


def spoken(view: View, place: PortKey) -> Speaks:
    """What is spoken at a pod's address and port; "http2": one HTTP or another."""
    said = {one.speaks for one in view.bucket("said_at", place)}
    declared: set[Speaks] = said - {"", "judged"}
    if len(declared) < 2:
        return next(iter(declared), "http2" if "judged" in said else "")
    return "other" if "other" in declared else "http2"
