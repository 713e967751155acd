"""The mesh on this node: its name, and where the proxy takes the connections of workloads."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from gateway.keys import PortKey
from mesh.model.nodeconfig import MESH_HTTP_PORT, MESH_RELAY_PORT, MESH_TUNNEL_PORT, MeshPort
from mesh.model.section import SectionKey, port_key


class Mesh(NamedTuple):
    """`addresses`: at most one of each family; none: there is no mesh on this node, and nothing is
    steered to the proxy. `node` "": nobody knows which pods are this node's. `trust_domain`: whose
    identities workloads have; "": there is no authority, and nobody has one."""

    node: str = ""
    addresses: tuple[str, ...] = ()
    trust_domain: str = ""

    @property
    def on(self) -> bool:
        return bool(self.addresses)

    def check(self) -> None:
        """ValueError: the addresses are none of one host, or two of one family."""
        found = [ipaddress.ip_address(address) for address in self.addresses]
        families = [address.version for address in found]
        for address in found:
            if address.is_unspecified or address.is_multicast:
                raise ValueError(f"mesh address {address}: connections cannot be sent there")
        if len(set(families)) < len(families):
            raise ValueError(
                f"mesh addresses {', '.join(self.addresses)}: give one of each family at most"
            )

    def at(self, address: str) -> str | None:
        """The mesh address to which connections to `address` are steered: the one of its family."""
        return next((one for one in self.addresses if (":" in one) == (":" in address)), None)

    def serves(self, addresses: Iterable[str]) -> tuple[str, ...]:
        return tuple(address for address in addresses if self.at(address) is not None)

    def sections(self) -> Iterator[tuple[SectionKey, MeshPort]]:
        for address in self.addresses:
            http = MeshPort(address, MESH_HTTP_PORT, "http")
            relay = MeshPort(address, MESH_RELAY_PORT, "relay")
            tunnel = MeshPort(address, MESH_TUNNEL_PORT, "tunnel")
            for port in (http, relay, tunnel) if self.trust_domain else (http, relay):
                yield port_key(address, port.port), port

    @property
    def gateway_spiffe_id(self) -> str:
        """The identity of Gateways' proxies, which every node may hold ("": no authority)."""
        return self.spiffe_id("weft-system", "weft-gateway")

    def spiffe_id(self, namespace: str, service_account: str) -> str:
        """The identity of a workload ("": there is no authority, or it has no service account)."""
        if not self.trust_domain or not service_account:
            return ""
        return f"spiffe://{self.trust_domain}/ns/{namespace}/sa/{service_account}"

    @property
    def ports(self) -> frozenset[PortKey]:
        return frozenset((port.address, port.port) for _, port in self.sections())

    def reserves(self, port: PortKey) -> bool:
        """Whether a Gateway that listens on `port` would be in the mesh's way."""
        address, number = port
        if not any(number == own for _, own in self.ports):
            return False
        return address in self.addresses or ipaddress.ip_address(address).is_unspecified
