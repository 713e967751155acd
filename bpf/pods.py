"""What is in force for the pods of this node: how their ports take connections, whether they hold
SVIDs, and their policy.

All of a pod changes at once: rules are written as a set that nobody uses yet, then the pod gets it,
from a generation on (bpf.enforcement). Pods with the same rules share one.
A policy that cannot be taken, for lack of room or because the kernel takes some whom it names for
others, refuses everything: it fails closed, for the pods that it selects and no others. So does a
pod for which there is no room: the filter knows that from there being nothing of it. Knows maps;
what is in them stays in force without us.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

from bpf import constants
from bpf.maps import PinnedMap
from bpf.rules import DEFAULT, entries
from bpf.settings import Mistaken
from bpf.structs import Address, Number, Pod, Policy, PolicyKey, Rules, Target
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import SvidSection, TrustBundleSection, WorkloadSection
from mesh.model.policyconfig import Direction, PolicyRule, PolicySection
from mesh.model.section import SectionKey

# Of one pod, so that one huge policy does not take the room of all others.
MAX_ENTRIES = constants.POLICIES // 4
# What has more entries leaves so much of the room to what has fewer.
_LARGE, _FOR_SMALL = 1024, constants.POLICIES // 4

PodSection: TypeAlias = WorkloadSection | PolicySection | SvidSection | TrustBundleSection

_NOBODY: Mistaken = {}
# The set that has no rules.
_NO_RULES = 0
_NOTHING, _CLOSED = Rules(_NO_RULES, 0), Rules(_NO_RULES, constants.POD_CLOSED)
# Under it stands what is in force for pods that nobody has told of yet.
_NOWHERE = Address.of("::")

_NO_ROOM = "the kernel's maps have no room for it"
_REFUSED = "everything is refused to it and from it: "
_MISTAKEN = f"{_REFUSED}the kernel's maps have no room for all addresses that its rules name"


class _Refused(Exception):
    """Why a policy is not taken."""


class _NoRoom(_Refused):
    """It is taken once others have made room."""


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


class _Set(NamedTuple):
    """What was written of a set of rules, and the numbers that its rules have by their sources."""

    keys: list[PolicyKey]
    rules: dict[str, int]


class Pods:
    """The pods of one pin directory. One process at a time may have it."""

    def __init__(self, directory: Path, generation: int) -> None:
        """`generation`: the one that has begun. DatapathError: the maps are not there."""
        self._pods = PinnedMap(directory, "pods", Address, Pod)
        self._ports = PinnedMap(directory, "mtls_ports", Target, Number)
        self._policies = PinnedMap(directory, "policies", PolicyKey, Policy)
        self._in_force = {address: pod.at(generation) for address, pod in self._pods.items()}
        # Pods that have nothing in force any more, and are told so until the next change.
        self._gone: set[Address] = set()
        self._mtls: dict[SectionKey, _Mtls] = {}
        self._policy: dict[SectionKey, _Policy] = {}
        self._held: dict[SectionKey, _Held] = {}
        self._bundles: set[SectionKey] = set()
        self._sets: dict[tuple[Direction, Direction], int] = {}
        self._written: dict[int, _Set] = {}
        self._uses: Counter[int] = Counter()
        self._left: list[int] = []
        for key, _ in self._policies.items():
            self._written.setdefault(key.set, _Set([], {})).keys.append(key)
        # Of an earlier process, which stay until it is known what is wanted.
        self._adopted = list(self._written)
        self._entries = sum(len(one.keys) for one in self._written.values())
        # Policies for which there was no room, and addresses.
        self._waiting: dict[SectionKey, PolicySection] = {}
        self._refused: dict[SectionKey, str] = {}
        self._missing: set[Address] = set()
        # Sets whose rules do not hold as long as some are mistaken for others.
        self._broken: set[int] = set()
        # A pod of this node may be one that nobody has told of, for lack of room.
        self._nameless = False
        self._numbers = count(max(self._written, default=_NO_RULES) + 1)
        self._rule_numbers = count(1)
        self._sources: dict[int, str] = {}

    def close(self) -> None:
        """Lets go of the maps; the kernel goes on with what is in them."""
        for one in (self._pods, self._ports, self._policies):
            one.close()

    def source(self, rule: int) -> str:
        """Where a rule that the kernel named comes from (PolicyRule.source); "": not of ours."""
        return self._sources.get(rule, "")

    def replace(
        self,
        sections: Mapping[SectionKey, PodSection],
        since: int,
        mistaken: Mistaken = _NOBODY,
    ) -> dict[SectionKey, str]:
        """These and no others; returns which could not be taken, and why."""
        known = self._mtls.keys() | self._policy.keys() | self._held.keys() | self._bundles
        gone = known - sections.keys()
        refused = self._change(sections, gone, since, mistaken, set(self._in_force))
        self._left += self._adopted
        self._adopted = []
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
        return bool(self._gone or self._left)

    def _change(
        self,
        put: Mapping[SectionKey, PodSection],
        remove: Iterable[SectionKey],
        since: int,
        mistaken: Mistaken,
        touched: set[Address],
    ) -> dict[SectionKey, str]:
        self._reclaim()
        ports: list[Target] = []
        former: list[_Mtls | _Policy | None] = []
        proven, trusted = set(self._held.values()), bool(self._bundles)
        for key in (*remove, *put):
            self._waiting.pop(key, None)
        put, self._waiting = {**self._waiting, **put}, {}
        for key in (*remove, *put):
            former += self._mtls.pop(key, None), self._policy.pop(key, None)
            self._held.pop(key, None)
            self._bundles.discard(key)
            self._refused.pop(key, None)
        for key, section in put.items():
            try:
                if isinstance(section, SvidSection):
                    self._held[key] = _held(section)
                elif isinstance(section, TrustBundleSection):
                    self._bundles.add(key)
                elif isinstance(section, PolicySection):
                    self._put_policy(key, section)
                elif section.local:
                    self._put_mtls(key, section)
            except (_Refused, ValueError) as error:
                self._refused[key] = f"{_REFUSED}{error}"
                if isinstance(error, _NoRoom) and isinstance(section, PolicySection):
                    self._waiting[key] = section
            except OSError as error:
                self._refused[key] = f"the kernel's maps do not take it: {error.strerror}"
            for made in (self._mtls.get(key), self._policy.get(key)):
                touched |= made.addresses if made is not None else frozenset()
        for one in former:
            touched |= one.addresses if one is not None else frozenset()
            if isinstance(one, _Policy):
                self._leave(one)
            elif one is not None:
                ports += one.ports
        if changed := {one.spiffe_id for one in proven.symmetric_difference(self._held.values())}:
            for mtls in self._mtls.values():
                touched |= mtls.addresses if mtls.spiffe_id in changed else frozenset()
        if trusted != bool(self._bundles):
            touched.add(_NOWHERE)
        touched |= self._doubt(mistaken)
        self._settle(touched | self._missing, since)
        for port in set(ports) - self._wanted_ports() if ports else ():
            self._ports.remove(port)
        return self._refused | self._closed()

    def _doubt(self, mistaken: Mistaken) -> set[Address]:
        """Take note who is taken for whom; the pods for whose rules that makes or made a
        difference."""
        before, nameless = self._broken, self._nameless
        self._broken, self._nameless = set(), Reserved.INIT in mistaken
        if mistaken:
            self._broken = {
                number
                for sides, number in self._sets.items()
                if any(_tells(rule, mistaken) for side in sides for rule in side.rules)
            }
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
                result[key] = f"{_REFUSED}{_NO_ROOM}"
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
        self._policy[key] = _Policy(addresses, _NO_RULES, constants.POD_CLOSED)
        number = self._set(section)
        flags = _flags(section.egress) | _flags(section.ingress) << constants.POD_INGRESS_SHIFT
        self._policy[key] = _Policy(addresses, number, flags)

    # --- sets of rules ----------------------------------------------------------------------------

    def _set(self, section: PolicySection) -> int:
        """The number of the set that says what a policy does; one more uses it."""
        rules = section.egress, section.ingress
        number = self._sets.get(rules)
        if number is None:
            number = next(self._numbers)
            self._written[number] = _Set([], {})
            try:
                self._write(number, section)
            except (_Refused, OSError):
                self._left.append(number)
                raise
            self._sets[rules] = number
        self._uses[number] += 1
        return number

    def _write(self, number: int, section: PolicySection) -> None:
        keys, rules = self._written[number]
        values: list[Policy] = []
        egress = entries(section.egress, constants.EGRESS)
        wanted = list(
            islice(chain(egress, entries(section.ingress, constants.INGRESS)), MAX_ENTRIES + 1)
        )
        if len(wanted) > MAX_ENTRIES:
            raise _Refused(f"its rules come to more than {MAX_ENTRIES} entries of the kernel's")
        room = constants.POLICIES - (_FOR_SMALL if len(wanted) > _LARGE else 0) - self._entries
        if len(wanted) > room:
            raise _NoRoom(f"its rules come to {len(wanted)} entries, and {_NO_ROOM}")
        self._entries += len(wanted)
        for entry in wanted:
            source = _source(section.ingress if entry.direction else section.egress, entry.rule)
            if source not in rules:
                rules[source] = next(self._rule_numbers)
                self._sources[rules[source]] = source
            port = entry.port.to_bytes(2, "big")
            keys.append(
                PolicyKey(entry.bits, number, entry.identity, entry.direction, entry.protocol, port)
            )
            values.append(Policy(entry.flags, rules[source]))
        self._policies.put_all(zip(keys, values, strict=True))

    def _leave(self, policy: _Policy) -> None:
        """A pod less that uses a set."""
        if policy.number != _NO_RULES:
            self._uses[policy.number] -= 1
            if not self._uses[policy.number]:
                self._left.append(policy.number)

    def _reclaim(self) -> None:
        """What earlier changes left: no program is still reading it."""
        for address in self._gone:
            self._pods.remove(address)
        self._gone.clear()
        for number in self._left:
            if not self._uses[number]:
                del self._uses[number]
                keys, rules = self._written.pop(number, _Set([], {}))
                self._entries -= len(keys)
                for key in keys:
                    self._policies.remove(key)
                for rule in rules.values():
                    del self._sources[rule]
        self._left.clear()
        self._sets = {
            rules: number for rules, number in self._sets.items() if number in self._written
        }

    # --- modes and policies together --------------------------------------------------------------

    def _settle(self, touched: Iterable[Address], since: int) -> None:
        """What is known now is to be in force for these addresses. One that two pods claim is the
        later one's."""
        modes = {address: one for one in self._mtls.values() for address in one.addresses}
        policies = {address: one for one in self._policy.values() for address in one.addresses}
        held = {one.spiffe_id: one.until for one in self._held.values()}
        for address in touched:
            mode, policy = modes.get(address), policies.get(address)
            number, flags = (policy.number, policy.flags) if policy else (_NO_RULES, 0)
            if number in self._broken:
                number, flags = _NO_RULES, constants.POD_CLOSED
            until = held.get(mode.spiffe_id, 0) if mode is not None else 0
            if mode is not None:
                flags |= mode.flags | (constants.POD_PROVEN if until else 0)
            if address == _NOWHERE:
                # Where there are identities, who is not known yet may be STRICT; where there is no
                # room for who is known, it may be anybody.
                flags |= constants.POD_STRICT if self._bundles else 0
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


def _tells(rule: PolicyRule, mistaken: Mistaken) -> bool:
    """Whether a rule is about somebody and not about whom it is taken for, or the other way."""
    peers = rule.peers
    return peers is not None and any(
        not (peers >= those if other in peers else peers.isdisjoint(those))
        for other, those in mistaken.items()
    )


def _held(svid: SvidSection) -> _Held:
    left = svid.not_after * 10**9 - time.time_ns()
    return _Held(svid.spiffe_id, max(1, time.monotonic_ns() + left))


def _source(direction: Direction, rule: int) -> str:
    if rule == DEFAULT:
        return ", ".join(direction.selected_by)
    return direction.rules[rule].source


def _flags(direction: Direction) -> int:
    policed = constants.POD_POLICED if direction.default_deny or direction.rules else 0
    deny = constants.POD_DEFAULT_DENY if direction.default_deny else 0
    return policed | deny | (constants.POD_AUDIT if direction.audit else 0)
