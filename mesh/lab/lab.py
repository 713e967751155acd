"""Making a lab, and removing it with everything in it.

A lab consists of its cgroups (with all processes in them), its network namespaces (with all links
in them) and its files. Each has a name that follows from the lab's, and the journal is written
before the first of them is made, so removing works the same after `up` was killed at any moment.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from bpf import pins
from mesh.lab import network
from mesh.lab.cgroups import cgroup_root, join_cgroup, members, remove_tree
from mesh.lab.config import read_config
from mesh.lab.errors import LabError, explained, require_root
from mesh.lab.kernel import remove_netns
from mesh.lab.manifests import nodes, services, to_yaml
from mesh.lab.plan import NETNS_DIR, NodePlan, Plan, make_plan, netns_prefix
from mesh.lab.state import LabDir, find_lab
from mesh.lab.status import LabStatus, look

_LOOK_S = 0.05


def up(
    file: Path, run_dir: Path, name: str | None, wait_s: float, kubeconfig: Path | None = None
) -> LabStatus:
    """Make the lab that `file` describes, and wait until each pod is ready or has ended, at most
    `wait_s` seconds. What an `up` that was killed left is removed first. With `kubeconfig` its
    objects are on the API server that it leads to.

    LabError: it cannot be made (and nothing is left of it), or is there already.
    """
    require_root()
    config = read_config(file)
    lab = LabDir(run_dir, name or config.name)
    plan = make_plan(config, lab.name, file.parent, cgroup_root(), kubeconfig)
    with lab.locked():
        old = lab.plan()
        if old is not None and all(look(lab, old).supervisors.values()) and lab.up_mark.exists():
            raise LabError(f"lab {lab.name} is up: remove it with 'weft lab down' first")
        _remove(lab, old)
        _refuse_foreign(plan)
        lab.create(plan)
        try:
            with explained():
                _build(lab, plan)
            _wait(lab, plan, wait_s)
        except BaseException:
            _remove(lab, plan)
            raise
        lab.up_mark.touch()
    return look(lab, plan)


def down(run_dir: Path, name: str | None) -> str:
    """Remove a lab, whole or not; its name. LabError: there is none, or it cannot be removed."""
    require_root()
    lab = find_lab(run_dir, name)
    with lab.locked():
        plan = lab.plan()
        if plan is None:
            lab.remove()
            raise LabError(f"no lab {lab.name} in {run_dir}")
        with explained():
            _remove(lab, plan)
    return lab.name


def _netns_of(name: str) -> list[Path]:
    return sorted(NETNS_DIR.glob(f"{netns_prefix(name)}*"))


def _refuse_foreign(plan: Plan) -> None:
    """Without a journal, whatever has the lab's names is not the lab's."""
    for path in (Path(plan.cgroup), *_netns_of(plan.name)):
        if path.exists():
            raise LabError(
                f"{path} exists and is not of a lab in this run directory: choose another --name, "
                "or remove the lab that it belongs to with its --run-dir"
            )


def _build(lab: LabDir, plan: Plan) -> None:
    lab.write(lab.manifests / "services.yaml", to_yaml([*nodes(plan), *services(plan)]))
    lab.link_manifests(plan)
    for node in plan.nodes:
        Path(node.cgroup).mkdir(parents=True)
        Path(node.system_cgroup).mkdir(parents=True)
    for client in plan.outside:
        Path(client.cgroup).mkdir(parents=True)
    _start_authority(lab, plan)
    network.build(plan)
    if plan.kubeconfig:
        _start_cluster(lab, plan)
    starting = [_start_supervisor(lab, node) for node in plan.nodes]
    for process in starting:
        process.wait()


def _start_authority(lab: LabDir, plan: Plan) -> None:
    """The process that signs the nodes' certificates, on its own: nobody's child."""
    Path(plan.authority_cgroup).mkdir(parents=True)
    nodes = [f"--node={node.name}={lab.authority_socket(node.name)}" for node in plan.nodes]
    with open(lab.authority_log, "ab") as log:
        subprocess.run(
            [
                *("/bin/sh", "-c", '"$@" &', "sh"),
                *(sys.executable, "-P", "-m", "mesh.authority.main", f"--dir={lab.authority}"),
                f"--manifests={lab.manifests}",
                f"--trust-domain={plan.trust_domain}",
                f"--svid-life={plan.svid_life}",
                *nodes,
            ],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: join_cgroup(plan.authority_cgroup),
        )


def _start_cluster(lab: LabDir, plan: Plan) -> None:
    """The process that connects the lab with an API server, on its own."""
    Path(plan.cluster_cgroup).mkdir(parents=True)
    module = (sys.executable, "-P", "-m", "mesh.lab.cluster")
    with open(lab.cluster_log, "ab") as log:
        subprocess.run(
            ["/bin/sh", "-c", '"$@" &', "sh", *module, str(lab.run_dir), lab.name],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: join_cgroup(plan.cluster_cgroup),
        )


def _start_supervisor(lab: LabDir, node: NodePlan) -> subprocess.Popen[bytes]:
    """The process returned ends as soon as the supervisor is on its own."""
    module = (sys.executable, "-P", "-m", "mesh.lab.supervisor")
    with open(lab.node_log(node.name), "ab") as log:
        return subprocess.Popen(
            [*module, str(lab.run_dir), lab.name, node.name],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # In its cgroup from the start, so that it is found whenever this process is killed.
            preexec_fn=lambda: join_cgroup(node.system_cgroup),
        )


def _wait(lab: LabDir, plan: Plan, wait_s: float) -> None:
    """Until all pods are settled and all Wefts are ready. LabError: a supervisor or the authority
    ended; why."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        statuses = [lab.node_status(node.name) for node in plan.nodes]
        if all(
            node and node.weft_ready and all(pod.settled for pod in node.pods) for node in statuses
        ):
            return
        if not members(plan.authority_cgroup):
            raise LabError(f"the authority ended:\n{lab.authority_log.read_text().strip()}")
        if plan.kubeconfig and not members(plan.cluster_cgroup):
            raise LabError(f"mesh.lab.cluster ended:\n{lab.cluster_log.read_text().strip()}")
        for node in plan.nodes:
            if not members(node.system_cgroup):
                log = lab.node_log(node.name).read_text().strip()
                raise LabError(f"the supervisor of node {node.name} ended:\n{log}")
        time.sleep(_LOOK_S)


def _remove(lab: LabDir, plan: Plan | None) -> None:
    """Everything, journal last."""
    if plan is not None:
        remove_tree(Path(plan.cgroup))
        for path in _netns_of(lab.name):
            remove_netns(path)
        for node in plan.nodes:
            for directory in pins.below(lab.weft(node.name).path):
                pins.remove(directory)
    lab.remove()
