"""The Kubernetes source: an API server's objects as the same stream that a directory gives.

One reflector a kind (`kubernetes_watch`) tells what changed; here objects are read, what did not
change in what Weft reads is dropped, and the rest is gathered until somebody takes it: sequential
per object, and never more than the newest of each. Kinds that the server does not serve are looked
for again and again. Nothing is yielded as complete before every kind has been listed once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from l7proxy.tasks import spawn
from mesh.model.decode import KINDS, InvalidObject, KindInfo, Object
from mesh.model.meta import ObjectKey
from mesh.model.references import GROUP
from mesh.policy import unreadable
from mesh.sources.documents import ObjectId, Problem
from mesh.sources.kubernetes_client import (
    Backoff,
    Client,
    ServerError,
    SourceError,
    bad_answer,
)
from mesh.sources.kubernetes_objects import PLACE, STATUS_IS_INPUT, problems, read
from mesh.sources.kubernetes_secrets import OTHERS, TLS, CopiedSecrets, OtherSecrets
from mesh.sources.kubernetes_watch import PAGE, Reflector
from mesh.sources.update import SourceUpdate

_log = logging.getLogger("weft.source")

# How often kinds that are not served are looked for; those that were are forgotten no sooner.
_DISCOVERY_S = 15.0
# Groups that are read leniently, since clusters may be newer. Policies are not: a field that is not
# known may be what a rule denies.
_LENIENT = frozenset(("", "discovery.k8s.io"))
# Of these an object may be a megabyte, and all of it is read first: fewer at once.
_LARGE = frozenset(("ConfigMap",))
_PAGE_OF_LARGE = 25
# Of these nothing but metadata is read.
_METADATA = frozenset(("Namespace",))


class Written(NamedTuple):
    """What of an object is for who writes its status: its version, and its status as it is."""

    version: str
    uid: str
    status: dict[str, Any]


class _Resource(msgspec.Struct):
    name: str


class _Resources(msgspec.Struct):
    """APIResourceList, of discovery."""

    resources: list[_Resource]


class _Kind:
    """One kind: what is in force of it, and what was told."""

    def __init__(self, source: KubernetesSource, group: str, info: KindInfo) -> None:
        self.info = info
        self.group = group
        self.reflectors: list[Reflector] = []
        # Of a version that is not served any more; what they knew is in force until it is known
        # whether another is, and since when none is.
        self._before: list[Reflector] = []
        self._absent_since: float | None = None
        self.tasks: list[asyncio.Task[None]] = []
        self.problem: Problem | None = None
        self.version = self.newest = 0
        self.current: dict[ObjectKey, Object] = {}
        self.written: dict[ObjectKey, Written] = {}
        self._source = source

    # --- what the reflector tells ----------------------------------------------------------------

    def changed(self, key: ObjectKey, raw: dict[str, Any]) -> None:
        # Items of a list come without them.
        raw["kind"] = self.info.kind
        raw["apiVersion"] = self.api_version
        source, ident = self._source, ObjectId(self.info.kind, key)
        before = self.current.get(key)
        metadata = raw["metadata"]
        if source.seen is not None:
            status = {} if self.info.kind in STATUS_IS_INPUT else raw.get("status") or {}
            self.written[key] = Written(metadata["resourceVersion"], metadata["uid"], status)
            source.seen(self.info.kind, key)
        try:
            obj = read(raw, custom=self.group not in _LENIENT)
        except InvalidObject as error:
            # What another object of the name was is not the last good version of this one.
            good = before if before and before.metadata.uid == metadata["uid"] else None
            kept = good is not None and not unreadable.why(good)
            left = None if kept else unreadable.closed(raw, error.errors) or good
            source.wrong[ident] = problems(raw, error, kept=kept, closed=left is not None)
            source.wake.set()
            if left is None:
                if not good:
                    self._take_away(ident, metadata["resourceVersion"])
                return
            obj = left
        else:
            if source.wrong.pop(ident, None) is not None:
                source.wake.set()
        if before is not None and _same(before, obj):
            return
        self.current[key] = obj
        self.newest = max(self.newest, number(metadata["resourceVersion"]))
        source.tell(ident, obj)

    def gone(self, key: ObjectKey, uid: str, version: str) -> None:
        ident = ObjectId(self.info.kind, key)
        now = self.current.get(key)
        if now is not None and now.metadata.uid != uid:
            # Another one has its name already.
            return
        if self.written.pop(key, None) is not None and self._source.seen is not None:
            self._source.seen(self.info.kind, key)
        if self._source.wrong.pop(ident, None) is not None:
            self._source.wake.set()
        self._take_away(ident, version)

    def _take_away(self, ident: ObjectId, version: str) -> None:
        if self.current.pop(ident.key, None) is not None:
            self.newest = max(self.newest, number(version))
            self._source.tell(ident, None)

    def reached(self, version: str) -> None:
        self.version = number(version)
        self._source.wake.set()

    def listed(self) -> None:
        self._source.wake.set()

    def failing(self, why: ServerError | None) -> None:
        text = "" if why is None else f"cannot be followed, what is known stays in force: {why}"
        self.say(text)

    def say(self, text: str, *, level: str = "error") -> None:
        before = self.problem
        self.problem = (
            Problem(PLACE, kind=self.info.kind, rule="source", message=text, level=level)  # type: ignore[arg-type]
            if text
            else None
        )
        if self.problem != before:
            if text:
                _log.warning("%s: %s", self.info.kind, text)
            else:
                _log.info("%s: can be followed again", self.info.kind)
            self._source.wake.set()

    def absent(self, what: str, sure_s: float) -> None:
        """The server does not serve it; where it is of other people's, nobody need care. What is
        known of it is forgotten once that is so for `sure_s`: a server that starts says it too, and
        without its policies everything would be open."""
        text = f"not served by the cluster ({what})"
        now = asyncio.get_running_loop().time()
        if self._absent_since is None:
            self._absent_since = now
        if self.current and now < self._absent_since + sure_s:
            self.say(f"{text}; if it stays so, what is known stays in force for {sure_s:g} s only")
            return
        for reflector in self._before:
            reflector.forget()
        self._before, self.version, self.newest = [], 0, 0
        text += ": install its CustomResourceDefinition to use it"
        self.say(text, level="warning" if self.group == GROUP else "note")

    # --- its place on the server -----------------------------------------------------------------

    api_version = ""

    def start(self, version: str, client: Client, backoff: Callable[[], Backoff]) -> None:
        self.api_version = f"{self.group}/{version}" if self.group else version
        root = "/apis" if self.group else "/api"
        path = f"{root}/{self.api_version}/{self.info.plural}"
        if self.info.kind != "Secret":
            metadata = self.info.kind in _METADATA
            page = _PAGE_OF_LARGE if self.info.kind in _LARGE else PAGE
            self.reflectors = [
                Reflector(client, path, self, metadata=metadata, page=page, backoff=backoff)
            ]
        elif namespace := self._source.secrets_namespace:
            path = f"{root}/{self.api_version}/namespaces/{namespace}/{self.info.plural}"
            self.reflectors = [Reflector(client, path, CopiedSecrets(self), backoff=backoff)]
        else:
            others = OtherSecrets(self)
            self.reflectors = [
                Reflector(client, path, self, query=TLS, backoff=backoff),
                Reflector(client, path, others, query=OTHERS, metadata=True, backoff=backoff),
            ]
        for reflector, before in zip(self.reflectors, self._before, strict=False):
            reflector.go_on_from(before)
        self._before, self._absent_since = [], None
        name = f"watch {self.info.plural}"
        self.tasks = [spawn(self._follow(one), name=name) for one in self.reflectors]

    async def _follow(self, reflector: Reflector) -> None:
        """Until the kind is not served any more, in this version."""
        try:
            await reflector.run()
        except ServerError as error:
            _log.info("%s: %s", self.info.kind, error)
        finally:
            self._source.wake.set()

    def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        self._before, self.reflectors, self.tasks = self.reflectors, [], []


class KubernetesSource:
    """`updates()` yields first the whole content, then every change. `kinds`: which ones, all if
    None. `seen`, where there is one, is called with kind and key of every object that is new, gone
    or has changed in any way, and `written` then tells what status it has on the server.
    `secrets_namespace`: Secrets are the copies there (mesh.model.secretcopy); "": themselves."""

    def __init__(
        self,
        kubeconfig: Path | None,
        *,
        kinds: frozenset[str] | None = None,
        seen: Callable[[str, ObjectKey], None] | None = None,
        secrets_namespace: str = "",
        discovery_s: float = _DISCOVERY_S,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self.client = Client(kubeconfig)
        self.seen = seen
        self.secrets_namespace = secrets_namespace
        self.wrong: dict[ObjectId, list[Problem]] = {}
        self.wake = asyncio.Event()
        self._pending: dict[str, dict[ObjectKey, Object | None]] = {}
        self._told: defaultdict[str, set[ObjectKey]] = defaultdict(set)
        self._discovery_s = discovery_s
        self._backoff = backoff
        self._server_problem: Problem | None = None
        self._look_now = asyncio.Event()
        self._discovered = False
        self._complete = False
        self._kinds = {
            kind: _Kind(self, group, info)
            for (group, kind), info in KINDS.items()
            if kinds is None or kind in kinds
        }

    def origin(self, kind: str, key: ObjectKey) -> tuple[str, int]:
        """Where an object in force comes from. KeyError: there is none."""
        self._kinds[kind].current[key]
        return PLACE, 0

    def get(self, kind: str, key: ObjectKey) -> Object | None:
        """An object as it is in force."""
        return self._kinds[kind].current.get(key)

    def written(self, kind: str, key: ObjectKey) -> Written | None:
        """What is on the server of an object, with `seen`; None: it is gone."""
        return self._kinds[kind].written.get(key)

    def all_written(self, kind: str) -> Mapping[ObjectKey, Written]:
        """What is on the server of every object of a kind."""
        return self._kinds[kind].written

    def version(self, kind: str) -> str:
        """The API version in which a kind is read."""
        return self._kinds[kind].api_version.rpartition("/")[2]

    def tell(self, ident: ObjectId, obj: Object | None) -> None:
        pending = self._pending.setdefault(ident.kind, {})
        if obj is None and ident.key not in self._told[ident.kind]:
            # Nobody has heard of it yet.
            pending.pop(ident.key, None)
        else:
            pending[ident.key] = obj
        self.wake.set()

    async def open(self) -> None:
        """Read the credentials before anything else. SourceError: there are none."""
        await self.client.open()

    async def close(self) -> None:
        """The connection, when nobody uses it any more."""
        await self.client.close()

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        """Until the caller closes it. A server that is away is waited for; what was in force stays
        in force."""
        discovery = spawn(self._discover(), name="discovery")
        told: tuple[Any, ...] = ()
        try:
            while True:
                await self.wake.wait()
                self.wake.clear()
                for task in (discovery, *self._tasks()):
                    if task.done() and not task.cancelled():
                        await self._ended(task)
                problems = self._problems()
                self._complete = self._complete or self._synced()
                if not self._complete:
                    if problems != told:
                        told = problems
                        yield SourceUpdate({}, problems, complete=False)
                    continue
                changes = self._taken()
                versions = {k: kind.version for k, kind in self._kinds.items() if kind.version}
                now = (problems, versions)
                if changes or now != told:
                    told = now
                    newest = {k: kind.newest for k, kind in self._kinds.items() if kind.newest}
                    yield SourceUpdate(changes, problems, True, versions, newest)
        finally:
            tasks = [discovery, *self._tasks()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _taken(self) -> dict[str, dict[ObjectKey, Object | None]]:
        """What is to be told, which then is."""
        changes = {kind: objects for kind, objects in self._pending.items() if objects}
        self._pending = {}
        for kind, objects in changes.items():
            told = self._told[kind]
            for key, obj in objects.items():
                (told.discard if obj is None else told.add)(key)
        return changes

    def _tasks(self) -> list[asyncio.Task[None]]:
        return [task for kind in self._kinds.values() for task in kind.tasks]

    def _synced(self) -> bool:
        """Whether everything that is served has been listed."""
        return self._discovered and all(
            reflector.synced for kind in self._kinds.values() for reflector in kind.reflectors
        )

    def _problems(self) -> tuple[Problem, ...]:
        found = [problem for problems in self.wrong.values() for problem in problems]
        found += [kind.problem for kind in self._kinds.values() if kind.problem is not None]
        if self._server_problem is not None:
            found.append(self._server_problem)
        return tuple(sorted(found))

    async def _ended(self, task: asyncio.Task[None]) -> None:
        """Following a kind ends where it is not served any more; anything else is a defect, and the
        caller's to see."""
        task.result()
        for kind in self._kinds.values():
            if task in kind.tasks:
                kind.stop()
                self._look_now.set()

    # --- discovery -------------------------------------------------------------------------------

    async def _discover(self) -> None:
        """Start what is served and not followed yet, for ever."""
        backoff = self._backoff()
        await self._connect(backoff)
        while True:
            try:
                await self._look()
                self._discovered = True
                self._server_trouble("")
                backoff.reset()
                self.wake.set()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._look_now.wait(), self._discovery_s)
                self._look_now.clear()
            except ServerError as error:
                self._server_trouble(f"{self.client.url} cannot be asked what it serves: {error}")
                await backoff.wait(error.retry_after_s, until=self.client.reachable)

    async def _connect(self, backoff: Backoff) -> None:
        while True:
            try:
                return await self.client.open()
            except SourceError as error:
                self._server_trouble(str(error))
                await backoff.wait()

    def _server_trouble(self, text: str) -> None:
        before = self._server_problem
        self._server_problem = Problem(PLACE, rule="source", message=text) if text else None
        if before != self._server_problem:
            if text:
                _log.error("%s", text)
            self.wake.set()

    async def _look(self) -> None:
        missing = [kind for kind in self._kinds.values() if not kind.reflectors]
        served: dict[str, frozenset[str]] = {}
        for kind in missing:
            for version in kind.info.versions:
                path = f"/apis/{kind.group}/{version}" if kind.group else f"/api/{version}"
                if path not in served:
                    served[path] = await self._served(path)
                if kind.info.plural in served[path]:
                    kind.say("")
                    kind.start(version, self.client, self._backoff)
                    break
            else:
                what = f"{kind.info.plural} of {kind.group or 'core'}"
                kind.absent(what, self._discovery_s)

    async def _served(self, path: str) -> frozenset[str]:
        try:
            found = await self.client.request("GET", path)
        except ServerError as error:
            if error.status == 404:
                return frozenset()
            raise
        try:
            return frozenset(one.name for one in msgspec.convert(found, _Resources).resources)
        except msgspec.ValidationError as error:
            raise bad_answer(path, str(error)) from None


def number(version: str) -> int:
    """A resourceVersion to compare with others of its server ("Resource versions": they are
    ordered); 0: there is none."""
    return int(version) if version.isdigit() else 0


def _same(a: Object, b: Object) -> bool:
    """But for the version, which every write of anything in the object changes."""
    metadata = msgspec.structs.replace(b.metadata, resource_version=a.metadata.resource_version)
    return bool(cast(Any, msgspec.structs.replace(cast(Any, b), metadata=metadata)) == a)
