"""`weft controller`: checks what was given, then runs the controller."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Way to the cluster.  [default: $KUBECONFIG, ~/.kube/config, or the pod's account]",
)
@click.option(
    "--namespace",
    default="weft-system",
    show_default=True,
    help="Weft's own namespace in the cluster.",
)
@click.option("--address-pool", metavar="CIDR", multiple=True, help="As of the nodes' weft up.")
@click.option(
    "--bind-address",
    metavar="ADDRESS",
    default="0.0.0.0",
    show_default=True,
    help="As of the nodes' weft up.",
)
@click.option(
    "--advertise",
    metavar="ADDRESS",
    multiple=True,
    help="Address that Gateways show in their status that name none; may be repeated.  [default:"
    " the nodes']",
)
@click.option(
    "--trust-domain",
    metavar="NAME",
    default="",
    help="Sign certificates for workloads of this trust domain (weft up --authority cluster);"
    " the authority's state is in Secret weft-authority.  [default: sign none]",
)
@click.option(
    "--load-balancer",
    is_flag=True,
    help="Gateways that name no address get a Service of type LoadBalancer in front of the nodes,"
    " and show its address.",
)
@click.option(
    "--secrets-namespace",
    metavar="NAMESPACE",
    default="",
    help="Copy the Secrets that listeners refer to into this namespace, where the nodes' weft up"
    " --secrets-namespace read them.  [default: they read the Secrets themselves]",
)
@click.option("--mesh", is_flag=True, help="The nodes steer workloads (weft up --steer).")
@click.option(
    "--health-port",
    metavar="PORT",
    type=click.IntRange(0, 65535),
    default=0,
    help="Answer /healthz and /readyz there, on all addresses.  [default: nowhere]",
)
def controller(
    kubeconfig: Path | None,
    namespace: str,
    address_pool: tuple[str, ...],
    bind_address: str,
    advertise: tuple[str, ...],
    mesh: bool,
    trust_domain: str,
    load_balancer: bool,
    secrets_namespace: str,
    health_port: int,
) -> None:
    """Write the statuses of a cluster's Gateway API objects.

    Several may run: one of them leads, the others wait to take over. Nothing is called Programmed
    that not every node that serves has in force.

    Exit codes: 0 stopped as asked, 1 it cannot run, 2 wrong usage.
    """
    import asyncio
    import logging
    import os
    import socket
    import sys

    from certs.secrecy import keep_memory_private
    from certs.spiffe import BadSpiffeId, check_trust_domain
    from mesh.agent.options import OptionError, check_address, check_pool
    from mesh.cli.client import CliError, UsageError
    from mesh.controller.controller import ControllerOptions, serve
    from mesh.sources.kubernetes_client import SourceError

    try:
        options = ControllerOptions(
            kubeconfig=kubeconfig,
            namespace=namespace,
            identity=f"{socket.gethostname().lower()}_{os.getpid()}",
            addresses=tuple(check_pool(pool) for pool in address_pool),
            bind_address=check_address("--bind-address", bind_address),
            advertise=tuple(check_address("--advertise", text) for text in advertise),
            mesh=mesh,
            load_balancer=load_balancer,
            secrets_namespace=secrets_namespace,
            health_port=health_port,
            trust_domain=check_trust_domain(trust_domain) if trust_domain else "",
        )
    except (OptionError, BadSpiffeId) as error:
        raise UsageError(str(error)) from None
    keep_memory_private()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="controller: %(message)s")
    try:
        asyncio.run(serve(options))
    except SourceError as error:
        raise CliError(str(error)) from None
    except OSError as error:
        raise CliError(f"--health-port {health_port}: {error.strerror}") from None
