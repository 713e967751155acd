"""How a request came in: the one interface behind which a Gateway's port and the mesh differ.

The exchange asks an `Entry` who the client is, which rule the request gets and whom the proxy is
toward backends; all else of a request is the same for both. No I/O.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from l7proxy import forwarding
from l7proxy.filters import ListeningPort
from l7proxy.forwarding import ClientAddress
from l7proxy.message import RequestHead, host_of
from l7proxy.peers import Caller
from l7proxy.routing import PortIndex, RouteIndex, RouteMatchResult
from l7proxy.streams import ConnectionInfo
from mesh.model.flow import Encryption
from mesh.model.nodeconfig import PortSection, Settings
from mesh.model.section import SectionKey


class Reply(Exception):
    """The proxy answers a request itself. `reason` is counted, snake case."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail


class Selection(NamedTuple):
    """What a request gets. `listener` is the id whose routes were looked at; `match` None: none of
    them holds; `prefer`: the id of the endpoint to use if it is there; `service`: the Service port
    that was asked for, "<ns>/<name>:<port>"; `port`: where the client believes to be connected."""

    listener: str
    match: RouteMatchResult | None
    port: ListeningPort
    prefer: str | None = None
    service: str = ""


class Standing(NamedTuple):
    """What all requests of a connection have in common, or those for one authority. Of `selection`,
    `match` None: the routes of its listener decide. `client`: who asks. `adds`: the field lines
    that backends are told it by, up to a new request id (b"": none)."""

    selection: Selection
    client: str
    adds: bytes = b""


class Entry(Protocol):
    @property
    def gateway(self) -> str:
        """The name in metrics and logs: "<ns>/<name>" of a Gateway, or "mesh"."""

    @property
    def client_certificate(self) -> SectionKey | None:
        """What TLS backends are shown."""

    @property
    def encryption(self) -> Encryption | None:
        """How requests have come, where the way to the endpoint does not say it."""

    def caller(self, client: str) -> Caller:
        """On whose behalf backends are connected to, for a client's request (its address)."""

    @property
    def by_host(self) -> bool:
        """Requests of a connection may be for several listeners."""

    def standing(
        self, info: ConnectionInfo, authority: bytes, settings: Settings
    ) -> Standing | None:
        """`authority` counts where `by_host` says so. None: that depends on the request."""

    def arrive(self, head: RequestHead, info: ConnectionInfo, settings: Settings) -> ClientAddress:
        """Who asks. Takes claims that clients must not make off the head, and adds what every
        backend is told, in place."""

    def select(self, head: RequestHead, info: ConnectionInfo, routes: RouteIndex) -> Selection:
        """The rule for a request that has arrived; adds what its route has backends told, in
        place. Reply: there can be none."""


class GatewayPort:
    """A configured port of a Gateway; replaced in place when its section changes."""

    encryption: Encryption | None = None
    by_host = True

    def __init__(self, section: PortSection) -> None:
        self.section = section
        self._index = PortIndex(section)

    def caller(self, client: str) -> Caller:
        return Caller(client, self.section.gateway)

    def replace(self, section: PortSection) -> None:
        self.section = section
        self._index = PortIndex(section)

    @property
    def gateway(self) -> str:
        return self.section.gateway

    @property
    def client_certificate(self) -> SectionKey | None:
        return self.section.client_certificate

    def standing(
        self, info: ConnectionInfo, authority: bytes, settings: Settings
    ) -> Standing | None:
        host = host_of(authority)
        if info.tls and self._index.misdirected(info.sni, host):
            return None
        listener = self._index.select(host, info.sni)
        adds = forwarding.standing(info, authority, settings)
        if listener is None or adds is None:
            return None
        return Standing(Selection(listener.id, None, self.section), info.peer[0], adds)

    def arrive(self, head: RequestHead, info: ConnectionInfo, settings: Settings) -> ClientAddress:
        return forwarding.apply(head, info, settings)

    def select(self, head: RequestHead, info: ConnectionInfo, routes: RouteIndex) -> Selection:
        """The most specific listener for the request's host, which must be the one that the
        connection's server name selected."""
        if info.tls and self._index.misdirected(info.sni, head.host):
            raise Reply(421, "misdirected", "this connection is not for that host")
        listener = self._index.select(head.host, info.sni)
        if listener is None:
            raise Reply(404, "no_listener", "no listener for this host")
        return Selection(listener.id, routes.match(listener.id, head), self.section)
