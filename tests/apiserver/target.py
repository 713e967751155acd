"""What requests are about, and the time."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

from apiserver.resources import Resource
from apiserver.store import Key


class Target(NamedTuple):
    """What a request is about. `name` "" for a collection, `namespace` None for all of them."""

    resource: Resource
    version: str
    namespace: str | None
    name: str
    subresource: str

    @property
    def key(self) -> Key:
        return Key(self.resource.id, self.namespace or "", self.name)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
