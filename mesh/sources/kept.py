"""The last good text of each manifest file, for the next reader of the same tree: what is broken
when that starts loses nothing either.

A file each in a directory of its own: a line of JSON that says whose text it is, then the text.
They are for their owner only, because manifests hold Secrets. Knows no objects. What cannot be
kept is missed at the next start and not before, so it is only warned of.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from pathlib import Path

import msgspec

from mesh.sources.manifest import Document, UnreadableError, read_documents

_log = logging.getLogger("weft.source")
_DRAFT = "~"


class _Head(msgspec.Struct, frozen=True):
    """`path` is relative to `root`; `is_json`: it is not YAML; `digest` tells whether the text is
    whole."""

    root: str
    path: str
    is_json: bool
    digest: str


class Kept:
    """`directory`: where; None: nothing is kept. `root`: of the tree."""

    def __init__(self, directory: Path | None, root: Path) -> None:
        self._directory = directory
        self._root = str(root)
        self._warned = False

    def paths(self) -> list[str]:
        """Of which files there is a text. Those of other trees are removed."""
        found = []
        for file in self._files():
            kept = _read(file)
            if kept is not None and kept[0].root == self._root and file.name == _name(kept[0].path):
                found.append(kept[0].path)
            else:
                file.unlink(missing_ok=True)
        return found

    def documents(self, path: str) -> list[Document]:
        kept = _read(self._directory / _name(path)) if self._directory is not None else None
        if kept is None or (kept[0].root, kept[0].path) != (self._root, path):
            return []
        with contextlib.suppress(UnreadableError):  # of a Weft that could read it
            return read_documents(kept[1], is_json=kept[0].is_json)
        return []

    def put(self, path: str, data: bytes, *, is_json: bool) -> None:
        if self._directory is None:
            return
        digest = hashlib.sha256(data).hexdigest()
        head = msgspec.json.encode(_Head(self._root, path, is_json, digest))
        content = head + b"\n" + data
        file = self._directory / _name(path)
        try:
            if _bytes(file) == content:
                return
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft = file.with_name(file.name + _DRAFT)
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                out.write(content)
            draft.rename(file)
        except OSError as error:
            self._warn(path, error)
        else:
            self._warned = False

    def forget(self, path: str) -> None:
        if self._directory is not None:
            try:
                (self._directory / _name(path)).unlink(missing_ok=True)
            except OSError as error:
                self._warn(path, error)

    def _files(self) -> list[Path]:
        try:
            return list(self._directory.iterdir()) if self._directory is not None else []
        except OSError:
            return []

    def _warn(self, path: str, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "the last good version of %s cannot be kept in %s: %s; if the file is broken when "
                "Weft starts the next time, what is in it is not in force",
                path,
                self._directory,
                error.strerror,
            )


def _name(path: str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:32]


def _bytes(file: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return file.read_bytes()
    return None


def _read(file: Path) -> tuple[_Head, bytes] | None:
    """None: there is none, or it is not whole."""
    head, _, data = (_bytes(file) or b"").partition(b"\n")
    with contextlib.suppress(msgspec.DecodeError):
        said = msgspec.json.decode(head, type=_Head)
        if hashlib.sha256(data).hexdigest() == said.digest:
            return said, data
    return None
