"""Everything about certificates that the controller does, where it is asked to: which node may hold
what, the authority while this controller leads, the signer of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from l7proxy.tasks import spawn
from mesh.authority.pods import Placement
from mesh.controller.authority import ClusterAuthority
from mesh.controller.bundles import Bundles
from mesh.controller.signer import PATH, QUERY, Signer
from mesh.sources.kubernetes import KubernetesSource
from mesh.sources.kubernetes_client import Backoff
from mesh.sources.kubernetes_watch import Reflector
from mesh.sources.update import SourceUpdate

# What stands where the authority of a host names a directory.
_CLUSTER = Path("cluster")


class Certificates:
    """`without_bundle(tag)`: the nodes that have another trust bundle in force, for people."""

    def __init__(
        self,
        source: KubernetesSource,
        namespace: str,
        trust_domain: str,
        without_bundle: Callable[[str], list[str]],
        backoff: Callable[[], Backoff],
    ) -> None:
        client = source.client
        self.bundles = Bundles(source, namespace, backoff)
        self.authority = ClusterAuthority(
            client, namespace, trust_domain, without_bundle, self.bundles
        )
        self._placement = Placement(trust_domain)
        self._signer = Signer(client, namespace, self.authority, self._placement, source.get)
        self._requests = Reflector(client, PATH, self._signer, query=QUERY, backoff=backoff)
        self._known = self._leading = False
        self._tending: asyncio.Task[None] | None = None

    def changed(self, update: SourceUpdate) -> None:
        """What the source says of pods."""
        self._placement.changed(_CLUSTER, update)
        self._known = self._known or update.complete
        self._tend()

    def led(self, leading: bool) -> None:
        self._leading = self.bundles.enabled = leading
        self._tend()

    def _tend(self) -> None:
        """There is an authority here while this controller leads, and once it knows the pods."""
        wanted = self._leading and self._known
        if wanted and self._tending is None:
            self._tending = spawn(self.authority.run(), name="authority")
        elif not wanted and self._tending is not None:
            self._tending.cancel()
            self._tending = None

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._requests.run(), name="requests")
                group.create_task(self._signer.run(), name="signer")
                group.create_task(self.bundles.run(), name="trust bundles")
        finally:
            if self._tending is not None:
                self._tending.cancel()
                await asyncio.gather(self._tending, return_exceptions=True)
