"""One echo pod as a program: what its container would listen on, on all addresses of the pod.

Arguments are those of the image in Gateway API's mesh manifests:

    --port=8080 --port=8443 --tls=8443 --grpc=7070 --tcp=9090 --crt=FILE --key=FILE

A --port that is also a --tls port serves HTTP inside TLS. Without any it is --port=8080.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from echo.answer import Pod
from echo.server import EchoServers, server_context

_DEFAULT_PORT = 8080


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="echo.pod", description=__doc__, allow_abbrev=False)
    for name in ("port", "tls", "grpc", "tcp"):
        parser.add_argument(f"--{name}", type=int, action="append", default=[])
    parser.add_argument("--crt", default="")
    parser.add_argument("--key", default="")
    args = parser.parse_args(arguments)
    if not ports(args):
        args.port.append(_DEFAULT_PORT)
    return args


def ports(args: argparse.Namespace) -> list[int]:
    """All ports that the pod listens on."""
    return sorted({*args.port, *args.grpc, *args.tcp})


async def serve(servers: EchoServers, pod: Pod, args: argparse.Namespace) -> None:
    """Listen on all of them. OSError: a port is taken, or a certificate cannot be read."""
    for port in args.port:
        tls = server_context(args.crt, args.key) if port in args.tls else None
        await servers.http(pod, port, tls)
    for port in args.grpc:
        await servers.h2c(pod, port, grpc_too=True)
    for port in args.tcp:
        await servers.tcp(pod, port)
