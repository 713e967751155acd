"""What is wrong with objects and has no place in a status: by object, in words for people.

Everything here is in force in some way all the same; how, the words say.
"""

from __future__ import annotations

from typing import TypeAlias

from gateway import workloads
from gateway.annotations import MESH, MTLS, PREFIX, misused, misused_mtls
from gateway.cluster_ips import ClusterIPs
from gateway.keys import RouteKey
from mesh.model.core import Namespace
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.pod import Pod

Problems: TypeAlias = tuple[str, ...]


def of_namespace(view: View, key: ObjectKey) -> Problems | None:
    namespace: Namespace = view.get("Namespace", key)
    wrong = (*misused(namespace), *misused_mtls(namespace))
    if not workloads.of_namespace(view, key.name).meshed:
        why = f"they are not in the mesh (label {MESH}), unless they say that they are"
        wrong += _idle(namespace, MTLS, f"pods of this namespace: {why}")
    return wrong or None


def of_pod(view: View, key: ObjectKey) -> Problems | None:
    pod: Pod = view.get("Pod", key)
    if pod.spec.host_network:
        why = "it is in its host's network (spec.hostNetwork), where Weft cannot tell pods apart"
        return _idle(pod, PREFIX, f"this pod: {why}") or None
    state: workloads.PodState | None = view.get("pods", key)
    if state is None or state.meshed:
        return (*misused(pod), *misused_mtls(pod)) or None
    why = f"this pod: it is not in the mesh (label {MESH} of the pod or its namespace)"
    wrong = (*misused(pod), *_idle(pod, MTLS, why))
    namespace = workloads.of_namespace(view, key.namespace)
    if namespace.meshed and namespace.mtls == "STRICT":
        wrong += (
            f"Namespace {key.namespace} asks for mutual TLS (STRICT), without effect on {why}",
        )
    return wrong or None


def _idle(obj: Namespace | Pod, prefix: str, on: str) -> Problems:
    """Annotations and labels that do nothing."""
    names = {*obj.metadata.annotations, *obj.metadata.labels}
    found = sorted(name for name in names if name.startswith(prefix))
    return (f"{', '.join(found)}: without effect on {on}",) if found else ()


def of_route(view: View, key: RouteKey) -> Problems | None:
    return tuple(misused(view.get("Route", key))) or None


def of_service(view: View, key: ObjectKey) -> Problems | None:
    found: ClusterIPs | None = view.get("cluster_ips", key)
    return found.refused or None if found is not None else None
