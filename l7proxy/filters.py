"""Filters of route rules and backends: header modifiers, URL rewrites, redirects, mirror sampling.

Sources: Gateway API v1.6.1 HTTPRouteFilter. `compile_*` check and encode a filter once, when its
route is taken (Refused names the field); the rest applies it to heads. No I/O, and nothing about
which rule a request gets.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from l7proxy.field_rules import Refused, check_modifiable, check_value
from l7proxy.message import Headers, RequestHead, ResponseHead
from mesh.model.routeconfig import (
    HeaderModifier,
    HeaderValue,
    Mirror,
    PathModifier,
    Redirect,
    Rewrite,
)

_PATH = re.compile(r"(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|%[0-9A-Fa-f]{2})*")
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
_WELL_KNOWN = {b"http": 80, b"https": 443}
_REDIRECT_STATUS = frozenset((301, 302, 303, 307, 308))


class Matched(Protocol):
    """What a filter needs of the match in force (`routing.RouteMatchResult`)."""

    @property
    def prefix(self) -> bytes | None:
        """The PathPrefix that matched, without a trailing "/"; None for other path matches."""


class ListeningPort(Protocol):
    """Where the client is connected, as it sees that: what `Location` tells by default."""

    @property
    def port(self) -> int: ...


@dataclass(frozen=True, slots=True)
class HeaderChange:
    """A compiled header modifier."""

    set: tuple[tuple[bytes, bytes], ...]
    add: tuple[tuple[bytes, bytes], ...]
    remove: frozenset[bytes]
    # Names whose present values go: those removed and those set.
    replaced: frozenset[bytes]

    def apply(self, headers: Headers) -> Headers:
        """Set, then add (another field line, RFC 9110 §5.3), then remove. A new list."""
        result = [item for item in headers if item[0] not in self.replaced]
        result += [item for item in (*self.set, *self.add) if item[0] not in self.remove]
        return result


@dataclass(frozen=True, slots=True)
class PathChange:
    """A compiled path modifier. `value` has no trailing "/" where it replaces a prefix."""

    full: bool
    value: bytes

    def apply(self, path: bytes, prefix: bytes | None) -> bytes:
        if self.full or prefix is None:
            return self.value or b"/"
        return self.value + path[len(prefix) :] or b"/"


@dataclass(frozen=True, slots=True)
class RewriteChange:
    hostname: bytes | None
    path: PathChange | None


@dataclass(frozen=True, slots=True)
class CompiledRedirect:
    scheme: bytes | None
    hostname: bytes | None
    path: PathChange | None
    port: int | None
    status: int


@dataclass(frozen=True, slots=True)
class CompiledFilters:
    """What changes heads at one level (rule or backend), in the order written."""

    request: tuple[HeaderChange, ...] = ()
    response: tuple[HeaderChange, ...] = ()
    rewrite: RewriteChange | None = None


NO_FILTERS = CompiledFilters()


# --- compiling ----------------------------------------------------------------------------------


def compile_headers(modifier: HeaderModifier, where: str) -> HeaderChange:
    set_ = _pairs(modifier.set, f"{where}.set")
    remove = frozenset(
        check_modifiable(name, f"{where}.remove[{i}]") for i, name in enumerate(modifier.remove)
    )
    return HeaderChange(
        set=set_,
        add=_pairs(modifier.add, f"{where}.add"),
        remove=remove,
        replaced=remove | {name for name, _ in set_},
    )


def _pairs(values: Iterable[HeaderValue], where: str) -> tuple[tuple[bytes, bytes], ...]:
    """Of equivalent names the first counts (HTTPHeader.name)."""
    pairs: dict[bytes, bytes] = {}
    for i, header in enumerate(values):
        name = check_modifiable(header.name, f"{where}[{i}].name")
        pairs.setdefault(name, check_value(header.value, f"{where}[{i}].value"))
    return tuple(pairs.items())


def compile_rewrite(rewrite: Rewrite, where: str, *, prefixes_only: bool) -> RewriteChange:
    """`prefixes_only`: every match of the rule is a PathPrefix, as ReplacePrefixMatch requires."""
    return RewriteChange(
        hostname=_hostname(rewrite.hostname, where),
        path=_compile_path(rewrite.path, f"{where}.path", prefixes_only),
    )


def compile_redirect(redirect: Redirect, where: str, *, prefixes_only: bool) -> CompiledRedirect:
    if redirect.status not in _REDIRECT_STATUS:
        raise Refused(f"{where}.statusCode: {redirect.status} is not a redirect")
    return CompiledRedirect(
        scheme=redirect.scheme.encode() if redirect.scheme else None,
        hostname=_hostname(redirect.hostname, where),
        path=_compile_path(redirect.path, f"{where}.path", prefixes_only),
        port=redirect.port,
        status=redirect.status,
    )


def check_mirror(mirror: Mirror, where: str) -> Mirror:
    if mirror.denominator <= 0 or not 0 <= mirror.numerator <= mirror.denominator:
        raise Refused(
            f"{where}.fraction: {mirror.numerator}/{mirror.denominator} is not between 0 and 1"
        )
    return mirror


def _hostname(hostname: str | None, where: str) -> bytes | None:
    if not hostname:
        return None
    if not _HOST.fullmatch(hostname):
        raise Refused(f"{where}.hostname: {hostname!r} is not a host name")
    return hostname.lower().encode()


def _compile_path(
    modifier: PathModifier | None, where: str, prefixes_only: bool
) -> PathChange | None:
    if modifier is None:
        return None
    full = modifier.type == "ReplaceFullPath"
    if not full and not prefixes_only:
        raise Refused(f"{where}: ReplacePrefixMatch needs every match of the rule to be PathPrefix")
    value = modifier.value
    if not _PATH.fullmatch(value):
        raise Refused(f"{where}: {value!r} holds characters that no path has (RFC 3986 §3.3)")
    if any(segment in (".", "..") for segment in value.split("/")):
        raise Refused(f"{where}: {value!r} has dot segments")
    if value and not value.startswith("/"):
        value = "/" + value
    return PathChange(full, (value if full else value.rstrip("/")).encode())


# --- applying -----------------------------------------------------------------------------------


def request(filters: CompiledFilters, head: RequestHead, match: Matched) -> RequestHead:
    """The head after request header modifiers and the URL rewrite; `head` itself is not changed.

    The query stays as it is. A prefix is replaced only where it still stands at the front of the
    path: a rule's rewrite has gone before a backend's.
    """
    rewrite = filters.rewrite
    if not filters.request and rewrite is None:
        return head
    headers, authority, path = head.headers, head.authority, head.path
    for change in filters.request:
        headers = change.apply(headers)
    if rewrite is not None:
        if rewrite.hostname is not None:
            authority = rewrite.hostname
        prefix = match.prefix or b""
        if rewrite.path is not None and (
            rewrite.path.full or path == prefix or path.startswith(prefix + b"/")
        ):
            path = rewrite.path.apply(path, prefix)
    return dataclasses.replace(head, headers=headers, authority=authority, path=path)


def response(filters: CompiledFilters, head: ResponseHead) -> None:
    """Response header modifiers, in place."""
    for change in filters.response:
        head.headers = change.apply(head.headers)


def redirect(
    redirect: CompiledRedirect, head: RequestHead, listening: ListeningPort, match: Matched
) -> ResponseHead:
    """The answer of a RequestRedirect filter. Scheme, host, port and path that the filter leaves
    open come from the request and the listener (HTTPRequestRedirectFilter); the query is kept."""
    scheme = redirect.scheme or head.scheme
    number = redirect.port or (_WELL_KNOWN[redirect.scheme] if redirect.scheme else listening.port)
    path = redirect.path.apply(head.path, match.prefix) if redirect.path is not None else head.path
    location = path if head.query is None else path + b"?" + head.query
    if host := redirect.hostname or head.host:
        if number != _WELL_KNOWN.get(scheme):
            host += b":%d" % number
        location = scheme + b"://" + host + location
    elif location.startswith(b"//"):
        # HTTP/1.0 without Host gets a relative reference, which must not name a host by its path
        # (RFC 3986 §4.2).
        location = b"/." + location
    return ResponseHead(redirect.status, [(b"location", location)], 0)


def sampled(mirror: Mirror, random: Callable[[], float]) -> bool:
    """Whether this request is mirrored; `random` is uniform in [0, 1)."""
    return random() * mirror.denominator < mirror.numerator
