"""A raw HTTP/2 peer on the h2 library, for tests: says what it is told, also what it should not."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

from l7proxy.http2_client import Http2Client
from l7proxy.http2_frames import PREFACE
from l7proxy.http2_server import Http2Server
from l7proxy.message import Framing, ProtocolError, ResponseHead
from l7proxy.streams import ConnectionInfo, Handler, ServerStream
from mesh.model.nodeconfig import Settings

GET = [
    (b":method", b"GET"),
    (b":scheme", b"http"),
    (b":authority", b"a.example"),
    (b":path", b"/"),
]
POST = [(b":method", b"POST"), *GET[1:]]
WAIT_S = 5.0


class RawPeer:
    """One end of a connection: `conn` is h2 without checks of its own, `events` what came."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, client: bool
    ) -> None:
        self.reader, self.writer = reader, writer
        self.conn = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=client,
                header_encoding=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.events: list[h2.events.Event] = []
        self.goaways: list[tuple[int, int]] = []  # last stream id, error code
        self.acknowledge = True
        self.raw = False  # something was sent that h2 does not know of
        self.eof = False
        self._buffer = b""
        self._seen = b""
        self._preface = not client  # still to come

    def start(self, settings: dict[int, int] | None = None) -> None:
        if settings:
            client = self.conn.config.client_side
            self.conn.local_settings = h2.settings.Settings(client, settings)
        self.conn.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.writer.write(self.conn.data_to_send())

    def send_raw(self, data: bytes) -> None:
        self.flush()
        self.raw = True
        self.writer.write(data)

    def request(
        self,
        fields: Iterable[tuple[bytes, bytes]] = GET,
        body: bytes | None = None,
        *,
        end: bool = True,
    ) -> int:
        stream_id = self.conn.get_next_available_stream_id()
        self.conn.send_headers(stream_id, list(fields), end_stream=end and body is None)
        if body is not None:
            self.conn.send_data(stream_id, body, end_stream=end)
        self.flush()
        return stream_id

    async def receive(self) -> bool:
        """One read; False at the end of the connection."""
        try:
            data = await asyncio.wait_for(self.reader.read(65536), WAIT_S)
        except ConnectionError:
            data = b""
        if not data:
            self.eof = True
            return False
        self._buffer += data
        self._seen = (self._seen + data)[-4096:]
        if self._preface and len(self._buffer) >= len(PREFACE):
            self.conn.receive_data(self._buffer[: len(PREFACE)])
            self._buffer = self._buffer[len(PREFACE) :]
            self._preface = False
        while not self._preface and (end := 9 + int.from_bytes(self._buffer[:3], "big")) <= len(
            self._buffer
        ):
            frame, self._buffer = self._buffer[:end], self._buffer[end:]
            if frame[3] == 7:  # GOAWAY, after which h2 would take no more
                numbers = frame[9:13], frame[13:17]
                self.goaways.append(tuple(int.from_bytes(n, "big") for n in numbers))
                continue
            self._take(frame)
        try:
            self.flush()
        except ConnectionError:
            self.eof = True
            return False
        return True

    def _take(self, frame: bytes) -> None:
        try:
            events = self.conn.receive_data(frame)
        except h2.exceptions.ProtocolError:
            if not self.raw:
                raise
            self.conn.clear_outbound_data_buffer()
            return
        self.events += events
        for event in events:
            if isinstance(event, h2.events.DataReceived) and self.acknowledge:
                size = event.flow_controlled_length
                self.conn.acknowledge_received_data(size, event.stream_id)

    async def until(self, done: Callable[[h2.events.Event], bool]) -> h2.events.Event:
        """The first event so far, or to come, that is `done`."""
        seen = 0
        while True:
            while seen < len(self.events):
                event = self.events[seen]
                seen += 1
                if done(event):
                    return event
            assert await self.receive(), f"connection ended; came: {self.events}"

    async def event(
        self, kind: type[h2.events.Event], stream_id: int | None = None
    ) -> h2.events.Event:
        return await self.until(
            lambda e: (
                isinstance(e, kind)
                and (stream_id is None or getattr(e, "stream_id", None) == stream_id)
            )
        )

    async def response(self, stream_id: int) -> tuple[int, dict[bytes, bytes], bytes]:
        """Status, fields and body of a whole response."""
        await self.event(h2.events.StreamEnded, stream_id)
        head = await self.event(h2.events.ResponseReceived, stream_id)
        fields = dict(head.headers)
        return int(fields[b":status"]), fields, self.body(stream_id)

    def body(self, stream_id: int) -> bytes:
        return b"".join(
            e.data
            for e in self.events
            if isinstance(e, h2.events.DataReceived) and e.stream_id == stream_id
        )

    async def more(self) -> None:
        assert await self.receive(), f"connection ended with {self.goaways}"

    _answer = b"\x00\x00\x08\x06\x01\x00\x00\x00\x00settled?"

    async def settled(self) -> bool:
        """Whether the connection still stands once all that was sent is dealt with; what can tell
        is the answer to a PING, or its end."""
        self.writer.write(b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + b"settled?")
        while self._answer not in self._seen:
            if not await self.receive():
                return False
        return True

    async def goaway(self) -> int:
        """Waits for the end of the connection; the error code it ended with."""
        while not self.eof:
            await self.receive()
        return self.goaways[-1][1]

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            pass


async def echo(stream: ServerStream, info: ConnectionInfo) -> None:
    """Answers with the request's body and trailers."""
    body = bytearray()
    while data := await stream.read():
        body += data
    await stream.respond(
        ResponseHead(200, [(b"x-path", stream.head.path)], len(body) if body else Framing.STREAM)
    )
    await stream.write(bytes(body))
    await stream.finish(stream.trailers)


async def answer_errors(stream: ServerStream, info: ConnectionInfo) -> None:
    """As the exchange does: what is wrong with the body is answered with its status."""
    try:
        await echo(stream, info)
    except ProtocolError as error:
        await stream.respond(ResponseHead(error.status, [(b"x-reason", error.reason.encode())]))


class ServerUnderTest:
    """An Http2Server behind a real socket; `refused` and `closed` are what it reported."""

    def __init__(self, handler: Handler = echo, settings: Settings | None = None) -> None:
        self.handler = handler
        self.settings = settings or Settings()
        self.refused: list[str] = []
        self.closed = 0
        self.connections: list[Http2Server] = []
        self._peers: list[RawPeer] = []
        self._left = asyncio.Event()

    def _make(self) -> Http2Server:
        connection = Http2Server(
            self.handler,
            ConnectionInfo(("127.0.0.1", 1), ("127.0.0.1", 2)),
            self.settings,
            scheme=b"http",
            on_refused=self.refused.append,
            on_closed=self._count_closed,
        )
        self.connections.append(connection)
        return connection

    def _count_closed(self) -> None:
        self.closed += 1
        self._left.set()

    async def __aenter__(self) -> ServerUnderTest:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._make, "127.0.0.1", 0)
        self.listener = self._server.sockets[0]
        self.port: int = self.listener.getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        for peer in self._peers:
            await peer.close()
        self._server.close()
        async with asyncio.timeout(WAIT_S):  # every connection must come to its end
            while self.closed < len(self.connections):
                self._left.clear()
                await self._left.wait()

    async def raw(self) -> RawPeer:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        peer = RawPeer(reader, writer, client=True)
        self._peers.append(peer)
        return peer

    async def narrow(self) -> RawPeer:
        """A client whose connection holds few bytes between the two ends."""
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1)
        peer = RawPeer(reader, writer, client=True)
        self._peers.append(peer)
        return peer

    async def peer(self, settings: dict[int, int] | None = None) -> RawPeer:
        peer = await self.raw()
        peer.start(settings)
        return peer

    async def client(self, settings: Settings | None = None) -> Http2Client:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(
            lambda: Http2Client(settings or Settings(), lambda _: None, scheme=b"http"),
            "127.0.0.1",
            self.port,
        )
        return client
