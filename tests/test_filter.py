"""The filter's programs, packet by packet (BPF_PROG_RUN, whose interface is number 1)."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from bpf_world import loader, needs_bpf, pin_directory
from hypothesis import given
from hypothesis import strategies as st

from bpf import maps, pins, syscall
from bpf.enforcement import Enforcement
from bpf.maps import PinnedMap
from bpf.reasons import Reason
from bpf.structs import Address, Number

pytestmark = needs_bpf

ON, DROPPED = -1, 2  # TC_ACT_UNSPEC, TC_ACT_SHOT
OWN = ("10.244.0.2", "fd00:10:244::2")
# Of a pod behind another interface, and of nobody here.
OTHER, FOREIGN = ("10.244.0.3", "fd00:10:244::3"), ("192.0.2.1", "2001:db8::1")
LINK_LOCAL = "fe80::1234"
IPV4, IPV6, ARP, VLAN, LLDP = 0x0800, 0x86DD, 0x0806, 0x8100, 0x88CC
HOP_BY_HOP, TCP, UDP, FRAGMENT, ICMPV6 = 0, 6, 17, 44, 58


class Filter:
    def __init__(self, pin: Path) -> None:
        self.pin = pin
        self.programs = {
            name: syscall.pinned(str(pins.program_path(pin, name)))
            for name in ("pod_egress", "pod_ingress")
        }
        self.interfaces = PinnedMap(pin, "interfaces", Address, Number)
        for addresses, index in ((OWN, 1), (OTHER, 2)):
            for address in addresses:
                self.interfaces.put(Address.of(address), Number(index))

    def __call__(self, name: str, packet: bytes) -> tuple[int, dict[str, int]]:
        """What the program returned, and what it counted."""
        before = maps.counters(self.pin)
        verdict = syscall.run(self.programs[name], packet)
        after = maps.counters(self.pin)
        counted = {one.name: after[one] - before[one] for one in Reason if after[one] > before[one]}
        return verdict, counted


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filter]:
    with pin_directory(tmp_path_factory.mktemp("filter")) as pin:
        done = loader("--pin", pin)
        assert done.returncode == 0, done.stderr
        with contextlib.closing(Enforcement(pin, None)) as enforcement:
            enforcement.replace({})
        yield Filter(pin)


def frame(kind: int, payload: bytes) -> bytes:
    return bytes(12) + struct.pack("!H", kind) + payload


def ipv4(
    source: str, *, fragment: int = 0, options: bytes = b"", payload: bytes = bytes(8)
) -> bytes:
    first = 0x45 + len(options) // 4
    size = 20 + len(options) + len(payload)
    header = struct.pack("!BBHHHBBH", first, 0, size, 1, fragment, 64, UDP, 0)
    ends = socket.inet_aton(source) + socket.inet_aton(FOREIGN[0])
    return frame(IPV4, header + ends + options + payload)


def ipv6(source: str, next_header: int = UDP, payload: bytes = bytes(8)) -> bytes:
    header = struct.pack("!IHBB", 6 << 28, len(payload), next_header, 255)
    return frame(IPV6, header + ip_address(source).packed + ip_address(FOREIGN[1]).packed + payload)


def icmpv6(source: str, kind: int, target: str = OWN[1]) -> bytes:
    return ipv6(source, ICMPV6, bytes([kind, *bytes(7)]) + ip_address(target).packed)


def arp(sender: str, kind: int = 0x0800) -> bytes:
    """RFC 826: a reply."""
    about = struct.pack("!HHBBH", 1, kind, 6, 4, 2)
    return frame(ARP, about + bytes(6) + socket.inet_aton(sender) + bytes(6) + bytes(4))


def listener_report(source: str, kind: int = 143, *, length: int = 0) -> bytes:
    """With the router alert that RFC 3810 §5 asks for."""
    options = bytes([ICMPV6, length, 5, 2, 0, 0, 1, 0]) + bytes(8 * length)
    return ipv6(source, HOP_BY_HOP, options + bytes([kind, *bytes(27)]))


PASS = (ON, {"FILTER_FROM_POD": 1})
DROP = (DROPPED, {"SPOOFED": 1})


_CASES = {
    "own IPv4": (ipv4(OWN[0]), PASS),
    "own IPv6": (ipv6(OWN[1]), PASS),
    **{f"from {source}": (ipv4(source), DROP) for source in (OTHER[0], FOREIGN[0])},
    **{f"from {source}": (ipv6(source), DROP) for source in (OTHER[1], FOREIGN[1], LINK_LOCAL)},
    **{f"from {source}": (ipv4(source), DROP) for source in ("0.0.0.0", "127.0.0.1")},
    **{f"from {source}": (ipv6(source), DROP) for source in ("::", "::1")},
    # The maps write IPv4 addresses so.
    "mapped": (ipv6(f"::ffff:{OWN[0]}"), DROP),
    # All fragments have the fixed header, and options change nothing.
    "first fragment": (ipv4(OWN[0], fragment=0x2000), PASS),
    "last fragment": (ipv4(OWN[0], fragment=0x00B9), PASS),
    "fragment of another": (ipv4(OTHER[0], fragment=0x00B9), DROP),
    "IPv4 options": (ipv4(OWN[0], options=bytes(40)), PASS),
    "IPv4 options of another": (ipv4(OTHER[0], options=bytes(40)), DROP),
    "IPv6 fragment": (ipv6(OWN[1], FRAGMENT), PASS),
    "IPv6 fragment of another": (ipv6(OTHER[1], FRAGMENT), DROP),
    "IPv6 options": (ipv6(OWN[1], HOP_BY_HOP, bytes(16)), PASS),
    "bare IPv4 header": (ipv4(OWN[0], payload=b""), PASS),
    "bare IPv6 header": (ipv6(OWN[1], payload=b""), PASS),
    "ARP": (arp(OWN[0]), PASS),
    "ARP that asks whether an address is free": (arp("0.0.0.0"), PASS),
    **{f"ARP of {sender}": (arp(sender), DROP) for sender in (OTHER[0], FOREIGN[0])},
    "ARP of no IPv4": (arp(OWN[0], 0x86DD), DROP),
    "ARP that is cut off": (arp(OWN[0])[:40], DROP),
    # What is no IP, or hides it.
    "LLDP": (frame(LLDP, bytes(28)), DROP),
    "VLAN": (frame(VLAN, struct.pack("!HH", 0, IPV4) + ipv4(OWN[0])[14:]), DROP),
    "802.3": (frame(60, bytes(60)), DROP),
}


@pytest.mark.parametrize("case", _CASES)
def test_a_pod_sends_from_its_own_addresses(run: Filter, case: str) -> None:
    packet, outcome = _CASES[case]
    assert run("pod_egress", packet) == outcome
    # IPv6 has no such address, on no way.
    to_pod = (DROPPED, {"UNJUDGED": 1}) if case == "mapped" else (ON, {"FILTER_TO_POD": 1})
    result, counts = run("pod_ingress", packet)
    counts.pop("FROM_HOST", None)  # what has come in by no interface is the node's
    assert (result, counts) == to_pod


@pytest.mark.parametrize("source", ["::", LINK_LOCAL, "febf::1"])
def test_what_keeps_the_link_needs_no_address_of_the_pod(run: Filter, source: str) -> None:
    assert [run("pod_egress", icmpv6(source, kind)) for kind in (133, 135, 136)] == [PASS] * 3
    reports = [listener_report(source, kind) for kind in (131, 132, 143)]
    assert [run("pod_egress", packet) for packet in reports] == [PASS] * 3
    # Not what routers say, nor pings, nor what only looks like a report.
    for packet in (
        *(icmpv6(source, kind) for kind in (128, 129, 134, 137)),
        listener_report(source, 135),
        listener_report(source, length=1),
        ipv6(source, HOP_BY_HOP, bytes([UDP, 0, 5, 2, 0, 0, 1, 0, 143]) + bytes(27)),
        ipv6(source, TCP, bytes([135, *bytes(23)])),
        ipv6(source, ICMPV6, b"")[:54],
        listener_report(source)[: 14 + 40 + 8],
    ):
        assert run("pod_egress", packet) == DROP


@pytest.mark.parametrize("source", [OTHER[1], FOREIGN[1], "fec0::1", "fe00::1", "::1"])
def test_the_link_is_not_kept_in_the_name_of_others(run: Filter, source: str) -> None:
    for packet in (icmpv6(source, 135), icmpv6(source, 136), listener_report(source)):
        assert run("pod_egress", packet) == DROP


@pytest.mark.parametrize("source", [OWN[1], LINK_LOCAL, "::"])
def test_neighbours_are_not_told_of_addresses_of_others(run: Filter, source: str) -> None:
    for target in (OWN[1], LINK_LOCAL):
        assert run("pod_egress", icmpv6(source, 136, target)) == PASS
    for target in (OTHER[1], FOREIGN[1]):
        assert run("pod_egress", icmpv6(source, 136, target)) == DROP
    # Who asks says nothing of the one it asks for.
    assert run("pod_egress", icmpv6(source, 135, OTHER[1])) == PASS


@pytest.mark.parametrize("packet", [ipv4(OWN[0]), ipv6(OWN[1]), ipv6(OWN[1], HOP_BY_HOP)])
def test_packets_that_are_cut_off(run: Filter, packet: bytes) -> None:
    header = 34 if packet[12:14] == b"\x08\x00" else 54
    # The kernel itself takes no packet here that has less than its fixed IP header.
    outcomes = {}
    for size in range(14, len(packet)):
        try:
            outcomes[size] = run("pod_egress", packet[:size])[0]
        except OSError:
            outcomes[size] = DROPPED
    assert outcomes == {size: ON if size >= header else DROPPED for size in outcomes}


@given(st.binary(min_size=46, max_size=200), st.sampled_from([IPV4, IPV6]))
def test_no_packet_of_others_passes(run: Filter, payload: bytes, kind: int) -> None:
    packet = frame(kind, payload)
    source = payload[12:16] if kind == IPV4 else payload[8:24]
    allowed = source in (socket.inet_aton(OWN[0]), ip_address(OWN[1]).packed)
    verdict, _ = run("pod_egress", packet)
    assert verdict == (ON if allowed else DROPPED)
