"""An HTTP/2 server with prior knowledge (RFC 9113 section 3.3) for echo pods, gRPC included."""

from __future__ import annotations

import asyncio

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions

from echo import grpc
from echo.answer import Memory, Pod, Seen, answer, log_line
from l7proxy.tasks import spawn


class H2cProtocol(asyncio.Protocol):
    """One connection. Requests are answered when they are complete."""

    def __init__(self, pod: Pod, port: int, memory: Memory, *, grpc_too: bool) -> None:
        self._pod, self._port, self._memory, self._grpc = pod, port, memory, grpc_too
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        )
        self._heads: dict[int, list[tuple[str, str]]] = {}
        self._waiting: dict[int, tuple[bytes, list[tuple[str, str]] | None]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._h2.initiate_connection()
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self._tasks.values():
            task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            events = self._h2.receive_data(data)
        except h2.exceptions.ProtocolError:
            self._flush()
            self._transport.close()
            return
        for event in events:
            if isinstance(event, h2.events.RequestReceived):
                self._heads[event.stream_id] = list(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                stream = event.stream_id
                task = spawn(self._respond(stream), name="echo")
                self._tasks[stream] = task
                task.add_done_callback(lambda _, stream=stream: self._tasks.pop(stream, None))
            elif isinstance(event, h2.events.StreamReset):
                self._waiting.pop(event.stream_id, None)
                if task := self._tasks.get(event.stream_id):
                    task.cancel()
            elif isinstance(event, h2.events.WindowUpdated):
                for waiting in list(self._waiting):
                    self._send_body(waiting)
            elif isinstance(event, h2.events.ConnectionTerminated):
                self._transport.close()
        self._flush()

    async def _respond(self, stream: int) -> None:
        fields = self._heads.pop(stream)
        pseudo = {name: value for name, value in fields if name.startswith(":")}
        headers = [(name, value) for name, value in fields if not name.startswith(":")]
        host, target = pseudo.get(":authority", ""), pseudo[":path"]
        if self._grpc and dict(headers).get("content-type", "").startswith("application/grpc"):
            self._respond_grpc(stream, target, host)
            return
        seen = Seen(pseudo[":method"], target, "HTTP/2.0", host, headers, self._port)
        got = await answer(self._pod, seen, self._memory)
        body = b"" if seen.method == "HEAD" else got.body
        self._h2.send_headers(
            stream,
            [
                (":status", str(got.status)),
                *((name.lower(), value) for name, value in got.headers),
                ("content-length", str(len(got.body))),
            ],
            end_stream=not body,
        )
        if body:
            self._waiting[stream] = (body, None)
            self._send_body(stream)
        self._flush()

    def _respond_grpc(self, stream: int, method: str, authority: str) -> None:
        self._memory.log.append((self._pod, log_line(method)))
        head = [(":status", "200"), ("content-type", "application/grpc")]
        if method not in grpc.METHODS:
            head.append(("grpc-status", str(grpc.UNIMPLEMENTED)))
            self._h2.send_headers(stream, head, end_stream=True)
        else:
            self._h2.send_headers(stream, head)
            body = grpc.response(method, authority, self._pod)
            self._waiting[stream] = (body, [("grpc-status", str(grpc.OK))])
            self._send_body(stream)
        self._flush()

    def _send_body(self, stream: int) -> None:
        """Send what the windows let through; the rest waits for WINDOW_UPDATE."""
        body, trailers = self._waiting[stream]
        while body:
            size = min(
                self._h2.local_flow_control_window(stream),
                self._h2.max_outbound_frame_size,
                len(body),
            )
            if size <= 0:
                self._waiting[stream] = (body, trailers)
                return
            chunk, body = body[:size], body[size:]
            self._h2.send_data(stream, chunk, end_stream=not body and trailers is None)
        del self._waiting[stream]
        if trailers is not None:
            self._h2.send_headers(stream, trailers, end_stream=True)

    def _flush(self) -> None:
        if data := self._h2.data_to_send():
            self._transport.write(data)
