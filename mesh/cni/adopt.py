"""Pods that are older than the plugin: found by their network namespaces, and filtered as by ADD.

Container runtimes keep those, by names of their own, in one directory (containerd, CRI-O:
/run/netns). Whose one is follows from the addresses of its eth0, as kubelets call it, and those
that the cluster says its pods have: namespaces of somebody else's are left alone. To enter one
takes CAP_SYS_ADMIN, and no right over the pod's processes. Works in the network namespace of the
node. Knows nothing of who else is in the cluster.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from pathlib import Path

from bpf import podfilter
from bpf.errors import DatapathError
from mesh.cni import links, netns
from mesh.cni.plugin import CniError, Place, host_end

_IFNAME = "eth0"


def adopt(place: Place, directory: Path, pods: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Filter and record those of this node's pods (by namespace/name/uid, their addresses) that are
    not recorded. Which could not be, and why. OSError: their records cannot be read."""
    there = podfilter.addresses(place.records)
    wanted = {about: its for about, its in pods.items() if its and not there & set(its)}
    if not wanted:
        return {}
    with contextlib.ExitStack() as stack:
        found: dict[str, list[socket.socket]] = {about: [] for about in wanted}
        for path in sorted(directory.iterdir()) if directory.is_dir() else ():
            try:
                netlink = stack.enter_context(_inside(path))
                inner = links.find(netlink, _IFNAME)
                here = links.addresses(netlink, inner.number)
            except OSError:
                continue  # no namespace of a pod, or one that is ending
            for about, its in wanted.items():
                if here >= set(its):
                    found[about].append(netlink)
        whys = {about: _add(place, found[about], about, its) for about, its in wanted.items()}
    return {about: why for about, why in whys.items() if why}


def _inside(path: Path) -> socket.socket:
    with netns.inside(path):
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)


def _add(place: Place, found: list[socket.socket], about: str, addresses: tuple[str, ...]) -> str:
    """Why not."""
    # A pod may give itself any address.
    if len(found) != 1:
        return "several have its addresses" if found else "its network namespace was not found"
    (netlink,) = found
    try:
        pod = podfilter.Pod(
            interface=host_end(netlink, _IFNAME),
            addresses=addresses,
            cookie=podfilter.netns_cookie_of(netlink),
            about=about,
        )
        podfilter.add(place.pins, place.records, pod)
    except (CniError, DatapathError) as error:
        return str(error)
    return ""
