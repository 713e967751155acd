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
_DEPTH = 3


def find(root: Path) -> tuple[Path, Path | None]:
    """The cgroup of all pods, and that of this process in it, below a mount of the node's cgroups.
    None of the latter: this is no pod. Where there are no pods, the first is where they would
    be."""
    pods = all_pods(root)
    if pods is None:
        return root / _NAMES[0], None
    pid = os.getpid()
    below = (Path(directory) for directory, _, _ in os.walk(pods))
    return pods, next((one for one in below if is_member(one, pid)), None)


def all_pods(root: Path) -> Path | None:
    """The cgroup of all pods; None: there is none of version 2."""
    # kind and others have it deeper: kubelet.slice/kubelet-kubepods.slice. Deeper still are those
    # of kubelets in containers.
    for depth in range(_DEPTH):
        for path in sorted(root.glob("*/" * depth + "*kubepods*")):
            named = path.name in _NAMES or path.name.endswith("-kubepods.slice")
            if named and (path / "cgroup.type").exists():
                return path
    return None
