"""Copies of the Secrets that listeners refer to, in the one namespace where agents may read some.

Which these are follows from the objects (a reference that a ReferenceGrant has yet to permit is
none). Of all other Secrets only metadata is ever asked for, and nothing is kept of any but its
version: data go from one request into another. Knows Secrets; no listeners.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mesh.model.core import Secret
from mesh.model.meta import ObjectKey
from mesh.model.secretcopy import COPY_OF, COPY_VERSION, copy_name
from mesh.sources.kubernetes import KubernetesSource
from mesh.sources.kubernetes_client import APPLY, MANAGER, Backoff, ServerError, object_path
from mesh.sources.kubernetes_watch import Reflector

_log = logging.getLogger("weft.controller")

_TLS = "kubernetes.io/tls"
_KEYS = ("tls.crt", "tls.key")


class _Step(NamedTuple):
    """`version` "": the copy has to go."""

    secret: ObjectKey
    version: str


class Copies:
    """`namespace`: where the copies are, which `source` reads as the Secrets themselves. Copies
    only while `enabled`. `changed` is called when the answer of `settled` may be another."""

    def __init__(
        self,
        source: KubernetesSource,
        namespace: str,
        changed: Callable[[], None],
        backoff: Callable[[], Backoff],
    ) -> None:
        self.enabled = False
        self._source = source
        self._client = source.client
        self._namespace = namespace
        self._changed = changed
        self._backoff = backoff
        self._originals: dict[ObjectKey, str] = {}
        self._wanted: frozenset[ObjectKey] | None = None
        # The versions that statuses are derived from, and which cannot be had.
        self._derived: dict[ObjectKey, str] = {}
        self._failed: dict[ObjectKey, str] = {}
        self._wake = asyncio.Event()
        self._reflector = Reflector(
            self._client, "/api/v1/secrets", self, metadata=True, backoff=backoff
        )

    # --- what is wanted, and what there is -------------------------------------------------------

    def want(self, secrets: frozenset[ObjectKey]) -> None:
        """All Secrets that are referred to."""
        if secrets != self._wanted:
            self._wanted = secrets
            self._wake.set()

    def derived(self, changes: Mapping[ObjectKey, Any]) -> None:
        """These copies (None: gone) are what statuses follow from now."""
        for key, obj in changes.items():
            if isinstance(obj, Secret):
                self._derived[key] = obj.metadata.annotations.get(COPY_VERSION, "")
            else:
                self._derived.pop(key, None)

    def look_again(self) -> None:
        """A copy is another than before."""
        self._wake.set()

    def settled(self) -> bool:
        """Whether statuses follow from Secrets as they are. One that cannot be copied is waited for
        by nobody."""
        if not self._reflector.synced or self._wanted is None:
            return False
        return all(
            self._derived.get(key) == version or self._failed.get(key) == version
            for key in self._wanted
            if (version := self._originals.get(key)) is not None
        )

    # --- what the reflector tells ----------------------------------------------------------------

    def changed(self, key: ObjectKey, raw: dict[str, Any]) -> None:
        if key.namespace != self._namespace:
            metadata = raw["metadata"]
            self._originals[key] = f"{metadata['uid']}/{metadata['resourceVersion']}"
            self._wake.set()

    def gone(self, key: ObjectKey, uid: str, version: str) -> None:
        self._originals.pop(key, None)
        self._wake.set()

    def reached(self, version: str) -> None:
        self._wake.set()

    def failing(self, why: ServerError | None) -> None:
        if why is not None:
            _log.warning("Secrets cannot be followed: %s", why)

    # --- copying ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reflector.run(), name="secrets")
            group.create_task(self._keep_up(), name="copies of secrets")

    async def _keep_up(self) -> None:
        backoff = self._backoff()
        while True:
            await self._wake.wait()
            self._wake.clear()
            pause = None
            for step in list(self._steps()):
                try:
                    await self._take(step)
                except ServerError as error:
                    _log.error("the copy of Secret %s cannot be written: %s", step.secret, error)
                    self._failed[step.secret] = step.version
                    pause = max(pause or 0.0, error.retry_after_s or 0.0)
            self._changed()
            if pause is None:
                backoff.reset()
            else:
                self._wake.set()
                await backoff.wait(pause)

    def _steps(self) -> Iterator[_Step]:
        if not self.enabled or not self._reflector.synced or self._wanted is None:
            return
        for key in sorted(self._wanted):
            version = self._originals.get(key)
            if version is not None and self._copied(key) != version:
                yield _Step(key, version)
        for key in list(self._source.all_written("Secret")):
            if key not in self._wanted or key not in self._originals:
                yield _Step(key, "")

    def _copied(self, key: ObjectKey) -> str:
        found = self._source.get("Secret", key)
        return found.metadata.annotations.get(COPY_VERSION, "") if found is not None else ""

    async def _take(self, step: _Step) -> None:
        key = step.secret
        place = {"namespace": self._namespace, "name": copy_name(key)}
        path = object_path("v1", "secrets", place)
        try:
            if not step.version:
                await self._client.request("DELETE", path)
                return
            secret = await self._client.request("GET", object_path("v1", "secrets", key._asdict()))
        except ServerError as error:
            # Gone in between, which will be told.
            if error.status != 404:
                raise
            return
        metadata, tls = secret["metadata"], secret.get("type") == _TLS
        data = secret.get("data") or {}
        body = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                **place,
                "annotations": {
                    COPY_OF: str(key),
                    COPY_VERSION: f"{metadata['uid']}/{metadata['resourceVersion']}",
                },
            },
            # Of one that holds nothing for a listener, that it is there.
            "type": _TLS if tls else "Opaque",
            "data": {name: data[name] for name in _KEYS if name in data} if tls else {},
        }
        query = {"fieldManager": MANAGER, "force": "true"}
        try:
            await self._client.request("PATCH", path, query, body, content_type=APPLY)
        except ServerError as error:
            if error.status != 422:
                raise
            # A Secret's type is fixed: what is there is of another one of the name.
            await self._client.request("DELETE", path)
            self._wake.set()
            return
        self._failed.pop(key, None)
