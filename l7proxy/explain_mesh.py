"""Where a request of a workload would go, and why not elsewhere, for `weft explain --from`.

As the data path does it: names become addresses as in the cluster's DNS, the load-balancer entry of
address and port says whether the connection comes to the proxy, and there the Service's routes
count, those of the client's namespace before the Service's own (see l7proxy.mesh). Nothing is sent
anywhere.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from l7proxy import forwarding
from l7proxy.explain_automaton import kernel_words
from l7proxy.explain_rules import (
    ExplainedBackend,
    Explanation,
    answer,
    attached_routes,
    candidates,
    explain_backend,
    head_of,
    settings_of,
)
from l7proxy.message import ProtocolError, RequestHead
from l7proxy.streams import ConnectionInfo
from mesh.model.nodeconfig import LoadBalancerEntry, Section, ServiceSection, WorkloadSection
from mesh.model.routeconfig import WeightedBackend
from mesh.model.section import SectionKey, entry_key, service_listener, workload_key

_SUFFIXES = (".svc.cluster.local", ".svc")


def explain_mesh(
    sections: Mapping[SectionKey, Section],
    *,
    client: tuple[str, str],
    server: str,
    method: str,
    scheme: str,
    host: str,
    port: int,
    path: str,
    headers: Sequence[tuple[str, str]],
) -> Explanation:
    """Explain one request of the pod `client` (namespace, name) to `server`, a Service's name as
    pods know it or an address; the rest is as in l7proxy.explain."""
    workload = sections.get(workload_key(*client))
    if not isinstance(workload, WorkloadSection):
        return Explanation(detail=f"there is no pod {'/'.join(client)} with an address")
    entry = _entry(sections, workload.namespace, server, port)
    if isinstance(entry, str):
        return Explanation(detail=entry)
    service = _service(sections, entry)
    base = Explanation(service=_label(entry, service))
    if entry.source.startswith("Gateway/"):
        return Explanation(detail=f"{entry.source} listens there; ask without a client")
    if not entry.http:
        way = "the kernel connects to a backend: the port declares no HTTP and has no route"
        return msgspec.structs.replace(base, way=way, backends=tuple(_straight(sections, entry)))
    if scheme == "https":
        detail = "the port speaks HTTP in plain text; the proxy cannot read TLS there"
        return msgspec.structs.replace(base, status=400, detail=detail)
    try:
        head = head_of(method, scheme, host, path, headers, settings_of(sections))
    except ProtocolError as error:
        return msgspec.structs.replace(base, status=error.status, detail=error.detail)
    forwarding.pass_on(head, ConnectionInfo((workload.addresses[0], 0), (entry.address, port)))
    if service is None:
        way = "a pod is asked for itself: no routes count"
        return msgspec.structs.replace(base, way=way, backends=tuple(_straight(sections, entry)))
    fields = "".join(f"{name}: {value}\r\n" for name, value in (("host", host), *headers))
    raw = f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode()
    return _routed(sections, service, workload.namespace, head, raw, base)


class _Place(NamedTuple):
    """Where the client believes to be connected."""

    port: int


def _routed(
    sections: Mapping[SectionKey, Section],
    service: ServiceSection,
    client: str,
    head: RequestHead,
    raw: bytes,
    base: Explanation,
) -> Explanation:
    own = (service.namespace, service.name, service.port)
    producers = service_listener(*own)
    listeners = {producers: _not_producers(service, client)} if service.producers else {}
    for consumer in service.consumers:
        elsewhere = "" if consumer == client else f"it is for clients of namespace {consumer}"
        listeners[service_listener(*own, consumer)] = elsewhere
    selected = next((id for id, elsewhere in listeners.items() if not elsewhere), None)
    routes, refused = attached_routes(sections, listeners.keys())
    found = routes.match(selected, head) if selected is not None else None
    others = (*refused, *candidates(listeners, routes, head, found))
    base = msgspec.structs.replace(base, candidates=others)
    if selected is None:
        backend = explain_backend(sections, WeightedBackend(service.cluster), 1)
        way = "no route is attached that counts for this client: the Service's own endpoints"
        kernel = kernel_words(sections, service, "", None, raw)
        return msgspec.structs.replace(base, way=way, kernel=kernel, backends=(backend,))
    kind = "producer routes, of the Service's namespace"
    if selected != producers:
        kind = f"consumer routes of namespace {client}"
    base = msgspec.structs.replace(base, way=kind, listener=selected)
    if found is None:
        return msgspec.structs.replace(base, status=404, detail="no route matches")
    kernel = kernel_words(sections, service, selected, found, raw)
    base = msgspec.structs.replace(base, kernel=kernel)
    return answer(sections, found, head, _Place(service.port), base)


def _not_producers(service: ServiceSection, client: str) -> str:
    if client not in service.consumers:
        return ""
    return f"namespace {client} has routes of its own to this Service, which come instead"


def _entry(
    sections: Mapping[SectionKey, Section], namespace: str, server: str, port: int
) -> LoadBalancerEntry | str:
    """The frontend that is connected to, or why none is."""
    try:
        address = str(ipaddress.ip_address(server))
    except ValueError:
        return _named(sections, namespace, server, port)
    found = sections.get(entry_key(address, port, "TCP"))
    if isinstance(found, LoadBalancerEntry):
        return found
    return f"nothing is known of {address} port {port}: the connection goes there as it is"


def _named(
    sections: Mapping[SectionKey, Section], namespace: str, server: str, port: int
) -> LoadBalancerEntry | str:
    name = server.removesuffix(".")
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    name, _, other = name.partition(".")
    source = f"Service/{other or namespace}/{name}"
    found = [
        one
        for one in sections.values()
        if isinstance(one, LoadBalancerEntry) and one.source == source and one.protocol == "TCP"
    ]
    if not found:
        return f"{server} names no Service with a cluster IP for a pod of namespace {namespace}"
    # Clients may take either family's; all of a Service's addresses are routed alike.
    found.sort(key=lambda one: (one.port, ":" in one.address, one.address))
    has = ", ".join(str(number) for number in dict.fromkeys(one.port for one in found))
    missing = f"{source} has no TCP port {port} (it has {has})"
    return next((one for one in found if one.port == port), missing)


def _service(
    sections: Mapping[SectionKey, Section], entry: LoadBalancerEntry
) -> ServiceSection | None:
    """The Service port whose cluster IP a frontend is."""
    return next(
        (
            one
            for one in sections.values()
            if isinstance(one, ServiceSection)
            and one.port == entry.port
            and entry.address in one.addresses
        ),
        None,
    )


def _label(entry: LoadBalancerEntry, service: ServiceSection | None) -> str:
    if service is not None:
        return f"{service.namespace}/{service.name}:{service.port}"
    return f"{entry.source}:{entry.port}"


def _straight(
    sections: Mapping[SectionKey, Section], entry: LoadBalancerEntry
) -> Iterator[ExplainedBackend]:
    """What the kernel chooses from, by weight."""
    total = sum(one.weight for one in entry.backends)
    endpoints = tuple(f"{one.address}:{one.port}" for one in entry.backends if one.weight)
    note = "" if endpoints else "connections are refused: no ready endpoints"
    yield ExplainedBackend(entry.source, total, 1.0, endpoints, (), note)
