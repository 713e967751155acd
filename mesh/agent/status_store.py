"""The statuses in force, as users see them. Knows when conditions changed, not why.

A restarted agent derives the same conditions again, but not when they last changed: their
transition times then start anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gateway.status import with_transition_times
from mesh.agent.unmet import unmet
from mesh.model.decode import encode
from mesh.model.meta import ObjectKey


class StatusStore:
    """Published statuses by kind and key; `unmet` says what does not hold in those where something
    does not."""

    def __init__(self) -> None:
        self.unmet: dict[tuple[str, ObjectKey], str] = {}
        self._statuses: dict[tuple[str, ObjectKey], Any] = {}

    def get(self, kind: str, key: ObjectKey) -> Any:
        """The status, or None."""
        return self._statuses.get((kind, key))

    def publish(self, statuses: Mapping[tuple[str, ObjectKey], Any]) -> None:
        """Put statuses in force (None: the object is gone)."""
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        for ident, status in statuses.items():
            self.unmet.pop(ident, None)
            if status is not None and (why := unmet(encode(status))):
                self.unmet[ident] = why
            if status is None:
                self._statuses.pop(ident, None)
            else:
                before = self._statuses.get(ident)
                self._statuses[ident] = with_transition_times(before, status, now)
