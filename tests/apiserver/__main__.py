"""The server as a process: `PYTHONPATH=tests python -m apiserver --kubeconfig FILE`.

Writes the kubeconfig once it listens, and serves until SIGTERM. Nothing is kept.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path

from apiserver.server import ApiServer


async def serve(args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with ApiServer(port=args.port, tls=True) as server:
        for directory in args.crds:
            server.install_crds(directory)
        # Renamed into place: whoever waits for it finds it whole.
        unfinished = args.kubeconfig.with_suffix(".tmp")
        server.kubeconfig(unfinished).rename(args.kubeconfig)
        print(f"API server: {server.url}, kubeconfig {args.kubeconfig}", flush=True)
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="apiserver", description=__doc__)
    parser.add_argument("--kubeconfig", type=Path, required=True, help="where to write it")
    parser.add_argument("--port", type=int, default=0, help="by default any that is free")
    parser.add_argument("--crds", type=Path, action="append", default=[], help="directory of CRDs")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
