"""Requests through a real worker: routing, filters, attempts, bodies, tunnels."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import Counter
from pathlib import Path

import pytest
from support.proxy import (
    Message,
    WorkerProcess,
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
from mesh.model.routeconfig import (
    Cors,
    HeaderModifier,
    HeaderValue,
    Mirror,
    PathMatch,
    PathModifier,
    Redirect,
    Retry,
    Rewrite,
    RouteMatch,
    SessionPersistence,
    WeightedBackend,
)
from mesh.model.section import SETTINGS_KEY, cluster_key, route_key


def prefix(path: str) -> tuple[RouteMatch, ...]:
    return (RouteMatch(PathMatch("PathPrefix", path)),)


proxy = proxy_fixture


async def test_request_reaches_the_routes_backend_and_its_answer_comes_back(proxy):
    async with backend() as one, backend() as two:
        port = await serve(
            proxy,
            cluster("one", one.port),
            cluster("two", two.port),
            route("r", rule(to("one"), matches=prefix("/one")), rule(to("two"))),
        )
        first = await fetch(port, get("/one/x?q=1", "shop.example", "X-Own: 1"))
        second = await fetch(port, get("/two"))
    assert (first.status, first.body) == (200, b"GET /one/x?q=1 HTTP/1.1")
    assert (second.status, second.body) == (200, b"GET /two HTTP/1.1")
    assert one.requests[0].header("host") == "shop.example"
    assert one.requests[0].header("x-own") == "1"
    assert one.requests[0].header("x-forwarded-for") == "127.0.0.1"


async def test_what_no_route_takes_is_404_and_no_valid_backend_500(proxy):
    broken = WeightedBackend(cluster=None)
    port = await serve(
        proxy, route("r", rule(broken, matches=prefix("/broken"))), cluster("empty"),
        route("e", rule(to("empty"), matches=prefix("/empty"))),
        route("x", rule(to("unknown"), matches=prefix("/unknown"))),
    )  # fmt: skip
    assert (await fetch(port, get("/other"))).status == 404
    assert (await fetch(port, get("/broken"))).status == 500
    assert (await fetch(port, get("/empty"))).status == 503
    assert (await fetch(port, get("/unknown"))).status == 503


async def test_keep_alive_both_ways(proxy):
    async with backend() as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            for i in range(20):
                writer.write(get(f"/{i}").encode())
                answer = await read_message(reader)
                assert answer is not None
                assert answer.body == f"GET /{i} HTTP/1.1".encode()
    assert one.connections == 1


async def test_pipelined_requests_are_answered_in_order(proxy):
    async with backend() as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            writer.write("".join(get(f"/{i}") for i in range(10)).encode())
            bodies = [(await read_message(reader)).body for _ in range(10)]
    assert bodies == [f"GET /{i} HTTP/1.1".encode() for i in range(10)]


async def test_weights(proxy):
    async with backend() as one, backend() as two:
        port = await serve(
            proxy,
            cluster("one", one.port),
            cluster("two", two.port),
            route("r", rule(to("one", 9), to("two", 1), to("two", 0))),
        )
        async with connection(port) as (reader, writer):
            for _ in range(600):
                writer.write(get().encode())
                await read_message(reader)
    # 600 draws at 0.1: outside of 25..110 once in far more than 10**9 runs.
    assert 25 < len(two.requests) < 110
    assert len(one.requests) + len(two.requests) == 600


async def test_filters_of_rule_and_backend(proxy):
    def change(direction, **kinds):
        pairs = {k: tuple(HeaderValue(*item) for item in v) for k, v in kinds.items()}
        return HeaderModifier(direction=direction, **pairs)

    async with backend() as one:
        port = await serve(
            proxy,
            cluster("one", one.port),
            route(
                "r",
                rule(
                    to("one", filters=(change("request", add=[("x-backend", "b")]),)),
                    matches=prefix("/api"),
                    filters=(
                        change("request", set=[("x-set", "new")]),
                        change("response", set=[("x-answer", "yes")]),
                        Rewrite(hostname="inner", path=PathModifier("ReplacePrefixMatch", "/v2")),
                    ),
                ),
            ),
        )
        answer = await fetch(port, get("/api/users?x=1", "outer", "X-Set: old"))
    seen = one.requests[0]
    assert seen.start == "GET /v2/users?x=1 HTTP/1.1"
    assert (seen.header("host"), seen.header("x-set"), seen.header("x-backend")) == (
        "inner", "new", "b",
    )  # fmt: skip
    assert answer.header("x-answer") == "yes"


async def test_redirect_and_preflight_are_answered_here(proxy):
    port = await serve(
        proxy,
        route(
            "r",
            rule(filters=(Redirect(scheme="https", status=301),), matches=prefix("/old")),
            rule(filters=(Cors(allow_origins=("https://a.example",)),), matches=prefix("/api")),
        ),
    )
    answer = await fetch(port, get("/old/x", "shop.example"))
    assert (answer.status, answer.header("location")) == (301, "https://shop.example/old/x")
    preflight = (
        "OPTIONS /api HTTP/1.1\r\nHost: a\r\nOrigin: https://a.example\r\n"
        "Access-Control-Request-Method: PUT\r\n\r\n"
    )
    answer = await fetch(port, preflight)
    assert answer.status == 204
    assert answer.header("access-control-allow-origin") == "https://a.example"


async def test_bodies_of_every_framing_arrive_whole(proxy):
    async with backend(lambda request: ok(request.body)) as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        body = bytes(range(256)) * 4096
        sized = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        assert (await fetch(port, sized)).body == body
        chunks = b"".join(
            b"%x\r\n%s\r\n" % (len(part), part)
            for part in (body[i : i + 10_007] for i in range(0, len(body), 10_007))
        )
        head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        assert (await fetch(port, head + chunks + b"0\r\n\r\n")).body == body


async def test_expect_continue_is_the_backends_to_answer(proxy):
    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"expect: 100-continue" in head.lower()
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        writer.write(ok(await reader.readexactly(5)))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server, connection(await serve(
        proxy,
        cluster("one", server.sockets[0].getsockname()[1]),
        route("r", rule(to("one"))),
    )) as (reader, writer):  # fmt: skip
        writer.write(
            b"PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
        )
        interim = await read_message(reader, head_only=True)
        assert interim is not None
        assert interim.status == 100
        writer.write(b"hello")
        answer = await read_message(reader)
    assert (answer.status, answer.body) == (200, b"hello")


async def test_interim_responses_pass(proxy):
    hints = b"HTTP/1.1 103 Early Hints\r\nlink: </x>; rel=preload\r\n\r\n"
    async with backend(lambda request: hints + ok(b"done")) as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            writer.write(get().encode())
            first = await read_message(reader, head_only=True)
            last = await read_message(reader)
    assert (first.status, first.header("link")) == (103, "</x>; rel=preload")
    assert last.body == b"done"


@pytest.mark.parametrize("more", [(), ("Content-Length: 0",)])
async def test_websocket_upgrade_is_a_tunnel(proxy, more):
    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"upgrade: websocket" in head.lower()
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        while data := await reader.read(65536):
            writer.write(data[::-1])
        writer.write(b"bye")
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server, connection(await serve(
        proxy,
        cluster("one", server.sockets[0].getsockname()[1], protocol="ws"),
        route("r", rule(to("one"), request_timeout_ms=50)),
    )) as (reader, writer):  # fmt: skip
        asked = get("/", "a", "Connection: Upgrade", "Upgrade: websocket", *more)
        writer.write(asked.encode())
        answer = await read_message(reader, head_only=True)
        assert answer.status == 101
        assert answer.header("upgrade").lower() == "websocket"
        for text in (b"abc", b"\x00\xff" * 1000):
            writer.write(text)
            assert await reader.readexactly(len(text)) == text[::-1]
        writer.write_eof()
        assert await reader.read() == b"bye"


async def test_timeouts_answer_504(proxy):
    never = asyncio.Event()

    async def answer(request: Message) -> bytes:
        await never.wait()
        return b""

    async with backend(answer) as one:
        port = await serve(
            proxy,
            cluster("one", one.port),
            route(
                "r",
                rule(to("one"), matches=prefix("/request"), request_timeout_ms=50),
                rule(to("one"), matches=prefix("/backend"), backend_timeout_ms=50),
            ),
        )
        whole = await fetch(port, get("/request"))
        one_try = await fetch(port, get("/backend"))
    assert (whole.status, one_try.status) == (504, 504)
    reasons = {json.loads(line)["reason"] for line in await logged(proxy, 2)}
    assert reasons == {"request_timeout", "backend_timeout"}


async def logged(proxy: WorkerProcess, count: int) -> list[str]:
    """The first `count` lines of the access log; the worker writes it a moment later."""
    async with asyncio.timeout(10):
        while len(lines := proxy.access_log().splitlines()) < count:
            await asyncio.sleep(0.02)  # a file tells nobody that it has grown
    return lines


async def test_retry_by_status_goes_elsewhere(proxy):
    async with (
        backend(lambda request: ok(b"bad", status="503 Service Unavailable")) as bad,
        backend(lambda request: ok(request.body)) as good,
    ):
        port = await serve(
            proxy,
            cluster("both", bad.port, good.port),
            route("r", rule(to("both"), retry=Retry(codes=(503,), attempts=2, backoff_ms=1))),
        )
        body = b"x" * 1000
        request = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + body
        answers = [await fetch(port, request) for _ in range(8)]
    assert {(answer.status, answer.body) for answer in answers} == {(200, body)}
    assert bad.requests


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("POST", 504)])
async def test_retry_after_a_backend_timeout(proxy, method, status):
    """HTTPRouteRetryBackendTimeout: what may have been acted on is repeated only if idempotent."""
    hanging = asyncio.Event()

    async def answer(request: Message) -> bytes:
        if len(one.requests) == 1:
            await hanging.wait()
        return ok(b"at last")

    async with backend(answer) as one:
        port = await serve(
            proxy,
            cluster("one", one.port),
            route("r", rule(to("one"), retry=Retry(attempts=1), backend_timeout_ms=100)),
        )
        request = f"{method} / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
        assert (await fetch(port, request)).status == status
    assert len(one.requests) == (2 if status == 200 else 1)


async def test_retry_after_connection_errors(proxy, unused_tcp_port):
    """HTTPRouteRetryConnectionError: a backend that comes up in the meantime is found."""
    port = await serve(
        proxy,
        cluster("one", unused_tcp_port),
        route("r", rule(to("one"), retry=Retry(attempts=20, backoff_ms=50))),
    )
    request = asyncio.ensure_future(
        fetch(port, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi")
    )
    async with asyncio.timeout(10):
        while b"connect_refused" not in await metrics_files(proxy):
            await asyncio.sleep(0.02)  # a file tells nobody that it has changed
    async with backend(lambda request: ok(request.body), port=unused_tcp_port):
        answer = await request
    assert (answer.status, answer.body) == (200, b"hi")


async def metrics_files(proxy: WorkerProcess) -> bytes:
    return b"".join(path.read_bytes() for path in Path(proxy.metrics_dir).iterdir())


async def test_retries_end_and_the_last_answer_stands(proxy):
    async with backend(lambda request: ok(b"bad", status="503 Service Unavailable")) as bad:
        port = await serve(
            proxy,
            cluster("bad", bad.port),
            route("r", rule(to("bad"), retry=Retry(codes=(503,), attempts=2))),
        )
        answer = await fetch(port)
    assert (answer.status, answer.body) == (503, b"bad")
    assert len(bad.requests) == 3


async def test_refused_connection_goes_to_another_endpoint(proxy, unused_tcp_port):
    async with backend() as good:
        port = await serve(
            proxy, cluster("both", unused_tcp_port, good.port), route("r", rule(to("both")))
        )
        statuses = Counter([(await fetch(port)).status for _ in range(12)])
    assert statuses == {200: 12}


@pytest.mark.parametrize(("method", "status"), [("GET", 200), ("POST", 502)])
async def test_connection_closed_at_reuse_costs_only_what_must_not_be_repeated(
    proxy, method, status
):
    """The backend answers once on each connection, then closes it when the next request comes."""
    answered = Counter()

    def answer(request: Message) -> bytes:
        answered[request.start.split()[1]] += 1
        return b"" if one.connections == 1 and len(one.requests) == 2 else ok(b"fine")

    async with backend(answer) as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        assert (await fetch(port, get("/first"))).status == 200
        again = await fetch(
            port, f"{method} /second HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"
        )
    assert again.status == status
    assert answered["/second"] == (2 if method == "GET" else 1)


async def test_mirrors_get_copies_and_change_nothing(proxy):
    async with backend() as one, backend(lambda request: b"") as two, backend() as three:
        mirrors = tuple(Mirror(cluster_key("Service", "default", name, 80)) for name in "bc")
        port = await serve(
            proxy,
            cluster("a", one.port),
            cluster("b", two.port),
            cluster("c", three.port),
            route("r", rule(to("a"), filters=mirrors)),
        )
        request = b"POST /m HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody"
        assert (await fetch(port, request)).status == 200
        await two.wait_for(1)
        await three.wait_for(1)
    assert two.requests[0].body == three.requests[0].body == b"body"
    assert two.requests[0].start == "POST /m HTTP/1.1"


async def test_mirrors_of_requests_that_are_answered_at_once_come_whole(proxy):
    async with backend() as one, backend() as two:
        mirror = Mirror(cluster_key("Service", "default", "b", 80))
        port = await serve(
            proxy,
            cluster("a", one.port),
            cluster("b", two.port),
            route("r", rule(to("a"), filters=(mirror,))),
        )
        async with connection(port) as (reader, writer):
            for _ in range(100):
                writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n")
                writer.write(b"body")
                assert (await read_message(reader)).status == 200
        async with asyncio.timeout(10):
            await two.wait_for(100)
    assert {request.body for request in two.requests} == {b"body"}


async def test_session_cookie_pins_an_endpoint(proxy):
    async with backend(lambda r: ok(b"1")) as one, backend(lambda r: ok(b"2")) as two:
        port = await serve(
            proxy,
            cluster("both", one.port, two.port),
            route("r", rule(to("both"), session=SessionPersistence(name="s"))),
        )
        first = await fetch(port)
        cookie = first.header("set-cookie").split(";")[0]
        again = [await fetch(port, get("/", "a", f"Cookie: {cookie}")) for _ in range(10)]
    assert {answer.body for answer in again} == {first.body}


async def test_a_response_that_breaks_off_is_not_taken_for_whole(proxy):
    short = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\nconnection: close\r\n\r\nonly this"
    async with backend(lambda request: short) as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        with pytest.raises(asyncio.IncompleteReadError):
            await fetch(port)


async def test_access_log_tells_route_and_backend(proxy):
    async with backend() as one:
        port = await serve(
            proxy, cluster("one", one.port), route("r", rule(to("one"), name="main"))
        )
        await fetch(port, get("/logged", "shop.example", "User-Agent: test/1"))
        entry = json.loads((await logged(proxy, 1))[0])
    assert entry["route"] == "HTTPRoute/default/r"
    assert entry["rule"] == "main"
    assert entry["endpoint"] == f"127.0.0.1:{one.port}"
    assert (entry["status"], entry["path"], entry["user_agent"]) == (200, "/logged", "test/1")


async def test_client_that_leaves_frees_its_backend(proxy):
    arrived, gone = asyncio.Event(), asyncio.Event()

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        arrived.set()
        await reader.read()  # the proxy's end of the connection
        gone.set()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = await serve(
            proxy,
            cluster("one", server.sockets[0].getsockname()[1]),
            route("r", rule(to("one"))),
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get().encode())
        await arrived.wait()
        # A reset: a mere FIN may be a client that has sent all it has and awaits its answer.
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        async with asyncio.timeout(10):
            await gone.wait()
        del reader


async def test_refused_section_keeps_its_last_value_and_harms_nothing_else(proxy):
    async with backend() as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        bad = (RouteMatch(PathMatch("RegularExpression", "(")),)
        refused = await proxy.apply(
            route("r", rule(to("one"), matches=bad))
            | route("new", rule(to("one"), matches=prefix("/new")))
        )
        assert list(refused) == [route_key("HTTPRoute", "default", "r")]
        assert "regular expression" in refused[route_key("HTTPRoute", "default", "r")]
        assert (await fetch(port, get("/old"))).status == 200
        assert await proxy.apply({}, (route_key("HTTPRoute", "default", "r"),)) == {}
        assert (await fetch(port, get("/old"))).status == 404
        assert (await fetch(port, get("/new"))).status == 200


async def test_limits_of_connections(proxy):
    port = await serve(
        proxy, {SETTINGS_KEY: Settings(max_connections_per_client=2, head_timeout_s=30)}
    )
    async with connection(port) as first, connection(port):
        # Both are in once one of them is answered.
        first[1].write(get().encode())
        assert (await read_message(first[0])).status == 404
        async with connection(port) as (reader, _):
            refused = await read_message(reader)
            assert refused.status == 429
