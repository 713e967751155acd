"""A request as somebody writes it on a command line: METHOD URL and headers, from outside or from a
pod; and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urlsplit

from l7proxy.explain import explain
from l7proxy.explain_mesh import explain_mesh
from l7proxy.explain_rules import Explanation
from mesh.model.nodeconfig import Section
from mesh.model.section import SectionKey


class TargetError(Exception):
    """Not a request; what is wrong and what to do."""


class Target(NamedTuple):
    """`host` is the authority as sent, `path` the request target (path and query), `server` and
    `port` what is connected to; `headers` without Host, names in lower case."""

    method: str
    scheme: str
    server: str
    host: str
    port: int
    path: str
    headers: tuple[tuple[str, str], ...]


def parse_target(method: str, url: str, headers: list[str]) -> Target:
    """A URL without a scheme is http. A Host header replaces the URL's host, as with curl."""
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError as error:
        raise TargetError(f"{url}: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TargetError(f"{url}: not a URL like http://host/path or https://host:8443/path")
    if not method.isalpha():
        raise TargetError(f"{method}: not an HTTP method like GET")
    host = parts.netloc.rpartition("@")[2]
    fields = []
    for header in headers:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise TargetError(f"-H {header!r}: not 'name: value'")
        if name.strip().lower() == "host":
            host = value.strip()
        else:
            fields.append((name.strip().lower(), value.strip()))
    path = parts.path or "/"
    return Target(
        method=method.upper(),
        scheme=parts.scheme,
        server=parts.hostname,
        host=host,
        port=port or (443 if parts.scheme == "https" else 80),
        path=f"{path}?{parts.query}" if parts.query else path,
        headers=tuple(fields),
    )


def parse_client(text: str) -> tuple[str, str]:
    """A pod as NAMESPACE/NAME, or NAME for one in namespace default."""
    namespace, slash, name = text.rpartition("/")
    if not name or "/" in namespace or (slash and not namespace):
        raise TargetError(f"{text!r}: not a pod; write NAMESPACE/NAME")
    return namespace or "default", name


def parse_service(text: str) -> tuple[str, str, int | None]:
    """A Service as NAME, NAMESPACE/NAME, either with :PORT: its namespace, name and port."""
    whole, colon, number = text.partition(":")
    namespace, slash, name = whole.rpartition("/")
    if (
        not name
        or "/" in namespace
        or (slash and not namespace)
        or (colon and not number.isdigit())
    ):
        raise TargetError(f"{text!r}: not a Service; write NAMESPACE/NAME or NAMESPACE/NAME:PORT")
    return namespace or "default", name, int(number) if colon else None


def explained(
    sections: Mapping[SectionKey, Section],
    target: Target,
    *,
    address: str | None = None,
    client: tuple[str, str] | None = None,
) -> Explanation:
    """What a request gets at a Gateway, or in the mesh if a pod is its client. `address` tells
    Gateways on the same port apart."""
    request = target._asdict()
    if client is not None:
        return explain_mesh(sections, client=client, **request)
    del request["server"]
    return explain(sections, address=address, **request)
