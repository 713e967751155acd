"""The nodes' reports as one answer of the data plane: which ports are bound, what is refused, and
which versions of the objects are in force everywhere.

Fed by a reflector on the Leases that agents keep. A node counts while its Lease is renewed, by this
process's own clock, and while the Node is there that the Lease belongs to, if it does to any:
agents outside of the cluster have none. One that does not renew it is away: it may be back.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from gateway.keys import PortKey
from mesh.model.meta import ObjectKey
from mesh.model.nodereport import ANNOTATION, NodeReport, decode_report
from mesh.model.section import SectionKey
from mesh.policy.status import EVERY_POLICY, NO_MESH
from mesh.sources.kubernetes_client import ServerError

_log = logging.getLogger("weft.controller")

_DEFAULT_LEASE_S = 40.0


class _Seen(NamedTuple):
    """`lasts`: seconds that a renewal counts for; `owner`: the uid of its Node, "" if it has
    none."""

    report: NodeReport
    owner: str
    lasts: float
    until: float
    away: bool = False


class Answer(NamedTuple):
    """What the data plane says as a whole. `binds`: "" is bound, a text why not."""

    binds: dict[PortKey, str]
    refusals: dict[SectionKey, str]


class Nodes:
    """A sink for the Leases' reflector; `changed` is called when a report has changed, come or
    gone. `node_uid(name)`: of the Node that has this name now, "" if none has."""

    def __init__(self, changed: Callable[[], None], node_uid: Callable[[str], str]) -> None:
        self._changed = changed
        self._node_uid = node_uid
        self._seen: dict[str, _Seen] = {}
        self._blind = False
        self._loop = asyncio.get_running_loop()

    # --- what the reflector tells ----------------------------------------------------------------

    def changed(self, key: ObjectKey, raw: dict[str, Any]) -> None:
        text = (raw["metadata"].get("annotations") or {}).get(ANNOTATION)
        if text is None:
            return
        try:
            report = decode_report(text)
        except msgspec.DecodeError as error:
            _log.error("Lease %s: its report cannot be read: %s", key, error)
            return
        lasts = float((raw.get("spec") or {}).get("leaseDurationSeconds") or _DEFAULT_LEASE_S)
        before = self._seen.get(key.name)
        owners = raw["metadata"].get("ownerReferences") or ()
        owner = next((one["uid"] for one in owners if one["kind"] == "Node"), "")
        self._count(key.name, _Seen(report, owner, lasts, 0.0))
        if before is None or before.away or (before.report, before.owner) != (report, owner):
            self._changed()

    def gone(self, key: ObjectKey, uid: str, version: str) -> None:
        if self._seen.pop(key.name, None) is not None:
            self._changed()

    def reached(self, version: str) -> None:
        pass

    def failing(self, why: ServerError | None) -> None:
        """While Leases cannot be followed, nodes may not be able to renew them either: each has its
        time again afterwards."""
        if why is not None:
            self._blind = True
            _log.warning("the nodes' Leases cannot be followed: %s", why)
        elif self._blind:
            self._blind = False
            for name, seen in list(self._seen.items()):
                if not seen.away:
                    self._count(name, seen)

    def _count(self, name: str, seen: _Seen) -> None:
        self._seen[name] = seen._replace(until=self._loop.time() + seen.lasts)
        self._loop.call_later(seen.lasts, self._expire, name)

    def _expire(self, name: str) -> None:
        seen = self._seen.get(name)
        if seen is None or seen.away or self._blind:
            return
        if seen.until <= self._loop.time():
            _log.warning("node %s does not renew its Lease: it counts no more", seen.report.node)
            self._seen[name] = seen._replace(away=True)
            self._changed()

    # --- what can be asked -----------------------------------------------------------------------

    def _there(self) -> list[_Seen]:
        """Of all nodes that have not gone for good."""
        return [
            seen
            for _, seen in sorted(self._seen.items())
            if not seen.owner or seen.owner == self._node_uid(seen.report.node)
        ]

    def ready(self) -> list[NodeReport]:
        """Of the nodes that serve."""
        return [one.report for one in self._there() if one.report.ready and not one.away]

    def have(self, needed: Mapping[str, int]) -> bool:
        """Whether every node that serves has these versions in force, and there is one. Of one that
        cannot name all that it refuses it is not known."""
        ready = self.ready()
        return bool(ready) and all(
            one.versions.get(kind, 0) >= version and not one.unnamed
            for one in ready
            for kind, version in needed.items()
        )

    def lagging(self, needed: Mapping[str, int]) -> list[str]:
        """Who is waited for, and for what; for people."""
        result = []
        for one in self.ready():
            behind = [k for k, version in needed.items() if one.versions.get(k, 0) < version]
            if one.unnamed:
                result.append(
                    f"node {one.node} (it refuses {one.unnamed} more than fit its report)"
                )
            if behind:
                result.append(f"node {one.node} ({', '.join(sorted(behind))})")
        return result or ["a node that serves: there is none"]

    def without_bundle(self, tag: str) -> list[str]:
        """The nodes that have another trust bundle in force than this, for people; also those that
        are away: they go on with it. Who has none has no identities either."""
        return [
            f"node {one.report.node}{', which is away' if one.away else ''}"
            for one in self._there()
            if one.report.bundle not in ("", tag)
        ]

    def addresses(self) -> tuple[str, ...]:
        """Where clients reach Gateways that name no address: the nodes'."""
        return tuple(dict.fromkeys(address for one in self.ready() for address in one.addresses))

    def answer(self) -> Answer:
        ready = self.ready()
        ports = dict.fromkeys(port for one in ready for port in one.ports)
        binds: dict[PortKey, str] = {}
        for text in ports:
            port = _port(text)
            if (found := _bound(ready, text, port)) is not None:
                binds[port] = found
        refusals: dict[SectionKey, str] = {}
        for one in ready:
            if not one.mesh:
                refusals.setdefault(EVERY_POLICY, f"node {one.node}: {NO_MESH}")
            for key, why in one.refused.items():
                refusals.setdefault(key, f"node {one.node}: {why}")
        return Answer(binds, refusals)


def _bound(ready: list[NodeReport], text: str, port: PortKey) -> str | None:
    """Whether a port is bound, as far as that is known. One of every node (a wildcard, the mesh's
    own) must be so on each; an address of its own is on the nodes that have it."""
    answers = {one.node: one.ports.get(text) for one in ready}
    failed = [f"node {node}: {why}" for node, why in answers.items() if why]
    address = ipaddress.ip_address(port[0])
    if address.is_unspecified or address.is_loopback:
        if failed:
            return failed[0]
        return None if None in answers.values() else ""
    if "" in answers.values():
        return ""
    return failed[0] if failed and None not in answers.values() else None


def _port(text: str) -> PortKey:
    address, _, port = text.rpartition(":")
    return address.removeprefix("[").removesuffix("]"), int(port)
