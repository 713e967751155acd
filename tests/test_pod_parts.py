"""What is hard to judge at a pod's interface: fragments, headers between, errors about packets."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from bpf_world import needs_bpf
from pod_policies import KNOWN, VERSIONS, allow, only, policy
from pod_world import OUT, B, PodWorld, arrived, checksum, pod_world
from pyroute2.nftables.expressions import genex
from pyroute2.nftables.main import NFTables

from mesh.lab.kernel import write_sysctls
from mesh.model.nodeconfig import WorkloadSection
from mesh.model.policyconfig import PortRange

pytestmark = needs_bpf

UDP, FRAGMENT, DESTINATION, ROUTING = 17, 44, 60, 43
OPEN, SHUT = 7030, 7031
IPV6_RAW = 255


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodWorld]:
    with pod_world(tmp_path_factory.mktemp("parts")) as world:
        yield world


@pytest.fixture(autouse=True)
def in_force(world: PodWorld) -> None:
    """One port of b is open to everybody."""
    port = PortRange("UDP", OPEN, OPEN)
    world.enforce({**KNOWN, **policy(ingress=only(allow(None, port)))})


def udp(version: int, port: int, payload: bytes) -> bytes:
    """From port 7000; without a checksum for IPv4, with one for IPv6."""
    header = struct.pack("!HHHH", 7000, port, 8 + len(payload), 0)
    if version == 4:
        return header + payload
    ends = ip_address(OUT[6]).packed + ip_address(B[6]).packed
    pseudo = ends + struct.pack("!II", 8 + len(payload), UDP)
    data = header + payload
    return header[:6] + struct.pack("!H", checksum(pseudo + data + bytes(len(data) % 2))) + payload


def ip(
    version: int,
    payload: bytes,
    *,
    protocol: int = UDP,
    fragment: int = 0,
    number: int = 1,
    options: bytes = b"",
    hops: int = 64,
) -> bytes:
    """From out to b. `fragment`: offset in bytes, plus 1 if more follow; of IPv6 in a header of its
    own. `options`: of IPv4."""
    if version == 4:
        flags = fragment >> 3 | (fragment & 1) << 13
        first = 0x45 + len(options) // 4
        size = 20 + len(options) + len(payload)
        header = struct.pack("!BBHHHBBH", first, 0, size, number, flags, hops, protocol, 0)
        return header + socket.inet_aton(OUT[4]) + socket.inet_aton(B[4]) + options + payload
    if fragment:
        payload = struct.pack("!BBHI", protocol, 0, fragment, number) + payload
        protocol = FRAGMENT
    header = struct.pack("!IHBB", 6 << 28, len(payload), protocol, hops)
    return header + ip_address(OUT[6]).packed + ip_address(B[6]).packed + payload


def send(world: PodWorld, version: int, *packets: bytes) -> None:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with world.inside("out"), socket.socket(family, socket.SOCK_RAW, IPV6_RAW) as raw:
        if version == 6:
            raw.setsockopt(socket.IPPROTO_IPV6, 36, 1)  # IPV6_HDRINCL
        for packet in packets:
            raw.sendto(packet, (B[version], 0))


def refused(world: PodWorld, version: int, packet: bytes, reason: str) -> None:
    before = world.counters()
    send(world, version, packet)
    world.await_counted(before, reason)


@pytest.mark.parametrize("version", VERSIONS)
def test_fragments_follow_their_first_one(world: PodWorld, version: int) -> None:
    payload = bytes(range(64))
    for port, number in ((OPEN, 11), (SHUT, 12)):
        data = udp(version, port, payload)
        first = ip(version, data[:32], fragment=0 | 1, number=number)
        middle = ip(version, data[32:48], fragment=32 | 1, number=number)
        last = ip(version, data[48:], fragment=48, number=number)
        with world.udp("b", B[version], port) as server:
            # Alone they say nothing.
            refused(world, version, last, "UNJUDGED")
            if port == SHUT:
                refused(world, version, first, "POLICY_DENIED")
                refused(world, version, last, "UNJUDGED")
                assert not arrived(server)
                continue
            send(world, version, first, middle, last)
            assert server.recv(100) == payload
            # Nor does the number of a packet open a way for another first fragment.
            other = udp(version, SHUT, payload)
            refused(
                world, version, ip(version, other[:32], fragment=1, number=number), "POLICY_DENIED"
            )
    tiny = ip(version, bytes(8), protocol=socket.IPPROTO_TCP, fragment=0 | 1, number=11)
    refused(world, version, tiny, "UNJUDGED")


@pytest.mark.parametrize("version", VERSIONS)
def test_fragments_to_a_strict_pod(world: PodWorld, version: int) -> None:
    known = KNOWN["workload/shop/b"]
    strict = WorkloadSection(
        "shop", "b", known.addresses, "n1", local=True, identity=301, mtls="STRICT"
    )
    world.enforce({**KNOWN, "workload/shop/b": strict})
    data = udp(version, OPEN, bytes(64))
    refused(world, version, ip(version, data[:32], fragment=1, number=21), "MTLS_REQUIRED")
    refused(world, version, ip(version, data[32:], fragment=32, number=21), "UNJUDGED")
    # A pod that anybody may reach gets its fragments in any order.
    world.enforce(KNOWN)
    with world.udp("b", B[version], OPEN) as server:
        send(
            world,
            version,
            ip(version, data[32:], fragment=32, number=22),
            ip(version, data[:32], fragment=1, number=22),
        )
        assert server.recv(100) == bytes(64)


@pytest.mark.parametrize("version", VERSIONS)
def test_headers_between_hide_no_port(world: PodWorld, version: int) -> None:
    with world.udp("b", B[version], OPEN) as server, world.udp("b", B[version], SHUT) as shut:
        if version == 4:
            no_operation = bytes([1, 1, 1, 1])
            packets = [
                ip(4, udp(4, port, b"behind"), options=no_operation) for port in (OPEN, SHUT)
            ]
        else:
            packets = [
                ip(
                    6,
                    struct.pack("!BBHI", UDP, 0, 0x0104, 0) + udp(6, port, b"behind"),
                    protocol=DESTINATION,
                )
                for port in (OPEN, SHUT)
            ]
        send(world, version, packets[0])
        assert server.recv(100) == b"behind"
        refused(world, version, packets[1], "POLICY_DENIED")
        assert not arrived(shut)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_goes_on_from_where_it_is_sent_to(world: PodWorld, version: int) -> None:
    """A route in the packet itself leads elsewhere than policy was asked about."""
    data = udp(version, OPEN, b"and on")
    if version == 4:
        further = socket.inet_aton("192.0.2.9")
        routed = ip(4, data, options=bytes([1, 131, 7, 4]) + further)
        ended = ip(4, data, options=bytes([1, 1, 1, 0]))
        with world.inside("node"):  # else Linux itself drops such packets
            write_sysctls({"net.ipv4.conf.all.accept_source_route": 1})
    else:

        def route(segments: int) -> bytes:
            return ip(6, struct.pack("!BBBBI", UDP, 0, 4, segments, 0) + data, protocol=ROUTING)

        routed, ended = route(1), route(0)
    with world.udp("b", B[version], OPEN) as server:
        refused(world, version, routed, "UNJUDGED")
        send(world, version, ended)
        if version == 4:
            assert server.recv(100) == b"and on"


@pytest.mark.parametrize("anew", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_fragments_that_netfilter_puts_together_and_takes_apart(
    world: PodWorld, version: int, anew: bool
) -> None:
    """As on nodes with kube-proxy. They have not become the node's own thereby. `anew`: headers of
    the first part alone leave the kernel no room in the others, so that it makes new packets."""
    options = {4: bytes([1]) * 40, 6: bytes((FRAGMENT, 30, 0x1E, 244)) + bytes(244)}[version]
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    with world.inside("node"), NFTables(nfgen_family=family) as nft:
        nft.table("add", name="t")
        nft.chain("add", table="t", name="c", hook="prerouting", type="filter", policy=1)
        state = genex("ct", {"KEY": 0, "DREG": 1})
        nft.rule("add", table="t", chain="c", expressions=([state],))
    try:
        for port in (SHUT, OPEN):
            data = udp(version, port, bytes(1600))
            first = ip(version, data[:800], fragment=1, number=port)
            if anew and version == 4:
                first = ip(4, data[:800], fragment=1, number=port, options=options)
            elif anew:
                inner = struct.pack("!BBHI", UDP, 0, 1, port) + data[:800]
                first = ip(6, options + inner, protocol=DESTINATION)
            parts = (first, ip(version, data[800:], fragment=800, number=port))
            with world.udp("b", B[version], port) as server:
                before = world.counters()
                send(world, version, *parts)
                if port == SHUT:
                    world.await_counted(before, "POLICY_DENIED")
                    assert not arrived(server)
                else:
                    assert server.recv(2000) == bytes(1600)
        with world.udp("b", B[version], SHUT) as server, world.inside("node"):
            with socket.socket(family, socket.SOCK_DGRAM) as node:
                node.sendto(bytes(3000), (B[version], SHUT))
            assert server.recv(4000) == bytes(3000)
    finally:
        with world.inside("node"), NFTables(nfgen_family=family) as nft:
            nft.table("del", name="t")


def test_a_chain_of_headers_that_is_too_long(world: PodWorld) -> None:
    chain = b"".join(struct.pack("!BBHI", DESTINATION, 0, 0x0104, 0) for _ in range(4))
    chain += struct.pack("!BBHI", UDP, 0, 0x0104, 0)
    packet = ip(6, chain + udp(6, OPEN, b"deep"), protocol=DESTINATION)
    refused(world, 6, packet, "UNJUDGED")
    world.enforce(KNOWN)
    with world.udp("b", B[6], OPEN) as server:
        send(world, 6, packet)
        assert server.recv(100) == b"deep"


@pytest.mark.parametrize("version", VERSIONS)
def test_packets_at_the_end_of_their_life(world: PodWorld, version: int) -> None:
    """TTL 1 when they reach the pod: judged as any other."""
    with world.udp("b", B[version], OPEN) as server:
        send(world, version, ip(version, udp(version, OPEN, b"last hop"), hops=2))
        assert server.recv(100) == b"last hop"
        refused(
            world, version, ip(version, udp(version, SHUT, b"last hop"), hops=2), "POLICY_DENIED"
        )


@pytest.mark.parametrize("version", VERSIONS)
def test_errors_about_what_was_sent(world: PodWorld, version: int) -> None:
    """That a port is not there is told to a pod which nothing may reach; what only claims to be
    about its packets is not."""
    world.enforce({**KNOWN, **policy(ingress=only())})
    with world.udp("b", B[version]) as b:
        b.connect((OUT[version], 9))
        b.send(b"is anybody there?")
        with pytest.raises(ConnectionRefusedError):
            b.recv(10)
    kind, code, protocol = (3, 3, socket.IPPROTO_ICMP) if version == 4 else (1, 4, 58)
    # As if b had sent from port 7001 to 7000.
    about = ip(version, udp(version, 7000, b""))
    size = 20 if version == 4 else 40
    ends = about[size - 8 : size] if version == 4 else about[size - 32 : size]
    half = len(ends) // 2
    about = about[: size - len(ends)] + ends[half:] + ends[:half]
    about += struct.pack("!HHHH", 7001, 7000, 8, 0)
    error = struct.pack("!BBHI", kind, code, 0, 0) + about
    refused(world, version, ip(version, error, protocol=protocol), "POLICY_DENIED")
