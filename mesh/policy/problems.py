"""Why a policy is not enforced, gathered while it is read."""

from __future__ import annotations

# Of so many problems the first are told.
_TOLD = 10


class Problems:
    """`regex_size` counts what is bounded for a policy as a whole."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self.regex_size = 0

    def add(self, field: str, why: str) -> None:
        self._found.append(f"{field}: {why}")

    @property
    def found(self) -> tuple[str, ...]:
        more = len(self._found) - _TOLD
        told = tuple(dict.fromkeys(self._found[:_TOLD]))
        return (*told, f"and {more} more") if more > 0 else told
