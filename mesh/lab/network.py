"""The lab's network around the pods: nodes and clients outside, and the fabric between them.

    fabric: bridge "nodes" with a port to each node, bridge "outside" with one to each client;
            routes between the two and knows no pods
    node:   eth0 to the fabric; routes to the pod ranges of the other nodes, default to the fabric
    client: eth0 to the fabric, default route there

All links are made in the lab's own network namespaces; the host's is never touched. Knows the plan,
not what runs in it.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from mesh.lab.config import Range
from mesh.lab.errors import LabError
from mesh.lab.kernel import create_netns, inside, write_sysctls
from mesh.lab.plan import DNS_ADDRESS, Addresses, NodePlan, Plan

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_NODAD = 0x02  # IFA_F_NODAD
_BEFORE_LINKS = {
    "net.ipv6.conf.all.accept_dad": 0,
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv6.conf.default.accept_ra": 0,
}
_ROUTER = {
    **_BEFORE_LINKS,
    "net.ipv4.ip_forward": 1,
    "net.ipv6.conf.all.forwarding": 1,
}


def build(plan: Plan) -> None:
    """Make the namespaces of fabric, nodes and clients, and connect them. OSError, LabError: the
    kernel refuses something."""
    try:
        _build(plan)
    except NetlinkError as error:
        raise LabError(f"the kernel refuses a part of the lab's network: {error}") from error


def _build(plan: Plan) -> None:
    fabric = plan.fabric
    create_netns(Path(fabric.netns))
    with inside(fabric.netns):
        write_sysctls(_ROUTER)
        with IPRoute() as router:
            router.link("set", index=1, state="up")
            nodes = _bridge(router, "nodes", fabric.node_gateways, fabric.node_ranges)
            outside = _bridge(router, "outside", fabric.outside_gateways, fabric.outside_ranges)
            for i, node in enumerate(plan.nodes):
                gateways, ranges = fabric.node_gateways, fabric.node_ranges
                _attach(router, f"node{i}", nodes, node.netns, _ROUTER)
                _join(node.netns, node.addresses, ranges, gateways)
            for i, client in enumerate(plan.outside):
                gateways, ranges = fabric.outside_gateways, fabric.outside_ranges
                _attach(router, f"outside{i}", outside, client.netns, _BEFORE_LINKS)
                _join(client.netns, client.addresses, ranges, gateways)
    for node in plan.nodes:
        _finish_node(node, plan.nodes)


def _bridge(router: Any, name: str, addresses: Addresses, ranges: Range) -> int:
    router.link("add", ifname=name, kind="bridge")
    index: int = router.link_lookup(ifname=name)[0]
    router.link("set", index=index, state="up")
    _addresses(router, index, addresses, ranges)
    return index


def _addresses(netlink: Any, index: int, addresses: Addresses, ranges: Range) -> None:
    for family, address, text in zip(_FAMILIES, addresses, ranges, strict=True):
        flags = _NODAD if family == socket.AF_INET6 else 0
        length = int(text.partition("/")[2])
        netlink.addr("add", index=index, address=address, prefixlen=length, flags=flags)


def _attach(router: Any, port: str, bridge: int, netns: str, sysctls: dict[str, int]) -> None:
    """A new namespace whose eth0 is a port of the bridge."""
    create_netns(Path(netns))
    with inside(netns):
        write_sysctls(sysctls)
        with open("/proc/thread-self/ns/net") as there:
            peer = {"ifname": "eth0", "net_ns_fd": there.fileno()}
            router.link("add", ifname=port, kind="veth", peer=peer)
    index = router.link_lookup(ifname=port)[0]
    router.link("set", index=index, master=bridge, state="up")


def _join(netns: str, addresses: Addresses, ranges: Range, gateways: Addresses) -> None:
    with inside(netns), IPRoute() as netlink:
        index = netlink.link_lookup(ifname="eth0")[0]
        for link in (1, index):
            netlink.link("set", index=link, state="up")
        _addresses(netlink, index, addresses, ranges)
        for family, gateway in zip(_FAMILIES, gateways, strict=True):
            netlink.route("add", family=family, dst="default", gateway=gateway)


def _finish_node(node: NodePlan, nodes: tuple[NodePlan, ...]) -> None:
    """Routes to the other nodes' pods, the address of the DNS server, and nowhere to go for pods of
    this node that do not exist."""
    with inside(node.netns), IPRoute() as netlink:
        netlink.addr("add", index=1, address=DNS_ADDRESS, prefixlen=32)
        for i, family in enumerate(_FAMILIES):
            for other in nodes:
                if other is node:
                    netlink.route("add", family=family, dst=node.pod_ranges[i], type="unreachable")
                else:
                    gateway = other.addresses[i]
                    netlink.route("add", family=family, dst=other.pod_ranges[i], gateway=gateway)
