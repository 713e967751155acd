"""What a Service port declares to speak: by appProtocol, or else by its name.

The names are those that service meshes agree on: "http", or "http-" and anything, and so on. A port
whose protocol nobody knows is left alone, unless a route is attached to it.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from mesh.model.core import ServicePort

# "": it declares nothing.
Speaks: TypeAlias = Literal["http1", "http2", "other", ""]

_APP_PROTOCOLS: dict[str, Speaks] = {
    "http": "http1",
    "kubernetes.io/ws": "http1",
    "kubernetes.io/h2c": "http2",
    "grpc": "http2",
}
_NAMES: dict[str, Speaks] = {
    "http": "http1",
    "http2": "http2",
    "grpc": "http2",
    "https": "other",
    "tls": "other",
    "tcp": "other",
    "mongo": "other",
    "mysql": "other",
    "redis": "other",
}


def app_protocol(port: ServicePort) -> str:
    """Names without a prefix are IANA's, which know no case (RFC 6335 §5.1). "": none."""
    name = port.app_protocol or ""
    return name if "/" in name else name.lower()


def speaks(port: ServicePort) -> Speaks:
    if protocol := app_protocol(port):
        return _APP_PROTOCOLS.get(protocol, "other")
    return _NAMES.get(port.name.partition("-")[0], "")
