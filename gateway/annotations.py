"""Annotations and labels that Weft reads on GatewayClasses, Namespaces, Pods and routes, and what
is wrong with their values.

What only widens what is done takes a wrong value for "no"; what protects fails closed.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import get_args

from mesh.model.core import Namespace
from mesh.model.gatewayclass import GatewayClass
from mesh.model.grpcroute import GRPCRoute
from mesh.model.httproute import HTTPRoute
from mesh.model.nodeconfig import MtlsMode
from mesh.model.pod import Pod

# All of them begin so.
PREFIX = "weft.dev/"

# Requests of a mesh route, or to a pod, tell the backend the client's address and identity.
CLIENT_HEADERS = "weft.dev/client-headers"
# The sockets of a pod are kept off the redirect path.
SOCKMAP = "weft.dev/sockmap"
# How workloads take connections of other nodes: all ports of a namespace or pod, and single ports
# of a pod ("8080=DISABLE, 9090=STRICT"); the narrower stands above the wider.
MTLS = "weft.dev/mtls"
MTLS_PORTS = "weft.dev/mtls-ports"

# Of a GatewayClass: the addresses that its Gateways get, as with --address-pool, which it replaces
# ("192.0.2.0/28, fd00::/120").
ADDRESS_POOL = "weft.dev/address-pool"

# A label: whether pods are in the mesh; a pod's stands above its namespace's.
MESH = "weft.dev/mesh"
# Namespaces that are not, unless they say so: what a cluster itself needs to come up.
APART = ("kube-system",)

_MODES: tuple[MtlsMode, ...] = get_args(MtlsMode)


def client_headers(obj: HTTPRoute | GRPCRoute | Pod) -> bool:
    """No, unless it says yes: headers name who the client is."""
    return obj.metadata.annotations.get(CLIENT_HEADERS) == "true"


def may_use_sockmap(pod: Pod) -> bool:
    """A value that is none is taken for the wish to be left alone."""
    return pod.metadata.annotations.get(SOCKMAP, "enabled") == "enabled"


def mtls(obj: Namespace | Pod) -> MtlsMode | None:
    """The mode that is asked for; STRICT if the value is none. None: nothing is said."""
    value = obj.metadata.annotations.get(MTLS)
    return None if value is None else next((mode for mode in _MODES if mode == value), "STRICT")


def meshed(obj: Namespace | Pod) -> bool | None:
    """None: nothing is said, or nothing that counts."""
    return {"enabled": True, "disabled": False}.get(obj.metadata.labels.get(MESH, ""))


def address_pool(gateway_class: GatewayClass) -> tuple[str, ...]:
    """CIDRs and addresses; none: nothing is said. ValueError: one of them is none."""
    value = gateway_class.metadata.annotations.get(ADDRESS_POOL, "")
    parts = (part.strip() for part in value.split(",") if part.strip())
    return tuple(str(ipaddress.ip_network(part)) for part in parts)


def mtls_ports(pod: Pod) -> dict[int, MtlsMode] | None:
    """The modes of single ports. None: the value is none, and all ports must be STRICT."""
    value = pod.metadata.annotations.get(MTLS_PORTS, "")
    result: dict[int, MtlsMode] = {}
    for item in value.split(",") if value.strip() else ():
        number, _, asked = (part.strip() for part in item.partition("="))
        mode = next((mode for mode in _MODES if mode == asked), None)
        port = int(number) if number.isascii() and number.isdigit() and len(number) < 6 else 0
        if mode is None or not 1 <= port <= 65535 or result.setdefault(port, mode) != mode:
            return None
    return result


def misused(obj: Namespace | Pod | HTTPRoute | GRPCRoute) -> Iterator[str]:
    """What is wrong with an object's annotations and labels but for mutual TLS, and what is done
    meanwhile."""
    if not isinstance(obj, Namespace):
        value = obj.metadata.annotations.get(CLIENT_HEADERS)
        meanwhile = "the client is not told to backends"
        yield from _wrong(f"annotation {CLIENT_HEADERS}", value, ("true", "false"), meanwhile)
    if isinstance(obj, HTTPRoute | GRPCRoute):
        return
    value = obj.metadata.labels.get(MESH)
    yield from _wrong(f"label {MESH}", value, ("enabled", "disabled"), "it does not count")
    if isinstance(obj, Pod):
        value = obj.metadata.annotations.get(SOCKMAP)
        meanwhile = "sockmap is not used for this pod"
        yield from _wrong(f"annotation {SOCKMAP}", value, ("enabled", "disabled"), meanwhile)


def misused_mtls(obj: Namespace | Pod) -> Iterator[str]:
    """The same of the annotations about mutual TLS."""
    who = "this pod" if isinstance(obj, Pod) else "the pods of this namespace"
    meanwhile = f"{who} must be connected to by mutual TLS (STRICT)"
    yield from _wrong(f"annotation {MTLS}", obj.metadata.annotations.get(MTLS), _MODES, meanwhile)
    if isinstance(obj, Pod) and mtls_ports(obj) is None:
        value = obj.metadata.annotations[MTLS_PORTS]
        yield (
            f"annotation {MTLS_PORTS} is {value[:100]!r}, not PORT=MODE after a comma each, as in"
            f" '8080=DISABLE, 9090=STRICT' (modes: {', '.join(_MODES)}; a port stands once); until"
            f" that is mended, {meanwhile}"
        )


def _wrong(what: str, value: str | None, values: tuple[str, ...], meanwhile: str) -> Iterator[str]:
    if value is not None and value not in values:
        yield (
            f"{what} is {value[:100]!r}, not {' or '.join(map(repr, values))};"
            f" until that is mended, {meanwhile}"
        )
