"""A node with two pods behind the filter, and a machine elsewhere that can send whatever it likes.

    out  eth0  10.7.0.2, fd07::2, and on lo whatever else it is asked to be
    node eth0  10.7.0.1, fd07::1; 10.8.0.1 and fd08::1 on lo; a route to each pod
    a, b       10.9.0.2 and fd09::2, 10.9.0.3 and fd09::3

Real namespaces, links, programs and sockets; the test's own process makes them all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from bpf_world import loader, new_cgroup, pin_directory
from pyroute2 import IPRoute

from bpf import maps
from bpf.enforcement import EnforcedSection, Enforcement
from bpf.reasons import Reason
from bpf.structs import Flow, FlowKey
from mesh.lab import cni
from mesh.lab.kernel import create_netns, inside, remove_netns, write_sysctls

NODE = {4: "10.8.0.1", 6: "fd08::1"}
LINK = {4: "10.7.0.1", 6: "fd07::1"}
OUT = {4: "10.7.0.2", 6: "fd07::2"}
A = {4: "10.9.0.2", 6: "fd09::2"}
B = {4: "10.9.0.3", 6: "fd09::3"}
PODS = {"a": A, "b": B}
_TCP_CLOSE = 7  # include/net/tcp_states.h
TIMEOUT_S = 5
_PASSED = {
    Reason.FILTER_FROM_POD,
    Reason.FILTER_TO_POD,
    Reason.PASSED,
    Reason.BALANCED,
    Reason.ANSWERED,
    Reason.TO_PROXY,
    Reason.TO_RELAY,
    Reason.PLAIN,
    Reason.FROM_HOST,
    # Nobody reads of them here, and there is a bound.
    Reason.EVENTS_LOST,
    Reason.UNTOLD,
}
_NODAD = 0x02
_ROUTER = {
    "net.ipv6.conf.all.accept_dad": 0,
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv4.ip_forward": 1,
    "net.ipv6.conf.all.forwarding": 1,
    # So that a forged source gets as far as the filter.
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
}


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


class Outcome(NamedTuple):
    """What became of an attempt, and what the filter counted besides packets that passed."""

    what: str
    counted: Mapping[str, int]


class PodWorld:
    """Namespaces "node", "out", "a" and "b"; `enforce` what is to be in force."""

    def __init__(
        self,
        pin: Path,
        names: Mapping[str, Path],
        cgroup: Path | None,
        proxies: Path | None,
    ) -> None:
        self.pin = pin
        self.cgroup = cgroup
        self.proxies = proxies
        self.names = names
        self.configs: dict[str, cni.CniConfig] = {}
        self.enforcement = Enforcement(pin, "n1")

    def replace_agent(self, *, mtls: bool) -> None:
        self.enforcement.close()
        self.enforcement = Enforcement(self.pin, "n1", mtls=mtls)

    def enforce(self, sections: Mapping[str, EnforcedSection]) -> None:
        assert self.enforcement.replace(sections) == {}

    def inside(self, where: str) -> contextlib.AbstractContextManager[None]:
        return inside(self.names[where])

    def steered(self) -> contextlib.AbstractContextManager[None]:
        """Sockets that are made in here are workloads'."""
        return self._within(self.cgroup)

    def proxying(self) -> contextlib.AbstractContextManager[None]:
        """Those that are made in here are the proxy's."""
        return self._within(self.proxies)

    @contextlib.contextmanager
    def _within(self, cgroup: Path | None) -> Iterator[None]:
        assert cgroup is not None
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next(line for line in lines if line.startswith("0::/"))
        home = cgroup.parent / own.removeprefix("0::/")
        (cgroup / "cgroup.procs").write_text("0")
        try:
            yield
        finally:
            (home / "cgroup.procs").write_text("0")

    def socket(self, where: str, address: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """Of the address's family, not bound yet; a workload's where those are steered."""
        workload = self.cgroup is not None and where in PODS
        with self.inside(where), self.steered() if workload else contextlib.nullcontext():
            made = socket.socket(family_of(address), kind)
        made.settimeout(TIMEOUT_S)
        return made

    def listen(self, where: str, address: str, port: int = 0) -> socket.socket:
        with self.inside(where):
            server = socket.create_server((address, port), family=family_of(address))
        server.settimeout(TIMEOUT_S)
        return server

    def udp(self, where: str, address: str, port: int = 0) -> socket.socket:
        made = self.socket(where, address, socket.SOCK_DGRAM)
        made.bind((address, port))
        return made

    def connect(self, where: str, server: socket.socket, source: str = "") -> socket.socket:
        """A new connection to a server, from an address of its own. OSError."""
        return self.connect_to(where, *server.getsockname()[:2], source)

    def connect_to(self, where: str, address: str, port: int, source: str = "") -> socket.socket:
        made = self.socket(where, address)
        try:
            made.bind((source, 0))
            made.connect((address, port))
        except OSError:
            made.close()
            raise
        return made

    @contextlib.contextmanager
    def connection(
        self, where: str, server: socket.socket
    ) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Both ends of a new one, the opener's first."""
        with self.connect(where, server) as client, server.accept()[0] as accepted:
            accepted.settimeout(TIMEOUT_S)
            # What was not acknowledged would be sent again after the end, and judged and counted.
            for one in (client, accepted):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            yield client, accepted

    def attempt(self, where: str, server: socket.socket, source: str = "") -> Outcome:
        """To connect and be answered: "answered", or the name of the errno."""
        before = self.counters()
        try:
            with self.connect(where, server, source) as client, server.accept()[0] as accepted:
                accepted.sendall(b"answer")
                what = "answered" if client.recv(6) == b"answer" else "closed"
                _end(client, accepted)
        except OSError as error:
            what = errno.errorcode.get(error.errno or 0, "timeout")
        return Outcome(what, self.counted(before))

    def counters(self) -> dict[Reason, int]:
        return maps.counters(self.pin)

    def await_counted(self, before: Mapping[Reason, int], reason: str) -> None:
        """Until the filter has given a reason; once a packet is counted, it is dropped."""
        deadline = time.monotonic() + TIMEOUT_S
        while not self.counted(before):
            assert time.monotonic() < deadline, "the filter has refused nothing"
        assert self.counted(before) == {reason: 1}

    def counted(self, before: Mapping[Reason, int]) -> dict[str, int]:
        after = maps.counters(self.pin)
        return {
            one.name: after[one] - before[one]
            for one in set(Reason) - _PASSED
            if after[one] > before[one]
        }

    def pass_on(self, sender: socket.socket, receiver: socket.socket, message: bytes) -> None:
        """A datagram, and its answer."""
        sender.sendto(message, receiver.getsockname()[:2])
        data, source = receiver.recvfrom(100)
        assert data == message
        receiver.sendto(b"re " + message, source[:2])
        assert sender.recv(100) == b"re " + message

    def forget_flows(self) -> None:
        """As when the map was full, or another version's."""
        flows = maps.PinnedMap(self.pin, "flows", FlowKey, Flow)
        for key, _ in list(flows.items()):
            flows.remove(key)
        flows.close()

    def add_address(self, where: str, address: str) -> None:
        """On the loopback interface."""
        with self.inside(where), IPRoute() as netlink:
            _add(netlink, 1, address, ip_address(address).max_prefixlen)


def _end(client: socket.socket, accepted: socket.socket) -> None:
    """In order, until nothing of the connection is on its way: by the rules that come next its last
    packets would be judged anew, and counted."""
    client.shutdown(socket.SHUT_WR)
    assert accepted.recv(1) == b""
    accepted.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    deadline = time.monotonic() + TIMEOUT_S
    # The first byte of TCP_INFO is the state.
    while accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_CLOSE:
        assert time.monotonic() < deadline, "the last FIN is not acknowledged"


def _add(netlink: IPRoute, index: int, address: str, length: int) -> None:
    netlink.addr(
        "replace",
        index=index,
        address=address,
        prefixlen=length,
        flags=_NODAD if ":" in address else 0,
    )


@contextlib.contextmanager
def pod_world(parent: Path, *, steer: bool = False) -> Iterator[PodWorld]:
    """`steer`: the programs for sockets are attached too."""
    with contextlib.ExitStack() as stack:
        pin = stack.enter_context(pin_directory(parent))
        cgroup, proxies = (stack.enter_context(new_cgroup()) if steer else None for _ in "wp")
        more = ("--cgroup", cgroup, "--proxy-cgroup", proxies) if steer else ()
        done = loader("--pin", pin, *more)
        assert done.returncode == 0, done.stderr
        datapath = cni.CniDatapath(pins=pin, records=parent / "pods")
        names = {
            name: Path(f"/run/netns/weft-test-{os.getpid()}-{name}")
            for name in ("node", "out", *PODS)
        }
        for path in names.values():
            create_netns(path)
            stack.callback(remove_netns, path)
        world = PodWorld(pin, names, cgroup, proxies)
        stack.callback(world.enforcement.close)
        with world.inside("node"):
            write_sysctls(_ROUTER)
            _link(world)
        for name, (v4, v6) in {name: tuple(one.values()) for name, one in PODS.items()}.items():
            config = cni.CniConfig(
                addresses=(v4, v6), node_addresses=(NODE[4], NODE[6]), datapath=datapath
            )
            world.configs[name] = config
            with world.inside("node"):
                cni.add(name, str(names[name]), "eth0", config)
                stack.callback(_delete, world, name, config)
        world.enforce({})
        # Links that have just come up lose packets (their queues come a moment later).
        for name, at in (*PODS.items(), ("node", LINK)):
            for address in at.values():
                with world.listen(name, address) as server:
                    assert world.attempt("out", server).what == "answered"
        yield world


def _delete(world: PodWorld, name: str, config: cni.CniConfig) -> None:
    with world.inside("node"):
        cni.delete(name, "eth0", config)


def _link(world: PodWorld) -> None:
    """Between the node, where this is called, and elsewhere."""
    with IPRoute() as netlink:
        with world.inside("out"), open("/proc/thread-self/ns/net") as there:
            write_sysctls(_ROUTER)
            peer = {"ifname": "eth0", "net_ns_fd": there.fileno()}
            number = there.fileno()
            with world.inside("node"):
                netlink.link("add", ifname="eth0", kind="veth", peer={**peer, "net_ns_fd": number})
        index = netlink.link_lookup(ifname="eth0")[0]
        for one in (1, index):
            netlink.link("set", index=one, state="up")
        for address, own, length in zip(LINK.values(), NODE.values(), (24, 64), strict=True):
            _add(netlink, index, address, length)
            _add(netlink, 1, own, 32 if length == 24 else 128)
    with world.inside("out"), IPRoute() as netlink:
        index = netlink.link_lookup(ifname="eth0")[0]
        for one in (1, index):
            netlink.link("set", index=one, state="up")
        for version, length in ((4, 24), (6, 64)):
            _add(netlink, index, OUT[version], length)
            family = socket.AF_INET if version == 4 else socket.AF_INET6
            netlink.route("add", family=family, dst="default", gateway=LINK[version])
    for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
        with IPRoute() as netlink:
            netlink.route("add", family=family, dst="default", gateway=OUT[version])


def send_raw(world: PodWorld, where: str, packet: bytes, destination: str) -> None:
    """A whole IP packet from a namespace."""
    family = family_of(destination)
    with world.inside(where), socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(packet, (destination, 0))


def arrived(sock: socket.socket) -> bool:
    """Whether something is there to be read now."""
    return bool(select.select([sock], [], [], 0)[0])


def checksum(data: bytes) -> int:
    """RFC 1071."""
    words = struct.unpack(f"!{len(data) // 2}H", data)
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
