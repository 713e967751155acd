"""Tunnels between two turns, at the end that made them: the next connection between the same two
takes one (see `turn`).

Only one that would be made just as it is: identities, roots and both workloads are those of its
handshake, and as of a session half of the certificates' time has not passed. Knows tunnels, no
prefaces.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from l7proxy.peers import Caller, Source
from l7proxy.tunnels import Tunnel, Tunnels

# How long one rests, seconds; the other end waits for longer.
REST_S = 5.0
# That rest at once, of a worker.
_MAX_RESTS = 256


class TurnKey(NamedTuple):
    """Whose connections take turns. `destination`: namespace, name, node, SPIFFE ID."""

    caller: Caller
    source: Source
    destination: tuple[str, str, str, str]
    node: str
    address: str
    port: int


class Rests:
    """Those of a worker."""

    def __init__(self, tunnels: Tunnels) -> None:
        self._tunnels = tunnels
        self._by_key: dict[TurnKey, dict[Tunnel, asyncio.TimerHandle]] = {}
        self._count = 0
        self._draining = False

    def put(self, key: TurnKey, tunnel: Tunnel) -> None:
        """Its turn is over."""
        tunnel.cut = lambda _: tunnel.stream.abort()
        full = self._draining or self._count >= _MAX_RESTS
        if full or not self._tunnels.as_new(tunnel):
            tunnel.stream.close()
            return
        timer = asyncio.get_running_loop().call_later(REST_S, self._expire, key, tunnel)
        self._by_key.setdefault(key, {})[tunnel] = timer
        self._count += 1

    def take(self, key: TurnKey) -> Tunnel | None:
        """The one that rests shortest. Its other end may have closed it all the same."""
        while resting := self._by_key.get(key):
            tunnel = next(reversed(resting))
            self._forget(key, tunnel)
            if tunnel.stream.silent and self._tunnels.as_new(tunnel):
                return tunnel
            tunnel.stream.close()
        return None

    def drain(self) -> None:
        """None rests from now on."""
        self._draining = True
        for key, resting in tuple(self._by_key.items()):
            for tunnel in tuple(resting):
                self._expire(key, tunnel)

    def _expire(self, key: TurnKey, tunnel: Tunnel) -> None:
        self._forget(key, tunnel)
        tunnel.stream.close()

    def _forget(self, key: TurnKey, tunnel: Tunnel) -> None:
        resting = self._by_key[key]
        resting.pop(tunnel).cancel()
        self._count -= 1
        if not resting:
            del self._by_key[key]
