"""A worker whose clients, backends, mirrors and tunnels leave, break off or do not keep up."""

from __future__ import annotations

import asyncio
import random
import resource
import socket
from contextlib import nullcontext, suppress

import pytest
from support.http1 import raw_backend, reset
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
)

from mesh.model.nodeconfig import Settings
from mesh.model.routeconfig import Mirror, PathMatch, Retry, RouteMatch
from mesh.model.section import SETTINGS_KEY, cluster_key

proxy = proxy_fixture


# --- bodies and early answers -------------------------------------------------------------------


async def test_backend_that_answers_early_and_closes_keeps_no_connection_of_ours(proxy):
    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(ok(b"fine", "connection: close"))
            await writer.drain()
            return
        writer.write(ok(b"too much", "connection: close", status="413 Too Large"))
        await writer.drain()
        reset(writer)

    async with raw_backend(handle) as one:
        port = await serve(
            proxy, cluster("one", one, max_connections_per_endpoint=2), route("r", rule(to("one")))
        )
        for _ in range(6):
            async with connection(port) as (reader, writer):
                writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4000000\r\n\r\n")
                for _ in range(40):
                    writer.write(bytes(100_000))
                try:
                    assert (await read_message(reader)).status in (413, 502)
                except (ConnectionError, asyncio.IncompleteReadError):
                    pass
        async with asyncio.timeout(5):
            assert (await fetch(port)).body == b"fine"


async def test_connection_goes_on_after_an_answer_to_half_a_request(proxy):
    async def handle(reader, writer):
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(ok(b"early"))

    async with raw_backend(handle) as one:
        port = await serve(proxy, cluster("one", one), route("r", rule(to("one"))))
        async with asyncio.timeout(5), connection(port) as (reader, writer):
            for _ in range(3):
                writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n01234")
                assert (await read_message(reader)).body == b"early"
                writer.write(b"56789")


async def test_client_that_stops_after_an_early_answer_is_cut_off(proxy):
    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ok(b"early"))
        await reader.read()

    async with raw_backend(handle) as one:
        port = await serve(proxy, cluster("one", one), route("r", rule(to("one"))))
        async with asyncio.timeout(10), connection(port) as (reader, writer):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n01234")
            assert (await read_message(reader)).body == b"early"
            assert await reader.read() == b""


async def test_interim_responses_without_end_are_an_error(proxy):
    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        while True:
            writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 50)
            await writer.drain()

    async with raw_backend(handle) as one, asyncio.timeout(5):
        port = await serve(proxy, cluster("one", one), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            writer.write(get().encode())
            while (answer := await read_message(reader, head_only=True)).status == 103:
                pass
    assert answer.status == 502


async def test_slow_readers_hold_little_memory(proxy):
    """Fifty clients ask for 4 MB each and do not read."""

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4000000\r\n\r\n")
        for _ in range(40):
            writer.write(bytes(100_000))
            await writer.drain()
        await reader.read()

    def resident() -> int:
        with open(f"/proc/{proxy.process.pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    async with raw_backend(handle) as one:
        port = await serve(
            proxy,
            cluster("one", one),
            route("r", rule(to("one"))),
            {SETTINGS_KEY: Settings(body_timeout_s=1.0)},
        )
        before = resident()
        crowd = []
        for _ in range(50):
            sock = socket.create_connection(("127.0.0.1", port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(get().encode())
            crowd.append(sock)
        await proxy.metric(
            'weft_downstream_refused_total{reason="write_timeout"}', lambda value: value >= 50
        )
        assert resident() - before < 50 * 800_000
        for sock in crowd:
            sock.close()
        assert (await fetch(port)).status == 200


async def test_slow_readers_of_one_client_leave_connections_to_others(proxy):
    """Three hundred requests whose answers nobody reads: more than there are connections."""

    async def handle(reader, writer):
        while head := await reader.readuntil(b"\r\n\r\n"):
            if head.startswith(b"GET /small"):
                writer.write(ok(b"fine"))
                continue
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4000000\r\n\r\n")
            for _ in range(40):
                writer.write(bytes(100_000))
                await writer.drain()

    async with raw_backend(handle) as one:
        port = await serve(proxy, cluster("one", one), route("r", rule(to("one"))))
        crowd = []
        for _ in range(300):
            sock = socket.create_connection(("127.0.0.1", port), source_address=("127.0.1.1", 0))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.sendall(get().encode())
            crowd.append(sock)

        def all_in(counts):
            label = '{backend="cluster/Service/default/one/80"}'
            names = ("connections", "pending_requests")
            return sum(counts.get(f"weft_upstream_{name}{label}", 0) for name in names) >= 300

        async with asyncio.timeout(60):
            while not all_in(proxy.metrics()):
                await asyncio.sleep(0.02)  # files tell nobody that they changed
        async with (
            asyncio.timeout(60),
            connection(port, local_addr=("127.0.1.2", 0)) as (reader, writer),
        ):
            writer.write(get("/small").encode())
            assert (await read_message(reader)).body == b"fine"
        for sock in crowd:
            sock.close()


# --- ends that only the connection tells ------------------------------------------------------


@pytest.mark.parametrize("end", ["whole", "backend", "killed"])
async def test_a_body_up_to_the_close_that_breaks_off_ends_by_a_reset(proxy, end):
    """HTTP/1.0 has no other way to tell that a body is not whole."""
    half = asyncio.Event()

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        await half.wait()
        if end == "whole":
            writer.write(b"0\r\n\r\n")
            await reader.read()

    async with raw_backend(handle) as one:
        port = await serve(proxy, cluster("one", one), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            writer.write(b"GET / HTTP/1.0\r\nHost: a\r\n\r\n")
            await reader.readuntil(b"\r\n\r\nhalf")
            if end == "killed":
                proxy.process.kill()
            half.set()
            with nullcontext() if end == "whole" else pytest.raises(ConnectionResetError):
                assert await reader.read() == b""


async def test_a_killed_worker_ends_tunnels_by_resets(proxy):
    ends = asyncio.get_running_loop().create_future()

    async def handle(reader, writer):
        try:
            await echo_tunnel(reader, writer)
            ends.set_result(None)
        except ConnectionResetError as error:
            ends.set_result(error)

    async with raw_backend(handle) as one:
        port = await serve(proxy, cluster("one", one), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            writer.write(WEBSOCKET)
            assert (await read_message(reader, head_only=True)).status == 101
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            proxy.process.kill()
            with pytest.raises(ConnectionResetError):
                await reader.read()
        assert isinstance(await ends, ConnectionResetError)


# --- tunnels ------------------------------------------------------------------------------------


async def echo_tunnel(reader, writer):
    await reader.readuntil(b"\r\n\r\n")
    writer.write(
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    )
    while data := await reader.read(65536):
        writer.write(data)


WEBSOCKET = get("/", "a", "Connection: Upgrade", "Upgrade: websocket").encode()


async def test_timeouts_of_the_route_end_with_the_upgrade(proxy):
    async with raw_backend(echo_tunnel) as one:
        port = await serve(
            proxy,
            cluster("one", one),
            route("r", rule(to("one"), request_timeout_ms=200, backend_timeout_ms=200)),
        )
        async with connection(port) as (reader, writer):
            writer.write(WEBSOCKET)
            assert (await read_message(reader, head_only=True)).status == 101
            for _ in range(3):
                await asyncio.sleep(0.15)  # the timeouts' time has to pass
                writer.write(b"still here")
                assert await reader.readexactly(10) == b"still here"


async def test_broken_tunnels_give_their_connections_back(proxy):
    """Clients reset; and backends end while clients stay."""
    ends = iter([False] * 4 + [True] * 4)

    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"websocket" not in head:
            writer.write(ok(b"fine", "connection: close"))
            await writer.drain()
            return
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        if next(ends):
            await writer.drain()
            return
        await reader.read(1)
        writer.write(bytes(100_000))
        await reader.read()

    async with raw_backend(handle) as one, asyncio.timeout(20):
        port = await serve(
            proxy,
            cluster("one", one, max_connections_per_endpoint=2),
            route("r", rule(to("one"))),
            {SETTINGS_KEY: Settings(idle_timeout_s=0.2)},
        )
        for _ in range(4):
            async with connection(port) as (reader, writer):
                writer.write(WEBSOCKET)
                await read_message(reader, head_only=True)
                writer.write(b"x")
                await reader.readexactly(10)
                reset(writer)
        for _ in range(4):
            async with connection(port) as (reader, writer):
                writer.write(WEBSOCKET)
                await read_message(reader, head_only=True)
                assert await reader.read() == b""
        assert (await fetch(port)).body == b"fine"


async def test_refused_upgrade_is_an_ordinary_answer(proxy):
    async with backend(lambda r: ok(b"no", status="403 Forbidden")) as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            for _ in range(2):
                writer.write(WEBSOCKET)
                answer = await read_message(reader)
                assert (answer.status, answer.body) == (403, b"no")
    assert one.connections == 1


# --- mirrors ------------------------------------------------------------------------------------


async def test_mirrors_that_do_not_keep_up_cost_the_request_nothing(proxy):
    """One never reads, one cuts off at once, one takes all, trailers too."""
    copy = bytearray()
    whole = asyncio.Event()

    async def stuck(reader, writer):
        reader._transport.pause_reading()
        await asyncio.Event().wait()

    async def rude(reader, writer):
        await reader.readuntil(b"\r\n\r\n")

    async def good(reader, writer):
        received = bytearray()
        while not received.endswith((b"0\r\n\r\n", b"x-end: 1\r\n\r\n")):
            received += (data := await reader.read(65536))
            if not data:
                return
        if received.endswith(b"x-end: 1\r\n\r\n"):
            copy.extend(received)
            whole.set()
        writer.write(ok(b"", "connection: close"))
        await writer.drain()

    async with (
        backend(lambda r: ok(b"%d" % len(r.body))) as one,
        raw_backend(stuck) as a, raw_backend(rude) as b, raw_backend(good) as c,
    ):  # fmt: skip
        names = {"a": a, "b": b, "c": c}
        mirrors = tuple(Mirror(cluster_key("Service", "default", name, 80)) for name in names)
        port = await serve(
            proxy,
            cluster("one", one.port),
            *(cluster(name, number) for name, number in names.items()),
            route("r", rule(to("one"), filters=mirrors)),
        )
        head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
        async with asyncio.timeout(60), connection(port) as (reader, writer):
            writer.write(head)
            for _ in range(300):
                writer.write(chunk)
                await writer.drain()
            writer.write(b"0\r\n\r\n")
            assert (await read_message(reader)).body == b"3000000"
            writer.write(head + chunk + b"0\r\nx-end: 1\r\n\r\n")
            assert (await read_message(reader)).body == b"10000"
            await whole.wait()
    assert copy.count(b"\0") == 10_000


# --- random endings -----------------------------------------------------------------------------


async def test_random_endings_leak_nothing(proxy):
    """Clients and backends that break off anywhere; then every connection of a small pool is still
    there to be had."""
    chance = random.Random(7)

    async def handle(reader, writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /last"):
                writer.write(ok(b"fine"))
                continue
            match chance.randrange(8):
                case 0:
                    return
                case 1:
                    reset(writer)
                case 2:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\nabc")
                    if chance.random() < 0.5:
                        return
                    await reader.read()
                case 3:
                    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n")
                case 4:
                    await reader.read()
                case 5:
                    writer.write(ok(b"early"))
                case 6:
                    writer.write(b"HTTP/1.1 103 Early\r\n\r\n" + ok(bytes(200_000)))
                case 7:
                    writer.write(ok(b"", "connection: close"))
                    return

    async def client(port: int) -> None:
        with suppress(OSError, asyncio.IncompleteReadError, TimeoutError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                head = chance.choice((
                    b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
                    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n123",
                    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
                    b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n"
                    b"Content-Length: 3\r\n\r\n",
                    WEBSOCKET,
                ))  # fmt: skip
                writer.write(head if chance.random() < 0.8 else head[: chance.randrange(len(head))])
                async with asyncio.timeout(chance.choice((0.001, 0.02, 0.1))):
                    await reader.read(1000)
            finally:
                if chance.random() < 0.5:
                    reset(writer)
                else:
                    writer.close()

    async with raw_backend(handle) as one:
        limits = Settings(head_timeout_s=1, body_timeout_s=1, idle_timeout_s=1)
        port = await serve(
            proxy,
            cluster("one", one, max_connections_per_endpoint=4, max_pending=50),
            route(
                "r",
                rule(to("one"), matches=(RouteMatch(PathMatch("PathPrefix", "/last")),)),
                rule(to("one"), request_timeout_ms=500, retry=Retry(codes=(502,), attempts=1)),
            ),
            {SETTINGS_KEY: limits},
        )
        for _ in range(20):
            await asyncio.gather(*(client(port) for _ in range(20)))
        await proxy.metric("weft_downstream_connections", lambda value: value == 0)
        label = f'{{backend="{cluster_key("Service", "default", "one", 80)}"}}'
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*(fetch(port, get("/last")) for _ in range(12)))
        assert {answer.status for answer in answers} == {200}
        await proxy.metric(f"weft_upstream_connections{label}", lambda value: value == 0)
        assert proxy.metrics().get('weft_http_local_replies_total{reason="internal"}') is None
