"""What is wrong with objects and has no place in a status: by object, in words for people.

Everything here is in force in some way all the same; how, the words say.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from gateway import backend_tls, workloads
from gateway.addresses import canonical
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
from gateway.keys import RouteKey, ServicePortKey
from gateway.node import Mesh
from mesh.model.core import Namespace, ServicePort
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import WorkloadSection
from mesh.model.pod import Pod
from mesh.policy import audit

Problems: TypeAlias = tuple[str, ...]

# Of many pods, so many are named.
_NAMED = 3


def of_namespace(mesh: Mesh) -> Callable[[View, ObjectKey], Problems | None]:
    def compute(view: View, key: ObjectKey) -> Problems | None:
        namespace: Namespace = view.get("Namespace", key)
        wrong = (*misused(namespace), *misused_mtls(namespace), *audit.misused(namespace))
        if not workloads.of_namespace(view, key.name).meshed:
            why = f"they are not in the mesh (label {MESH}), unless they say that they are"
            wrong += _idle(namespace, MTLS, f"pods of this namespace: {why}")
        elif mtls(namespace) == "STRICT":
            wrong += _unenforced(mesh, "its pods")
        return wrong or None

    return compute


def of_node(view: View, key: ObjectKey) -> Problems | None:
    state: workloads.NodeState | None = view.get("node_states", key)
    holders = {one: view.get("node_holders", one) for one in (state.addresses if state else ())}
    return (
        tuple(
            f"address {address} is Node {other.name}'s, which is younger, so this one is not found"
            " there; remove the Node that is gone"
            for address, other in holders.items()
            if other != key
        )
        or None
    )


def of_pod(mesh: Mesh) -> Callable[[View, ObjectKey], Problems | None]:
    def compute(view: View, key: ObjectKey) -> Problems | None:
        pod: Pod = view.get("Pod", key)
        if pod.spec.host_network:
            why = "it is in its host's network (spec.hostNetwork), where pods cannot be told apart"
            return _idle(pod, PREFIX, f"this pod: {why}") or None
        wrong = tuple(misused(pod))
        written = {pod.status.pod_ip, *(one.ip for one in pod.status.pod_ips)} - {None, ""}
        wrong += tuple(
            f"address {address} is a Node's, so it is not taken for this pod's; of a pod in its"
            " host's network spec.hostNetwork is true"
            for address in sorted(canonical(one) for one in written if one)
            if view.bucket("nodes_at", address)
        )
        state: workloads.PodState | None = view.get("pods", key)
        namespace = workloads.of_namespace(view, key.namespace)
        if state is None or state.meshed:
            wrong += tuple(misused_mtls(pod))
            ports = mtls_ports(pod)
            asked = ports is None or "STRICT" in (mtls(pod), *ports.values())
            if asked or view.get("demanded", key):
                wrong += _unenforced(mesh, "this pod")
            if state is not None:
                wrong += _unreachable(view, mesh, state)
            return wrong or None
        why = f"this pod: it is not in the mesh (label {MESH} of the pod or its namespace)"
        wrong += _idle(pod, MTLS, why)
        if namespace.meshed and namespace.mtls == "STRICT":
            asks = f"Namespace {key.namespace} asks for mutual TLS (STRICT)"
            wrong += (f"{asks}, without effect on {why}",)
        return wrong or None

    return compute


def _unreachable(view: View, mesh: Mesh, state: workloads.PodState) -> Problems:
    if not (mesh.on and mesh.trust_domain) or state.node in ("", mesh.node):
        return ()
    if view.get("nodes", ObjectKey("", state.node)) is not None:
        return ()
    return (
        f"spec.nodeName is {state.node}, and there is no Node of that name with an InternalIP, so"
        " nothing on this node reaches the pod by mutual TLS; add the Node",
    )


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


def of_policy(view: View, key: ObjectKey) -> Problems | None:
    """A BackendTLSPolicy's status speaks to Gateways; where none goes by it, nothing would."""
    if view.get("policy_status", key) is not None:
        return None
    state: backend_tls.PolicyState = view.get("policies", key)
    found = (state.accepted or backend_tls.misses(view, key, state), state.resolved)
    return tuple(dict.fromkeys(one.message for one in found if one is not None)) or None


def of_service(mesh: Mesh) -> Callable[[View, ObjectKey], Problems | None]:
    def compute(view: View, key: ObjectKey) -> Problems | None:
        found: ClusterIPs | None = view.get("cluster_ips", key)
        spec = view.get("Service", key).spec
        wrong = list(found.refused if found is not None else ())
        if spec.internal_traffic_policy == "Local" and not mesh.node:
            wrong.append(
                "spec.internalTrafficPolicy Local does not hold: this node has no name; start Weft"
                " with --node NAME"
            )
        routed = [
            str(port.port)
            for port in spec.ports
            if view.get("services", ServicePortKey(*key, port.port)) is not None
        ]
        if spec.session_affinity == "ClientIP" and routed:
            wrong.append(
                f"spec.sessionAffinity ClientIP does not hold at port {', '.join(routed)}: mesh"
                " routes are attached, and the proxy that follows them does not go by the client's"
                " address; use sessionPersistence in the routes"
            )
        for port in spec.ports:
            if port.protocol == "UDP" and (pods := _strict(view, mesh, key, port)):
                some = ", ".join(pods[:_NAMED]) + (", …" if len(pods) > _NAMED else "")
                wrong.append(
                    f"port {port.port}/UDP leads to pods that must be connected to by mutual TLS"
                    f" (STRICT), and UDP never is: what other nodes send to {some} is dropped;"
                    f" annotate the pods with {MTLS_PORTS}: PORT=PERMISSIVE, say"
                )
        return tuple(wrong) or None

    return compute


def _strict(view: View, mesh: Mesh, service: ObjectKey, port: ServicePort) -> list[str]:
    """The pods behind a port that take nothing there but mutual TLS."""
    found: dict[str, None] = {}
    for endpoint in endpoints(view, mesh, service, port):
        holder: workloads.Holder | None = view.get("holders", endpoint.address)
        if holder is not None:
            pod: WorkloadSection | None = view.get("workloads", holder.pod)
            if pod and pod.mtls_ports.get(endpoint.port, pod.mtls) == "STRICT":
                found[str(holder.pod)] = None
    return list(found)
