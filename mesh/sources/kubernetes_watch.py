"""One kind of a Kubernetes API server, kept in step: list, then watch, for ever.

Knows resourceVersions, pages, bookmarks, 410 Gone; nothing of what objects mean. Source:
https://kubernetes.io/docs/reference/using-api/api-concepts/ ("Efficient detection of changes").
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from mesh.model.meta import ObjectKey
from mesh.sources.kubernetes_client import Backoff, Client, ServerError, bad_answer

T = TypeVar("T")

PAGE = 500
_WATCH_S = (300, 600)
_STOOD_S = 5.0
# A server's clock and ours are as far apart as that, as to when a watch has to end.
_EARLY_S = 0.5
# What a list and a watch answer with ("Metadata-only fetches").
_WHOLE = ("application/json", "application/json")
_METADATA = (
    "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
    "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
)


class Sink(Protocol):
    """Who wants to know. Calls come in the order of what happened, one object at a time."""

    def changed(self, key: ObjectKey, raw: dict[str, Any]) -> None:
        """New, or another than before."""

    def gone(self, key: ObjectKey, uid: str, version: str) -> None:
        """`version`: of the deletion, "" where it was only found out later."""

    def reached(self, version: str) -> None:
        """All changes up to this resourceVersion have been told."""

    def failing(self, why: ServerError | None) -> None:
        """The server cannot be followed now; None: it can again."""


class Known(NamedTuple):
    """The version of an object that was told last."""

    version: str
    uid: str


class _Metadata(msgspec.Struct, rename="camel"):
    """What every object has that an API server shows."""

    name: str
    resource_version: str
    uid: str
    namespace: str = ""


class _Object(msgspec.Struct):
    metadata: _Metadata


class _Version(msgspec.Struct, rename="camel"):
    resource_version: str


class _AtVersion(msgspec.Struct):
    metadata: _Version


class Event(msgspec.Struct):
    """Of a watch (metav1.WatchEvent)."""

    type: str
    object: dict[str, Any]


class _Error(msgspec.Struct):
    """Of metav1.Status."""

    code: int = 0
    reason: str = ""
    message: str = ""


class _ListVersion(_Version):
    continue_: str | None = msgspec.field(default=None, name="continue")


class _List(msgspec.Struct):
    metadata: _ListVersion
    items: list[dict[str, Any]] | None = None


class WatchError(ServerError):
    """A watch that was going on has ended with an event that says so."""


class Reflector:
    """`path` is that of the collection, read so many objects a `page`; with `metadata` objects come
    without anything else. `run` ends with ServerError 404 when the server does not serve it any
    more; everything else is tried again."""

    def __init__(
        self,
        client: Client,
        path: str,
        sink: Sink,
        *,
        query: dict[str, str] | None = None,
        metadata: bool = False,
        page: int = PAGE,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self.synced = False
        self._page = page
        self._client = client
        self._path = path
        self._sink = sink
        self._query: dict[str, str | int] = dict(query or {})
        self._list_as, self._watch_as = _METADATA if metadata else _WHOLE
        self._backoff = backoff()
        self._known: dict[ObjectKey, Known] = {}
        self._version = ""

    async def run(self) -> None:
        while True:
            pause: float | None = None
            try:
                if not self._version:
                    self._version = await self._list()
                    self.synced = True
                    self._sink.reached(self._version)
                    self._sink.failing(None)
                if await self._watch():
                    self._backoff.reset()
                    continue
            except ServerError as error:
                if error.status == 404:
                    raise
                if error.status == 410 or isinstance(error, WatchError):
                    # What happened since is known by nobody: all is read again, and only what
                    # differs is told, so nothing flaps.
                    self._version = ""
                if error.status != 410:
                    self._sink.failing(error)
                    pause = error.retry_after_s
            await self._backoff.wait(pause, until=self._client.reachable)

    def go_on_from(self, other: Reflector) -> None:
        """What the other one has told need not be told again: the same objects, by another path."""
        self._known = other._known

    def forget(self) -> None:
        """The server does not have the kind any more."""
        for key, known in list(self._known.items()):
            del self._known[key]
            self._sink.gone(key, known.uid, "")

    async def _list(self) -> str:
        """All objects, page by page, as they were at one version: that version."""
        seen: dict[ObjectKey, None] = {}
        token, limit = "", self._page
        while True:
            query = {**self._query, "limit": limit}
            if token:
                query["continue"] = token
            try:
                page = await self._client.request("GET", self._path, query, accept=self._list_as)
            except ServerError as error:
                if error.status == 410 and limit:
                    # Compacted between two pages: once more, in one piece, so that it ends. What
                    # the first pages had may have gone since.
                    seen.clear()
                    token, limit = "", 0
                    continue
                raise
            page = self._read(page, _List)
            for raw in page.items or ():
                seen[self._take(raw)] = None
            token = page.metadata.continue_ or ""
            if not token:
                break
            await asyncio.sleep(0)
        for key in [key for key in self._known if key not in seen]:
            self._sink.gone(key, self._known.pop(key).uid, "")
        return page.metadata.resource_version

    def _read(self, raw: object, kind: type[T]) -> T:
        return _converted(raw, kind, self._path)

    def _take(self, raw: dict[str, Any]) -> ObjectKey:
        metadata = self._read(raw, _Object).metadata
        key = ObjectKey(metadata.namespace, metadata.name)
        known = Known(metadata.resource_version, metadata.uid)
        if self._known.get(key) != known:
            self._known[key] = known
            self._sink.changed(key, raw)
        return key

    async def _watch(self) -> bool:
        """Until the server ends the stream. Whether it did any good: something came, or it stood
        for a while; streams that end at once are not to follow each other at once. In one that was
        silent to its end there was not even a bookmark: the version may be one of the future, as
        after etcd was restored from a backup, and all is read again."""
        lasts_s = random.randint(*_WATCH_S)
        query = {
            **self._query,
            "watch": "true",
            "resourceVersion": self._version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": lasts_s,
        }
        came = False
        async with self._client.stream(self._path, query, accept=self._watch_as) as lines:
            self._sink.failing(None)
            began = asyncio.get_running_loop().time()
            async for line in lines:
                if not came:
                    came = True
                    self._backoff.reset()
                self._event(line)
        stood_s = asyncio.get_running_loop().time() - began
        if not came and stood_s > lasts_s - _EARLY_S:
            self._version = ""
        return came or stood_s > _STOOD_S

    def _event(self, line: bytes) -> None:
        event = read_event(line, self._path)
        version = self._read(event.object, _AtVersion).metadata.resource_version
        if event.type == "DELETED":
            metadata = self._read(event.object, _Object).metadata
            key = ObjectKey(metadata.namespace, metadata.name)
            if (known := self._known.pop(key, None)) is not None:
                self._sink.gone(key, known.uid, version)
        elif event.type != "BOOKMARK":
            self._take(event.object)
        self._version = version
        self._sink.reached(version)


_decoder = msgspec.json.Decoder(Event)


def read_event(line: bytes, path: str) -> Event:
    """A line of a watch. WatchError: it says that the watch is broken; ServerError: it is nothing
    that a server says."""
    try:
        event = _decoder.decode(line)
    except msgspec.DecodeError as error:
        raise bad_answer(f"watch {path}", str(error)) from None
    if event.type == "ERROR":
        why = _converted(event.object, _Error, path)
        raise WatchError(why.code, why.reason, f"watch {path}: {why.message}")
    return event


def _converted(raw: object, kind: type[T], path: str) -> T:
    """ServerError: it is nothing that a server says."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise bad_answer(path, str(error)) from None
