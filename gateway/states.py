"""Each listener's state before the data plane is heard, and the PortSections that follow from it.

Joins the merged list, TLS and port ownership; what the data plane says is added in gateway.status.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from gateway.conditions import Problem
from gateway.keys import ParentKey, PortKey
from gateway.listeners import Merged
from gateway.places import Places, taken
from gateway.tls_refs import Frontend, GatewayTLS
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import Listener, PortSection
from mesh.model.section import SectionKey, certificate_key


class ListenerState(NamedTuple):
    """A listener of the merged list. `accepted`, `resolved`, `conflict`: why not, if not;
    `served`: it stands in a PortSection of each of `ports`."""

    owner: ParentKey
    name: str
    id: str
    protocol: str
    hostname: str | None
    kinds: tuple[str, ...]
    ports: tuple[PortKey, ...]
    certificates: tuple[SectionKey, ...]
    frontend: Frontend | None
    accepted: Problem | None
    resolved: Problem | None
    conflict: Problem | None
    served: bool


class GatewayState(NamedTuple):
    listeners: tuple[ListenerState, ...]
    client_certificate: SectionKey | None
    client_problem: Problem | None

    @property
    def served(self) -> frozenset[PortKey]:
        return frozenset(port for one in self.listeners if one.served for port in one.ports)


def states(view: View, key: ObjectKey) -> GatewayState:
    tls: GatewayTLS = view.get("gateway_tls", key)
    place: Places | None = view.get("places", key)
    addresses = place.bind if place is not None else ()
    listeners: tuple[Merged, ...] = view.get("merged", key)
    client = tls.client
    return GatewayState(
        tuple(_state(view, key, one, tls, addresses) for one in listeners),
        certificate_key(*client) if isinstance(client, ObjectKey) else None,
        client if isinstance(client, Problem) else None,
    )


def _state(
    view: View, key: ObjectKey, one: Merged, tls: GatewayTLS, addresses: tuple[str, ...]
) -> ListenerState:
    spec = one.spec
    accepted, resolved = one.problem or one.conflict, None
    certificates: tuple[ObjectKey, ...] = ()
    frontend: Frontend | None = None
    if spec.protocol == "HTTPS" and one.problem is None:
        certificates, resolved = tls.certificates[one.id]
        frontend = tls.frontends.get(spec.port)
        if frontend is not None:
            resolved = resolved or frontend.resolved
    if one.bad_kinds:
        kinds = ", ".join(one.bad_kinds)
        resolved = resolved or Problem(
            "InvalidRouteKinds", f"allowedRoutes.kinds: {kinds} cannot attach to {spec.protocol}"
        )
    claimed = tuple((address, spec.port) for address in addresses)
    ports: list[PortKey] = []
    if accepted is None:
        for port in claimed:
            lost = taken(view, key, port)
            if lost is None:
                ports.append(port)
            else:
                accepted = accepted or lost
    served = bool(ports) and bool(one.kinds) and (spec.protocol == "HTTP" or bool(certificates))
    if frontend is not None:
        # The port still answers, by refusing every handshake.
        accepted = accepted or frontend.accepted
    return ListenerState(
        one.owner,
        spec.name,
        one.id,
        spec.protocol,
        spec.hostname.lower() if spec.hostname else None,
        one.kinds,
        tuple(ports),
        tuple(certificate_key(*secret) for secret in certificates),
        frontend,
        accepted,
        resolved,
        one.conflict,
        served,
    )


def ports(view: View, port: PortKey) -> PortSection | None:
    """The section of a port that a Gateway owns; None while no listener can be served on it."""
    key: ObjectKey = view.get("owners", port)
    state: GatewayState = view.get("states", key)
    listeners = [one for one in state.listeners if one.served and port in one.ports]
    if not listeners:
        return None
    protocol: Literal["HTTP", "HTTPS"] = "HTTPS" if listeners[0].protocol == "HTTPS" else "HTTP"
    frontend = listeners[0].frontend
    return PortSection(
        address=port[0],
        port=port[1],
        protocol=protocol,
        gateway=str(key),
        listeners=tuple(
            Listener(one.id, one.hostname, one.certificates)
            for one in sorted(listeners, key=lambda one: one.id)
        ),
        client_validation=frontend.validation if frontend is not None else None,
        client_certificate=state.client_certificate,
    )
