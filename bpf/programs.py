"""The programs: what each is to the kernel, and what it is attached to.

Functions of programs/datapath.c by their names; enum bpf_prog_type and enum bpf_attach_type are
numbered in linux/bpf.h.
"""

from __future__ import annotations

import enum
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parent / "programs" / "datapath.c"
LICENCE = "GPL"
# It has links for sockmaps (6.10), may_goto (6.9) and tcx (6.6). What is tested is 6.18.
OLDEST_KERNEL = (6, 10)

_SCHED_CLS, _SOCK_OPS, _SK_MSG, _CGROUP_SOCK_ADDR = 3, 13, 16, 18


class Place(enum.Enum):
    """What a program is attached to, if anything at load."""

    WORKLOADS = "the cgroup of the workloads"
    PROXIES = "the cgroup of the proxy"
    PROXY_SOCKETS = "the map proxy_sockets"
    WORKLOAD_SOCKETS = "the map workload_sockets, where pairs are wanted"
    NONE = "nothing: it is run, or attached to each pod's interface"


class Program(NamedTuple):
    """`stays`: it serves sockets that were made with its own version's maps, so it stays beside
    another version's for as long as that one's maps do; one that does not is replaced."""

    type: int
    attach_type: int
    place: Place
    stays: bool = False


PROGRAMS = {
    "connect4": Program(_CGROUP_SOCK_ADDR, 10, Place.WORKLOADS),
    "connect6": Program(_CGROUP_SOCK_ADDR, 11, Place.WORKLOADS),
    "sendmsg4": Program(_CGROUP_SOCK_ADDR, 14, Place.WORKLOADS),
    "sendmsg6": Program(_CGROUP_SOCK_ADDR, 15, Place.WORKLOADS),
    "recvmsg4": Program(_CGROUP_SOCK_ADDR, 19, Place.WORKLOADS, stays=True),
    "recvmsg6": Program(_CGROUP_SOCK_ADDR, 20, Place.WORKLOADS, stays=True),
    "getpeername4": Program(_CGROUP_SOCK_ADDR, 29, Place.WORKLOADS, stays=True),
    "getpeername6": Program(_CGROUP_SOCK_ADDR, 30, Place.WORKLOADS, stays=True),
    "workloads": Program(_SOCK_OPS, 3, Place.WORKLOADS, stays=True),
    "proxies": Program(_SOCK_OPS, 3, Place.PROXIES, stays=True),
    "verdict": Program(_SK_MSG, 7, Place.PROXY_SOCKETS, stays=True),
    "exchange": Program(_SK_MSG, 7, Place.WORKLOAD_SOCKETS, stays=True),
    "pod_egress": Program(_SCHED_CLS, 46, Place.NONE),
    "pod_ingress": Program(_SCHED_CLS, 47, Place.NONE),
    "queue": Program(_SCHED_CLS, 0, Place.NONE),
    "holders": Program(_SCHED_CLS, 0, Place.NONE),
}
