"""Becoming a process of a pod, of a node, or of a client outside.

The cgroup comes first, while its file system can still be seen, then the network namespace, then
mounts. Works on the calling process, which must have one thread and is about to execute a program.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from mesh.lab.cgroups import join_cgroup, members
from mesh.lab.kernel import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWUTS,
    bind,
    join,
    private_mounts,
    unshare,
)
from mesh.lab.plan import CLUSTER_DOMAIN, DNS_ADDRESS, NodePlan, OutsidePlan, PodPlan
from mesh.lab.state import LabDir

_NSSWITCH = Path("/etc/nsswitch.conf")


def write_etc(lab: LabDir, pod: PodPlan) -> None:
    """The files that the pod will see in its /etc, as the kubelet writes them."""
    svc = f"svc.{CLUSTER_DOMAIN}"
    names = "\n".join(f"{address} {pod.name}" for address in pod.addresses)
    files = {
        "resolv.conf": f"search {pod.namespace}.{svc} {svc} {CLUSTER_DOMAIN}\n"
        f"nameserver {DNS_ADDRESS}\noptions ndots:5\n",
        "hosts": f"127.0.0.1 localhost\n::1 localhost ip6-localhost\n{names}\n",
    }
    if _NSSWITCH.exists():
        # The host's may ask daemons of the host before it asks DNS.
        files["nsswitch.conf"] = "hosts: files dns\n"
    directory = lab.etc(pod)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(content)


def pod_env(pod: PodPlan) -> dict[str, str]:
    """The environment of the pod's processes: little of the host's, who it is, and its own."""
    own_python = os.path.dirname(sys.executable)
    return {
        # python3 is the one that runs Weft.
        "PATH": f"{own_python}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "HOSTNAME": pod.name,
        "POD_NAME": pod.name,
        "POD_NAMESPACE": pod.namespace,
        "POD_IP": pod.addresses[0],
        "POD_IPS": ",".join(pod.addresses),
        "NODE_NAME": pod.node,
        "SERVICE_ACCOUNT": pod.service_account,
        **pod.env,
    }


def enter_pod(lab: LabDir, pod: PodPlan, pid: int | None = None) -> None:
    """`pid`: the pod's process, whose view of files is shared if it still runs."""
    join_cgroup(pod.cgroup)
    join(pod.netns, CLONE_NEWNET)
    if pid is not None and pid in members(pod.cgroup):
        join(f"/proc/{pid}/ns/uts", CLONE_NEWUTS)
        join(f"/proc/{pid}/ns/mnt", CLONE_NEWNS)
        return
    unshare(CLONE_NEWUTS)
    socket.sethostname(pod.name)
    private_mounts()
    for file in lab.etc(pod).iterdir():
        bind(file, f"/etc/{file.name}")


def enter_place(place: NodePlan | OutsidePlan) -> None:
    """A node's own processes are no pods', so they are in another cgroup."""
    join_cgroup(place.system_cgroup if isinstance(place, NodePlan) else place.cgroup)
    join(place.netns, CLONE_NEWNET)
