"""Requests of the cases: how a case becomes a request, and what its response must be.

Written after CompareRoundTrip of the suite (Gateway API v1.6.1), the parts of it that cases.json
uses; a field of a case that is not known here is an error, not ignored.
"""

from __future__ import annotations

import json
import uuid
from typing import Any
from urllib.parse import urlsplit

from echo import grpc

from acceptance.client import TLS, Request, Response

Json = dict[str, Any]
TIMEOUTS = (408, 504)


class Mismatch(Exception):
    """The exchange did not go as the case expects; the message says what differs."""


_CASE = {
    "Request",
    "ExpectedRequest",
    "Response",
    "RedirectRequest",
    "Backend",
    "Namespace",
    "MirroredTo",
    "BackendSetResponseHeaders",
    "$request_id",
}
_REQUEST = {"Method", "Host", "Path", "Headers", "Protocol", "SNI", "UnfollowRedirect"}
_RESPONSE = {"StatusCodes", "Headers", "AbsentHeaders"}
_EXPECTED = {"Request", "AbsentHeaders"}


def _only(obj: Json, known: set[str], where: str) -> None:
    if unknown := obj.keys() - known:
        raise Mismatch(f"the runner does not know {', '.join(sorted(unknown))} of {where}")


def check_known(case: Json) -> None:
    """Mismatch: the case asks for something that nothing here compares."""
    _only(case, _CASE, "a case")
    _only(case["Request"], _REQUEST, "a request")
    _only(case.get("Response", {}), _RESPONSE, "a response")
    expected = case.get("ExpectedRequest") or {}
    _only(expected, _EXPECTED, "an expected request")
    _only(expected.get("Request", {}), _REQUEST, "an expected request")


def with_request_id(case: Json) -> Json:
    """The case with a query parameter that no other request has, where it asks for one; the
    backend is expected to see it too."""
    if not case.get("$request_id"):
        return case
    mark = f"gateway-api-conformance-request-id={uuid.uuid4()}"
    result: Json = json.loads(json.dumps(case))
    for request in (result["Request"], (result.get("ExpectedRequest") or {}).get("Request")):
        if request:
            path = request["Path"]
            request["Path"] = f"{path}{'&' if '?' in path else '?'}{mark}"
    return result


def to_request(case: Json, address: str, port: int, tls: TLS | None) -> Request:
    wanted = case["Request"]
    # A port that the scheme implies is not part of the authority.
    default = 443 if tls else 80
    authority = address if port == default else f"{address}:{port}"
    set_by_backend = ",".join(
        f"{k}:{v}" for k, v in case.get("BackendSetResponseHeaders", {}).items()
    )
    return Request(
        address=address,
        port=port,
        method=wanted.get("Method", "GET"),
        target=wanted["Path"],
        host=wanted.get("Host") or authority,
        headers=(*wanted.get("Headers", {}).items(), ("X-Echo-Set-Header", set_by_backend)),
        protocol=wanted.get("Protocol") or "HTTP/1.1",
        tls=tls,
    )


def compare(case: Json, request: Request, response: Response) -> None:
    """Mismatch: the response, or what the backend saw, is not what the case expects."""
    expected = case.get("Response", {})
    statuses = expected.get("StatusCodes") or [200]
    if response.status in TIMEOUTS and any(status in TIMEOUTS for status in statuses):
        return
    if response.status not in statuses:
        raise Mismatch(f"status {response.status}, wanted {statuses}; body {response.body[:200]!r}")
    if response.status in (200, 204):
        _compare_backend(case, request, response)
        _compare_headers(expected, response)
    elif response.status in (301, 302, 303, 307, 308) and "RedirectRequest" in case:
        _compare_redirect(case["RedirectRequest"], request, response)


def seen_by_backend(response: Response, method: str) -> Json:
    """What the echo backend says; a response of something else is taken to have the method."""
    if response.header("content-type") != "application/json" or not response.body:
        return {"method": method}
    seen = json.loads(response.body)
    assert isinstance(seen, dict)
    return seen


def _compare_backend(case: Json, request: Request, response: Response) -> None:
    expectation = case.get("ExpectedRequest") or {"Request": case["Request"]}
    wanted = expectation["Request"]
    if request.method == "HEAD":
        raise Mismatch("a HEAD request brings no body to compare")
    seen = seen_by_backend(response, request.method)
    checks = [
        ("path", wanted.get("Path", ""), seen.get("path", "")),
        ("method", wanted.get("Method", "GET"), seen.get("method", "")),
        ("namespace", case.get("Namespace", ""), seen.get("namespace", "")),
    ]
    if wanted.get("Host"):
        checks.append(("host", wanted["Host"], seen.get("host", "")))
    # Without an ExpectedRequest the suite has the request's SNI seen by the backend.
    if wanted.get("SNI"):
        checks.append(("SNI", wanted["SNI"], seen.get("tls", {}).get("serverName", "")))
    for what, want, got in checks:
        if want != got:
            raise Mismatch(f"the backend saw {what} {got!r}, wanted {want!r}")
    if not seen.get("pod", "").startswith(case.get("Backend", "")):
        raise Mismatch(f"pod {seen.get('pod')!r} answered, wanted {case['Backend']!r}")
    headers = {name.lower(): ",".join(values) for name, values in seen.get("headers", {}).items()}
    for name, want in wanted.get("Headers", {}).items():
        if headers.get(name.lower()) != want:
            raise Mismatch(
                f"the backend saw {name}: {headers.get(name.lower())!r}, wanted {want!r}"
            )
    for name in expectation.get("AbsentHeaders", ()):
        if name.lower() in headers:
            raise Mismatch(f"the backend saw {name}: {headers[name.lower()]!r}, wanted none")


def _compare_headers(expected: Json, response: Response) -> None:
    for name, want in expected.get("Headers", {}).items():
        if response.header(name) != want:
            raise Mismatch(f"response header {name}: {response.header(name)!r}, wanted {want!r}")
    for name in expected.get("AbsentHeaders", ()):
        if response.header(name) is not None:
            raise Mismatch(f"response header {name}: {response.header(name)!r}, wanted none")


def _compare_redirect(wanted: Json, request: Request, response: Response) -> None:
    """Host, scheme and path default to the request's; an unset port to none or the scheme's."""
    location = response.header("location")
    if location is None:
        raise Mismatch("a redirect without Location")
    own_scheme = "https" if request.tls else "http"
    own_host = urlsplit(f"//{request.host}").hostname or ""
    target = urlsplit(location if "://" in location else f"{own_scheme}://{request.host}{location}")
    implied = {"http": "80", "https": "443"}.get(target.scheme, "")
    port = "" if target.port is None else str(target.port)
    ports = [wanted["Port"]] if wanted.get("Port") else ["", implied]
    for what, want, got in (
        ("host", [wanted.get("Host") or own_host], target.hostname),
        ("scheme", [wanted.get("Scheme") or own_scheme], target.scheme),
        ("path", [wanted.get("Path") or request.target.partition("?")[0]], target.path),
        ("port", ports, port),
    ):
        if got not in want:
            raise Mismatch(f"redirected to {location}: {what} {got!r}, wanted {want}")


# --- gRPC ----------------------------------------------------------------------------------------

_GRPC_CASE = {
    "Host",
    "EchoRequest",
    "EchoTwoRequest",
    "EchoThreeRequest",
    "RequestMetadata",
    "Response",
    "Backend",
    "Namespace",
}


def grpc_method(case: Json) -> str:
    _only(case, _GRPC_CASE, "a gRPC case")
    (kind,) = [name for name in case if name.endswith("Request") and name.startswith("Echo")]
    return f"/{grpc.SERVICE}/{kind.removesuffix('Request')}"


def to_grpc_request(case: Json, address: str, port: int) -> Request:
    metadata = case.get("RequestMetadata") or {}
    _only(metadata, {"Authority", "Metadata"}, "request metadata")
    return Request(
        address=address,
        port=port,
        method="POST",
        target=grpc_method(case),
        host=metadata.get("Authority") or f"{address}:{port}",
        headers=(
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *(metadata.get("Metadata") or {}).items(),
        ),
        body=grpc.frame(b""),
        protocol="H2C_PRIOR_KNOWLEDGE",
    )


def grpc_code(response: Response) -> int:
    """grpc-status, from trailers or a response of headers only; else what the HTTP status means."""
    values = response.trailers.get("grpc-status") or response.headers.get("grpc-status")
    if values:
        return int(values[0])
    return grpc.FROM_HTTP.get(response.status, grpc.UNKNOWN)


def compare_grpc(case: Json, response: Response) -> None:
    """Mismatch: code, method, namespace or pod is not what the case expects."""
    _only(case.get("Response") or {}, {"Code"}, "a gRPC response")
    code, wanted = grpc_code(response), (case.get("Response") or {}).get("Code", 0)
    if code != wanted:
        raise Mismatch(f"gRPC status {code} (HTTP {response.status}), wanted {wanted}")
    if code:
        return
    method, namespace, pod = grpc.seen_by(response.body)
    if method != grpc_method(case):
        raise Mismatch(f"the backend saw method {method}, wanted {grpc_method(case)}")
    if case.get("Namespace", "") not in ("", namespace):
        raise Mismatch(f"namespace {namespace!r} answered, wanted {case['Namespace']!r}")
    if not pod.startswith(case.get("Backend", "")):
        raise Mismatch(f"pod {pod!r} answered, wanted {case['Backend']!r}")
