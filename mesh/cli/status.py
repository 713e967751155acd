"""`weft status`: how the running gateway is doing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mesh.cli.certs import identity_table
from mesh.cli.client import ask
from mesh.cli.output import dump, table


def run(run_dir: Path, output: str) -> None:
    """Exit 0 when ready and whole, else 1."""
    status: dict[str, Any] = ask(run_dir, "/status")
    if output != "text":
        dump(status, output)
    else:
        _show(status)
    problems = status["problems"].get("error", 0)
    healthy = status["ready"] and not status["degraded"] and not problems
    raise SystemExit(0 if healthy else 1)


def _show(status: dict[str, Any]) -> None:
    version = status["config"]["version"]
    click.echo(f"ready:      {'yes' if status['ready'] else 'no'}")
    if status["cluster"] is None:
        click.echo(f"manifests:  {status['manifests']}")
    else:
        click.echo(f"cluster:    {status['cluster']}")
    click.echo(f"admin:      {_admin(status['admin'])}")
    click.echo(f"agent:      pid {status['agent']['pid']}, configuration {version}")
    if status["steered"] is not None:
        click.echo(f"steered:    workloads in {status['steered']}")
    elif status["notSteered"] is not None:
        click.echo(f"steered:    {status['notSteered']}")
    if status["notInKernel"] is not None:
        click.echo(f"kernel:     no requests: {status['notInKernel']}")
    elif status["kernelRules"] is not None:
        _show_rules(status["kernelRules"])
    if full := status["pairSeriesFull"]:
        click.echo(
            f"            {full} workers have no room to count further clients' requests there"
        )
    objects = ", ".join(f"{count} {kind}" for kind, count in sorted(status["objects"].items()))
    click.echo(f"objects:    {objects or 'none'}")
    problems = status["problems"]
    found = ", ".join(_count(*pair) for pair in sorted(problems.items()))
    more = "; see 'weft get problems'" if found else ""
    click.echo(f"problems:   {found or 'none'}{more}")
    click.echo(f"flows:      {_flows(status['flows'])}")
    if status["datapath"] is not None:
        click.echo(f"datapath:   {_counts(status['datapath'])}")
    if status["tunnels"] is not None:
        click.echo(f"tunnels:    {_tunnels(status['tunnels'])}")
    click.echo()
    table(
        ["WORKER", "PID", "CONFIGURATION", "STATE"],
        [_worker(worker, version) for worker in status["workers"]],
    )
    if status["ports"]:
        click.echo()
        table(
            ["ADDRESS", "PORT", "BOUND"],
            [
                [port["address"], str(port["port"]), "yes" if port["bound"] else "no"]
                for port in sorted(status["ports"], key=lambda one: (one["port"], one["address"]))
            ],
        )
    if status["svids"] is not None:
        click.echo()
        identity_table(status["svids"])
    reasons = [*(f"not ready: {text}" for text in status["notReady"]), *status["degraded"]]
    if reasons:
        click.echo()
        for text in dict.fromkeys(reasons):
            click.echo(f"! {text}")


def _show_rules(rules: dict[str, str]) -> None:
    """Which run in the kernel; why the others do not."""
    own = sum(not why for why in rules.values())
    click.echo(f"kernel:     {own} of {len(rules)} rules of routes between pods of this node")
    for rule, why in sorted(rules.items()):
        if why:
            click.echo(f"            not {rule}: {why}")


def _count(level: str, count: int) -> str:
    plain = level == "unsupported" or count == 1
    return f"{count} {level}" if plain else f"{count} {level}s"


def _flows(flows: dict[str, Any]) -> str:
    seen = _counts(flows["seen"])
    lost = _counts(flows["lost"])
    return f"{seen}; lost: {lost}" if lost != "none" else seen


def _tunnels(tunnels: dict[str, int]) -> str:
    told = f"{tunnels['out']} to other nodes, {tunnels['in']} from them"
    outliving = tunnels["outliving"]
    return f"{told}; older than their certificates: {outliving}" if outliving else told


def _counts(counts: dict[str, int]) -> str:
    """The most frequent first."""
    found = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{count} {name}" for name, count in found if count) or "none"


def _admin(address: str | None) -> str:
    return f"http://{address}/metrics" if address else "none"


def _worker(worker: dict[str, Any], version: int) -> list[str]:
    if worker["lagging"]:
        state = "does not answer"
    elif worker["version"] is None:
        state = "starting"
    elif worker["version"] != version:
        state = "behind"
    else:
        state = f"refuses {len(worker['refused'])}" if worker["refused"] else "ok"
    shown = "none" if worker["version"] is None else str(worker["version"])
    return [str(worker["id"]), str(worker["pid"]), shown, state]
