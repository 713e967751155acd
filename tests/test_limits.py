"""Limits of a worker: over one of them comes the right status, the connection ends, and the reason
is counted."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest
from support.proxy import (
    backend,
    cluster,
    connection,
    get,
    http_port,
    read_message,
    route,
    rule,
    to,
    worker,
)

from mesh.model.nodeconfig import Section, Settings
from mesh.model.section import SETTINGS_KEY


def limited(**settings: object) -> dict[str, Section]:
    return {SETTINGS_KEY: Settings(**settings)}


POST = "POST / HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize(
    ("settings", "request_text", "status", "reason"),
    [
        ({"max_head_bytes": 1024}, get("/", "a", "X: " + "x" * 1024), 431, "head_too_large"),
        ({"max_head_bytes": 1024}, get("/" + "x" * 1024), 414, "target_too_long"),
        ({"max_headers": 3}, get("/", "a", *("X: x",) * 3), 431, "too_many_headers"),
        ({"max_body_bytes": 9}, f"{POST}Content-Length: 10\r\n\r\n", 413, "body_too_large"),
        (
            {"max_body_bytes": 9},
            f"{POST}Transfer-Encoding: chunked\r\n\r\na\r\n0123456789\r\n",
            413,
            "body_too_large",
        ),
        ({"head_timeout_s": 0.1}, "GET / HTTP/1.1\r\nHost: a\r\n", 408, "head_timeout"),
        ({"body_timeout_s": 0.1}, f"{POST}Content-Length: 10\r\n\r\n0", 408, "body_timeout"),
    ],
)
async def test_requests_over_a_limit(
    settings: dict[str, object], request_text: str, status: int, reason: str
) -> None:
    async with worker() as proxy, backend() as one:
        port = proxy.listen()
        routes = cluster("one", one.port) | route("r", rule(to("one")))
        await proxy.apply(http_port(port) | routes | limited(**settings))
        async with connection(port) as (reader, writer):
            writer.write(request_text.encode())
            answer = await read_message(reader)
            assert answer is not None
            assert answer.status == status
            assert await read_message(reader) is None
        await proxy.metric(
            f'weft_downstream_refused_total{{reason="{reason}"}}', lambda value: value == 1
        )


@pytest.mark.parametrize(
    ("setting", "status"), [("max_connections_per_client", 429), ("max_connections", 503)]
)
async def test_connections_over_a_limit(setting: str, status: int) -> None:
    async with worker() as proxy, AsyncExitStack() as stack:
        port = proxy.listen()
        await proxy.apply(http_port(port) | limited(**{setting: 2}))
        for _ in range(2):
            reader, writer = await stack.enter_async_context(connection(port))
            writer.write(get().encode())
            answer = await read_message(reader)
            assert answer is not None
            assert answer.status == 404
        async with connection(port) as (reader, _):
            refused = await read_message(reader)
            assert refused is not None
            assert refused.status == status
            assert await read_message(reader) is None
        await proxy.metric(
            f'weft_downstream_refused_total{{reason="{setting}"}}', lambda value: value == 1
        )
