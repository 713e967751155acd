"""`make torture`: HTTP/1.1 between pods of a lab through the nodes' proxies, every byte compared.

A minute, and 20,000 transfers at least; TRANSFERS=n: so many instead. Prints what it sees now and
then and "transfers N wrong M" last: transfers that were complete and right, and those that were not
though nobody meant to break them. Exit codes: 0 nothing was wrong, 1 something was, or too few.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import tempfile
from pathlib import Path

from lab_world import lab_of

from torture.programs import build
from torture.run import Goal, Result, build_directory, torture
from torture.scene import make_scene

_LEAST = 20_000
_SHOWN = 40


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument(
        "--transfers", type=int, default=int(os.environ.get("TRANSFERS") or 0), metavar="N"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--kill-every", type=float, default=6.0, metavar="SECONDS")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS")
    return parser.parse_args(arguments)


def report(result: Result) -> None:
    """In words, but for the last line."""
    for text in (*result.wrong[:_SHOWN], *result.problems[:_SHOWN]):
        print(f"! {text}")
    ended = [f"{one.process} of {one.node}" for one in result.kills]
    print(f"killed: {', '.join(ended) or 'nobody'}; that broke {result.lost} connections")
    for node, counts in result.counts.items():
        said = ", ".join(f"{reason.name} {count}" for reason, count in counts.items() if count)
        print(f"node {node}: {said}")
    for pod, (redirect, tcp, _) in result.paths.items():
        print(f"{pod}: connections by redirect {redirect}, by TCP {tcp}")
    totals = result.totals
    print(
        f"{totals.bytes >> 20} MiB, {totals.broken} transfers broken on purpose, clients' "
        f"connections by redirect {totals.by_redirect}, by TCP {totals.by_tcp}"
    )
    print(f"max receive queue {result.queue >> 10} KiB")


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    goal = Goal(
        transfers=args.transfers or _LEAST,
        seconds=0.0 if args.transfers else 60.0,
        limit_s=args.limit,
        kill_s=args.kill_every,
    )
    programs = build(build_directory("torture"))
    with tempfile.TemporaryDirectory(prefix="weft-torture-") as temporary:
        directory = Path(temporary)
        scene = make_scene(programs, directory / "backends", "torture")
        with lab_of(directory, "torture", scene.config) as lab:
            done = lab.up()
            print(done.stderr, end="")
            if done.returncode:
                return 1
            print(f"seed {args.seed}")
            result = asyncio.run(
                torture(lab, scene, programs, goal, args.seed, lambda text: print(text, flush=True))
            )
            report(result)
    wrong = len(result.wrong)
    print(f"transfers {result.totals.complete} wrong {wrong}")
    return int(bool(wrong or result.problems or result.totals.complete < goal.transfers))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
