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

_SCHED_CLS, _SOCK_OPS, _SK_MSG, _CGROUP_SOCK_ADDR = 3, 13, 16, 18


class Place(enum.Enum):
    """What a program is attached to, if anything at load."""

    WORKLOADS = "the cgroup of the workloads"
    PROXIES = "the cgroup of the proxy"
    PROXY_SOCKETS = "the map proxy_sockets"
    NONE = "nothing: it is run, or attached to each pod's interface"


class Program(NamedTuple):
    type: int
    attach_type: int
    place: Place


PROGRAMS = {
    "connect4": Program(_CGROUP_SOCK_ADDR, 10, Place.WORKLOADS),
    "connect6": Program(_CGROUP_SOCK_ADDR, 11, Place.WORKLOADS),
    "sendmsg4": Program(_CGROUP_SOCK_ADDR, 14, Place.WORKLOADS),
    "sendmsg6": Program(_CGROUP_SOCK_ADDR, 15, Place.WORKLOADS),
    "recvmsg4": Program(_CGROUP_SOCK_ADDR, 19, Place.WORKLOADS),
    "recvmsg6": Program(_CGROUP_SOCK_ADDR, 20, Place.WORKLOADS),
    "getpeername4": Program(_CGROUP_SOCK_ADDR, 29, Place.WORKLOADS),
    "getpeername6": Program(_CGROUP_SOCK_ADDR, 30, Place.WORKLOADS),
    "workloads": Program(_SOCK_OPS, 3, Place.WORKLOADS),
    "proxies": Program(_SOCK_OPS, 3, Place.PROXIES),
    "verdict": Program(_SK_MSG, 7, Place.PROXY_SOCKETS),
    "pod_egress": Program(_SCHED_CLS, 46, Place.NONE),
    "pod_ingress": Program(_SCHED_CLS, 47, Place.NONE),
    "queue": Program(_SCHED_CLS, 0, Place.NONE),
}
