"""Cross-origin requests: HTTPCORSFilter by the Fetch standard (§3.3 CORS protocol).

The filter owns a rule's CORS headers: what a backend says of itself in them is replaced, so that a
browser never sees two answers. No I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from l7proxy.field_rules import Refused, check_name
from l7proxy.message import Framing, RequestHead, ResponseHead
from mesh.model.routeconfig import Cors

_ORIGIN = re.compile(rb"(https?)://([0-9a-z._*-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_DEFAULT_PORT = {b"http": 80, b"https": 443}
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_OWNED = frozenset(
    (
        b"access-control-allow-origin",
        b"access-control-allow-credentials",
        b"access-control-expose-headers",
        b"access-control-allow-methods",
        b"access-control-allow-headers",
        b"access-control-max-age",
    )
)


class _Origin(NamedTuple):
    """`host` begins with "*" where it is a pattern."""

    scheme: bytes
    host: bytes
    port: int


@dataclass(frozen=True, slots=True)
class CompiledCors:
    """`any_origin`: allowOrigins is "*". Lists as header values, b"" if not configured."""

    any_origin: bool
    origins: frozenset[_Origin]
    patterns: tuple[_Origin, ...]
    credentials: bool
    methods: bytes
    headers: bytes
    expose: bytes
    max_age: bytes

    def allows(self, origin: bytes) -> bool:
        """Whether the response may be shared with `origin`, the request's Origin value."""
        if self.any_origin:
            return True
        asked = _parse(origin.lower())
        if asked is None or b"*" in asked.host:
            return False
        return asked in self.origins or any(
            asked.scheme == pattern.scheme
            and asked.port == pattern.port
            and len(asked.host) >= len(pattern.host)
            and asked.host.endswith(pattern.host[1:])
            for pattern in self.patterns
        )


def compile_cors(cors: Cors, where: str) -> CompiledCors:
    parsed: list[_Origin] = []
    for i, origin in enumerate(cors.allow_origins):
        if origin == "*":
            continue
        one = _parse(origin.lower().encode())
        if one is None or b"*" in one.host[1:]:
            raise Refused(f"{where}.allowOrigins[{i}]: {origin!r} is not an origin")
        parsed.append(one)
    return CompiledCors(
        any_origin="*" in cors.allow_origins,
        origins=frozenset(one for one in parsed if not one.host.startswith(b"*")),
        patterns=tuple(one for one in parsed if one.host.startswith(b"*")),
        credentials=cors.allow_credentials,
        methods=_list(cors.allow_methods, f"{where}.allowMethods"),
        headers=_list(cors.allow_headers, f"{where}.allowHeaders"),
        expose=_list(cors.expose_headers, f"{where}.exposeHeaders"),
        max_age=b"%d" % cors.max_age_s,
    )


def _parse(origin: bytes) -> _Origin | None:
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        return None
    scheme, host, port = found.groups()
    number = int(port) if port else _DEFAULT_PORT[scheme]
    return _Origin(scheme, host, number) if 0 < number < 65536 else None


def _list(names: tuple[str, ...], where: str) -> bytes:
    for i, name in enumerate(names):
        check_name(name, f"{where}[{i}]")
    return b"*" if "*" in names else ", ".join(names).encode()


def preflight(cors: CompiledCors, head: RequestHead) -> ResponseHead | None:
    """The answer to a CORS-preflight request (OPTIONS with Origin and
    Access-Control-Request-Method), None for any other request.

    An origin that is not allowed gets 204 without CORS headers: the browser stops there.
    """
    if head.method != b"OPTIONS":
        return None
    origin = _value(head, b"origin")
    method = _value(head, b"access-control-request-method")
    if origin is None or method is None:
        return None
    answer = ResponseHead(204, [], Framing.NONE)
    add = answer.headers.append
    add(
        (
            b"vary",
            b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
        )
    )
    if not cors.allows(origin):
        return answer
    add((b"access-control-allow-origin", _allow_origin(cors, origin)))
    if cors.credentials:
        add((b"access-control-allow-credentials", b"true"))
    methods = cors.methods
    if methods == b"*" and cors.credentials:
        methods = method if _TOKEN.fullmatch(method) else b""
    if methods:
        add((b"access-control-allow-methods", methods))
    headers = cors.headers
    if headers == b"*":
        # The asked names rather than "*", which does not cover Authorization (Fetch §3.3.3).
        asked = _tokens(_value(head, b"access-control-request-headers"))
        headers = asked or (b"" if cors.credentials else b"*")
    if headers:
        add((b"access-control-allow-headers", headers))
    add((b"access-control-max-age", cors.max_age))
    return answer


def respond(cors: CompiledCors, request: RequestHead, response: ResponseHead) -> None:
    """Put the CORS headers of an actual response, in place, in lieu of the backend's own."""
    headers = response.headers = [item for item in response.headers if item[0] not in _OWNED]
    origin = _value(request, b"origin")
    if not cors.any_origin or cors.credentials:
        _vary_by_origin(response)
    if origin is None or not cors.allows(origin):
        return
    expose = cors.expose
    if expose == b"*" and cors.credentials:
        # With credentials "*" would be a header's name (Fetch §3.3.3): name them all.
        expose = b", ".join(sorted({name for name, _ in headers} - {b"set-cookie"}))
    headers.append((b"access-control-allow-origin", _allow_origin(cors, origin)))
    if cors.credentials:
        headers.append((b"access-control-allow-credentials", b"true"))
    if expose:
        headers.append((b"access-control-expose-headers", expose))


def _allow_origin(cors: CompiledCors, origin: bytes) -> bytes:
    return b"*" if cors.any_origin and not cors.credentials else origin


def _vary_by_origin(response: ResponseHead) -> None:
    listed = b",".join(value for name, value in response.headers if name == b"vary").lower()
    if not {b"*", b"origin"} & {item.strip() for item in listed.split(b",")}:
        response.headers.append((b"vary", b"Origin"))


def _value(head: RequestHead, name: bytes) -> bytes | None:
    return next((value for field, value in head.headers if field == name), None)


def _tokens(value: bytes | None) -> bytes:
    """The well-formed names of a list, so that nothing else of the request is echoed."""
    names = (item.strip() for item in (value or b"").split(b","))
    return b", ".join(name for name in names if _TOKEN.fullmatch(name))
