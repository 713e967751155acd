"""Routes change under load: no request and no connection is lost, by the whole gateway as `weft up`
runs it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from acceptance.gateway import POLL_S, GatewayProcess
from echo.answer import Pod
from echo.server import EchoServers
from support.keepalive import KeptConnection
from support.routes import HOST, PORT, base, route, write

CONNECTIONS, CHANGES = 64, 20
ADDRESS = "127.67.0.1"


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    directory = tmp_path / "manifests"
    directory.mkdir()
    return directory


@pytest_asyncio.fixture
async def gateway(manifests: Path, tmp_path: Path) -> AsyncIterator[GatewayProcess]:
    servers = EchoServers()
    pod = Pod("backend-0-0", "shop", "127.0.0.1")
    write(manifests, "base", base(pod.address, await servers.http(pod, 0)))
    write(manifests, "loaded", [loaded(0)])
    process = GatewayProcess(
        manifests,
        tmp_path / "run",
        f"--address-pool={ADDRESS}/32",
        "--admin=off",
        "--access-log=off",
        "--workers=2",
    )
    try:
        await process.start()
        yield process
    finally:
        await process.stop()
        await servers.close()


def loaded(revision: int) -> dict[str, object]:
    """The route under load; its responses say which revision of it they took."""
    added = {"name": "x-revision", "value": str(revision)}
    filters = [{"type": "ResponseHeaderModifier", "responseHeaderModifier": {"set": [added]}}]
    return route("loaded", "/loaded", filters)


async def keep_busy(
    connection: KeptConnection, statuses: Counter[int], seen: list[int], stop: asyncio.Event
) -> None:
    while not stop.is_set():
        answer = await connection.get("/loaded", HOST)
        statuses[answer.status] += 1
        seen.append(int(answer.headers.get("x-revision", -1)))


async def test_twenty_changes_lose_no_request_of_64_busy_connections(
    gateway: GatewayProcess, manifests: Path
) -> None:
    connections = [await KeptConnection.open(ADDRESS, PORT) for _ in range(CONNECTIONS)]
    statuses: Counter[int] = Counter()
    seen: list[list[int]] = [[] for _ in connections]
    stop = asyncio.Event()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        for connection, revisions in zip(connections, seen, strict=True):
            group.create_task(keep_busy(connection, statuses, revisions, stop))
        for revision in range(CHANGES + 1):
            if revision:
                write(manifests, "loaded", [loaded(revision)])
                write(manifests, f"other-{revision}", [route(f"o{revision}", f"/o{revision}")])
            # Every connection has it before the next change is made.
            while not all(revisions and revisions[-1] == revision for revisions in seen):
                await asyncio.sleep(POLL_S)
        stop.set()
    for connection in connections:
        await connection.close()
    assert set(statuses) == {200}
    for revisions in seen:
        assert revisions == sorted(revisions)
        assert set(revisions) == set(range(CHANGES + 1))
    assert not gateway.status()["degraded"]
