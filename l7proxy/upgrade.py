"""A connection that has become a tunnel (101): bytes both ways, until both sides have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from l7proxy.guard import DENIED, Watch
from l7proxy.lease import Lease
from l7proxy.record import Record
from l7proxy.request_body import ClientGone, RequestBody
from l7proxy.streams import ServerStream, StreamReset


async def tunnel(
    stream: ServerStream,
    lease: Lease,
    body: RequestBody,
    record: Record,
    watch: Callable[[Callable[[], None]], Watch],
    idle_timeout_s: float,
) -> None:
    """The client has its 101. `watch` cuts it off when it would not be let pass any more; the
    second side to end has `idle_timeout_s` for it."""
    upstream = lease.stream

    async def up() -> None:
        try:
            while chunk := await body.tunnelled():
                await upstream.write(chunk)
            await upstream.finish([])
        except (StreamReset, ClientGone) as error:
            upstream.abort(str(error))  # the other direction learns of it, and tells

    sending = body.pump(up(), name="tunnel")
    watching = watch(lambda: upstream.abort(DENIED))
    try:
        while chunk := await upstream.read():
            await to_client(stream.write(chunk))
            record.bytes_out += len(chunk)
        await to_client(stream.finish([]))
        async with asyncio.timeout(idle_timeout_s):
            await sending
    except (StreamReset, TimeoutError) as error:
        if watching.refused:
            record.broke_off(watching.refused, DENIED, "DROPPED")
        else:
            record.broke_off("tunnel_broken", str(error) or "one side never ended")
        stream.abort("the tunnel broke")
    finally:
        watching.end()


async def to_client(sending: Awaitable[None]) -> None:
    """Await something sent to the client: its end there is the end of the exchange."""
    try:
        await sending
    except StreamReset as error:
        raise ClientGone(str(error)) from error
