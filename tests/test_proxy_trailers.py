"""Trailers through a worker: of gRPC over HTTP/2, and over HTTP/1.1."""

from __future__ import annotations

import asyncio

import h2.events
from http2_peer import RawPeer
from support.http1 import raw_backend
from support.proxy import (
    cluster,
    connection,
    proxy_fixture,
    route,
    rule,
    serve,
    to,
)

proxy = proxy_fixture


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
