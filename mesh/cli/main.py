"""The `weft` command. Each command's work is in a module of its own, imported when it runs."""

from __future__ import annotations

from pathlib import Path

import click

from mesh.agent.rundir import default_run_dir
from mesh.cli.certs import authority, certs
from mesh.cli.controller import controller
from mesh.cli.install import check, install, uninstall
from mesh.cli.lab import lab
from mesh.cli.options import MANIFESTS, output_option, plane_options, run_dir_option
from mesh.cli.policy import policy


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Weft: a gateway and service mesh for Gateway API objects.

    Exit codes: 0 well, 1 a problem was found, 2 wrong usage, 3 no gateway runs.
    """


@cli.command()
@click.option("--manifests", type=MANIFESTS, help="Directory of YAML or JSON.")
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Instead of --manifests: the cluster that this file leads to.",
)
@click.option(
    "--source",
    type=click.Choice(["directory", "kubernetes"]),
    help="kubernetes: the cluster of $KUBECONFIG, ~/.kube/config or this pod.  [default: by"
    " --manifests or --kubeconfig]",
)
@click.option(
    "--namespace",
    default="weft-system",
    show_default=True,
    help="Weft's own namespace in the cluster, where the node's Lease is.",
)
@click.option(
    "--secrets-namespace",
    metavar="NAMESPACE",
    help="Read Secrets there, as weft controller --secrets-namespace copies them, and nowhere else."
    "  [default: in all namespaces]",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    help="Proxy processes.  [default: one per core]",
)
@plane_options
@click.option(
    "--admin",
    metavar="ADDRESS:PORT",
    default="127.0.0.1:15090",
    show_default=True,
    help="Where /metrics, /healthz and /readyz are; off: nowhere.",
)
@click.option("--access-log", type=click.Choice(["json", "text", "off"]), help="On stdout.")
@click.option(
    "--steer",
    metavar="CGROUP",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="cgroup v2 directory of workloads that reach Services by ClusterIP, with eBPF.",
)
@click.option(
    "--steer-pods",
    metavar="MOUNT",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Instead of --steer, for a pod with its node's network: the cgroup of the kubelet's pods,"
    " in the node's cgroup v2 that is mounted here. Pods with that network are left alone.",
)
@click.option(
    "--cni-bin-dir",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Install the CNI plugin here, with --cni-conf-dir: the node's /opt/cni/bin.",
)
@click.option(
    "--cni-conf-dir",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Put the CNI plugin behind the first one here, and keep it there: the node's"
    " /etc/cni/net.d. It goes with the DaemonSet weft-agent, or once that has not this option.",
)
@click.option(
    "--netns-dir",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where network namespaces of pods are that are older than the CNI plugin.  [default:"
    " /run/netns]",
)
@click.option(
    "--pins",
    metavar="DIRECTORY",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where eBPF programs and maps are pinned, with --steer: in bpffs, or an empty directory"
    " to mount it at.  [default: bpf in the run directory]",
)
@click.option(
    "--proxy-cgroup",
    metavar="CGROUP",
    type=click.Path(path_type=Path, file_okay=False),
    help="cgroup v2 directory for Weft's own processes, with --steer; made if missing. If it lies"
    " in that of --steer, all that has the node's network is left alone."
    "  [default: that of --steer with .proxy appended]",
)
@click.option(
    "--datapath",
    type=click.Choice(["auto", "kernel", "proxy"]),
    default="auto",
    show_default=True,
    help="How the proxy sends to workloads of this node, with --steer: by redirect in the kernel"
    " if this kernel passes the self-test, by that or nothing, or by TCP.",
)
@click.option(
    "--http-in-kernel",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Whether after a connection's first request later ones go straight from workload to"
    " workload of this node, routed and judged in the kernel, with --steer: if this kernel passes"
    " the self-test and --datapath is not proxy, always, or never.",
)
@click.option(
    "--authority",
    metavar="SOCKET",
    help="Where 'weft authority' answers this node, or 'cluster': asked by"
    " CertificateSigningRequests. Workloads get identities then, and connect to those of other"
    " nodes by mutual TLS.",
)
@click.option(
    "--trust-domain",
    metavar="NAME",
    default="cluster.local",
    show_default=True,
    help="Whose identities workloads have, with --authority.",
)
@click.option(
    "--policy-audit",
    type=click.Choice(["on", "off"]),
    default="off",
    show_default=True,
    help="on: what policies would refuse passes, and is told in flow records only.",
)
@click.option(
    "--flow-buffer",
    metavar="N",
    type=click.IntRange(1, 10_000_000),
    help="Flow records held for 'weft observe', about 1 KiB of memory each.  [default: 16384]",
)
@click.option(
    "--drain-delay",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Seconds that the gateway serves on when it is stopped, after it has said that it leaves:"
    " to who looks at /readyz, and to its cluster.",
)
@click.option(
    "--drain-timeout",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that open connections get when the gateway is stopped.",
)
@run_dir_option
def up(**options: object) -> None:
    """Run the gateway in the foreground, on the manifests in a directory or on a cluster's objects.

    Changes take effect at once. SIGTERM or Ctrl-C stops the gateway when its
    connections are finished; a second one stops it at once.

    Exit codes: 0 stopped as asked, 1 it cannot run or connections were cut, 2 wrong usage.
    """
    from mesh.cli.up import run

    run(options)


@cli.command()
@click.argument("directory", type=MANIFESTS)
@plane_options
@output_option
def validate(directory: Path, output: str, **options: object) -> None:
    """Check the manifests in a directory, without a running gateway.

    Errors are objects that would not be taken; warnings are objects that would not be accepted, and
    kinds that Weft does not implement.

    Exit codes: 0 no errors, 1 errors, 2 wrong usage.
    """
    from mesh.cli.validate import run

    run(directory, output, options)


@cli.command()
@click.argument("kind")
@click.argument("name", required=False)
@click.option("-n", "--namespace", help="Namespace.  [default: default]")
@click.option("-A", "--all-namespaces", is_flag=True, help="All namespaces.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json", "yaml"]),
    default="table",
    help="Format.",
)
@run_dir_option
def get(
    kind: str,
    name: str | None,
    namespace: str | None,
    all_namespaces: bool,
    output: str,
    run_dir: Path,
) -> None:
    """Show objects with their status, or problems.

    KIND is a kind of Gateway API or Kubernetes as kubectl takes it (gateways, gtw, httproute,
    svc, ...), or "problems" for what is wrong in the manifests.

    Exit codes: 0 found, 1 no such object, 2 no such kind, 3 no gateway runs.
    """
    from mesh.cli.get import run

    run(run_dir, kind, name, namespace, all_namespaces, output)


@cli.command()
@output_option
@run_dir_option
def status(output: str, run_dir: Path) -> None:
    """Show how the running gateway is doing.

    Exit codes: 0 healthy, 1 degraded or not ready yet, 3 no gateway runs.
    """
    from mesh.cli.status import run

    run(run_dir, output)


@cli.command()
@click.argument("method")
@click.argument("url")
@click.option("-H", "--header", metavar="'NAME: VALUE'", multiple=True, help="May be repeated.")
@click.option("--address", help="The address that is connected to, where several Gateways listen.")
@click.option(
    "--from",
    "client",
    metavar="NAMESPACE/POD",
    help="The pod that asks: the URL names a Service as pods know it, or an address.",
)
@click.option(
    "--manifests", type=MANIFESTS, help="Explain for this directory; no gateway need run."
)
@plane_options
@output_option
@run_dir_option
def explain(
    method: str,
    url: str,
    header: tuple[str, ...],
    address: str | None,
    client: str | None,
    manifests: Path | None,
    output: str,
    run_dir: Path,
    **options: object,
) -> None:
    """Say where a request would go, and why not elsewhere.

    Exit codes: 0 it reaches a backend (or a redirect), 1 it does not, 2 wrong usage, 3 no gateway
    runs.
    """
    from mesh.cli.explain import run

    run(run_dir, method, url, header, address, client, manifests, output, options)


@cli.group()
def bpf() -> None:
    """Look at what is in the kernel. Exit codes: see each command."""


@bpf.command()
@click.argument("service")
@click.option("--manifests", type=MANIFESTS, help="Of this directory; no gateway need run.")
@plane_options
@output_option
@run_dir_option
def automaton(
    service: str, manifests: Path | None, output: str, run_dir: Path, **options: object
) -> None:
    """Show the tables by which the kernel judges requests to a Service: their size, what they read,
    which rules run in the kernel and why the others do not.

    SERVICE is NAMESPACE/NAME or NAMESPACE/NAME:PORT. Exit codes: 0, 1 no HTTP port of that name, 2
    wrong usage, 3 no gateway runs.
    """
    from mesh.cli.bpf import automaton as run

    run(run_dir, service, manifests, output, options)


@cli.command()
@click.option("--from", "from_", metavar="WHO", multiple=True, help="Who asked; see above.")
@click.option("--to", metavar="WHO", multiple=True, help="Who got it, or would have.")
@click.option("--verdict", metavar="VERDICT", multiple=True, help="FORWARDED, DROPPED or ERROR.")
@click.option("--http-status", metavar="STATUS", multiple=True, help="404, 5xx or 500-504.")
@click.option("--http-method", metavar="METHOD", multiple=True, help="GET, say.")
@click.option("--http-path", metavar="PREFIX", multiple=True, help="How the path begins.")
@click.option(
    "--service",
    metavar="SERVICE",
    multiple=True,
    help="NAME, NAMESPACE/NAME or NAMESPACE/, with :PORT or without.",
)
@click.option("--protocol", metavar="PROTOCOL", multiple=True, help="TCP, UDP, HTTP, HTTP/2, …")
@click.option("--since", metavar="WHEN", help="30s, 5m (ago), or 2025-11-25T15:04:05Z.")
@click.option(
    "--last",
    metavar="N",
    type=click.IntRange(0),
    help="The newest N that there are.  [default: 20; with --since all]",
)
@click.option("-f", "--follow", is_flag=True, help="Go on with new ones, until Ctrl-C.")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["compact", "wide", "json"]),
    default="compact",
    help="Format; json: one object a line.",
)
@click.option(
    "--run-dir",
    "run_dirs",
    type=click.Path(path_type=Path, file_okay=False),
    multiple=True,
    default=lambda: (default_run_dir(),),
    show_default="/run/weft, or $XDG_RUNTIME_DIR/weft",
    help="Where the running gateway keeps its sockets; repeat it to see several nodes.",
)
def observe(
    since: str | None,
    last: int | None,
    follow: bool,
    output: str,
    run_dirs: tuple[Path, ...],
    **filters: tuple[str, ...],
) -> None:
    """Show requests and connections: who asked whom, for what, and what became of it.

    WHO is NAMESPACE/POD, the beginning of a pod's name, NAMESPACE/ for all of its pods, an address
    or CIDR, NAME=VALUE of labels, 'world', 'host', 'remote-node' or 'ingress'. Every filter may be
    repeated: one of its values must hold, and every filter must.

    Records are held in memory, the newest of them. What was lost under load is counted: -o json has
    a line {"lost": …} in its place, other formats say it on standard error. With -f, a restart of
    the agent is said and outlasted.

    Exit codes: 0 well, also after Ctrl-C; 1 it cannot be read, 2 wrong usage, 3 no gateway runs, or
    not any more.
    """
    from mesh.cli.observe import run

    run(run_dirs, filters, since, last, follow, output)


@cli.command()
@output_option
def version(output: str) -> None:
    """Show the version."""
    from importlib.metadata import version as version_of

    from mesh.cli.output import dump

    if output == "text":
        click.echo(f"weft {version_of('weft')}")
    else:
        dump({"version": version_of("weft")}, output)


for command in (authority, certs, controller, install, uninstall, check, lab, policy):
    cli.add_command(command)


def main() -> None:
    """The entry point: no traceback ever reaches the user for what is not a defect."""
    try:
        cli()
    except BrokenPipeError:  # the reader has seen enough
        raise SystemExit(0) from None
