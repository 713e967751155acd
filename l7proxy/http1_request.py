"""One request on an HTTP/1.1 connection of a client, and the answer to it (`ServerStream`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from l7proxy.message import Data, EndOfMessage, Headers, ProtocolError, RequestHead, ResponseHead
from l7proxy.pairing import Pairing
from l7proxy.streams import StreamReset

if TYPE_CHECKING:
    from l7proxy.http1_server import Http1Server


class Http1Request:
    """`head` was read; the body has not been."""

    def __init__(self, connection: Http1Server, head: RequestHead) -> None:
        self.head = head
        self.trailers: Headers = []
        self.responded = False
        self.finished = False
        self.aborted = False
        self.tunnel = False
        self._connection = connection
        self._continue_due = head.expect_continue
        self._ended = False
        self._held = b""  # a response head that waits for its body's first bytes
        self._last = False  # what is held is all that is left of the response

    @property
    def open(self) -> bool:
        return not self.finished and not self.aborted

    async def read(self) -> bytes:
        connection = self._connection
        codec = connection.codec
        while not self._ended:
            if connection.failure is not None:
                raise connection.failure
            try:
                event = codec.next_event()
            except ProtocolError as error:
                connection.fail(error)
                raise
            if isinstance(event, Data):
                self._continue_due = False
                connection.hold_input(codec.buffer.left)
                return event.data
            if isinstance(event, EndOfMessage):
                self.trailers = event.trailers
                break
            if connection.eof:
                if self.tunnel:
                    break
                raise StreamReset("the client closed in mid-request")
            await self._wait()
        self._ended = True
        return b""

    async def _wait(self) -> None:
        connection = self._connection
        connection.hold_input(connection.codec.buffer.left)
        if not self.tunnel:
            connection.timer.set(connection.settings.body_timeout_s)
        try:
            await connection.more_input()
        finally:
            if self.open:  # else the timer is the connection's again
                connection.timer.clear()
        if connection.failure is not None:
            connection.fail(connection.failure)

    def inform(self, head: ResponseHead) -> None:
        connection = self._connection
        if self.responded or connection.gone:
            return
        if head.status == 100:
            if not self._continue_due:
                return
            self._continue_due = False
        connection.write((connection.codec.informational(head),))

    async def respond(self, head: ResponseHead) -> None:
        codec = self._connection.codec
        if self._continue_due:
            # Whether the client now sends the body or the next request cannot be told apart.
            codec.keep_alive = False
        block = codec.response(head)
        self.responded = True
        if codec.ends_by_close:
            self._connection.reset_on_close(True)
        self.tunnel = head.status == 101 and head.upgrade is not None
        if self.tunnel:
            self._ended = False  # the request may have been read to its end; the tunnel begins
            await self._send((block,))
        elif self._connection.gone:
            raise StreamReset("the client is gone")
        else:
            # The body's first bytes are most often there already: one system call for both.
            self._held = block
            self._connection.loop.call_soon(self._send_held)

    def _send_held(self) -> None:
        if self._last:
            return
        if self._held and not self._connection.gone:
            self._connection.write((self._held,))
        self._held = b""

    async def write(self, data: bytes) -> None:
        codec = self._connection.codec
        pieces = codec.data(data)
        if codec.response_complete and self._connection.pairing is not None:
            # With the last bytes an offer goes to the kernel (`finish`, at once).
            self._held = b"".join((self._held, *pieces))
            self._last = True
            return
        await self._send(pieces)

    async def finish(self, trailers: Headers) -> None:
        connection = self._connection
        if self.tunnel:
            if connection.tls and connection.transport is not None:
                connection.transport.close()
            await connection.half_close()
        elif ((tail := connection.codec.end(trailers)) or self._held) and (
            not self._offer(connection.pairing, self._held + tail)
        ):
            self._last = False
            await self._send((tail,))
        self.finished = True

    def _offer(self, pairing: Pairing | None, last: bytes) -> bool:
        """Send the response's last bytes, and let the client's next request pass by the proxy;
        whether they were sent."""
        connection = self._connection
        if pairing is None:
            return False
        sent = pairing.offer(
            connection.received, lambda: connection.write_through(last), connection.more_requests
        )
        if sent:
            self._held = b""
        return sent

    async def _send(self, pieces: Sequence[bytes]) -> None:
        connection = self._connection
        if connection.gone:
            raise StreamReset("the client is gone")
        if self._held:
            pieces = (self._held, *pieces)
            self._held = b""
        connection.write(pieces)
        if connection.write_paused:
            await connection.room()
            if connection.lost:
                raise StreamReset("the client is gone")

    def abort(self, why: str) -> None:
        if self.open:
            self.aborted = True
            self._connection.abort()
