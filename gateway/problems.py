"""What is wrong with objects and has no place in a status: by object, in words for people.

Everything here is in force in some way all the same; how, the words say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from gateway import workloads
from gateway.annotations import (
    MESH,
    MTLS,
    MTLS_PORTS,
    PREFIX,
    misused,
    misused_mtls,
    mtls,
    mtls_ports,
)
from gateway.backends import endpoints
from gateway.cluster_ips import ClusterIPs
from gateway.keys import RouteKey
from gateway.node import Mesh
from mesh.model.core import Namespace, Service, ServicePort
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.pod import Pod

Problems: TypeAlias = tuple[str, ...]

# Of many pods, so many are named.
_NAMED = 3


def of_namespace(mesh: Mesh) -> Callable[[View, ObjectKey], Problems | None]:
    def compute(view: View, key: ObjectKey) -> Problems | None:
        namespace: Namespace = view.get("Namespace", key)
        wrong = (*misused(namespace), *misused_mtls(namespace))
        if not workloads.of_namespace(view, key.name).meshed:
            why = f"they are not in the mesh (label {MESH}), unless they say that they are"
            wrong += _idle(namespace, MTLS, f"pods of this namespace: {why}")
        elif mtls(namespace) == "STRICT":
            wrong += _unenforced(mesh, "its pods")
        return wrong or None

    return compute


def of_pod(mesh: Mesh) -> Callable[[View, ObjectKey], Problems | None]:
    def compute(view: View, key: ObjectKey) -> Problems | None:
        pod: Pod = view.get("Pod", key)
        if pod.spec.host_network:
            why = "it is in its host's network (spec.hostNetwork), where pods cannot be told apart"
            return _idle(pod, PREFIX, f"this pod: {why}") or None
        wrong = tuple(misused(pod))
        state: workloads.PodState | None = view.get("pods", key)
        namespace = workloads.of_namespace(view, key.namespace)
        if state is None or state.meshed:
            wrong += tuple(misused_mtls(pod))
            ports = mtls_ports(pod)
            if ports is None or "STRICT" in (mtls(pod), *ports.values()):
                wrong += _unenforced(mesh, "this pod")
            return wrong or None
        why = f"this pod: it is not in the mesh (label {MESH} of the pod or its namespace)"
        wrong += _idle(pod, MTLS, why)
        if namespace.meshed and namespace.mtls == "STRICT":
            asks = f"Namespace {key.namespace} asks for mutual TLS (STRICT)"
            wrong += (f"{asks}, without effect on {why}",)
        return wrong or None

    return compute


def _unenforced(mesh: Mesh, to: str) -> Problems:
    """What STRICT means where it cannot be had."""
    if not mesh.on:
        return (
            f"mutual TLS (STRICT): there is no mesh on this node, so nothing here keeps plain"
            f" connections from {to}; start Weft with --steer CGROUP and --authority SOCKET",
        )
    if not mesh.trust_domain:
        return (
            "mutual TLS (STRICT): there is no authority on this node, so connections to"
            f" {to} between this node and others are refused; start Weft with --authority SOCKET",
        )
    return ()


def _idle(obj: Namespace | Pod, prefix: str, on: str) -> Problems:
    """Annotations and labels that do nothing."""
    names = {*obj.metadata.annotations, *obj.metadata.labels}
    found = sorted(name for name in names if name.startswith(prefix))
    return (f"{', '.join(found)}: without effect on {on}",) if found else ()


def of_route(view: View, key: RouteKey) -> Problems | None:
    return tuple(misused(view.get("Route", key))) or None


def of_service(view: View, key: ObjectKey) -> Problems | None:
    found: ClusterIPs | None = view.get("cluster_ips", key)
    wrong = found.refused if found is not None else ()
    service: Service = view.get("Service", key)
    for port in service.spec.ports:
        if port.protocol == "UDP" and (pods := _strict(view, key, port)):
            some = ", ".join(pods[:_NAMED]) + (", …" if len(pods) > _NAMED else "")
            wrong += (
                f"port {port.port}/UDP leads to pods that must be connected to by mutual TLS"
                f" (STRICT), and UDP never is: what other nodes send to {some} is dropped; annotate"
                f" the pods with {MTLS_PORTS}: PORT=PERMISSIVE, say",
            )
    return wrong or None


def _strict(view: View, service: ObjectKey, port: ServicePort) -> list[str]:
    """The pods behind a port that take nothing there but mutual TLS."""
    found: dict[str, None] = {}
    for endpoint in endpoints(view, service, port):
        holder: workloads.Holder | None = view.get("holders", endpoint.address)
        if holder is not None:
            pod: workloads.PodState = view.get("pods", holder.pod)
            if dict(pod.mtls_ports).get(endpoint.port, pod.mtls) == "STRICT":
                found[str(holder.pod)] = None
    return list(found)
