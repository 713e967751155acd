"""What is wrong with an object, said for the person who can mend it. Knows no kinds."""

from __future__ import annotations

from typing import NamedTuple


class FieldError(NamedTuple):
    """`path` as in "spec.rules[0].matches[1].path.value" ("" is the object itself); `rule`: what
    must hold (the CRD rule's message, or the schema's constraint); `message`: what was found and
    what to do. Never quotes a Secret's values."""

    path: str
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path or 'object'}: {self.rule}: {self.message}"


class InvalidObject(ValueError):
    """The object breaks its schema or its rules."""

    def __init__(self, errors: tuple[FieldError, ...]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = errors


class UnsupportedKind(ValueError):
    """The kind, or this version of it, is not one that Weft models."""

    def __init__(self, api_version: str, kind: str) -> None:
        super().__init__(f"{kind} of {api_version} is not a kind that Weft reads")
        self.api_version = api_version
        self.kind = kind
