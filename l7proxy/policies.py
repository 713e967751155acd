"""Policy in the proxy: who stands behind an address, and what its policies say of a connection or
request.

Egress is judged where the client is: by the policies of a pod of this node. Ingress where the
server is: by those of the pod that a connection goes to, if it is this node's; of pods of other
nodes their own node judges (`arrival`). A section that cannot be put in force refuses everything
for its pod. Knows sections, no sockets and no routes.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import msgspec

from l7proxy.field_rules import Refused
from l7proxy.message import RequestHead
from l7proxy.policy_rules import FREE, Peers, Rules, Transport, Verdict
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import NodeSection, WorkloadSection
from mesh.model.policyconfig import CidrSection, Direction, PolicySection
from mesh.model.section import SectionKey

_REMEMBERED = 4096

_Section: TypeAlias = PolicySection | CidrSection | WorkloadSection | NodeSection


class Source(NamedTuple):
    """Who asks. `peers`: by identity, for the other side's policies; `egress`: its own policies;
    `address`: the pod's, which may always reach itself; `authenticated`: it has proved by mutual
    TLS who it is."""

    peers: Peers
    egress: Rules | None = None
    address: str = ""
    authenticated: bool = False


class _Pod(NamedTuple):
    section: PolicySection
    ingress: Rules
    egress: Rules


class Policies:
    """What is in force."""

    def __init__(self) -> None:
        self._sections: dict[SectionKey, _Section] = {}
        self._pods: dict[SectionKey, _Pod] = {}
        self._by_address: dict[str, _Pod] = {}
        self._workloads: dict[str, WorkloadSection] = {}
        self._nodes: dict[str, str] = {}
        # By family and length of the prefix: what begins with it.
        self._ranges: dict[tuple[int, int], dict[int, int]] = {}
        self._node = ""  # this one
        self._known: dict[str, int] = {}

    @property
    def any(self) -> bool:
        """There are policies at all."""
        return bool(self._pods)

    # --- configuration --------------------------------------------------------------------------

    def put(self, key: SectionKey, section: _Section) -> None:
        """Refused: it cannot be put in force; a pod whose policies cannot is reached by nobody and
        reaches nobody."""
        self._known.clear()
        match section:
            case PolicySection():
                try:
                    self._put_pod(key, section)
                except Refused:
                    self._put_pod(key, _closed(section))
                    raise
                return
            case CidrSection(cidr=cidr, identity=identity):
                self._forget(key)
                version, length, prefix = _range(cidr)
                self._ranges.setdefault((version, length), {})[prefix] = identity
            case WorkloadSection(addresses=addresses):
                self._forget(key)
                if section.local:
                    self._node = section.node
                self._workloads.update((plain(address), section) for address in addresses)
            case NodeSection(name=name, addresses=addresses):
                self._forget(key)
                self._nodes.update((plain(address), name) for address in addresses)
        self._sections[key] = section

    def remove(self, key: SectionKey) -> None:
        self._known.clear()
        self._forget(key)

    def _put_pod(self, key: SectionKey, section: PolicySection) -> None:
        pod = _Pod(section, Rules(section.ingress, "ingress"), Rules(section.egress, "egress"))
        addresses = [plain(address) for address in section.addresses]
        self._forget(key)
        self._sections[key] = section
        self._pods[key] = pod
        self._by_address.update(dict.fromkeys(addresses, pod))

    def _forget(self, key: SectionKey) -> None:
        """An address may be another's by now: of pods that are gone they are given out again."""
        section = self._sections.pop(key, None)
        match section:
            case PolicySection(addresses=addresses):
                pod = self._pods.pop(key)
                _drop(self._by_address, addresses, lambda held: held is pod)
            case CidrSection(cidr=cidr):
                version, length, prefix = _range(cidr)
                held = self._ranges[version, length]
                del held[prefix]
                if not held:
                    del self._ranges[version, length]
            case WorkloadSection(addresses=addresses):
                _drop(self._workloads, addresses, lambda held: held is section)
            case NodeSection(name=name, addresses=addresses):
                _drop(self._nodes, addresses, lambda held: held == name)

    # --- who ------------------------------------------------------------------------------------

    def identity(self, address: str) -> int:
        """Whose an address is."""
        found = self._known.get(address)
        if found is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            found = self._known[address] = self._look_up(plain(address))
        return found

    def _look_up(self, address: str) -> int:
        workload = self._workloads.get(address)
        if workload is not None:
            return workload.identity
        node = self._nodes.get(address)
        parsed = ipaddress.ip_address(address)
        number, bits = int(parsed), parsed.max_prefixlen
        lengths = (length for version, length in self._ranges if version == parsed.version)
        for length in sorted(lengths, reverse=True):
            if node is not None and length < bits:
                break
            prefix = number >> (bits - length) << (bits - length)
            identity = self._ranges[parsed.version, length].get(prefix)
            if identity is not None:
                return identity
        if node is not None:
            return int(Reserved.HOST if node == self._node else Reserved.REMOTE_NODE)
        return int(Reserved.WORLD)

    def workload(self, address: str) -> Source:
        """A workload of this node as the one who asks; one of which nothing is known is `init`."""
        held = self._workloads.get(address)
        pod = self._by_address.get(address)
        peer = held.identity if held is not None else int(Reserved.INIT)
        return Source((peer,), pod.egress if pod is not None else None, address)

    def through_gateway(self, address: str) -> Source:
        """A client of a Gateway: the Gateway asks, and policies see its client as well. Nobody
        vouches for that one, so it is not authenticated."""
        return Source((int(Reserved.INGRESS), self.identity(address)))

    # --- verdicts -------------------------------------------------------------------------------

    def connection(
        self, source: Source, address: str, port: int, transport: Transport = "TCP"
    ) -> Verdict:
        """Of a connection to an address, whatever it carries: refused, allowed, or `http`: only
        requests that are judged one by one may pass."""
        address = plain(address)
        if not self._pods or source.address == address:
            return FREE
        first = second = FREE
        if source.egress is not None:
            peer, proved = (self.identity(address),), self._both_here(source, address)
            first = source.egress.connection(peer, transport, port, authenticated=proved)
        if first.allowed and (pod := self._by_address.get(address)) is not None:
            proved = source.authenticated or self._is_here(source.address)
            second = pod.ingress.connection(source.peers, transport, port, authenticated=proved)
        return _both(first, second)

    def request(
        self,
        source: Source,
        address: str,
        port: int,
        sent: RequestHead,
        forwarded: RequestHead,
    ) -> Verdict:
        """Of a request to an endpoint: the client's own policies judge it as it was `sent`, those
        of the pod it goes to as it is to be `forwarded`."""
        address = plain(address)
        if not self._pods or source.address == address:
            return FREE
        first = second = FREE
        if source.egress is not None:
            peer, proved = (self.identity(address),), self._both_here(source, address)
            first = source.egress.request(peer, port, sent, authenticated=proved)
        if first.allowed and (pod := self._by_address.get(address)) is not None:
            head = mended(forwarded, first)
            proved = source.authenticated or self._is_here(source.address)
            second = pod.ingress.request(source.peers, port, head, authenticated=proved)
        return _both(first, second)

    def _is_here(self, address: str) -> bool:
        workload = self._workloads.get(address)
        return workload is not None and workload.local

    def _both_here(self, source: Source, address: str) -> bool:
        """On one node the kernel knows who both are."""
        return self._is_here(source.address) and self._is_here(address)


def mended(head: RequestHead, verdict: Verdict) -> RequestHead:
    """The request as the rules that let it pass want it."""
    if not verdict.mends:
        return head
    headers = head.headers
    for mend in verdict.mends:
        headers = mend.apply(headers)
    return dataclasses.replace(head, headers=headers)


def _both(first: Verdict, second: Verdict) -> Verdict:
    if not first.allowed or not second.allowed:
        return second if first.allowed else first
    return Verdict(
        True,
        second.source or first.source,
        first.http or second.http,
        first.audit or second.audit,
        first.mends + second.mends,
    )


def _closed(section: PolicySection) -> PolicySection:
    side = Direction(
        default_deny=True,
        selected_by=tuple(
            dict.fromkeys((*section.ingress.selected_by, *section.egress.selected_by))
        ),
    )
    return msgspec.structs.replace(section, ingress=side, egress=side)


def _drop(held: dict[str, Any], addresses: Iterable[str], own: Callable[[Any], bool]) -> None:
    for address in map(plain, addresses):
        if address in held and own(held[address]):
            del held[address]


def _range(cidr: str) -> tuple[int, int, int]:
    """Family, length and number of a prefix."""
    try:
        network = ipaddress.ip_network(cidr)
    except ValueError as error:
        raise Refused(f"cidr: {error}") from None
    return network.version, network.prefixlen, int(network.network_address)


@lru_cache(maxsize=_REMEMBERED)
def plain(address: str) -> str:
    """An address in its one spelling, an IPv4-mapped one as IPv4. Refused: it is none."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise Refused(f"{address!r} is not an IP address") from None
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
