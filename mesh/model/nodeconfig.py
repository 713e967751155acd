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

from mesh.model.policyconfig import CidrSection, PolicySection
from mesh.model.routeconfig import RouteSection
from mesh.model.section import Part, SectionKey

# Where this node's proxy takes the connections of workloads, on its mesh addresses.
MESH_HTTP_PORT = 15001
MESH_RELAY_PORT = 15002
# Where it takes connections of other nodes' proxies, mutual TLS.
MESH_TUNNEL_PORT = 15008

# How a workload's port takes connections of other nodes: STRICT by mutual TLS only; PERMISSIVE also
# plain ones; with DISABLE the mesh encrypts none of them.
MtlsMode: TypeAlias = Literal["STRICT", "PERMISSIVE", "DISABLE"]


# --- ports and listeners -----------------------------------------------------------------------


class Listener(Part, frozen=True):
    """One listener of a Gateway or ListenerSet on a port.

    `id` is "Gateway/<ns>/<name>/<listener>" or "ListenerSet/<ns>/<name>/<listener>"; routes attach
    to it. `hostname` is lower case; None matches every host; "*.x" matches one or more labels
    before ".x" (Gateway API Hostname). `certificates` are `certificate_key`s, first is the default.
    """

    id: str
    hostname: str | None = None
    certificates: tuple[SectionKey, ...] = ()


class ClientValidation(Part, frozen=True):
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
    for is known by the socket (bpf), not by the port. "relay" passes bytes on as they are. "tunnel"
    takes connections of other nodes' proxies, by mutual TLS, which say what was asked for."""

    address: str
    port: int
    kind: Literal["http", "relay", "tunnel"]


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
    off the redirect path, as its annotation asks. `spiffe_id`: who it is to other nodes ("": nobody
    can vouch for it). `mtls` holds for ports that do not stand in `mtls_ports`. `meshed` False: the
    mesh leaves it alone (it has opted out), and only policies know it. `client_headers`: requests
    tell it who their client is; `http_ports` are then those of its ports at which Services declare
    HTTP. `uid` tells it from another pod of the same name."""

    namespace: str
    name: str
    addresses: tuple[str, ...]
    node: str = ""
    local: bool = False
    service_account: str = "default"
    labels: dict[str, str] = {}
    identity: int = 0
    sockmap: bool = True
    spiffe_id: str = ""
    mtls: MtlsMode = "PERMISSIVE"
    mtls_ports: dict[int, MtlsMode] = {}
    meshed: bool = True
    client_headers: bool = False
    http_ports: tuple[int, ...] = ()
    uid: str = ""


class NodeSection(msgspec.Struct, frozen=True, omit_defaults=True, tag="node"):
    """A node of the cluster and its own addresses (Node status.addresses, InternalIP): where its
    proxy listens on MESH_TUNNEL_PORT, and from where it connects."""

    name: str
    addresses: tuple[str, ...]


class SvidSection(msgspec.Struct, frozen=True, tag="svid"):
    """An identity that this node holds: certificate chain (leaf first) and private key, PEM, valid
    until `not_after` (seconds since 1970 UTC). Never logged, never printed."""

    spiffe_id: str
    chain_pem: str
    key_pem: str
    not_after: int

    def __repr__(self) -> str:
        return f"SvidSection({self.spiffe_id})"


class TrustBundleSection(msgspec.Struct, frozen=True, tag="bundle"):
    """The roots of a trust domain: those by which its workloads' certificates are verified, and no
    others'. PEM certificates one after another."""

    trust_domain: str
    roots_pem: str


# --- clusters: where requests go -----------------------------------------------------------------


class Endpoint(Part, frozen=True):
    """A ready endpoint. `name` is the pod's, for people and for session persistence."""

    address: str
    port: int
    name: str = ""


class SubjectAltName(Part, frozen=True):
    type: Literal["Hostname", "URI"]
    value: str


class UpstreamTLS(Part, frozen=True):
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


class EntryBackend(Part, frozen=True):
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
    # Who a Gateway's proxy is toward workloads of other nodes; "": nobody, and it connects plainly.
    gateway_spiffe_id: str = ""
    # Whether requests between workloads of this node may pass by the proxy.
    http_in_kernel: bool = False


Section: TypeAlias = (
    PortSection
    | CertificateSection
    | MeshPort
    | ServiceSection
    | WorkloadSection
    | NodeSection
    | SvidSection
    | TrustBundleSection
    | PolicySection
    | CidrSection
    | RouteSection
    | ClusterSection
    | LoadBalancerEntry
    | Settings
)

# The sections that proxies are sent.
PROXY_SECTIONS = (
    PortSection,
    CertificateSection,
    MeshPort,
    ServiceSection,
    WorkloadSection,
    NodeSection,
    SvidSection,
    TrustBundleSection,
    PolicySection,
    CidrSection,
    RouteSection,
    ClusterSection,
    Settings,
)


class Delta(msgspec.Struct, frozen=True, tag="delta"):
    """The step from version `base` to `version`, which was made at `made_ns` (CLOCK_MONOTONIC).
    `base` None: a whole value; what else was there goes."""

    base: int | None
    version: int
    put: dict[SectionKey, Section]
    remove: tuple[SectionKey, ...] = ()
    made_ns: int = 0


class Ack(msgspec.Struct, frozen=True, tag="ack"):
    """A destination has version `version` in force, except what it refused and why (all refusals
    that hold, not only those of the last delta)."""

    version: int
    refused: dict[SectionKey, str] = {}


class NodeConfig(msgspec.Struct, frozen=True):
    """One version of everything a node needs."""

    version: int
    sections: immutables.Map[SectionKey, Section]
    made_ns: int = 0  # as in Delta

    @classmethod
    def empty(cls) -> NodeConfig:
        return cls(0, immutables.Map())

    def change(
        self, put: dict[SectionKey, Section], remove: tuple[SectionKey, ...], made_ns: int = 0
    ) -> tuple[NodeConfig, Delta]:
        """The next version, and the delta that leads to it. Cost: the change, not the whole."""
        with self.sections.mutate() as draft:
            for key, section in put.items():
                draft[key] = section
            for key in remove:
                draft.pop(key, None)
            sections = draft.finish()
        version = self.version + 1
        config = NodeConfig(version, sections, made_ns)
        return config, Delta(self.version, version, put, remove, made_ns)

    def whole(self) -> Delta:
        """This version as a delta from nothing."""
        return Delta(None, self.version, dict(self.sections), made_ns=self.made_ns)


def for_destination(delta: Delta, kinds: tuple[type, ...]) -> Delta:
    """The part of a delta that a destination takes. Removals go to everyone: unknown keys are
    ignored there."""
    put = {key: section for key, section in delta.put.items() if isinstance(section, kinds)}
    return msgspec.structs.replace(delta, put=put)
