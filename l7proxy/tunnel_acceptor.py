"""The port for other nodes' proxies: mutual TLS, a preface, and a relay to a pod of this node.

Who connects must be the node of the pod for which it speaks, and have that pod's identity; where to
must be a pod of this node with the identity that was asked for. Whatever is wrong is told by an
alert, or in words once the peer is verified, and counted by reason.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable

from certs.errors import NotTrusted
from l7proxy import metrics, tunnel_wire
from l7proxy.acceptor import Acceptor, Admission, Client, plain
from l7proxy.arrival import Arrival, ArrivalPort
from l7proxy.credentials import ALPN, handshake_failure
from l7proxy.credentials import Peer as VerifiedPeer
from l7proxy.dial import DialFailed, keep_alive, reset_on_close
from l7proxy.direct import Direct
from l7proxy.exchange import Exchanges
from l7proxy.field_rules import Refused
from l7proxy.flows import FlowLog
from l7proxy.guard import POLICY_DENIED
from l7proxy.handles import Destination, Kernel, Steered
from l7proxy.peers import Caller, Peers, Source, keys_of
from l7proxy.reach import reach
from l7proxy.relay import Relay, Side
from l7proxy.rests import REST_S
from l7proxy.tasks import spawn
from l7proxy.tls_stream import TLSStream
from l7proxy.tunnel_rules import Refusal, judge, tells
from l7proxy.tunnel_wire import Answer, Preface, WireError
from l7proxy.tunnels import Pair, Tunnel, Tunnels
from l7proxy.turn import Turn
from mesh.model.flow import Peer
from mesh.model.nodeconfig import Settings, WorkloadSection
from mesh.model.section import node_key

# What this node may be about to be told: the sender's node may have heard of a pod first.
_PASSING = frozenset(("node_unknown", "pod_unknown", "pod_node", "target_unknown"))
# How long the next turn is waited for, seconds, and how many tunnels of a worker do so at once.
_NEXT_TURN_S = 4 * REST_S
_MAX_RESTS = 1024


class TunnelAcceptor(Acceptor):
    """Open tunnels stay through a drain, as relayed connections do. Until it is known for whom a
    connection is, it counts as its node's; then as the pod's."""

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        admission: Admission,
        flows: FlowLog,
        kernel: Kernel,
        peers: Peers,
        tunnels: Tunnels,
        exchanges: Exchanges,
        direct: Direct,
    ) -> None:
        super().__init__(settings=settings, admission=admission)
        self.flows = flows
        self.policies = exchanges.policies
        self._exchanges = exchanges
        self._direct = direct
        self._kernel = kernel
        self._peers = peers
        self.tunnels = tunnels
        self.resting: set[TLSStream] = set()

    async def begin(self, sock: socket.socket, client: Client) -> None:
        local = plain(sock.getsockname())
        stream = TLSStream(self._peers.credentials.server(), server_side=True)
        incoming = _Incoming(self, stream, client, local)
        if self._peers.at(client.address[0]) is not None:
            # No proxy's, so it need not cost a handshake.
            sock.close()
            incoming.refuse("pod_address")
            return
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: stream, sock)
            await incoming.run()
        except OSError:
            incoming.refuse("broken_off")

    async def verify(self, stream: TLSStream) -> VerifiedPeer:
        """Refusal, NotTrusted, ssl.SSLError, ConnectionError."""
        await stream.handshake()
        if stream.ssl.selected_alpn_protocol() != ALPN:
            raise Refusal("version", f"the peer does not speak {ALPN} (ALPN)")
        return self._peers.credentials.verify(stream.ssl)

    async def admit(
        self, client: Client, peer: VerifiedPeer, own: str, preface: Preface
    ) -> tuple[Source, WorkloadSection]:
        """Who asks for whom. Refusal."""
        deadline = asyncio.get_running_loop().time() + client.settings.connect_timeout_s / 2
        while True:
            try:
                return judge(self._peers, client.address[0], peer.spiffe_id, own, preface)
            except Refusal as refusal:
                if refusal.reason not in _PASSING:
                    raise
                try:
                    async with asyncio.timeout_at(deadline):
                        await self._peers.change()
                except TimeoutError:
                    raise refusal from None

    def count_for(self, source: Source, client: Client) -> Client:
        """A connection counts as this pod's from now on. Refusal: it has too many."""
        refused = self._admission.move(client.address[0], source.name, client.settings)
        if refused is not None:
            raise Refusal(refused, f"{source.name} has too many connections")
        return client._replace(address=(source.name, 0))

    def serve(
        self,
        incoming: _Incoming,
        caller: Caller,
        client: Client,
        source: Source,
        pod: WorkloadSection,
    ) -> ArrivalPort:
        """Judge its requests one by one."""
        preface = incoming.preface
        destination = Destination(preface.address, preface.port)
        read = preface.kind == "http"
        arrival = Arrival(caller, source.spiffe_id, pod, destination, self._direct, read=read)
        port = ArrivalPort(self._exchanges, arrival, self._admission, incoming.end)
        client = client._replace(steered=Steered(destination))
        port.take(incoming.stream, client)
        return port

    async def connect(self, incoming: _Incoming, preface: Preface) -> socket.socket:
        """To the pod. DialFailed."""
        timeout_s = self._settings().connect_timeout_s
        backend = await reach(self._kernel, preface.address, preface.port, timeout_s)
        incoming.backend.paced_by(backend.unread)
        reset_on_close(backend.sock)
        keep_alive(backend.sock)
        return backend.sock

    def watch(
        self,
        incoming: _Incoming,
        address: str,
        peer: VerifiedPeer,
        own: str,
        source: Source,
        destination: WorkloadSection,
    ) -> Tunnel:
        """Cut it off when it would not be let in any more."""

        node = self._peers.node_at(address)
        assert node is not None  # it was let in
        port = incoming.preface.port
        told = tells(destination, port)

        def still() -> str | None:
            try:
                _, now = judge(self._peers, address, peer.spiffe_id, own, incoming.preface)
            except Refusal as refusal:
                return refusal.reason
            return None if tells(now, port) == told else "destination_changed"

        tunnel = Tunnel(
            "in",
            incoming.stream,
            Pair(source, own, address),
            own,
            peer,
            self._peers.credentials.until(own),
            (*keys_of(source, destination), node_key(node.name)),
            still,
        )
        tunnel.cut = incoming.revoke
        self.tunnels.add(tunnel)
        return tunnel

    def admit_again(
        self, client: Client, stream: TLSStream, peer: VerifiedPeer, own: str
    ) -> Client | None:
        """For another turn; None: let it make a new tunnel, or hear there why not."""
        credentials, settings = self._peers.credentials, self._settings()
        if self.draining or stream.is_closing() or not credentials.in_force(stream.ssl, own, peer):
            return None
        try:
            credentials.judge(peer.chain)
        except NotTrusted:
            return None
        if credentials.problem(own, time.time()) is not None:
            return None
        if self._admission.enter(client.address[0], settings) is not None:
            return None
        return client._replace(settings=settings)

    def drain(self) -> None:
        super().drain()
        for stream in tuple(self.resting):
            stream.close()

    def cut_off(self) -> None:
        for connection in tuple(self.open):
            if isinstance(connection, _Incoming):
                connection.cut_off("drain_deadline")


# Pods have changed, or this node's own SVIDs; who the peer is has not.
_STILL_PROVEN = {
    "node_unknown",
    "pod_unknown",
    "pod_node",
    "target_unknown",
    "target_identity",
    "svid_missing",
}


class _Incoming(Relay):
    """A connection of another node's proxy."""

    preface: Preface

    def __init__(
        self, port: TunnelAcceptor, stream: TLSStream, client: Client, local: tuple[str, int]
    ) -> None:
        super().__init__()
        self.stream = stream
        self._port = port
        self._node = self._client = client
        self._local = local
        self._settings = client.settings
        self._from = Peer(*client.address)
        self._to = Peer(*local)
        self._verified: VerifiedPeer | None = None
        self._again = False  # it is not the tunnel's first turn
        self._tunnel: Tunnel
        self._serving: ArrivalPort | None = None

    async def run_again(self, peer: VerifiedPeer) -> None:
        """Wait for the tunnel's next turn. There is nothing to tell before it has begun: whoever
        asks for it makes a new tunnel if this one is closed."""
        port, stream = self._port, self.stream
        if port.draining or len(port.resting) >= _MAX_RESTS:
            stream.close()
            return
        port.resting.add(stream)
        try:
            async with asyncio.timeout(_NEXT_TURN_S):
                self.preface = await tunnel_wire.receive(stream, Preface)
        except (TimeoutError, OSError, WireError):
            stream.close()
            return
        finally:
            port.resting.discard(stream)
        own = port._peers.credentials.asked_for(stream.ssl)
        client = port.admit_again(self._node, stream, peer, own)
        if client is None or not self.preface.turns:
            stream.close()
            return
        self._client, self._settings = client, client.settings
        self._verified, self._again = peer, True
        await self.run()

    async def run(self) -> None:
        port, stream, client = self._port, self.stream, self._client
        try:
            async with asyncio.timeout(self._settings.head_timeout_s):
                if not self._again:
                    self._verified = await port.verify(stream)
                    self.preface = await tunnel_wire.receive(stream, Preface)
                peer, preface = self._verified, self.preface
                assert peer is not None
                own = port._peers.credentials.asked_for(stream.ssl)
                source, destination = await port.admit(client, peer, own, preface)
            if preface.kind == "proof":
                if stream.ssl.session_reused:
                    raise Refusal("session", "a session that is resumed proves nothing")
                port.tunnels.prove(Pair(source, own, client.address[0]), peer)
                self.answer_proof()
                return
            self._client = port.count_for(source, client)
            self._tell(peer, source, destination)
            caller = self._caller(source)
            if self._is_for_requests(caller) or tells(destination, preface.port):
                if self._again:  # they are read from a tunnel's beginning
                    self._leave()
                    return
                stream.write(tunnel_wire.encode(Answer()))
                port.open.add(self)
                port.watch(self, client.address[0], peer, own, source, destination)
                self._serving = port.serve(self, caller, self._client, source, destination)
                return
            backend = await port.connect(self, preface)
        except TimeoutError:
            self.refuse("preface_timeout" if self._verified is not None else "handshake_timeout")
        except ssl.SSLError as error:
            self.refuse(handshake_failure(error)[0])
        except ConnectionError:
            self.refuse("broken_off")
        except (Refusal, WireError, NotTrusted, DialFailed) as error:
            if isinstance(error, DialFailed):
                self.failed("ERROR", error.reason)
            self.refuse(error.reason, str(error))
        except BaseException:
            self.refuse("internal")
            raise
        else:
            if stream.is_closing() or port.draining:
                backend.close()
                if self._again:
                    self._leave()
                else:
                    self.refuse("draining" if port.draining else "broken_off")
                return
            stream.write(tunnel_wire.encode(Answer(turns=preface.turns)))
            port.open.add(self)
            self._tunnel = port.watch(self, client.address[0], peer, own, source, destination)
            self.watch(port.policies, caller, preface.address, preface.port)
            end = Turn(stream, self._over) if preface.turns else stream
            await self.join(end, backend)

    def _over(self) -> None:
        """The turn: the tunnel is free for the next."""
        port, peer = self._port, self._verified
        assert peer is not None
        port.tunnels.remove(self._tunnel)
        following = _Incoming(port, self.stream, self._node, self._local)
        spawn(following.run_again(peer), name="next turn of a tunnel")

    def _caller(self, source: Source) -> Caller:
        if source.gateway:
            return Caller(gateway=source.name, told=source.told, proven=True)
        pod = self._port._peers.pod(source.name)
        assert pod is not None  # it was judged
        return Caller(pod.addresses[0], proven=True)

    def _is_for_requests(self, caller: Caller) -> bool:
        """Policy lets the connection pass, but has its requests judged. Refusal: it does not."""
        policies, preface = self._port.policies, self.preface
        try:
            asker = policies.asker(caller)
        except Refused as error:
            raise Refusal("preface", f"told: {error}") from None
        verdict = policies.connection(asker, preface.address, preface.port)
        # In audit mode only what is known to be requests is read as such.
        if verdict.http or (verdict.audit_http and preface.kind == "http"):
            return True
        if not self.abides(policies, caller, preface.address, preface.port):
            raise Refusal(POLICY_DENIED, f"{preface.address} port {preface.port}: access denied")
        return False

    def cut_off(self, reason: str) -> None:
        super().cut_off(reason)
        if self._serving is not None:
            self.stream.abort()

    def drain(self) -> None:
        if self._serving is not None:
            self._serving.drain()

    def refuse(self, reason: str, why: str = "") -> None:
        """It does not become a tunnel."""
        self.failed("DROPPED", reason)
        metrics.TUNNEL_FAILURES.labels(reason).inc()
        if self._verified is not None:
            self.stream.write(tunnel_wire.refusal(reason, why))
            self.stream.close()
        elif not self.stream.is_closing():
            self.stream.abort()
        self.end()

    def answer_proof(self) -> None:
        """There is nothing else to it."""
        self.stream.write(tunnel_wire.encode(Answer()))
        self._leave()

    def _leave(self) -> None:
        """There is nothing to tell, and no reason to give."""
        self.stream.close()
        self._port.left(self, self._client)

    def pass_end_on(self, side: Side) -> None:
        """A sender of HTTP that ends its half asks for nothing more: a backend that does not end
        its own keeps no tunnel."""
        super().pass_end_on(side)
        if side is self.client and self.preface.kind == "http":
            wait_s = self._settings.drain_timeout_s
            self.client.loop.call_later(wait_s, self.cut_off, "backend_open")

    def revoke(self, reason: str) -> None:
        """It would not be let in any more. HTTP's sender ends it after the request in flight, and
        may as long as it is still who it has proved to be."""
        if self.preface.kind == "tcp" or reason not in _STILL_PROVEN:
            self.cut_off(reason)
        else:
            self.client.loop.call_later(self._settings.drain_timeout_s, self.cut_off, reason)

    def _tell(self, peer: VerifiedPeer, source: Source, destination: WorkloadSection) -> None:
        """Whom flow records name."""
        pod = self._port._peers.pod(source.name) if not source.gateway else None
        if pod is not None:
            self._from = Peer(
                pod.addresses[0], self.preface.port_of_source, spiffe_id=peer.spiffe_id
            )
        else:
            self._from = Peer(self._from.address, spiffe_id=peer.spiffe_id)
        self._to = Peer(self.preface.address, self.preface.port, spiffe_id=destination.spiffe_id)

    def ended(self) -> None:
        self._port.left(self, self._client)
        if self._serving is not None:  # its requests have told
            return
        self._port.flows.connection(
            self._from,
            self._to,
            self.verdict,
            self.reason,
            self.client.received,
            self.backend.received,
            "mtls" if self._verified is not None else "none",
            self.policy,
        )
