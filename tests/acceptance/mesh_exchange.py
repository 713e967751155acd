"""Requests of the mesh cases: what a case leaves open is what follows from who asks for what, and
more is compared than the suite does: path, host, namespace, where redirects go, and that the
backend sees no header that nobody sent or asked for."""

from __future__ import annotations

import json
from typing import Any

from acceptance.client import Request, Response
from acceptance.exchange import Mismatch, compare, seen_by_backend

Json = dict[str, Any]
# Of one connection only (RFC 9110, section 7.6.1).
_HOP_BY_HOP = {"connection", "content-length"}


def split_host(host: str) -> tuple[str, int]:
    """Name or address, and port, of an authority."""
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        name, port = host, "80"
    return name.removeprefix("[").removesuffix("]"), int(port)


def completed(case: Json, namespace: str) -> Json:
    """The case with everything in it that a request from a pod of this namespace implies. Its
    `Request` is what is sent; `To` is the authority to connect to."""
    case = json.loads(json.dumps(case))
    request = case["Request"]
    request.setdefault("Path", "/")
    request.setdefault("Method", "GET")
    case["To"] = request.get("Host") or "echo"
    # Echo's client sends a Host header if it is told one.
    request["Host"] = request.get("Headers", {}).pop("Host", case["To"])
    _, _, named = split_host(case["To"])[0].partition(".")
    case.setdefault("Namespace", named.partition(".")[0] or namespace)
    expected = case.setdefault("ExpectedRequest", {"Request": {}})["Request"]
    for field in ("Path", "Method", "Host"):
        expected.setdefault(field, request[field])
    if not expected.get("Headers"):
        absent = {name.lower() for name in case["ExpectedRequest"].get("AbsentHeaders", ())}
        sent = request.get("Headers", {}).items()
        expected["Headers"] = {name: value for name, value in sent if name.lower() not in absent}
    return case


def to_mesh_request(case: Json, family: int) -> Request:
    """Of a completed case."""
    address, port = split_host(case["To"])
    wanted = case["Request"]
    return Request(
        address=address,
        port=port,
        method=wanted["Method"],
        target=wanted["Path"],
        host=wanted["Host"],
        headers=tuple(wanted.get("Headers", {}).items()),
        family=family,
    )


def compare_mesh(case: Json, request: Request, response: Response) -> None:
    """Mismatch: the response, or what the backend saw, is not what the completed case expects."""
    compare(case, request, response)
    if response.status != 200:
        return
    sent = [name for name, _ in request.headers]
    known = {name.lower() for name in (*sent, *case["ExpectedRequest"]["Request"]["Headers"])}
    seen = {name.lower() for name in seen_by_backend(response, request.method).get("headers", {})}
    if added := seen - known - _HOP_BY_HOP:
        raise Mismatch(f"the backend saw {', '.join(sorted(added))}, which nobody asked for")
