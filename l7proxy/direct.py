"""Destinations that are no Service: a pod that was asked for by its own address.

Each is a cluster of one endpoint, made when it is first asked for and let go when it has not been
for a while, or when there are too many. Knows clusters, nothing of requests.
"""

from __future__ import annotations

import asyncio

from l7proxy.handles import Destination
from l7proxy.route_compile import RouteMatchResult, straight_to
from l7proxy.upstream import Clusters
from mesh.model.nodeconfig import ClusterSection, Endpoint
from mesh.model.section import SectionKey

# The one name that all of them have in metrics.
LABEL = "pod"
_MOST = 1024
# Unused ones go after this long, and are looked for as often; seconds.
_IDLE_S = 60.0


class Direct:
    """The destinations in use, the last used last."""

    def __init__(self, clusters: Clusters) -> None:
        self._clusters = clusters
        self._loop = asyncio.get_running_loop()
        self._known: dict[SectionKey, tuple[RouteMatchResult, float]] = {}
        self._sweep: asyncio.TimerHandle | None = None

    def to(self, destination: Destination, pod: str, *, http2: bool) -> RouteMatchResult:
        """The match of a request to it, at the address of a pod of this name, which goes nowhere
        else. HTTP/2 clients get HTTP/2 with prior knowledge there, as they had it without us."""
        key = f"direct/{'h2c' if http2 else 'http'}/{destination.address}|{destination.port}"
        known = self._known.pop(key, None)
        if known is not None:
            match = known[0]
        else:
            match = straight_to(key, LABEL)
            endpoint = Endpoint(destination.address, destination.port, pod)
            section = ClusterSection((endpoint,), "h2c" if http2 else "http")
            self._clusters.put(key, section, label=LABEL)
            if len(self._known) >= _MOST:
                self._forget(next(iter(self._known)))
        self._known[key] = (match, self._loop.time())
        if self._sweep is None:
            self._sweep = self._loop.call_later(_IDLE_S, self._forget_unused)
        return match

    def _forget_unused(self) -> None:
        self._sweep = None
        since = self._loop.time() - _IDLE_S
        for key in [key for key, (_, used) in self._known.items() if used <= since]:
            self._forget(key)
        if self._known:
            self._sweep = self._loop.call_later(_IDLE_S, self._forget_unused)

    def _forget(self, key: SectionKey) -> None:
        """Requests in flight are finished."""
        del self._known[key]
        self._clusters.remove(key)
