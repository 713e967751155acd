"""Run by a test in a process of its own: clients, a relay and backends that close at random.

`python -m tests.support.http1_storm SECONDS` ends with status 0 and prints how many connections
there were; a double free in uvloop would abort it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import random
import sys

import uvloop

from l7proxy.message import Framing, ProtocolError, ResponseHead
from l7proxy.streams import ConnectionInfo, Handler, ServerStream, StreamReset
from mesh.model.nodeconfig import Settings
from tests.support.http1 import Listening, connect, peer_of, reset, serving, shutdown

_CLIENTS = 40
_PATIENCE_S = 20.0  # what still runs so long after the storm will not end: the process does
_SETTINGS = Settings(head_timeout_s=0.5, body_timeout_s=0.5, idle_timeout_s=0.5)
_UPGRADE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
_UPLOAD = b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 200000\r\n\r\n"
_PLAIN = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


async def _backend(stream: ServerStream, info: ConnectionInfo) -> None:
    """Echoes a tunnel or a body, or answers with much; gives up where it likes."""
    chance = random.Random()
    try:
        if stream.head.upgrade is not None:
            await stream.respond(ResponseHead(101, [], upgrade=stream.head.upgrade))
        else:
            await stream.respond(ResponseHead(200, [], Framing.STREAM))
        if stream.head.method == b"GET" and stream.head.upgrade is None:
            await stream.write(b"x" * chance.randrange(1, 1_000_000))
        while chunk := await stream.read():
            await stream.write(chunk)
            if chance.random() < 0.02:
                stream.abort("by chance")
                return
        await stream.finish([])
    except (StreamReset, ProtocolError):
        stream.abort("the other side was first")


def _relay(port: int) -> Handler:
    async def handle(stream: ServerStream, info: ConnectionInfo) -> None:
        connection = await connect(port)
        upstream = connection.open()

        async def up() -> None:
            try:
                while chunk := await stream.read():
                    await upstream.write(chunk)
                await upstream.finish([])
            except Exception as error:
                upstream.abort(str(error))

        uploading: asyncio.Future[None] | None = None
        try:
            await upstream.request(stream.head)
            if stream.head.upgrade is None:
                uploading = asyncio.ensure_future(up())
            await stream.respond(await upstream.response())
            if uploading is None:  # before the 101 there was a request without a body to read
                uploading = asyncio.ensure_future(up())
            while chunk := await upstream.read():
                await stream.write(chunk)
            await stream.finish([])
        except StreamReset as error:
            stream.abort(str(error))
        finally:
            if uploading is not None:
                uploading.cancel()
            upstream.abort("over")

    return handle


async def _client(port: int, until: float) -> int:
    chance = random.Random()
    count = 0
    while asyncio.get_running_loop().time() < until:
        count += 1
        async with peer_of(port) as (reader, writer):
            try:
                request = chance.choice((_PLAIN, _UPLOAD, _UPGRADE, _UPGRADE))
                writer.write(request)
                if request is _PLAIN:
                    shutdown(writer)
                    await asyncio.wait_for(reader.read(chance.randrange(1, 1_000_000)), 0.01)
                    continue
                for _ in range(chance.randrange(8)):
                    if writer.is_closing():
                        break
                    writer.write(b"y" * chance.randrange(1, 300_000))
                    if chance.random() < 0.5:
                        await asyncio.wait_for(reader.read(chance.randrange(1, 100_000)), 0.01)
                if not writer.is_closing():
                    match chance.randrange(4):
                        case 0 | 1:
                            shutdown(writer)
                            await asyncio.wait_for(reader.read(), 0.01)
                        case 2:
                            reset(writer)
            except (OSError, TimeoutError):
                continue
    return count


async def _all_made(listening: Listening) -> None:
    """Return when every accepted connection has its transport: one without cannot be aborted,
    and would outlive the abort of all that ends `serving`."""
    while any(connection.transport is None for connection in listening.connections):
        await asyncio.sleep(0)


async def _storm(seconds: float) -> None:
    until = asyncio.get_running_loop().time() + seconds
    # Small kernel buffers, so that bytes wait in the transports when connections end.
    async with serving(_backend, _SETTINGS, send_buffer=4096) as behind:
        async with serving(_relay(behind.port), _SETTINGS, send_buffer=4096) as front:
            counts = await asyncio.gather(*(_client(front.port, until) for _ in range(_CLIENTS)))
            await _all_made(front)
        await _all_made(behind)
    print(sum(counts))


if __name__ == "__main__":
    duration = float(sys.argv[1])
    faulthandler.dump_traceback_later(duration + _PATIENCE_S, exit=True)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_storm(duration))
    faulthandler.cancel_dump_traceback_later()
