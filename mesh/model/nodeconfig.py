"""NodeConfig: the contract between the control plane and the data plane of one node.

An immutable, versioned map of sections. It travels to its destinations as deltas of whole sections;
a destination takes a section or refuses it with a reason, section by section, and acknowledges the
version. A refused section keeps its last good value; a removed one is gone at once.

This module knows shapes only: no I/O, no Gateway API objects, no protocol code. Text is `str` here;
the proxy encodes it once when it takes a section.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import immutables
import msgspec

# A section's key is "<kind>/<identifier>"; only the constructors below spell it.
SectionKey: TypeAlias = str


def port_key(address: str, port: int) -> SectionKey:
    return f"port/{address}|{port}"


def certificate_key(namespace: str, name: str) -> SectionKey:
    return f"certificate/{namespace}/{name}"


def route_key(kind: str, namespace: str, name: str) -> SectionKey:
    return f"route/{kind}/{namespace}/{name}"


def cluster_key(kind: str, namespace: str, name: str, port: int | None) -> SectionKey:
    return f"cluster/{kind}/{namespace}/{name}/{port}"


def entry_key(address: str, port: int, protocol: str) -> SectionKey:
    return f"entry/{address}|{port}/{protocol}"


def service_key(namespace: str, name: str, port: int) -> SectionKey:
    return f"service/{namespace}/{name}/{port}"


def workload_key(namespace: str, name: str) -> SectionKey:
    return f"workload/{namespace}/{name}"


SETTINGS_KEY: SectionKey = "settings"

# Where this node's proxy takes the connections of workloads, on its mesh addresses.
MESH_HTTP_PORT = 15001
MESH_RELAY_PORT = 15002


def service_listener(namespace: str, name: str, port: int, consumer: str | None = None) -> str:
    """The id of a Service port as a listener that mesh routes attach to. Routes of the Service's
    own namespace attach to the one for everybody; those of another namespace (`consumer`) to the
    one that only clients of that namespace see (GEP-1324, producer and consumer routes)."""
    own = f"Service/{namespace}/{name}/{port}"
    return own if consumer is None else f"{own}/{consumer}"


class _Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """A value inside a section."""


# --- ports and listeners -----------------------------------------------------------------------


class Listener(_Part, frozen=True):
    """One listener of a Gateway or ListenerSet on a port.

    `id` is "Gateway/<ns>/<name>/<listener>" or "ListenerSet/<ns>/<name>/<listener>"; routes attach
    to it. `hostname` is lower case; None matches every host; "*.x" matches one or more labels
    before ".x" (Gateway API Hostname). `certificates` are `certificate_key`s, first is the default.
    """

    id: str
    hostname: str | None = None
    certificates: tuple[SectionKey, ...] = ()


class ClientValidation(_Part, frozen=True):
    """Frontend client-certificate validation of a port (Gateway spec.tls.frontend).

    `ca_pem` is a concatenation of PEM certificates. mode "AllowValidOnly" refuses the handshake
    without a valid certificate; "AllowInsecureFallback" lets every client in. With "RefuseAll" no
    handshake succeeds: what validation refers to is broken, and that fails closed.
    """

    ca_pem: str
    mode: Literal["AllowValidOnly", "AllowInsecureFallback", "RefuseAll"] = "AllowValidOnly"


class PortSection(msgspec.Struct, frozen=True, omit_defaults=True, tag="port"):
    """What one bound address and port serves: all listeners of one Gateway on that port.

    Isolation: the request's host (and SNI, for HTTPS) selects the most specific listener of the
    port, and only routes attached to that listener apply.
    `gateway` is "<ns>/<name>". `client_certificate` is what backends are shown
    (Gateway spec.tls.backend.clientCertificateRef).
    """

    address: str
    port: int
    protocol: Literal["HTTP", "HTTPS"]
    gateway: str
    listeners: tuple[Listener, ...]
    client_validation: ClientValidation | None = None
    client_certificate: SectionKey | None = None


class CertificateSection(msgspec.Struct, frozen=True, tag="certificate"):
    """A certificate chain (leaf first) and its private key, PEM. Never logged, never printed."""

    chain_pem: str
    key_pem: str

    def __repr__(self) -> str:
        return "CertificateSection(…)"


# --- the mesh -----------------------------------------------------------------------------------


class MeshPort(msgspec.Struct, frozen=True, omit_defaults=True, tag="mesh-port"):
    """A port of the proxy that takes steered connections of this node's workloads. What they asked
    for is known by the socket (bpf), not by the port. "relay" passes bytes on as they are."""

    address: str
    port: int
    kind: Literal["http", "relay"]


class ServiceSection(msgspec.Struct, frozen=True, omit_defaults=True, tag="service"):
    """A Service port whose HTTP requests the proxy routes, as the parent of mesh routes.

    A request to one of `addresses` (cluster IPs) and `port` is routed by the routes attached to
    `service_listener(namespace, name, port, consumer=<the client's namespace>)` if that namespace
    stands in `consumers`; else by those of `service_listener(namespace, name, port)` if `producers`
    is true; else it goes to `cluster`, the Service's own endpoints, as it is.
    """

    namespace: str
    name: str
    port: int
    addresses: tuple[str, ...]
    cluster: SectionKey
    producers: bool = False
    consumers: tuple[str, ...] = ()


class WorkloadSection(msgspec.Struct, frozen=True, omit_defaults=True, tag="workload"):
    """A pod: who stands behind `addresses` (the primary one first). `identity` is the number of its
    set of labels on this node; `local`: it runs on this node; `sockmap` False: its sockets are kept
    off the redirect path, as its annotation asks."""

    namespace: str
    name: str
    addresses: tuple[str, ...]
    node: str = ""
    local: bool = False
    service_account: str = "default"
    labels: dict[str, str] = {}
    identity: int = 0
    sockmap: bool = True


# --- filters ------------------------------------------------------------------------------------


class HeaderValue(_Part, frozen=True):
    name: str
    value: str


class HeaderModifier(msgspec.Struct, frozen=True, omit_defaults=True, tag="headers"):
    """set, then add, then remove (HTTPHeaderFilter); names are lower case."""

    direction: Literal["request", "response"]
    set: tuple[HeaderValue, ...] = ()
    add: tuple[HeaderValue, ...] = ()
    remove: tuple[str, ...] = ()


class PathModifier(_Part, frozen=True):
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


class PathMatch(_Part, frozen=True):
    type: Literal["Exact", "PathPrefix", "RegularExpression"] = "PathPrefix"
    value: str = "/"


class ValueMatch(_Part, frozen=True):
    """A header (name lower case) or query parameter (name as written) match."""

    name: str
    value: str
    type: Literal["Exact", "RegularExpression"] = "Exact"


class RouteMatch(_Part, frozen=True):
    """HTTPRouteMatch: everything given must hold. GRPC method matches become path matches."""

    path: PathMatch = PathMatch()
    method: str | None = None
    headers: tuple[ValueMatch, ...] = ()
    query: tuple[ValueMatch, ...] = ()


class WeightedBackend(_Part, frozen=True):
    """A backendRef. `cluster` None: it does not resolve, and its share of requests gets 500."""

    cluster: SectionKey | None
    weight: int = 1
    filters: tuple[Filter, ...] = ()


class Retry(_Part, frozen=True):
    """HTTPRouteRetry (GEP-1731): connection errors are always retried where a repeat is safe."""

    codes: tuple[int, ...] = ()
    attempts: int = 1
    backoff_ms: int = 0


class SessionPersistence(_Part, frozen=True):
    """SessionPersistence (GEP-1619). Timeouts in seconds; None is no limit."""

    type: Literal["Cookie", "Header"] = "Cookie"
    name: str = "weft-session"
    absolute_timeout_s: float | None = None
    idle_timeout_s: float | None = None
    permanent: bool = False
    path: str = "/"


class RouteRule(_Part, frozen=True):
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


class Attachment(_Part, frozen=True):
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


# --- clusters: where requests go -----------------------------------------------------------------


class Endpoint(_Part, frozen=True):
    """A ready endpoint. `name` is the pod's, for people and for session persistence."""

    address: str
    port: int
    name: str = ""


class SubjectAltName(_Part, frozen=True):
    type: Literal["Hostname", "URI"]
    value: str


class UpstreamTLS(_Part, frozen=True):
    """BackendTLSPolicy: SNI and, without `sans`, the name the certificate must be valid for.

    `ca_pem` None means the system's trust store. `broken` is why the policy cannot be enforced:
    no connection is made then, requests get 502.
    """

    hostname: str
    ca_pem: str | None = None
    sans: tuple[SubjectAltName, ...] = ()
    broken: str | None = None


class ClusterSection(msgspec.Struct, frozen=True, omit_defaults=True, tag="cluster"):
    """The ready endpoints of one backendRef target, and how to talk to them.

    `protocol`: "http" is HTTP/1.1; "h2c" HTTP/2 with prior knowledge; "ws"/"wss" HTTP/1.1 whose
    upgrades are expected ("wss" inside TLS). No endpoints: 503.
    """

    endpoints: tuple[Endpoint, ...] = ()
    protocol: Literal["http", "h2c", "ws", "wss"] = "http"
    tls: UpstreamTLS | None = None
    max_connections_per_endpoint: int = 256
    max_pending: int = 1024


# --- load-balancer entries -----------------------------------------------------------------------


class EntryBackend(_Part, frozen=True):
    """`remote`: a meshed pod of another node, reached through the relays of both; `sockmap`: a pod
    of this node whose port declares HTTP/1, so that the proxy may send to it by redirect."""

    address: str
    port: int
    weight: int = 1
    remote: bool = False
    sockmap: bool = False


class LoadBalancerEntry(msgspec.Struct, frozen=True, omit_defaults=True, tag="entry"):
    """A frontend and its weighted backends: a Service's ClusterIP port, or a Gateway's address and
    port (backend: the proxy's own). For the bpf maps; the proxy does not read it. With `affinity_s`
    a client keeps its backend until it has not connected for so many seconds (Service
    spec.sessionAffinity ClientIP). `http`: TCP connections go to this node's proxy, which routes
    their requests; `sockmap`: and the port declares HTTP/1, so that the proxy may answer by
    redirect. A pod's address and port is a frontend too, with itself as the only backend."""

    address: str
    port: int
    protocol: Literal["TCP", "UDP"]
    backends: tuple[EntryBackend, ...]
    source: str
    affinity_s: int | None = None
    http: bool = False
    sockmap: bool = False


# --- settings ------------------------------------------------------------------------------------


class Settings(msgspec.Struct, frozen=True, omit_defaults=True, tag="settings"):
    """The proxy's limits and habits on this node. Times in seconds, sizes in bytes."""

    max_head_bytes: int = 32 * 1024
    max_headers: int = 100
    max_body_bytes: int | None = None
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_timeout_s: float = 60.0
    request_timeout_s: float | None = None
    connect_timeout_s: float = 3.0
    max_connections: int = 10_000
    max_connections_per_client: int = 1_000
    max_requests_per_connection: int | None = None
    drain_timeout_s: float = 30.0
    h2_max_concurrent_streams: int = 100
    ejection_failures: int = 5
    ejection_time_s: float = 10.0
    balancer: Literal["least-request", "round-robin"] = "least-request"
    merge_slashes: bool = True
    # X-Forwarded-*: how many proxies in front are ours, or which source ranges are (CIDR).
    trusted_hops: int = 0
    trusted_ranges: tuple[str, ...] = ()
    access_log: Literal["json", "text", "off"] = "json"


Section: TypeAlias = (
    PortSection
    | CertificateSection
    | MeshPort
    | ServiceSection
    | WorkloadSection
    | RouteSection
    | ClusterSection
    | LoadBalancerEntry
    | Settings
)

# Which sections a destination is sent.
PROXY_SECTIONS = (
    PortSection,
    CertificateSection,
    MeshPort,
    ServiceSection,
    WorkloadSection,
    RouteSection,
    ClusterSection,
    Settings,
)
BPF_SECTIONS = (LoadBalancerEntry, WorkloadSection)


class Delta(msgspec.Struct, frozen=True, tag="delta"):
    """The step from version `base` to `version`. `base` None: a whole value; what else was there
    goes."""

    base: int | None
    version: int
    put: dict[SectionKey, Section]
    remove: tuple[SectionKey, ...] = ()


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """A destination has version `version` in force, except what it refused and why (all refusals
    that hold, not only those of the last delta)."""

    version: int
    refused: dict[SectionKey, str] = {}


class NodeConfig(msgspec.Struct, frozen=True):
    """One version of everything a node needs."""

    version: int
    sections: immutables.Map[SectionKey, Section]

    @classmethod
    def empty(cls) -> NodeConfig:
        return cls(0, immutables.Map())

    def change(
        self, put: dict[SectionKey, Section], remove: tuple[SectionKey, ...]
    ) -> tuple[NodeConfig, Delta]:
        """The next version, and the delta that leads to it. Cost: the change, not the whole."""
        with self.sections.mutate() as draft:
            for key, section in put.items():
                draft[key] = section
            for key in remove:
                draft.pop(key, None)
            sections = draft.finish()
        version = self.version + 1
        return NodeConfig(version, sections), Delta(self.version, version, put, remove)

    def whole(self) -> Delta:
        """This version as a delta from nothing."""
        return Delta(None, self.version, dict(self.sections))


def for_destination(delta: Delta, kinds: tuple[type, ...]) -> Delta:
    """The part of a delta that a destination takes. Removals go to everyone: unknown keys are
    ignored there."""
    put = {key: section for key, section in delta.put.items() if isinstance(section, kinds)}
    return Delta(delta.base, delta.version, put, delta.remove)
