"""Which identities a node may hold: those of the service accounts of its pods, and the gateway's.

Knows Pod objects; nothing of certificates.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from certs.spiffe import BadSpiffeId, SpiffeId, gateway, workload
from mesh.model.meta import ObjectKey
from mesh.model.pod import Pod
from mesh.sources.update import SourceUpdate

# Pod.status.phase of pods that run nothing any more.
_ENDED = ("Succeeded", "Failed")


class Placement:
    """Pods by node, as the manifests directories say. One that has ended is nowhere, one in its
    host's network is not in the mesh."""

    def __init__(self, trust_domain: str) -> None:
        self._trust_domain = trust_domain
        self._gateway = gateway(trust_domain)
        # The same pod may stand in several directories.
        self._pods: dict[tuple[Path, ObjectKey], tuple[str, SpiffeId]] = {}
        self._held: dict[str, Counter[SpiffeId]] = {}

    def changed(self, source: Path, update: SourceUpdate) -> None:
        """What one of the directories says now."""
        for key, obj in update.changes.get("Pod", {}).items():
            if before := self._pods.pop((source, key), None):
                node, spiffe_id = before
                self._held[node] -= Counter((spiffe_id,))
            if isinstance(obj, Pod) and (found := self._place(key, obj)) is not None:
                self._pods[source, key] = found
                self._held.setdefault(found[0], Counter()).update((found[1],))

    def allowed(self, node: str) -> frozenset[SpiffeId]:
        """The identities that a node may hold."""
        return frozenset((self._gateway, *self._held.get(node, ())))

    def _place(self, key: ObjectKey, pod: Pod) -> tuple[str, SpiffeId] | None:
        spec = pod.spec
        if not spec.node_name or spec.host_network or pod.status.phase in _ENDED:
            return None
        try:
            account = workload(self._trust_domain, key.namespace, spec.service_account_name)
        except BadSpiffeId:  # no name of a service account
            return None
        return spec.node_name, account
