"""Lists (api-concepts, "Resource versions", "Retrieving large results sets in chunks"), and the
shapes in which objects are shown."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
from aiohttp import web

from apiserver.errors import ApiError, bad_request, expired
from apiserver.selectors import predicate
from apiserver.store import Compacted, Key, Raw, Store
from apiserver.target import Target

_PARTIAL = "as=PartialObjectMetadata"
_encoder = msgspec.json.Encoder()


def answer(store: Store, request: web.Request, target: Target) -> web.Response:
    """api-concepts, "Retrieving large results sets in chunks" and "Resource versions"."""
    query = request.query
    limit = int(query.get("limit") or 0)
    after: Key | None = None
    revision = store.revision
    asked = query.get("resourceVersion", "")
    if token := query.get("continue"):
        if asked and asked != "0":
            raise bad_request("specifying resource version is not allowed when using continue")
        revision, *last = json.loads(base64.urlsafe_b64decode(token))
        after = Key(target.resource.id, *last)
    elif asked and asked != "0":
        if int(asked) > store.revision:
            text = f"Too large resource version: {asked}, current: {store.revision}"
            details = {
                "retryAfterSeconds": 1,
                "causes": [{"reason": "ResourceVersionTooLarge", "message": text}],
            }
            raise ApiError(504, "Timeout", text, details=details)
        if query.get("resourceVersionMatch") == "Exact":
            revision = int(asked)
    elif asked == "0":
        # "Any": served from the cache, which pays no heed to limits.
        limit = 0
    chosen = selected(request, target)
    try:
        found = [
            (key, obj)
            for key, obj in store.list(target.resource.id, target.namespace, revision)
            if (after is None or key > after) and chosen(obj)
        ]
    except Compacted:
        text = "The provided continue parameter is too old to display a consistent list result."
        raise expired(text) from None
    metadata: Raw = {"resourceVersion": str(revision)}
    if limit and len(found) > limit:
        metadata["remainingItemCount"] = len(found) - limit
        found = found[:limit]
        last_key = found[-1][0]
        token = json.dumps([revision, last_key.namespace, last_key.name]).encode()
        metadata["continue"] = base64.urlsafe_b64encode(token).decode()
    reshape = reshaped(request)
    resource = target.resource
    items = [reshape(versioned(target, obj)) for _, obj in found]
    kind, version = f"{resource.kind}List", resource.api_version(target.version)
    if _PARTIAL in request.headers.get("Accept", ""):
        kind, version = "PartialObjectMetadataList", "meta.k8s.io/v1"
    return web.Response(
        body=_encoder.encode(
            {"kind": kind, "apiVersion": version, "metadata": metadata, "items": items}
        ),
        content_type="application/json",
    )


def selected(request: web.Request, target: Target) -> Any:
    query = request.query
    return predicate(
        target.resource, query.get("labelSelector", ""), query.get("fieldSelector", "")
    )


def reshaped(request: web.Request) -> Any:
    """api-concepts, "Metadata-only fetches", by the Accept header; a client that would rather have
    a Table gets the objects, which it must be able to do with."""
    if _PARTIAL not in request.headers.get("Accept", ""):
        return lambda obj: obj
    return lambda obj: {
        "kind": "PartialObjectMetadata",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": obj["metadata"],
    }


def versioned(target: Target, obj: Raw) -> Raw:
    """In the version asked for (crds, "Versions": conversion None changes apiVersion only)."""
    return {**obj, "apiVersion": target.resource.api_version(target.version)}
