"""LoadBalancerEntries: a Service's ClusterIP ports to its ready endpoints, and a Gateway's address
and port to the proxy that listens there. What pods are asked for directly is in
gateway.pod_entries."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from gateway.backends import endpoints
from gateway.declared import speaks
from gateway.keys import PortKey, ServicePortKey
from gateway.node import Mesh
from gateway.workloads import Holder
from mesh.model.core import Service
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import Endpoint, EntryBackend, LoadBalancerEntry, PortSection

Frontend: TypeAlias = tuple[str, int, Literal["TCP", "UDP"]]

# What Kubernetes sets where the Service leaves it open (ClientIPConfig.timeoutSeconds).
_AFFINITY_S = 10_800


def service_frontends(key: ObjectKey, service: Service) -> Iterator[Frontend]:
    """The frontends of a Service (for an index): each cluster IP with each port."""
    if service.spec.type == "ExternalName":
        return
    addresses = service.spec.cluster_ips or (service.spec.cluster_ip,)
    for address in addresses:
        if address and address != "None":
            for port in service.spec.ports:
                if port.protocol != "SCTP":
                    yield address, port.port, port.protocol


def owner(view: View, frontend: Frontend) -> ObjectKey:
    """Where two Services claim one address and port, the older has it, then the first by name."""
    keys: list[ObjectKey] = list(view.bucket("service_frontends", frontend))
    if len(keys) == 1:
        return keys[0]
    services: list[tuple[Service, ObjectKey]] = [(view.get("Service", key), key) for key in keys]
    return min(services, key=lambda s: (s[0].metadata.creation_timestamp or "", s[1]))[1]


def service_entry(mesh: Mesh) -> Callable[[View, Frontend], LoadBalancerEntry]:
    def compute(view: View, frontend: Frontend) -> LoadBalancerEntry:
        address, number, protocol = frontend
        key = owner(view, frontend)
        service: Service = view.get("Service", key)
        port = next(p for p in service.spec.ports if (p.port, p.protocol) == (number, protocol))
        steered = mesh.at(address) is not None and protocol == "TCP"
        http = steered and view.get("services", ServicePortKey(*key, number)) is not None
        sockmap = http and speaks(port) == "http1"
        found = endpoints(view, key, port, "IPv6" if ":" in address else "IPv4")
        return LoadBalancerEntry(
            address=address,
            port=number,
            protocol=protocol,
            backends=tuple(
                backend(view, mesh, one, sockmap)
                if steered
                else EntryBackend(one.address, one.port)
                for one in found
            ),
            source=f"Service/{key}",
            affinity_s=_affinity_s(service),
            http=http,
            sockmap=sockmap,
        )

    return compute


def backend(view: View, mesh: Mesh, endpoint: Endpoint, sockmap: bool) -> EntryBackend:
    """An endpoint of a TCP port; `sockmap`: what is sent to it may go by redirect, if it is a pod
    of this node that lets itself be enrolled."""
    holder: Holder | None = view.get("holders", endpoint.address)
    if holder is None:
        return EntryBackend(endpoint.address, endpoint.port)
    return EntryBackend(
        endpoint.address,
        endpoint.port,
        remote=holder.remote(mesh),
        sockmap=sockmap and holder.local(mesh) and holder.sockmap,
    )


def _affinity_s(service: Service) -> int | None:
    if service.spec.session_affinity != "ClientIP":
        return None
    config = service.spec.session_affinity_config
    timeout = config.client_ip.timeout_seconds if config and config.client_ip else None
    return _AFFINITY_S if timeout is None else timeout


def gateway_frontends(
    advertise: tuple[str, ...],
) -> Callable[[PortKey, PortSection], Iterator[PortKey]]:
    """The addresses under which a port is reached (for an index): a wildcard's are `advertise`."""
    reached = tuple(filter(_is_address, advertise))

    def frontends(port: PortKey, section: PortSection) -> Iterator[PortKey]:
        address, number = port
        if ipaddress.ip_address(address).is_unspecified:
            yield from ((one, number) for one in reached)
        else:
            yield port

    return frontends


def gateway_entry(view: View, frontend: PortKey) -> LoadBalancerEntry:
    address, number = frontend
    section: PortSection = view.get("ports", min(view.bucket("gateway_frontends", frontend)))
    return LoadBalancerEntry(
        address=address,
        port=number,
        protocol="TCP",
        backends=(EntryBackend(address, number),),
        source=f"Gateway/{section.gateway}",
    )


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
