"""A worker as a process: rights, configuration, certificates, drain, slow clients."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from pathlib import Path

import pytest
from support.proxy import (
    CERTIFICATE,
    backend,
    certificate,
    client_context,
    cluster,
    connection,
    fetch,
    get,
    https_port,
    ok,
    proxy_fixture,
    read_message,
    route,
    rule,
    serve,
    to,
    worker,
)

from certs.selfsigned import Authority
from mesh.model.nodeconfig import CertificateSection, Settings
from mesh.model.section import SETTINGS_KEY, cluster_key, port_key, route_key

proxy = proxy_fixture


async def test_worker_started_by_root_has_no_rights(proxy):
    if (await asyncio.to_thread(Path("/proc/self/status").read_text)).split("Uid:")[1].split()[
        0
    ] != "0":
        pytest.skip("needs root, to see it given up")
    port = await serve(proxy)
    assert (await fetch(port)).status == 404
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{proxy.process.pid}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert "0" not in status["Uid"].split()
    assert "0" not in status["Gid"].split()
    assert status["Groups"].strip() == ""
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["Name"] == "weft-worker"


async def test_new_channel_brings_the_whole_value_and_drops_what_went(proxy):
    async with backend() as one:
        port = await serve(
            proxy, cluster("one", one.port), route("a", rule(to("one")), hostnames=("a.x",))
        )
        assert (await fetch(port, get("/", "a.x"))).status == 200
        # The agent died; while it was away a route was replaced by another.
        proxy.config, _ = proxy.config.change(
            route("b", rule(to("one")), hostnames=("b.x",)),
            (route_key("HTTPRoute", "default", "a"),),
        )
        await proxy.connect()
        assert (await fetch(port, get("/", "a.x"))).status == 404
        assert (await fetch(port, get("/", "b.x"))).status == 200


async def test_traffic_goes_on_while_nobody_configures(proxy):
    async with backend() as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            writer.write(get("/1").encode())
            await read_message(reader)
            await proxy.disconnect()
            writer.write(get("/2").encode())
            assert (await read_message(reader)).body == b"GET /2 HTTP/1.1"
        assert (await fetch(port, get("/3"))).status == 200


async def test_endpoints_change_under_an_open_connection(proxy):
    async with backend(lambda r: ok(b"old")) as old, backend(lambda r: ok(b"new")) as new:
        port = await serve(proxy, cluster("one", old.port), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            writer.write(get().encode())
            assert (await read_message(reader)).body == b"old"
            await proxy.apply(cluster("one", new.port))
            writer.write(get().encode())
            assert (await read_message(reader)).body == b"new"


async def test_removed_port_takes_no_connections(proxy):
    port = await serve(proxy)
    assert (await fetch(port)).status == 404
    await proxy.apply({}, (port_key("127.0.0.1", port),))
    proxy.unlisten(port)
    # The worker's descriptor was the last one.
    async with asyncio.timeout(10):
        while True:
            try:
                await fetch(port)
            except (ConnectionError, AssertionError):
                break


async def test_drain_finishes_requests_and_exits(proxy):
    answer = asyncio.Event()

    async def slow(request) -> bytes:
        await answer.wait()
        return ok(b"late")

    async with backend(slow) as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer), connection(port) as (idle, _):
            writer.write(get().encode())
            await one.wait_for(1)
            proxy.drain(20)
            assert await idle.read() == b""
            answer.set()
            response = await read_message(reader)
            assert response.body == b"late"
            assert response.header("connection") == "close"
            assert await proxy.process.wait() == 0


async def test_drain_deadline(proxy):
    async with backend(lambda request: asyncio.Event().wait()) as one:  # never answers
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            writer.write(get().encode())
            await one.wait_for(1)
            proxy.drain(0.1)
            assert await proxy.process.wait() == 0
            assert await reader.read() == b""


async def test_worker_goes_with_its_supervisor(proxy):
    await serve(proxy)
    proxy.control.close()
    assert await proxy.process.wait() == 0


async def test_https_by_sni_with_misdirected_requests(proxy):
    authority = Authority.create("test")
    async with backend() as one:
        port = proxy.listen()
        await proxy.apply(
            cluster("one", one.port)
            | route("r", rule(to("one")))
            | certificate(authority, "a.x", "b.x")
            | https_port(port, "a.x", "b.x")
        )
        context = client_context(authority)
        async with connection(port, ssl=context, server_hostname="a.x") as (reader, writer):
            writer.write(get("/", "a.x").encode())
            assert (await read_message(reader)).status == 200
            writer.write(get("/", "b.x").encode())
            assert (await read_message(reader)).status == 421
    assert one.requests[0].header("x-forwarded-proto") == "https"


async def test_renewed_certificate_serves_new_handshakes_only(proxy):
    old, new = Authority.create("old"), Authority.create("new")
    async with backend() as one:
        port = proxy.listen()
        await proxy.apply(
            cluster("one", one.port)
            | route("r", rule(to("one")))
            | certificate(old, "a.x")
            | https_port(port, "a.x")
        )
        rest = {"server_hostname": "a.x"}
        async with connection(port, ssl=client_context(old), **rest) as (reader, writer):
            writer.write(get("/", "a.x").encode())
            assert (await read_message(reader)).status == 200
            await proxy.apply(certificate(new, "a.x"))
            # The server with the new certificates takes over in the next steps of the loop.
            async with asyncio.timeout(10):
                while True:
                    try:
                        async with connection(port, ssl=client_context(new), **rest):
                            break
                    except ssl.SSLCertVerificationError:
                        continue
            writer.write(get("/", "a.x").encode())
            assert (await read_message(reader)).status == 200


async def test_unusable_certificate_is_refused_and_the_old_one_stays(proxy):
    authority = Authority.create("test")
    port = proxy.listen()
    await proxy.apply(certificate(authority, "a.x") | https_port(port, "a.x"))
    broken = {CERTIFICATE: CertificateSection("-----BEGIN NONSENSE", "secret nonsense")}
    refused = await proxy.apply(broken)
    assert list(refused) == [CERTIFICATE]
    assert "secret nonsense" not in refused[CERTIFICATE]
    context = client_context(authority)
    async with connection(port, ssl=context, server_hostname="a.x") as (reader, writer):
        writer.write(get("/", "a.x").encode())
        assert (await read_message(reader)).status == 404


@pytest.mark.skipif(shutil.which("nghttp") is None, reason="nghttp (nghttp2-client) not installed")
@pytest.mark.parametrize("arguments", [["--no-dep"], ["--no-dep", "--upgrade"]])
async def test_http2_prior_knowledge(proxy, arguments):
    async with backend(lambda request: ok(b"from h1")) as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        process = await asyncio.create_subprocess_exec(
            "nghttp", "-t", "10", *arguments, f"http://127.0.0.1:{port}/x",
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, _ = await process.communicate()
    if "--upgrade" in arguments:
        # h2c by Upgrade is not offered (RFC 9113 §3.1 has dropped it): HTTP/1.1 goes on.
        assert b"from h1" not in output
    else:
        assert output == b"from h1"


async def test_h2c_between_two_workers(proxy):
    """Client speaks HTTP/1.1, the first worker h2c to the second, that one HTTP/1.1 again."""
    async with worker() as second, backend(lambda request: ok(request.body)) as one:
        inner = await serve(second, cluster("one", one.port), route("r", rule(to("one"))))
        outer = await serve(proxy, cluster("h2", inner, protocol="h2c"), route("r", rule(to("h2"))))
        body = b"0123456789" * 50_000
        for _ in range(3):
            request = b"POST /x HTTP/1.1\r\nHost: a.x\r\nContent-Length: %d\r\n\r\n" % len(body)
            answer = await fetch(outer, request + body)
            assert (answer.status, answer.body) == (200, body)
    assert one.requests[0].header("host") == "a.x"
    assert one.requests[0].start == "POST /x HTTP/1.1"


async def test_slow_heads_are_cut_off_while_others_are_served(proxy):
    """500 clients that never finish their head, as slowhttptest would."""
    async with backend() as one:
        port = await serve(
            proxy,
            cluster("one", one.port),
            route("r", rule(to("one"))),
            {SETTINGS_KEY: Settings(head_timeout_s=1.0)},
        )

        async def slow() -> bytes:
            async with connection(port) as (reader, writer):
                writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nX-Slow: ")
                return await reader.read()

        crowd = [asyncio.ensure_future(slow()) for _ in range(500)]
        served = 0
        while not all(client.done() for client in crowd):
            assert (await fetch(port)).status == 200
            served += 1
        ends = [client.result() for client in crowd]
    assert served
    assert all(end.startswith(b"HTTP/1.1 408 ") or end == b"" for end in ends)


@pytest.mark.skipif(shutil.which("slowhttptest") is None, reason="slowhttptest not installed")
@pytest.mark.parametrize("mode", ["-H", "-B"])
async def test_slowhttptest_ends_with_every_connection_closed(proxy, mode, tmp_path):
    """Slow heads (-H), slow bodies (-B)."""
    async with backend() as one:
        port = await serve(
            proxy,
            cluster("one", one.port),
            route("r", rule(to("one"))),
            {SETTINGS_KEY: Settings(head_timeout_s=1, body_timeout_s=1, idle_timeout_s=1)},
        )
        process = await asyncio.create_subprocess_exec(
            "slowhttptest", mode, "-c", "500", "-r", "500", "-i", "10", "-l", "20", "-x", "24",
            "-u", f"http://127.0.0.1:{port}/",
            stdout=asyncio.subprocess.PIPE, cwd=tmp_path,
        )  # fmt: skip
        served = 0

        async def others() -> None:
            nonlocal served
            while True:
                assert (await fetch(port, "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")).status == 200
                served += 1

        task = asyncio.ensure_future(others())
        output, _ = await process.communicate()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    text = output.decode()
    assert "No open connections left" in text, text[-600:]
    assert served


async def test_clusters_and_routes_come_and_go_without_leaving_anything(proxy):
    port = await serve(proxy)
    for i in range(50):
        await proxy.apply(cluster(f"c{i}", 1) | route(f"r{i}", rule(to(f"c{i}"))))
        await proxy.apply(
            {},
            (
                cluster_key("Service", "default", f"c{i}", 80),
                route_key("HTTPRoute", "default", f"r{i}"),
            ),
        )
    assert (await fetch(port)).status == 404
