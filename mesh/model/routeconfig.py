"""Routes as NodeConfig carries them: matches, filters, backends, and what becomes of a request.

Shapes only, like mesh.model.nodeconfig. Text is `str`; the proxy encodes it once.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from mesh.model.section import Part, SectionKey

# --- filters ------------------------------------------------------------------------------------


class HeaderValue(Part, frozen=True):
    name: str
    value: str


class HeaderModifier(msgspec.Struct, frozen=True, omit_defaults=True, tag="headers"):
    """set, then add, then remove (HTTPHeaderFilter); names are lower case."""

    direction: Literal["request", "response"]
    set: tuple[HeaderValue, ...] = ()
    add: tuple[HeaderValue, ...] = ()
    remove: tuple[str, ...] = ()


class PathModifier(Part, frozen=True):
    """HTTPPathModifier. `prefix` is the PathPrefix of the match in force, taken by the matcher."""

    type: Literal["ReplaceFullPath", "ReplacePrefixMatch"]
    value: str


class Redirect(msgspec.Struct, frozen=True, omit_defaults=True, tag="redirect"):
    """HTTPRequestRedirectFilter; None: as in the request, by the rules of the specification."""

    scheme: Literal["http", "https"] | None = None
    hostname: str | None = None
    path: PathModifier | None = None
    port: int | None = None
    status: int = 302


class Rewrite(msgspec.Struct, frozen=True, omit_defaults=True, tag="rewrite"):
    """HTTPURLRewriteFilter."""

    hostname: str | None = None
    path: PathModifier | None = None


class Mirror(msgspec.Struct, frozen=True, omit_defaults=True, tag="mirror"):
    """HTTPRequestMirrorFilter: `numerator`/`denominator` of the requests also go to `cluster`."""

    cluster: SectionKey
    numerator: int = 1
    denominator: int = 1


class Cors(msgspec.Struct, frozen=True, omit_defaults=True, tag="cors"):
    """HTTPCORSFilter; origins as written, "*" and "https://*.example.com" included."""

    allow_origins: tuple[str, ...] = ()
    allow_credentials: bool = False
    allow_methods: tuple[str, ...] = ()
    allow_headers: tuple[str, ...] = ()
    expose_headers: tuple[str, ...] = ()
    max_age_s: int = 5


Filter: TypeAlias = HeaderModifier | Redirect | Rewrite | Mirror | Cors


# --- routes -------------------------------------------------------------------------------------


class PathMatch(Part, frozen=True):
    type: Literal["Exact", "PathPrefix", "RegularExpression"] = "PathPrefix"
    value: str = "/"


class ValueMatch(Part, frozen=True):
    """A header (name lower case) or query parameter (name as written) match."""

    name: str
    value: str
    type: Literal["Exact", "RegularExpression"] = "Exact"


class RouteMatch(Part, frozen=True):
    """HTTPRouteMatch: everything given must hold. GRPC method matches become path matches."""

    path: PathMatch = PathMatch()
    method: str | None = None
    headers: tuple[ValueMatch, ...] = ()
    query: tuple[ValueMatch, ...] = ()


class WeightedBackend(Part, frozen=True):
    """A backendRef. `cluster` None: it does not resolve, and its share of requests gets 500."""

    cluster: SectionKey | None
    weight: int = 1
    filters: tuple[Filter, ...] = ()


class Retry(Part, frozen=True):
    """HTTPRouteRetry (GEP-1731): connection errors are always retried where a repeat is safe."""

    codes: tuple[int, ...] = ()
    attempts: int = 1
    backoff_ms: int = 0


class SessionPersistence(Part, frozen=True):
    """SessionPersistence (GEP-1619). Timeouts in seconds; None is no limit."""

    type: Literal["Cookie", "Header"] = "Cookie"
    name: str = "weft-session"
    absolute_timeout_s: float | None = None
    idle_timeout_s: float | None = None
    permanent: bool = False
    path: str = "/"


class RouteRule(Part, frozen=True):
    """An HTTPRouteRule. With `error_status` the rule answers that status itself: its configuration
    is not whole (an unresolved filter, say) and the specification asks for an error instead.
    Timeouts in milliseconds; None is no limit.
    """

    matches: tuple[RouteMatch, ...]
    name: str | None = None
    filters: tuple[Filter, ...] = ()
    backends: tuple[WeightedBackend, ...] = ()
    request_timeout_ms: int | None = None
    backend_timeout_ms: int | None = None
    retry: Retry | None = None
    session: SessionPersistence | None = None
    error_status: int | None = None


class Attachment(Part, frozen=True):
    """The route serves `hostnames` on a listener: their intersection with the listener's hostname,
    lower case; "*" is every host."""

    listener: str
    hostnames: tuple[str, ...]


class RouteSection(msgspec.Struct, frozen=True, omit_defaults=True, tag="route"):
    """One HTTPRoute or GRPCRoute. `created` (RFC 3339, "" if unknown) and the name break ties.
    `client_headers`: mesh requests tell the backend the client's address and identity."""

    kind: Literal["HTTPRoute", "GRPCRoute"]
    namespace: str
    name: str
    created: str
    attachments: tuple[Attachment, ...]
    rules: tuple[RouteRule, ...]
    client_headers: bool = False
