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
import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from lab_world import Lab, lab_of

from torture.programs import build
from torture.run import Goal, torture
from torture.scene import make_scene
from torture.verdict import Evidence, Paths, grouped, problems

BUILD = Path(__file__).resolve().parents[2] / "build" / "torture"
_LEAST = 20_000


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make torture", description=__doc__)
    parser.add_argument(
        "--transfers", type=int, default=int(os.environ.get("TRANSFERS") or 0), metavar="N"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--kill-every", type=float, default=6.0, metavar="SECONDS")
    parser.add_argument("--only", default="", metavar="REGEX", help="targets, such as echo.red/80")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS")
    return parser.parse_args(arguments)


def report(evidence: Evidence, wrong: list[str]) -> None:
    """In words, but for the last line."""
    for text in wrong:
        print(f"! {text}")
    ended = Counter(f"{one.process} of {one.node}" for one in evidence.kills)
    said = ", ".join(f"{name} {count} times" for name, count in sorted(ended.items()))
    print(f"killed: {said or 'nobody'}; that broke {evidence.broken_by_us} connections")
    for node, counts in evidence.counts.items():
        said = ", ".join(f"{reason.name} {count}" for reason, count in counts.items() if count)
        print(f"node {node}: {said}")
    totals = evidence.totals
    paths = {**evidence.paths, "clients": Paths(totals.by_redirect, totals.by_tcp)}
    for who, (redirect, tcp) in paths.items():
        if redirect or tcp:
            print(f"{who}: {redirect} connections by redirect, {tcp} by TCP")
    print(
        f"{totals.bytes >> 20} MiB of bodies, {totals.broken} transfers broken on purpose, "
        f"{sum(evidence.pairs.values())} messages in loopback pairs"
    )
    print(f"max receive queue by redirect {evidence.redirect_queue[0] >> 10} KiB")
    print(f"max receive queue {evidence.queue[0] >> 10} KiB")


def keep_logs(lab: Lab, directory: Path) -> None:
    """What the nodes' Weft and the pods said, for after the lab."""
    shutil.rmtree(directory, ignore_errors=True)
    for kept in ("nodes", "logs"):
        source = lab.run_dir / lab.name / kept
        for log in source.glob("*.log"):
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, directory)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    goal = Goal(
        transfers=args.transfers or _LEAST,
        seconds=0.0 if args.transfers else 60.0,
        limit_s=args.limit,
        kill_s=args.kill_every,
    )
    programs = build(BUILD)
    with tempfile.TemporaryDirectory(prefix="weft-torture-") as temporary:
        directory = Path(temporary)
        scene = make_scene(programs, directory / "backends", "torture")
        targets = tuple(one for one in scene.targets if re.search(args.only, one.text))
        scene = scene._replace(targets=targets)
        with lab_of(directory, "torture", scene.config) as lab:
            done = lab.up()
            print(done.stderr, end="")
            if done.returncode:
                return 1
            print(f"seed {args.seed}")
            evidence = asyncio.run(
                torture(lab, scene, programs, goal, args.seed, lambda text: print(text, flush=True))
            )
            keep_logs(lab, BUILD / "logs")
    wrong, bad = evidence.wrong, list(problems(evidence, scene.targets))
    report(evidence, [*grouped(wrong), *bad])
    complete = evidence.totals.complete
    print(f"transfers {complete} wrong {len(wrong)}")
    return int(bool(wrong or bad or complete < goal.transfers))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
