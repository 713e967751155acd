"""A worker's access log and metrics, and logs that cannot be written."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from support.proxy import (
    backend,
    cluster,
    connection,
    fetch,
    get,
    ok,
    proxy_fixture,
    read_message,
    route,
    rule,
    serve,
    to,
    worker,
)

from mesh.model.nodeconfig import Settings
from mesh.model.routeconfig import PathMatch, RouteMatch
from mesh.model.section import SETTINGS_KEY, cluster_key

proxy = proxy_fixture


async def test_log_reader_that_does_not_read_stops_nothing():
    reads, writes = os.pipe()
    try:
        async with worker(stdout=writes) as proxy:
            port = await serve(proxy)
            async with connection(port) as (reader, writer):
                for _ in range(250):  # more than two full lists of lines
                    writer.write(get().encode() * 100)
                    for _ in range(100):
                        assert (await read_message(reader)).status == 404
            await proxy.metric("weft_access_log_lost_total", lambda value: value > 0)
            proxy.drain(1)
            async with asyncio.timeout(8):
                assert await proxy.process.wait() == 0
    finally:
        os.close(reads)
        os.close(writes)


async def test_full_disk_under_the_log_stops_nothing():
    with open("/dev/full", "wb") as full:
        async with worker(stdout=full.fileno()) as proxy:
            port = await serve(proxy)
            assert (await fetch(port)).status == 404
            await proxy.metric("weft_access_log_lost_total", lambda value: value == 1)
            assert (await fetch(port)).status == 404


async def test_worker_without_standard_streams():
    """Log lines must not end in whatever has the number of standard output."""
    async with worker(prefix=("sh", "-c", 'exec "$@" >&- 2>&-', "sh")) as proxy:
        port = await serve(proxy)
        async with connection(port) as (reader, writer):
            for _ in range(20):
                writer.write(get().encode())
                answer = await read_message(reader)
                assert (answer.status, answer.body) == (404, b"no route matches\n")
                await asyncio.sleep(0.02)  # for the log to be written
        proxy.drain(1)
        assert await proxy.process.wait() == 0


async def test_lines_of_two_workers_do_not_mix():
    """A pipe takes what is longer than PIPE_BUF in pieces."""
    reads, writes = os.pipe()
    loop = asyncio.get_running_loop()
    text = bytearray()

    def read_slowly() -> None:
        while data := os.read(reads, 1000):
            text.extend(data)

    async with worker(stdout=writes) as one, worker(stdout=writes) as two:
        os.close(writes)
        reading = loop.run_in_executor(None, read_slowly)

        async def load(proxy):
            port = await serve(proxy)
            async with connection(port) as (reader, writer):
                for _ in range(300):
                    writer.write(get("/" + "x" * 900).encode())
                    assert (await read_message(reader)).status == 404

        await asyncio.gather(load(one), load(two))
        one.drain(1)
        two.drain(1)
        await asyncio.gather(one.process.wait(), two.process.wait())
    await reading
    os.close(reads)
    lines = text.splitlines()
    assert len(lines) == 600
    assert {json.loads(line)["status"] for line in lines} == {404}


@pytest.mark.parametrize("form", ["json", "text"])
async def test_log_lines_cannot_be_forged(proxy, form):
    port = await serve(proxy, {SETTINGS_KEY: Settings(access_log=form)})
    agent = 'x" \\n \x85 \x9b31m } {"status": 200'
    await fetch(port, get("/%0a%0dx?a=%0a{", "a", f"User-Agent: {agent}").encode("latin-1"))
    await fetch(port, get("/" + "x" * 20_000, "a", "X-Request-Id: forged"))
    await proxy.metric('weft_http_local_replies_total{reason="no_route"}', lambda v: v == 2)
    async with asyncio.timeout(10):
        while len(proxy.access_log().splitlines()) < 2:
            await asyncio.sleep(0.02)
    lines = proxy.access_log().split("\n")
    assert len(lines) == 3
    assert all(len(line) < 4096 for line in lines)
    assert "forged" not in lines[1]
    if form == "json":
        assert json.loads(lines[0])["user_agent"] == agent


async def test_metrics_tell_of_backends(proxy):
    gate = asyncio.Event()

    async def late(request) -> bytes:
        await gate.wait()
        return ok(b"late")

    async with backend(late) as slow, backend() as fast:
        port = await serve(
            proxy,
            cluster("slow", slow.port, max_connections_per_endpoint=2),
            cluster("fast", fast.port),
            route(
                "r",
                rule(to("slow"), matches=(RouteMatch(PathMatch("PathPrefix", "/slow")),)),
                rule(to("fast")),
            ),
        )
        label = f'{{backend="{cluster_key("Service", "default", "slow", 80)}"}}'
        async with asyncio.TaskGroup() as group:
            waiting = [group.create_task(fetch(port, get("/slow"))) for _ in range(5)]
            await proxy.metric(f"weft_upstream_connections{label}", lambda value: value == 2)
            await proxy.metric(f"weft_upstream_pending_requests{label}", lambda value: value == 3)
            gate.set()
        assert {task.result().status for task in waiting} == {200}
        await proxy.metric(f"weft_upstream_pending_requests{label}", lambda value: value == 0)
        assert (await fetch(port)).status == 200
        await proxy.apply({}, (cluster_key("Service", "default", "slow", 80),))
        await proxy.metric(f"weft_upstream_connections{label}", lambda value: value == 0)
    version = proxy.metrics()["weft_worker_config_version"]
    assert version == proxy.config.version


# Mounts a MiB for the metrics and fills it up to what is left; then starts the worker there.
_SMALL_DISK = """
mount -t tmpfs -o size=1m,mode=777 tmpfs "$PROMETHEUS_MULTIPROC_DIR" &&
head -c "$((1048576 - %d))" /dev/zero >"$PROMETHEUS_MULTIPROC_DIR/fill" && exec "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small disk")
@pytest.mark.parametrize("left", [0, 5 * 65536 + 4096], ids=["for-nothing", "for-no-growth"])
async def test_full_disk_under_the_metrics_stops_no_request(left):
    """A sample for each rule soon is more than the first size of a file."""
    paths = [f"/{number}" for number in range(400)]
    rules = [rule(to("one"), matches=(RouteMatch(PathMatch("Exact", one)),)) for one in paths]

    async def ask(port):
        async with connection(port) as (reader, writer):
            for path in paths:
                writer.write(get(path).encode())
                assert (await read_message(reader)).status == 200

    prefix = ("unshare", "--mount", "sh", "-c", _SMALL_DISK % left, "sh")
    async with worker(prefix=prefix) as proxy, backend() as one:
        proxy.metrics_dir = f"/proc/{proxy.process.pid}/root{proxy.metrics_dir}"
        port = await serve(proxy, cluster("one", one.port), route("r", *rules))
        await ask(port)
        assert proxy.error_log().count("No space left on device") == 1
        os.unlink(f"{proxy.metrics_dir}/fill")
        asked = 1
        while not (counted := [name for name in proxy.metrics() if 'rule="399"' in name]):
            await ask(port)  # room is looked for once in a while
            asked += 1
        assert await proxy.metric(counted[0], lambda value: value >= asked) == asked
