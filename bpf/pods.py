"""What is in force for the pods of this node: how their ports take connections, whether they hold
SVIDs, and their policy.

All of a pod changes at once: rules are written as a set that nobody uses yet (bpf.rulesets), then
the pod gets it, from a generation on (bpf.enforcement).
A policy that cannot be taken, for lack of room or because the kernel takes some whom it names for
others, refuses everything: it fails closed, for the pods that it selects and no others. So does a
pod for which there is no room: the filter knows that from there being nothing of it. Knows maps;
what is in them stays in force without us.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

from bpf import constants
from bpf.maps import PinnedMap
from bpf.rulesets import NO_RULES, NoRoom, Refused, RuleSets
from bpf.settings import Mistaken
from bpf.structs import Address, Number, Pod, Rules, Target
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import SvidSection, WorkloadSection
from mesh.model.policyconfig import Direction, PolicySection
from mesh.model.section import SectionKey

PodSection: TypeAlias = WorkloadSection | PolicySection | SvidSection

_NOBODY: Mistaken = {}
_NOTHING, _CLOSED = Rules(NO_RULES, 0), Rules(NO_RULES, constants.POD_CLOSED)
# Under it stands what is in force for pods that nobody has told of yet.
_NOWHERE = Address.of("::")

_REFUSED = "everything is refused to it and from it: "
_NO_ROOM = f"{_REFUSED}the kernel's maps have no room for it"
_MISTAKEN = f"{_REFUSED}the kernel's maps have no room for all addresses that its rules name"


class _Mtls(NamedTuple):
    """A pod's flags, and its ports that are otherwise: 1 STRICT, 0 not."""

    addresses: frozenset[Address]
    flags: int
    ports: Mapping[Target, int]
    spiffe_id: str


class _Held(NamedTuple):
    """An SVID, and when it ends by CLOCK_MONOTONIC, in ns."""

    spiffe_id: str
    until: int


class _Policy(NamedTuple):
    """The number of a set of rules, and a pod's flags."""

    addresses: frozenset[Address]
    number: int
    flags: int


class Pods:
    """The pods of one pin directory. One process at a time may have it."""

    def __init__(self, directory: Path, generation: int, *, mtls: bool) -> None:
        """`generation`: the one that has begun; `mtls`: there are identities, so that a pod may be
        STRICT. DatapathError: the maps are not there."""
        self._pods = PinnedMap(directory, "pods", Address, Pod)
        self._ports = PinnedMap(directory, "mtls_ports", Target, Number)
        self._sets = RuleSets(directory)
        self._in_force = {address: pod.at(generation) for address, pod in self._pods.items()}
        # Pods that have nothing in force any more, and are told so until the next change.
        self._gone: set[Address] = set()
        self._mtls: dict[SectionKey, _Mtls] = {}
        self._policy: dict[SectionKey, _Policy] = {}
        self._held: dict[SectionKey, _Held] = {}
        self._strict_unknown = constants.POD_STRICT if mtls else 0
        # Policies for which there was no room, and addresses.
        self._waiting: dict[SectionKey, PolicySection] = {}
        self._refused: dict[SectionKey, str] = {}
        self._missing: set[Address] = set()
        # Sets whose rules do not hold as long as some are mistaken for others.
        self._broken: set[int] = set()
        # A pod of this node may be one that nobody has told of, for lack of room.
        self._nameless = False

    def close(self) -> None:
        """Lets go of the maps; the kernel goes on with what is in them."""
        for one in (self._pods, self._ports, self._sets):
            one.close()

    def source(self, rule: int) -> str:
        """Where a rule that the kernel named comes from (PolicyRule.source); "": not of ours."""
        return self._sets.source(rule)

    def replace(
        self,
        sections: Mapping[SectionKey, PodSection],
        since: int,
        mistaken: Mistaken = _NOBODY,
    ) -> dict[SectionKey, str]:
        """These and no others; returns which could not be taken, and why."""
        known = self._mtls.keys() | self._policy.keys() | self._held.keys()
        gone = known - sections.keys()
        refused = self._change(sections, gone, since, mistaken, {_NOWHERE, *self._in_force})
        self._sets.leave_adopted()
        wanted = self._wanted_ports()
        for stale in [port for port, _ in self._ports.items() if port not in wanted]:
            self._ports.remove(stale)
        return refused

    def apply(
        self,
        put: Mapping[SectionKey, PodSection],
        remove: Iterable[SectionKey],
        since: int,
        mistaken: Mistaken = _NOBODY,
    ) -> dict[SectionKey, str]:
        """Add, change and remove, from generation `since` on; unknown keys to remove are ignored.
        `mistaken`: who is taken for whom then. Returns all that are not in force, and why: then the
        pod's ports are STRICT, or everything is refused to it and from it but what the node itself
        opens."""
        return self._change(put, remove, since, mistaken, set())

    @property
    def leaves(self) -> bool:
        """There is room once more is changed."""
        return bool(self._gone) or self._sets.leaves

    def _change(
        self,
        put: Mapping[SectionKey, PodSection],
        remove: Iterable[SectionKey],
        since: int,
        mistaken: Mistaken,
        touched: set[Address],
    ) -> dict[SectionKey, str]:
        # What earlier changes left: no program is still reading it.
        for address in self._gone:
            self._pods.remove(address)
        self._gone.clear()
        again = self._waiting if self._sets.reclaim() else {}
        ports: list[Target] = []
        former: list[_Mtls | _Policy | None] = []
        proven = set(self._held.values())
        gone = tuple(remove)
        put = {**{key: again[key] for key in again.keys() - gone}, **put}
        for key in (*gone, *put):
            self._waiting.pop(key, None)
            former += self._mtls.pop(key, None), self._policy.pop(key, None)
            self._held.pop(key, None)
            self._refused.pop(key, None)
        for key, section in put.items():
            try:
                if isinstance(section, SvidSection):
                    self._held[key] = _held(section)
                elif isinstance(section, PolicySection):
                    self._put_policy(key, section)
                elif section.local:
                    self._put_mtls(key, section)
            except (Refused, ValueError) as error:
                self._refused[key] = f"{_REFUSED}{error}"
                if isinstance(error, NoRoom) and isinstance(section, PolicySection):
                    self._waiting[key] = section
            except OSError as error:
                self._refused[key] = f"the kernel's maps do not take it: {error.strerror}"
            for made in (self._mtls.get(key), self._policy.get(key)):
                touched |= made.addresses if made is not None else frozenset()
        for one in former:
            touched |= one.addresses if one is not None else frozenset()
            if isinstance(one, _Policy):
                self._sets.leave(one.number)
            elif one is not None:
                ports += one.ports
        if changed := {one.spiffe_id for one in proven.symmetric_difference(self._held.values())}:
            for mtls in self._mtls.values():
                touched |= mtls.addresses if mtls.spiffe_id in changed else frozenset()
        touched |= self._doubt(mistaken)
        self._settle(touched | self._missing, since)
        for port in set(ports) - self._wanted_ports() if ports else ():
            self._ports.remove(port)
        return self._refused | self._closed()

    def _doubt(self, mistaken: Mistaken) -> set[Address]:
        """Take note who is taken for whom; the pods for whose rules that makes or made a
        difference."""
        before, nameless = self._broken, self._nameless
        self._broken, self._nameless = self._sets.broken(mistaken), Reserved.INIT in mistaken
        changed = before ^ self._broken
        touched = {_NOWHERE} if nameless != self._nameless else set()
        for policy in self._policy.values() if changed else ():
            touched |= policy.addresses if policy.number in changed else frozenset()
        return touched

    def _closed(self) -> dict[SectionKey, str]:
        """Policies and pods to which everything is refused for lack of room elsewhere."""
        claims: dict[SectionKey, _Mtls | _Policy] = {**self._mtls, **self._policy}
        result: dict[SectionKey, str] = {}
        for key, one in claims.items() if self._missing or self._broken else ():
            if not self._missing.isdisjoint(one.addresses):
                result[key] = _NO_ROOM
            elif isinstance(one, _Policy) and one.number in self._broken:
                result[key] = _MISTAKEN
        return result

    def _put_mtls(self, key: SectionKey, workload: WorkloadSection) -> None:
        addresses = frozenset(map(Address.of, workload.addresses))
        ports = {
            Target(address.packed, port, 0): int(mode == "STRICT")
            for address in addresses
            for port, mode in workload.mtls_ports.items()
        }
        self._mtls[key] = _Mtls(addresses, constants.POD_STRICT, {}, workload.spiffe_id)
        self._ports.put_all((port, Number(strict)) for port, strict in ports.items())
        flags = constants.POD_STRICT if workload.mtls == "STRICT" else 0
        flags |= constants.POD_MTLS_PORTS if ports else 0
        self._mtls[key] = _Mtls(addresses, flags, ports, workload.spiffe_id)

    def _wanted_ports(self) -> set[Target]:
        return {port for mtls in self._mtls.values() for port in mtls.ports}

    def _put_policy(self, key: SectionKey, section: PolicySection) -> None:
        addresses = frozenset(map(Address.of, section.addresses))
        # Whatever becomes of it, nobody is let through by what was in force before.
        self._policy[key] = _Policy(addresses, NO_RULES, constants.POD_CLOSED)
        number = self._sets.take(section)
        flags = _flags(section.egress) | _flags(section.ingress) << constants.POD_INGRESS_SHIFT
        self._policy[key] = _Policy(addresses, number, flags)

    # --- modes and policies together --------------------------------------------------------------

    def _settle(self, touched: Iterable[Address], since: int) -> None:
        """What is known now is to be in force for these addresses. One that two pods claim is the
        later one's."""
        modes = {address: one for one in self._mtls.values() for address in one.addresses}
        policies = {address: one for one in self._policy.values() for address in one.addresses}
        held = {one.spiffe_id: one.until for one in self._held.values()}
        for address in touched:
            mode, policy = modes.get(address), policies.get(address)
            number, flags = (policy.number, policy.flags) if policy else (NO_RULES, 0)
            if number in self._broken:
                number, flags = NO_RULES, constants.POD_CLOSED
            until = held.get(mode.spiffe_id, 0) if mode is not None else 0
            if mode is not None:
                flags |= mode.flags | (constants.POD_PROVEN if until else 0)
            if address == _NOWHERE:
                # Where there are identities, who is not known yet may be STRICT; where there is no
                # room for who is known, it may be anybody.
                flags |= self._strict_unknown
                flags |= constants.POD_CLOSED if self._nameless else 0
            known = mode is not None or policy is not None or flags
            rules = Rules(number, flags, until) if known else None
            before = self._in_force.get(address)
            if rules != before:
                self._tell(address, rules, before, since)
            else:
                self._missing.discard(address)

    def _tell(
        self, address: Address, rules: Rules | None, before: Rules | None, since: int
    ) -> None:
        now = rules or _NOTHING
        # A pod of which there is nothing yet is closed.
        old = before or (_NOTHING if address == _NOWHERE else _CLOSED)
        proven = now.proven_until or old.proven_until
        pod = Pod(since, proven, now.policy, now.flags, old.policy, old.flags)
        try:
            self._pods.put(address, pod)
        except OSError:
            self._missing.add(address)
            return
        self._missing.discard(address)
        if rules is not None:
            self._in_force[address] = rules
            self._gone.discard(address)
        else:
            del self._in_force[address]
            self._gone.add(address)


def _held(svid: SvidSection) -> _Held:
    left = svid.not_after * 10**9 - time.time_ns()
    return _Held(svid.spiffe_id, max(1, time.monotonic_ns() + left))


def _flags(direction: Direction) -> int:
    policed = constants.POD_POLICED if direction.default_deny or direction.rules else 0
    deny = constants.POD_DEFAULT_DENY if direction.default_deny else 0
    return policed | deny | (constants.POD_AUDIT if direction.audit else 0)
