"""What the request exchange needs of a connection, whichever protocol it speaks.

An exchange is one request: a `ServerStream` toward the client, and for every attempt a
`ClientStream` toward an endpoint. HTTP/1.1 and HTTP/2 drivers implement both; the exchange and the
upstream pools know nothing else of them. Flow control: `read` takes bytes off the peer's window
only as they are wanted, `write` waits while the peer does not take more.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from l7proxy.handles import Steered
from l7proxy.message import Headers, RequestHead, ResponseHead

if TYPE_CHECKING:
    from l7proxy.lane import Lane
    from l7proxy.pairing import Pairing


class StreamReset(Exception):
    """The peer (or the connection under the stream) went away in mid-message.

    `unprocessed`: the peer is known not to have acted on the request (GOAWAY with a lower last
    stream id, REFUSED_STREAM, a connection that failed before a byte was written), so that any
    request may be repeated elsewhere (RFC 9113 §8.7).
    `reused`: the stream was not the first on its connection and no byte of a response had come: the
    peer may have closed an idle connection just then (RFC 9110 §9.2.2 tells what may be repeated).
    """

    def __init__(self, why: str, *, unprocessed: bool = False, reused: bool = False) -> None:
        super().__init__(why)
        self.unprocessed = unprocessed
        self.reused = reused


class Reader(Protocol):
    """The incoming half of a message."""

    async def read(self) -> bytes:
        """The next bytes of the body, b"" at its end. StreamReset if it will not come whole;
        ProtocolError if the peer broke its framing."""

    @property
    def trailers(self) -> Headers:
        """Valid after `read` has returned b""."""


class Writer(Protocol):
    """The outgoing half of a message."""

    async def write(self, data: bytes) -> None:
        """Send body bytes; returns when more may follow. StreamReset if the peer is gone."""

    async def finish(self, trailers: Headers) -> None:
        """The body is complete. A body shorter than its Content-Length is a bug of the caller's."""

    def abort(self, why: str) -> None:
        """Give up the message so that the peer cannot take it for whole: RST_STREAM, or the
        connection is closed. Idempotent; harmless after the end."""


class ServerStream(Reader, Writer, Protocol):
    """One request of a client and the answer to it."""

    head: RequestHead

    def inform(self, head: ResponseHead) -> None:
        """Send a 1xx response, 100 (Continue) included; HTTP/1.0 clients are spared it."""

    async def respond(self, head: ResponseHead) -> None:
        """Send the final response head. The codec adds framing, Date and Connection fields and
        leaves out what HEAD, 204 and 304 must not have. After a 101 `read` and `write` carry the
        tunnel's bytes, and b"" from `read` is the peer's end of it."""


class ClientStream(Reader, Writer, Protocol):
    """One request to an endpoint and the answer from it."""

    async def request(self, head: RequestHead) -> None:
        """Send the request head. With `expect_continue` the Expect field goes along."""

    def keep(self, keeper: Callable[[], None]) -> Kept | None:
        """When the stream has ended in good order its connection is held for whoever calls this,
        who is told by `keeper` of whatever happens to it. None: it cannot be kept, because
        nothing could reach the endpoint past the proxy."""

    async def response(self) -> ResponseHead:
        """The next response head: 1xx ones as they come, then the final one. A 101 only where the
        request asked for an upgrade; then `read` and `write` carry the tunnel's bytes."""


class Kept(Protocol):
    """A connection to an endpoint that may be held for one client."""

    cookie: int  # of the endpoint's socket
    held: bool  # nothing is on its way; only then it can be resumed or let go
    received: int  # bytes, since it was established
    wanted: bool  # by a request of somebody else's

    @property
    def unread(self) -> int:
        """Bytes that have come while it was held."""

    @property
    def closed(self) -> bool:
        """The endpoint sends no more."""

    def resume(self, head: RequestHead, *, last: bool) -> ClientStream:
        """For the response to a request that was sent past the proxy. `last`: no other goes over
        the connection."""

    def bring(self, data: bytes) -> None:
        """The rest of a request that was sent past the proxy, or a part of it."""

    def take(self, count: int) -> bytes:
        """Of what has come while it was held, up to so many bytes."""

    def let_go(self, *, reusable: bool, used: float | None = None) -> None:
        """Back to the pool, or closed. `used`: as in `ClientConnection`."""


class ClientConnection(Protocol):
    """An established connection to an endpoint, kept in a pool. `held`: by whoever keeps it
    (`ClientStream.keep`), and nothing is on its way; `used`: when it was last, by time.monotonic(),
    if that was before it was given back."""

    held: bool
    used: float | None

    @property
    def capacity(self) -> int:
        """How many streams may be opened now: 0 or 1 for HTTP/1.1; for HTTP/2 up to the peer's
        SETTINGS_MAX_CONCURRENT_STREAMS; 0 for good once the connection is closing."""

    @property
    def closed(self) -> bool:
        """No stream will ever be opened on it again; streams in flight may still finish."""

    @property
    def active(self) -> int:
        """Streams in flight."""

    def recall(self) -> bool:
        """Whoever holds it is to let it go soon. False: nobody does, or has been told already."""

    def open(self) -> ClientStream:
        """A new stream; only while `capacity` > 0. The stream frees its place when both halves of
        the message ended or it was aborted."""

    def close(self) -> None:
        """Close once the streams in flight have ended."""


@dataclass(frozen=True, slots=True)
class ConnectionInfo:
    """What is known of a client's connection. Addresses are (address, port), IPv4-mapped IPv6
    addresses as IPv4. `steered`: a workload's that the kernel sent here; `pairing`: its requests
    may pass by the proxy; `lane`: they may go straight on."""

    peer: tuple[str, int]
    local: tuple[str, int]
    tls: bool = False
    sni: str | None = None
    tls_version: str | None = None
    steered: Steered | None = None
    pairing: Pairing | None = None
    lane: Lane | None = None


# Serves one request to its end; never raises (CancelledError aside).
Handler: TypeAlias = Callable[[ServerStream, ConnectionInfo], Awaitable[None]]
