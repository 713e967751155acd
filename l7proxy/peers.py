"""Who is where, and how a connection is made there: straight, through a tunnel, or not at all.

Knows the workloads and nodes of the cluster and which identities this node holds (`credentials`).
Every answer costs a few look-ups by address, whatever the size of the cluster. No sockets.

A pod of another node that somebody vouches for is connected to through a tunnel, or not at all:
never plainly because something is missing. What is plain is so by rule: DISABLE, no workload or one
without an identity at either end (unless STRICT), a node without an authority.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from certs.spiffe import BadSpiffeId, parse, to_sni
from l7proxy import metrics
from l7proxy.credentials import Credentials
from l7proxy.field_rules import Refused
from mesh.model.flow import Encryption
from mesh.model.nodeconfig import MtlsMode, NodeSection, Settings, WorkloadSection
from mesh.model.section import SectionKey, node_key, workload_key

# What this node may be about to be told.
_PASSING = frozenset(("svid_missing", "bundle_missing", "node_unknown", "workload_unknown"))


class Caller(NamedTuple):
    """On whose behalf the proxy connects. `client`: an address, among whose holders connections are
    shared; a workload's, unless `gateway` ("<ns>/<name>") has let it in and connects as itself.
    `told`: who asks the Gateway, as far as other nodes' policies can tell (Policies.told_as).
    `proven`: it is another node's, and a tunnel has proved who it is."""

    client: str = ""
    gateway: str = ""
    told: str = ""
    proven: bool = False


class Source(NamedTuple):
    """A caller as other nodes see it. `name` is "<ns>/<name>" of a pod or Gateway; `told` as in
    Caller."""

    name: str
    spiffe_id: str
    gateway: bool = False
    told: str = ""


class Direct(NamedTuple):
    """Straight to the endpoint. `destination`: the workload there, if it is one, and `spiffe_id`
    the caller's then ("": it has none). `encryption` "local": both ends are on this node and have
    SVIDs that are valid."""

    destination: WorkloadSection | None = None
    encryption: Encryption = "none"
    spiffe_id: str = ""


class Tunnelled(NamedTuple):
    """Through the proxy of the destination's node, at `node` (an address)."""

    source: Source
    destination: WorkloadSection
    node: str
    encryption: Encryption = "mtls"


class NoWay(NamedTuple):
    """It must not be made. `reason` is counted, snake case."""

    reason: str
    why: str


Way: TypeAlias = Direct | Tunnelled | NoWay


class Peers:
    """`settings` are those in force, set from outside."""

    def __init__(self, credentials: Credentials, settings: Settings) -> None:
        self.settings = settings
        self.credentials = credentials
        self._workloads: dict[SectionKey, WorkloadSection] = {}
        self._by_address: dict[str, WorkloadSection] = {}
        self._nodes: dict[SectionKey, NodeSection] = {}
        self._node_at: dict[str, NodeSection] = {}
        self._own: tuple[str, ...] = ()
        self.node = ""  # this one's name, once one of its pods is known
        self._changed: asyncio.Future[None] | None = None

    # --- configuration ----------------------------------------------------------------------------

    def put_workload(self, key: SectionKey, section: WorkloadSection) -> None:
        """Refused: nothing has changed."""
        addresses = _canonicals(section.addresses)
        if section.spiffe_id:
            try:
                parse(section.spiffe_id)
            except BadSpiffeId as error:
                raise Refused(f"spiffe_id: {error}") from None
        self.remove_workload(key)
        self._workloads[key] = section
        if section.local:
            self.node = section.node
        for address in addresses:
            self._by_address[address] = section

    def remove_workload(self, key: SectionKey) -> None:
        section = self._workloads.pop(key, None)
        if section is not None:
            _take_away(self._by_address, section)

    def put_node(self, key: SectionKey, section: NodeSection) -> None:
        """Refused: nothing has changed."""
        addresses = _canonicals(section.addresses)
        self.remove_node(key)
        self._nodes[key] = section
        for address in addresses:
            self._node_at[address] = section

    def remove_node(self, key: SectionKey) -> None:
        section = self._nodes.pop(key, None)
        if section is not None:
            _take_away(self._node_at, section)

    def listen(self, addresses: Iterable[str]) -> None:
        """Where this node's proxy takes tunnels, and from where it has to make its own."""
        self._own = tuple(addresses)

    def own_address(self, peer: str) -> str | None:
        """The one of the same family as `peer`; None: any."""
        return next((one for one in self._own if (":" in one) == (":" in peer)), None)

    def told(self) -> None:
        """A delta is in force."""
        if self._changed is not None:
            self._changed.set_result(None)
            self._changed = None

    async def change(self) -> None:
        """Wait for the next delta."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)

    # --- who is where -----------------------------------------------------------------------------

    def at(self, address: str) -> WorkloadSection | None:
        """The workload behind an address."""
        found = self._by_address.get(address)
        if found is None and ":" in address:  # IPv4 has one spelling, of which others are none
            try:
                found = self._by_address.get(_canonical(address))
            except ValueError:
                pass
        return found

    def pod(self, name: str) -> WorkloadSection | None:
        """The workload "<ns>/<name>"."""
        namespace, _, pod = name.partition("/")
        return self._workloads.get(workload_key(namespace, pod))

    def node_at(self, address: str) -> NodeSection | None:
        """The node with an address of its own."""
        return self._node_at.get(address)

    # --- ways -------------------------------------------------------------------------------------

    def way(self, caller: Caller, address: str, port: int, *, pod: bool = False) -> Way:
        """How `caller` is connected to address and port. `pod`: somebody says that a pod is there,
        so that it is not plain because the pod is not known (yet, or any more)."""
        destination = self.at(address)
        if destination is None:
            # Pods in their host's network are no workloads.
            if pod and self.has_authority and address not in self._node_at:
                return NoWay("workload_unknown", f"{address} is a pod's that is not known here")
            return Direct()
        if destination.local or not destination.node:
            return self._on_this_node(caller, destination, port)
        return self._to_other_node(caller, destination, port)

    async def settled_way(
        self, caller: Caller, address: str, port: int, patience_s: float, *, pod: bool
    ) -> Way:
        """`way`; what this node may be about to be told is waited for. That there is none is
        counted."""
        way = self.way(caller, address, port, pod=pod)
        if not isinstance(way, NoWay):
            return way
        try:
            async with asyncio.timeout(patience_s):
                while isinstance(way, NoWay) and way.reason in _PASSING:
                    await self.change()
                    way = self.way(caller, address, port, pod=pod)
        except TimeoutError:
            pass
        if isinstance(way, NoWay):
            metrics.TUNNEL_FAILURES.labels(way.reason).inc()
        return way

    def _on_this_node(self, caller: Caller, destination: WorkloadSection, port: int) -> Way:
        own, mode = self._identity(caller), destination.mtls_ports.get(port, destination.mtls)
        problem = self._unproven(own) or self._unproven(destination.spiffe_id)
        if problem is None and destination.local:
            return Direct(destination, "local", own)
        if problem is None or mode != "STRICT" or caller.proven:
            return Direct(destination, "none", own)
        who = f"port {port} of {destination.namespace}/{destination.name}"
        return NoWay(problem[0], f"{who} is STRICT, and {problem[1]}")

    def _unproven(self, spiffe_id: str) -> tuple[str, str] | None:
        """Why nobody of this node can be `spiffe_id` now: a reason to count, and words."""
        if not self.has_authority:
            return "mtls_required", "this node has no authority"
        if not spiffe_id:
            return "mtls_required", "one end has no identity"
        return self.credentials.problem(spiffe_id, time.time())

    def is_proven(self, address: str) -> bool:
        """Whether a pod of this node is there, of which the kernel knows who it is, and which has
        an SVID that is valid."""
        workload = self.at(address) if address else None
        if workload is None or not workload.local:
            return False
        return self._unproven(workload.spiffe_id) is None

    def _to_other_node(self, caller: Caller, destination: WorkloadSection, port: int) -> Way:
        mode: MtlsMode = destination.mtls_ports.get(port, destination.mtls)
        if mode == "DISABLE":
            return Direct(destination, "none", self._identity(caller))
        source = self.source(caller)
        who = f"{destination.namespace}/{destination.name}"
        if not self.has_authority or not destination.spiffe_id or source is None:
            if mode == "PERMISSIVE":
                return Direct(destination, "none", self._identity(caller))
            why = (
                "this node has no authority"
                if not self.has_authority
                else f"{who} has no identity"
                if not destination.spiffe_id
                else "the client has no identity"
            )
            return NoWay("mtls_required", f"port {port} of {who} is STRICT, and {why}")
        node = self._nodes.get(node_key(destination.node))
        if node is None or not node.addresses:
            return NoWay("node_unknown", f"no address of node {destination.node} is known")
        if (missing := self.lacking(source, destination.spiffe_id)) is not None:
            return NoWay(*missing)
        if sni_of(destination.spiffe_id) is None:
            return NoWay("no_server_name", f"{destination.spiffe_id} cannot be asked for by SNI")
        return Tunnelled(source, destination, _nearest(node, destination.addresses[0]))

    def lacking(self, source: Source, destination: str) -> tuple[str, str] | None:
        """What this node needs to speak for `source` to an identity, and has not now: a reason to
        count, and words."""
        if (problem := self.credentials.problem(source.spiffe_id, time.time())) is not None:
            return problem
        trust_domain = trust_domain_of(destination)
        if not self.credentials.trusts(trust_domain):
            return "bundle_missing", f"there is no trust bundle for {trust_domain}"
        return None

    @property
    def has_authority(self) -> bool:
        """Whether somebody gives this node identities."""
        return bool(self.settings.gateway_spiffe_id) or self.credentials.any

    def source(self, caller: Caller) -> Source | None:
        """Who a caller is to other nodes; None: nobody can vouch for it."""
        if caller.gateway:
            spiffe_id = self.settings.gateway_spiffe_id
            return Source(caller.gateway, spiffe_id, True, caller.told) if spiffe_id else None
        workload = self.at(caller.client)
        if workload is None or not workload.local or not workload.spiffe_id:
            return None
        return Source(f"{workload.namespace}/{workload.name}", workload.spiffe_id)

    def _identity(self, caller: Caller) -> str:
        if caller.gateway:
            return self.settings.gateway_spiffe_id
        workload = self.at(caller.client)
        return workload.spiffe_id if workload is not None and workload.local else ""


def caller_identity(way: Direct | Tunnelled) -> str:
    """Who the caller is to the workload at the other end ("": nobody that is known)."""
    return way.source.spiffe_id if isinstance(way, Tunnelled) else way.spiffe_id


def identities(way: Way | None) -> tuple[str, str]:
    """Who both ends have proved to be, the caller first ("": nobody)."""
    match way:
        case Tunnelled(source=source, destination=destination):
            return source.spiffe_id, destination.spiffe_id
        case Direct(destination=WorkloadSection() as destination, encryption="local"):
            return way.spiffe_id, destination.spiffe_id
    return "", ""


def keys_of(source: Source, destination: WorkloadSection) -> list[SectionKey]:
    """The sections of the workloads at both ends."""
    keys = [workload_key(destination.namespace, destination.name)]
    if not source.gateway:
        keys.append(workload_key(*source.name.split("/", 1)))
    return keys


@lru_cache(maxsize=4096)
def trust_domain_of(spiffe_id: str) -> str:
    """Of a SPIFFE ID that was checked."""
    return parse(spiffe_id).trust_domain


@lru_cache(maxsize=4096)
def sni_of(spiffe_id: str) -> str | None:
    """The server name by which an identity is asked for; None: there is none."""
    try:
        return to_sni(parse(spiffe_id))
    except BadSpiffeId:
        return None


def _nearest(node: NodeSection, address: str) -> str:
    """A node's address of the family of `address` if it has one."""
    same = (one for one in node.addresses if (":" in one) == (":" in address))
    return next(same, node.addresses[0])


def _take_away(
    table: dict[str, WorkloadSection] | dict[str, NodeSection],
    section: WorkloadSection | NodeSection,
) -> None:
    for address in _canonicals(section.addresses):
        # Addresses are given away anew once their holders are gone.
        if table.get(address) is section:
            del table[address]


def _canonicals(addresses: Iterable[str]) -> list[str]:
    """Refused: one is none."""
    result = []
    for number, address in enumerate(addresses):
        try:
            result.append(_canonical(address))
        except ValueError:
            raise Refused(f"addresses[{number}]: {address!r} is not an IP address") from None
    return result


@lru_cache(maxsize=4096)
def _canonical(address: str) -> str:
    return str(ipaddress.ip_address(address))
