"""`make acceptance`: the cases of ../shared/gateway-api against a gateway that this starts.

Prints a line per test and one per profile, writes build/acceptance.json. Exit codes: 0 no
GATEWAY-HTTP case failed (or there is no test data), 1 one did, 2 the run itself failed.
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
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from echo.server import EchoServers

from acceptance import hand
from acceptance.cases import SHARED, Case, load_cases, load_objects
from acceptance.client import RequestFailed
from acceptance.credentials import credentials
from acceptance.gateway import CLASS_NAME, POOL, GatewayFailed, GatewayProcess
from acceptance.manifests import Ident, Json, Manifests
from acceptance.pods import Pods
from acceptance.statuses import CONTROLLER, NotYet
from acceptance.steps import run_case
from acceptance.world import StepFailed, World, eventually

BUILD = Path(__file__).resolve().parents[2] / "build"
PASS, FAIL, NOT_SUPPORTED = "PASS", "FAIL", "not supported"
# What runs containers is the runner's business, not the gateway's.
_NOT_FOR_WEFT = ("Deployment",)
_REPLACEMENTS = {
    "{GATEWAY_CLASS_NAME}": CLASS_NAME,
    "{GATEWAY_CONTROLLER_NAME}": CONTROLLER,
    **hand.PLACEHOLDERS,
}


class Outcome(NamedTuple):
    test: str
    profiles: tuple[str, ...]
    result: str
    detail: str
    seconds: float


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make acceptance", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="run this test; repeatable")
    parser.add_argument("-k", default="", help="run the tests whose names contain this")
    parser.add_argument("--wait", type=float, default=8.0, help="seconds that any step may take")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="show the last exchange and the gateway's log of a test that fails",
    )
    parser.add_argument("--keep", action="store_true", help="keep manifests and logs afterwards")
    return parser.parse_args(arguments)


async def run(args: argparse.Namespace, scratch: Path) -> list[Outcome]:
    cases = [
        case
        for case in load_cases()
        if (not args.only or case.name in args.only) and args.k.lower() in case.name.lower()
    ]
    if not cases:
        raise GatewayFailed("no test has such a name")
    directory = scratch / "manifests"
    directory.mkdir()
    servers = EchoServers()
    manifests = Manifests(directory)
    pods = Pods(servers)
    gateway = GatewayProcess(
        directory,
        scratch / "run",
        f"--address-pool={POOL}",
        "--admin=off",
        f"--access-log={'json' if args.verbose else 'off'}",
    )
    try:
        manifests.put("credentials", credentials())
        await deploy(pods, manifests, "base", _base_objects())
        await gateway.start()
        world = World(gateway, manifests, pods, servers.memory, frozenset(), args.wait)
        world.claimed = await claimed_features(world)
        outcomes = []
        for case in cases:
            outcome = await one(world, case)
            outcomes.append(outcome)
            report(outcome)
            if args.verbose and outcome.result == FAIL:
                show(world)
        return outcomes
    finally:
        await gateway.stop()
        await servers.close()


def _base_objects() -> list[Json]:
    gateway_class = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "GatewayClass",
        "metadata": {"name": CLASS_NAME},
        "spec": {"controllerName": CONTROLLER},
    }
    return [gateway_class, *load_objects(SHARED / "conformance/base/manifests.yaml", _REPLACEMENTS)]


async def deploy(pods: Pods, manifests: Manifests, file: str, objects: list[Json]) -> None:
    """Start the pods of a manifest, and write what else there is, with EndpointSlices."""
    for obj in objects:
        if obj["kind"] == "Deployment":
            await pods.deploy(obj, manifests)
    slices = [pods.endpoint_slice(obj) for obj in objects if obj["kind"] == "Service"]
    for_weft = [obj for obj in objects if obj["kind"] not in _NOT_FOR_WEFT]
    manifests.put(file, [*for_weft, *filter(None, slices)])


async def claimed_features(world: World) -> frozenset[str]:
    """What the GatewayClass says in its status that it supports."""
    found: set[str] = set()

    def check() -> None:
        for obj in world.gateway.objects("GatewayClass", name=CLASS_NAME):
            features = (obj.get("status") or {}).get("supportedFeatures", [])
            found.update(feature["name"] for feature in features)
        if not found:
            raise NotYet("the GatewayClass names no supported features")

    await eventually(check, world.wait_s)
    return frozenset(found)


async def one(world: World, case: Case) -> Outcome:
    """Apply a test's objects, run it, remove them again."""
    if why := case.unsupported(world.claimed):
        return Outcome(case.name, case.profiles, NOT_SUPPORTED, why, 0.0)
    started = time.monotonic()
    world.file = "test"
    result, detail = PASS, ""
    try:
        objects = [
            obj for path in case.manifests for obj in load_objects(SHARED / path, _REPLACEMENTS)
        ]
        await deploy(world.pods, world.manifests, world.file, objects)
        await seen(world, world.manifests.idents(world.file), there=True)
        await run_case(world, case)
    except Exception as error:
        result, detail = FAIL, str(error) or type(error).__name__
    finally:
        removed = world.manifests.remove(world.file)
    try:
        await seen(world, removed, there=False)
    except StepFailed as error:
        result, detail = FAIL, detail or f"cleaning up: {error}"
    return Outcome(case.name, case.profiles, result, detail, time.monotonic() - started)


async def seen(world: World, idents: list[Ident], *, there: bool) -> None:
    """Wait until the gateway has (or no longer has) the objects. Those it refuses, or whose kind
    it does not know, are named among its problems and are not waited for."""

    def check() -> None:
        refused = {(problem["kind"], problem["name"]) for problem in world.gateway.problems()}
        for ident in idents:
            found = world.gateway.objects(ident.kind, ident.namespace, ident.name)
            if bool(found) != there and not (there and (ident.kind, ident.name) in refused):
                state = "not seen" if there else "still there"
                raise NotYet(f"{ident.kind} {ident.namespace}/{ident.name} is {state}")

    await eventually(check, world.wait_s)


def report(outcome: Outcome) -> None:
    detail = f"  {outcome.detail}" if outcome.detail else ""
    print(f"{outcome.result:<13} {outcome.seconds:5.1f} s  {outcome.test}{detail}", flush=True)


def show(world: World) -> None:
    """The last exchange of a test, and the end of the gateway's log."""
    if world.exchange is not None:
        request, came = world.exchange
        tls = f", TLS for {request.tls.server_name}" if request.tls else ""
        print(f"    to {request.address} port {request.port}, {request.protocol}{tls}:")
        print(f"    > {request.method} {request.target}\n    > host: {request.host}")
        for name, value in request.headers:
            print(f"    > {name}: {value}")
        if isinstance(came, RequestFailed):
            print(f"    failed: {came}")
        else:
            print(f"    < {came.status}")
            for name, values in came.headers.items():
                print(f"    < {name}: {', '.join(values)}")
            print("    <", came.body.decode(errors="replace").replace("\n", "\n    < "))
    print("    the gateway's log:", world.gateway.log_tail(), sep="\n", flush=True)


def summary(outcomes: list[Outcome]) -> list[str]:
    """A line per profile: passed of all, and what the others are."""
    lines = []
    for profile in dict.fromkeys(p for outcome in outcomes for p in outcome.profiles):
        counts = Counter(o.result for o in outcomes if profile in o.profiles)
        rest = [f"{counts[what]} {what}" for what in (FAIL, NOT_SUPPORTED) if counts[what]]
        more = f" ({', '.join(rest)})" if rest else ""
        lines.append(f"{profile} {counts[PASS]}/{counts.total()}{more}")
    return lines


def main() -> int:
    args = parse(sys.argv[1:])
    if not (SHARED / "cases.json").exists():
        print(f"acceptance: skipped: there is no test data in {SHARED}")
        return 0
    if os.geteuid() != 0:
        print(
            "acceptance: the Gateways of the cases listen on ports 80 and 443: run this as root "
            "(sudo make acceptance)",
            file=sys.stderr,
        )
        return 2
    # Ctrl-C and SIGTERM both end the gateway on the way out.
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
    failed = any(o.result == FAIL and "GATEWAY-HTTP" in o.profiles for o in outcomes)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
