"""What is the case in a lab: the plan, which supervisors run, how the pods are. Only looks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mesh.lab.cgroups import members
from mesh.lab.plan import NodePlan, Plan
from mesh.lab.state import LabDir, NodeStatus, PodStatus, find_lab
from mesh.model.meta import Model

# "Stopped" on order, "Ended" by itself: it is started again.
WeftPhase = Literal["Running", "Stopped", "Ended"]


class LabStatus(Model, frozen=True, kw_only=True):
    """`supervisors` tells by node whether its supervisor runs, `weft` how its Weft is, `authority`
    whether the authority runs; `complete` whether `up` came to its end."""

    plan: Plan
    complete: bool
    authority: bool
    supervisors: dict[str, bool]
    weft: dict[str, WeftPhase]
    pods: dict[str, PodStatus]

    @property
    def healthy(self) -> bool:
        return (
            self.complete
            and self.authority
            and all(self.supervisors.values())
            and "Ended" not in self.weft.values()
            and all(pod.well for pod in self.pods.values())
        )


def status(run_dir: Path, name: str | None) -> LabStatus:
    """LabError: there is no such lab."""
    lab = find_lab(run_dir, name)
    return look(lab, lab.existing_plan())


def look(lab: LabDir, plan: Plan) -> LabStatus:
    """A lab that may be half made."""
    statuses = {node.name: lab.node_status(node.name) for node in plan.nodes}
    pods = {pod.key: PodStatus(key=pod.key, phase="Pending") for pod in plan.pods}
    for status in statuses.values():
        if status is not None:
            pods.update((pod.key, pod) for pod in status.pods)
    return LabStatus(
        plan=plan,
        complete=lab.up_mark.exists(),
        authority=bool(members(plan.authority_cgroup)),
        supervisors={node.name: _runs(node, statuses[node.name]) for node in plan.nodes},
        weft={node.name: _weft(lab, node, statuses[node.name]) for node in plan.nodes},
        pods=pods,
    )


def _runs(node: NodePlan, status: NodeStatus | None) -> bool:
    return status is not None and status.pid in members(node.system_cgroup)


def _weft(lab: LabDir, node: NodePlan, status: NodeStatus | None) -> WeftPhase:
    if lab.weft(node.name).holder() is not None:
        return "Running"
    return "Stopped" if status is not None and status.weft_stopped else "Ended"
