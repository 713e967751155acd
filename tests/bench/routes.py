"""How long a route change takes to reach traffic, and what routes cost in memory.

Adds 3,000 routes one by one: from the file's rename to the first 200, and whether that grows with
the number of routes. Then 5,000 routes in all: resident memory of agent and workers, before and
after every route has been requested (from then on a worker keeps metrics for it).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from acceptance.gateway import GatewayFailed, GatewayProcess
from echo.answer import Pod
from echo.server import EchoServers
from support.keepalive import KeptConnection
from support.routes import HOST, PORT, base, prepare, route, write

ADDRESS = "127.67.1.1"
_EDGE = 300  # routes at the beginning and at the end that are compared
_WITHIN_S = 10.0


class Summary(NamedTuple):
    """Milliseconds."""

    count: int
    mean: float
    median: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: list[float]) -> Summary:
        ms = sorted(1000 * value for value in seconds)
        numbers = (
            statistics.fmean(ms),
            statistics.median(ms),
            ms[int(0.99 * (len(ms) - 1))],
            ms[-1],
        )
        return cls(len(ms), *(round(number, 2) for number in numbers))


async def until_served(connection: KeptConnection, path: str) -> None:
    """GatewayFailed: it takes too long."""
    deadline = time.monotonic() + _WITHIN_S
    while (await connection.get(path, HOST)).status != 200:
        if time.monotonic() > deadline:
            raise GatewayFailed(f"{path} is not served after {_WITHIN_S:g} s")
        await asyncio.sleep(0.0005)


async def until_attached(gateway: GatewayProcess, count: int) -> None:
    """Wait until the Gateway's status counts so many routes. GatewayFailed: it takes too long."""
    deadline = time.monotonic() + 60
    while gateway.objects("Gateway")[0]["status"]["listeners"][0]["attachedRoutes"] < count:
        if time.monotonic() > deadline:
            raise GatewayFailed(f"not all of {count} routes are attached")
        await asyncio.sleep(0.05)


async def add_one_by_one(manifests: Path, count: int) -> list[float]:
    """Seconds from rename to first 200 for each route."""
    connection = await KeptConnection.open(ADDRESS, PORT)
    taken = []
    for number in range(count):
        unfinished, place = prepare(manifests, f"r{number}", [route(f"r{number}", f"/r{number}/")])
        started = time.monotonic()
        unfinished.rename(place)
        await until_served(connection, f"/r{number}/x")
        taken.append(time.monotonic() - started)
        if number % 500 == 499:
            print(f"  {number + 1} routes", flush=True)
    await connection.close()
    return taken


def resident_mb(pid: int) -> float:
    """VmRSS of a process, in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return round(int(found[1]) / 1024, 1) if found else 0.0


def memory(gateway: GatewayProcess) -> dict[str, float]:
    status = gateway.status()
    processes = {"agent": status["agent"]["pid"]}
    processes |= {f"worker {worker['id']}": worker["pid"] for worker in status["workers"]}
    return {name: resident_mb(pid) for name, pid in processes.items()}


async def measure(args: argparse.Namespace, scratch: Path) -> dict[str, object]:
    manifests = scratch / "manifests"
    manifests.mkdir()
    servers = EchoServers()
    pod = Pod("backend-0-0", "shop", "127.0.0.1")
    write(manifests, "base", base(pod.address, await servers.http(pod, 0)))
    gateway = GatewayProcess(
        manifests,
        scratch / "run",
        f"--address-pool={ADDRESS}/32",
        "--admin=off",
        "--access-log=off",
        f"--workers={args.workers}",
    )
    try:
        await gateway.start()
        memories = {"no routes": memory(gateway)}
        print(f"adding {args.routes} routes, one by one")
        taken = await add_one_by_one(manifests, args.routes)
        print(f"adding {args.total - args.routes} more at once")
        started = time.monotonic()
        for number in range(args.routes, args.total):
            write(manifests, f"r{number}", [route(f"r{number}", f"/r{number}/")])
        await until_attached(gateway, args.total)
        bulk_s = round(time.monotonic() - started, 2)
        memories[f"{args.total} routes, {args.routes} of them requested"] = memory(gateway)
        connection = await KeptConnection.open(ADDRESS, PORT)
        for number in range(args.total):
            await until_served(connection, f"/r{number}/x")
        await connection.close()
        memories[f"{args.total} routes, all requested on one connection"] = memory(gateway)
        return {
            "change_ms": {
                "all": Summary.of(taken)._asdict(),
                f"first {_EDGE}": Summary.of(taken[:_EDGE])._asdict(),
                f"last {_EDGE}": Summary.of(taken[-_EDGE:])._asdict(),
            },
            "bulk": {"routes": args.total - args.routes, "s": bulk_s},
            "memory_mb": memories,
        }
    finally:
        await gateway.stop()
        await servers.close()


def show(result: dict[str, object]) -> None:
    changes = result["change_ms"]
    assert isinstance(changes, dict)
    print("\nfrom a route written to the first 200, ms")
    print(f"  {'routes':<14}{'count':>7}{'mean':>9}{'median':>9}{'p99':>9}{'max':>9}")
    for name, row in changes.items():
        numbers = "".join(f"{row[key]:>9.2f}" for key in ("mean", "median", "p99", "max"))
        print(f"  {name:<14}{row['count']:>7}{numbers}")
    memories = result["memory_mb"]
    assert isinstance(memories, dict)
    print("\nresident memory, MiB")
    for name, row in memories.items():
        print(f"  {name:<46}" + "   ".join(f"{who} {mb}" for who, mb in row.items()))
    print(f"\nat once: {result['bulk']}")


def add_options(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--routes", type=int, default=3000, help="added one by one (default 3000)")
    parser.add_argument("--total", type=int, default=5000, help="for the memory (default 5000)")
    parser.add_argument("--endpoints", type=int, default=10_000, help="of cluster (default 10000)")
    parser.add_argument("--workers", type=int, default=2, help="of the gateway (default 2)")
