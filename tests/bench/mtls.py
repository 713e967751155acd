"""Mutual TLS from node to node: Weft's two hops beside two Envoys.

Two pairs of nodes of the same shape, a client pod on the near one and a backend pod on the far one:

    nodes plain-near, plain-far    no Weft: hops direct, envoy
    nodes weft-near, weft-far      Weft: hop weft-kernel

    client ── veth ── near node ── link ── far node ── veth ── backend
    wrk               hop                  hop                 nginx

`direct` is neither proxied nor encrypted. Both others are a process with one worker on each node,
which speak TLS 1.3 with certificates of ECDSA P-256 on both sides and verify each other's name.
Scenarios: `mtls` and `mtls-1MiB` are HTTP requests on connections that last; `mtls-connect` opens
a connection for each request, to a port whose protocol nobody declares: Envoy then makes a TLS
handshake for each, Weft where no tunnel rests. CPU and memory are those of both hops.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import trustme
import yaml

from bench.configs import (
    Command,
    envoy_command,
    envoy_tls,
    http_filter,
    nginx_backend,
    tcp_filter,
)
from bench.peers import Row, Work, alternate
from bench.world import (
    WITHIN_S,
    BenchFailed,
    Hop,
    change_weft,
    pid_of,
    pod_of,
    start,
    tail,
    until,
    wait_for,
    write_files,
)
from bpf.maps import counters
from bpf.reasons import Reason
from mesh.cli.client import ask, ask_stream
from mesh.lab import lab as labs
from mesh.lab.enter import enter_pod
from mesh.lab.plan import Plan
from mesh.lab.state import LabDir

HOPS = ("direct", "weft-kernel", "envoy")
_PAIRS = {"direct": "plain", "envoy": "plain", "weft-kernel": "weft"}
_BACKEND_PORT = 8080
# Of the Service: HTTP, and what nobody says the protocol of.
_HTTP, _OPAQUE = 80, 81
# Of the peers, near and far.
_PEER_HTTP, _PEER_TCP = 10080, 10081

_WORKS = (
    (Work("mtls", "small"), _HTTP),
    (Work("mtls-1MiB", "1MiB"), _HTTP),
    (Work("mtls-connect", "small", ("Connection: close",)), _OPAQUE),
)


def compare(
    rounds: int,
    seconds: float,
    directory: Path,
    run_dir: Path,
    name: str,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """As bench.peers.compare."""
    with _world(directory, run_dir, name) as made:
        works = [(work, made[port]) for work, port in _WORKS]
        return alternate(works, rounds, seconds, directory, progress=progress)


@contextlib.contextmanager
def _world(directory: Path, run_dir: Path, name: str) -> Iterator[dict[int, list[Hop]]]:
    """The hops for each port, all of which answer."""
    write_files(directory / "files")
    file = directory / "lab.yaml"
    file.write_text(yaml.safe_dump(_lab(directory)))
    labs.up(file, run_dir, name, WITHIN_S)
    try:
        lab = LabDir(run_dir, name)
        plan = lab.existing_plan()
        with contextlib.ExitStack() as stack:
            for node in plan.nodes:
                change_weft(lab, node, stack, "auto" if node.name.startswith("weft") else None)
            envoys = _start_envoys(directory, plan, stack)
            made = {
                port: [_hop(hop, port, directory, lab, plan, envoys) for hop in HOPS]
                for port in (_HTTP, _OPAQUE)
            }
            for hops in made.values():
                for hop in hops:
                    wait_for(hop, directory / "files")
            _check_tunnels(lab)
            yield made
    finally:
        labs.down(run_dir, name)


def _lab(directory: Path) -> dict[str, object]:
    backend = nginx_backend(directory, _BACKEND_PORT, directory / "files")
    backend.file.write_text(backend.config)
    pods: list[dict[str, object]] = []
    for pair in ("plain", "weft"):
        pods.append({"name": f"client-{pair}", "node": f"{pair}-near"})
        pods.append(
            {
                "name": f"backend-{pair}",
                "node": f"{pair}-far",
                "command": list(backend.argv),
                "ports": [{"name": "main", "port": _BACKEND_PORT}],
            }
        )
    ports = [
        {"name": "http", "port": _HTTP, "targetPort": "main"},
        {"name": "opaque", "port": _OPAQUE, "targetPort": "main"},
    ]
    return {
        "nodes": [
            {"name": f"{pair}-{end}"} for pair in ("plain", "weft") for end in ("near", "far")
        ],
        "pods": pods,
        "services": [{"name": "backend-weft", "ports": ports}],
    }


def _start_envoys(
    directory: Path, plan: Plan, stack: contextlib.ExitStack
) -> dict[str, tuple[int, ...]]:
    """Two of them; their ids by the name of the hop that they are."""
    authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
    roots = directory / "roots.pem"
    authority.cert_pem.write_to_path(str(roots))
    files = {}
    for end in ("near", "far"):
        issued = authority.issue_cert(f"{end}.example", key_type=trustme.KeyType.ECDSA)
        files[end] = directory / f"{end}-chain.pem", directory / f"{end}-key.pem"
        issued.cert_chain_pems[0].write_to_path(str(files[end][0]))
        issued.private_key_pem.write_to_path(str(files[end][1]))
    near, far = plan.node("plain-near"), plan.node("plain-far")
    backend = f"{pod_of(plan, 'backend-plain').addresses[0]}:{_BACKEND_PORT}"
    to_far = envoy_tls(*files["near"], roots, "far.example", server=False)
    from_near = envoy_tls(*files["far"], roots, "near.example", server=True)
    at = {
        node.name: (f"{node.addresses[0]}:{_PEER_HTTP}", f"{node.addresses[0]}:{_PEER_TCP}")
        for node in (near, far)
    }
    commands: dict[str, Command] = {
        near.name: envoy_command(
            directory / "near.json",
            [
                (at[near.name][0], http_filter("http"), None),
                (at[near.name][1], tcp_filter("tcp"), None),
            ],
            {"http": (at[far.name][0], to_far), "tcp": (at[far.name][1], to_far)},
        ),
        far.name: envoy_command(
            directory / "far.json",
            [
                (at[far.name][0], http_filter("backend"), from_near),
                (at[far.name][1], tcp_filter("backend"), from_near),
            ],
            {"backend": (backend, None)},
        ),
    }
    pids = []
    for node in (near, far):
        command = commands[node.name]
        command.file.write_text(command.config)
        pids.append(start(command.argv, node, directory / f"envoy-{node.name}.log", stack))
    return {"envoy": tuple(pids)}


def _hop(
    name: str,
    port: int,
    directory: Path,
    lab: LabDir,
    plan: Plan,
    envoys: dict[str, tuple[int, ...]],
) -> Hop:
    pair = _PAIRS[name]
    client, backend = pod_of(plan, f"client-{pair}"), pod_of(plan, f"backend-{pair}")
    near, far = plan.node(f"{pair}-near"), plan.node(f"{pair}-far")
    roots, log = envoys.get(name, ()), lab.log(backend)
    match name:
        case "direct":
            at = f"{backend.addresses[0]}:{_BACKEND_PORT}"
        case "envoy":
            at = f"{near.addresses[0]}:{_PEER_HTTP if port == _HTTP else _PEER_TCP}"
            log = directory / f"envoy-{near.name}.log"
        case _:
            service = next(one for one in plan.services if one.name == "backend-weft")
            at = f"{service.cluster_ips[0]}:{port}"
            roots = tuple(int((lab.weft(node.name).holder() or {})["pid"]) for node in (near, far))
            log = lab.weft_log(near.name)

    def enter() -> None:
        enter_pod(lab, client)

    return Hop(name, f"http://{at}", pid_of(lab, plan, backend), roots, enter, log)


def _check_tunnels(lab: LabDir) -> None:
    """After requests to each port. BenchFailed: they went another way than between proxies."""
    counted = counters(lab.weft("weft-near").pins)
    for reason in (Reason.TO_PROXY, Reason.TO_RELAY):
        if not counted[reason]:
            raise BenchFailed(
                f"weft-kernel: no connection of the client was counted as {reason.name}:"
                f"{tail(lab.weft_log('weft-near'))}"
            )
    # HTTP's tunnels stay; connections to the other port have ended, and have left records.
    for node, end in (("weft-near", "out"), ("weft-far", "in")):
        run_dir = lab.weft(node).path
        until(
            lambda run_dir=run_dir, end=end: bool(ask(run_dir, "/status")["tunnels"][end]),
            f"weft-kernel: node {node} has no tunnel {end}",
            lab.weft_log(node),
        )
        until(
            lambda run_dir=run_dir: "mtls" in _relayed(run_dir),
            f"weft-kernel: no connection that node {node} relayed was by mutual TLS",
            lab.weft_log(node),
        )


def _relayed(run_dir: Path) -> set[str]:
    """How connections were encrypted that this node did not take for HTTP."""
    lines = ask_stream(run_dir, "/flows")
    flows = [json.loads(line).get("flow") for line in lines if line]
    return {one.get("encryption", "none") for one in flows if one and "http" not in one}
