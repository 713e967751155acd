"""What the cluster's authority is given: an authority that somebody brings in a Secret, roots of
other trust domains in ConfigMaps, and requests to rotate, as an annotation of its own Secret.

All are in Weft's own namespace. What cannot be used leaves what was in force. Knows where they are
kept; errors name the object and never quote a key.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Mapping
from typing import Any

from certs.brought import from_secret
from certs.bundle import BadBundle, Bundle
from certs.errors import AuthorityError
from certs.state import Signer
from mesh.controller.bundles import KEY
from mesh.model.core import ConfigMap
from mesh.model.meta import ObjectKey
from mesh.sources.kubernetes import KubernetesSource
from mesh.sources.kubernetes_client import Backoff, ServerError
from mesh.sources.kubernetes_watch import Reflector

_log = logging.getLogger("weft.controller")

# The authority's own, and what asks for a rotation: "root" or "intermediate".
SECRET = "weft-authority"
ROTATE = "weft.dev/rotate"


class Given:
    """`ca`: the Secret of a root or intermediate ("": none is brought); `federation`: ConfigMaps by
    trust domain. `changed` is called when there is something to look at."""

    def __init__(
        self,
        source: KubernetesSource,
        namespace: str,
        ca: str,
        federation: Mapping[str, str],
        changed: Callable[[], None],
        backoff: Callable[[], Backoff],
    ) -> None:
        self.asked = False  # somebody asks for a rotation, or did a moment ago
        self._source = source
        self._namespace = namespace
        self._ca = ca
        self._federation = federation
        self._changed = changed
        self._signer: Signer | None = None
        self._stale = bool(ca)
        self._bundles: dict[str, Bundle] = {}
        self._wrong: dict[str, str] = {}
        self._secrets = f"/api/v1/namespaces/{namespace}/secrets"
        self._reflector = Reflector(
            source.client, self._secrets, self, metadata=True, backoff=backoff
        )

    async def run(self) -> None:
        """For ever: learn of changes."""
        await self._reflector.run()

    # --- what is told -----------------------------------------------------------------------------

    def changed(self, key: ObjectKey, raw: dict[str, Any]) -> None:
        if key.name == SECRET:
            self.asked = ROTATE in (raw["metadata"].get("annotations") or {})
            if self.asked:
                self._changed()
        elif key.name == self._ca:
            self._stale = True
            self._changed()

    def gone(self, key: ObjectKey, uid: str, version: str) -> None:
        self.asked = self.asked and key.name != SECRET

    def reached(self, version: str) -> None:
        pass

    def failing(self, why: ServerError | None) -> None:
        if why is not None:
            _log.warning("Secrets in %s cannot be followed: %s", self._namespace, why)

    def seen(self, kind: str, key: ObjectKey) -> None:
        """An object of the source's is another than before."""
        own = key.namespace == self._namespace
        if kind == "ConfigMap" and own and key.name in self._federation.values():
            self._changed()

    # --- what there is ----------------------------------------------------------------------------

    async def brought(self, *, needed: bool) -> Signer | None:
        """The authority that is brought. ServerError; AuthorityError: it cannot be used, and is
        `needed`, as none is in force."""
        if not self._stale:
            return self._signer
        where = f"Secret {self._namespace}/{self._ca}"
        try:
            self._signer = from_secret(await self._read(), where)
            self._wrong.pop(where, None)
        except AuthorityError as error:
            if needed:
                raise
            self._complain(where, str(error))
        self._stale = False
        return self._signer

    async def _read(self) -> dict[str, bytes]:
        path = f"{self._secrets}/{self._ca}"
        try:
            found = await self._source.client.request("GET", path)
        except ServerError as error:
            if error.status != 404:
                raise
            raise AuthorityError(f"Secret {self._namespace}/{self._ca} is missing") from None
        data = found.get("data") or {}
        return {name: base64.b64decode(text) for name, text in data.items()}

    def federated(self) -> dict[str, Bundle]:
        """The roots of other trust domains."""
        for trust_domain, name in self._federation.items():
            found = self._source.get("ConfigMap", ObjectKey(self._namespace, name))
            where = f"ConfigMap {self._namespace}/{name}"
            text = found.data.get(KEY) if isinstance(found, ConfigMap) else None
            try:
                if text is None:
                    raise BadBundle(f"it is missing, or has no {KEY}")
                self._bundles[trust_domain] = Bundle.parse(trust_domain, text)
                self._wrong.pop(where, None)
            except BadBundle as error:
                self._complain(where, f"{where}: {error}")
        return dict(sorted(self._bundles.items()))

    def _complain(self, where: str, why: str) -> None:
        if self._wrong.get(where) != why:
            self._wrong[where] = why
            _log.error("%s", why)
