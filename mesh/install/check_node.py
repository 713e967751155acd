"""What `weft check` looks for on a node of a cluster besides its kernel: the pods' cgroup, bpffs,
and the CNI plugins. In the agent's container it looks where the node's directories are mounted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bpf import pins
from mesh.cni import conflist, kubepods
from mesh.install.finding import Finding

_ALONE = "gateways work without"


def node(root: Path = Path("/")) -> Iterable[Finding]:
    """`root`: the node's."""
    mounted = root / "run/host"
    inside = mounted.is_dir()
    yield _pods(mounted / "cgroup" if inside else root / "sys/fs/cgroup")
    yield _bpffs(mounted / "bpf" if inside else root / "sys/fs/bpf")
    cni = (
        (mounted / "cni/net.d", mounted / "cni/bin")
        if inside
        else (
            root / "etc/cni/net.d",
            root / "opt/cni/bin",
        )
    )
    yield _cni(*cni)


def _pods(mount: Path) -> Finding:
    found = kubepods.all_pods(mount)
    if found is not None:
        return Finding("pods' cgroup", "ok", str(found))
    todo = (
        "if this is a node: the mesh needs a kubelet with cgroup v2 alone (boot with "
        f"systemd.unified_cgroup_hierarchy=1); {_ALONE}"
    )
    return Finding("pods' cgroup", "warning", f"none below {mount}", todo)


def _bpffs(mount: Path) -> Finding:
    if mount.is_dir() and pins.is_bpffs(mount):
        return Finding("bpffs", "ok", str(mount))
    todo = f"mount it at the node's start: mount -t bpf none /sys/fs/bpf; {_ALONE}"
    return Finding("bpffs", "warning", f"{mount} is none", todo)


def _cni(conf: Path, binaries: Path) -> Finding:
    try:
        found = conflist.first(conf)
    except OSError as error:
        found, why = None, f"{conf}: {error.strerror}"
    else:
        why = f"{conf} has no network"
    if found is None:
        return Finding("CNI", "warning", why, f"if this is a node, install a CNI plugin; {_ALONE}")
    path, types = found
    said = f"{path}: {', '.join(types)}"
    if conflist.TYPE in types and not (binaries / conflist.TYPE).exists():
        todo = (
            f"no pod can start on this node: start its agent, or take {conflist.TYPE} out of the "
            "file"
        )
        return Finding("CNI", "failed", f"{said}; {conflist.TYPE} is not in {binaries}", todo)
    return Finding("CNI", "ok", said)
