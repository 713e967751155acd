"""Sending by redirect: no more than a bound to who does not read, and whom to send to at all.

What the kernel would tell of a receiver's queue is told by the test here; in `test_mesh_kernel` the
kernel tells.
"""

from __future__ import annotations

import asyncio

import pytest
from http2_peer import RawPeer
from loops import advance, on_both_loops, on_virtual_loop
from support.http1 import raw_backend
from support.mesh import MeshProxy, connected, mesh_proxy, service
from support.proxy import backend, cluster, get, ok, read_message

from bpf.structs import Target
from l7proxy import metrics
from l7proxy.redirect import LONG, MESSAGES, MOST, RedirectQueue
from mesh.model.nodeconfig import Settings
from mesh.model.section import SETTINGS_KEY

COOKIE = 7
BIG = 4 * 1024 * 1024
# One write of a body: what is buffered of it, and one read of the loop.
WRITE = 64 * 1024 + 256 * 1024


async def asked(mesh: MeshProxy, times: int) -> None:
    """Until the queue was asked for so often."""
    while mesh.origins.asked_queue < times:
        await asyncio.sleep(0.001)


class Client:
    """Counts what it got."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.received = 0
        self.task = asyncio.ensure_future(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(1 << 20):
            self.received += len(data)


# --- the queue --------------------------------------------------------------------------------


@on_virtual_loop
async def test_the_receiver_is_asked_only_every_so_many_bytes():
    questions, unread = 0, 0

    def ask_it() -> int:
        nonlocal questions
        questions += 1
        return unread

    changes: list[bool] = []
    queue = RedirectQueue(ask_it, lambda: changes.append(queue.full))
    for _ in range(LONG // 4096):
        queue.sent(4096)
    assert questions == 0
    queue.sent(1)
    assert (questions, queue.full) == (1, False)
    queue.sent(MOST)  # it held none
    assert questions == 1
    unread = LONG
    queue.sent(1)
    assert (questions, queue.full) == (2, False)
    queue.sent(MOST - LONG)
    assert questions == 2
    unread = LONG + 1
    queue.sent(1)
    assert (questions, queue.full, changes) == (3, True, [True])
    # While it is full, the clock asks, ever more rarely.
    waits = []
    for step in (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.02, 0.02):
        before = questions
        advance(step + 1e-5)
        while questions == before:
            await asyncio.sleep(0)
        waits.append(questions - before)
    assert waits == [1] * 8
    queue.sent(5)
    assert queue.overdrawn == MOST - LONG + 6
    unread = LONG
    advance(0.021)
    while queue.full:
        await asyncio.sleep(0)
    assert (changes, queue.overdrawn) == ([True, False], 0)


@on_virtual_loop
async def test_a_receiver_of_many_small_messages_is_waited_for_until_it_has_read_all():
    unread = 6
    changes: list[bool] = []
    queue = RedirectQueue(lambda: unread, lambda: changes.append(queue.full))
    sent = 0
    while not queue.full:
        queue.sent(1)
        sent += 1
        assert sent < 2 * MESSAGES, "it holds messages without end"
    assert sent > MESSAGES
    advance(1)
    for _ in range(5):
        await asyncio.sleep(0)
    assert queue.full
    unread = 0
    advance(1)
    while queue.full:
        await asyncio.sleep(0)
    assert changes == [True, False]


# --- toward clients -------------------------------------------------------------------------------


@on_both_loops
async def test_a_client_that_does_not_read_is_sent_no_more_than_the_bound():
    async with mesh_proxy() as mesh, backend(lambda r: ok(bytes(BIG))) as web:
        mesh.origins.steer(enrolled=COOKIE)
        mesh.origins.unread[COOKIE] = LONG + 1
        port = mesh.serve(cluster("web", web.port), service())
        async with connected(port) as (reader, writer):
            client = Client(reader)
            writer.write(get("/", "web", "Connection: close").encode())
            await asked(mesh, 6)
            assert LONG < client.received <= LONG + WRITE
            mesh.origins.unread[COOKIE] = LONG  # it has read
            await client.task
            assert client.received > BIG


@on_both_loops
async def test_clients_that_are_not_enrolled_are_never_asked_for():
    async with mesh_proxy() as mesh, backend(lambda r: ok(bytes(BIG))) as web:
        port = mesh.serve(cluster("web", web.port), service())
        async with connected(port) as (reader, writer):
            writer.write(get("/", "web").encode())
            message = await read_message(reader)
            assert message is not None
            assert len(message.body) == BIG
        assert mesh.origins.asked_queue == 0


@on_virtual_loop
async def test_a_client_whose_queue_does_not_move_is_cut_off():
    async with mesh_proxy() as mesh, backend(lambda r: ok(bytes(BIG))) as web:
        mesh.origins.steer(enrolled=COOKIE)
        mesh.origins.unread[COOKIE] = 3 * LONG
        settings = Settings(body_timeout_s=1000)
        port = mesh.serve(cluster("web", web.port), service(), {SETTINGS_KEY: settings})
        before = metrics.REFUSED.labels("write_timeout")._value.get()
        async with connected(port) as (reader, writer):
            client = Client(reader)
            writer.write(get("/", "web").encode())
            await asked(mesh, 3)
            for size in (3 * LONG - 1, 2 * LONG):  # it reads, however slowly
                mesh.origins.unread[COOKIE] = size
                advance(1001)
                await asked(mesh, mesh.origins.asked_queue + 3)
                assert not client.task.done()
            advance(1001)
            await client.task
            assert metrics.REFUSED.labels("write_timeout")._value.get() == before + 1
            assert client.received < BIG


@on_both_loops
async def test_a_close_does_not_wait_for_the_client_to_read():
    async with mesh_proxy() as mesh, backend(lambda r: ok(bytes(LONG - 1000))) as web:
        mesh.origins.steer(enrolled=COOKIE)
        mesh.origins.unread[COOKIE] = 10 * LONG
        port = mesh.serve(cluster("web", web.port), service())
        async with connected(port) as (reader, writer):
            writer.write(get("/", "web", "Connection: close").encode())
            message = await read_message(reader)
            assert message is not None
            assert len(message.body) == LONG - 1000
            assert await reader.read() == b""


@on_both_loops
async def test_many_small_responses_count_together():
    async with mesh_proxy() as mesh, backend(lambda r: ok(bytes(20_000))) as web:
        mesh.origins.steer(enrolled=COOKIE)
        mesh.origins.unread[COOKIE] = LONG + 1
        port = mesh.serve(cluster("web", web.port), service())
        async with connected(port) as (reader, writer):
            client = Client(reader)
            writer.write(get("/", "web").encode() * 40)
            await asked(mesh, 6)
            assert LONG < client.received <= LONG + 21_000
            mesh.origins.unread[COOKIE] = 0
            while client.received < 40 * 20_000:
                await asyncio.sleep(0.001)
            client.task.cancel()


@on_both_loops
async def test_http2_clients_are_held_back_whatever_their_windows():
    async with mesh_proxy() as mesh, backend(lambda r: ok(bytes(BIG))) as web:
        mesh.origins.steer(enrolled=COOKIE)
        mesh.origins.unread[COOKIE] = LONG + 1
        port = mesh.serve(cluster("web", web.port), service())
        async with connected(port) as (reader, writer):
            peer = RawPeer(reader, writer, client=True)
            peer.start({4: 2**31 - 1})
            peer.conn.increment_flow_control_window(2**31 - 1 - 65535)
            peer.conn.send_headers(
                1,
                [(":method", "GET"), (":scheme", "http"), (":authority", "web"), (":path", "/")],
                end_stream=True,
            )
            writer.write(peer.conn.data_to_send())
            client = Client(reader)
            await asked(mesh, 6)
            assert LONG < client.received <= LONG + WRITE
            mesh.origins.unread[COOKIE] = 0
            while client.received < BIG:
                await asyncio.sleep(0.001)
            client.task.cancel()


# --- toward backends --------------------------------------------------------------------------


@on_both_loops
async def test_request_bodies_wait_for_a_backend_that_does_not_read():
    received = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        await reader.readuntil(b"\r\n\r\n")
        while received < BIG:
            received += len(await reader.read(1 << 20))
        writer.write(ok())
        await reader.read()

    async with mesh_proxy() as mesh, raw_backend(answer) as port_of_web:
        mesh.origins.pairs[port_of_web] = [None, None, 99]
        mesh.origins.unread[99] = LONG + 1
        port = mesh.serve(cluster("web", port_of_web), service())
        async with connected(port) as (reader, writer):
            writer.write(b"PUT / HTTP/1.1\r\nhost: web\r\ncontent-length: %d\r\n\r\n" % BIG)
            writer.write(bytes(BIG))
            await asked(mesh, 6)
            assert LONG < received <= LONG + WRITE
            mesh.origins.unread[99] = 0
            message = await read_message(reader)
            assert message is not None
            assert message.status == 200


@pytest.mark.parametrize("answers", [[0], [None, None, 99]])
async def test_a_backend_gets_one_connection_as_soon_as_it_is_known(answers):
    async with mesh_proxy() as mesh, backend() as web:
        mesh.origins.pairs[web.port] = list(answers)
        port = mesh.serve(cluster("web", web.port), service())
        async with connected(port) as (reader, writer):
            writer.write(get().encode())
            message = await read_message(reader)
            assert message is not None
            assert message.status == 200
        assert web.connections == 1
        assert mesh.origins.plain == []


async def test_a_backend_that_does_not_show_itself_is_remembered_as_plain():
    async with mesh_proxy() as mesh, backend() as web:
        mesh.origins.pairs[web.port] = [None]
        port = mesh.serve(cluster("web", web.port), service())
        async with connected(port) as (reader, writer):
            writer.write(get().encode())
            message = await read_message(reader)
            assert message is not None
            assert message.status == 200
        assert mesh.origins.plain == [Target.of("127.0.0.1", web.port, "TCP")]
        assert len(web.requests) == 1


async def test_a_backend_that_never_shows_itself_gets_nothing():
    async with mesh_proxy() as mesh, backend() as web:
        mesh.origins.pairs[web.port] = [None]
        mesh.origins.marks_hold = False
        port = mesh.serve(cluster("web", web.port), service())
        async with connected(port) as (reader, writer):
            writer.write(get().encode())
            message = await read_message(reader)
            assert message is not None
            assert message.status == 503
        assert web.requests == []
