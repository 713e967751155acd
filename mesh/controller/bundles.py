"""The trust bundle where pods can mount it: a ClusterTrustBundle where the cluster has those, else
a ConfigMap in each namespace.

ConfigMaps that are there are kept up to date in either case, so that a cluster which begins to
serve ClusterTrustBundles leaves nobody with roots that have gone. Knows where it is published; no
keys.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from mesh.model.core import ConfigMap
from mesh.model.meta import ObjectKey
from mesh.model.nodereport import BUNDLE_NAME, SIGNER
from mesh.sources.kubernetes import KubernetesSource
from mesh.sources.kubernetes_client import APPLY, MANAGER, Backoff, ServerError

_log = logging.getLogger("weft.controller")

# As in ConfigMap kube-root-ca.crt, and where a BackendTLSPolicy looks.
KEY = "ca.crt"
_VERSIONS = ("v1", "v1beta1", "v1alpha1")


class Bundles:
    """`namespace`: Weft's own, whose ConfigMap the authority writes itself."""

    def __init__(
        self, source: KubernetesSource, namespace: str, backoff: Callable[[], Backoff]
    ) -> None:
        self.enabled = False
        self._source = source
        self._client = source.client
        self._own = namespace
        self._backoff = backoff
        self._pem = ""
        self._everywhere = False
        # Namespaces of which it was told that they have none.
        self._failed: set[str] = set()
        self._wake = asyncio.Event()

    async def publish(self, trust_domain: str, pem: str) -> None:
        """Once this returns, pods that mount a ClusterTrustBundle get it; ConfigMaps follow.
        ServerError: it could not be written."""
        self._everywhere = not await self._apply_bundle(trust_domain, pem)
        self._pem = pem
        self._wake.set()

    def seen(self, kind: str, key: ObjectKey) -> None:
        """An object is another than before."""
        if kind == "Namespace" or (kind == "ConfigMap" and key.name == BUNDLE_NAME):
            self._wake.set()

    async def run(self) -> None:
        """For ever."""
        backoff = self._backoff()
        while True:
            await self._wake.wait()
            self._wake.clear()
            pause = None
            for namespace in list(self._lacking()):
                try:
                    await self._apply_config_map(namespace)
                    self._failed.discard(namespace)
                except ServerError as error:
                    pause = max(pause or 0.0, error.retry_after_s or 0.0)
                    if namespace not in self._failed:
                        self._failed.add(namespace)
                        _log.warning("no trust bundle in namespace %s: %s", namespace, error)
            if pause is None:
                backoff.reset()
            else:
                self._wake.set()
                await backoff.wait(pause)

    def _lacking(self) -> Iterator[str]:
        if not self.enabled or not self._pem:
            return
        for _, namespace in self._source.all_written("Namespace"):
            if namespace == self._own:
                continue
            found = self._source.get("ConfigMap", ObjectKey(namespace, BUNDLE_NAME))
            if isinstance(found, ConfigMap):
                if found.data.get(KEY) != self._pem:
                    yield namespace
            elif self._everywhere:
                yield namespace

    async def _apply_config_map(self, namespace: str) -> None:
        body = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": BUNDLE_NAME, "namespace": namespace},
            "data": {KEY: self._pem},
        }
        path = f"/api/v1/namespaces/{namespace}/configmaps/{BUNDLE_NAME}"
        try:
            await self._apply(path, body)
        except ServerError as error:
            # The namespace has gone.
            if error.status != 404:
                raise

    async def _apply_bundle(self, trust_domain: str, pem: str) -> bool:
        """Whether the cluster has ClusterTrustBundles."""
        # Bundles of a signer begin with its name, a colon in place of the slash.
        name = f"{SIGNER.replace('/', ':')}:{trust_domain}"
        for version in _VERSIONS:
            body = {
                "apiVersion": f"certificates.k8s.io/{version}",
                "kind": "ClusterTrustBundle",
                "metadata": {"name": name},
                "spec": {"signerName": SIGNER, "trustBundle": pem},
            }
            path = f"/apis/certificates.k8s.io/{version}/clustertrustbundles/{name}"
            try:
                await self._apply(path, body)
            except ServerError as error:
                if error.status == 404:
                    continue
                raise
            return True
        return False

    async def _apply(self, path: str, body: object) -> None:
        query = {"fieldManager": MANAGER, "force": "true"}
        await self._client.request("PATCH", path, query, body, content_type=APPLY)
