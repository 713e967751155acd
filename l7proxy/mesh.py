"""The mesh's side of requests: which Service or pod a workload asked for, and whose routes count.

Producer routes (of the Service's own namespace) are for everybody, consumer routes (of another) for
clients of their namespace, which then see no others (GEP-1324). Who asks is known by address: the
kernel steers only workloads of this node here. Knows sections and heads, no sockets, no bpf.
"""

from __future__ import annotations

import ipaddress

from l7proxy import forwarding
from l7proxy.balance import endpoint_id
from l7proxy.direct import Direct
from l7proxy.entry import Reply, Selection, Standing
from l7proxy.field_rules import Refused
from l7proxy.forwarding import ClientAddress
from l7proxy.handles import Destination
from l7proxy.message import RequestHead
from l7proxy.peers import Caller, Peers
from l7proxy.route_compile import straight_to
from l7proxy.routing import RouteIndex
from l7proxy.streams import ConnectionInfo
from mesh.model.flow import Encryption
from mesh.model.nodeconfig import Endpoint, ServiceSection, Settings
from mesh.model.section import SectionKey, service_listener

GATEWAY = "mesh"


class _Service:
    """A Service port, as requests to it need it."""

    __slots__ = ("consumers", "destinations", "id", "label", "listener", "own")

    def __init__(self, section: ServiceSection) -> None:
        """Refused: an address is none."""
        place = (section.namespace, section.name, section.port)
        self.label = f"{section.namespace}/{section.name}:{section.port}"
        self.id = service_listener(*place)
        self.listener = self.id if section.producers else None
        self.consumers = {one: service_listener(*place, one) for one in section.consumers}
        self.own = straight_to(section.cluster, section.cluster)
        self.destinations = [
            Destination(_canonical(address, f"addresses[{i}]"), section.port)
            for i, address in enumerate(section.addresses)
        ]


class Mesh:
    """The `Entry` of requests of workloads."""

    gateway = GATEWAY
    client_certificate: SectionKey | None = None
    encryption: Encryption | None = None
    by_host = False

    def __init__(self, direct: Direct, peers: Peers) -> None:
        self._services: dict[SectionKey, _Service] = {}
        self._by_destination: dict[Destination, _Service] = {}
        self._peers = peers
        self._direct = direct

    # --- configuration --------------------------------------------------------------------------

    def put_service(self, key: SectionKey, section: ServiceSection) -> None:
        """Refused: nothing has changed."""
        service = _Service(section)
        self.remove_service(key)
        self._services[key] = service
        for destination in service.destinations:
            self._by_destination[destination] = service

    def remove_service(self, key: SectionKey) -> None:
        service = self._services.pop(key, None)
        if service is not None:
            for destination in service.destinations:
                # It may be another Service's by now.
                if self._by_destination.get(destination) is service:
                    del self._by_destination[destination]

    # --- Entry ------------------------------------------------------------------------------------

    def caller(self, client: str) -> Caller:
        return Caller(client)

    def arrive(self, head: RequestHead, info: ConnectionInfo, settings: Settings) -> ClientAddress:
        return forwarding.pass_on(head, info)

    def standing(
        self, info: ConnectionInfo, authority: bytes, settings: Settings
    ) -> Standing | None:
        try:
            return Standing(self._select(info, http2=False), info.peer[0])
        except Reply:
            return None

    def select(self, head: RequestHead, info: ConnectionInfo, routes: RouteIndex) -> Selection:
        found = self._select(info, http2=head.version == b"2")
        if found.match is not None:
            return found
        match = routes.match(found.listener, head)
        if match is not None and match.rule.client_headers:
            client = self._peers.at(info.peer[0])
            identity = client.spiffe_id if client is not None else ""
            forwarding.tell_client(head, info.peer[0], identity)
        return found._replace(match=match)

    def _select(self, info: ConnectionInfo, *, http2: bool) -> Selection:
        """What is known before the request is."""
        steered = info.steered
        if steered is None:
            raise Reply(421, "unknown_origin", "no workload was steered here")
        service = self._by_destination.get(steered.asked)
        if service is None:
            pod = self._peers.at(steered.asked.address)
            if pod is None:
                # A Service once: connections from here are not steered, nothing would judge them.
                raise Reply(503, "no_service", "no Service or pod has this address any more")
            match = self._direct.to(steered.asked, pod.name, http2=http2)
            return Selection("", match, steered.asked)
        client = self._peers.at(info.peer[0])
        listener = service.listener
        if client is not None:
            listener = service.consumers.get(client.namespace, listener)
        if listener is None:
            backend = steered.backend
            prefer = endpoint_id(Endpoint(*backend)) if backend is not None else None
            return Selection(service.id, service.own, steered.asked, prefer, service.label)
        return Selection(listener, None, steered.asked, service=service.label)


def _canonical(address: str, where: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        raise Refused(f"{where}: {address!r} is not an IP address") from None
