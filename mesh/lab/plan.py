"""A lab as it will be made: every address, name and path, worked out before anything exists.

The plan is the journal: it is written first, every name in it follows from the lab's name, and so
whatever a killed `up` left is found again. Pure; knows no kernel and no files.
"""

from __future__ import annotations

import os
from ipaddress import ip_network
from pathlib import Path
from typing import TypeAlias

import msgspec

from mesh.lab.config import (
    MAX_PODS_PER_NODE,
    NODE_PREFIXES,
    ContainerPort,
    LabConfig,
    NamespaceConfig,
    PodConfig,
    Range,
    ServicePortConfig,
)
from mesh.lab.errors import LabError
from mesh.model.meta import Model

NETNS_DIR = Path("/run/netns")
# Where pods find the DNS server of their node; the address is NodeLocal DNSCache's.
DNS_ADDRESS = "169.254.20.10"
CLUSTER_DOMAIN = "cluster.local"
# Below the lab's cgroup: names that no node can have.
SYSTEM = "_system"
AUTHORITY = "_authority"
CLUSTER = "_cluster"
OUTSIDE = "_outside"

# An IPv4 and an IPv6 address, without prefix length.
Addresses: TypeAlias = tuple[str, str]


class PodPlan(Model, frozen=True, kw_only=True):
    """`netns` and `cgroup` are paths; `container_id` is what CNI calls so; `uid`: of one that was
    created on the API server, "" of the lab's own."""

    namespace: str
    name: str
    node: str
    addresses: Addresses
    labels: dict[str, str]
    annotations: dict[str, str]
    service_account: str
    command: tuple[str, ...]
    env: dict[str, str]
    ports: tuple[ContainerPort, ...]
    container_id: str
    netns: str
    cgroup: str
    uid: str = ""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def file_stem(self) -> str:
        return f"{self.namespace}.{self.name}"


class NodePlan(Model, frozen=True, kw_only=True):
    """`cgroup` holds the node's pods and nothing else, `system_cgroup` the processes that are the
    node's own, whose connections nobody steers; those of its proxy are in one below it."""

    name: str
    addresses: Addresses
    pod_ranges: Range
    netns: str
    cgroup: str
    system_cgroup: str

    @property
    def key(self) -> str:
        return f"node/{self.name}"

    @property
    def proxy_cgroup(self) -> str:
        return f"{self.system_cgroup}/proxy"


class OutsidePlan(Model, frozen=True, kw_only=True):
    """A client outside the cluster."""

    name: str
    addresses: Addresses
    netns: str
    cgroup: str

    @property
    def key(self) -> str:
        return f"outside/{self.name}"


Place: TypeAlias = PodPlan | NodePlan | OutsidePlan


class ServicePlan(Model, frozen=True, kw_only=True):
    """`cluster_ips` are empty for a headless Service."""

    namespace: str
    name: str
    cluster_ips: tuple[str, ...]
    selector: dict[str, str]
    session_affinity: str
    ports: tuple[ServicePortConfig, ...]

    def selects(self, pod: PodPlan) -> bool:
        return self.namespace == pod.namespace and self.selector.items() <= pod.labels.items()


class FabricPlan(Model, frozen=True, kw_only=True):
    """What connects nodes with each other and with the outside; routers have the addresses."""

    netns: str
    node_gateways: Addresses
    node_ranges: Range
    outside_gateways: Addresses
    outside_ranges: Range


class Plan(Model, frozen=True, kw_only=True):
    """`directory` is where pods' commands start; `cgroup` the root of all cgroups of the lab;
    `manifests` are files and directories with further objects; `kubeconfig`: of the API server that
    the lab's objects are on, "" where the nodes read files."""

    name: str
    directory: str
    cgroup: str
    fabric: FabricPlan
    nodes: tuple[NodePlan, ...]
    outside: tuple[OutsidePlan, ...]
    pods: tuple[PodPlan, ...]
    services: tuple[ServicePlan, ...]
    namespaces: tuple[NamespaceConfig, ...]
    manifests: tuple[str, ...]
    trust_domain: str
    svid_life: str
    kubeconfig: str = ""

    @property
    def authority_cgroup(self) -> str:
        return f"{self.cgroup}/{SYSTEM}/{AUTHORITY}"

    @property
    def cluster_cgroup(self) -> str:
        return f"{self.cgroup}/{SYSTEM}/{CLUSTER}"

    def node(self, name: str) -> NodePlan:
        return next(node for node in self.nodes if node.name == name)

    def pods_of(self, node: str) -> tuple[PodPlan, ...]:
        return tuple(pod for pod in self.pods if pod.node == node)

    def place(self, name: str) -> Place:
        """What NAME, NAMESPACE/NAME, node/NAME or outside/NAME means. LabError: none or several."""
        places: list[Place] = [*self.pods, *self.nodes, *self.outside]
        found = [one for one in places if name in (one.key, one.name)]
        if len(found) > 1:
            keys = ", ".join(one.key for one in found)
            raise LabError(f"{name!r} may be any of {keys}: say which")
        if not found:
            keys = ", ".join(one.key for one in places)
            raise LabError(f"lab {self.name} has no {name!r}: it has {keys}")
        return found[0]


def netns_prefix(lab: str) -> str:
    """What the names of all network namespaces of a lab begin with, and no others."""
    return f"weft.{lab}."


def make_plan(
    config: LabConfig,
    name: str,
    directory: Path,
    cgroup_root: Path,
    kubeconfig: Path | None = None,
) -> Plan:
    """`name` stands above that of the configuration. LabError: a node would get too many pods."""
    cgroup = cgroup_root / name
    nodes = _nodes(config, name, cgroup)
    return Plan(
        name=name,
        directory=os.path.abspath(directory),
        cgroup=str(cgroup),
        fabric=FabricPlan(
            netns=_netns(name, "fabric"),
            node_gateways=_addresses(config.ranges.nodes, 1),
            node_ranges=config.ranges.nodes,
            outside_gateways=_addresses(config.ranges.outside, 1),
            outside_ranges=config.ranges.outside,
        ),
        nodes=nodes,
        outside=tuple(
            OutsidePlan(
                name=one.name,
                addresses=_addresses(config.ranges.outside, i + 2),
                netns=_netns(name, "outside", one.name),
                cgroup=str(cgroup / OUTSIDE / one.name),
            )
            for i, one in enumerate(config.outside)
        ),
        pods=_pods(config, name, nodes),
        services=tuple(
            ServicePlan(
                namespace=one.namespace,
                name=one.name,
                # The first ten are left to Services with an address that everybody knows.
                cluster_ips=() if one.headless else _addresses(config.ranges.services, i + 10),
                selector=one.all_selector(),
                session_affinity=one.session_affinity,
                ports=one.ports,
            )
            for i, one in enumerate(config.services)
        ),
        namespaces=config.namespaces,
        manifests=tuple(os.path.abspath(directory / path) for path in config.manifests),
        trust_domain=config.trust_domain,
        svid_life=config.svid_life,
        kubeconfig=os.path.abspath(kubeconfig) if kubeconfig is not None else "",
    )


def _netns(lab: str, *parts: str) -> str:
    return str(NETNS_DIR / (netns_prefix(lab) + ".".join(parts)))


def _addresses(ranges: Range, number: int) -> Addresses:
    v4, v6 = ranges
    return str(ip_network(v4)[number]), str(ip_network(v6)[number])


def _nodes(config: LabConfig, lab: str, cgroup: Path) -> tuple[NodePlan, ...]:
    def pod_ranges(number: int) -> Range:
        """The n-th part of the range, without listing those before it."""
        parts = []
        for text, prefix in zip(config.ranges.pods, NODE_PREFIXES, strict=True):
            whole = ip_network(text)
            step = 1 << (whole.max_prefixlen - prefix)
            parts.append(f"{whole[number * step]}/{prefix}")
        return tuple(parts)

    return tuple(
        NodePlan(
            name=node.name,
            addresses=_addresses(config.ranges.nodes, i + 2),
            pod_ranges=pod_ranges(i),
            netns=_netns(lab, "node", node.name),
            cgroup=str(cgroup / node.name),
            system_cgroup=str(cgroup / SYSTEM / node.name),
        )
        for i, node in enumerate(config.nodes)
    )


def _pods(config: LabConfig, lab: str, nodes: tuple[NodePlan, ...]) -> tuple[PodPlan, ...]:
    pods: list[PodPlan] = []
    count = dict.fromkeys((node.name for node in nodes), 0)
    by_name = {node.name: node for node in nodes}

    def add(pod: PodConfig, name: str) -> None:
        node = by_name[pod.node] if pod.node else nodes[len(pods) % len(nodes)]
        count[node.name] += 1
        if count[node.name] > MAX_PODS_PER_NODE:
            raise LabError(
                f"node {node.name} would get more than {MAX_PODS_PER_NODE} pods: add nodes"
            )
        pods.append(_pod(lab, node, pod, name, _addresses(node.pod_ranges, count[node.name] + 1)))

    for pod in config.pods:
        for name in pod.names():
            add(pod, name)
    return tuple(pods)


def _pod(lab: str, node: NodePlan, pod: PodConfig, name: str, addresses: Addresses) -> PodPlan:
    return PodPlan(
        namespace=pod.namespace,
        name=name,
        node=node.name,
        addresses=addresses,
        labels=pod.all_labels(),
        annotations=pod.annotations,
        service_account=pod.service_account,
        command=pod.command,
        env=pod.env,
        ports=pod.ports,
        container_id=f"{lab}.{pod.namespace}.{name}",
        netns=_netns(lab, "pod", pod.namespace, name),
        cgroup=f"{node.cgroup}/{pod.namespace}.{name}",
        uid=pod.uid,
    )


def with_pod(plan: Plan, node: NodePlan, pod: PodConfig) -> tuple[Plan, PodPlan]:
    """The plan with one pod more, which gets the first addresses of its node that are free.
    LabError: there are none, or there is a pod of that name."""
    taken = {one.addresses for one in plan.pods}
    for number in range(2, MAX_PODS_PER_NODE + 2):
        addresses = _addresses(node.pod_ranges, number)
        if addresses not in taken:
            made = _pod(plan.name, node, pod, pod.name, addresses)
            if any(one.key == made.key for one in plan.pods):
                raise LabError(f"{made.key} is there already")
            return msgspec.structs.replace(plan, pods=(*plan.pods, made)), made
    raise LabError(f"node {node.name} has {MAX_PODS_PER_NODE} pods already")
