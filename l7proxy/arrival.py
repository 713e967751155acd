"""HTTP that comes out of a tunnel, where the policies of the pod it goes to are about requests.

The destination is the one that the tunnel was opened for: routes have been applied on the client's
node. Requests go on as they have come; the pod's ingress rules judge each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from l7proxy.acceptor import Admission, Client, Drainable
from l7proxy.direct import Direct
from l7proxy.entry import Selection, Standing
from l7proxy.exchange import Exchanges
from l7proxy.forwarding import ClientAddress, request_id, take_off, tell_client
from l7proxy.handles import Destination
from l7proxy.http_acceptor import HttpAcceptor
from l7proxy.mesh import GATEWAY
from l7proxy.message import RequestHead
from l7proxy.peers import Caller
from l7proxy.routing import RouteIndex
from l7proxy.streams import ConnectionInfo
from l7proxy.tls_stream import TLSStream
from mesh.model.flow import Encryption
from mesh.model.nodeconfig import Settings, WorkloadSection
from mesh.model.section import SectionKey


class Arrival:
    """The `Entry` of the requests of one tunnel, on behalf of `caller`, who has proved to be
    `identity`, to a pod of this node. `read`: the client's own node has read them as requests."""

    gateway = GATEWAY
    client_certificate: SectionKey | None = None

    encryption: Encryption | None = "mtls"
    by_host = False

    def __init__(
        self,
        caller: Caller,
        identity: str,
        pod: WorkloadSection,
        destination: Destination,
        direct: Direct,
        *,
        read: bool,
    ) -> None:
        self._caller = caller
        self._identity = identity
        self._pod = pod
        self._destination = destination
        self._direct = direct
        self._read = read

    def caller(self, client: str) -> Caller:
        return self._caller

    def standing(
        self, info: ConnectionInfo, authority: bytes, settings: Settings
    ) -> Standing | None:
        if self._pod.client_headers:
            return None
        match = self._direct.to(self._destination, self._pod.name, http2=False)
        return Standing(Selection("", match, self._destination), self._client)

    def arrive(self, head: RequestHead, info: ConnectionInfo, settings: Settings) -> ClientAddress:
        """What the proxy of the client's node has told of the client, or should have taken off, is
        told again here, by what is proved here."""
        caller = self._caller
        asked = take_off(head) and self._read  # by a route of the client's node
        if asked or self._pod.client_headers:
            # Behind a Gateway the address stands there already.
            tell_client(head, None if caller.gateway else caller.client, self._identity)
        return ClientAddress(self._client, request_id(head), self._read)

    @property
    def _client(self) -> str:
        client = self._caller.client or self._caller.told
        return "" if "/" in client else client

    def select(self, head: RequestHead, info: ConnectionInfo, routes: RouteIndex) -> Selection:
        match = self._direct.to(self._destination, self._pod.name, http2=head.version == b"2")
        return Selection("", match, self._destination)


class ArrivalPort(HttpAcceptor):
    """Serves one tunnel. `on_end` is called once it is over."""

    def __init__(
        self,
        exchanges: Exchanges,
        arrival: Arrival,
        admission: Admission,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(
            handler=functools.partial(exchanges.serve, arrival),
            settings=lambda: exchanges.settings,
            admission=admission,
            lane=functools.partial(exchanges.lane, arrival),
        )
        self._on_end = on_end

    def take(self, stream: TLSStream, client: Client) -> None:
        stream.set_protocol(self.protocol(client))

    def left(self, connection: Drainable, client: Client) -> None:
        self.open.discard(connection)
        self._on_end()
