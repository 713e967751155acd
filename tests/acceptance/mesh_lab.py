"""The lab of the mesh cases: the suite's mesh manifests on two nodes, with Weft on each.

Every Deployment gets a pod on each node, so that each backend is both near and far. Services keep
the names, ports and protocols of the manifests; the lab gives them ClusterIPs and names.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from echo import pod as echo_pod

from acceptance.cases import SHARED, load_objects
from acceptance.cluster import Api, ClusterAgent
from acceptance.gateway import CLASS_NAME, Agent
from acceptance.inside import socket_of
from acceptance.manifests import Json, Manifests
from acceptance.statuses import CONTROLLER
from certs.selfsigned import Authority
from mesh.lab.cgroups import cgroup_root
from mesh.lab.errors import LabError
from mesh.lab.plan import PodPlan
from mesh.lab.state import LabDir

NODES = ("a", "b")
_TESTS = Path(__file__).resolve().parents[1]
_WEFT = Path(sys.executable).with_name("weft")


class LabFailed(Exception):
    """The lab did not come up."""


def why_not() -> str:
    """Why there can be no lab here; "" if there can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    if importlib.util.find_spec("bcc") is None:
        return "bcc is missing: apt-get install python3-bpfcc"
    try:
        cgroup_root()
    except LabError as error:
        return str(error)
    return ""


class MeshPod(NamedTuple):
    """`addresses` are one of IPv4 and one of IPv6; `socket` is where it takes requests."""

    namespace: str
    name: str
    node: str
    deployment: str
    labels: dict[str, str]
    addresses: tuple[str, str]
    socket: Path


class MeshLab:
    """The lab while it is up."""

    def __init__(self, scratch: Path, name: str, kubeconfig: Path | None = None) -> None:
        """`kubeconfig`: of the API server that the lab's objects are to be on."""
        self._scratch = scratch
        self._options = [f"--kubeconfig={kubeconfig}"] if kubeconfig is not None else []
        self._dir = LabDir(scratch / "lab", name)
        self._sockets = scratch / "pods"
        run_dirs = {node: self._dir.weft(node).path for node in NODES}
        self.agents: dict[str, Agent] = {node: Agent(path) for node, path in run_dirs.items()}
        if kubeconfig is not None:
            api = Api(kubeconfig)
            self.agents = {node: ClusterAgent(path, api) for node, path in run_dirs.items()}
        self.manifests = Manifests(self._dir.manifests)
        self.pods: tuple[MeshPod, ...] = ()
        self._authority = Authority.create("mesh")
        # What the pods' certificates chain to.
        self.ca_pem = self._authority.certificate_pem

    async def start(self) -> None:
        """LabFailed: it cannot be made, or not all of it is ready."""
        self._sockets.mkdir()
        chain, key = self._authority.issue(dns=["echo"])
        (self._scratch / "cert.crt").write_text(chain)
        (self._scratch / "cert.key").write_text(key)
        objects = load_objects(SHARED / "conformance/mesh/manifests.yaml", {})
        file = self._scratch / "lab.yaml"
        file.write_text(yaml.safe_dump(lab_config(objects, self._scratch, self._sockets)))
        await self._weft("up", "--wait=90", *self._options, str(file))
        self.pods = tuple(map(self._pod, self._dir.existing_plan().pods))
        self.manifests.put("class", [_gateway_class()])

    async def stop(self) -> None:
        """Remove what there is of it."""
        if self._dir.path.exists():
            await self._weft("down")

    def degraded(self) -> list[str]:
        """What is not as it should be on a node, such as a data path that fell back."""
        return [
            f"node {node}: {line}"
            for node, agent in self.agents.items()
            for line in agent.status()["degraded"]
        ]

    def logs(self, lines: int = 8) -> str:
        """The end of what each node's Weft has said."""
        tails = []
        for node in NODES:
            file = self._dir.weft_log(node)
            text = file.read_text(errors="replace") if file.exists() else ""
            tails.append(f"node {node}:\n" + "\n".join(text.splitlines()[-lines:]))
        return "\n".join(tails)

    def pods_of(self, namespace: str, labels: dict[str, str]) -> list[MeshPod]:
        return [
            pod
            for pod in self.pods
            if pod.namespace == namespace and labels.items() <= pod.labels.items()
        ]

    async def _weft(self, command: str, *args: str) -> None:
        # A session of its own: Ctrl-C is this process's, which then takes the lab down.
        process = await asyncio.create_subprocess_exec(
            *(str(_WEFT), "lab", command, "--name", self._dir.name),
            *("--run-dir", str(self._dir.run_dir), *args),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            process.terminate()
            await process.wait()
            raise
        if process.returncode:
            raise LabFailed(f"weft lab {command}: {output.decode().strip()}\n{self.logs()}")

    def _pod(self, plan: PodPlan) -> MeshPod:
        return MeshPod(
            plan.namespace,
            plan.name,
            plan.node,
            deployment_of(plan.name),
            plan.labels,
            plan.addresses,
            socket_of(self._sockets, plan.namespace, plan.name),
        )


def deployment_of(pod: str) -> str:
    """Replicas have their number behind the name."""
    return pod.rsplit("-", 1)[0]


def lab_config(objects: list[Json], scratch: Path, sockets: Path) -> dict[str, Any]:
    """lab.yaml for the Deployments and Services among these objects."""
    return {
        "nodes": [{"name": name} for name in NODES],
        "pods": [_pods(obj, scratch, sockets) for obj in objects if obj["kind"] == "Deployment"],
        "services": [
            {
                "name": obj["metadata"]["name"],
                "namespace": obj["metadata"]["namespace"],
                "selector": obj["spec"]["selector"],
                "ports": obj["spec"]["ports"],
            }
            for obj in objects
            if obj["kind"] == "Service"
        ],
    }


def _pods(deployment: Json, scratch: Path, sockets: Path) -> dict[str, Any]:
    template = deployment["spec"]["template"]
    files = {"--crt=/cert.crt": "cert.crt", "--key=/cert.key": "cert.key"}
    arguments = [
        f"{arg.partition('=')[0]}={scratch / files[arg]}" if arg in files else arg
        for arg in template["spec"]["containers"][0].get("args", ())
    ]
    listening = echo_pod.ports(echo_pod.parse(arguments))
    return {
        "name": deployment["metadata"]["name"],
        "namespace": deployment["metadata"]["namespace"],
        "labels": template["metadata"]["labels"],
        "replicas": len(NODES),
        "command": ["python3", "-m", "acceptance.inside", str(sockets), *arguments],
        "env": {"PYTHONPATH": str(_TESTS)},
        "ports": [{"port": port} for port in listening],
    }


def _gateway_class() -> Json:
    """Its status names the features that Weft claims, those of the mesh included."""
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "GatewayClass",
        "metadata": {"name": CLASS_NAME},
        "spec": {"controllerName": CONTROLLER},
    }
