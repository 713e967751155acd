"""Policy in the proxy: who stands behind an address, and what its policies say of a connection or
request.

Egress is judged where the client is: by the policies of a pod of this node. Ingress where the
server is: by those of the pod that a connection goes to, if it is this node's; of pods of other
nodes their own node judges (`tunnel_acceptor`). A section that cannot be put in force refuses
everything for its pod. Knows sections, no sockets and no routes.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import msgspec

from l7proxy.automaton_plan import HttpRules
from l7proxy.field_rules import Refused
from l7proxy.message import RequestHead
from l7proxy.peers import Caller, NoWay, Peers, Tunnelled
from l7proxy.policy_rules import FREE, Identities, Rules, Transport, Verdict
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import Endpoint
from mesh.model.policyconfig import CidrSection, Direction, PolicySection
from mesh.model.section import SectionKey

_REMEMBERED = 4096
# The address that no pod has: what is in force there is for pods that nobody has told of.
NOWHERE = "::"

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address


class Asker(NamedTuple):
    """Who asks. `identities`: for the other side's policies; `egress`: its own policies; `address`:
    the pod's, which may always reach itself, "" behind a Gateway; `authenticated`: it has proved by
    mutual TLS who it is."""

    identities: Identities
    egress: Rules | None = None
    address: str = ""
    authenticated: bool = False

    def aims_at(self, endpoint: Identities) -> Identities:
        """Whom its own policies are asked about: behind a Gateway that too."""
        return endpoint if self.address else (*endpoint, int(Reserved.INGRESS))


class _Range(NamedTuple):
    text: str
    length: int
    identity: int


class _Pod(NamedTuple):
    section: PolicySection
    ingress: Rules
    egress: Rules


class Policies:
    """What is in force."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._pods: dict[SectionKey, _Pod] = {}
        self._at: dict[str, _Pod] = {}
        self._cidrs: dict[SectionKey, CidrSection] = {}
        # By family and length of the prefix: what begins with it.
        self._ranges: dict[tuple[int, int], dict[int, CidrSection]] = {}
        self._known: dict[str, int] = {}
        # Called after every delta.
        self.watchers: set[Callable[[], None]] = set()

    @property
    def any(self) -> bool:
        """There are policies at all."""
        return bool(self._pods)

    # --- configuration --------------------------------------------------------------------------

    def put(self, key: SectionKey, section: PolicySection | CidrSection) -> None:
        """Refused: it cannot be put in force; a pod whose policies cannot is reached by nobody and
        reaches nobody."""
        if isinstance(section, CidrSection):
            version, length, prefix = _range(section.cidr)
            self.remove(key)
            self._cidrs[key] = section
            self._ranges.setdefault((version, length), {})[prefix] = section
            return
        try:
            self._put_pod(key, section)
        except Exception:
            self._put_pod(key, _closed(section))
            raise

    def _put_pod(self, key: SectionKey, section: PolicySection) -> None:
        pod = _Pod(section, Rules(section.ingress, "ingress"), Rules(section.egress, "egress"))
        addresses = [plain(address) for address in section.addresses]
        self.remove(key)
        self._pods[key] = pod
        self._at.update(dict.fromkeys(addresses, pod))

    def remove(self, key: SectionKey) -> None:
        pod = self._pods.pop(key, None)
        for address in pod.section.addresses if pod is not None else ():
            # Addresses of pods that are gone are given out again: it may be another's by now.
            if self._at.get(plain(address)) is pod:
                del self._at[plain(address)]
        if (cidr := self._cidrs.pop(key, None)) is not None:
            version, length, prefix = _range(cidr.cidr)
            held = self._ranges[version, length]
            del held[prefix]
            if not held:
                del self._ranges[version, length]

    def told(self) -> None:
        """A delta is in force: who is behind an address may have changed, and what may pass."""
        self._known.clear()
        for look in tuple(self.watchers):
            look()

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
        workload = self._peers.at(address)
        if workload is not None:
            return workload.identity
        parsed = ipaddress.ip_address(address)
        node = self._peers.node_at(address)
        found = self._longest(parsed, parsed.max_prefixlen)
        if node is not None and (found is None or found.length < parsed.max_prefixlen):
            own = node.name == self._peers.node
            return int(Reserved.HOST if own else Reserved.REMOTE_NODE)
        return found.identity if found is not None else int(Reserved.WORLD)

    def _longest(
        self, address: Address, at_most: int, *, everywhere: bool = False
    ) -> _Range | None:
        """The range that an address lies in, of those that are no longer than `at_most`;
        `everywhere`: of those that policies about pods of other nodes name, too."""
        number, bits = int(address), address.max_prefixlen
        lengths = (length for version, length in self._ranges if version == address.version)
        for length in sorted(lengths, reverse=True):
            if length <= at_most:
                prefix = number >> (bits - length) << (bits - length)
                found = self._ranges[address.version, length].get(prefix)
                if found is not None and (found.here or everywhere):
                    text = f"{type(address)(prefix)}/{length}"
                    return _Range(text, length, found.identity)
        return None

    def client_of(self, peer: str, said: str) -> str:
        """A Gateway's client: who is connected (`peer`), or whom a trusted proxy says to stand in
        front of it. It is believed of addresses outside of the cluster only, and no pod is such a
        proxy: else one could speak for another."""
        if peer == said or self._is_inside(said) or self._peers.at(plain(peer)) is not None:
            return peer
        return said

    def _is_inside(self, address: str) -> bool:
        address = plain(address)
        return self._peers.at(address) is not None or self._peers.node_at(address) is not None

    def told_as(self, address: str) -> str:
        """A Gateway's client, as other nodes are told of it: what their policies could tell apart.
        A pod's address, or the longest range that some policy names; "" neither."""
        address = plain(address)
        if self._peers.at(address) is not None:
            return address
        parsed = ipaddress.ip_address(address)
        found = self._longest(parsed, parsed.max_prefixlen, everywhere=True)
        return found.text if found is not None else ""

    def _told(self, text: str) -> int:
        """Who another node has told of. Refused: it is neither an address nor a range."""
        if "/" not in text:
            return self.identity(text) if text else int(Reserved.WORLD)
        version, length, prefix = _range(text)
        kind = ipaddress.IPv4Address if version == 4 else ipaddress.IPv6Address
        found = self._longest(kind(prefix), length)
        return found.identity if found is not None else int(Reserved.WORLD)

    def asker(self, caller: Caller) -> Asker:
        """Whom policies see. A workload: one of this node, or of another that has come through a
        tunnel; one of which nothing is known is `init`. A Gateway: it, and its client, by
        address or as another node has told of it (Refused: that is no text of this kind); for that
        one nobody vouches, so this is not authenticated."""
        if caller.gateway:
            client = caller.client
            if not client:
                return Asker((int(Reserved.INGRESS), self._told(caller.told)))
            pod = self._at.get(plain(client))
            identities = int(Reserved.INGRESS), self.identity(client)
            return Asker(identities, pod and pod.egress)
        address = plain(caller.client)
        workload = self._peers.at(address)
        # An address is given out again: who has it here need not be who had it elsewhere.
        if workload is None or workload.local == caller.proven:
            unknown = self._at.get(NOWHERE) if not caller.proven else None
            return Asker((int(Reserved.INIT),), unknown and unknown.egress, address)
        pod = self._at.get(address)
        egress = pod.egress if pod is not None else None
        return Asker((workload.identity,), egress, address, caller.proven)

    def no_way(self, caller: Caller, endpoint: Endpoint) -> str:
        """Why no connection would be made now for a caller, a reason to count; "": one would."""
        way = self._peers.way(caller, endpoint.address, endpoint.port, pod=bool(endpoint.name))
        return way.reason if isinstance(way, NoWay) else ""

    def rules_at(self, address: str) -> tuple[Rules, Rules] | None:
        """Ingress and egress rules of the pod of this node that has an address; None: there is no
        such pod, or no policy selects it."""
        pod = self._at.get(plain(address))
        return (pod.ingress, pod.egress) if pod is not None else None

    # --- verdicts -------------------------------------------------------------------------------

    def _end(self, address: str, pod: bool) -> tuple[Identities, _Pod | None]:
        """Whose an address is that is connected to, and who judges what comes there. `pod`:
        somebody says that it is a pod's. One that nobody has told of is judged as the kernel does
        it: as `init`, whatever ranges say, by what is denied by default."""
        if pod and not self._is_inside(address):
            return (int(Reserved.INIT),), self._at.get(NOWHERE)
        return (self.identity(address),), self._at.get(address)

    def connection(
        self,
        asker: Asker,
        address: str,
        port: int,
        transport: Transport = "TCP",
        *,
        pod: bool = False,
    ) -> Verdict:
        """Of a connection to an address, whatever it carries: refused, allowed, or `http`: only
        requests that are judged one by one may pass."""
        address = plain(address)
        if not self._pods or asker.address == address:
            return FREE
        first = second = FREE
        identities, end = self._end(address, pod)
        if asker.egress is not None:
            proved = self._proved(asker, address, port)
            aims = asker.aims_at(identities)
            first = asker.egress.connection(aims, transport, port, authenticated=proved)
        if first.allowed and end is not None:
            proved = asker.authenticated or self._are_here(asker.address, address)
            second = end.ingress.connection(asker.identities, transport, port, authenticated=proved)
        return _both(first, second)

    def request(
        self,
        asker: Asker,
        address: str,
        port: int,
        sent: RequestHead,
        forwarded: RequestHead,
        *,
        pod: bool = False,
    ) -> Verdict:
        """Of a request to an endpoint: the client's own policies judge it as it was `sent`, those
        of the pod it goes to as it is to be `forwarded`."""
        address = plain(address)
        if not self._pods or asker.address == address:
            return FREE
        first = second = FREE
        identities, end = self._end(address, pod)
        if asker.egress is not None:
            proved = self._proved(asker, address, port)
            aims = asker.aims_at(identities)
            first = asker.egress.request(aims, port, sent, authenticated=proved)
        if first.allowed and end is not None:
            head = mended(forwarded, first)
            proved = asker.authenticated or self._are_here(asker.address, address)
            second = end.ingress.request(asker.identities, port, head, authenticated=proved)
        return _both(first, second)

    def for_kernel(
        self, asker: Asker, address: str, port: int, *, pod: bool
    ) -> tuple[HttpRules, HttpRules] | None:
        """What `request` comes to where nothing but heads is looked at: the rules of the client and
        those of the pod it goes to, of which one each must hold (none: nothing is asked); None: the
        proxy has to judge."""
        address = plain(address)
        if not self._pods or asker.address == address:
            return (), ()
        first: HttpRules | None = ()
        second: HttpRules | None = ()
        identities, end = self._end(address, pod)
        if asker.egress is not None:
            proved = self._proved(asker, address, port)
            aims = asker.aims_at(identities)
            first = asker.egress.for_kernel(aims, port, authenticated=proved)
        if end is not None:
            proved = asker.authenticated or self._are_here(asker.address, address)
            second = end.ingress.for_kernel(asker.identities, port, authenticated=proved)
        return None if first is None or second is None else (first, second)

    def unasked(
        self, asker: Asker, address: str, port: int, *, pod: bool
    ) -> tuple[str | None, str | None]:
        """Where `for_kernel` asks for nothing: the rules that let all requests pass, as
        `Rules.unasked`."""
        address = plain(address)
        first: str | None = ""
        second: str | None = ""
        if not self._pods or asker.address == address:
            return first, second
        identities, end = self._end(address, pod)
        if asker.egress is not None:
            proved = self._proved(asker, address, port)
            aims = asker.aims_at(identities)
            first = asker.egress.unasked(aims, port, authenticated=proved)
        if end is not None:
            proved = asker.authenticated or self._are_here(asker.address, address)
            second = end.ingress.unasked(asker.identities, port, authenticated=proved)
        return first, second

    def _proved(self, asker: Asker, address: str, port: int) -> bool:
        """Whether who is asked is known by more than its address."""
        if asker.egress is None or not asker.egress.asks_for_proof or not asker.address:
            return False
        way = self._peers.way(Caller(asker.address), address, port)
        return self._are_here(asker.address, address) or isinstance(way, Tunnelled)

    def _are_here(self, *addresses: str) -> bool:
        """Pods of this node, of which the kernel knows who they are."""
        return all(map(self._peers.is_proven, addresses))


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
        first.audit_http or second.audit_http,
        first.mends + second.mends,
    )


def _closed(section: PolicySection) -> PolicySection:
    named = dict.fromkeys((*section.ingress.selected_by, *section.egress.selected_by))
    side = Direction(default_deny=True, selected_by=tuple(named))
    return msgspec.structs.replace(section, ingress=side, egress=side)


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
