"""What every source yields: changed objects, and what is wrong. Knows no source in particular."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mesh.model.decode import Object
from mesh.model.meta import ObjectKey
from mesh.sources.documents import Problem


class SourceUpdate(NamedTuple):
    """What changed (None: gone), by kind; and all problems there are now, in order. Not `complete`:
    the source has never been readable as a whole, so nothing is known of what should be there.
    `versions`: up to which resourceVersion each kind is contained, and `newest`: that of the newest
    change that was told, where versions mean something to others."""

    changes: dict[str, dict[ObjectKey, Object | None]]
    problems: tuple[Problem, ...]
    complete: bool = True
    versions: Mapping[str, int] = {}
    newest: Mapping[str, int] = {}
