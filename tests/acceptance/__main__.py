"""`make acceptance`: the cases of ../shared/gateway-api against a gateway and a lab of its own.

Prints a line per test and one per profile, writes build/acceptance.json. Exit codes: 0 no case of
GATEWAY-HTTP, MESH-HTTP or WEFT-MESH (our own) failed, or there is no test data; 1 one did; 2 the
run itself failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from acceptance import run_gateway, run_mesh
from acceptance.cases import SHARED, load_cases
from acceptance.gateway import GatewayFailed
from acceptance.mesh_cases import load_mesh_cases
from acceptance.mesh_own import own_mesh_cases
from acceptance.outcomes import Outcome, failed, summary

BUILD = Path(__file__).resolve().parents[2] / "build"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make acceptance", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="run this test; repeatable")
    parser.add_argument("-k", default="", help="run the tests whose names contain this")
    parser.add_argument("--wait", type=float, default=8.0, help="seconds that any step may take")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="show the last exchange and the log of Weft of a test that fails",
    )
    parser.add_argument(
        "--source",
        choices=("directory", "kubernetes"),
        default="directory",
        help="where objects go: files, or an API server",
    )
    parser.add_argument("--keep", action="store_true", help="keep manifests and logs afterwards")
    return parser.parse_args(arguments)


async def run(args: argparse.Namespace, scratch: Path) -> list[Outcome]:
    of_gateways = [case for case in load_cases() if not case.mesh]
    cases = [
        case
        for case in (*of_gateways, *load_mesh_cases(), *own_mesh_cases())
        if (not args.only or case.name in args.only) and args.k.lower() in case.name.lower()
    ]
    if not cases:
        raise GatewayFailed("no test has such a name")
    outcomes = []
    if gateway := [case for case in cases if not case.mesh]:
        outcomes += await run_gateway.run(gateway, args, scratch)
    if mesh := [case for case in cases if case.mesh]:
        outcomes += await run_mesh.run(mesh, args, scratch)
    return outcomes


def main() -> int:
    args = parse(sys.argv[1:])
    if not (SHARED / "cases.json").exists():
        print(f"acceptance: skipped: there is no test data in {SHARED}")
        return 0
    if os.geteuid() != 0:
        print(
            "acceptance: the Gateways of the cases listen on ports 80 and 443, and the mesh cases "
            "need a lab: run this as root (sudo make acceptance)",
            file=sys.stderr,
        )
        return 2
    # Ctrl-C and SIGTERM both end the gateway and the lab on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scratch = Path(tempfile.mkdtemp(prefix="weft-acceptance-"))
    started = time.monotonic()
    try:
        outcomes = asyncio.run(run(args, scratch))
    except GatewayFailed as error:
        print(f"acceptance: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"acceptance: {error}; does another run use the addresses?", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("acceptance: interrupted", file=sys.stderr)
        return 2
    finally:
        if args.keep:
            print(f"manifests and logs are in {scratch}")
        else:
            shutil.rmtree(scratch)
    BUILD.mkdir(exist_ok=True)
    (BUILD / "acceptance.json").write_text(
        json.dumps([outcome._asdict() for outcome in outcomes], indent=1) + "\n"
    )
    print(f"\nin {time.monotonic() - started:.0f} s; details in build/acceptance.json")
    print("\n".join(summary(outcomes)))
    return 1 if failed(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
