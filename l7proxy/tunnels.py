"""The tunnels that are open, and how long they may stay.

A tunnel depends on sections: the workloads at its ends, the SVID that this end has shown, the roots
by which the other is verified. When one of them changes it is judged again, and cut off if it would
not be made now. It may outlive the certificates that it was made with, as long as both ends go on
proving who they are: before the first certificate ends, the end that made it connects again, as for
a new one, and both take the certificates of that handshake for those of the tunnel. Without such a
proof both ends cut it off. No bytes pass through here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Literal, NamedTuple, TypeAlias

from certs.errors import NotTrusted
from l7proxy import metrics
from l7proxy.credentials import Credentials, Peer
from l7proxy.dial import DialFailed
from l7proxy.peers import Source
from l7proxy.tasks import spawn
from l7proxy.tls_stream import TLSStream
from l7proxy.turn import Turn
from mesh.model.channel import Proof
from mesh.model.section import SectionKey, bundle_key, svid_key

Direction: TypeAlias = Literal["out", "in"]

# A tunnel is old once it has had so much of the time until its first certificate ends: HTTP takes
# another then, and others are proved. SVIDs are renewed at half their life.
_OLD = 0.75
# Proofs that fail are not tried again sooner, seconds.
_SOONEST_S = 0.2
# Pairs whose last proofs are kept, to be told of again.
_MAX_SHOWN = 4096
# Clocks are set: no timer is trusted for longer, seconds.
_LONGEST_S = 30.0


class Pair(NamedTuple):
    """Who a tunnel is between: a proof is for all of a pair. `node`: the other proxy's address."""

    source: Source
    destination: str
    node: str


class Tunnel:
    """One end of an open tunnel. `own`: the SPIFFE ID it has shown, until `shown_until`; `judge`:
    why it would not be made now, a reason to count, or None; `cut` ends it for a reason; `grow_old`
    is told when it is old. `prove`, at the end that made it: who the other end still is;
    DialFailed. `turn`: the connection that has it now, where connections take turns."""

    def __init__(
        self,
        direction: Direction,
        stream: TLSStream,
        pair: Pair,
        own: str,
        peer: Peer,
        shown_until: int,
        keys: Iterable[SectionKey],
        judge: Callable[[], str | None],
        prove: Callable[[], Awaitable[Peer]] | None = None,
    ) -> None:
        self.direction = direction
        self.stream = stream
        self.pair = pair
        self.own = own
        self.peer = peer
        self.shown_until = shown_until
        self.judge = judge
        self.prove = prove
        self.cut: Callable[[str], None] = lambda _: stream.abort()
        self.grow_old: Callable[[], None] = lambda: None
        self.keys: tuple[SectionKey | Pair, ...] = (
            *keys,
            svid_key(own),
            bundle_key(peer.trust_domain),
            pair,
        )
        self.outlives = False
        self.turn: Turn | None = None
        now = time.time()
        self.as_new_until = now + (self.until - now) / 2
        self._timers: list[asyncio.TimerHandle] = []

    @property
    def until(self) -> int:
        """When the first certificate ends, seconds since 1970 UTC."""
        return min(self.peer.until, self.shown_until)

    @property
    def end(self) -> TLSStream | Turn:
        """What bytes go through."""
        return self.turn or self.stream

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: object) -> None:
        """Unless it has ended by then."""
        loop = asyncio.get_running_loop()
        self._timers = [one for one in self._timers if one.when() > loop.time()]
        # With less than a millisecond, what uvloop gives is no timer.
        self._timers.append(loop.call_later(max(delay_s, 0.001), callback, *args))

    def forget_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()


class Tunnels:
    """Those of a worker, by what they depend on."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._by_key: dict[SectionKey | Pair, set[Tunnel]] = {}
        self._proving: set[Pair] = set()
        # Proofs come to one of the node's workers; this tells the others.
        self._announce: Callable[[Proof], None] = lambda _: None
        # The last that came to this one, and until when it proves anything.
        self._shown: dict[Pair, tuple[Proof, int]] = {}

    def add(self, tunnel: Tunnel) -> None:
        """Until its stream is lost, or it is removed."""
        if tunnel.stream.lost:
            return
        for key in tunnel.keys:
            self._by_key.setdefault(key, set()).add(tunnel)
        metrics.TUNNELS.labels(tunnel.direction).inc()
        tunnel.stream.on_lost = lambda: self._remove(tunnel)
        self._wake_at_end(tunnel)
        if tunnel.prove is not None:
            self._wake_when_old(tunnel)

    def remove(self, tunnel: Tunnel) -> None:
        """Its stream goes on as something else."""
        if not tunnel.stream.lost:
            tunnel.stream.on_lost = None
            self._remove(tunnel)

    def _remove(self, tunnel: Tunnel) -> None:
        for key in tunnel.keys:
            found = self._by_key.get(key, set())
            found.discard(tunnel)
            if not found:
                self._by_key.pop(key, None)
        metrics.TUNNELS.labels(tunnel.direction).dec()
        if tunnel.outlives:
            metrics.TUNNELS_OUTLIVING.dec()
        tunnel.forget_timers()

    # --- changes ----------------------------------------------------------------------------------

    def changed(self, keys: Iterable[SectionKey]) -> None:
        """These sections were put or removed."""
        found: set[Tunnel] = set()
        for key in keys:
            found |= self._by_key.get(key, set())
        for tunnel in found:
            self._review(tunnel)

    def _review(self, tunnel: Tunnel) -> bool:
        """Whether it may stay; else it is cut off."""
        reason = self._reason(tunnel)
        if reason is not None:
            metrics.TUNNEL_FAILURES.labels(reason).inc()
            tunnel.cut(reason)
        return reason is None

    def _reason(self, tunnel: Tunnel) -> str | None:
        if (held := self._credentials.problem(tunnel.own, time.time())) is not None:
            return held[0]
        try:
            self._credentials.judge(tunnel.peer.chain)
        except NotTrusted as error:
            return "not_renewed" if error.reason == "expired" else error.reason
        return tunnel.judge()

    def as_new(self, tunnel: Tunnel) -> bool:
        """Whether one that was made now would be the same."""
        return (
            time.time() < tunnel.as_new_until
            and self._credentials.in_force(tunnel.stream.ssl, tunnel.own, tunnel.peer)
            and self._reason(tunnel) is None
        )

    # --- time -------------------------------------------------------------------------------------

    def proven(self, pair: Pair, peer: Peer, shown_until: int) -> None:
        """A new handshake between both ends: theirs are its certificates."""
        for tunnel in self._by_key.get(pair, ()):
            tunnel.peer = peer
            tunnel.shown_until = shown_until

    def prove(self, pair: Pair, peer: Peer) -> None:
        """The end that made tunnels of this pair has proved to this worker who it is."""
        self.proven(pair, peer, self._credentials.until(pair.destination))
        source = pair.source
        proof = Proof(
            source.name,
            source.gateway,
            source.spiffe_id,
            pair.destination,
            pair.node,
            peer.chain,
            source.told,
        )
        self._shown.pop(pair, None)
        self._shown[pair] = proof, peer.until
        if len(self._shown) > _MAX_SHOWN:
            del self._shown[next(iter(self._shown))]
        self._announce(proof)

    def announce_by(self, announce: Callable[[Proof], None]) -> None:
        """There is a new way to tell the others. What went by the one before may be lost."""
        self._announce, now = announce, time.time()
        for proof, until in self._shown.values():
            if until > now:
                announce(proof)

    def hear(self, proof: Proof) -> None:
        """Another worker was shown it."""
        source = Source(proof.source, proof.source_id, proof.gateway, proof.told)
        pair = Pair(source, proof.destination_id, proof.node)
        if pair in self._by_key:
            try:
                peer = self._credentials.judge(proof.chain)
            except NotTrusted:
                return  # roots have changed on the way
            if peer.spiffe_id == proof.source_id:
                self.proven(pair, peer, self._credentials.until(pair.destination))

    def _wake_at_end(self, tunnel: Tunnel) -> None:
        until = tunnel.until
        delay = min(max(0.0, until - time.time()), _LONGEST_S)
        tunnel.call_later(delay, self._ended, tunnel, until)

    def _ended(self, tunnel: Tunnel, until: int) -> None:
        """A certificate that it had has ended, if it is `until` by now."""
        if until > time.time():
            self._wake_at_end(tunnel)
            return
        if tunnel.direction == "in":  # whether ours is renewed the other end sees for itself
            tunnel.shown_until = self._credentials.until(tunnel.own)
        if not self._review(tunnel):
            return
        if tunnel.until <= time.time():
            metrics.TUNNEL_FAILURES.labels("not_renewed").inc()
            tunnel.cut("not_renewed")
            return
        if not tunnel.outlives:
            tunnel.outlives = True
            metrics.TUNNELS_OUTLIVING.inc()
        self._wake_at_end(tunnel)

    def _wake_when_old(self, tunnel: Tunnel) -> None:
        until, now = tunnel.until, time.time()
        self._await_age(tunnel, until, now + max(_OLD * (until - now), _SOONEST_S))

    def _await_age(self, tunnel: Tunnel, until: int, at: float) -> None:
        left = at - time.time()
        if left > 0:
            tunnel.call_later(min(left, _LONGEST_S), self._await_age, tunnel, until, at)
        else:
            self._old(tunnel, until)

    def _old(self, tunnel: Tunnel, until: int) -> None:
        tunnel.grow_old()
        if tunnel.until == until and tunnel.pair not in self._proving and not tunnel.stream.lost:
            self._proving.add(tunnel.pair)
            spawn(self._prove(tunnel), name="prove a tunnel")
        else:
            self._wake_when_old(tunnel)

    async def _prove(self, tunnel: Tunnel) -> None:
        assert tunnel.prove is not None
        shown_until = self._credentials.until(tunnel.own)
        try:
            self.proven(tunnel.pair, await tunnel.prove(), shown_until)
        except DialFailed:
            pass  # counted; there is time left to try again
        finally:
            self._proving.discard(tunnel.pair)
        if not tunnel.stream.lost:
            self._wake_when_old(tunnel)
