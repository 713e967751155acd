"""The tunnels that are open, and how long they may stay.

A tunnel depends on sections: the workloads at its ends, the SVID that this end has shown, the roots
by which it verified the other. When one of them changes it is judged again, and cut off if it would
not be made now. One that outlives a certificate it was made with stays while this end's identity is
renewed and the other end is still who it was; it is counted. No bytes pass through here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

from l7proxy import metrics
from l7proxy.credentials import Credentials, Peer
from l7proxy.peers import trust_domain_of
from l7proxy.tls_stream import TLSStream
from mesh.model.section import SectionKey, bundle_key, svid_key

Direction: TypeAlias = Literal["out", "in"]

# An HTTP connection takes no more requests this long before its first certificate ends: a tenth of
# the time that is left as it is made, but no longer than this, seconds.
_MARGIN_S = 60.0


class Tunnel:
    """One end of an open tunnel. `own`: the SPIFFE ID it has shown; `until`: when the first of both
    certificates ends, seconds since 1970 UTC; `judge`: why it would not be made now, a reason to
    count, or None; `cut`: ends it for that reason."""

    def __init__(
        self,
        direction: Direction,
        stream: TLSStream,
        own: str,
        peer: Peer,
        until: int,
        keys: Iterable[SectionKey],
        judge: Callable[[], str | None],
    ) -> None:
        self.direction = direction
        self.stream = stream
        self.own = own
        self.peer = peer
        self.until = until
        self.judge = judge
        self.cut: Callable[[str], None] = lambda _: stream.abort()
        self.keys = (*keys, svid_key(own), bundle_key(trust_domain_of(peer.spiffe_id)))
        self.outlives = False
        self._timers: list[asyncio.TimerHandle] = []

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: object) -> None:
        """Unless it has ended by then."""
        self._timers.append(asyncio.get_running_loop().call_later(delay_s, callback, *args))

    def forget_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    @property
    def retire_in(self) -> float:
        """Seconds until an HTTP connection in it should take no more requests."""
        left = self.until - time.time()
        return max(0.0, left - min(left / 10, _MARGIN_S))


class Tunnels:
    """Those of a worker, by the sections that they depend on."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._by_key: dict[SectionKey, set[Tunnel]] = {}

    def add(self, tunnel: Tunnel) -> None:
        """Until its stream is lost."""
        if tunnel.stream.lost:
            return
        for key in tunnel.keys:
            self._by_key.setdefault(key, set()).add(tunnel)
        metrics.TUNNELS.labels(tunnel.direction).inc()
        tunnel.stream.on_lost = lambda: self._remove(tunnel)
        self._wake_at(tunnel, tunnel.until)

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
        if not self._credentials.trusts(trust_domain_of(tunnel.peer.spiffe_id)):
            return "bundle_missing"
        return tunnel.judge()

    def _wake_at(self, tunnel: Tunnel, when: float) -> None:
        tunnel.call_later(max(0.0, when - time.time()), self._ended, tunnel)

    def _ended(self, tunnel: Tunnel) -> None:
        """A certificate of it has ended."""
        if not self._review(tunnel):
            return
        if not tunnel.outlives:
            tunnel.outlives = True
            metrics.TUNNELS_OUTLIVING.inc()
        self._wake_at(tunnel, self._credentials.until(tunnel.own))
