"""ADD, CHECK and DEL on the real kernel, in namespaces of their own; with the filter and without.

Needs root, with the filter also eBPF.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from bpf_world import loader, needs_bpf, new_cgroup, pin_directory
from lab_world import needs_root
from pyroute2 import IPRoute

from bpf import attach, pins, podfilter, syscall
from bpf.enforcement import Enforcement
from bpf.maps import PinnedMap, counters
from bpf.reasons import Reason
from bpf.structs import Address, Addresses, Number
from mesh.lab import cni
from mesh.lab.kernel import create_netns, inside, remove_netns

pytestmark = needs_root

ADDRESSES = ("10.9.0.2", "fd09::2")
ID = "pod-1"
_STATIC = 4  # RTPROT_STATIC


@pytest.fixture(
    scope="module",
    params=["routing", pytest.param("filter", marks=needs_bpf)],
)
def config(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[cni.CniConfig]:
    config = cni.CniConfig(addresses=ADDRESSES, node_addresses=("10.8.0.1", "fd08::1"), mtu=1400)
    if request.param == "routing":
        yield config
        return
    with pin_directory(tmp_path_factory.mktemp("cni")) as directory:
        done = loader("--pin", directory)
        assert done.returncode == 0, done.stderr
        datapath = cni.CniDatapath(pins=directory, records=directory.with_name("pods"))
        yield msgspec.structs.replace(config, datapath=datapath)


@pytest.fixture
def pod(config: cni.CniConfig) -> Iterator[str]:
    """A pod's namespace, while the test itself is in a node's."""
    prefix = f"/run/netns/weft-test-{os.getpid()}"
    node, pod = Path(f"{prefix}-node"), Path(f"{prefix}-pod")
    with contextlib.ExitStack() as stack:
        for path in (node, pod):
            create_netns(path)
            stack.callback(remove_netns, path)
        stack.enter_context(inside(node))
        with IPRoute() as netlink:
            netlink.link("set", index=1, state="up")
            netlink.addr("add", index=1, address="10.8.0.1", prefixlen=32)
            # It could not be a source before the kernel has looked for another one's (DAD).
            netlink.addr("add", index=1, address="fd08::1", prefixlen=128, flags=cni.NODAD)
        stack.callback(cni.delete, ID, "eth0", config)
        yield str(pod)


def state(config: cni.CniConfig) -> tuple[object, ...]:
    """The node's links, how many routes (the kernel's own aside) and rules it has, and what the
    filter has of pods: records, pinned links, and entries of maps."""
    with IPRoute() as netlink:
        links = {link.get("ifname") for link in netlink.get_links()}
        routes = list(netlink.get_routes(proto=_STATIC))
        rules = list(netlink.get_rules())
    return links, len(routes), len(rules), *filter_state(config)


def filter_state(config: cni.CniConfig) -> tuple[object, ...]:
    if config.datapath is None:
        return ()
    directory, records = config.datapath.pins, config.datapath.records
    interfaces = PinnedMap(directory, "interfaces", Address, Number)
    namespaces = PinnedMap(directory, "namespaces", Number, Addresses)
    with contextlib.closing(interfaces), contextlib.closing(namespaces):
        pinned = {path.name for path in (directory / "links").glob("weft*")}
        recorded = {path.name for path in records.iterdir()} if records.exists() else set()
        return recorded, pinned, dict(interfaces.items()), dict(namespaces.items())


def test_add_says_what_it_made_as_cni_does(pod: str, config: cni.CniConfig) -> None:
    result = msgspec.json.decode(msgspec.json.encode(cni.add(ID, pod, "eth0", config)))
    host, inner = result.pop("interfaces")
    assert result == {
        "cniVersion": "1.1.0",
        "ips": [
            {"address": "10.9.0.2/32", "gateway": "169.254.1.1", "interface": 1},
            {"address": "fd09::2/128", "gateway": "fe80::1", "interface": 1},
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
    }
    assert (inner["name"], inner["sandbox"], inner["mtu"]) == ("eth0", pod, 1400)
    assert (host["name"], host["sandbox"]) == (cni.host_interface(ID, "eth0"), "")
    for where, one in ((None, host), (pod, inner)):
        with inside(where) if where else contextlib.nullcontext(), IPRoute() as netlink:
            link = netlink.get_links(netlink.link_lookup(ifname=one["name"])[0])[0]
            assert (link.get("address"), link.get("mtu")) == (one["mac"], 1400)
    cni.check(ID, pod, "eth0", config)


def test_add_twice_is_refused_and_changes_nothing(pod: str, config: cni.CniConfig) -> None:
    cni.add(ID, pod, "eth0", config)
    before = state(config)
    with pytest.raises(cni.CniError, match="pod-1 has its eth0 already: DEL it before ADD"):
        cni.add(ID, pod, "eth0", config)
    assert state(config) == before
    cni.check(ID, pod, "eth0", config)


@pytest.mark.parametrize(
    ("netns", "change", "error"),
    [
        ("/run/netns/none", {}, "pod network of pod-1: /run/netns/none: No such file"),
        (None, {"mtu": 7}, "pod network of pod-1: "),
        (
            None,
            {"node_addresses": ("10.7.7.7", "fd08::1")},
            "pod network of pod-1: the kernel refuses it",
        ),
    ],
)
def test_add_that_fails_leaves_nothing(
    pod: str, config: cni.CniConfig, netns: str | None, change: dict[str, object], error: str
) -> None:
    before = state(config)
    with pytest.raises(cni.CniError, match=error):
        cni.add(ID, netns or pod, "eth0", msgspec.structs.replace(config, **change))
    assert state(config) == before
    cni.add(ID, pod, "eth0", config)


def test_del_removes_all_of_it_any_number_of_times(pod: str, config: cni.CniConfig) -> None:
    before = state(config)
    cni.delete(ID, "eth0", config)
    cni.add(ID, pod, "eth0", config)
    assert state(config) != before
    for _ in range(2):
        cni.delete(ID, "eth0", config)
        assert state(config) == before


def test_del_after_the_namespace_is_gone(pod: str, config: cni.CniConfig) -> None:
    before = state(config)
    cni.add(ID, pod, "eth0", config)
    remove_netns(Path(pod))
    cni.delete(ID, "eth0", config)
    assert state(config) == before


def test_del_leaves_other_pods_alone(pod: str, config: cni.CniConfig) -> None:
    cni.add(ID, pod, "eth0", config)
    cni.delete("pod-2", "eth0", config)
    cni.delete(ID, "eth1", config)
    cni.check(ID, pod, "eth0", config)


@pytest.mark.parametrize(
    ("where", "command", "error"),
    [
        ("pod", "link set eth0 down", "on the node: weft.* is not up"),
        ("pod", "link del eth0", "on the node: no interface weft"),
        ("pod", "addr del 10.9.0.2/32 dev eth0", "eth0 has no address 10.9.0.2"),
        ("pod", "addr del fd09::2/128 dev eth0", "eth0 has no address fd09::2"),
        ("pod", "-6 route del default", "no default route to fe80::1"),
        ("node", "route del 10.9.0.2", "on the node: no route to 10.9.0.2"),
        ("node", "-6 route del fd09::2", "on the node: no route to fd09::2"),
    ],
)
def test_check_finds_what_is_amiss(
    pod: str, config: cni.CniConfig, where: str, command: str, error: str
) -> None:
    cni.add(ID, pod, "eth0", config)
    with inside(pod) if where == "pod" else contextlib.nullcontext():
        subprocess.run(["ip", *command.split()], check=True)
    with pytest.raises(cni.CniError, match=error):
        cni.check(ID, pod, "eth0", config)


def test_check_finds_that_the_pod_is_not_guarded(pod: str, config: cni.CniConfig) -> None:
    host = cni.host_interface(ID, "eth0")

    def amiss() -> str:
        with pytest.raises(cni.CniError, match="pod network of pod-1: on the node: ") as refused:
            cni.check(ID, pod, "eth0", config)
        return str(refused.value).removeprefix("pod network of pod-1: on the node: ")

    cni.add(ID, pod, "eth0", config)
    if config.datapath is None:
        subprocess.run(["ip", "-6", "rule", "del", "priority", "101"], check=True)
        assert amiss() == "the rules against spoofing are gone"
        return
    directory = config.datapath.pins
    interfaces = PinnedMap(directory, "interfaces", Address, Number)
    namespaces = PinnedMap(directory, "namespaces", Number, Addresses)
    with contextlib.closing(interfaces), contextlib.closing(namespaces):
        v4, v6 = map(Address.of, ADDRESSES)
        namespaces.put(next(namespaces.items())[0], Addresses(v6.packed, v4.packed))
        assert amiss() == "the filter does not know the network namespace"
        interfaces.put(v6, Number(9999))
        assert amiss() == f"the filter does not know fd09::2 behind {host}"
        interfaces.remove(v4)
        assert amiss() == f"the filter does not know 10.9.0.2 behind {host}"
    link = pins.link_path(directory, f"{host}_pod_egress")
    link.unlink()
    assert amiss() == f"the filter pod_egress is not attached to {host}"
    # One that filters another interface does not count.
    os.link(pins.link_path(directory, f"{host}_pod_ingress"), link)
    assert amiss() == f"the filter pod_egress is not attached to {host}"


def attached(path: Path) -> int:
    """The id of the program of a pinned link."""
    link = syscall.pinned(str(path))
    try:
        return syscall.tcx_link(link).program
    finally:
        os.close(link)


@needs_bpf
def test_a_new_program_takes_the_place_of_the_old_one(pod: str, config: cni.CniConfig) -> None:
    if config.datapath is None:
        pytest.skip("there is none")
    cni.add(ID, pod, "eth0", config)
    path = pins.link_path(config.datapath.pins, f"{cni.host_interface(ID, 'eth0')}_pod_egress")

    before = attached(path)
    assert loader("--pin", config.datapath.pins).returncode == 0
    assert podfilter.renew(config.datapath.pins, config.datapath.records) == []
    assert attached(path) != before
    cni.check(ID, pod, "eth0", config)


@needs_bpf
def test_no_pod_is_there_before_the_filter(pod: str, tmp_path: Path) -> None:
    with pin_directory(tmp_path) as directory:
        config = cni.CniConfig(
            addresses=ADDRESSES,
            node_addresses=("10.8.0.1", "fd08::1"),
            datapath=cni.CniDatapath(pins=directory, records=tmp_path / "pods"),
        )

        def load() -> None:
            assert loader("--pin", directory).returncode == 0
            assert podfilter.renew(directory, tmp_path / "pods") == []

        before = state(msgspec.structs.replace(config, datapath=None))
        with pytest.raises(cni.NotYet, match="programs that enforce policy are not loaded"):
            cni.add(ID, pod, "eth0", config)
        assert state(msgspec.structs.replace(config, datapath=None)) == before
        assert list((tmp_path / "pods").iterdir()) == []
        load()
        # It is tried again.
        cni.add(ID, pod, "eth0", config)
        cni.check(ID, pod, "eth0", config)
        host = cni.host_interface(ID, "eth0")
        links = {f"{host}_{name}" for name in ("pod_egress", "pod_ingress")}
        assert {path.name for path in (directory / "links").glob("weft*")} == links
        # Somebody removes the pins: all is made again.
        assert loader("--pin", directory, "--remove").returncode == 0
        load()
        cni.check(ID, pod, "eth0", config)

        cni.delete(ID, "eth0", config)
        assert list((tmp_path / "pods").iterdir()) == []
        load()
        assert filter_state(config) == (set(), set(), {}, {})


@needs_bpf
def test_the_filter_of_another_version_serves_until_ours_is_there(pod: str, tmp_path: Path) -> None:
    load_other = (
        "import sys; from pathlib import Path; from bpf import constants; constants.PLAIN *= 2\n"
        "from bpf import attach, loader; loader.load(Path(sys.argv[1]))\n"
        "attach.attach(*map(Path, sys.argv[1:]))"
    )
    with pin_directory(tmp_path) as directory, new_cgroup() as cgroup:
        subprocess.run([sys.executable, "-c", load_other, directory, cgroup], check=True)
        config = cni.CniConfig(
            addresses=ADDRESSES,
            node_addresses=("10.8.0.1", "fd08::1"),
            datapath=cni.CniDatapath(pins=directory, records=tmp_path / "pods"),
        )
        # Ours is loaded, but its maps are not filled yet.
        assert loader("--pin", directory).returncode == 0
        cni.add(ID, pod, "eth0", config)
        cni.check(ID, pod, "eth0", config)
        pinned = pins.link_path(directory, f"{cni.host_interface(ID, 'eth0')}_pod_egress")
        before = attached(pinned)
        [other] = pins.other_versions(directory)
        theirs = PinnedMap(directory, "interfaces", Address, Number, other)
        assert len(dict(theirs.items())) == 2
        attach.attach(directory, cgroup)
        assert podfilter.renew(directory, tmp_path / "pods") == []
        cni.check(ID, pod, "eth0", config)
        assert attached(pinned) != before
        cni.delete(ID, "eth0", config)
        assert filter_state(config) == (set(), set(), {}, {})
        assert dict(theirs.items()) == {}
        theirs.close()


@pytest.mark.parametrize("family", [0, 1])
def test_nothing_leaves_a_pod_from_the_address_of_another(
    pod: str, config: cni.CniConfig, family: int
) -> None:
    """A datagram from the pod's own address, sent after the spoofed one, arrives alone."""
    if config.datapath is None and family == 1:
        pytest.skip("routing rules guard what is forwarded, not the node itself")
    cni.add(ID, pod, "eth0", config)
    if config.datapath is not None:
        # Until it is told who is who, nothing passes.
        with contextlib.closing(Enforcement(config.datapath.pins, None)) as enforcement:
            enforcement.replace({})
    foreign = ("10.9.0.3", "fd09::3")[family]
    kind = (socket.AF_INET, socket.AF_INET6)[family]
    with socket.socket(kind, socket.SOCK_DGRAM) as node:
        node.bind((config.node_addresses[family], 0))
        node.settimeout(10)
        with inside(pod):
            with IPRoute() as netlink:
                index = netlink.link_lookup(ifname="eth0")[0]
                length = (32, 128)[family]
                netlink.addr(
                    "add", index=index, address=foreign, prefixlen=length, flags=2 * family
                )
            for source in (foreign, config.addresses[family]):
                with socket.socket(kind, socket.SOCK_DGRAM) as client:
                    client.bind((source, 0))
                    client.sendto(source.encode(), node.getsockname()[:2])
        assert node.recv(100) == config.addresses[family].encode()
    if config.datapath is not None:
        counts = counters(config.datapath.pins)
        assert counts[Reason.SPOOFED] >= 1


def test_check_without_add(pod: str, config: cni.CniConfig) -> None:
    with pytest.raises(cni.CniError, match="pod network of pod-1: on the node: no interface weft"):
        cni.check(ID, pod, "eth0", config)
