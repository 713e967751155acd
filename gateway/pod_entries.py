"""LoadBalancerEntries for what clients may ask pods for directly: each address of a pod with each
port that a Service leads to, headless or not, ready or not; the pod itself is the only backend.

Routes say nothing here: they are about a Service's cluster IP. So what a pod's port speaks is what
Services declare (gateway.pod_ports).
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.entries import backend
from gateway.keys import PortKey
from gateway.node import Mesh
from gateway.pod_ports import spoken
from gateway.workloads import Holder
from mesh.model.derive import View
from mesh.model.nodeconfig import Endpoint, LoadBalancerEntry


def pod_entry(mesh: Mesh) -> Callable[[View, PortKey], LoadBalancerEntry | None]:
    def compute(view: View, place: PortKey) -> LoadBalancerEntry | None:
        address, port = place
        holder: Holder | None = view.get("holders", address)
        if holder is None or not holder.meshed:
            return None
        said = spoken(view, place)
        http = said in ("http1", "http2") and mesh.at(address) is not None
        return LoadBalancerEntry(
            address=address,
            port=port,
            protocol="TCP",
            backends=(backend(view, mesh, Endpoint(address, port), http),),
            source=f"Pod/{holder.pod}",
            http=http,
            sockmap=http and said == "http1",
        )

    return compute
