"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from mesh.agent.rundir import default_run_dir

F = TypeVar("F", bound=Callable[..., Any])
MANIFESTS = click.Path(path_type=Path, file_okay=False, exists=True)

run_dir_option = click.option(
    "--run-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_run_dir,
    show_default="/run/weft, or $XDG_RUNTIME_DIR/weft",
    help="Where the running gateway keeps its sockets.",
)
output_option = click.option(
    "-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text", help="Format."
)


def plane_options(function: F) -> F:
    """The options of the control plane, for `up` and for what works offline."""
    for option in (
        click.option(
            "--mesh-address",
            metavar="ADDRESS",
            multiple=True,
            help="Address of this host at which the proxy takes what workloads ask Services for,"
            " one of each family, or both with a comma between; turns the mesh on."
            "  [default: 127.0.0.1 and ::1 with --steer]",
        ),
        click.option(
            "--node",
            metavar="NAME",
            help="This node as Pods' spec.nodeName calls it.  [default: the host's name, with"
            " --steer]",
        ),
        click.option(
            "--settings",
            type=click.Path(path_type=Path, dir_okay=False, exists=True),
            help="YAML or JSON file with limits and habits of the proxy.",
        ),
        click.option(
            "--advertise",
            metavar="ADDRESS",
            multiple=True,
            help="Address that Gateways show in their status when they listen on the bind address;"
            " may be repeated.  [default: the bind address, or this host's for 0.0.0.0 and ::]",
        ),
        click.option(
            "--bind-address",
            metavar="ADDRESS",
            default="0.0.0.0",
            show_default=True,
            help="Where Gateways listen that name no address, without a pool.",
        ),
        click.option(
            "--address-pool",
            metavar="CIDR",
            multiple=True,
            help="Addresses of this host to give to Gateways; may be repeated.",
        ),
    ):
        function = option(function)
    return function
