"""Using a lab: running commands in it, finding its logs, stopping and starting its pods
and the Weft of its nodes."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import NoReturn

from mesh.lab.enter import enter_place, enter_pod, pod_env
from mesh.lab.errors import LabError, NoSuchCommand, explained, require_root
from mesh.lab.plan import NodePlan, OutsidePlan, PodPlan
from mesh.lab.state import find_lab
from mesh.lab.status import look

# More than the supervisor itself waits for anything.
_ORDER_S = 60.0


def log_file(run_dir: Path, name: str | None, pod: str) -> Path:
    """Where the output of a pod's process goes. LabError: no such lab or pod, or it is no pod."""
    lab = find_lab(run_dir, name)
    place = lab.existing_plan().place(pod)
    if isinstance(place, PodPlan):
        return lab.log(place)
    if isinstance(place, NodePlan):
        return lab.node_log(place.name)
    raise LabError(f"{place.key} is no pod: only pods and nodes have logs")


def stop(run_dir: Path, name: str | None, where: str) -> str:
    """End a pod as a cluster does: its endpoints are terminating, it gets SIGTERM and a few
    seconds, then its network and cgroup are removed. Of a node, end its Weft in good order. Its
    key; LabError: no such lab, pod or node."""
    return _order(run_dir, name, "stop", where)


def start(run_dir: Path, name: str | None, where: str) -> str:
    """Make a pod that was stopped or has ended again, with the addresses it had, and wait until it
    is ready; of a node, its Weft. Its key; LabError: no such lab, pod or node, or it runs, or does
    not become ready."""
    return _order(run_dir, name, "start", where)


def _order(run_dir: Path, name: str | None, order: str, where: str) -> str:
    require_root()
    lab = find_lab(run_dir, name)
    plan = lab.existing_plan()
    place = plan.place(where)
    if isinstance(place, OutsidePlan):
        raise LabError(f"{place.key} is no pod: only pods and nodes are stopped and started")
    node = place.node if isinstance(place, PodPlan) else place.name
    try:
        with socket.socket(socket.AF_UNIX) as supervisor:
            supervisor.settimeout(_ORDER_S)
            supervisor.connect(str(lab.orders(node)))
            supervisor.sendall(f"{order} {place.key}\n".encode())
            answer = b"".join(iter(lambda: supervisor.recv(4096), b"")).decode()
    except OSError as error:
        raise LabError(
            f"the supervisor of node {node} does not answer ({error}): see 'weft lab status'"
        ) from None
    if answer:
        raise LabError(answer)
    if isinstance(place, PodPlan) and not look(lab, plan).pods[place.key].well:
        raise LabError(f"{place.key} is not ready: see 'weft lab logs {place.key}'")
    return place.key


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
            if pod.phase == "Stopped":
                raise LabError(f"{place.key} is stopped: start it with 'weft lab start'")
            enter_pod(lab, place, pod.pid)
            os.chdir(plan.directory)
        else:
            enter_place(place)
        program = shutil.which(command[0], path=env.get("PATH"))
        if program is None:
            raise NoSuchCommand(f"{place.key} has no program {command[0]}")
        os.execve(program, command, env)
