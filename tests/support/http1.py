"""HTTP/1.1 drivers on loopback sockets: a server for any handler, a relay, raw peers."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from l7proxy.http1_client import Http1Client
from l7proxy.http1_server import Http1Server
from l7proxy.message import Framing, ProtocolError, ResponseHead
from l7proxy.streams import ConnectionInfo, Handler, ServerStream, StreamReset
from mesh.model.nodeconfig import Settings

SETTINGS = Settings(head_timeout_s=5.0, body_timeout_s=5.0, idle_timeout_s=5.0)


@dataclass
class Listening:
    """A running `Http1Server` and what it told."""

    port: int
    refused: list[str] = field(default_factory=list)
    connections: list[Http1Server] = field(default_factory=list)
    closed: int = 0
    all_closed: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def serving(
    handler: Handler, settings: Settings = SETTINGS, *, send_buffer: int | None = None
) -> AsyncIterator[Listening]:
    listening = Listening(0)

    def on_closed() -> None:
        listening.closed += 1
        if listening.closed == len(listening.connections):
            listening.all_closed.set()

    def make() -> Http1Server:
        connection = Http1Server(
            handler,
            ConnectionInfo(("127.0.0.1", 1), ("127.0.0.1", 2)),
            settings,
            scheme=b"http",
            on_refused=listening.refused.append,
            on_closed=on_closed,
        )
        listening.connections.append(connection)
        listening.all_closed.clear()
        return connection

    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
    if send_buffer is not None:  # accepted sockets inherit it
        server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    listening.port = server.sockets[0].getsockname()[1]
    try:
        yield listening
    finally:
        server.close()
        # uvloop gives a connection just accepted its transport one round of the loop later.
        while any(connection.transport is None for connection in listening.connections):
            await asyncio.sleep(0)
        for connection in listening.connections:
            connection.abort()
        if listening.closed < len(listening.connections):
            await listening.all_closed.wait()


Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def peer_of(port: int) -> AsyncIterator[Peer]:
    """A client's raw connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def talk(port: int, data: bytes, *, half_close: bool = False) -> bytes:
    """Everything a server says to `data`, up to its closing."""
    async with peer_of(port) as (reader, writer):
        writer.write(data)
        if half_close:
            await writer.drain()
            shutdown(writer)
        return await reader.read()


def shutdown(writer: asyncio.StreamWriter) -> None:
    own = writer.get_extra_info("socket")
    with socket.socket(fileno=os.dup(own.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_WR)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close so that the other side gets a reset."""
    own = writer.get_extra_info("socket")
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def raw_backend(
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A backend that is nothing but `answer`; yields its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the proxy gave the connection up
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tuple(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def connect(
    port: int,
    changed: Callable[[Http1Client], None] = lambda connection: None,
    settings: Settings = SETTINGS,
) -> Http1Client:
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Http1Client(settings, changed), "127.0.0.1", port
    )
    return connection


async def answer(stream: ServerStream, head: ResponseHead, body: bytes = b"") -> None:
    await stream.respond(head)
    if body:
        await stream.write(body)
    await stream.finish([])


async def echo(stream: ServerStream, info: ConnectionInfo) -> None:
    """Answers with the request's target and body, and its trailers as trailers."""
    try:
        body = b""
        while chunk := await stream.read():
            body += chunk
    except StreamReset:
        return
    except ProtocolError as error:
        await answer(
            stream, ResponseHead(error.status, [], len(error.reason)), error.reason.encode()
        )
        return
    text = stream.head.method + b" " + stream.head.target + b" " + body
    await stream.respond(ResponseHead(200, [], Framing.STREAM if stream.trailers else len(text)))
    await stream.write(text)
    await stream.finish(stream.trailers)


def relay(backend: int) -> Handler:
    """A handler that passes each request to a backend over a connection of its own."""

    async def handle(stream: ServerStream, info: ConnectionInfo) -> None:
        connection = await connect(backend)
        upstream = connection.open()
        try:
            await upstream.request(stream.head)
            if stream.head.body is not Framing.NONE:
                while chunk := await stream.read():
                    await upstream.write(chunk)
                await upstream.finish(stream.trailers)
            while (head := await upstream.response()).status < 200 and head.status != 101:
                stream.inform(head)
            await stream.respond(head)
            while chunk := await upstream.read():
                await stream.write(chunk)
            await stream.finish(upstream.trailers)
        except ProtocolError as error:
            if not stream.responded:
                text = error.reason.encode()
                await answer(stream, ResponseHead(error.status, [], len(text)), text)
        except StreamReset as error:
            stream.abort(str(error))
        finally:
            upstream.abort("the request is over")

    return handle
