"""One attempt at an endpoint: send the request, get the final response head, then the body.

It tells failures apart by what they mean for repeating the request (RFC 9110 §9.2.2) and leaves the
decision to the exchange.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from l7proxy.lease import Lease
from l7proxy.message import Framing, ProtocolError, RequestHead, ResponseHead
from l7proxy.request_body import BodyAttempt, ClientGone, RequestBody
from l7proxy.streams import ServerStream, StreamReset

# A backend that never says 100 gets the body anyway after this long (RFC 9110 §10.1.1), seconds.
_CONTINUE_WAIT_S = 1.0
# A backend that keeps sending 1xx responses never comes to the point.
_MAX_INTERIM = 50
IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"))


@dataclass(slots=True)
class Failure:
    """An attempt that gave no response. `status` is what the client gets if nothing else is tried;
    `repeatable` whether the request may be sent again without being asked to by configuration,
    `retryable` where a route asks for retries (GEP-1731: connection errors, whatever its codes);
    `stale`: a kept connection ended as it was used again, which says nothing of the endpoint."""

    status: int
    reason: str
    detail: str
    repeatable: bool = False
    retryable: bool = False
    stale: bool = False


class Attempt:
    """Owns the lease until `response` has failed or `finish`/`abandon` is called.

    `limit` is the loop time by which the response must have come whole, None for no limit.
    """

    def __init__(
        self, lease: Lease, stream: ServerStream, body: RequestBody, limit: float | None
    ) -> None:
        self.lease = lease
        self.limit = limit
        self._stream = stream
        self._body = body
        self._upload: asyncio.Task[None] | None = None
        self._go_on: asyncio.Event | None = None
        self._client_error: ClientGone | ProtocolError | None = None

    async def response(self, head: RequestHead, *, sent: bool = False) -> ResponseHead | Failure:
        """Send the request, unless it was; the final response head (1xx ones are passed on), or why
        there is none. ClientGone, and ProtocolError of the client's body, come through."""
        upstream = self.lease.stream
        try:
            if not sent:
                await upstream.request(head)
            if head.body is not Framing.NONE and not sent:
                if head.expect_continue:
                    self._go_on = asyncio.Event()
                self._upload = self._body.pump(self._send_body(self._body.attempt()), name="upload")
            for _ in range(_MAX_INTERIM + 1):
                response = await upstream.response()
                if response.status >= 200 or response.status == 101:
                    return response
                if response.status == 100:
                    if self._go_on is not None:
                        self._go_on.set()
                    continue
                self._stream.inform(response)
            raise ProtocolError(502, "too_many_informational", "too many 1xx responses")
        except StreamReset as error:
            self.abandon(str(error))
            if self._client_error is not None:
                raise self._client_error from error
            self.lease.failed("reset")
            retryable = error.unprocessed or head.method in IDEMPOTENT
            repeatable = retryable and (error.unprocessed or error.reused)
            return Failure(
                502, "upstream_reset", str(error), repeatable, retryable, stale=error.reused
            )
        except ProtocolError as error:
            self.abandon(error.detail)
            self.lease.failed("protocol")
            return Failure(502, "upstream_protocol", error.detail)
        except BaseException:
            self.abandon("the request was given up")
            raise

    async def _send_body(self, body: BodyAttempt) -> None:
        upstream = self.lease.stream
        try:
            if self._go_on is not None:
                await self._wait_for_continue(self._go_on)
            while chunk := await body.read():
                await upstream.write(chunk)
            await upstream.finish(self._body.trailers)
        except StreamReset:
            pass  # the response, or its absence, tells
        except (ClientGone, ProtocolError) as error:
            self._client_error = error
            upstream.abort("the client's request broke off")

    async def _wait_for_continue(self, go_on: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(_CONTINUE_WAIT_S):
                await go_on.wait()
        except TimeoutError:
            pass
        self._stream.inform(ResponseHead(100, []))

    async def read(self) -> bytes:
        """The next bytes of the response's body. StreamReset or ProtocolError: it broke off."""
        try:
            return await self.lease.stream.read()
        except StreamReset as error:
            if self._client_error is not None:
                raise self._client_error from error
            raise

    def finish(self, status: int) -> None:
        """The response has come whole. A body that has not gone to the backend is given up: the
        backend answered without it."""
        self.lease.succeeded(status)
        self.abandon("answered before the request's end")

    def abandon(self, why: str) -> None:
        """Give up what of the attempt has not ended yet, and with it the connection under an
        HTTP/1.1 stream."""
        if self._upload is not None:
            self._upload.cancel()
        self.lease.stream.abort(why)
        self.lease.release()
