"""backendRefs and clusters: which Service port a reference means, and its ready endpoints.

Knows Services, EndpointSlices and BackendTLSPolicies through the derivation's tables; nothing of
routes beyond the kind and namespace that refer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from gateway import backend_tls
from gateway.addresses import canonical
from gateway.conditions import Problem
from gateway.declared import app_protocol
from gateway.grants import not_permitted, permitted
from gateway.keys import ClusterRef, RouteKey
from gateway.node import Mesh
from mesh.model.core import EndpointSlice, Service, ServicePort
from mesh.model.derive import View
from mesh.model.grpcroute import GRPCBackendRef, GRPCRouteSpec
from mesh.model.httproute import HTTPBackendRef, HTTPRouteSpec
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import ClusterSection, Endpoint
from mesh.model.references import BackendObjectReference

Reference: TypeAlias = BackendObjectReference | HTTPBackendRef | GRPCBackendRef

_PROTOCOLS: dict[str, Literal["http", "h2c", "ws", "wss"]] = {
    "": "http",
    "http": "http",
    "https": "http",
    "kubernetes.io/h2c": "h2c",
    "kubernetes.io/ws": "ws",
    "kubernetes.io/wss": "wss",
    "grpc": "h2c",
}
_ENCRYPTED = ("https", "kubernetes.io/wss")
SERVICE_NAME_LABEL = "kubernetes.io/service-name"


def slice_service(key: ObjectKey, piece: EndpointSlice) -> Iterator[ObjectKey]:
    """The Service an EndpointSlice belongs to (for an index)."""
    name = piece.metadata.labels.get(SERVICE_NAME_LABEL)
    if name:
        yield ObjectKey(key.namespace, name)


def resolve(view: View, route: RouteKey, ref: Reference) -> ClusterRef | Problem:
    """The cluster that a route's reference means, or why it means none (ResolvedRefs' reasons)."""
    if ref.group or ref.kind != "Service":
        kind = f"{ref.group}/{ref.kind}" if ref.group else ref.kind
        return Problem("InvalidKind", f"backend {ref.name}: kind {kind} is not known; use Service")
    target = ObjectKey(ref.namespace or route.namespace, ref.name)
    if not (
        permitted(view, route.kind, route.namespace, "Service", target)
        or target.namespace in _consumed(view, route)
    ):
        message = not_permitted(route.kind, route.namespace, "Service", target)
        return Problem("RefNotPermitted", message)
    service: Service | None = view.get("Service", target)
    if service is None:
        return Problem("BackendNotFound", f"Service {target} does not exist")
    if service.spec.type == "ExternalName":
        return Problem(
            "UnsupportedValue",
            f"Service {target} is of type ExternalName, which is not safe to forward to"
            " (CVE-2021-25740); use a Service with EndpointSlices",
        )
    if ref.port is None:
        return Problem("BackendNotFound", f"reference to Service {target} names no port")
    port = _port(service, ref.port)
    if port is None:
        has = ", ".join(str(port.port) for port in service.spec.ports) or "none"
        return Problem("BackendNotFound", f"Service {target} has no port {ref.port} (it has {has})")
    if port.protocol != "TCP":
        return Problem(
            "UnsupportedProtocol", f"Service {target} port {ref.port} is {port.protocol}, not TCP"
        )
    protocol = app_protocol(port)
    if protocol not in _PROTOCOLS:
        return Problem(
            "UnsupportedProtocol",
            f"Service {target} port {ref.port}: appProtocol {port.app_protocol} is not supported",
        )
    if protocol in _ENCRYPTED and backend_tls.in_force(view, target, port) is None:
        return Problem(
            "UnsupportedProtocol",
            f"Service {target} port {ref.port}: appProtocol {port.app_protocol} needs a"
            " BackendTLSPolicy that says how to validate the backend",
        )
    return ClusterRef(target.namespace, target.name, ref.port, route.kind == "GRPCRoute")


def _consumed(view: View, key: RouteKey) -> frozenset[str]:
    """The namespaces whose Services a consumer route shapes the way to: it needs no grant to send
    there, for its clients could go there without it (GEP-1426, Namespace boundaries). A route that
    a Gateway serves as well would let others in."""
    spec: HTTPRouteSpec | GRPCRouteSpec = view.get("Route", key).spec
    refs = spec.parent_refs
    if spec.use_default_gateways == "All" or any(
        ref.kind != "Service" or ref.group for ref in refs
    ):
        return frozenset()
    return frozenset(ref.namespace for ref in refs if ref.namespace is not None)


def cluster(mesh: Mesh) -> Callable[[View, ClusterRef], ClusterSection | None]:
    def compute(view: View, ref: ClusterRef) -> ClusterSection | None:
        """The section of a cluster that some route uses."""
        service: Service | None = view.get("Service", ref.service)
        port = _port(service, ref.port) if service is not None else None
        if port is None:
            return None
        protocol = _PROTOCOLS.get(app_protocol(port), "http")
        if ref.grpc and protocol == "http":
            protocol = "h2c"
        return ClusterSection(
            endpoints=endpoints(view, mesh, ref.service, port),
            protocol=protocol,
            tls=backend_tls.upstream_tls(view, ref.service, port),
        )

    return compute


def endpoints(
    view: View, mesh: Mesh, key: ObjectKey, port: ServicePort, family: str | None = None
) -> tuple[Endpoint, ...]:
    """The ready endpoints of a Service port, in order: those of one address family, or of all; then
    a pod with an address in each stands once, with its IPv4 address. Of a Service whose
    internalTrafficPolicy is Local only those of this node, if its name is known."""
    service: Service | None = view.get("Service", key)
    local = service is not None and service.spec.internal_traffic_policy == "Local"
    slices = sorted(
        ((view.get("EndpointSlice", key), key) for key in view.bucket("slices_of", key)),
        key=lambda found: (found[0].address_type, found[1]),
    )
    pods: dict[str, str] = {}  # pod: the family it stands with
    result: dict[tuple[str, int], Endpoint] = {}
    for piece, _ in slices:
        if piece.address_type == "FQDN" or (family and piece.address_type != family):
            continue
        for number in numbers(piece, port):
            for endpoint in piece.endpoints:
                conditions = endpoint.conditions
                if conditions.ready is False or conditions.terminating or not endpoint.addresses:
                    continue
                if local and mesh.node and endpoint.node_name != mesh.node:
                    continue
                pod = (endpoint.target_ref.name if endpoint.target_ref else None) or ""
                if pod and pods.setdefault(pod, piece.address_type) != piece.address_type:
                    continue
                # The API allows several addresses and says that only the first counts.
                address = canonical(endpoint.addresses[0])
                result[address, number] = Endpoint(address, number, pod)
    return tuple(sorted(result.values(), key=lambda e: (e.address, e.port)))


def numbers(piece: EndpointSlice, port: ServicePort) -> Iterator[int]:
    """The port numbers of a slice that stand for a Service port: those of the same name. A slice
    port without a number is every port, so the target port, or the Service's own, is meant."""
    for candidate in piece.ports:
        if candidate.name == port.name and candidate.protocol == port.protocol:
            if candidate.port is not None:
                yield candidate.port
            else:
                yield port.target_port if isinstance(port.target_port, int) else port.port


def _port(service: Service, number: int) -> ServicePort | None:
    """The port of a Service by its number; TCP before others that share the number."""
    matching = [port for port in service.spec.ports if port.port == number]
    return min(matching, key=lambda port: port.protocol != "TCP", default=None)
