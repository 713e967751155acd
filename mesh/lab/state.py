"""What is remembered of a lab, in files: <run dir>/<lab>/...

    plan.json        the journal: written before anything is made, removed after all else is gone
    up               there once the lab was complete
    manifests/       Namespaces, Services, Pods and EndpointSlices, for Weft's directory source; and
                     links to the manifests that lab.yaml names
    nodes/<node>.json  what the node's supervisor last said of its pods
    nodes/<node>.pods  its pods that are not in the journal: created on the API server
    nodes/<node>.log   what went wrong in the supervisor
    nodes/<node>.sock  where the supervisor takes orders
    nodes/<node>.weft/, nodes/<node>.weft.log
                     the run directory of the node's Weft, eBPF pins included, and what it says
    authority/, authority.log
                     the directory of the lab's authority, nodes' sockets included, and what it says
    kubeconfig, cluster.log
                     the nodes' way to the API server, if the lab's objects are on one, and what
                     mesh.lab.cluster and the controller say
    logs/, etc/      output of the pods, and the files that they see in /etc

Knows these files and nothing of the kernel.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from mesh.agent.rundir import RunDir
from mesh.lab.config import MAX_NAME
from mesh.lab.errors import LabError
from mesh.lab.plan import Plan, PodPlan
from mesh.model import scalars as s
from mesh.model.meta import Model

DEFAULT_RUN_DIR = Path("/run/weft-lab")

# sun_path of unix(7), without the NUL at its end.
_MAX_SOCKET_PATH = 107

Phase = Literal["Pending", "Running", "Exited", "Failed", "Terminating", "Stopped"]


class PodStatus(Model, frozen=True, kw_only=True):
    """`exit_code` as subprocess has it: negative for a signal. `message` says why it Failed, or
    what it waits for while it is Pending. A pod that is Terminating still serves, and has a
    `deletion_timestamp` (RFC 3339); one that is Stopped has no process, network or cgroup.
    `start`: how often it was started before; each is another Pod."""

    key: str
    phase: Phase
    start: int = 0
    ready: bool = False
    pid: int | None = None
    exit_code: int | None = None
    message: str = ""
    deletion_timestamp: str | None = None

    @property
    def settled(self) -> bool:
        """Nothing is to be waited for."""
        return self.ready or self.waits or self.phase in ("Exited", "Failed", "Stopped")

    @property
    def waits(self) -> bool:
        """It cannot be there yet, and that is tried again."""
        return self.phase == "Pending" and self.message != ""

    @property
    def well(self) -> bool:
        """As it was meant to be."""
        ended = self.phase == "Exited" and self.exit_code == 0
        return self.ready or ended or self.phase == "Stopped"


class NodeStatus(Model, frozen=True, kw_only=True):
    """`pid` is the supervisor's; `weft_ready`: the node's Weft has said that it is; `weft_stopped`:
    it has ended on order."""

    pid: int
    weft_ready: bool = False
    weft_stopped: bool = False
    pods: tuple[PodStatus, ...]


class LabDir:
    """The files of one lab. LabError: it cannot have that name."""

    def __init__(self, run_dir: Path, name: str) -> None:
        if len(name) > MAX_NAME or not re.match(s.DNS_LABEL, name):
            raise LabError(
                f"{name!r} cannot name a lab: write up to {MAX_NAME} small letters, digits and "
                "hyphens, with a letter or digit at both ends"
            )
        self.run_dir = Path(os.path.abspath(run_dir))
        self.name = name
        self.path = self.run_dir / name
        self.manifests = self.path / "manifests"
        self.nodes = self.path / "nodes"
        self.logs = self.path / "logs"
        self.authority = self.path / "authority"
        self.authority_log = self.path / "authority.log"
        self.kubeconfig = self.path / "kubeconfig"
        self.cluster_log = self.path / "cluster.log"
        self.up_mark = self.path / "up"
        self._plan = self.path / "plan.json"

    def log(self, pod: PodPlan) -> Path:
        return self.logs / f"{pod.file_stem}.log"

    def node_log(self, node: str) -> Path:
        return self.nodes / f"{node}.log"

    def orders(self, node: str) -> Path:
        return self.nodes / f"{node}.sock"

    def weft(self, node: str) -> RunDir:
        return RunDir(self.nodes / f"{node}.weft")

    def weft_log(self, node: str) -> Path:
        return self.nodes / f"{node}.weft.log"

    def authority_socket(self, node: str) -> Path:
        return self.authority / f"node.{node}.sock"

    def etc(self, pod: PodPlan) -> Path:
        return self.path / "etc" / pod.file_stem

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else makes or removes this lab meanwhile. LabError: somebody does.

        What this process forks holds the lock until it executes another program, so none of it is
        still on its way when somebody gets the lock after a kill.
        """
        file = self.run_dir / f"{self.name}.lock"
        self.run_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        while True:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise LabError(
                        f"another 'weft lab' command makes or removes lab {self.name}: wait for it"
                    ) from None
                # Whoever held it before may have removed the file that was opened here.
                if not file.exists() or os.stat(fd).st_ino != file.stat().st_ino:
                    continue
                try:
                    yield
                finally:
                    file.unlink()
                return
            finally:
                os.close(fd)

    def create(self, plan: Plan) -> None:
        """Begin a lab: the journal first, then the other directories. LabError: there is a
        directory of that name, which is no lab's, or its path is too long."""
        for path in (self.weft(node.name).api_socket for node in plan.nodes):
            if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
                raise LabError(
                    f"{path} is too long for a socket (at most {_MAX_SOCKET_PATH} bytes): choose "
                    "another --run-dir, or shorter names"
                )
        try:
            self.path.mkdir(mode=0o755)
        except FileExistsError:
            raise LabError(
                f"{self.path} exists and is no lab: choose another --name or --run-dir"
            ) from None
        self.write(self._plan, msgspec.json.encode(plan))
        for directory in (self.manifests, self.nodes, self.logs):
            directory.mkdir()

    def link_manifests(self, plan: Plan) -> None:
        """Links to the manifests that lab.yaml names, after the lab's own by name: of two objects
        of one name the source takes the first."""
        for number, target in enumerate(plan.manifests):
            (self.manifests / f"user.{number}.{Path(target).name}").symlink_to(target)

    def remove(self) -> None:
        """Forget everything, the journal last; only when nothing else is left of the lab. A
        directory that has no journal and is not empty is no lab's and stays."""
        if self._plan.exists():
            for path in set(self.path.iterdir()) - {self._plan}:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            self._plan.unlink()
        for new in self.path.glob(".plan.json.*"):
            new.unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def plan(self) -> Plan | None:
        """The journal, with pods that came later; None: there is no such lab, not even half of
        one."""
        try:
            plan = msgspec.json.decode(self._plan.read_bytes(), type=Plan)
            late = [
                pod
                for file in sorted(self.nodes.glob("*.pods"))
                for pod in msgspec.json.decode(file.read_bytes(), type=tuple[PodPlan, ...])
            ]
            return msgspec.structs.replace(plan, pods=(*plan.pods, *late))
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise LabError(
                f"{self._plan} is of another version of Weft ({error}): remove the lab with the "
                "version that made it"
            ) from None

    def existing_plan(self) -> Plan:
        """The journal. LabError: there is no such lab."""
        plan = self.plan()
        if plan is None:
            raise LabError(f"no lab {self.name} in {self.run_dir}: start it with 'weft lab up'")
        return plan

    def node_status(self, node: str) -> NodeStatus | None:
        """What the node's supervisor last said; None: nothing yet."""
        try:
            return msgspec.json.decode(self._node_file(node).read_bytes(), type=NodeStatus)
        except FileNotFoundError:
            return None

    def write_late_pods(self, node: str, pods: tuple[PodPlan, ...]) -> None:
        self.write(self.nodes / f"{node}.pods", msgspec.json.encode(pods))

    def write_node_status(self, node: str, status: NodeStatus) -> None:
        self.write(self._node_file(node), msgspec.json.encode(status))

    def write(self, file: Path, content: bytes) -> None:
        """Replace a file at once: readers see the old or the new one, whole."""
        new = self.path / f".{file.name}.{os.getpid()}"
        new.write_bytes(content)
        new.replace(file)

    def _node_file(self, node: str) -> Path:
        return self.nodes / f"{node}.json"


def find_lab(run_dir: Path, name: str | None) -> LabDir:
    """The lab of that name, or the only one there is. LabError: none, or several to choose from."""
    if name is not None:
        return LabDir(run_dir, name)
    # What an `up` left that was killed before it wrote its journal counts, so that `down` finds it.
    labs = sorted({path.stem for path in (*run_dir.glob("*/"), *run_dir.glob("*.lock"))})
    if len(labs) > 1:
        raise LabError(f"there are labs {', '.join(labs)}: say which with --name")
    if not labs:
        raise LabError(f"no lab in {run_dir}: start one with 'weft lab up'")
    return LabDir(run_dir, labs[0])
