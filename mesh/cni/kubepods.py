"""Where the kubelet's pods are among the cgroups of a node, for one that is in a pod itself.

A pod sees its own cgroup as the root of all, so paths in /proc say nothing: it looks for itself in
the node's hierarchy, by process. Source: kubelet's cgroup drivers: kubepods.slice (systemd),
kubepods (cgroupfs), either below --cgroup-root.
"""

from __future__ import annotations

import os
from pathlib import Path

from bpf.attach import is_member

_NAMES = ("kubepods.slice", "kubepods")


def find(root: Path) -> tuple[Path, Path | None]:
    """The cgroup of all pods, and that of this process in it, below a mount of the node's cgroups.
    Where there is none of the latter, as in no pod, the first is where it would be."""
    pid = os.getpid()
    for directory, _, _ in os.walk(root):
        own = Path(directory)
        pods = next((one for one in (*reversed(own.parents), own) if _is_pods(one, root)), None)
        if pods is not None and is_member(own, pid):
            return pods, own
    return root / _NAMES[0], None


def _is_pods(path: Path, root: Path) -> bool:
    # kind and others have it deeper: kubelet.slice/kubelet-kubepods.slice.
    named = path.name in _NAMES or path.name.endswith("-kubepods.slice")
    return named and path.is_relative_to(root)
