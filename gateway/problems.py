"""What is wrong with objects and has no place in a status: by object, in words for people.

Everything here is in force in some way all the same; how, the words say.
"""

from __future__ import annotations

from typing import TypeAlias

from gateway.annotations import PREFIX, misused
from gateway.cluster_ips import ClusterIPs
from gateway.keys import RouteKey
from mesh.model.derive import View
from mesh.model.meta import ObjectKey
from mesh.model.pod import Pod

Problems: TypeAlias = tuple[str, ...]


def of_namespace(view: View, key: ObjectKey) -> Problems | None:
    return tuple(misused(view.get("Namespace", key))) or None


def of_pod(view: View, key: ObjectKey) -> Problems | None:
    pod: Pod = view.get("Pod", key)
    if not pod.spec.host_network:
        return tuple(misused(pod)) or None
    idle = sorted(name for name in pod.metadata.annotations if name.startswith(PREFIX))
    if not idle:
        return None
    return (
        f"{', '.join(idle)}: without effect, because the pod is in its host's network"
        " (spec.hostNetwork), where Weft cannot tell it from others",
    )


def of_route(view: View, key: RouteKey) -> Problems | None:
    return tuple(misused(view.get("Route", key))) or None


def of_service(view: View, key: ObjectKey) -> Problems | None:
    found: ClusterIPs | None = view.get("cluster_ips", key)
    return found.refused or None if found is not None else None
