"""Services as parents of mesh routes: which ports routes attach to, and the ServiceSections that
follow (GEP-1426, GEP-1324).

A route of the Service's own namespace is a producer route, for all clients; one of another
namespace a consumer route, for clients of that namespace alone, who then get no producer routes.
Hostnames of routes say nothing here. Knows routes as what is attached, no rules and no filters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from gateway.backends import endpoints
from gateway.cluster_ips import ClusterIPs
from gateway.conditions import Problem
from gateway.declared import Speaks, speaks
from gateway.keys import ClusterRef, MeshListener, ServicePortKey, mesh_listener
from gateway.node import Mesh
from mesh.model.core import Service
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import MESH_HTTP_PORT, ServiceSection
from mesh.model.references import ParentReference
from mesh.model.routeconfig import Attachment
from mesh.model.section import SectionKey, entry_key, port_key


class Door(NamedTuple):
    """A TCP port of a Service, as mesh routes see it. `addresses`: cluster IPs under which the
    proxy is asked for it; `http`: by what the port declares, it goes to the proxy in any case."""

    number: int
    name: str
    speaks: Speaks
    addresses: tuple[str, ...]
    http: bool
    cluster: ClusterRef


class Doors(NamedTuple):
    """The TCP ports of a Service. `problem`: why no route can be attached to any; `others`: its
    ports of other protocols."""

    doors: tuple[Door, ...]
    problem: Problem | None
    others: tuple[int, ...] = ()


class MeshService(NamedTuple):
    """A Service port whose requests the proxy routes."""

    section: ServiceSection
    cluster: ClusterRef


def doors(mesh: Mesh) -> Callable[[View, ObjectKey], Doors | None]:
    def compute(view: View, key: ObjectKey) -> Doors | None:
        if not mesh.on:
            return None
        service: Service = view.get("Service", key)
        found: ClusterIPs | None = view.get("cluster_ips", key)
        problem = _closed(mesh, key, service, found)
        if problem is not None or found is None:
            return Doors((), problem)
        addresses = mesh.serves(found.addresses)
        # The proxy knows no client affinity, so without a route the kernel goes on balancing.
        plain = service.spec.session_affinity == "ClientIP"
        doors: list[Door] = []
        for port in service.spec.ports:
            if port.protocol == "TCP":
                said = speaks(port)
                # What only the name tells, the cluster would not know.
                grpc = said == "http2" and not port.app_protocol
                ref = ClusterRef(*key, port.port, grpc)
                http = said in ("http1", "http2") and not plain
                doors.append(Door(port.port, port.name, said, addresses, http, ref))
        others = tuple(port.port for port in service.spec.ports if port.protocol != "TCP")
        return Doors(tuple(doors), None, others)

    return compute


def _closed(
    mesh: Mesh, key: ObjectKey, service: Service, found: ClusterIPs | None
) -> Problem | None:
    if service.spec.type == "ExternalName":
        message = f"Service {key} is of type ExternalName, which has no traffic of its own to route"
        return Problem("UnsupportedValue", message)
    if service.spec.cluster_ip == "None":
        message = (
            f"Service {key} is headless: clients ask for its pods, and requests to those are not"
            " routed; use a Service with a cluster IP"
        )
        return Problem("UnsupportedValue", message)
    if found is None:
        return Problem("Pending", f"Service {key} has no cluster IP yet")
    if not found.addresses:
        return Problem("UnsupportedValue", f"Service {key}: {'; '.join(found.refused)}")
    if not mesh.serves(found.addresses):
        message = (
            f"Service {key} has cluster IP {', '.join(found.addresses)}, and the mesh of this node"
            f" has no address of that family ({', '.join(mesh.addresses)}); add a --mesh-address"
        )
        return Problem("UnsupportedValue", message)
    return None


def http_ports(key: ObjectKey, found: Doors) -> Iterator[ServicePortKey]:
    """The ports of a Service to which routes may be attached (for an index)."""
    for door in found.doors:
        if door.speaks != "other":
            yield ServicePortKey(*key, door.number)


def listener_port(listener: MeshListener, _: object) -> Iterator[ServicePortKey]:
    """The Service port that mesh routes are attached to (for an index)."""
    yield listener.port


def services(mesh: Mesh) -> Callable[[View, ServicePortKey], MeshService | None]:
    """None: the port declares nothing, no route is attached to it, no policy asks of requests."""

    def compute(view: View, key: ServicePortKey) -> MeshService | None:
        found: Doors = view.get("service_doors", key.service)
        door = next(one for one in found.doors if one.number == key.port)
        attached: list[MeshListener] = sorted(
            view.bucket("listeners_of_service", key), key=lambda one: one.consumer or ""
        )
        if not door.http and not attached and not _judged(view, mesh, key):
            return None
        section = ServiceSection(
            namespace=key.namespace,
            name=key.name,
            port=key.port,
            addresses=door.addresses,
            cluster=door.cluster.section,
            producers=any(one.consumer is None for one in attached),
            consumers=tuple(one.consumer for one in attached if one.consumer is not None),
        )
        return MeshService(section, door.cluster)

    return compute


def _judged(view: View, mesh: Mesh, key: ServicePortKey) -> bool:
    """Whether policies have rules about the requests to one of its endpoints."""
    service: Service = view.get("Service", key.service)
    ports = (port for port in service.spec.ports if (port.port, port.protocol) == (key.port, "TCP"))
    return any(
        view.bucket("judged_at", (one.address, one.port))
        for port in ports
        for one in endpoints(view, mesh, key.service, port)
    )


def own_clusters(key: ServicePortKey, service: MeshService) -> Iterator[ClusterRef]:
    """The cluster of a Service's own endpoints (for an index)."""
    yield service.cluster


def section(view: View, key: ServicePortKey) -> ServiceSection:
    service: MeshService = view.get("services", key)
    return service.section


# --- routes --------------------------------------------------------------------------------------


def attach(
    view: View, mesh: Mesh, namespace: str, ref: ParentReference, target: ObjectKey
) -> tuple[tuple[Attachment, ...], Problem | None]:
    """What a route of `namespace` is attached to by a reference to a Service, or why to nothing."""
    if not mesh.on:
        message = (
            f"parentRef to Service {target}: there is no mesh on this node, so nothing would route"
            " requests to it; start Weft with --steer CGROUP (weft validate: with --mesh-address)"
        )
        return (), Problem("UnsupportedValue", message)
    found: Doors | None = view.get("service_doors", target)
    if found is None:
        return (), Problem("NoMatchingParent", f"Service {target} does not exist")
    if found.problem is not None:
        return (), found.problem
    selected = [
        door
        for door in found.doors
        if ref.section_name in (None, door.name) and ref.port in (None, door.number)
    ]
    if not selected:
        return (), Problem("NoMatchingParent", _no_such_port(ref, target, found))
    # A reference to the whole Service is one to all its ports; those that say that they speak
    # something else would only be broken by it.
    open_doors = [door for door in selected if door.speaks != "other"]
    if not open_doors:
        return (), _refusal(target, selected[0])
    consumer = None if namespace == target.namespace else namespace
    ports = (ServicePortKey(*target, door.number) for door in open_doors)
    return tuple(Attachment(MeshListener(port, consumer).id, ("*",)) for port in ports), None


def _no_such_port(ref: ParentReference, target: ObjectKey, found: Doors) -> str:
    wish = " ".join(
        f"{what} {value}"
        for what, value in (("named", ref.section_name), ("number", ref.port))
        if value is not None
    )
    has = ", ".join(
        f"{one.number} ({one.name})" if one.name else str(one.number) for one in found.doors
    )
    if ref.port in found.others:
        return f"Service {target} port {ref.port} is not TCP; only HTTP requests can be routed"
    return f"Service {target} has no TCP port {wish}".rstrip() + f" (it has {has or 'none'})"


def _refusal(target: ObjectKey, door: Door) -> Problem:
    message = (
        f"Service {target} port {door.number} declares by its appProtocol or its name"
        f" ({door.name}) that it does not speak HTTP; if it does, set appProtocol: http"
    )
    return Problem("UnsupportedValue", message)


class Trouble(NamedTuple):
    """Why requests are not routed although a route is attached. `pending`: it may still be well."""

    problem: Problem
    pending: bool


def trouble(view: View, mesh: Mesh, attachments: tuple[Attachment, ...]) -> Trouble | None:
    """What the data plane says of the Service ports that a route is attached to."""
    waiting: list[str] = []
    for attachment in attachments:
        listener = mesh_listener(attachment.listener)
        service: MeshService | None = view.get("services", listener.port) if listener else None
        if listener is None or service is None:
            continue
        addresses = service.section.addresses
        entries = (entry_key(address, listener.port.port, "TCP") for address in addresses)
        for key in (listener.port.section, *entries):
            if reason := view.get("refusals", key):
                message = f"the data plane refused {key}: {reason}"
                return Trouble(Problem("UnsupportedValue", message), pending=False)
        for port in dict.fromkeys((mesh.at(address), MESH_HTTP_PORT) for address in addresses):
            address, number = port
            where = f"port {number} of the mesh address {address}"
            if refusal := view.get("refusals", _port_section(port)):
                message = f"the data plane refused {where}: {refusal}"
                return Trouble(Problem("UnsupportedValue", message), pending=False)
            bound: str | None = view.get("binds", port)
            if bound:
                message = f"the proxy cannot listen on {where}: {bound}"
                return Trouble(Problem("PortUnavailable", message), pending=False)
            if bound is None:
                waiting.append(where)
    if not waiting:
        return None
    text = f"waiting for {', '.join(dict.fromkeys(waiting))} to be bound"
    return Trouble(Problem("Pending", text), pending=True)


def _port_section(port: tuple[str | None, int]) -> SectionKey:
    return port_key(port[0] or "", port[1])
