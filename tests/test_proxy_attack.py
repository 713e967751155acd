"""A worker under clients, backends and configurations that mean it ill, or just break."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import re
import resource
import socket
import ssl
import struct
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import h2.events
import pytest
from http2_peer import RawPeer
from support.proxy import (
    WorkerProcess,
    backend,
    cluster,
    connection,
    fetch,
    get,
    http_port,
    ok,
    read_message,
    route,
    rule,
    to,
    worker,
)

from certs.selfsigned import Authority
from mesh.model.channel import Listen, PortAddress, Unlisten, encode_frame, send_control
from mesh.model.nodeconfig import (
    SETTINGS_KEY,
    CertificateSection,
    ClientValidation,
    Listener,
    Mirror,
    PathMatch,
    PortSection,
    Retry,
    RouteMatch,
    Settings,
    certificate_key,
    cluster_key,
    port_key,
    route_key,
)

CERTIFICATE = certificate_key("default", "shop")


@pytest.fixture
async def proxy():
    async with worker() as process:
        yield process


async def serve(process: WorkerProcess, *sections: dict) -> int:
    port = process.listen()
    put = http_port(port)
    for section in sections:
        put |= section
    assert await process.apply(put) == {}
    return port


@asynccontextmanager
async def raw_backend(handle):
    """A server that is nothing but `handle(reader, writer)`; yields its port."""
    tasks = set()

    async def run(reader, writer):
        task = asyncio.current_task()
        tasks.add(task)
        try:
            await handle(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(run, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side gets a reset."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


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


# --- repeats ------------------------------------------------------------------------------------


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


async def test_what_is_wrong_inside_is_not_told_to_clients(proxy, unused_tcp_port):
    port = await serve(proxy, cluster("one", unused_tcp_port), route("r", rule(to("one"))))
    answer = await fetch(port)
    assert (answer.status, answer.body) == (503, b"connect_refused\n")


# --- upgrades -----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("protocol", ["h2c", "foo", "tls/1.2", "h2c, foo"])
async def test_only_websockets_are_upgraded_to(proxy, protocol):
    async with backend() as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        answer = await fetch(
            port, get("/", "a", "Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}",
                      "HTTP2-Settings: AAMAAABkAAQAAP__")
        )  # fmt: skip
    assert answer.status == 200
    assert one.requests[0].header("upgrade") is None
    assert one.requests[0].header("http2-settings") is None


async def test_refused_upgrade_is_an_ordinary_answer(proxy):
    async with backend(lambda r: ok(b"no", status="403 Forbidden")) as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            for _ in range(2):
                writer.write(WEBSOCKET)
                answer = await read_message(reader)
                assert (answer.status, answer.body) == (403, b"no")
    assert one.connections == 1


# --- gRPC ---------------------------------------------------------------------------------------


async def test_grpc_trailers_arrive(proxy):
    """HTTP/2 to h2c: a whole answer, and one that is trailers only."""

    async def handle(reader, writer):
        peer = RawPeer(reader, writer, client=False)
        peer.start()
        for only in (False, True):
            seen = len(peer.events)
            while not (
                ended := [e for e in peer.events[seen:] if isinstance(e, h2.events.StreamEnded)]
            ):
                await peer.more()
            number = ended[0].stream_id
            asked = dict(
                next(
                    e for e in peer.events
                    if isinstance(e, h2.events.RequestReceived) and e.stream_id == number
                ).headers
            )  # fmt: skip
            assert asked[b"te"] == b"trailers"
            head = [(b":status", b"200"), (b"content-type", b"application/grpc")]
            status = [(b"grpc-status", b"5"), (b"grpc-message", b"not here")]
            if only:
                peer.conn.send_headers(number, head + status, end_stream=True)
            else:
                peer.conn.send_headers(number, head)
                peer.conn.send_data(number, b"\0\0\0\0\3abc")
                peer.conn.send_headers(number, status, end_stream=True)
            peer.flush()
        while await peer.receive():
            pass

    async with raw_backend(handle) as one:
        port = await serve(proxy, cluster("one", one, protocol="h2c"), route("r", rule(to("one"))))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        peer = RawPeer(reader, writer, client=True)
        peer.start()
        fields = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":authority", b"a"),
            (b":path", b"/x.Y/Z"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
        ]
        first = peer.request(fields, b"\0\0\0\0\0")
        assert (await peer.response(first))[::2] == (200, b"\0\0\0\0\3abc")
        trailers = await peer.event(h2.events.TrailersReceived, first)
        assert dict(trailers.headers)[b"grpc-status"] == b"5"
        second = peer.request(fields, b"\0\0\0\0\0")
        status, head, body = await peer.response(second)
        assert (status, head[b"grpc-status"], body) == (200, b"5", b"")
        await peer.close()


async def test_trailers_over_http1(proxy):
    async def handle(reader, writer):
        received = await reader.readuntil(b"\r\n\r\n")
        while not received.endswith(b"\r\n\r\n") or b"\r\n0\r\n" not in received:
            received += await reader.read(1000)
        assert b"x-checksum: 1" in received
        assert b"content-length" not in received.lower()
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"2\r\nok\r\n0\r\nX-Sum: 2\r\nContent-Length: 7\r\n\r\n"
        )
        await writer.drain()

    async with raw_backend(handle) as one, asyncio.timeout(5):
        port = await serve(proxy, cluster("one", one), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            writer.write(
                b"POST / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\nTransfer-Encoding: chunked\r\n\r\n"
                b"3\r\nabc\r\n0\r\nx-checksum: 1\r\nContent-Length: 7\r\n\r\n"
            )
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readuntil(b"\r\n\r\n") == b"2\r\nok\r\n0\r\nx-sum: 2\r\n\r\n"


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


# --- configuration ------------------------------------------------------------------------------


async def test_a_whole_value_forgets_refusals_of_what_is_not_in_it(proxy):
    key = route_key("HTTPRoute", "default", "bad")
    bad = rule(to("one"), matches=(RouteMatch(PathMatch("RegularExpression", "(")),))
    assert list(await proxy.apply(route("bad", bad))) == [key]
    proxy.config, _ = proxy.config.change({}, (key,))
    await proxy.connect()
    assert await proxy.apply(cluster("other", 1)) == {}


async def test_removed_settings_are_the_defaults_again(proxy):
    port = await serve(proxy, {SETTINGS_KEY: Settings(max_connections_per_client=1)})
    async with connection(port) as (reader, writer):
        writer.write(get().encode())
        assert (await read_message(reader)).status == 404
        assert (await fetch(port)).status == 429
        await proxy.apply({}, (SETTINGS_KEY,))
        assert (await fetch(port)).status == 404


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\1\xc1",
        b"\0\0\0\6\x81\xa4type\xa1x",
        b"\0\0\0\2{}",
    ],
)
async def test_garbage_on_the_config_channel_ends_the_channel_only(proxy, frame):
    async with backend() as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        proxy._channel_out.write(frame)
        with pytest.raises(ConnectionError):
            await proxy.ack()
        assert (await fetch(port)).status == 200
        await proxy.connect()
        assert await proxy.apply(route("s", rule(to("one")))) == {}


async def test_delta_that_does_not_continue_ends_the_channel(proxy):
    await serve(proxy)
    proxy.config, _ = proxy.config.change(cluster("lost", 1), ())
    with pytest.raises(ConnectionError):
        await proxy.apply(cluster("next", 1))
    await proxy.connect()
    assert await proxy.apply(cluster("more", 1)) == {}


async def test_half_a_frame_waits_for_its_rest(proxy):
    await serve(proxy)
    proxy.config, delta = proxy.config.change(cluster("one", 1), ())
    frame = encode_frame(delta)
    for i in range(len(frame)):
        proxy._channel_out.write(frame[i : i + 1])
        await proxy._channel_out.drain()
    assert (await proxy.ack()).version == proxy.config.version


async def test_listen_and_unlisten_in_one_breath(proxy):
    sock = socket.create_server(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    await proxy.apply(http_port(port))
    address = PortAddress("127.0.0.1", port)
    for _ in range(3):
        send_control(proxy.control, Listen(address), (sock.fileno(),))
        send_control(proxy.control, Unlisten(address))
    sock.close()
    other = await serve(proxy)
    assert (await fetch(other)).status == 404
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", port)


async def test_same_port_listened_twice(proxy):
    async with backend() as one:
        sock = socket.create_server(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        address = PortAddress("127.0.0.1", port)
        for _ in range(3):
            send_control(proxy.control, Listen(address), (sock.fileno(),))
        await proxy.apply(http_port(port) | cluster("one", one.port) | route("r", rule(to("one"))))
        for _ in range(3):
            send_control(proxy.control, Listen(address), (sock.fileno(),))
            assert (await fetch(port)).status == 200
        sock.close()
        proxy.unlisten(port)
        other = await serve(proxy)
        assert (await fetch(other)).status == 200
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_the_queue_of_a_listening_socket_stays_as_the_supervisor_made_it(proxy):
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as sock:
        port = sock.getsockname()[1]
        send_control(proxy.control, Listen(PortAddress("127.0.0.1", port)), (sock.fileno(),))
        await proxy.apply(http_port(port))
        assert (await fetch(port)).status == 404
        # tcp_info's tcpi_sacked is a listening socket's backlog.
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        assert struct.unpack_from("I", info, 28)[0] >= 1024


def https(port: int, **rest) -> dict:
    section = PortSection(
        address="127.0.0.1",
        port=port,
        protocol="HTTPS",
        gateway="default/gw",
        listeners=(Listener("Gateway/default/gw/http", None, (CERTIFICATE,)),),
        **rest,
    )
    return {port_key("127.0.0.1", port): section}


def certificate(authority: Authority) -> dict:
    return {CERTIFICATE: CertificateSection(*authority.issue(dns=["a.x"]))}


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.certificate_pem)


async def over_tls(port: int, context: ssl.SSLContext) -> int:
    async with connection(port, ssl=context, server_hostname="a.x") as (reader, writer):
        writer.write(get("/", "a.x").encode())
        return (await read_message(reader)).status


async def test_sections_may_come_in_any_order(proxy):
    authority = Authority.create("test")
    async with backend() as one:
        port = proxy.listen()
        parts = [
            https(port),
            route("r", rule(to("one"))),
            cluster("one", one.port),
            certificate(authority),
        ]
        for part in parts:
            assert await proxy.apply(part) == {}
        assert await over_tls(port, trusting(authority)) == 200
        for part in reversed(parts):
            assert await proxy.apply({}, tuple(part)) == {}
        for part in reversed(parts):
            assert await proxy.apply(part) == {}
        assert await over_tls(port, trusting(authority)) == 200


async def test_port_changes_protocol_and_back(proxy):
    authority = Authority.create("test")
    async with backend() as one:
        port = await serve(
            proxy, cluster("one", one.port), route("r", rule(to("one"))), certificate(authority)
        )
        for _ in range(3):
            async with connection(port) as (reader, writer):
                writer.write(get().encode())
                assert (await read_message(reader)).status == 200
                await proxy.apply(https(port))
                assert await reader.read() == b""  # let in as plain text, which is over
            assert await over_tls(port, trusting(authority)) == 200
            await proxy.apply(http_port(port))
            assert (await fetch(port)).status == 200


async def test_no_handshake_ends_under_rules_that_are_gone(proxy):
    """A client that began its handshake before clients had to show certificates gets no further."""
    authority = Authority.create("test")
    async with backend() as one:
        port = proxy.listen()
        await proxy.apply(
            https(port)
            | cluster("one", one.port)
            | route("r", rule(to("one")))
            | certificate(authority)
        )
        context = trusting(authority)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(incoming, outgoing, server_hostname="a.x")
        async with connection(port) as (reader, writer):
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            writer.write(outgoing.read())
            while True:
                incoming.write(await reader.read(65536))
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    pass
            # The server has not seen our last flight yet.
            validation = ClientValidation(authority.certificate_pem)
            await proxy.apply(https(port, client_validation=validation))
            client.write(get("/", "a.x").encode())
            writer.write(outgoing.read())
            try:
                answer = await reader.read()
            except ConnectionError:
                answer = b""
            incoming.write(answer)
            try:
                said = client.read()
            except ssl.SSLError:
                said = b""
            assert said == b""
    assert not one.requests


async def test_slow_handshakes_are_cut_off(proxy):
    authority = Authority.create("test")
    port = proxy.listen()
    await proxy.apply(
        https(port) | certificate(authority) | {SETTINGS_KEY: Settings(head_timeout_s=0.3)}
    )
    async with connection(port) as (reader, writer), asyncio.timeout(10):
        writer.write(b"\x16\x03\x01")
        assert await reader.read() == b""


# --- descriptors and the access log -------------------------------------------------------------


def descriptors(proxy: WorkerProcess) -> list[str]:
    """The soft and the hard limit."""
    with open(f"/proc/{proxy.process.pid}/limits") as file:
        return next(line.split()[3:5] for line in file if line.startswith("Max open files"))


async def test_limit_of_descriptors_is_raised(proxy):
    await serve(proxy)
    soft, hard = descriptors(proxy)
    assert soft == hard


async def test_without_descriptors_it_serves_who_is_in_and_recovers():
    async with worker(prefix=("prlimit", "--nofile=60:60")) as proxy, backend() as one:
        port = await serve(proxy, cluster("one", one.port), route("r", rule(to("one"))))
        async with connection(port) as (reader, writer):
            writer.write(get().encode())
            assert (await read_message(reader)).status == 200
            crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(100)]
            writer.write(get().encode())
            assert (await read_message(reader)).status == 200
            for _, other in crowd:
                other.close()
        async with asyncio.timeout(10):
            while True:
                try:
                    assert (await fetch(port)).status == 200
                    break
                except (ConnectionError, AssertionError, asyncio.IncompleteReadError):
                    pass
        assert len(proxy.error_log().splitlines()) < 10


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


# --- what clients send --------------------------------------------------------------------------


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


# --- random endings, random bytes ---------------------------------------------------------------


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


async def test_no_handshake_but_bytes_at_a_tls_port(proxy):
    chance = random.Random(5)
    authority = Authority.create("test")
    port = proxy.listen()
    await proxy.apply(
        https(port) | certificate(authority) | {SETTINGS_KEY: Settings(head_timeout_s=0.3)}
    )

    async def attack(data: bytes) -> None:
        with suppress(OSError):
            async with connection(port) as (reader, writer):
                writer.write(data)
                await reader.read()

    await asyncio.gather(
        *(attack(hostile(chance)) for _ in range(50)),
        *(attack(b"\x16\x03\x01\0\x10" + chance.randbytes(40)) for _ in range(50)),
    )
    assert await over_tls(port, trusting(authority)) == 404
    assert proxy.error_log() == ""


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


SMUGGLING = Path(__file__).parent.parent.parent / "shared/http/smuggling-requests.json"


@pytest.mark.skipif(not SMUGGLING.exists(), reason="../shared is not there")
async def test_published_smuggling_requests(proxy):
    cases = [base64.b64decode(item) for item in json.loads(SMUGGLING.read_text())]
    assert cases
    async with backend(lambda request: ok(b"judged")) as one:
        port = await serve(
            proxy,
            cluster("one", one.port),
            route("r", rule(to("one"))),
            {SETTINGS_KEY: Settings(head_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=0.2)},
        )

        async def send(data: bytes) -> int:
            """How many requests were answered by the backend."""
            received = b""
            with suppress(OSError):
                async with connection(port) as (reader, writer):
                    writer.write(data)
                    received = await reader.read()
            return received.count(b"judged")

        answered = 0
        for start in range(0, len(cases), 50):
            answered += sum(
                await asyncio.gather(*(send(case) for case in cases[start : start + 50]))
            )
        # Nothing has reached the backend beside what was judged and answered.
        assert len(one.requests) <= answered + sum(b"HEAD" in case for case in cases)
        for request in one.requests:
            names = [name.lower() for name, _ in request.headers]
            assert names.count("host") == 1
            assert names.count("content-length") + names.count("transfer-encoding") <= 1


def hostile(chance: random.Random) -> bytes:
    """Requests, pieces of them, and what must not be in them, thrown together."""
    pieces = (
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"POST /x HTTP/1.1\r\n", b"Host: a\r\n", b"Host: b",
        b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n", b"\r\n\r\n", b"\n",
        b"5\r\nhello\r\n", b"0\r\n\r\n", b"hello", b"Connection: close, host\r\n", b"\x00", b" ",
        b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\nConnection: upgrade\r\n", b"TE: x\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\0\4\0\0\0\0\0",
        b"\0\0\4\1\5\0\0\0\1\x82\x86\x84\x41",
        b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 300 + b"\r\n", b"\xff\xfe", b"Cookie: a=b\r\n",
    )  # fmt: skip
    data = bytearray(b"".join(chance.choice(pieces) for _ in range(chance.randrange(1, 12))))
    for _ in range(chance.choice((0, 0, 1, 3))):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("alpn", [None, "http/1.1", "h2"])
async def test_hostile_bytes_reach_nobody(proxy, alpn):
    """Whatever comes, backends see whole requests with one Host and one framing."""
    chance = random.Random(11)
    authority = Authority.create("test")

    async with backend(lambda request: ok(b"judged")) as one:
        await serve(
            proxy,
            cluster("one", one.port),
            route("r", rule(to("one"))),
            certificate(authority),
            {SETTINGS_KEY: Settings(head_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=0.2,
                                    access_log="off")},
        )  # fmt: skip
        port = proxy.listen()
        await proxy.apply(http_port(port) if alpn is None else https(port))
        context = None
        if alpn is not None:
            context = trusting(authority)
            context.set_alpn_protocols([alpn])
        name = {"server_hostname": "a.x"} if alpn is not None else {}

        async def attack(data: bytes) -> None:
            with suppress(OSError):
                async with connection(port, ssl=context, **name) as (reader, writer):
                    writer.write(data)
                    await reader.read()

        frames = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if alpn == "h2" else b""
        for _ in range(15 if alpn is None else 5):
            await asyncio.gather(*(attack(frames + hostile(chance)) for _ in range(20)))
        for request in one.requests:
            names = [name.lower() for name, _ in request.headers]
            assert names.count("host") == 1
            assert names.count("content-length") + names.count("transfer-encoding") <= 1
            assert re.fullmatch(r"[!-~]+ [!-~]+ HTTP/1\.1", request.start)
    assert proxy.metrics().get('weft_http_local_replies_total{reason="internal"}') is None
    assert proxy.process.returncode is None


async def test_unfinished_handshakes_count_as_connections(proxy):
    authority = Authority.create("test")
    port = proxy.listen()
    await proxy.apply(
        {SETTINGS_KEY: Settings(max_connections_per_client=2, head_timeout_s=2)}
        | certificate(authority)
        | https(port)
    )
    async with connection(port) as (first, _), connection(port):
        async with connection(port) as (reader, writer):
            writer.write(b"\x16")
            with suppress(ConnectionError):
                assert await reader.read() == b""  # at once: the others still hold their places
        assert not first.at_eof()
        refused = 'weft_downstream_refused_total{reason="max_connections_per_client"}'
        await proxy.metric(refused, lambda value: value == 1)
        # Nobody waits for ever for a client who does not go on.
        assert await first.read() == b""
    await proxy.metric("weft_downstream_connections", lambda value: value == 0)
