"""Adding a pod to a node's network, checking it and removing it: CNI's ADD, CHECK and DEL.

As a CNI plugin does, these functions work from the node's network namespace, which is the calling
process's own, on the pod's namespace, which is given by path. A pod gets a veth pair and routes:

    pod:  eth0 with its addresses; default routes to 169.254.1.1 and fe80::1, which every node is
    node: a veth named after the container, with those two addresses and a route to the pod's

A pod can send from its own addresses only. The eBPF filter (bpf/podfilter.py) at the node's end of
the veth sees to that, and to policy; as long as it is not loaded, ADD fails and is to be tried
again, so no pod runs without it. Only on nodes that are never to have one there is reverse path
filtering for IPv4 and routing rules for what is forwarded of IPv6 instead. Knows nothing of labs.
Source: CNI specification 1.1.0, sections 2 and 5.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from bpf import podfilter
from bpf.errors import DatapathError
from mesh.lab.kernel import inside, write_sysctls
from mesh.model.meta import Model

CNI_VERSION = "1.1.0"
GATEWAYS = ("169.254.1.1", "fe80::1")

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_LENGTHS = (32, 128)
NODAD = 0x02  # IFA_FNODAD: usable at once; nobody else can have these addresses
_UP = 0x10001  # IFF_UP and IFF_LOWER_UP: the other end is up as well
_MAIN_TABLE = 254
# What a pod sends from its own address is routed as ever, all else from it is refused.
_RULE_PRIORITIES = (100, 101)
_BEFORE_LINKS = {
    "net.ipv6.conf.all.accept_dad": 0,
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv6.conf.default.accept_ra": 0,
    # Ports below 1024 are no privilege in a pod (the default of containerd and CRI-O).
    "net.ipv4.ip_unprivileged_port_start": 0,
}


class CniDatapath(Model, frozen=True, kw_only=True):
    """`pins`: the pin directory of the node's eBPF programs; `records`: where the agent finds this
    node's pods (bpf/podfilter.py)."""

    pins: Path
    records: Path


class CniConfig(Model, frozen=True, kw_only=True):
    """`addresses`: the pod's IPv4 and IPv6 address. `node_addresses`: those that the node uses
    toward the pod (probes). `datapath`: the node's eBPF programs, None: there will never be any."""

    addresses: tuple[str, str]
    node_addresses: tuple[str, str]
    mtu: int = 1500
    datapath: CniDatapath | None = None


class CniInterface(Model, frozen=True, kw_only=True):
    """`sandbox` is the path of the network namespace, "" the node's."""

    name: str
    mac: str
    mtu: int
    sandbox: str = ""


class CniAddress(Model, frozen=True, kw_only=True):
    """`address` with prefix length; `interface` is an index into the result's interfaces."""

    address: str
    gateway: str
    interface: int


class CniRoute(Model, frozen=True, kw_only=True):
    dst: str
    gw: str


class CniResult(Model, frozen=True, kw_only=True):
    """The success type of ADD; `msgspec.json.encode` gives CNI's JSON."""

    cni_version: str
    interfaces: tuple[CniInterface, ...]
    ips: tuple[CniAddress, ...]
    routes: tuple[CniRoute, ...]


class CniError(Exception):
    """A network that cannot be made, or is not as it should be; what, where, why."""


class NotYet(CniError):
    """It can be made later (CNI's error 11, "try again later")."""


def host_interface(container_id: str, ifname: str) -> str:
    """The name of the node's end: 15 bytes at most, the same every time."""
    digest = hashlib.sha256(f"{container_id}\0{ifname}".encode()).hexdigest()
    return f"weft{digest[:11]}"


def add(container_id: str, netns: str, ifname: str, config: CniConfig) -> CniResult:
    """ADD. CniError: it cannot be made (a pod that has it already, for one), or NotYet; nothing is
    left of the attempt."""
    host = host_interface(container_id, ifname)
    with _explained(f"pod network of {container_id}"), IPRoute() as node:
        if node.link_lookup(ifname=host):
            raise CniError(f"{container_id} has its {ifname} already: DEL it before ADD")
        try:
            with inside(netns), open("/proc/thread-self/ns/net") as there:
                write_sysctls(_BEFORE_LINKS)
                cookie = podfilter.netns_cookie()
                node.link(
                    "add",
                    ifname=host,
                    kind="veth",
                    mtu=config.mtu,
                    peer={"ifname": ifname, "mtu": config.mtu, "net_ns_fd": there.fileno()},
                )
            # Before the interface is up.
            if config.datapath is None:
                _guard_by_routing(node, host, config)
            else:
                _filter(host, config.datapath, _pod(host, config, cookie))
            with inside(netns), IPRoute() as pod:
                pod_mac = _configure_pod(pod, ifname, config)
            host_mac = _configure_node(node, host, config)
        except BaseException:
            _remove(node, host, config)
            raise
    return CniResult(
        cni_version=CNI_VERSION,
        interfaces=(
            CniInterface(name=host, mac=host_mac, mtu=config.mtu),
            CniInterface(name=ifname, mac=pod_mac, mtu=config.mtu, sandbox=netns),
        ),
        ips=tuple(
            CniAddress(address=f"{address}/{length}", gateway=gateway, interface=1)
            for address, length, gateway in zip(config.addresses, _LENGTHS, GATEWAYS, strict=True)
        ),
        routes=tuple(
            CniRoute(dst=dst, gw=gateway)
            for dst, gateway in zip(("0.0.0.0/0", "::/0"), GATEWAYS, strict=True)
        ),
    )


def check(container_id: str, netns: str, ifname: str, config: CniConfig) -> None:
    """CHECK. CniError: something that ADD made is gone or changed; the first such thing."""
    host = host_interface(container_id, ifname)
    where = f"pod network of {container_id}"
    with _explained(where), IPRoute() as node:
        _check_link(node, host, f"{where}: on the node")
        for family, address, length in zip(_FAMILIES, config.addresses, _LENGTHS, strict=True):
            if not _has_route(node, family, address, length, host):
                raise CniError(f"{where}: on the node: no route to {address} through {host}")
        with inside(netns):
            cookie = podfilter.netns_cookie()
        if amiss := _unguarded(node, host, config, cookie):
            raise CniError(f"{where}: on the node: {amiss}")
        with inside(netns), IPRoute() as pod:
            _check_link(pod, ifname, f"{where}: in {netns}")
            index = pod.link_lookup(ifname=ifname)[0]
            have = {one.get("address") for one in pod.get_addr(index=index)}
            for family, address, gateway in zip(_FAMILIES, config.addresses, GATEWAYS, strict=True):
                if address not in have:
                    raise CniError(f"{where}: in {netns}: {ifname} has no address {address}")
                routes = pod.get_default_routes(family)
                if not any(route.get("gateway") == gateway for route in routes):
                    raise CniError(f"{where}: in {netns}: no default route to {gateway}")


def delete(container_id: str, ifname: str, config: CniConfig) -> None:
    """DEL: remove what ADD made, whatever is left of it; the pod's namespace may be gone."""
    with _explained(f"pod network of {container_id}"), IPRoute() as node:
        _remove(node, host_interface(container_id, ifname), config)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise CniError(f"{what}: the kernel refuses it: {error}") from error
    except DatapathError as error:
        raise CniError(f"{what}: {error}") from error
    except OSError as error:
        raise CniError(f"{what}: {error.filename or 'the kernel'}: {error.strerror}") from error


def _configure_pod(pod: Any, ifname: str, config: CniConfig) -> str:
    """From inside the pod; the interface's MAC address."""
    pod.link("set", index=1, state="up")
    index = pod.link_lookup(ifname=ifname)[0]
    pod.link("set", index=index, state="up")
    for family, address, length in zip(_FAMILIES, config.addresses, _LENGTHS, strict=True):
        pod.addr("add", index=index, address=address, prefixlen=length, flags=_flags(family))
    pod.route("add", dst=f"{GATEWAYS[0]}/32", oif=index, scope="link")
    for family, gateway in zip(_FAMILIES, GATEWAYS, strict=True):
        pod.route("add", family=family, dst="default", gateway=gateway, oif=index)
    return _mac(pod, index)


def _configure_node(node: Any, host: str, config: CniConfig) -> str:
    index = node.link_lookup(ifname=host)[0]
    node.link("set", index=index, state="up")
    for family, gateway, length in zip(_FAMILIES, GATEWAYS, (32, 64), strict=True):
        node.addr("add", index=index, address=gateway, prefixlen=length, flags=_flags(family))
    routes = zip(_FAMILIES, config.addresses, _LENGTHS, config.node_addresses, strict=True)
    for family, address, length, source in routes:
        node.route("add", family=family, dst=f"{address}/{length}", oif=index, prefsrc=source)
    return _mac(node, index)


def _pod(host: str, config: CniConfig, cookie: int) -> podfilter.Pod:
    return podfilter.Pod(interface=host, addresses=config.addresses, cookie=cookie)


def _filter(host: str, where: CniDatapath, pod: podfilter.Pod) -> None:
    if not podfilter.add(where.pins, where.records, pod):
        raise NotYet(
            f"{host}: the eBPF programs that enforce policy are not loaded on this node yet "
            "(weft status says why); the pod cannot run before they are"
        )


def _guard_by_routing(node: Any, host: str, config: CniConfig) -> None:
    write_sysctls({f"net.ipv4.conf.{host}.rp_filter": 1})
    v6, (own, other) = {"family": socket.AF_INET6, "iifname": host}, _RULE_PRIORITIES
    node.rule("add", priority=own, src=config.addresses[1], src_len=128, table=_MAIN_TABLE, **v6)
    node.rule("add", priority=other, action="prohibit", **v6)


def _unguarded(node: Any, host: str, config: CniConfig, cookie: int) -> str | None:
    """Why the pod could send from other addresses than its own; None: it cannot."""
    if config.datapath is not None:
        return podfilter.check(config.datapath.pins, _pod(host, config, cookie))
    rules = node.get_rules(family=socket.AF_INET6, iifname=host)
    if tuple(sorted(rule.get("priority") for rule in rules)) == _RULE_PRIORITIES:
        return None
    return "the rules against spoofing are gone"


def _flags(family: int) -> int:
    return NODAD if family == socket.AF_INET6 else 0


def _mac(netlink: Any, index: int) -> str:
    return str(netlink.get_links(index)[0].get("address"))


def _check_link(netlink: Any, name: str, where: str) -> None:
    found = netlink.link_lookup(ifname=name)
    if not found:
        raise CniError(f"{where}: no interface {name}")
    if netlink.get_links(found[0])[0]["flags"] & _UP != _UP:
        raise CniError(f"{where}: {name} is not up")


def _has_route(netlink: Any, family: int, address: str, length: int, link: str) -> bool:
    index = netlink.link_lookup(ifname=link)[0]
    routes = netlink.get_routes(family=family, oif=index)
    return any(one.get("dst") == address and one.get("dst_len") == length for one in routes)


def _remove(node: Any, host: str, config: CniConfig) -> None:
    for index in node.link_lookup(ifname=host):
        try:
            node.link("del", index=index)
        except NetlinkError:
            if node.link_lookup(ifname=host):  # else it went with the pod's namespace just now
                raise
    # Rules name interfaces and so outlive them.
    for rule in list(node.get_rules(family=socket.AF_INET6, iifname=host)):
        priority = rule.get("priority")
        node.rule("del", family=socket.AF_INET6, iifname=host, priority=priority)
    if config.datapath is not None:
        podfilter.remove(config.datapath.pins, config.datapath.records, host)
