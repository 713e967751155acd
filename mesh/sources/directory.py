"""The directory source: a tree of manifest files as typed objects.

`Manifests` is the state and does what one change asks for, synchronously; `DirectorySource` watches
and drives it. A file that cannot be read as manifests keeps its last good objects in force, and so
does a single object that became invalid, also if that is found at the start (`mesh.sources.kept`);
what is deleted is gone at once. Knows nothing of what objects mean to each other.
"""

from __future__ import annotations

import asyncio
import bisect
import json
import logging
import os
import stat
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec

from mesh.model.decode import Object
from mesh.model.meta import ObjectKey
from mesh.sources import tree
from mesh.sources.documents import Claim, ObjectId, Problem, merged, read_objects
from mesh.sources.kept import Kept
from mesh.sources.manifest import Document, UnreadableError, read_documents
from mesh.sources.update import SourceUpdate
from mesh.sources.watch import Watch

_log = logging.getLogger("weft.source")

# A file that is open for writing is read when it is closed, or after this long.
_WRITING_LIMIT_S = 2.0
_WRITING_RETRY_S = 0.005
# Editors replace a file by moving it away and writing a new one: a single file that is missing is
# gone after this long.
_MISSING_LIMIT_S = 0.02
# How often a root that has vanished is looked for.
_ROOT_RETRY_S = 1.0


_STAYS = "; its last good version stays in force"


class _File(NamedTuple):
    target: str
    objects: dict[ObjectId, Claim]


class _Current(NamedTuple):
    """The object in force: as its file has it, and with generation and resourceVersion."""

    written: Object
    published: Object


class Manifests:
    """The objects of a directory tree. `settled`: leave files alone that are being written. `kept`:
    a directory for their last good versions, None: there is none."""

    def __init__(self, root: Path, *, settled: bool = False, kept: Path | None = None) -> None:
        self.root = Path(os.path.abspath(root))
        self.unsettled: dict[str, float] = {}
        self.unreadable: frozenset[str] = frozenset()
        self._settled = settled
        self._kept = Kept(kept, self.root)
        self._files: dict[str, _File] = {}
        self._by_target: dict[str, set[str]] = {}
        self._claims: dict[ObjectId, list[Claim]] = {}
        self._current: dict[ObjectId, _Current] = {}
        self._problems: dict[str, tuple[Problem, ...]] = {}
        self._duplicates: dict[ObjectId, tuple[Problem, ...]] = {}
        self._version = 0
        self._walked = self._begun = self._complete = False

    def scan(self) -> SourceUpdate:
        """Walk the whole tree and read every file."""
        found = tree.walk(self.root)
        self.unreadable = frozenset(found.unreadable)
        self._walked = self._walked or "." not in found.unreadable
        # What cannot be looked into has not changed, as far as anybody knows.
        hidden = tuple(
            "" if directory == "." else directory + "/" for directory in found.unreadable
        )
        gone = [path for path in self._files if path not in found.files]
        if hidden:
            gone = [path for path in gone if not path.startswith(hidden)]
        self._problems = {k: v for k, v in self._problems.items() if not k.endswith("/")}
        for directory, why in found.unreadable.items():
            where = str(self.root / directory)
            self._problems[directory + "/"] = (Problem(where, rule="file", message=why),)
        for path in self._problems.keys() - self._files.keys() - found.files.keys():
            if not path.endswith("/"):
                del self._problems[path]
        return self.read([*gone, *self._left(found), *found.files])

    def _left(self, found: tree.Tree) -> list[str]:
        """Once the root has been looked into, files that there were before this reader."""
        if not self._walked or self._begun:
            return []
        self._begun = True
        return [path for path in self._kept.paths() if path not in found.files]

    def origin(self, kind: str, key: ObjectKey) -> tuple[str, int]:
        """File and document of an object in force. KeyError: there is none."""
        claims = self._claims.get(ObjectId(kind, key))
        if not claims:
            raise KeyError((kind, key))
        claim = claims[0]
        return str(self.root / claim.path), claim.document

    def affected(self, changed: Iterable[str]) -> list[str] | None:
        """Which files a set of changed absolute paths means; None: the tree must be walked."""
        result: dict[str, None] = {}
        prefix = f"{self.root}/"
        for path in changed:
            through = self._by_target.get(path, ())
            result.update(dict.fromkeys(through))
            relative = path.removeprefix(prefix)
            if relative == path or through:
                if path == str(self.root):
                    return None
                continue
            name = os.path.basename(path)
            if os.path.islink(path) or os.path.isdir(path):
                return None
            if tree.is_manifest(name) and "/." not in f"/{relative}":
                result[relative] = None
            elif (
                not os.path.lexists(path)
                and any(known.startswith(relative + "/") for known in self._files)
            ) or name.startswith(".."):
                return None
        return list(result)

    def outside(self) -> set[Path]:
        """Directories outside the root that hold files which symbolic links lead to."""
        root = os.path.realpath(self.root)
        return {
            Path(target).parent for target in self._by_target if not target.startswith(f"{root}/")
        }

    def targets_in(self, directory: Path) -> list[str]:
        """Real paths of the files in a directory that symbolic links lead to."""
        return [target for target in self._by_target if Path(target).parent == directory]

    def read(self, paths: Iterable[str]) -> SourceUpdate:
        """Read these files (relative paths) again; they may be new, changed or gone."""
        touched: set[ObjectId] = set()
        unique = dict.fromkeys(paths)
        for path in unique:
            touched |= self._read_file(path, alone=len(unique) == 1)
        changes: dict[str, dict[ObjectKey, Object | None]] = {}
        for ident in touched:
            self._elect(ident, changes)
        # What is being written at the first reading may have been in force before.
        self._complete = self._complete or (self._walked and not self.unsettled)
        return SourceUpdate(changes, self._all_problems(), self._complete)

    def _read_file(self, path: str, *, alone: bool) -> set[ObjectId]:
        """Read one file; which objects are touched by it, before or now."""
        full = str(self.root / path)
        before = self._files.get(path)
        try:
            settled = self._settled and not self._waited(path, _WRITING_LIMIT_S)
            data = tree.read(full, settled=settled)
            self.unsettled.pop(path, None)
            documents = read_documents(data, is_json=path.endswith(".json"))
        except tree.BeingWritten:
            self.unsettled.setdefault(path, time.monotonic())
            return set()
        except FileNotFoundError:
            if self._settled and before and alone and not self._waited(path, _MISSING_LIMIT_S):
                self.unsettled.setdefault(path, time.monotonic())
                return set()
            self._problems.pop(path, None)
            self.unsettled.pop(path, None)
            if os.path.islink(full):
                self._problems[path] = (
                    Problem(full, rule="file", message="a symbolic link to nothing"),
                )
            self._kept.forget(path)
            return self._replace(path, None)
        except (tree.FileError, UnreadableError) as error:
            good = before.objects if before else self._last_good(path, full)
            kept = _STAYS if good else ""
            self._problems[path] = (Problem(full, rule="file", message=f"{error}{kept}"),)
            if before or not good:
                return set()
            return self._replace(path, _File(os.path.realpath(full), good))
        good = before.objects if before else {}
        objects, problems = read_objects(path, full, documents, good)
        if not before and any(problem.level == "error" for problem in problems):
            good = self._last_good(path, full)
            objects, problems = read_objects(path, full, documents, good)
        if problems:
            self._problems[path] = tuple(problems)
        else:
            self._problems.pop(path, None)
        stale = {
            ident
            for ident, claim in objects.items()
            if ident in good and claim.object is good[ident].object
        }
        self._keep(path, data, documents, stale)
        return self._replace(path, _File(os.path.realpath(full), objects))

    def _last_good(self, path: str, full: str) -> dict[ObjectId, Claim]:
        """What an earlier reader of the tree has left of a file."""
        return read_objects(path, full, self._kept.documents(path), {})[0]

    def _keep(
        self, path: str, data: bytes, documents: list[Document], stale: set[ObjectId]
    ) -> None:
        """For the next reader: what is written, with objects as they were that are `stale`."""
        is_json = path.endswith(".json")
        if stale:
            value = merged(documents, self._kept.documents(path), stale)
            data, is_json = json.dumps(value).encode(), True
        self._kept.put(path, data, is_json=is_json)

    def _waited(self, path: str, limit_s: float) -> bool:
        since = self.unsettled.get(path)
        return since is not None and time.monotonic() - since > limit_s

    def _replace(self, path: str, new: _File | None) -> set[ObjectId]:
        old = self._files.pop(path, None)
        touched: set[ObjectId] = set()
        if old is not None:
            links = self._by_target[old.target]
            links.discard(path)
            if not links:
                del self._by_target[old.target]
            for ident, claim in old.objects.items():
                self._claims[ident].remove(claim)
            touched |= old.objects.keys()
        if new is not None:
            self._files[path] = new
            self._by_target.setdefault(new.target, set()).add(path)
            for ident, claim in new.objects.items():
                bisect.insort(self._claims.setdefault(ident, []), claim, key=_position)
            touched |= new.objects.keys()
        return touched

    def _elect(self, ident: ObjectId, changes: dict[str, dict[ObjectKey, Object | None]]) -> None:
        """The first claim by path order is the object; the others are problems."""
        claims = self._claims[ident]
        if not claims:
            del self._claims[ident]
            self._duplicates.pop(ident, None)
            if self._current.pop(ident, None) is not None:
                changes.setdefault(ident.kind, {})[ident.key] = None
            return
        winner, *others = claims
        self._duplicates.pop(ident, None)
        if others:
            self._duplicates[ident] = tuple(
                Problem(
                    str(self.root / other.path),
                    document=other.document,
                    kind=ident.kind,
                    namespace=ident.key.namespace,
                    name=ident.key.name,
                    rule="duplicate",
                    message=f"already given in {self.root / winner.path}, "
                    f"document {winner.document}, which counts: remove one of them",
                )
                for other in others
            )
        before = self._current.get(ident)
        if before is not None and before.written == winner.object:
            return
        self._version += 1
        published = _stamp(winner.object, before, self._version)
        self._current[ident] = _Current(winner.object, published)
        changes.setdefault(ident.kind, {})[ident.key] = published

    def _all_problems(self) -> tuple[Problem, ...]:
        lists = (*self._problems.values(), *self._duplicates.values())
        return tuple(sorted(p for problems in lists for p in problems)) if lists else ()


def _position(claim: Claim) -> tuple[str, int]:
    return claim.path, claim.position


def _stamp(written: Object, before: _Current | None, version: int) -> Object:
    """Give the object what an API server would: generation (+1 with the spec) and
    resourceVersion."""
    generation = 1
    if before is not None:
        generation = (before.published.metadata.generation or 1) + _spec_differs(
            written, before.written
        )
    metadata = msgspec.structs.replace(
        written.metadata,
        generation=max(generation, written.metadata.generation or 0),
        resource_version=str(version),
    )
    return cast(Object, msgspec.structs.replace(cast(Any, written), metadata=metadata))


def _spec_differs(a: Object, b: Object) -> bool:
    return any(
        getattr(a, field) != getattr(b, field)
        for field in a.__struct_fields__
        if field not in ("metadata", "status")
    )


class DirectorySource:
    """Watches a directory tree. `updates()` yields first the whole content, then every change.
    `kept`: see Manifests."""

    def __init__(self, root: Path, kept: Path | None = None) -> None:
        self._manifests = Manifests(root, settled=True, kept=kept)
        self._events: asyncio.Queue[set[str]] = asyncio.Queue()
        self._watch: Watch | None = None
        self._watched: tuple[int, int] | None = None
        self._outside: tuple[set[Path], Watch | None] = (set(), None)

    def origin(self, kind: str, key: ObjectKey) -> tuple[str, int]:
        """File and document of an object in force. KeyError: there is none."""
        return self._manifests.origin(kind, key)

    async def close(self) -> None:
        """Nothing is held beyond `updates`."""

    async def updates(self) -> AsyncGenerator[SourceUpdate, None]:
        """Until the caller closes it. A root that is not there yet, or goes, is waited for; what
        was in force stays in force."""
        try:
            self._watch_root()
            update = await asyncio.to_thread(self._manifests.scan)
            known = update.problems, update.complete
            yield update
            while True:
                update = await self._next()
                if update.changes or (update.problems, update.complete) != known:
                    known = update.problems, update.complete
                    yield update
        finally:
            for watch in (self._watch, self._outside[1]):
                if watch is not None:
                    await asyncio.to_thread(watch.close)

    async def _next(self) -> SourceUpdate:
        manifests = self._manifests
        self._watch_outside()
        if self._watch is not None and self._watched != self._identity():
            # What is at the root's path now, if anything, is not what is watched.
            await asyncio.to_thread(self._watch.close)
            self._watch = None
        timeout = _ROOT_RETRY_S if self._watch is None else None
        if manifests.unsettled:
            timeout = _WRITING_RETRY_S
        paths: set[str] = set()
        with suppress(TimeoutError):
            paths = await asyncio.wait_for(self._events.get(), timeout)
        while not self._events.empty():
            paths |= self._events.get_nowait()
        if self._watch is None:
            self._watch_root()
            return await asyncio.to_thread(manifests.scan)
        files = await asyncio.to_thread(manifests.affected, paths)
        if files is not None:
            return await asyncio.to_thread(manifests.read, [*files, *manifests.unsettled])
        unreadable = manifests.unreadable
        update = await asyncio.to_thread(manifests.scan)
        if unreadable - manifests.unreadable:
            # What could not be looked into is not watched either.
            await asyncio.to_thread(self._watch.close)
            self._watch_root()
            self._events.put_nowait({str(manifests.root)})
        return update

    def _watch_root(self) -> None:
        self._watch, self._watched = None, self._identity()
        if self._watched is not None:
            try:
                self._watch = Watch([self._manifests.root], self._events, recursive=True)
            except OSError as error:
                _log.error(
                    "cannot watch %s: %s; looking every %g s instead (where the limit of watches "
                    "is reached: sysctl fs.inotify.max_user_watches, max_user_instances)",
                    self._manifests.root,
                    error,
                    _ROOT_RETRY_S,
                )

    def _identity(self) -> tuple[int, int] | None:
        """Which directory is at the root's path; None: there is none."""
        try:
            info = os.stat(self._manifests.root)
        except OSError:
            return None
        return (info.st_dev, info.st_ino) if stat.S_ISDIR(info.st_mode) else None

    def _watch_outside(self) -> None:
        manifests = self._manifests
        directories, watch = self._outside
        wanted = manifests.outside()
        if wanted == directories:
            return
        if watch is not None:
            watch.close()
        watch = Watch(wanted, self._events, recursive=False) if wanted else None
        self._outside = (wanted, watch)
        # What happened between the reading and the watch is seen by reading once more.
        self._events.put_nowait({path for d in wanted for path in manifests.targets_in(d)})
