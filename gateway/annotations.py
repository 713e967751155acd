"""Annotations that Weft reads on Namespaces, Pods and routes, and what is wrong with their values.

What only widens what is done takes a wrong value for "no"; what protects fails closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias, get_args

from mesh.model.core import Namespace
from mesh.model.grpcroute import GRPCRoute
from mesh.model.httproute import HTTPRoute
from mesh.model.nodeconfig import MtlsMode
from mesh.model.pod import Pod

Annotated: TypeAlias = Namespace | Pod | HTTPRoute | GRPCRoute

# Requests of a mesh route tell the backend the client's address and identity.
CLIENT_HEADERS = "weft.dev/client-headers"
# The sockets of a pod are kept off the redirect path.
SOCKMAP = "weft.dev/sockmap"
# How workloads take connections of other nodes: all ports of a namespace or pod, and single ports
# of a pod ("8080=DISABLE, 9090=STRICT"); the narrower stands above the wider.
MTLS = "weft.dev/mtls"
MTLS_PORTS = "weft.dev/mtls-ports"

_MODES: tuple[MtlsMode, ...] = get_args(MtlsMode)


def client_headers(route: HTTPRoute | GRPCRoute) -> bool:
    """No, unless it says yes: headers name who the client is."""
    return route.metadata.annotations.get(CLIENT_HEADERS) == "true"


def may_use_sockmap(pod: Pod) -> bool:
    """A value that is none is taken for the wish to be left alone."""
    return pod.metadata.annotations.get(SOCKMAP, "enabled") == "enabled"


def mtls(obj: Namespace | Pod) -> MtlsMode | None:
    """The mode that is asked for; STRICT if the value is none. None: nothing is said."""
    value = obj.metadata.annotations.get(MTLS)
    return None if value is None else next((mode for mode in _MODES if mode == value), "STRICT")


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


def misused(obj: Annotated) -> Iterator[str]:
    """What is wrong with an object's annotations, and what is done meanwhile."""
    if isinstance(obj, HTTPRoute | GRPCRoute):
        yield from _wrong(
            obj, CLIENT_HEADERS, ("true", "false"), "the client is not told to backends"
        )
        return
    if isinstance(obj, Pod):
        yield from _wrong(obj, SOCKMAP, ("enabled", "disabled"), "sockmap is not used for this pod")
    who = "this pod" if isinstance(obj, Pod) else "the pods of this namespace"
    yield from _wrong(obj, MTLS, _MODES, f"{who} must be connected to by mutual TLS (STRICT)")
    if isinstance(obj, Pod) and mtls_ports(obj) is None:
        value = obj.metadata.annotations[MTLS_PORTS]
        yield (
            f"annotation {MTLS_PORTS} is {value[:100]!r}, not PORT=MODE after a comma each, as in"
            f" '8080=DISABLE, 9090=STRICT' (modes: {', '.join(_MODES)}; a port stands once); until"
            " that is mended, this pod must be connected to by mutual TLS (STRICT)"
        )


def _wrong(obj: Annotated, name: str, values: tuple[str, ...], meanwhile: str) -> Iterator[str]:
    value = obj.metadata.annotations.get(name, values[0])
    if value not in values:
        yield (
            f"annotation {name} is {value[:100]!r}, not {' or '.join(map(repr, values))};"
            f" until that is mended, {meanwhile}"
        )
