"""`weft install`, `weft uninstall`, `weft check`: Weft and the cluster of a kubeconfig."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mesh.cli.client import CliError
from mesh.cli.output import dump

if TYPE_CHECKING:
    from mesh.install.finding import Finding
    from mesh.sources.kubernetes_client import Client

F = TypeVar("F", bound=Callable[..., Any])


def _cluster_options(function: F) -> F:
    function = click.option(
        "--namespace", default="weft-system", show_default=True, help="Weft's own namespace."
    )(function)
    return click.option(
        "--kubeconfig",
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="Way to the cluster.  [default: $KUBECONFIG, or ~/.kube/config]",
    )(function)


@click.command()
@_cluster_options
@click.option("--image", default="weft:0.1.0", show_default=True, help="The image of Weft.")
@click.option(
    "--steer/--no-steer",
    default=True,
    show_default=True,
    help="Steer and filter the connections of the cluster's pods; else an ingress gateway alone.",
)
@click.option(
    "--load-balancer",
    is_flag=True,
    help="Gateways that name no address get a Service of type LoadBalancer; the controller may"
    " write Services then.",
)
@click.option(
    "--cni-bin-dir",
    default="/opt/cni/bin",
    show_default=True,
    help="Where the nodes' container runtime looks for CNI plugins.",
)
@click.option(
    "--cni-conf-dir",
    default="/etc/cni/net.d",
    show_default=True,
    help="Where it looks for the list of them.",
)
@click.option("--dry-run", is_flag=True, help="Print the manifests, do nothing.")
def install(kubeconfig: Path | None, dry_run: bool, **values: Any) -> None:
    """Install Weft in a cluster, or bring what is there to this version.

    The CustomResourceDefinitions of Gateway API are the cluster's: 'weft check' says whether they
    are there, and where to get them.

    Exit codes: 0 installed, 1 it could not be, 2 wrong usage.
    """
    from mesh.install import cluster, manifests

    if dry_run:
        click.echo(manifests.everything(**values), nl=False)
        return
    objects = manifests.objects(**values)
    every = manifests.objects(**{**values, "load_balancer": True})
    paths = set(map(cluster.path_of, objects))
    others = [obj for obj in every if cluster.path_of(obj) not in paths]
    _run(kubeconfig, lambda client: cluster.install(client, objects, others, click.echo))


@click.command()
@_cluster_options
@click.option("--wait", default=120.0, show_default=True, help="Seconds to wait until it is gone.")
def uninstall(kubeconfig: Path | None, namespace: str, wait: float) -> None:
    """Remove Weft from a cluster. Gateways and routes stay, with the statuses that they have; their
    Services of type LoadBalancer go, and with those the addresses that clients know.

    Exit codes: 0 removed or not there, 1 it could not be, 2 wrong usage.
    """
    from mesh.install import cluster, manifests

    objects = manifests.objects(namespace=namespace, load_balancer=True)
    _run(kubeconfig, lambda client: cluster.uninstall(client, objects, click.echo, wait))


@click.command()
@_cluster_options
@click.option(
    "-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text", help="Format."
)
@click.option(
    "--only", type=click.Choice(["host", "cluster"]), help="Leave the other alone.  [default: both]"
)
def check(kubeconfig: Path | None, namespace: str, output: str, only: str | None) -> None:
    """Check this host's kernel and a cluster: whether Weft can work there, and what to do if not.

    As root the eBPF self-test is run, in a cgroup of its own.

    Exit codes: 0 nothing failed, 1 something did, 2 wrong usage.
    """
    import tempfile

    from mesh.install import check as checks
    from mesh.install import check_node

    findings: list[Finding] = []
    if only != "cluster":
        findings += checks.host()
        findings += check_node.node()
        with tempfile.TemporaryDirectory(prefix="weft-check-") as directory:
            findings += checks.kernel(Path(directory))
    if only != "host":

        async def ask(client: Client) -> None:
            findings.extend([one async for one in checks.cluster(client, namespace)])

        _run(kubeconfig, ask)
    if output != "text":
        dump([finding._asdict() for finding in findings], output)
    else:
        for finding in findings:
            todo = f"\n{'':8} {finding.todo}" if finding.todo else ""
            click.echo(f"{finding.result:8} {finding.what}: {finding.found}{todo}")
    raise SystemExit(1 if any(finding.result == "failed" for finding in findings) else 0)


def _run(kubeconfig: Path | None, work: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
    import asyncio

    from mesh.install.cluster import InstallError
    from mesh.sources.kubernetes_client import Client, ServerError, SourceError

    async def go() -> None:
        client = Client(kubeconfig)
        try:
            await client.open()
            await work(client)
        finally:
            await client.close()

    try:
        asyncio.run(go())
    except (SourceError, ServerError, InstallError) as error:
        raise CliError(str(error)) from None
