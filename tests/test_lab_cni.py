"""ADD, CHECK and DEL on the real kernel, in namespaces of their own. Needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from lab_world import needs_root
from pyroute2 import IPRoute

from mesh.lab import cni
from mesh.lab.kernel import create_netns, inside, remove_netns

pytestmark = needs_root

CONFIG = cni.CniConfig(
    addresses=("10.9.0.2", "fd09::2"), node_addresses=("10.8.0.1", "fd08::1"), mtu=1400
)
ID = "pod-1"
_STATIC = 4  # RTPROT_STATIC


@pytest.fixture
def pod() -> Iterator[str]:
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
            netlink.addr("add", index=1, address="fd08::1", prefixlen=128)
        yield str(pod)


def state() -> tuple[set[str], int, int]:
    """The node's links, and how many routes (the kernel's own aside) and rules it has."""
    with IPRoute() as netlink:
        links = {link.get("ifname") for link in netlink.get_links()}
        routes = list(netlink.get_routes(proto=_STATIC))
        return links, len(routes), len(list(netlink.get_rules()))


def test_add_says_what_it_made_as_cni_does(pod: str) -> None:
    result = msgspec.json.decode(msgspec.json.encode(cni.add(ID, pod, "eth0", CONFIG)))
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
    cni.check(ID, pod, "eth0", CONFIG)


def test_add_twice_is_refused_and_changes_nothing(pod: str) -> None:
    cni.add(ID, pod, "eth0", CONFIG)
    before = state()
    with pytest.raises(cni.CniError, match="pod-1 has its eth0 already: DEL it before ADD"):
        cni.add(ID, pod, "eth0", CONFIG)
    assert state() == before
    cni.check(ID, pod, "eth0", CONFIG)


@pytest.mark.parametrize(
    ("netns", "config", "error"),
    [
        ("/run/netns/none", CONFIG, "pod network of pod-1: /run/netns/none: No such file"),
        (None, msgspec.structs.replace(CONFIG, mtu=7), "pod network of pod-1: "),
        (
            None,
            msgspec.structs.replace(CONFIG, node_addresses=("10.7.7.7", "fd08::1")),
            "pod network of pod-1: the kernel refuses it",
        ),
    ],
)
def test_add_that_fails_leaves_nothing(
    pod: str, netns: str | None, config: cni.CniConfig, error: str
) -> None:
    before = state()
    with pytest.raises(cni.CniError, match=error):
        cni.add(ID, netns or pod, "eth0", config)
    assert state() == before
    cni.add(ID, pod, "eth0", CONFIG)


def test_del_removes_all_of_it_any_number_of_times(pod: str) -> None:
    before = state()
    cni.delete(ID, "eth0", CONFIG)
    cni.add(ID, pod, "eth0", CONFIG)
    assert state() != before
    for _ in range(2):
        cni.delete(ID, "eth0", CONFIG)
        assert state() == before


def test_del_after_the_namespace_is_gone(pod: str) -> None:
    before = state()
    cni.add(ID, pod, "eth0", CONFIG)
    remove_netns(Path(pod))
    cni.delete(ID, "eth0", CONFIG)
    assert state() == before


def test_del_leaves_other_pods_alone(pod: str) -> None:
    cni.add(ID, pod, "eth0", CONFIG)
    cni.delete("pod-2", "eth0", CONFIG)
    cni.delete(ID, "eth1", CONFIG)
    cni.check(ID, pod, "eth0", CONFIG)


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
        ("node", "-6 rule del priority 101", "on the node: the rules against spoofing are gone"),
    ],
)
def test_check_finds_what_is_amiss(pod: str, where: str, command: str, error: str) -> None:
    cni.add(ID, pod, "eth0", CONFIG)
    with inside(pod) if where == "pod" else contextlib.nullcontext():
        subprocess.run(["ip", *command.split()], check=True)
    with pytest.raises(cni.CniError, match=error):
        cni.check(ID, pod, "eth0", CONFIG)
    cni.delete(ID, "eth0", CONFIG)


def test_check_without_add(pod: str) -> None:
    with pytest.raises(cni.CniError, match="pod network of pod-1: on the node: no interface weft"):
        cni.check(ID, pod, "eth0", CONFIG)
