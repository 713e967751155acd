"""Bytes of a manifest file to plain values, one per document.

YAML as Kubernetes reads it (sigs.k8s.io/yaml): YAML 1.1 booleans, timestamps stay strings, a key
given twice is an error. Bounded in size, depth and what aliases expand to, because whoever may
write a manifest may not thereby stop the gateway. Knows no kinds and no files.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

MAX_FILE = 16 * 1024 * 1024
MAX_DEPTH = 100
# What aliases of one document may expand to, in characters.
MAX_EXPANDED = 4 * 1024 * 1024

_TAG = "tag:yaml.org,2002:"
# Scalars of go-yaml v2, which Kubernetes uses; "y" and "n" are booleans there.
_WORDS: dict[str, Any] = {
    **{
        spelled: value
        for value, words in ((True, "y yes true on"), (False, "n no false off"))
        for word in words.split()
        for spelled in (word, word.capitalize(), word.upper())
    },
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **{
        sign + word: float(f"{sign}inf")
        for sign in ("", "+", "-")
        for word in (".inf", ".Inf", ".INF")
    },
}
_INT = re.compile(r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+|0|[1-9][0-9_]*)\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
# Longer runs of digits are no number anybody means (and int() would refuse them).
_MAX_DIGITS = 400


# What libyaml says past a bound of its own, which is higher than ours: newer ones look ahead so far
# before they tell of anything that was opened.
_TOO_DEEP = "exceeded maximum nesting depth"


class UnreadableError(Exception):
    """The whole file says nothing that can be used; the message says where and why."""


class Document(NamedTuple):
    """A document's value; `number` counts from 1. `errors` are (field path, what is wrong)."""

    number: int
    value: Any
    errors: tuple[tuple[str, str], ...] = ()


def read_documents(data: bytes, *, is_json: bool = False) -> list[Document]:
    """All documents that are not empty. UnreadableError: not UTF-8, not YAML, or past a bound."""
    if len(data) > MAX_FILE:
        raise UnreadableError(f"larger than {MAX_FILE >> 20} MiB: split it into several files")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"not UTF-8 at byte {error.start}: manifests are text in UTF-8"
        ) from None
    if is_json:
        return _read_json(text)
    try:
        return list(_read_yaml(text))
    except yaml.YAMLError as error:
        raise UnreadableError(_explain(error)) from None


def _explain(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    if mark and what == _TOO_DEEP:
        return f"line {mark.line + 1}: nested deeper than {MAX_DEPTH}"
    where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"not YAML{where}: {what}"


def _read_json(text: str) -> list[Document]:
    errors: list[tuple[str, str]] = []

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                errors.append((key, "given twice"))
            else:
                result[key] = value
        return result

    if not text.strip():
        return []
    try:
        value = json.loads(text, object_pairs_hook=members)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"not JSON: {error}") from None
    return [Document(1, value, tuple(errors))]


class _Frame:
    """A collection that is not closed yet."""

    __slots__ = ("anchor", "container", "depth", "key", "merges", "size")

    def __init__(self, container: dict[str, Any] | list[Any], anchor: str | None) -> None:
        self.container = container
        self.anchor = anchor
        self.key: str | None = None
        self.merges: list[dict[str, Any]] = []
        self.size = 8
        self.depth = 1


class _Anchored(NamedTuple):
    value: Any
    size: int
    depth: int


_MERGE = "<<\0"  # no manifest can spell this key: NUL is not allowed in YAML


class _Builder:
    """Builds one document from parser events, without recursion."""

    def __init__(self) -> None:
        self.value: Any = None
        self.errors: list[tuple[str, str]] = []
        self._stack: list[_Frame] = []
        self._anchors: dict[str, _Anchored] = {}
        self._expanded = 0

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.MappingStartEvent | yaml.SequenceStartEvent):
            self._open({} if isinstance(event, yaml.MappingStartEvent) else [], event)
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._close()
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        text: str = event.value
        if self._expects_key():
            frame = self._stack[-1]
            if text == "<<" and not event.style:
                frame.key = _MERGE
            else:
                value = self._resolve(event)
                frame.key = text if isinstance(value, str) or value is None else _plain(value)
            if event.anchor:
                self._anchors[event.anchor] = _Anchored(text, 8 + len(text), 0)
            return
        self._add(self._resolve(event), 8 + len(text), 0, event.anchor, event)

    def _resolve(self, event: yaml.ScalarEvent) -> Any:
        text: str = event.value
        tag: str | None = event.tag
        if tag is None:
            return text if event.style else resolve(text)
        match tag.removeprefix(_TAG):
            case "!" | "str" | "timestamp":
                return text
            case "int" | "float" | "bool" | "null":
                return resolve(text)
            case "binary":
                try:
                    return base64.b64decode("".join(text.split()), validate=True).decode()
                except (binascii.Error, UnicodeDecodeError):
                    self.errors.append((self._path(), "!!binary is not base64 of UTF-8 text"))
                    return text
        self.errors.append((self._path(), f"tag {tag} is not supported"))
        return text

    def _open(
        self,
        container: dict[str, Any] | list[Any],
        event: yaml.MappingStartEvent | yaml.SequenceStartEvent,
    ) -> None:
        if self._expects_key():
            raise UnreadableError(f"line {_line(event)}: a key must be text")
        if len(self._stack) >= MAX_DEPTH:
            raise UnreadableError(f"line {_line(event)}: nested deeper than {MAX_DEPTH}")
        self._stack.append(_Frame(container, event.anchor))

    def _close(self) -> None:
        frame = self._stack.pop()
        if isinstance(frame.container, dict):
            for merged in frame.merges:
                for key, value in merged.items():
                    frame.container.setdefault(key, value)
        self._add(frame.container, frame.size, frame.depth, frame.anchor, None)

    def _alias(self, event: yaml.AliasEvent) -> None:
        anchored = self._anchors.get(event.anchor or "")
        if anchored is None:
            raise UnreadableError(f"line {_line(event)}: no anchor &{event.anchor} before this")
        if self._expects_key():
            if not isinstance(anchored.value, str):
                raise UnreadableError(f"line {_line(event)}: a key must be text")
            self._stack[-1].key = anchored.value
            return
        self._expanded += anchored.size
        if self._expanded > MAX_EXPANDED or len(self._stack) + anchored.depth > MAX_DEPTH:
            raise UnreadableError(f"line {_line(event)}: aliases expand to too much")
        self._add(anchored.value, anchored.size, anchored.depth, None, event)

    def _expects_key(self) -> bool:
        if not self._stack:
            return False
        frame = self._stack[-1]
        return frame.key is None and isinstance(frame.container, dict)

    def _add(
        self, value: Any, size: int, depth: int, anchor: str | None, event: yaml.Event | None
    ) -> None:
        if anchor:
            self._anchors[anchor] = _Anchored(value, size, depth)
        if not self._stack:
            self.value = value
            return
        frame = self._stack[-1]
        frame.size += size
        frame.depth = max(frame.depth, depth + 1)
        if isinstance(frame.container, list):
            frame.container.append(value)
            return
        key = frame.key
        assert key is not None
        if key == _MERGE:
            self._merge(frame, value)
        elif key in frame.container:
            self.errors.append((self._path(), "given twice in the same mapping"))
        else:
            frame.container[key] = value
        frame.key = None

    def _merge(self, frame: _Frame, value: Any) -> None:
        sources = value if isinstance(value, list) else [value]
        if all(isinstance(source, dict) for source in sources):
            frame.merges.extend(sources)
        else:
            self.errors.append((self._path(), "a merge (<<) takes a mapping or a list of them"))

    def _path(self) -> str:
        path = ""
        for frame in self._stack:
            if isinstance(frame.container, list):
                path += f"[{len(frame.container)}]"
            elif frame.key is not None:
                key = "<<" if frame.key == _MERGE else frame.key
                path += f".{key}" if path else key
        return path


def resolve(text: str) -> Any:
    """The value of a plain scalar."""
    if text in _WORDS:
        return _WORDS[text]
    if len(text) <= _MAX_DIGITS and text[0] in "+-.0123456789":
        if _INT.match(text):
            digits = text.replace("_", "")
            sign, bare = (digits[0], digits[1:]) if digits[0] in "+-" else ("", digits)
            if len(bare) > 1 and bare[0] == "0" and bare[1] in "01234567":
                bare = "0o" + bare[1:]
            try:
                return int(sign + bare, 0)
            except ValueError:
                return text
        if _FLOAT.match(text):
            return float(text)
    return text


def _plain(value: Any) -> str:
    """A key that is not text, as Kubernetes' conversion to JSON spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _read_yaml(text: str) -> Iterator[Document]:
    number = 0
    builder = _Builder()
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.DocumentStartEvent):
            number += 1
            builder = _Builder()
        elif isinstance(event, yaml.DocumentEndEvent):
            if builder.value is not None or builder.errors:
                yield Document(number, builder.value, tuple(builder.errors))
        else:
            builder.take(event)
