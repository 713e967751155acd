"""Writes statuses to the API server: only where they differ, one object at a time, many at once.

Where a kind has no place for them, as NetworkPolicy since Kubernetes 1.28 and Cilium's kinds in
older CustomResourceDefinitions, what is true is told in Events alone. Knows requests and conflicts,
not what a status says (`render`).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import msgspec

from mesh.controller.events import Recorder, news
from mesh.controller.render import Path, render, rendered, undeclared
from mesh.model.decode import KINDS
from mesh.model.meta import ObjectKey
from mesh.sources.kubernetes import Written, number
from mesh.sources.kubernetes_client import (
    APPLY,
    MANAGER,
    Backoff,
    Client,
    ServerError,
    object_path,
)

_log = logging.getLogger("weft.controller")

_AT_ONCE = 8
# An object that cannot be written waits so long, then twice that, ...: roles may be changed, and
# webhooks come back.
_REFUSED_S = 0.2
# So does one whose status somebody else changes again and again: nobody wins such a fight.
_UNDONE_S = 1.0
_MOST_S = 120.0
# Of built-in kinds it is known.
_WITHOUT_STATUS = ("NetworkPolicy",)
_INFO = {kind: (group, info) for (group, kind), info in KINDS.items()}

Ident = tuple[str, ObjectKey]


class Place(NamedTuple):
    """Where an object is on the server."""

    api_version: str
    path: str


class Wanted(NamedTuple):
    """What is true of an object, of this uid: one that takes its name is another, of which nothing
    is known yet. `status` None: the object has none of ours."""

    status: msgspec.Struct | None
    uid: str


class _Done(NamedTuple):
    """What was written, and until when (of the loop's clock) it is not written anew; `pause`: how
    long that was, 0 the first time."""

    wanted: Wanted
    pause: float
    until: float


def place(kind: str, key: ObjectKey, version: str) -> Place:
    group, info = _INFO[kind]
    api_version = f"{group}/{version}" if group else version
    return Place(api_version, object_path(api_version, info.plural, key._asdict()))


class Writer:
    """`written(kind, key)` is what is known to be on the server, `version(kind)` the API version
    that is served. Writes only while `enabled`; when that begins, `look_again` with everything."""

    def __init__(
        self,
        client: Client,
        controller: str,
        written: Callable[[str, ObjectKey], Written | None],
        version: Callable[[str], str],
        recorder: Recorder,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self.enabled = False
        self.writes = 0
        self.wanted: dict[Ident, Wanted] = {}
        self._client = client
        self._controller = controller
        self._written = written
        self._version = version
        self._recorder = recorder
        self._backoff = backoff
        # What this process wrote and has not seen come back yet.
        self._own: dict[Ident, Written] = {}
        self._without_status = set(_WITHOUT_STATUS)
        # Fields that the cluster's version of a kind has not.
        self._undeclared: dict[str, set[Path]] = {}
        # What was told of objects that have no place for it.
        self._told: dict[Ident, Written] = {}
        self._done: dict[Ident, _Done] = {}
        # Objects that cannot be written, and the next pause; those that wait until one is over;
        # kinds that may not be written, of which that was told.
        self._refused: dict[Ident, float] = {}
        self._put_off: set[Ident] = set()
        self._complained: set[str] = set()
        self._queue: asyncio.Queue[Ident] = asyncio.Queue()
        self._queued: set[Ident] = set()
        self._busy: set[Ident] = set()

    def want(self, statuses: Mapping[Ident, Wanted]) -> None:
        """Statuses that are true now."""
        self.wanted.update(statuses)
        self.look_again(statuses)

    def look_again(self, idents: Iterable[Ident]) -> None:
        """These may differ from what is on the server."""
        if not self.enabled:
            return
        for ident in idents:
            if ident in self.wanted and ident not in self._queued:
                self._queued.add(ident)
                self._queue.put_nowait(ident)

    @property
    def idle(self) -> bool:
        return not self._queued and not self._busy

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(_AT_ONCE):
                group.create_task(self._work(), name=f"status writer {number}")

    async def _work(self) -> None:
        backoff = self._backoff()
        while True:
            ident = await self._queue.get()
            self._queued.discard(ident)
            if ident in self._busy:
                # Sequential per object: who is at it looks again.
                self.look_again((ident,))
                await asyncio.sleep(0.01)
                continue
            self._busy.add(ident)
            pause: float | None = None
            try:
                await self._write(ident)
                backoff.reset()
                continue
            except ServerError as error:
                if error.status == 403:
                    self._forbid(ident, error)
                    continue
                if error.status == 500:
                    # Perhaps of this object or kind alone: no other waits for that.
                    _log.warning("status of %s %s: %s; trying again", *ident, error)
                    self._wait(ident)
                    continue
                if error.status in (400, 404, 413, 422):
                    _log.error("status of %s %s cannot be written: %s", *ident, error)
                    continue
                _log.warning("status of %s %s: %s; trying again", *ident, error)
                pause = error.retry_after_s or 0.0
            finally:
                self._busy.discard(ident)
            await backoff.wait(pause)
            self.look_again((ident,))

    def _forbid(self, ident: Ident, error: ServerError) -> None:
        """Later, and no other object waits for that: other kinds may well be written."""
        if ident[0] not in self._complained:
            self._complained.add(ident[0])
            _log.error("status of %s %s cannot be written: %s; trying again", *ident, error)
        self._wait(ident)

    def _wait(self, ident: Ident) -> None:
        """Longer each time."""
        pause = self._refused.get(ident, _REFUSED_S)
        self._refused[ident] = min(2 * pause, _MOST_S)
        self._put_off_for(ident, random.uniform(0.5, 1.0) * pause)

    def _put_off_for(self, ident: Ident, pause: float) -> None:
        if ident not in self._put_off:
            self._put_off.add(ident)
            asyncio.get_running_loop().call_later(pause, self._again, ident)

    def _again(self, ident: Ident) -> None:
        self._put_off.discard(ident)
        self.look_again((ident,))

    def _allowed(self, kind: str) -> None:
        """One could be written: so, it seems, can the others."""
        self._complained.discard(kind)
        others = [ident for ident in self._refused if ident[0] == kind]
        for ident in others:
            del self._refused[ident]
        self.look_again(others)

    def _undone(self, ident: Ident, wanted: Wanted) -> bool:
        """Whether it was written as often as is good, and somebody else will not have it so."""
        done, now = self._done.get(ident), asyncio.get_running_loop().time()
        if done is None or done.until <= now or done.wanted != wanted:
            return False
        self._put_off_for(ident, done.until - now)
        return True

    def _remember(self, ident: Ident, wanted: Wanted) -> None:
        """That it is written."""
        self._refused.pop(ident, None)
        pause, before = 0.0, self._done.get(ident)
        if before is not None and before.wanted == wanted:
            pause = min(2 * before.pause or _UNDONE_S, _MOST_S)
            _log.info("status of %s %s was changed by somebody else, and put right", *ident)
        self._done[ident] = _Done(wanted, pause, asyncio.get_running_loop().time() + pause)

    def _actual(self, ident: Ident) -> Written | None:
        """The newest version that is known: the server's as seen, or what was written last."""
        seen, own = self._written(*ident), self._own.get(ident)
        if (
            own is None
            or seen is None
            or seen.uid != own.uid
            or number(seen.version) >= number(own.version)
        ):
            self._own.pop(ident, None)
            return seen
        return own

    async def _write(self, ident: Ident) -> None:
        while self.enabled:
            actual = self._actual(ident)
            wanted = self.wanted.get(ident)
            if actual is None:
                # Gone, or not seen yet; it will be told of when it comes.
                if wanted is None or wanted.status is None:
                    self.wanted.pop(ident, None)
                self._told.pop(ident, None)
                self._done.pop(ident, None)
                return
            if wanted is None or (wanted.uid and wanted.uid != actual.uid):
                return
            if ident[0] in self._without_status:
                await self._only_tell(ident, actual, wanted.status)
                return
            now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            body = render(
                wanted.status,
                actual.status,
                self._controller,
                now,
                self._undeclared.get(ident[0], ()),
            )
            if body is None or self._undone(ident, wanted):
                return
            kind, key = ident
            where = place(kind, key, self._version(kind))
            metadata = {"name": key.name, "uid": actual.uid}
            if key.namespace:
                metadata["namespace"] = key.namespace
            if body.locked:
                metadata["resourceVersion"] = actual.version
            obj = {
                "apiVersion": where.api_version,
                "kind": kind,
                "metadata": metadata,
                "status": body.status,
            }
            query = {"fieldManager": MANAGER, "force": "true"}
            try:
                answer = await self._client.request(
                    "PATCH", f"{where.path}/status", query, obj, content_type=APPLY
                )
            except ServerError as error:
                if error.status == 404:
                    return
                if error.status == 409:
                    # Changed in between, perhaps by another controller in the same list.
                    if not await self._read(ident, where, actual.uid):
                        return
                    continue
                if self._learn(kind, error):
                    continue
                raise
            self.writes += 1
            self._remember(ident, wanted)
            if kind in self._complained:
                self._allowed(kind)
            self._keep(ident, answer)
            version, status = answer["metadata"]["resourceVersion"], answer.get("status") or {}
            await self._tell(ident, actual, Written(version, actual.uid, status))
            return

    def _learn(self, kind: str, error: ServerError) -> bool:
        """Whether a write was refused for fields that the cluster's version of a kind has not, and
        that was not known: the next one is without them. Servers say 500, and may say 400."""
        known = self._undeclared.setdefault(kind, set())
        new = undeclared(str(error)) - known if error.status in (400, 500) else set()
        known |= new
        for path in sorted(new):
            _log.info("the cluster's %s has no status.%s: left out", kind, ".".join(path))
        if ("conditions",) in new:
            self._without_status.add(kind)
        return bool(new)

    async def _only_tell(
        self, ident: Ident, actual: Written, wanted: msgspec.Struct | None
    ) -> None:
        """By Events; what a controller before this one has told is told again, and counted."""
        before = self._told.get(ident)
        if before is None or before.uid != actual.uid:
            before = actual._replace(status={})
        now = actual._replace(status=rendered(wanted) if wanted is not None else {})
        self._told[ident] = now
        await self._tell(ident, before, now)

    async def _tell(self, ident: Ident, before: Written, now: Written) -> None:
        """What is new in our part of the status, as Events."""
        told = news(self._ours(before.status), self._ours(now.status))
        if told:
            kind, key = ident
            reference = {
                "apiVersion": place(kind, key, self._version(kind)).api_version,
                "kind": kind,
                "uid": now.uid,
                "resourceVersion": now.version,
            }
            await self._recorder.record(reference, key, told)

    def _ours(self, status: dict[str, Any]) -> dict[str, Any]:
        shared = {
            name: [one for one in status[name] if one.get("controllerName") == self._controller]
            for name in ("parents", "ancestors")
            if status.get(name)
        }
        return {**status, **shared}

    async def _read(self, ident: Ident, where: Place, uid: str) -> bool:
        """Read the object itself; whether it is still the same."""
        try:
            raw = await self._client.request("GET", where.path)
        except ServerError as error:
            if error.status == 404:
                return False
            raise
        self._keep(ident, raw)
        return bool(raw["metadata"]["uid"] == uid)

    def _keep(self, ident: Ident, raw: dict[str, Any]) -> None:
        metadata = raw["metadata"]
        self._own[ident] = Written(
            metadata["resourceVersion"], metadata["uid"], raw.get("status") or {}
        )
