"""TLS on top of any transport, as a transport: with half-close, and truncation told from an end.

asyncio's own TLS (and uvloop's) can do neither, and neither sends the alert that tells a peer why
it was refused. Here close_notify ends one half, the other goes on (RFC 8446 §6.1); a connection
that ends without it is a reset. Knows OpenSSL through ssl.SSLObject, and no identities.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable
from typing import Any, cast

from l7proxy.tls import MAX_UNREAD_ANSWERS, unread

# A record's plain text is at most this long (RFC 8446 §5.1), bytes.
_RECORD = 16 * 1024
# What is kept for whoever comes to read it, before reading pauses.
_EARLY = 64 * 1024


# What transports receive into, of all connections: nothing stays there.
_RECEIVED = memoryview(bytearray(256 * 1024))


class TLSStream(asyncio.Transport, asyncio.BufferedProtocol):
    """One connection. The protocol of a transport below, and the transport of a protocol above,
    which may come later: until then what arrives is kept for it, and for `read_exactly`.

    `server_hostname`: the SNI of a client; names are the caller's to verify. `on_lost` is told of
    the connection's end.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        """ValueError or ssl.SSLError: `server_hostname` cannot be one."""
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            # As bytes it is no host name to Python, whose labels would have to be short.
            server_hostname=server_hostname.encode() if server_hostname is not None else None,
            session=session,
        )
        self._below: asyncio.Transport | None = None
        self._above: asyncio.BaseProtocol | None = None
        self._early = bytearray()
        self._paused_early = False
        self._waiter: asyncio.Future[None] | None = None
        self._shaken = False
        self._ended = False  # our close_notify is sent
        self._peer_ended = False  # the peer's has come
        self._closing = False
        self.lost = False  # the connection is over
        self._failure: Exception | None = None
        self._writing_paused = False
        self._unread = 0  # bytes of answers to key updates, while writing is paused
        self.on_lost: Callable[[], None] | None = None

    # --- the beginning ----------------------------------------------------------------------------

    async def handshake(self) -> None:
        """Wait until it is done. ssl.SSLError, ConnectionError: there is no connection."""
        while not self._shaken:
            await self._wait()

    async def read_exactly(self, size: int) -> bytes:
        """The first bytes, before there is a protocol. ssl.SSLError, ConnectionError: the peer
        ended before."""
        while len(self._early) < size:
            if self._peer_ended:
                raise ConnectionResetError("the peer ended before it said what was due")
            await self._wait()
        data = bytes(self._early[:size])
        del self._early[:size]
        return data

    async def _wait(self) -> None:
        if self._failure is not None or self.lost:
            raise self._failure or ConnectionAbortedError("the connection is closed")
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Who gets the bytes from now on; what has come before is told at once."""
        first = self._above is None
        self._above = protocol
        if not first:
            return
        protocol.connection_made(self)
        early = bytes(self._early)
        self._early.clear()
        if early:
            cast(asyncio.Protocol, protocol).data_received(early)
        if self._paused_early:
            self._paused_early = False
            self.resume_reading()
        if self._peer_ended:
            self._tell_end()
        if self.lost:
            protocol.connection_lost(self._failure)

    def release(self, rest: bytes) -> None:
        """Take the protocol away: what comes is kept again until there is another, and `rest`,
        which came last, is the first of it."""
        self._above = None
        self._early += rest

    @property
    def silent(self) -> bool:
        """It is open both ways, and nothing has come that nobody has got."""
        return not (self._early or self._peer_ended or self.is_closing())

    def get_protocol(self) -> asyncio.BaseProtocol:
        assert self._above is not None
        return self._above

    # --- from below -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._below = cast(asyncio.Transport, transport)
        self._shake()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _RECEIVED

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(_RECEIVED[:nbytes])

    def data_received(self, data: bytes | memoryview) -> None:
        """Also where another of these is below."""
        if self._peer_ended:
            return  # it has nothing more to say
        self._incoming.write(data)
        if not self._shaken:
            self._shake()
        if self._shaken:
            self._decrypt()

    def _shake(self) -> None:
        try:
            self.ssl.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            self._failure = error
            self._flush()  # the alert
            self.close()
            self._wake()
            return
        self._shaken = True
        self._wake()
        # Finished and tickets go out with the first words where those come at once. For tickets
        # nobody waits.
        if not self.ssl.server_side:
            self._loop.call_soon(self._flush)

    def _decrypt(self) -> None:
        """Pass on all that has come. The order counts: nothing of a whole record stays below, which
        `half_close` relies on."""
        chunks = []
        tls, incoming = self.ssl, self._incoming
        left = self._outgoing.pending
        try:
            while incoming.pending or tls.pending():
                chunk = tls.read(_RECORD)
                if not chunk:
                    self._peer_ended = True
                    break
                chunks.append(chunk)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._peer_ended = True
        except ssl.SSLError as error:
            self._failure = error
        if self._outgoing.pending > left:  # answers to key updates, or an alert
            if self._writing_paused:
                self._unread += self._outgoing.pending - left
                if self._unread > MAX_UNREAD_ANSWERS and self._failure is None:
                    self._failure = unread()
            self._flush()
        if chunks:
            self._tell(chunks[0] if len(chunks) == 1 else b"".join(chunks))
        if self._failure is not None:
            self.abort()
            self._wake()
        elif self._peer_ended and not self._closing:
            self._tell_end()

    def _tell(self, data: bytes) -> None:
        if self._above is not None:
            cast(asyncio.Protocol, self._above).data_received(data)
            return
        self._early += data
        if len(self._early) > _EARLY and not self._paused_early:
            self._paused_early = True
            self.pause_reading()
        self._wake()

    def _tell_end(self) -> None:
        """The peer's half has ended."""
        if self._above is None:
            self._wake()
        elif not cast(asyncio.Protocol, self._above).eof_received():
            self.close()

    def eof_received(self) -> bool | None:
        if not self._peer_ended:
            if self._failure is None:
                self._failure = ConnectionResetError("the connection ended without close_notify")
            self.abort()
            self._wake()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = self._closing = True
        if self._failure is None:
            self._failure = exc
        self._wake()
        if self.on_lost is not None:
            self.on_lost()
        if self._above is not None:
            self._above.connection_lost(self._failure)

    def pause_writing(self) -> None:
        self._writing_paused = True
        if self._above is not None:
            self._above.pause_writing()

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._unread = 0
        if self._above is not None:
            self._above.resume_writing()

    # --- from above -------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._encrypt(data):
            self._flush()

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Pieces get records of their own where that is cheaper than to join them."""
        pieces = tuple(list_of_data)
        if sum(map(len, pieces)) <= _RECORD:
            pieces = (b"".join(pieces),)
        if all(self._encrypt(piece) for piece in pieces):
            self._flush()

    def _encrypt(self, data: bytes | bytearray | memoryview) -> bool:
        """False: nothing can be written any more."""
        if self._ended or self.is_closing():
            return False
        if not data:
            return True
        size = len(data)
        try:
            sent = self.ssl.write(data)
            while sent < size:
                sent += self.ssl.write(memoryview(data)[sent:])
        except ssl.SSLError as error:
            self._failure = error
            self.abort()
            return False
        return True

    def half_close(self) -> None:
        """Nothing more will be written; the peer may still send."""
        if self._ended or not self._shaken or self.is_closing():
            return
        self._ended = True
        try:
            self.ssl.unwrap()
        except ssl.SSLWantReadError:
            pass  # the peer's half goes on
        except ssl.SSLError as error:
            self._failure = error
            self.abort()
            return
        self._flush()

    def close(self) -> None:
        """In good order: what was written goes out, and close_notify after it."""
        if not self._closing:
            if self._failure is None:
                self.half_close()
            self._closing = True
            if self._below is not None:
                self._below.close()

    def abort(self) -> None:
        self._closing = True
        if self._below is not None:
            self._below.abort()

    def is_closing(self) -> bool:
        return self._closing or self._below is None or self._below.is_closing()

    def pause_reading(self) -> None:
        if not self.is_closing():
            self._lower.pause_reading()

    def resume_reading(self) -> None:
        if not self.is_closing():
            self._lower.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if not self.is_closing():
            self._lower.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._lower.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Of the connection below, which has no "ssl_object": this one behaves as a plain one."""
        return self._lower.get_extra_info(name, default)

    @property
    def _lower(self) -> asyncio.Transport:
        assert self._below is not None
        return self._below

    def _flush(self) -> None:
        if self._below is not None and (data := self._outgoing.read()):
            self._below.write(data)
