"""Which of what is in force has changed since something was decided by it.

What a section is about has a name: of one of the pods' addresses, or a cluster's key. Others are
about everything. Knows sections, nothing of who decided what.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import starmap

from l7proxy.field_rules import Refused
from l7proxy.policies import plain
from mesh.model.nodeconfig import ClusterSection, Section, WorkloadSection
from mesh.model.policyconfig import PolicySection
from mesh.model.section import SectionKey

# Of how many names is known when it was; in all it is then that everything has changed.
_NAMES_MAX = 10_000


def about(key: SectionKey, section: Section) -> Collection[str] | None:
    """The names of what a section is about; None: everything."""
    match section:
        case ClusterSection():
            return (key,)
        case WorkloadSection(addresses=addresses) | PolicySection(addresses=addresses):
            try:
                return [plain(address) for address in addresses]
            except Refused:
                return None
    return None


class Changes:
    """`number` grows with each; `made_ns` as in the last Delta."""

    def __init__(self) -> None:
        self.number = 0
        self.made_ns = 0
        self._everything = 0
        self._last: dict[str, int] = {}

    def note(self, made_ns: int, sections: Iterable[tuple[SectionKey, Section]]) -> None:
        """Another configuration is in force, by these, as they were and are."""
        self.number += 1
        self.made_ns = made_ns
        for found in starmap(about, sections):
            if found is None:
                self._everything = self.number
            else:
                self._last |= dict.fromkeys(found, self.number)
        if len(self._last) > _NAMES_MAX:
            self._everything = self.number
            self._last.clear()

    def since(self, number: int, names: Iterable[str]) -> bool:
        """Whether anything of this has changed after `number`."""
        if self._everything > number:
            return True
        last = self._last
        return any(last.get(name, 0) > number for name in names)
