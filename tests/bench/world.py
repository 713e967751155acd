"""The lab that peers are compared in: where client, hop and backend are.

Three nodes of the same shape, each with a client pod and a backend pod of its own:

    node plain    no Weft: hops direct, envoy, nginx, haproxy
    node kernel   Weft with --datapath=kernel: hop weft-kernel
    node proxy    Weft with --datapath=proxy: hop weft-proxy

    client pod ── veth ── the node's network namespace ── veth ── backend pod
    wrk                   hop, a process of the node              nginx

So that the comparison is fair:

- Every hop is a process in the network namespace of a node, outside the steered cgroup, and listens
  on the node's address; packets from the client to it and from it to the backend take the same two
  veths. For `direct` the node forwards the packets from the one to the other.
- The client is the same everywhere: wrk with one thread, in the pod's network namespace and cgroup.
  Of a peer it asks the node's address and port, of Weft the ClusterIP of the Service, as a workload
  does, and for `direct` the pod's address.
- `direct` and the peers pay nothing for Weft: on their node there is none, no program at the
  sockets or the veths, so that `direct` is what the kernel does by itself.
- The backend is nginx with one worker and the same configuration in all three pods; only one of
  them is asked at a time.
- Hops have one worker each, keep connections alive on both sides, and write no log of requests.
  What Weft does beside that, metrics and flow records, it does here too.
- Weft and Envoy have the same 20 rules, by header, of which the last one is for requests without
  that header; Weft has a policy about methods and paths besides.
- That a request to Weft goes through its proxy, and by redirect or not as the hop's name says, is
  read from the counters of the eBPF programs before anything is measured.
- The hop's CPU and memory are those of all its processes: for Weft worker, agent and supervisor,
  for nginx master and worker.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from bench.configs import PEERS, ROUTE_HEADER, ROUTES, nginx_backend
from bpf import pins
from bpf.maps import counters
from bpf.reasons import Reason
from mesh.cli.client import CliError, ask
from mesh.lab import lab as labs
from mesh.lab import use
from mesh.lab.enter import enter_place, enter_pod
from mesh.lab.plan import NodePlan, Plan, PodPlan
from mesh.lab.state import LabDir
from mesh.lab.status import look

WEFT = {"weft-kernel": "kernel", "weft-proxy": "proxy"}
WEFT_NODES = {node: node for node in WEFT.values()}
HOPS = ("direct", *WEFT, *PEERS)
# Files, and their bytes.
FILES = {"small": 300, "file": 300, "1MiB": 2**20}
PROGRAMS = ("wrk", "nginx", "haproxy", "curl")

_PLAIN = "plain"
# An HTTPRoute has no more.
_RULES_MAX = 16
_PORT = 8080
_FIRST_PEER_PORT = 10000
# For anything to start or end.
WITHIN_S = 30.0
_LOOK_S = 0.05


class BenchFailed(Exception):
    """There is nothing to measure; why."""


class Hop(NamedTuple):
    """`url` ends where the path begins. `roots`: the hop's processes, without descendants."""

    name: str
    url: str
    backend_pid: int
    roots: tuple[int, ...]
    enter: Callable[[], None]
    log: Path


@contextlib.contextmanager
def world(hops: Sequence[str], directory: Path, run_dir: Path, name: str) -> Iterator[list[Hop]]:
    """These hops, each of which answers. `directory` is for files, `run_dir` and `name` are the
    lab's. BenchFailed, LabError: it cannot be made."""
    write_files(directory / "files")
    file = directory / "lab.yaml"
    file.write_text(yaml.safe_dump(_lab(hops, directory)))
    (directory / "rules.yaml").write_text(yaml.safe_dump_all(_rules(hops)))
    labs.up(file, run_dir, name, WITHIN_S)
    try:
        lab = LabDir(run_dir, name)
        plan = lab.existing_plan()
        with contextlib.ExitStack() as stack:
            for node in plan.nodes:
                change_weft(lab, node, stack, WEFT_NODES.get(node.name))
            made = [_hop(hop, directory, lab, plan, stack) for hop in hops]
            for hop in made:
                wait_for(hop, directory / "files")
                if hop.name in WEFT:
                    _check_path(hop.name, lab.weft(_node_of(hop.name)).pins)
            yield made
    finally:
        labs.down(run_dir, name)


def _node_of(hop: str) -> str:
    return WEFT.get(hop, _PLAIN)


def write_files(directory: Path) -> None:
    directory.mkdir()
    for name, size in FILES.items():
        (directory / name).write_bytes((b"0123456789abcdef" * (size // 16 + 1))[:size])


def _lab(hops: Sequence[str], directory: Path) -> dict[str, object]:
    """lab.yaml, with the nodes that these hops need."""
    backend = nginx_backend(directory, _PORT, directory / "files")
    backend.file.write_text(backend.config)
    nodes = sorted({_node_of(hop) for hop in hops})
    return {
        "nodes": [{"name": node} for node in nodes],
        "pods": [
            pod
            for node in nodes
            for pod in (
                {"name": f"client-{node}", "node": node},
                {
                    "name": f"backend-{node}",
                    "node": node,
                    "command": list(backend.argv),
                    "ports": [{"name": "http", "port": _PORT}],
                },
            )
        ],
        "services": [
            {
                "name": f"backend-{node}",
                "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
            }
            for node in nodes
        ],
        "manifests": ["rules.yaml"],
    }


def _rules(hops: Sequence[str]) -> Iterator[dict[str, object]]:
    """Routes and a policy for each backend."""
    for node in sorted({_node_of(hop) for hop in hops}):
        about = {"name": f"backend-{node}", "namespace": "default"}
        backend = {"name": f"backend-{node}", "port": 80}
        by_header = [
            {"headers": [{"name": ROUTE_HEADER, "value": f"value-{number}"}]}
            for number in range(ROUTES - 1)
        ]
        rules = [{"matches": [match], "backendRefs": [backend]} for match in (*by_header, {})]
        for first in range(0, ROUTES, _RULES_MAX):
            yield {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "HTTPRoute",
                "metadata": {**about, "name": f"backend-{node}-{first}"},
                "spec": {
                    "parentRefs": [{"group": "", "kind": "Service", **backend}],
                    "rules": rules[first : first + _RULES_MAX],
                },
            }
        allowed = {"method": "GET", "path": "/(small|file|1MiB)"}
        to_ports = {
            "ports": [{"port": str(_PORT), "protocol": "TCP"}],
            "rules": {"http": [allowed, {"method": "HEAD"}]},
        }
        yield {
            "apiVersion": "cilium.io/v2",
            "kind": "CiliumNetworkPolicy",
            "metadata": about,
            "spec": {
                "endpointSelector": {"matchLabels": {"app": f"backend-{node}"}},
                "ingress": [{"toPorts": [to_ports]}],
            },
        }


def change_weft(
    lab: LabDir, node: NodePlan, stack: contextlib.ExitStack, datapath: str | None
) -> None:
    """The lab starts Weft on every node in the same way: end it, and start it with this data path,
    or not at all."""
    run_dir = lab.weft(node.name)
    about = run_dir.holder()
    if not about:
        raise BenchFailed(f"no Weft runs on node {node.name}:{tail(lab.weft_log(node.name))}")
    pid = int(about["pid"])
    argv = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    use.stop(lab.run_dir, lab.name, node.key)
    if datapath is None:
        pins.remove(run_dir.pins)
        return
    # The others keep what is pinned: the filters on the pods' veths belong to a mesh.
    pairs = "on" if datapath == "kernel" else "off"
    options = ("--access-log=off", f"--datapath={datapath}", f"--http-in-kernel={pairs}")
    start((*argv, *options), node, lab.weft_log(node.name), stack)

    def ready() -> bool:
        try:
            return bool(ask(run_dir.path, "/status")["ready"])
        except CliError:
            return False

    until(ready, f"Weft is not ready on node {node.name}", lab.weft_log(node.name))
    if problems := ask(run_dir.path, "/problems")["items"]:
        raise BenchFailed(f"not everything is in force on node {node.name}: {problems}")


def _hop(name: str, directory: Path, lab: LabDir, plan: Plan, stack: contextlib.ExitStack) -> Hop:
    node = plan.node(_node_of(name))
    client, backend = pod_of(plan, f"client-{node.name}"), pod_of(plan, f"backend-{node.name}")
    backend_pid = pid_of(lab, plan, backend)
    at = f"{backend.addresses[0]}:{_PORT}"
    roots: tuple[int, ...] = ()
    log = lab.log(backend)
    if name in WEFT:
        service = next(one for one in plan.services if one.name == backend.name)
        at = service.cluster_ips[0]
        log = lab.weft_log(node.name)
        roots = (int((lab.weft(node.name).holder() or {})["pid"]),)
    elif name in PEERS:
        listen = f"{node.addresses[0]}:{_FIRST_PEER_PORT + HOPS.index(name)}"
        log = directory / f"{name}.log"
        command = PEERS[name](directory, listen, at)
        command.file.write_text(command.config)
        roots = (start(command.argv, node, log, stack),)
        at = listen

    def enter() -> None:
        enter_pod(lab, client)

    return Hop(name, f"http://{at}", backend_pid, roots, enter, log)


def pod_of(plan: Plan, name: str) -> PodPlan:
    pod = plan.place(name)
    assert isinstance(pod, PodPlan)
    return pod


def pid_of(lab: LabDir, plan: Plan, pod: PodPlan) -> int:
    """BenchFailed: it does not run."""
    pid = look(lab, plan).pods[pod.key].pid
    if pid is None:
        raise BenchFailed(f"{pod.key} does not run:{tail(lab.log(pod))}")
    return pid


def start(argv: Sequence[str], node: NodePlan, log: Path, stack: contextlib.ExitStack) -> int:
    """A process of the node; its id. It ends with the lab, however this program ends."""
    with open(log, "ab") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: enter_place(node),
        )
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process.pid


def wait_for(hop: Hop, files: Path) -> None:
    """Until the client gets every file through it, unchanged. BenchFailed: that does not come."""

    def right(name: str) -> bool:
        curl = ("curl", "-sf", "--max-time", "5", f"{hop.url}/{name}")
        got = subprocess.run(curl, stdout=subprocess.PIPE, preexec_fn=hop.enter).stdout
        return got == (files / name).read_bytes()

    for name in FILES:
        failure = f"{hop.name}: {hop.url}/{name} is not answered"
        until(functools.partial(right, name), failure, hop.log)


def _check_path(hop: str, pin_directory: Path) -> None:
    """After a request. BenchFailed: it went another way than this hop's name says, for example
    straight to the backend."""
    counted = counters(pin_directory)
    if not counted[Reason.TO_PROXY]:
        raise BenchFailed(f"{hop}: connections of the client do not go to the proxy")
    if bool(counted[Reason.REDIRECTED]) != (WEFT[hop] == "kernel"):
        how = "by TCP only" if WEFT[hop] == "kernel" else "by redirect"
        raise BenchFailed(f"{hop}: the proxy sends to the client {how}")


def until(condition: Callable[[], bool], otherwise: str, log: Path | None = None) -> None:
    """Wait for what comes with another process's work. BenchFailed: it does not; with the end of
    that process's log."""
    deadline = time.monotonic() + WITHIN_S
    while not condition():
        if time.monotonic() > deadline:
            raise BenchFailed(otherwise + (f" after {WITHIN_S:.0f} s:{tail(log)}" if log else ""))
        time.sleep(_LOOK_S)


def tail(log: Path) -> str:
    """Its last lines."""
    return "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:])
