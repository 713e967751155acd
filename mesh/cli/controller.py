"""`weft controller`: checks what was given, then runs the controller."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from pathlib import Path

from mesh.agent.options import OptionError, check_address, check_pool
from mesh.cli.client import CliError, UsageError
from mesh.controller.controller import ControllerOptions, serve
from mesh.sources.kubernetes_client import SourceError


def run(
    kubeconfig: Path | None,
    namespace: str,
    address_pool: tuple[str, ...],
    bind_address: str,
    advertise: tuple[str, ...],
    mesh: bool,
) -> None:
    try:
        options = ControllerOptions(
            kubeconfig=kubeconfig,
            namespace=namespace,
            identity=f"{socket.gethostname().lower()}_{os.getpid()}",
            addresses=tuple(check_pool(pool) for pool in address_pool),
            bind_address=check_address("--bind-address", bind_address),
            advertise=tuple(check_address("--advertise", text) for text in advertise),
            mesh=mesh,
        )
    except OptionError as error:
        raise UsageError(str(error)) from None
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="controller: %(message)s")
    try:
        asyncio.run(serve(options))
    except SourceError as error:
        raise CliError(str(error)) from None
