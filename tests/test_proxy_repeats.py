"""Attempts of a worker: stale connections, retries, what they cost and when they end."""

from __future__ import annotations

from support.http1 import raw_backend
from support.proxy import (
    backend,
    cluster,
    fetch,
    ok,
    proxy_fixture,
    route,
    rule,
    serve,
    to,
)

from mesh.model.nodeconfig import Settings
from mesh.model.routeconfig import Retry
from mesh.model.section import SETTINGS_KEY

proxy = proxy_fixture


async def test_stale_connections_of_all_endpoints_cost_no_request(proxy):
    """Every endpoint closes its kept connections just as they are used again."""

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ok(b"first"))
        await reader.readuntil(b"\r\n\r\n")

    async with (
        raw_backend(handle) as a, raw_backend(handle) as b, raw_backend(handle) as c,
        raw_backend(handle) as d, raw_backend(handle) as e,
    ):  # fmt: skip
        port = await serve(
            proxy,
            cluster("all", a, b, c, d, e),
            route("r", rule(to("all"))),
            {SETTINGS_KEY: Settings(balancer="round-robin")},
        )
        statuses = [(await fetch(port)).status for _ in range(30)]
    assert statuses == [200] * 30


async def test_stale_connections_do_not_use_up_a_routes_retries(proxy):
    """503, then a connection closed at reuse, then an answer: one retry was asked for, and got."""
    seen = []

    async def handle(reader, writer):
        while True:
            await reader.readuntil(b"\r\n\r\n")
            seen.append(len(seen))
            if len(seen) == 1:
                writer.write(ok(b"warm"))
            elif len(seen) == 2:
                return
            elif len(seen) == 3:
                writer.write(ok(b"bad", status="503 Service Unavailable"))
            else:
                writer.write(ok(b"good"))

    async with raw_backend(handle) as one:
        port = await serve(
            proxy,
            cluster("one", one),
            route("r", rule(to("one"), retry=Retry(codes=(503,), attempts=1))),
        )
        assert (await fetch(port)).body == b"warm"
        assert (await fetch(port)).body == b"good"


async def test_endpoints_are_not_ejected_for_what_a_route_merely_retries(proxy):
    """404 is retried by this route; it says nothing of the endpoint's health."""
    async with (
        backend(lambda r: ok(b"", status="404 Not Found")) as one,
        backend(lambda r: ok(b"")) as two,
    ):
        port = await serve(
            proxy,
            cluster("both", one.port, two.port),
            route("r", rule(to("both"), retry=Retry(codes=(404,), attempts=1))),
            {SETTINGS_KEY: Settings(balancer="round-robin", ejection_failures=2)},
        )
        for _ in range(20):
            assert (await fetch(port)).status == 200
    assert len(one.requests) >= 8


async def test_backend_timeout_is_retried_elsewhere_where_the_route_says_so(proxy):
    async def silent(reader, writer):
        await reader.read()

    async with raw_backend(silent) as one, backend(lambda r: ok(r.body)) as two:
        port = await serve(
            proxy,
            cluster("both", one, two.port),
            route(
                "r",
                rule(to("both"), backend_timeout_ms=100, retry=Retry(codes=(504,), attempts=1)),
            ),
        )
        request = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
        answers = [await fetch(port, request) for _ in range(4)]
    assert {(answer.status, answer.body) for answer in answers} == {(200, b"hello")}


async def test_many_attempts_with_backoff_end_by_the_requests_timeout(proxy):
    async with backend(lambda r: ok(b"", status="503 Service Unavailable")) as one:
        port = await serve(
            proxy,
            cluster("one", one.port),
            route(
                "r",
                rule(
                    to("one"),
                    request_timeout_ms=300,
                    retry=Retry(codes=(503,), attempts=1_000_000, backoff_ms=1),
                ),
            ),
        )
        assert (await fetch(port)).status == 504
