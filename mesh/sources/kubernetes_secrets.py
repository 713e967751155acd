"""How Secrets are followed: only what a listener may refer to is read as a whole.

Either those of type kubernetes.io/tls in all namespaces, and of others only that they are there; or
the copies that the controller makes for nodes, under the names of what they are copies of.
"""

from __future__ import annotations

from typing import Any, Protocol

from mesh.model.meta import ObjectKey
from mesh.model.secretcopy import copied
from mesh.sources.kubernetes_client import ServerError
from mesh.sources.kubernetes_watch import Sink

# Other Secrets hold nothing that a listener may refer to; that they are there is all that is read.
TLS = {"fieldSelector": "type=kubernetes.io/tls"}
OTHERS = {"fieldSelector": "type!=kubernetes.io/tls"}


class Secrets(Sink, Protocol):
    """The kind, to which everything goes in the end."""

    def listed(self) -> None: ...


class OtherSecrets:
    """Secrets that hold nothing for a listener: their metadata, and that they are of another type.
    No data plane depends on them, so no version of them is waited for."""

    def __init__(self, kind: Secrets) -> None:
        self._kind = kind

    def changed(self, key: ObjectKey, raw: dict[str, Any]) -> None:
        metadata = {**raw["metadata"], "resourceVersion": ""}
        self._kind.changed(key, {**raw, "metadata": metadata, "type": "other"})

    def gone(self, key: ObjectKey, uid: str, version: str) -> None:
        self._kind.gone(key, uid, "")

    def reached(self, version: str) -> None:
        self._kind.listed()

    def failing(self, why: ServerError | None) -> None:
        self._kind.failing(why)


class CopiedSecrets:
    """Copies as what they are copies of; everything else in their namespace is passed over."""

    def __init__(self, kind: Secrets) -> None:
        self._kind = kind
        self._of: dict[ObjectKey, ObjectKey] = {}

    def changed(self, key: ObjectKey, raw: dict[str, Any]) -> None:
        metadata = raw["metadata"]
        of = copied(metadata.get("annotations"))
        if (before := self._of.get(key)) is not None and before != of:
            self.gone(key, metadata["uid"], metadata["resourceVersion"])
        if of is not None:
            self._of[key] = of
            named = {**metadata, "namespace": of.namespace, "name": of.name}
            self._kind.changed(of, {**raw, "metadata": named})

    def gone(self, key: ObjectKey, uid: str, version: str) -> None:
        if (of := self._of.pop(key, None)) is not None:
            self._kind.gone(of, uid, version)

    def reached(self, version: str) -> None:
        self._kind.reached(version)

    def failing(self, why: ServerError | None) -> None:
        self._kind.failing(why)
