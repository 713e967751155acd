"""Events for users: what `kubectl describe` shows of an object when something does not hold any
more, or holds again. Knows conditions as plain data, and the Event API (core/v1).

An Event is no more than a hint: one that cannot be written is forgotten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from mesh.model.meta import ObjectKey
from mesh.sources.kubernetes_client import MERGE, Client, ServerError

Json = dict[str, Any]
# Conditions that say in so many words that something is served; others have words of their own.
_TOLD = frozenset(("Accepted", "Programmed", "ResolvedRefs", "Conflicted"))
_BAD_WHEN_TRUE = frozenset(("Conflicted",))
_MAX_MESSAGE = 1024


class News(NamedTuple):
    """`type`: Normal or Warning, as Events have it."""

    type: str
    reason: str
    message: str


def news(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[News]:
    """What is new in a status: what does not hold, or holds where it did not."""
    old = dict(_conditions(before))
    result = []
    for place, now in _conditions(after):
        then = old.get(place)
        well = (now["status"] == "True") != (now["type"] in _BAD_WHEN_TRUE)
        if now["status"] == "Unknown" or (then is not None and _said(then) == _said(now)):
            continue
        where = f"{place[0]}: " if place[0] else ""
        if not well:
            text = f"{where}{now['type']} is {now['status']}: {now.get('message', '')}"
            result.append(News("Warning", now["reason"], text.rstrip(": ")[:_MAX_MESSAGE]))
        elif then is not None and then["status"] not in ("Unknown", now["status"]):
            result.append(News("Normal", now["type"], f"{where}{now['type']} again"))
    return result


def _said(condition: Mapping[str, Any]) -> tuple[Any, ...]:
    return condition["status"], condition["reason"], condition.get("message", "")


def _conditions(status: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Json]]:
    """Every condition that is told of, by whose it is and its type."""
    groups: list[tuple[str, Mapping[str, Any]]] = [("", status)]
    groups += [(f"listener {one['name']}", one) for one in status.get("listeners") or ()]
    for part, ref in (("parents", "parentRef"), ("ancestors", "ancestorRef")):
        for one in status.get(part) or ():
            names = (one[ref].get(key, "") for key in ("kind", "namespace", "name", "sectionName"))
            groups.append(("/".join(filter(None, names)), one))
    for whose, group in groups:
        for condition in group.get("conditions") or ():
            if condition["type"] in _TOLD:
                yield (whose, condition["type"]), condition


class Recorder:
    """Writes Events about objects; the same one again only counts."""

    def __init__(self, client: Client, identity: str) -> None:
        self._client = client
        self._identity = identity

    async def record(self, reference: Json, key: ObjectKey, told: list[News]) -> None:
        """`reference`: apiVersion, kind, uid, resourceVersion of the object."""
        for one in told:
            try:
                await self._record(reference, key, one)
            except ServerError:
                return

    async def _record(self, reference: Json, key: ObjectKey, told: News) -> None:
        namespace = key.namespace or "default"
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        seed = "\0".join((reference["uid"], *told)).encode()
        name = f"{key.name[:200]}.{hashlib.sha256(seed).hexdigest()[:16]}"
        path = f"/api/v1/namespaces/{namespace}/events"
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": namespace},
            "involvedObject": {**reference, "name": key.name, "namespace": key.namespace},
            "type": told.type,
            "reason": told.reason,
            "message": told.message,
            "source": {"component": "weft-controller"},
            "reportingComponent": "weft.dev/gateway-controller",
            "reportingInstance": self._identity,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        try:
            await self._client.request("POST", path, {}, event)
        except ServerError as error:
            if error.status != 409:
                raise
            before = await self._client.request("GET", f"{path}/{name}")
            body = {"count": int(before.get("count") or 1) + 1, "lastTimestamp": now}
            await self._client.request("PATCH", f"{path}/{name}", {}, body, content_type=MERGE)
