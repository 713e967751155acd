"""`make bench`: prints tables; writes build/bench.json (hops beside peers, on one node and, with
mutual TLS, between two), build/bench-routes.json (routes) and build/bench-cluster.json (routes
through an API server). What policies and automata cost is only printed.

All take twelve minutes. `make bench ARGS="peers --only envoy --only weft-kernel --rounds 1"` is
faster. Exit codes: 0 measured, 1 it could not be measured, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from acceptance.gateway import GatewayFailed

from bench import automaton, cluster, mtls, policies, routes, table
from bench.peers import CONNECTIONS, WORKS, Row, compare
from bench.processes import awake
from bench.world import HOPS, PROGRAMS, BenchFailed
from bench.wrk import LoadFailed
from mesh.lab.errors import LabError
from mesh.lab.state import DEFAULT_RUN_DIR

BUILD = Path(__file__).resolve().parents[2] / "build"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=("peers", "mtls", "routes", "cluster", "policies", "automaton", "all"),
        default="all",
    )
    peers = parser.add_argument_group("peers and mtls")
    peers.add_argument(
        "--only", action="append", choices=HOPS, help="this hop of peers, and no file; repeatable"
    )
    peers.add_argument("--seconds", type=float, default=3.0, help="of each run (default 3)")
    peers.add_argument("--rounds", type=int, default=3, help="the median is reported (default 3)")
    peers.add_argument(
        "--awake", action="store_true", help="processors do not halt when they are idle"
    )
    peers.add_argument("--lab", default="bench", help="name of the lab (default bench)")
    routes.add_options(parser.add_argument_group("routes"))
    args = parser.parse_args(arguments)
    if args.seconds < 0.2 or args.rounds < 1:
        parser.error("a run takes 0.2 seconds or more, and there is at least one round")
    return args


def run_peers(args: argparse.Namespace, scratch: Path) -> list[Row]:
    # In the order of HOPS, each once.
    hops = [hop for hop in HOPS if hop in (args.only or HOPS)]
    runs = args.rounds * len(hops) * len(WORKS) * len(CONNECTIONS)
    print(f"{', '.join(hops)}: {runs} runs of {args.seconds:g} s", flush=True)
    rows = compare(
        hops,
        args.rounds,
        args.seconds,
        scratch,
        DEFAULT_RUN_DIR,
        args.lab,
        progress=lambda line: print(line, flush=True),
    )
    table.show(rows)
    return rows


def run_mtls(args: argparse.Namespace, scratch: Path) -> list[Row]:
    print(f"mutual TLS between nodes: {', '.join(mtls.HOPS)}", flush=True)
    rows = mtls.compare(
        args.rounds,
        args.seconds,
        scratch,
        DEFAULT_RUN_DIR,
        args.lab,
        progress=lambda line: print(line, flush=True),
    )
    table.show(rows)
    return rows


def run_cluster(args: argparse.Namespace, scratch: Path) -> None:
    result = asyncio.run(cluster.measure(args, scratch))
    routes.show(result)
    write("bench-cluster.json", result)


def run_routes(args: argparse.Namespace, scratch: Path) -> None:
    result = asyncio.run(routes.measure(args, scratch))
    routes.show(result)
    write("bench-routes.json", result)


def write(name: str, content: object) -> None:
    BUILD.mkdir(exist_ok=True)
    (BUILD / name).write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to build/{name}\n", flush=True)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="weft-bench-") as directory:
        yield Path(directory)


def main() -> int:
    args = parse(sys.argv[1:])
    # As after Ctrl-C: the lab is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        print(f"bench: not installed: {', '.join(missing)}: run scripts/setup.sh bench")
        return 1
    rows: list[Row] = []
    kept = awake if args.awake else contextlib.nullcontext
    try:
        if args.what in ("peers", "all"):
            with scratch() as directory, kept():
                rows += run_peers(args, directory)
            if not args.only:
                write("bench.json", [row.published() for row in rows])
        if args.what in ("mtls", "all"):
            with scratch() as directory, kept():
                rows += run_mtls(args, directory)
            if not args.only:
                write("bench.json", [row.published() for row in rows])
        for what, run in (("routes", run_routes), ("cluster", run_cluster)):
            if args.what in (what, "all"):
                with scratch() as directory:
                    run(args, directory)
        if args.what in ("policies", "all"):
            policies.run()
        if args.what in ("automaton", "all"):
            automaton.run()
    except (BenchFailed, LoadFailed, LabError, GatewayFailed) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
