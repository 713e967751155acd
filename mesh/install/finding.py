"""What a check of `weft check` says."""

from __future__ import annotations

from typing import Literal, NamedTuple

Result = Literal["ok", "warning", "failed"]


class Finding(NamedTuple):
    """`todo`: what to do about it, "" where it is well."""

    what: str
    result: Result
    found: str
    todo: str = ""
