"""`make matrix`: policies of all kinds in a lab of nine pods on two nodes, by real connections.

First sets of generated policies: every pair of pods, nodes and addresses outside, every port and
protocol, compared with a plain model of what policies mean. Then a minute in which policies and
pods change 50 times a second under traffic. Prints what disagrees, and in the end "policies N
probes N disagreements N" and what churn came to. Exit codes: 0 nothing was wrong, 1 something was.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

import yaml

from matrix.churn import Churn
from matrix.reach import Matrix
from matrix.reuse import windows_s
from matrix.scene import scene
from matrix.sets import generate

BUILD = Path(__file__).resolve().parents[2] / "build" / "matrix"
# Of what disagrees so much is printed for each set.
_SHOWN = 10
_WINDOWS = 20


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    parser.add_argument("--sets", type=int, default=20, metavar="N")
    parser.add_argument("--churn", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--rate", type=float, default=50.0, metavar="CHANGES_PER_SECOND")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    print(f"seed {args.seed}", flush=True)
    sets = generate(args.seed, args.sets)
    asked = wrong = 0
    with tempfile.TemporaryDirectory(prefix="wm-") as temporary, scene(Path(temporary)) as lab:
        matrix = Matrix(lab)
        for number, policies in enumerate(sets):
            found = matrix.run(policies)
            print(f"set {number}: {found.allowed} allowed, {found.denied} denied", flush=True)
            asked += found.allowed + found.denied
            wrong += len(found.wrong)
            if found.wrong:
                BUILD.mkdir(parents=True, exist_ok=True)
                kept = BUILD / f"{args.seed}-{number}.yaml"
                kept.write_text(yaml.safe_dump_all(policies))
                print(f"! {len(found.wrong)} disagreements with the policies in {kept}:")
                print(*(f"!   {one}" for one in found.wrong[:_SHOWN]), sep="\n", flush=True)
        late = matrix.late()
        print(*(f"! {one}" for one in late), sep="\n", end="")
        windows = sorted(1000 * one for one in windows_s(lab, _WINDOWS))
        evidence = Churn(lab, args.seed).run(args.churn, args.rate) if args.churn else None
    policies_asked = sum(map(len, sets))
    print(f"policies {policies_asked} probes {asked} disagreements {wrong + len(late)}")
    median, longest = windows[_WINDOWS // 2], windows[-1]
    print(
        f"an address given out again is the old pod's to the other node for {median:.0f} ms (median"
        f" of {_WINDOWS}; {longest:.0f} ms the longest)"
    )
    if evidence is not None:
        print(*(f"! {one}" for one in evidence.wrong[:_SHOWN]), sep="\n", end="")
        print(evidence)
        wrong += len(evidence.wrong)
    return int(bool(wrong or late))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
