"""Who may have a tunnel to a pod of this node: a pure judgement of sections and a preface."""

from __future__ import annotations

from l7proxy.peers import Peers, Source
from l7proxy.tunnel_wire import Preface
from mesh.model.nodeconfig import WorkloadSection


class Refusal(Exception):
    """`reason` is counted, snake case."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


def tells(pod: WorkloadSection, port: int) -> bool:
    """Requests to it tell the pod who their client is, which the client's node cannot be left to
    say."""
    return pod.client_headers and port in pod.http_ports


def judge(
    peers: Peers, address: str, spiffe_id: str, own: str, preface: Preface
) -> tuple[Source, WorkloadSection]:
    """Whether the peer at `address` that has proved to be `spiffe_id` and asked for `own` may have
    the tunnel that it asks for. Refusal."""
    node = peers.node_at(address)
    if node is None:
        raise Refusal("node_unknown", f"{address} is no node's address")
    name = preface.source
    if preface.gateway:
        allowed = peers.settings.gateway_spiffe_id
    else:
        pod = peers.pod(name)
        if pod is None:
            raise Refusal("pod_unknown", f"there is no pod {name}")
        if pod.node != node.name:
            raise Refusal("pod_node", f"pod {name} runs on {pod.node}, not on {node.name}")
        allowed = pod.spiffe_id
    if spiffe_id != allowed:
        raise Refusal("pod_identity", f"{spiffe_id} cannot speak for {name}")
    destination = peers.at(preface.address)
    if destination is None or not destination.local:
        raise Refusal("target_unknown", f"{preface.address} is no pod's of this node")
    if destination.spiffe_id != own:
        raise Refusal("target_identity", f"{preface.address} is not {own}'s")
    return Source(name, spiffe_id, preface.gateway, preface.told), destination
