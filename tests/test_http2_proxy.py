"""HTTP/2 through a whole worker: prior knowledge and ALPN, to HTTP/1.1 and to h2c backends."""

from __future__ import annotations

import asyncio
import shutil
import ssl

import h2.events
import pytest
from support.proxy import backend, cluster, http_port, ok, route, rule, to, worker

from certs.selfsigned import Authority
from l7proxy.message import Framing, ResponseHead
from l7proxy.streams import ConnectionInfo, ServerStream
from mesh.model.nodeconfig import CertificateSection, Listener, PortSection
from mesh.model.section import certificate_key, port_key
from tests.http2_peer import GET, POST, RawPeer, ServerUnderTest

CERTIFICATE = certificate_key("default", "shop")
BODY = bytes(range(256)) * 2000


async def talk(stream: ServerStream, info: ConnectionInfo) -> None:
    """An h2c backend: a 103, then the body as it comes, then trailers."""
    stream.inform(ResponseHead(103, [(b"link", b"</style.css>")]))
    await stream.respond(ResponseHead(200, [(b"x-version", stream.head.version)], Framing.STREAM))
    while data := await stream.read():
        await stream.write(data)
    await stream.finish([*stream.trailers, (b"grpc-status", b"0")])


async def connect(port: int, tls: ssl.SSLContext | None = None) -> RawPeer:
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=tls, server_hostname="shop.example" if tls else None
    )
    peer = RawPeer(reader, writer, client=True)
    peer.start()
    return peer


async def test_to_an_h2c_backend() -> None:
    async with ServerUnderTest(talk) as behind, worker() as process:
        port = process.listen()
        put = http_port(port) | route("r", rule(to("b")))
        put |= cluster("b", behind.port, protocol="h2c")
        assert await process.apply(put) == {}
        peer = await connect(port)
        streams = [peer.request([*POST, (b"te", b"trailers")], end=False) for _ in range(4)]
        await peer.event(h2.events.WindowUpdated)
        for at in range(0, len(BODY), 10_000):
            for stream_id in streams:
                while peer.conn.local_flow_control_window(stream_id) < 10_000:
                    await peer.more()
                peer.conn.send_data(stream_id, BODY[at : at + 10_000])
                peer.flush()
        for stream_id in streams:
            peer.conn.send_headers(stream_id, [(b"x-sum", b"1")], end_stream=True)
            peer.flush()
            status, fields, body = await peer.response(stream_id)
            assert (status, fields[b"x-version"], body) == (200, b"2", BODY)
            interim = await peer.event(h2.events.InformationalResponseReceived, stream_id)
            assert dict(interim.headers)[b":status"] == b"103"
            trailers = await peer.event(h2.events.TrailersReceived, stream_id)
            assert dict(trailers.headers) == {b"x-sum": b"1", b"grpc-status": b"0"}
        assert len(behind.connections) == 1
        await peer.close()


async def test_by_alpn_to_an_http1_backend() -> None:
    authority = Authority.create("test")
    chain, key = authority.issue(dns=["shop.example"])
    tls = ssl.create_default_context(cadata=authority.certificate_pem)
    tls.set_alpn_protocols(["h2", "http/1.1"])
    async with worker() as process, backend(lambda request: ok(request.body)) as behind:
        port = process.listen()
        section = PortSection(
            address="127.0.0.1",
            port=port,
            protocol="HTTPS",
            gateway="default/gw",
            listeners=(Listener("Gateway/default/gw/http", None, (CERTIFICATE,)),),
        )
        put = {port_key("127.0.0.1", port): section, CERTIFICATE: CertificateSection(chain, key)}
        put |= route("r", rule(to("b"))) | cluster("b", behind.port)
        assert await process.apply(put) == {}
        peer = await connect(port, tls)
        fields = [*POST[:2], (b":authority", b"shop.example"), (b":path", b"/a?b")]
        first = peer.request([*fields, (b"content-length", b"4")], b"body")
        second = peer.request([*fields, (b"cookie", b"a=1"), (b"cookie", b"b=2")], b"streamed")
        assert (await peer.response(first))[2] == b"body"
        assert (await peer.response(second))[2] == b"streamed"
        starts = {request.start for request in behind.requests}
        assert starts == {"POST /a?b HTTP/1.1"}
        assert {request.header("cookie") for request in behind.requests} == {None, "a=1; b=2"}
        assert {request.header("host") for request in behind.requests} == {"shop.example"}
        # A drain lets what was begun finish, and tells the client twice.
        last = peer.request([*fields, (b"content-length", b"4")], b"be", end=False)
        await behind.wait_for(2)
        peer.conn.ping(b"arrived!")
        peer.flush()
        await peer.event(h2.events.PingAckReceived)
        process.drain(10.0)
        while len(peer.goaways) < 2:
            await peer.more()
        assert peer.goaways == [(2**31 - 1, 0), (last, 0)]
        peer.conn.send_data(last, b"fo", end_stream=True)
        peer.flush()
        assert (await peer.response(last))[2] == b"befo"
        await peer.goaway()
        await peer.close()
        assert await asyncio.wait_for(process.process.wait(), 10) == 0


@pytest.mark.skipif(shutil.which("h2load") is None, reason="nghttp2-client is not installed")
async def test_h2load_through_the_proxy() -> None:
    async with ServerUnderTest(talk) as behind, worker() as process:
        port = process.listen()
        put = http_port(port) | route("r", rule(to("b")))
        put |= cluster("b", behind.port, protocol="h2c")
        assert await process.apply(put) == {}
        command = ("h2load", "-n", "1000", "-c", "4", "-m", "30", f"http://127.0.0.1:{port}/")
        load = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        out, _ = await asyncio.wait_for(load.communicate(), 30)
        assert b"1000 succeeded, 0 failed, 0 errored" in out
        assert behind.refused == []


async def test_a_backend_that_refuses_streams_is_asked_again() -> None:
    """REFUSED_STREAM is proof that a request was not acted on: even a POST goes elsewhere."""
    refused = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal refused
        peer = RawPeer(reader, writer, client=False)
        peer.start()
        seen = 0
        while await peer.receive():
            for event in peer.events[seen:]:
                if isinstance(event, h2.events.RequestReceived):
                    peer.conn.reset_stream(event.stream_id, 7)
                    refused += 1
            seen = len(peer.events)
            peer.flush()
        await peer.close()

    busy = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with ServerUnderTest(talk) as behind, worker() as process:
        port = process.listen()
        put = http_port(port) | route("r", rule(to("b")))
        put |= cluster("b", busy.sockets[0].getsockname()[1], behind.port, protocol="h2c")
        assert await process.apply(put) == {}
        peer = await connect(port)
        for _ in range(4):
            status, _, body = await peer.response(peer.request(POST, b"once"))
            assert (status, body) == (200, b"once")
        assert refused
        assert (await peer.response(peer.request(GET)))[0] == 200
        await peer.close()
    busy.close()
