"""The lab of the matrix: nine pods in three namespaces on two nodes, and addresses of the world.

    a/p0 … c/p2   on nodes a and b in turn; each runs tests/matrix/prober.py, and so do both nodes
    outside/world has addresses that policies name ranges of; nodes and it have routes to each other

Labels, accounts, names of ports and Services are those of tests/policy_cases.py, for whose policies
this is.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import policy_cases as cases
import yaml
from lab_world import LIMIT_S, Lab, lab_of, until
from policy_model import Manifest, Outside, Party, Pod, World

from mesh.cli.client import ask
from mesh.lab.plan import PodPlan
from mesh.lab.state import LabDir

PROBER = Path(__file__).with_name("prober.py")
WORLD = ("192.0.2.1", "192.0.2.200", "198.51.100.7", "2001:db8::1")
# Where a namespace is that has no pods and no policies but the mark.
MARKS = "marks"
_VERSIONS = {
    "Service": "v1",
    "EndpointSlice": "discovery.k8s.io/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "CiliumNetworkPolicy": "cilium.io/v2",
    "CiliumClusterwideNetworkPolicy": "cilium.io/v2",
}


class Place(NamedTuple):
    """Somewhere that asks and is asked. `node`: its own, of pods and nodes; `pod`: as the model has
    it. `addresses`: IPv4 first."""

    name: str
    kind: str
    addresses: tuple[str, ...]
    node: str = ""
    pod: Pod | None = None

    def party(self, subject: Place, address: str) -> Party:
        """As whom the policies of `subject` see it, when it has this address."""
        if self.pod is not None:
            return self.pod
        if self.kind == "world":
            return Outside(address)
        return Outside(address, "host" if self.node == subject.node else "remote-node")


class Scene:
    """The lab, once it is up."""

    def __init__(self, lab: Lab, directory: Path, processes: contextlib.ExitStack) -> None:
        self.lab = lab
        self.directory = directory
        plan = LabDir(lab.run_dir, lab.name).plan()
        assert plan is not None
        self.pods = {pod.key: pod for pod in plan.pods}
        self.places = [
            *(_place(pod) for pod in plan.pods),
            *(Place(one.key, "node", one.addresses, one.name) for one in plan.nodes),
            Place("outside/world", "world", WORLD),
        ]
        services = {}
        for service, addresses in cases.SERVICES.items():
            at = {old.address: new for old, new in zip(cases.PODS, self.places, strict=False)}
            services[service] = [at[one].addresses[0] if one in at else one for one in addresses]
        self.services = services
        self.policies = directory / "policies" / "policies.yaml"
        self.written = 0
        for place in self.places:
            if place.pod is None:
                command = ("python3", str(PROBER), _control(directory, place.name), place.name)
                process = subprocess.Popen(
                    lab.arguments("exec", place.name, "--", *command, *place.addresses)
                )
                processes.callback(_end, process)
        self.controls = {
            place.name: processes.enter_context(Control(_control(directory, place.name)))
            for place in self.places
        }
        # The lab has them ready; what is in other files may be read before.
        for node in "ab":
            until(lambda node=node: len(self.objects(node, "Pod")) == len(self.pods))

    def model(self, policies: list[Manifest]) -> World:
        pods = [place.pod for place in self.places if place.pod is not None]
        return World(pods, cases.NAMESPACES, policies, self.services)

    def write(self, policies: list[Manifest], number: int) -> None:
        """Put these policies, and no others, into the manifests, and a mark to wait for."""
        objects = [*policies, *_services(self.services), mark("policies", number)]
        documents = [{"apiVersion": _VERSIONS[one["kind"]], **one} for one in objects]
        replace(self.policies, as_json(documents))

    def objects(self, node: str, kind: str, **query: str) -> list[Manifest]:
        """What a node knows, with statuses of what is in force."""
        run_dir = self.lab.run_dir / self.lab.name / "nodes" / f"{node}.weft"
        items: list[Manifest] = ask(run_dir, "/objects", {"kind": kind, **query}.items())["items"]
        return items

    def marks(self, node: str) -> dict[str, int]:
        """The numbers that a node has in force of each file's mark, if those are the newest that it
        knows of."""
        items = self.objects(node, "NetworkPolicy", namespace=MARKS)
        names = [one["metadata"]["name"].rsplit("-", 1) for one in items if one.get("status")]
        return {file: int(number) for file, number in names}

    def until_in_force(self, marks: dict[str, int]) -> None:
        """On both nodes."""
        for node in "ab":
            until(lambda node=node: self.marks(node) == marks)

    def enforce(self, policies: list[Manifest]) -> None:
        """These, and wait until both nodes have them."""
        self.written += 1
        self.write(policies, self.written)
        self.until_in_force({"policies": self.written})

    def pods_file(self, node: str) -> PodsFile:
        return PodsFile(self.lab.run_dir / self.lab.name / "manifests" / f"pods.{node}.yaml", node)

    def place(self, name: str) -> Place:
        return next(place for place in self.places if place.name == name)

    def seen_at(self, name: str) -> list[tuple[str, float]]:
        """What has come to a place since it was last asked, and when."""
        seen: list[tuple[str, float]] = self.all_at_once({name: {"seen": 1}})[name]["seen"]
        return seen

    def seen(self, name: str) -> list[str]:
        return [text for text, _ in self.seen_at(name)]

    def all_at_once(self, orders: dict[str, Any]) -> dict[str, Any]:
        """An order for each prober by name; their answers."""
        for name, order in orders.items():
            self.controls[name].send(order)
        return {name: self.controls[name].receive() for name in orders}


class PodsFile:
    """The manifests of a node's pods, as the lab has written them (it does so again when one of
    them ends), to be changed."""

    def __init__(self, path: Path, node: str) -> None:
        self._path = path
        self._node = node
        self._original = self._written = path.read_text()
        self.pods: list[Manifest] = list(yaml.safe_load_all(self._original))

    def at(self, address: str) -> Manifest:
        return next(pod for pod in self.pods if pod["status"]["podIP"] == address)

    def write(self, number: int) -> None:
        assert self._path.read_text() == self._written, "the lab has written it meanwhile"
        self._written = as_json([*self.pods, mark(self._node, number)])
        replace(self._path, self._written)

    def restore(self) -> None:
        replace(self._path, self._original)


class Control:
    """The test's end of a prober's socket."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> Control:
        until(lambda: os.path.exists(self._path))
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(LIMIT_S)
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                self._socket.connect(self._path)
                break
            except ConnectionRefusedError:  # it is bound and does not listen yet
                assert time.monotonic() < deadline
        self._lines = self._socket.makefile("rb")
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()

    def send(self, order: Any) -> None:
        self._socket.sendall(json.dumps(order).encode() + b"\n")

    def receive(self) -> Any:
        line = self._lines.readline()
        assert line, f"the prober at {self._path} has ended"
        return json.loads(line)


@contextlib.contextmanager
def scene(directory: Path, name: str = "mx") -> Iterator[Scene]:
    """Up, without policies."""
    policies = directory / "policies"
    policies.mkdir()
    (policies / "policies.yaml").write_text("")
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(lab_of(directory, name, config(directory)))
        done = lab.up("--wait", "120")
        assert done.returncode == 0, done.stderr
        _connect_the_world(lab)
        yield Scene(lab, directory, stack)


def config(directory: Path) -> str:
    pods = []
    for place, pod in enumerate(cases.PODS):
        key = f"{pod.namespace}/{pod.name}"
        pods.append(
            {
                "name": pod.name,
                "namespace": pod.namespace,
                "node": "ab"[place % 2],
                "labels": pod.labels,
                "serviceAccount": pod.account,
                "command": ["python3", str(PROBER), _control(directory, key), key],
                "ports": [
                    {"name": name, "port": port, "protocol": protocol}
                    for name, (protocol, port) in pod.ports.items()
                ],
            }
        )
    namespaces = [{"name": name, "labels": labels} for name, labels in cases.NAMESPACES.items()]
    # PyYAML leaves y bare, which others read as true.
    return json.dumps(
        {
            "nodes": [{"name": "a"}, {"name": "b"}],
            "outside": [{"name": "world"}],
            "pods": pods,
            "namespaces": [*namespaces, {"name": MARKS}],
            "manifests": ["policies"],
        }
    )


def mark(file: str, number: int) -> Manifest:
    """What says, once it is in force, that all of its file is."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{file}-{number}", "namespace": MARKS},
        "spec": {"podSelector": {}},
    }


def as_json(objects: Sequence[Manifest]) -> str:
    """Which is YAML as well."""
    return "\n---\n".join(map(json.dumps, objects))


def replace(file: Path, text: str) -> None:
    """At once, for whoever reads it."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.rename(file)


def _control(directory: Path, name: str) -> str:
    return str(directory / f"{name.replace('/', '.')}.sock")


def _place(plan: PodPlan) -> Place:
    meant = next(p for p in cases.PODS if (p.namespace, p.name) == (plan.namespace, plan.name))
    pod = Pod(
        plan.namespace, plan.name, plan.addresses[0], meant.labels, meant.account, meant.ports
    )
    return Place(plan.key, "pod", plan.addresses, plan.node, pod)


def _services(services: dict[tuple[str, str], list[str]]) -> Iterator[Manifest]:
    for (namespace, name), addresses in services.items():
        metadata = {"name": name, "namespace": namespace}
        yield {"kind": "Service", "metadata": metadata, "spec": {"ports": [{"port": 80}]}}
        yield {
            "kind": "EndpointSlice",
            "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4",
            "ports": [{"port": 80}],
            "endpoints": [{"addresses": [address]} for address in addresses],
        }


def _connect_the_world(lab: Lab) -> None:
    """Its addresses are outside/world's, and pods are reached from there."""
    plan = LabDir(lab.run_dir, lab.name).plan()
    assert plan is not None
    (world,) = plan.outside
    for address in WORLD:
        _ip(world.netns, "address", "add", address, "dev", "lo")
        via = world.addresses[":" in address]
        _ip(plan.fabric.netns, "route", "add", address, "via", via)
    for node in plan.nodes:
        for pods, via in zip(node.pod_ranges, node.addresses, strict=True):
            _ip(plan.fabric.netns, "route", "add", pods, "via", via)


def _ip(netns: str, *command: str) -> None:
    family = "-6" if any(":" in word for word in command) else "-4"
    subprocess.run(["ip", "-n", Path(netns).name, family, *command], check=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(LIMIT_S)
