"""The relay: a workload's TCP connection and one to the backend that the kernel chose, joined.

Bytes pass as they are, each way no faster than the other side takes them. The end of one side's
bytes is passed on by itself; what is no orderly end is passed on as a reset, so that nobody takes
half a conversation for a whole one. Sockets are set so from the start: until both ends have been
passed on, every close resets, that of a killed worker's too. A backend of another node is connected
to through a tunnel where `peers` says so.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial

from l7proxy import metrics
from l7proxy.acceptor import Acceptor, Admission, Client
from l7proxy.dial import DialFailed, dial, keep_alive, reset_on_close
from l7proxy.flows import FlowLog
from l7proxy.guard import POLICY_AUDIT, POLICY_DENIED, Watch
from l7proxy.handles import Destination, Steered
from l7proxy.http1_link import Link
from l7proxy.peers import Caller, Direct, NoWay, Peers, Tunnelled, identities
from l7proxy.policies import Policies
from l7proxy.pool import DENIED_THERE
from l7proxy.tasks import spawn
from l7proxy.tls_stream import TLSStream
from l7proxy.tunnel import Digger
from l7proxy.turn import Turn
from mesh.model.flow import Peer, Verdict
from mesh.model.nodeconfig import Settings


class RelayAcceptor(Acceptor):
    """Connections without a backend are closed. Those that are open stay through a drain, up to its
    deadline: nobody knows when their conversations end."""

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        admission: Admission,
        identify: Callable[[int], Steered | None],
        flows: FlowLog,
        peers: Peers,
        digger: Digger,
        policies: Policies,
    ) -> None:
        super().__init__(settings=settings, admission=admission, identify=identify)
        self.flows = flows
        self.policies = policies
        self._peers = peers
        self._digger = digger

    async def begin(self, sock: socket.socket, client: Client) -> None:
        backend = client.steered.backend if client.steered is not None else None
        relay = _Steered(self, client, backend or Destination("", 0))
        try:
            reset_on_close(sock)
            if backend is None:
                relay.failed("DROPPED", "no_backend")
                return
            upstream = await self._connect(relay, client, backend)
            if upstream is None:
                return
            if self.draining:
                relay.failed("ERROR", "draining")
                _abandon(upstream)
                return
            self.open.add(relay)
            relay.watch(self.policies, Caller(client.address[0]), *backend)
            await relay.join(sock, upstream)
        except DialFailed as error:
            relay.failed("DROPPED" if error.reason == DENIED_THERE else "ERROR", error.reason)
        finally:
            if not relay.joined:
                sock.close()
                relay.end()

    async def _connect(
        self, relay: _Steered, client: Client, backend: Destination
    ) -> socket.socket | TLSStream | Turn | None:
        """To the backend; None: it may not be connected to. DialFailed."""
        timeout_s = client.settings.connect_timeout_s
        caller = Caller(client.address[0])
        if not relay.abides(self.policies, caller, *backend):
            return None
        # The kernel sends nobody here but for pods of other nodes.
        way = await self._peers.settled_way(caller, *backend, timeout_s, pod=True)
        if isinstance(way, NoWay):
            relay.failed("DROPPED", way.reason)
            return None
        relay.way = way
        if isinstance(way, Tunnelled):
            tunnel = await self._digger.open(
                caller, way, *backend, "tcp", own_port=client.address[1], turns=True
            )
            tunnel.cut = relay.cut_off
            return tunnel.end
        upstream = await dial(*backend, timeout_s)
        reset_on_close(upstream)
        keep_alive(upstream)
        return upstream

    def cut_off(self) -> None:
        for connection in tuple(self.open):
            if isinstance(connection, Relay):
                connection.cut_off("drain_deadline")


def _abandon(upstream: socket.socket | TLSStream | Turn) -> None:
    if isinstance(upstream, socket.socket):
        upstream.close()
    else:
        upstream.abort()


class Relay:
    """Two connections, joined. Failures count once, the first of them. `policy` is what let it
    pass or did not, or (audited) would not have."""

    def __init__(self) -> None:
        self.verdict: Verdict = "FORWARDED"
        self.reason = ""
        self.policy = ""
        self._audited = False
        self._watch: Watch | None = None
        self._halves = 2  # directions whose end has not been passed on
        self._ended = False
        self.joined = False
        self.running = False  # both sides are there
        self.client = Side(self)
        self.backend = Side(self)
        self.client.other, self.backend.other = self.backend, self.client

    async def join(
        self, client: socket.socket | TLSStream | Turn, backend: socket.socket | TLSStream | Turn
    ) -> None:
        self.joined = True  # from now on the sockets are the transports'
        for side, end in ((self.client, client), (self.backend, backend)):
            try:
                await side.take(end)
            except OSError:
                self.failed("ERROR", "join_failed")
                if side.transport is None:
                    side.lost = True
                    _abandon(end)
        if self.reason:  # one side was gone before the other was there
            self.cut_off(self.reason)
            self._end_if_lost()
            return
        self.running = True
        for side in (self.client, self.backend):
            side.pass_early_on()

    def abides(self, policies: Policies, caller: Caller, address: str, port: int) -> bool:
        """Whether policy lets bytes pass to a pod, unjudged from then on; else it has failed."""
        found = policies.connection(policies.asker(caller), address, port, pod=True)
        self.policy = found.audit or found.source
        if not found.allowed or found.http:
            metrics.POLICY.labels("connection", "denied").inc()
            self.failed("DROPPED", POLICY_DENIED)
            return False
        if found.audit and not self._audited:
            self._audited = True
            metrics.POLICY.labels("connection", "audited").inc()
        return True

    def watch(self, policies: Policies, caller: Caller, address: str, port: int) -> None:
        """Policies may change while it is open: then it ends."""

        def refusal() -> str:
            return "" if self.abides(policies, caller, address, port) else POLICY_DENIED

        self._watch = Watch(policies, refusal, partial(self.cut_off, POLICY_DENIED))

    def failed(self, verdict: Verdict, reason: str) -> None:
        if not self.reason:
            self.verdict, self.reason = verdict, reason

    def pass_end_on(self, side: Side) -> None:
        """`side` has ended its half."""
        if side.other.half_closed():
            self._passed_on()
        else:
            spawn(self._pass_end_on(side.other), name="relay half-close")

    async def _pass_end_on(self, to: Side) -> None:
        await to.half_close()
        self._passed_on()

    def _passed_on(self) -> None:
        self._halves -= 1
        if not self._halves:
            for side in (self.client, self.backend):
                side.reset_on_close(False)
                side.close_now()

    def lost(self, side: Side) -> None:
        if self._halves:
            self.failed("ERROR", "client_reset" if side is self.client else "backend_reset")
            side.other.abort()
        self._end_if_lost()

    def _end_if_lost(self) -> None:
        if self.client.lost and self.backend.lost:
            self.end()

    def cut_off(self, reason: str) -> None:
        self.failed("ERROR", reason)
        self.client.abort()
        self.backend.abort()

    def end(self) -> None:
        if self._ended:
            return
        self._ended = True
        if self._watch is not None:
            self._watch.end()
        if self._audited and not self.reason:
            self.reason = POLICY_AUDIT
        self.ended()

    def ended(self) -> None:
        """Both connections are over."""
        raise NotImplementedError

    def drain(self) -> None:
        """It goes on, until it ends or is cut off."""


class _Steered(Relay):
    """A workload's connection."""

    def __init__(self, port: RelayAcceptor, client: Client, backend: Destination) -> None:
        super().__init__()
        self._port = port
        self._client = client
        self._destination = backend
        self.way: Direct | Tunnelled | None = None

    def ended(self) -> None:
        metrics.RELAYED.labels(self.reason or "ok").inc()
        self._port.left(self, self._client)
        source, destination = identities(self.way)
        self._port.flows.connection(
            Peer(*self._client.address, spiffe_id=source),
            Peer(*self._destination, spiffe_id=destination),
            self.verdict,
            self.reason,
            self.client.received,
            self.backend.received,
            self.way.encryption if self.way is not None else "none",
            self.policy,
        )


class Side(Link):
    """One of the two connections: what it receives, the other sends."""

    other: Side

    def __init__(self, relay: Relay) -> None:
        super().__init__(None)
        self.received = 0
        self._relay = relay
        self._early = bytearray()

    async def take(self, end: socket.socket | TLSStream | Turn) -> None:
        """Be the protocol of a connection. OSError."""
        if isinstance(end, socket.socket):
            await self.loop.create_connection(lambda: self, sock=end)
        else:
            end.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if not self._relay.running:
            self._early += data
            self.hold(True)
            return
        other = self.other
        if other.transport is not None and not other.gone:
            other.write((data,))
            self.hold(other.write_paused)

    def _check_room(self) -> None:
        super()._check_room()
        self.other.hold(self.write_paused)

    def eof_received(self) -> bool | None:
        self.eof = True
        if self._relay.running:
            self._relay.pass_end_on(self)
        return True  # this side may still be sent to

    def pass_early_on(self) -> None:
        """Both sides are there now: what came before that."""
        if self._early and self.other.transport is not None:
            self.other.write((bytes(self._early),))
            self._early.clear()
        self.hold(self.other.write_paused)
        if self.eof:
            self._relay.pass_end_on(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._relay.lost(self)
