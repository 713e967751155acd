"""Watches (api-concepts, "Efficient detection of changes" and "Watch bookmarks")."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from apiserver.errors import expired
from apiserver.store import Compacted, Event, Raw
from apiserver.target import Target

if TYPE_CHECKING:
    from apiserver.server import ApiServer

_encoder = msgspec.json.Encoder()


async def serve_watch(
    server: ApiServer,
    request: web.Request,
    target: Target,
    chosen: Callable[[Raw], bool],
    reshape: Callable[[Raw], Raw],
) -> web.StreamResponse:
    """Events until the client goes, timeoutSeconds have passed, or a fault cuts the stream."""
    query, store, resource = request.query, server.store, target.resource
    asked = query.get("resourceVersion", "")
    api_version = resource.api_version(target.version)
    # Registered first: nothing falls between what is there and what comes.
    queue = store.watch(resource.id)
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    left = server.faults.lifetime(request.path)

    def shown(kind: str, obj: Raw) -> bytes:
        return (
            _encoder.encode({"type": kind, "object": reshape({**obj, "apiVersion": api_version})})
            + b"\n"
        )

    try:
        first: list[bytes] = []
        seen = store.revision
        if asked in ("", "0"):
            # "Get State and Start at Any": what is there comes as ADDED first.
            for _, obj in store.list(resource.id, target.namespace, store.revision):
                if chosen(obj):
                    first.append(shown("ADDED", obj))
        else:
            seen = int(asked)
            try:
                missed = store.since(resource.id, seen)
            except Compacted:
                # "410 Gone responses"
                error = expired(f"too old resource version: {asked} ({store.compacted})")
                if server.faults.gone_as_status:
                    raise error from None
                await response.prepare(request)
                status = {**error.status, "code": server.faults.gone_code}
                await response.write(_encoder.encode({"type": "ERROR", "object": status}) + b"\n")
                return response
            for event in missed:
                if line := _line(event, target, chosen, shown):
                    first.append(line)
                seen = event.revision
        await response.prepare(request)
        deadline = asyncio.get_running_loop().time() + float(query.get("timeoutSeconds") or 1800)
        lines = first
        while True:
            for line in lines:
                if left is not None and left <= 0:
                    await _cut(server, response, request, line)
                    return response
                await response.write(line)
                left = None if left is None else left - 1
            lines = []
            now = asyncio.get_running_loop().time()
            if now >= deadline:
                return response
            try:
                wait = min(server.bookmark_s, deadline - now)
                if left is not None and left <= 0:
                    wait = min(wait, 0.01)
                event = await asyncio.wait_for(queue.get(), wait)
            except TimeoutError:
                if left is not None and left <= 0:
                    await _cut(server, response, request, b"")
                    return response
                # "Watch bookmarks": all changes up to it have been sent, also one that has come
                # since the wait ended. Who asks from a version that is not there yet hears nothing
                # until it is (apiserver's cacher: only what is newer than what was asked for).
                told = queue.empty() and seen <= store.revision
                if told and query.get("allowWatchBookmarks") in ("true", "1"):
                    lines.append(_bookmark(server, resource.kind, api_version))
                continue
            if event.revision > seen and (line := _line(event, target, chosen, shown)):
                lines.append(line)
    except ConnectionError:
        # The client has gone; there is nobody to tell.
        return response
    finally:
        store.unwatch(resource.id, queue)


async def _cut(
    server: ApiServer, response: web.StreamResponse, request: web.Request, line: bytes
) -> None:
    """End the connection without a word, perhaps in the middle of a line."""
    faults = server.faults
    faults.cut_watches -= 1
    faults.cuts += 1
    if line and faults.random.random() < 0.5:
        await response.write(line[: len(line) // 2])
    if request.transport is not None:
        request.transport.close()


def _line(
    event: Event,
    target: Target,
    chosen: Callable[[Raw], bool],
    shown: Callable[[str, Raw], bytes],
) -> bytes | None:
    """What a watcher sees of a write: an object that begins or ceases to match its selectors is
    added or deleted for it."""
    if target.namespace is not None and event.key.namespace != target.namespace:
        return None
    before = event.old is not None and chosen(event.old)
    after = event.new is not None and chosen(event.new)
    if not before and not after:
        return None
    kind = "MODIFIED" if before and after else "ADDED" if after else "DELETED"
    obj = event.last
    if kind == "DELETED" and event.new is not None:
        assert event.old is not None
        version = {"resourceVersion": event.last["metadata"]["resourceVersion"]}
        obj = {**event.old, "metadata": {**event.old["metadata"], **version}}
    return shown(kind, obj)


def _bookmark(server: ApiServer, kind: str, api_version: str) -> bytes:
    metadata = {"resourceVersion": str(server.store.revision), "creationTimestamp": None}
    obj: dict[str, Any] = {"kind": kind, "apiVersion": api_version, "metadata": metadata}
    return _encoder.encode({"type": "BOOKMARK", "object": obj}) + b"\n"
