"""Who stands behind an address, and which Service behind a frontend, by the configuration.

An address that is no pod's is `host` (this node's own), `remote-node` (another's), `ingress` (a
node's, with the identity of Gateways) or `world`, with the numbers and labels that Cilium gives
these: reserved identities, which no pod has. Knows sections, not whence flows come.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import msgspec

from mesh.model.flow import Flow, Peer
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import (
    LoadBalancerEntry,
    NodeSection,
    Section,
    SvidSection,
    WorkloadSection,
)
from mesh.model.section import SectionKey

RESERVED = {number.value: number.name.lower().replace("_", "-") for number in Reserved}
_LABELS = {number: {f"reserved:{name}": ""} for number, name in RESERVED.items()}
_MAPPED = "::ffff:"
_Section: TypeAlias = WorkloadSection | LoadBalancerEntry | NodeSection | SvidSection


class Peers:
    """`hosts`: the node's own addresses, as ipaddress writes them; loopback always is."""

    def __init__(self, hosts: Iterable[str] = ()) -> None:
        self._hosts = frozenset(hosts)
        self._workloads: dict[str, WorkloadSection] = {}
        self._services: dict[tuple[str, int, str], str] = {}
        self._nodes: dict[str, NodeSection] = {}
        self._held: dict[str, SvidSection] = {}
        self._sections: dict[SectionKey, _Section] = {}

    def publish(self, put: Mapping[SectionKey, Section], remove: Iterable[SectionKey]) -> None:
        """The step from one version of the configuration to the next."""
        for key in (*put, *remove):
            match self._sections.pop(key, None):
                case WorkloadSection() as before:
                    for address in before.addresses:
                        # Another pod may have it by now.
                        if self._workloads.get(address) is before:
                            del self._workloads[address]
                case NodeSection() as before:
                    for address in before.addresses:
                        if self._nodes.get(address) is before:
                            del self._nodes[address]
                case SvidSection() as before:
                    del self._held[before.spiffe_id]
                case LoadBalancerEntry() as before:
                    del self._services[before.address, before.port, before.protocol]
        for key, section in put.items():
            match section:
                case WorkloadSection():
                    self._sections[key] = section
                    self._workloads |= dict.fromkeys(section.addresses, section)
                case NodeSection():
                    self._sections[key] = section
                    self._nodes |= dict.fromkeys(section.addresses, section)
                case SvidSection():
                    self._sections[key] = section
                    self._held[section.spiffe_id] = section
                case LoadBalancerEntry() if section.source.startswith("Service/"):
                    name = section.source.removeprefix("Service/")
                    frontend = section.address, section.port, section.protocol
                    self._sections[key] = section
                    self._services[frontend] = f"{name}:{section.port}"

    def complete(self, flow: Flow, node: str) -> Flow:
        """The flow with all that is known of its ends; seen at `node`."""
        return msgspec.structs.replace(
            flow,
            source=self._who(flow.source),
            destination=self._who(flow.destination, flow.service.partition("/")[0]),
            node=flow.node or node,
        )

    def proven(self, flow: Flow) -> Flow:
        """A flow that no proxy saw: "local" between pods of this node that both have valid SVIDs,
        because the kernel knows who they are."""
        ends = tuple(self._proven(peer, flow.time) for peer in (flow.source, flow.destination))
        if not all(one.spiffe_id for one in ends):
            return flow
        source, destination = ends
        return msgspec.structs.replace(
            flow, source=source, destination=destination, encryption="local"
        )

    def _proven(self, peer: Peer, time_ns: int) -> Peer:
        """With the identity of a pod of this node whose SVID was valid then."""
        pod = self._workloads.get(peer.address)
        held = self._held.get(pod.spiffe_id) if pod is not None and pod.local else None
        if held is None or time_ns >= held.not_after * 1e9:
            return peer
        return msgspec.structs.replace(peer, spiffe_id=held.spiffe_id)

    def service(self, address: str, port: int, protocol: str) -> str:
        """ "<ns>/<name>:<port>" of a frontend; empty: of no Service."""
        return self._services.get((address, port, protocol), "")

    def _who(self, peer: Peer, namespace: str = "") -> Peer:
        """`namespace`: the pod's, where a worker knows its name as an endpoint's of a Service."""
        address = peer.address
        if address.startswith(_MAPPED):
            address = address.removeprefix(_MAPPED)
        pod = self._workloads.get(address)
        if pod is not None:
            return Peer(
                address,
                peer.port,
                pod.namespace,
                pod.name,
                pod.service_account,
                pod.labels,
                pod.identity,
                peer.spiffe_id,
            )
        if not address:
            return peer
        if peer.pod:
            return Peer(address, peer.port, namespace, peer.pod, spiffe_id=peer.spiffe_id)
        number = self._reserved(address, peer.spiffe_id)
        return Peer(
            address,
            peer.port,
            labels=_LABELS[number],
            identity=number,
            spiffe_id=peer.spiffe_id,
        )

    def _reserved(self, address: str, spiffe_id: str) -> int:
        own = address in self._hosts or address.startswith("127.") or address == "::1"
        if spiffe_id and (own or address in self._nodes):
            return Reserved.INGRESS  # pods speak under their own addresses
        if own:
            return Reserved.HOST
        return Reserved.REMOTE_NODE if address in self._nodes else Reserved.WORLD


def own_addresses() -> set[str]:
    """The addresses of this process's network namespace now, as the kernel lists them in /proc."""
    found = set()
    try:
        before = ""
        for line in Path("/proc/net/fib_trie").read_text().splitlines():
            words = line.split()
            if words[-1] == "LOCAL" and words[0] == "/32":
                found.add(before)
            before = words[-1]
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            packed = bytes.fromhex(line.split()[0])
            found.add(socket.inet_ntop(socket.AF_INET6, packed))
    except OSError:  # no IPv6, or no /proc: what is not known is world
        pass
    return found
