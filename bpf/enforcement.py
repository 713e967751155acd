"""What the filter judges by: who is behind which address, and what is in force for the node's pods.

One configuration's identities and policies together: all that changes is written with what it was
before, and counts from one number on, which is written last. So nothing passes by parts of two
configurations. Knows maps; what is in them stays in force without us.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from bpf.pods import Pods, PodSection
from bpf.settings import Generation, Identities
from mesh.model.nodeconfig import (
    NodeSection,
    SvidSection,
    WorkloadSection,
)
from mesh.model.policyconfig import CidrSection, PolicySection
from mesh.model.section import SectionKey

EnforcedSection: TypeAlias = NodeSection | CidrSection | PodSection
ENFORCED = (
    WorkloadSection,
    NodeSection,
    CidrSection,
    PolicySection,
    SvidSection,
)


class Enforcement:
    """The identities and pods of one pin directory. One process at a time may have them."""

    def __init__(self, directory: Path, node: str | None, *, mtls: bool = False) -> None:
        """`node`: the name of this one; `mtls`: it has identities. DatapathError: the maps are not
        there."""
        self._generation = Generation(directory)
        self._identities = Identities(directory, node, self._generation.now)
        self._pods = Pods(directory, self._generation.now, mtls=mtls)
        # Where a rule comes from that the kernel names.
        self.source = self._pods.source

    def close(self) -> None:
        """Lets go of the maps; the kernel goes on with what is in them."""
        self._identities.close()
        self._pods.close()
        self._generation.close()

    def replace(self, sections: Mapping[SectionKey, EnforcedSection]) -> dict[SectionKey, str]:
        """These and no others; returns which could not be taken, and why."""
        since = self._generation.next()
        refused = self._identities.replace(_of_addresses(sections), since)
        mistaken = self._identities.mistaken()
        refused |= self._pods.replace(_of_pods(sections), since, mistaken)
        self._generation.begin(since)
        return self._settled(refused)

    def apply(
        self, put: Mapping[SectionKey, EnforcedSection], remove: Iterable[SectionKey] = ()
    ) -> dict[SectionKey, str]:
        """Add, change and remove; unknown keys to remove are ignored. Returns all sections that are
        not in force, and why. Open connections are judged by what is when this returns."""
        return self._settled(self._change(put, tuple(remove)))

    def _change(
        self, put: Mapping[SectionKey, EnforcedSection], gone: tuple[SectionKey, ...]
    ) -> dict[SectionKey, str]:
        since = self._generation.next()
        addresses = _of_addresses(put)
        left = (key for key, one in put.items() if isinstance(one, CidrSection) and not one.here)
        refused = self._identities.apply(addresses, (*gone, *left), since)
        refused |= self._pods.apply(_of_pods(put), gone, since, self._identities.mistaken())
        self._generation.begin(since)
        return refused

    def _settled(self, refused: dict[SectionKey, str]) -> dict[SectionKey, str]:
        """What took the room may have been what the change has replaced."""
        if refused and (self._identities.leaves or self._pods.leaves):
            return self._change({}, ())
        return refused


def _of_pods(sections: Mapping[SectionKey, EnforcedSection]) -> dict[SectionKey, PodSection]:
    return {
        key: one
        for key, one in sections.items()
        if isinstance(one, WorkloadSection | PolicySection | SvidSection)
    }


def _of_addresses(
    sections: Mapping[SectionKey, EnforcedSection],
) -> dict[SectionKey, WorkloadSection | NodeSection | CidrSection]:
    """Who is told apart here."""
    return {
        key: one
        for key, one in sections.items()
        if isinstance(one, WorkloadSection | NodeSection)
        or (isinstance(one, CidrSection) and one.here)
    }
