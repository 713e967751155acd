"""Opening a tunnel: a connection of one caller to one endpoint, through the proxy of its node.

Mutual TLS 1.3, in which the destination's identity is asked for and verified; then the preface says
on whose behalf and where to, and the other end answers. Nothing is sent before the peer is known to
be the destination's. Failures are counted here, by reason.
"""

from __future__ import annotations

import asyncio
import ssl
from functools import partial

from certs.errors import NotTrusted
from l7proxy import metrics, tunnel_wire
from l7proxy.credentials import ALPN, Credentials, Peer, SessionKey, handshake_failure
from l7proxy.dial import DialFailed, dial, keep_alive
from l7proxy.peers import Caller, NoWay, Peers, Tunnelled, keys_of, sni_of, trust_domain_of
from l7proxy.rests import Rests, TurnKey
from l7proxy.tls_stream import TLSStream
from l7proxy.tunnel_wire import Answer, Kind, Preface, WireError
from l7proxy.tunnels import Pair, Tunnel, Tunnels
from l7proxy.turn import Turn
from mesh.model.nodeconfig import MESH_TUNNEL_PORT, Settings, WorkloadSection


class Digger:
    """Opens the tunnels of a worker."""

    def __init__(self, peers: Peers, tunnels: Tunnels) -> None:
        self.peers = peers
        self._tunnels = tunnels
        self.rests = Rests(tunnels)

    @classmethod
    def alone(cls, settings: Settings) -> Digger:
        """Of a proxy that knows nobody."""
        credentials = Credentials()
        return cls(Peers(credentials, settings), Tunnels(credentials))

    async def open(
        self,
        caller: Caller,
        way: Tunnelled,
        address: str,
        port: int,
        kind: Kind,
        *,
        own_port: int = 0,
        turns: bool = False,
    ) -> Tunnel:
        """A tunnel whose end has no protocol yet: a new one or (`turns`) the next turn of one that
        is there. `own_port`: as in `Preface.port_of_source`. DialFailed: reasons of the tunnel's
        own begin with "tunnel_"."""
        source, destination = way.source, way.destination
        preface = Preface(
            source.name, address, port, kind, source.gateway, own_port, source.told, turns
        )
        key = TurnKey(caller, source, _who(destination), way.node, address, port)
        if turns and (taken := await self._next_turn(key, way, preface)) is not None:
            return taken
        shown_until = self.peers.credentials.until(source.spiffe_id)
        stream, peer, answer = await self._shake(way, preface)

        def judge() -> str | None:
            if self.peers.source(caller) != source:
                return "source_changed"
            now = self.peers.at(address)
            if now is None or _who(now) != _who(destination):
                return "destination_changed"
            return None

        async def prove() -> Peer:
            now = self.peers.way(caller, address, port)
            if not isinstance(now, Tunnelled):
                raise DialFailed(now.reason if isinstance(now, NoWay) else "way_changed", "")
            proof = Preface(source.name, address, port, "proof", source.gateway, told=source.told)
            stream, peer, _ = await self._shake(now, proof)
            stream.close()
            return peer

        tunnel = Tunnel(
            "out",
            stream,
            Pair(source, destination.spiffe_id, way.node),
            source.spiffe_id,
            peer,
            shown_until,
            keys_of(source, destination),
            judge,
            prove,
        )
        self._tunnels.add(tunnel)
        if answer.turns:
            self._begin_turn(key, tunnel)
        return tunnel

    def _begin_turn(self, key: TurnKey, tunnel: Tunnel) -> None:
        tunnel.turn = Turn(tunnel.stream, partial(self.rests.put, key, tunnel))

    async def _next_turn(self, key: TurnKey, way: Tunnelled, preface: Preface) -> Tunnel | None:
        """None: no tunnel rests that can be had. DialFailed."""
        timeout_s = self.peers.settings.connect_timeout_s
        while (tunnel := self.rests.take(key)) is not None:
            stream = tunnel.stream
            try:
                async with asyncio.timeout(timeout_s):
                    stream.write(tunnel_wire.encode(preface))
                    answer = await tunnel_wire.receive(stream, Answer)
            except (ssl.SSLError, ConnectionError, WireError):
                # The other end has closed it meanwhile, or wants a new handshake. Nothing of the
                # caller's was sent.
                stream.abort()
                continue
            except TimeoutError:
                stream.abort()
                raise _told(_timed_out(timeout_s), way) from None
            except BaseException:
                stream.abort()
                raise
            try:
                _check(answer, stream)
            except _Failed as failed:
                raise _told(failed, way) from None
            self._begin_turn(key, tunnel)
            return tunnel
        return None

    async def _shake(self, way: Tunnelled, preface: Preface) -> tuple[TLSStream, Peer, Answer]:
        """A connection on which both have said who they are and where to. DialFailed."""
        timeout_s = self.peers.settings.connect_timeout_s
        try:
            try:
                return await self._hands(way, preface, timeout_s)
            except _Failed as failed:
                if failed.reason not in ("broken_off", "session_forgotten"):
                    raise
                # As by a worker that ends, or roots that have just changed. Nothing of the caller's
                # was sent, and the next worker has the same socket to accept from.
                return await self._hands(way, preface, timeout_s)
        except _Failed as failed:
            raise _told(failed, way) from None

    async def _hands(
        self, way: Tunnelled, preface: Preface, timeout_s: float
    ) -> tuple[TLSStream, Peer, Answer]:
        credentials, expected = self.peers.credentials, way.destination.spiffe_id
        # It may have gone since the way was found.
        if (missing := self.peers.lacking(way.source, expected)) is not None:
            raise _Failed(*missing)
        context = credentials.client(way.source.spiffe_id, trust_domain_of(expected))
        key = SessionKey(way.source.spiffe_id, expected, way.node)
        # What was proved before is no proof.
        session = credentials.session(key) if preface.kind != "proof" else None
        stream = TLSStream(context, server_hostname=sni_of(expected), session=session)
        own = self.peers.own_address(way.node)
        try:
            sock = await dial(way.node, MESH_TUNNEL_PORT, timeout_s, source=own)
        except DialFailed as error:
            raise _Failed(error.reason, str(error)) from None
        keep_alive(sock)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().create_connection(lambda: stream, sock=sock)
                await stream.handshake()
                if stream.ssl.selected_alpn_protocol() != ALPN:
                    raise _Failed("version", f"the peer does not speak {ALPN} (ALPN)")
                peer = credentials.verify(stream.ssl, expected)
                stream.write(tunnel_wire.encode(preface))
                answer = await tunnel_wire.receive(stream, Answer)
                credentials.keep_session(key, stream.ssl, peer)
        except ssl.SSLError as error:  # the stream closes, with an alert
            credentials.forget_session(key)
            raise _Failed(*handshake_failure(error)) from None
        except BaseException as error:
            credentials.forget_session(key)
            stream.abort()
            match error:
                case TimeoutError():
                    raise _timed_out(timeout_s) from None
                case NotTrusted() | WireError():
                    raise _Failed(error.reason, str(error)) from None
                case OSError():
                    raise _Failed("broken_off", error.strerror or str(error)) from None
            raise
        _check(answer, stream)
        return stream, peer, answer


class _Failed(Exception):
    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


def _timed_out(timeout_s: float) -> _Failed:
    return _Failed("timeout", f"no answer within {timeout_s:g} s")


def _check(answer: Answer, stream: TLSStream) -> None:
    """_Failed, DialFailed: it is a refusal."""
    if answer.reason:
        stream.close()
        if answer.reason.startswith("connect_"):  # the pod's fault, and nobody else's
            raise DialFailed(answer.reason, answer.why)
        raise _Failed("refused_" + answer.reason, answer.why)


def _told(failed: _Failed, way: Tunnelled) -> DialFailed:
    """For whoever wanted the tunnel; counted."""
    metrics.TUNNEL_FAILURES.labels(failed.reason).inc()
    who = f"{way.destination.spiffe_id} at {way.node}"
    return DialFailed(f"tunnel_{failed.reason}", f"tunnel to {who}: {failed}")


def _who(workload: WorkloadSection) -> tuple[str, str, str, str]:
    return workload.namespace, workload.name, workload.node, workload.spiffe_id
