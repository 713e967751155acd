"""The directory that the gateway watches: one file for the base, one for each test, rewritten
whole and renamed into place when an object in it changes."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Json = dict[str, Any]
_KEY = re.compile(r"\[([^\]]+)\]|([^.\[\]]+)")


class Ident(NamedTuple):
    kind: str
    namespace: str
    name: str

    @classmethod
    def of(cls, obj: Json) -> Ident:
        metadata = obj["metadata"]
        return cls(obj["kind"], metadata.get("namespace", ""), metadata["name"])


class Manifests:
    """Objects in files. What is written is what the files say, nothing is added."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, dict[Ident, Json]] = {}

    def put(self, file: str, objects: list[Json]) -> None:
        """A file with these objects; none of them may stand in another file."""
        self._files[file] = {Ident.of(obj): copy.deepcopy(obj) for obj in objects}
        self._write(file)

    def remove(self, file: str) -> list[Ident]:
        """Remove a file; what was in it."""
        (self._directory / f"{file}.yaml").unlink()
        return list(self._files.pop(file))

    def apply(self, file: str, obj: Json) -> None:
        """Create or replace an object, in its file or else in `file`."""
        ident = Ident.of(obj)
        where = self._where(ident) or file
        self._files.setdefault(where, {})[ident] = copy.deepcopy(obj)
        self._write(where)

    def delete(self, ident: Ident) -> None:
        where = self._where(ident)
        if where is None:
            raise KeyError(f"{ident} is in no file")
        del self._files[where][ident]
        self._write(where)

    def get(self, ident: Ident) -> Json:
        """A copy of an object as it is written. KeyError: there is none."""
        where = self._where(ident)
        if where is None:
            raise KeyError(f"{ident} is in no file")
        return copy.deepcopy(self._files[where][ident])

    def idents(self, file: str) -> list[Ident]:
        return list(self._files[file])

    def _where(self, ident: Ident) -> str | None:
        return next((name for name, file in self._files.items() if ident in file), None)

    def _write(self, file: str) -> None:
        text = yaml.safe_dump_all(self._files[file].values(), sort_keys=False)
        unfinished = self._directory / f".{file}.tmp"
        unfinished.write_text(text)
        unfinished.rename(self._directory / f"{file}.yaml")


def _keys(path: str) -> list[str]:
    """The keys of a path like spec.listeners or data[ca.crt]."""
    return [bracketed or plain for bracketed, plain in _KEY.findall(path)]


def look_up(obj: Json, path: str) -> Any:
    """The value at a path; field names in any case. KeyError: it is not there."""
    value: Any = obj
    for key in _keys(path):
        name = next((name for name in value if name.lower() == key.lower()), None)
        if name is None:
            raise KeyError(path)
        value = value[name]
    return value


def assign(obj: Json, path: str, value: Any) -> None:
    """Set the value at a path; what lies on the way is made."""
    *way, last = _keys(path)
    for key in way:
        obj = obj.setdefault(key, {})
    obj[last] = value
