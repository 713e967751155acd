"""`weft lab`: a cluster on one host. The work is in mesh.lab, imported when a command runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mesh.cli.client import CliError, UsageError, ask
from mesh.cli.output import dump, note, table

if TYPE_CHECKING:
    from mesh.lab.status import LabStatus

F = TypeVar("F", bound=Callable[..., Any])
# In a source tree, whose examples are not installed.
_EXAMPLE = Path(__file__).parents[2] / "examples" / "lab" / "lab.yaml"
_FOLLOW_S = 0.2

_name_option = click.option("--name", help="The lab.  [default: the only one]")
_run_dir_option = click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/run/weft-lab"),
    show_default=True,
    help="Where labs keep their files.",
)


class _NoSuchCommand(CliError):
    """As a shell says it."""

    exit_code = 127


class _Group(click.Group):
    """Turns what is wrong with a lab into a message and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        from mesh.lab.errors import LabError, NoSuchCommand

        try:
            return super().invoke(ctx)
        except LabError as error:
            told = _NoSuchCommand if isinstance(error, NoSuchCommand) else CliError
            raise told(str(error)) from None


@click.group(cls=_Group)
def lab() -> None:
    """A cluster on this host: nodes, pods and Services in network namespaces and cgroups.

    Needs root, and nothing else: no container runtime, no internet, nothing of the host's network.

    Exit codes: 0 well, 1 a problem was found, 2 wrong usage; of exec the command's.
    """


@lab.command()
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--name", help="Instead of the name in the file; several labs can be up at once.")
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds to wait for pods to become ready.",
)
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Put the lab's objects on this API server and let the nodes read from there; they stay"
    " when the lab goes.",
)
@click.option(
    "--kubernetes",
    is_flag=True,
    help="The same with the API server of $KUBECONFIG, or else of ~/.kube/config.",
)
@_run_dir_option
def up(
    file: Path | None,
    name: str | None,
    wait: float,
    kubeconfig: Path | None,
    kubernetes: bool,
    run_dir: Path,
) -> None:
    """Make the lab that FILE describes, and leave it running.

    Without FILE it is examples/lab/lab.yaml: two nodes and a small shop. The format is described in
    mesh/lab/config.py. What a killed 'up' left is removed first.

    Exit codes: 0 all pods are ready, 1 it cannot be made or some are not, 2 wrong usage.
    """
    from mesh.lab.lab import up as make

    if file is None:
        if not _EXAMPLE.exists():
            raise UsageError("say which FILE describes the lab: no example is installed")
        file = _EXAMPLE
    if kubernetes and kubeconfig is None:
        kubeconfig = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
        if not kubeconfig.is_file():
            raise UsageError(f"{kubeconfig} is no file: say with --kubeconfig where the cluster is")
    start = time.monotonic()
    status = make(file, run_dir, name, wait, kubeconfig)
    plan = status.plan
    note(
        f"lab {plan.name} is up: {len(plan.nodes)} nodes, {len(plan.pods)} pods, "
        f"{len(plan.services)} services in {time.monotonic() - start:.1f} s"
    )
    for node, why in _not_steered(status, run_dir).items():
        note(f"! node {node} is not steered: {why}")
    if not status.healthy:
        for node, weft in status.weft.items():
            if weft == "Ended":
                note(f"! Weft of node {node} does not run: see 'weft lab logs node/{node}'")
        for pod in status.pods.values():
            if not pod.well:
                note(f"! {pod.key} is not ready ({_state(pod)}): see 'weft lab logs {pod.key}'")
        raise SystemExit(1)


@lab.command()
@_name_option
@_run_dir_option
def down(name: str | None, run_dir: Path) -> None:
    """Remove a lab with everything in it.

    Exit codes: 0 removed, 1 there is none or it cannot be removed, 2 wrong usage.
    """
    from mesh.lab.lab import down as remove

    note(f"lab {remove(run_dir, name)} is gone")


@lab.command()
@_name_option
@click.option(
    "-o", "--output", type=click.Choice(["table", "json", "yaml"]), default="table", help="Format."
)
@_run_dir_option
def status(name: str | None, output: str, run_dir: Path) -> None:
    """Show nodes, pods and Services of a lab.

    Exit codes: 0 all is well, 1 something is not or there is no lab, 2 wrong usage.
    """
    from mesh.lab.status import status as look

    found = look(run_dir, name)
    not_steered = _not_steered(found, run_dir)
    if output == "table":
        _show(found, not_steered)
    else:
        dump(_plain(found, not_steered), output)
    raise SystemExit(0 if found.healthy and not not_steered else 1)


@lab.command()
@click.argument("pod")
@_name_option
@_run_dir_option
def stop(pod: str, name: str | None, run_dir: Path) -> None:
    """Stop a pod as a cluster does; its endpoints are terminating, then gone.

    Its process gets SIGTERM and five seconds. The pod keeps its addresses for 'weft lab start'.
    node/NAME: end the node's Weft in good order; else it is started again whenever it ends.

    Exit codes: 0 stopped, 1 no such lab, pod or node, 2 wrong usage.
    """
    from mesh.lab.use import stop as end

    note(f"{end(run_dir, name, pod)} is stopped")


@lab.command()
@click.argument("pod")
@_name_option
@_run_dir_option
def start(pod: str, name: str | None, run_dir: Path) -> None:
    """Start a pod that was stopped or has ended, and wait until it is ready; node/NAME: its Weft.

    Exit codes: 0 it is ready, 1 it is not, it runs already or does not exist, 2 wrong usage.
    """
    from mesh.lab.use import start as begin

    note(f"{begin(run_dir, name, pod)} is ready")


@lab.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("where", metavar="POD")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@_name_option
@_run_dir_option
def exec(where: str, command: tuple[str, ...], name: str | None, run_dir: Path) -> None:
    """Run a command in a pod: weft lab exec cart-1 -- curl http://catalog/

    POD is NAME or NAMESPACE/NAME; node/NAME and outside/NAME are a node and a client outside.
    Options stand before POD.

    Exit codes: the command's; 1 no such lab or pod, 2 wrong usage, 127 no such command.
    """
    from mesh.lab.use import execute

    if command[0].startswith("-") and command[0] != "--":
        raise click.UsageError(f"{command[0]}: options stand before POD, the command after --")
    execute(run_dir, name, where, command[1:] if command[0] == "--" else command)


@lab.command()
@click.argument("pod")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written, until Ctrl-C.")
@_name_option
@_run_dir_option
def logs(pod: str, follow: bool, name: str | None, run_dir: Path) -> None:
    """Show what a pod's process wrote; node/NAME: what went wrong in a node's supervisor.

    Exit codes: 0 shown, 1 no such lab or pod, 2 wrong usage.
    """
    from mesh.lab.use import log_file

    file = log_file(run_dir, name, pod)
    if not file.exists():
        return
    with open(file, "rb") as stream:
        while True:
            while piece := stream.read(65536):
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
            if not follow or not file.exists():
                return
            time.sleep(_FOLLOW_S)


def _state(pod: Any) -> str:
    if pod.phase == "Exited":
        return f"Exited {pod.exit_code}"
    return f"{pod.phase}: {pod.message}" if pod.message else str(pod.phase)


def _not_steered(status: LabStatus, run_dir: Path) -> dict[str, str]:
    """The nodes whose Weft runs and has not put its eBPF data path in force, and why."""
    from mesh.lab.state import LabDir

    lab = LabDir(run_dir, status.plan.name)
    found = {}
    for node, weft in status.weft.items():
        if weft != "Running":
            continue
        try:
            why = ask(lab.weft(node).path, "/status")["notSteered"]
        except CliError as error:
            why = error.message
        if why is not None:
            found[node] = why
    return found


def _plain(status: LabStatus, not_steered: dict[str, str]) -> dict[str, Any]:
    """The status as plain data: the plan with what is the case beside it."""
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(status.plan)
    plain["complete"] = status.complete
    plain["authority"] = {"running": status.authority}
    for node in plain["nodes"]:
        node["running"] = status.supervisors[node["name"]]
        node["weft"] = status.weft[node["name"]]
        node["notSteered"] = not_steered.get(node["name"])
    for pod in plain["pods"]:
        pod["status"] = msgspec.to_builtins(status.pods[f"{pod['namespace']}/{pod['name']}"])
    return plain


def _show(status: LabStatus, not_steered: dict[str, str]) -> None:
    plan = status.plan
    authority = "runs" if status.authority else "has ended"
    click.echo(f"lab {plan.name}{'' if status.complete else ', not complete'}")
    click.echo(f"the authority of {plan.trust_domain} {authority}")
    click.echo()
    table(
        ["NODE", "ADDRESSES", "PODS", "RUNNING", "WEFT", "STEERED"],
        [
            [
                node.name,
                ",".join(node.addresses),
                ",".join(node.pod_ranges),
                str(status.supervisors[node.name]),
                status.weft[node.name],
                str(node.name not in not_steered),
            ]
            for node in plan.nodes
        ],
    )
    if plan.pods:
        click.echo()
        pods = [(pod, status.pods[pod.key]) for pod in plan.pods]
        table(
            ["NAMESPACE", "POD", "READY", "STATE", "NODE", "ADDRESSES"],
            [
                [
                    *(pod.namespace, pod.name, str(now.ready), _state(now)),
                    *(pod.node, ",".join(pod.addresses)),
                ]
                for pod, now in pods
            ],
        )
    if plan.services:
        click.echo()
        table(
            ["NAMESPACE", "SERVICE", "CLUSTER-IPS", "PORTS"],
            [
                [
                    one.namespace,
                    one.name,
                    ",".join(one.cluster_ips) or "headless",
                    ",".join(f"{port.port}/{port.protocol}" for port in one.ports),
                ]
                for one in plan.services
            ],
        )
    if plan.outside:
        click.echo()
        table(
            ["OUTSIDE", "ADDRESSES"], [[one.name, ",".join(one.addresses)] for one in plan.outside]
        )
    if not_steered:
        click.echo()
    for node_name, why in not_steered.items():
        click.echo(f"! node {node_name} is not steered: {why}")
