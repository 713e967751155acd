"""A worker's configuration: channels, deltas, ports, TLS ports, descriptors, refusals."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from contextlib import suppress

import pytest
from support.proxy import (
    WorkerProcess,
    backend,
    certificate,
    client_context,
    cluster,
    connection,
    fetch,
    get,
    http_port,
    https_port,
    over_tls,
    proxy_fixture,
    read_message,
    route,
    rule,
    serve,
    to,
    worker,
)

from certs.selfsigned import Authority
from mesh.model.channel import Listen, PortAddress, Unlisten, encode_frame, send_control
from mesh.model.nodeconfig import ClientValidation, Settings
from mesh.model.routeconfig import PathMatch, RouteMatch
from mesh.model.section import SETTINGS_KEY, route_key

proxy = proxy_fixture


# --- channels and deltas ------------------------------------------------------------------------


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


# --- ports --------------------------------------------------------------------------------------


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


# --- TLS ports ----------------------------------------------------------------------------------


async def test_sections_may_come_in_any_order(proxy):
    authority = Authority.create("test")
    async with backend() as one:
        port = proxy.listen()
        parts = [
            https_port(port),
            route("r", rule(to("one"))),
            cluster("one", one.port),
            certificate(authority, "a.x"),
        ]
        for part in parts:
            assert await proxy.apply(part) == {}
        assert await over_tls(port, client_context(authority)) == 200
        for part in reversed(parts):
            assert await proxy.apply({}, tuple(part)) == {}
        for part in reversed(parts):
            assert await proxy.apply(part) == {}
        assert await over_tls(port, client_context(authority)) == 200


async def test_port_changes_protocol_and_back(proxy):
    authority = Authority.create("test")
    async with backend() as one:
        port = await serve(
            proxy,
            cluster("one", one.port),
            route("r", rule(to("one"))),
            certificate(authority, "a.x"),
        )
        for _ in range(3):
            async with connection(port) as (reader, writer):
                writer.write(get().encode())
                assert (await read_message(reader)).status == 200
                await proxy.apply(https_port(port))
                assert await reader.read() == b""  # let in as plain text, which is over
            assert await over_tls(port, client_context(authority)) == 200
            await proxy.apply(http_port(port))
            assert (await fetch(port)).status == 200


async def test_no_handshake_ends_under_rules_that_are_gone(proxy):
    """A client that began its handshake before clients had to show certificates gets no further."""
    authority = Authority.create("test")
    async with backend() as one:
        port = proxy.listen()
        await proxy.apply(
            https_port(port)
            | cluster("one", one.port)
            | route("r", rule(to("one")))
            | certificate(authority, "a.x")
        )
        context = client_context(authority)
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
            await proxy.apply(https_port(port, client_validation=validation))
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
        https_port(port)
        | certificate(authority, "a.x")
        | {SETTINGS_KEY: Settings(head_timeout_s=0.3)}
    )
    async with connection(port) as (reader, writer), asyncio.timeout(10):
        writer.write(b"\x16\x03\x01")
        assert await reader.read() == b""


async def test_unfinished_handshakes_count_as_connections(proxy):
    authority = Authority.create("test")
    port = proxy.listen()
    await proxy.apply(
        {SETTINGS_KEY: Settings(max_connections_per_client=2, head_timeout_s=2)}
        | certificate(authority, "a.x")
        | https_port(port)
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


# --- descriptors --------------------------------------------------------------------------------


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
