"""Annotations that Weft reads on routes and Pods, and what is wrong with their values."""

from __future__ import annotations

from mesh.model.grpcroute import GRPCRoute
from mesh.model.httproute import HTTPRoute
from mesh.model.pod import Pod

# Requests of a mesh route tell the backend the client's address and identity.
CLIENT_HEADERS = "weft.dev/client-headers"
# The sockets of a pod are kept off the redirect path.
SOCKMAP = "weft.dev/sockmap"


def client_headers(route: HTTPRoute | GRPCRoute) -> bool:
    """No, unless it says yes: headers name who the client is."""
    return route.metadata.annotations.get(CLIENT_HEADERS) == "true"


def may_use_sockmap(pod: Pod) -> bool:
    """A value that is none is taken for the wish to be left alone."""
    return pod.metadata.annotations.get(SOCKMAP, "enabled") == "enabled"


def misused(obj: object) -> str | None:
    """What is wrong with the annotations of a route or Pod, and what is done meanwhile."""
    if isinstance(obj, HTTPRoute | GRPCRoute):
        return _wrong(obj, CLIENT_HEADERS, ("true", "false"), "the client is not told to backends")
    if isinstance(obj, Pod):
        return _wrong(obj, SOCKMAP, ("enabled", "disabled"), "sockmap is not used for this pod")
    return None


def _wrong(
    obj: HTTPRoute | GRPCRoute | Pod, name: str, values: tuple[str, str], meanwhile: str
) -> str | None:
    value = obj.metadata.annotations.get(name, values[0])
    if value in values:
        return None
    return (
        f"annotation {name} is {value[:100]!r}, not {' or '.join(map(repr, values))};"
        f" until that is mended, {meanwhile}"
    )
