"""How things are named between the tables of the derivation."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

from mesh.model.meta import ObjectKey
from mesh.model.section import SectionKey, cluster_key, service_key, service_listener

PortKey: TypeAlias = tuple[str, int]  # address, port


RouteKind: TypeAlias = Literal["HTTPRoute", "GRPCRoute"]
ROUTE_KINDS: tuple[RouteKind, ...] = ("HTTPRoute", "GRPCRoute")


class RouteKey(NamedTuple):
    kind: RouteKind
    namespace: str
    name: str


class ParentKey(NamedTuple):
    """A Gateway or ListenerSet, as the parent of routes and the owner of listeners."""

    kind: Literal["Gateway", "ListenerSet"]
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"

    def listener(self, name: str) -> str:
        """The id of one of its listeners (nodeconfig.Listener.id)."""
        return f"{self.kind}/{self.namespace}/{self.name}/{name}"


class ServicePortKey(NamedTuple):
    """A TCP port of a Service, as the parent of mesh routes."""

    namespace: str
    name: str
    port: int

    @property
    def service(self) -> ObjectKey:
        return ObjectKey(self.namespace, self.name)

    @property
    def section(self) -> SectionKey:
        return service_key(*self)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}:{self.port}"


class MeshListener(NamedTuple):
    """What mesh routes attach to: a Service port for everybody, or for one namespace's clients."""

    port: ServicePortKey
    consumer: str | None

    @property
    def id(self) -> str:
        return service_listener(*self.port, self.consumer)


def mesh_listener(id: str) -> MeshListener | None:
    """The way back from a listener's id; None: it is one of a Gateway or ListenerSet."""
    kind, namespace, name, port, *consumer = id.split("/")
    if kind != "Service":
        return None
    return MeshListener(ServicePortKey(namespace, name, int(port)), *consumer or (None,))


class ClusterRef(NamedTuple):
    """A Service port that routes send to. `grpc`: from a GRPCRoute, so HTTP/2 is a given."""

    namespace: str
    name: str
    port: int
    grpc: bool

    @property
    def service(self) -> ObjectKey:
        return ObjectKey(self.namespace, self.name)

    @property
    def section(self) -> SectionKey:
        kind = "Service-grpc" if self.grpc else "Service"
        return cluster_key(kind, self.namespace, self.name, self.port)
