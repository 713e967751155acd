"""Using a lab: running commands in it, finding its logs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

from mesh.lab.enter import enter_place, enter_pod, pod_env
from mesh.lab.errors import LabError, NoSuchCommand, explained, require_root
from mesh.lab.plan import NodePlan, PodPlan
from mesh.lab.state import find_lab
from mesh.lab.status import look


def log_file(run_dir: Path, name: str | None, pod: str) -> Path:
    """Where the output of a pod's process goes. LabError: no such lab or pod, or it is no pod."""
    lab = find_lab(run_dir, name)
    place = lab.existing_plan().place(pod)
    if isinstance(place, PodPlan):
        return lab.log(place)
    if isinstance(place, NodePlan):
        return lab.node_log(place.name)
    raise LabError(f"{place.key} is no pod: only pods and nodes have logs")


def execute(run_dir: Path, name: str | None, where: str, command: tuple[str, ...]) -> NoReturn:
    """Become `command` in a pod (NAME or NAMESPACE/NAME), node (node/NAME) or client
    (outside/NAME). LabError: no such place or command."""
    require_root()
    lab = find_lab(run_dir, name)
    plan = lab.existing_plan()
    place = plan.place(where)
    env = dict(os.environ)
    with explained():
        if isinstance(place, PodPlan):
            terminal = {"TERM": env["TERM"]} if "TERM" in env else {}
            env = {**terminal, **pod_env(place)}
            pod = look(lab, plan).pods[place.key]
            enter_pod(lab, place, pod.pid)
            os.chdir(plan.directory)
        else:
            enter_place(place)
        program = shutil.which(command[0], path=env.get("PATH"))
        if program is None:
            raise NoSuchCommand(f"{place.key} has no program {command[0]}")
        os.execve(program, command, env)
