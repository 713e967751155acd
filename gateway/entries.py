"""LoadBalancerEntries: a Service's ClusterIP ports to its ready endpoints, and a Gateway's address
and port to the proxy that listens there. What pods are asked for directly is in
gateway.pod_entries."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator

from gateway.backends import endpoints
from gateway.cluster_ips import Frontend, whose
from gateway.declared import speaks
from gateway.keys import PortKey, ServicePortKey
from gateway.node import Mesh
from gateway.pod_ports import spoken
from gateway.workloads import Holder
from mesh.model.core import Service
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import Endpoint, EntryBackend, LoadBalancerEntry, PortSection

# What Kubernetes sets where the Service leaves it open (ClientIPConfig.timeoutSeconds).
_AFFINITY_S = 10_800


def service_entry(mesh: Mesh) -> Callable[[View, Frontend], LoadBalancerEntry]:
    def compute(view: View, frontend: Frontend) -> LoadBalancerEntry:
        address, number, protocol = frontend
        key: ObjectKey = next(iter(view.bucket("service_frontends", frontend)))
        service: Service = view.get("Service", key)
        port = next(p for p in service.spec.ports if (p.port, p.protocol) == (number, protocol))
        steered = mesh.at(address) is not None and protocol == "TCP"
        http = steered and view.get("services", ServicePortKey(*key, number)) is not None
        found = endpoints(view, mesh, key, port, "IPv6" if ":" in address else "IPv4")
        return LoadBalancerEntry(
            address=address,
            port=number,
            protocol=protocol,
            backends=tuple(
                backend(view, mesh, one, http) if steered else EntryBackend(one.address, one.port)
                for one in found
            ),
            source=f"Service/{key}",
            affinity_s=_affinity_s(service),
            http=http,
            sockmap=http and speaks(port) == "http1",
        )

    return compute


def backend(view: View, mesh: Mesh, endpoint: Endpoint, http: bool) -> EntryBackend:
    """An endpoint of a TCP port. `http`: the proxy sends requests to it; by redirect if it is a pod
    of this node that lets itself be enrolled, at a port that is said to speak HTTP/1 and nothing
    else. (The kernel knows no more of a connection than the pod's address and port.)"""
    holder: Holder | None = view.get("holders", endpoint.address)
    if holder is None:
        return EntryBackend(endpoint.address, endpoint.port)
    return EntryBackend(
        endpoint.address,
        endpoint.port,
        remote=holder.remote(mesh),
        sockmap=http
        and holder.local(mesh)
        and holder.sockmap
        and spoken(view, (endpoint.address, endpoint.port)) == "http1",
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


def gateway_entry(view: View, frontend: PortKey) -> LoadBalancerEntry | None:
    """None: a Service or pod has that address. (A wildcard's are not looked at elsewhere.)"""
    address, number = frontend
    if whose(view, address):
        return None
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
