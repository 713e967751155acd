"""One client's connection whose requests may pass by the proxy, and the connection to the backend
that they go to.

While an offer stands, requests and their responses may go between the two far sockets without being
seen here. The first byte that the client sends here ends that by itself: the kernel passes nothing
while bytes of the client are not known to be done with. So before anything that was sent here is
looked at, `take_over` finds out what is outstanding: nothing; or a response that the kernel left to
the proxy; or one that is still to come. Only then the connections are the proxy's again. Knows
counters and cookies, no HTTP but heads it is given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from bpf.constants import RESPONSE_MAX
from bpf.layout import EXCHANGE
from bpf.proxy import Offer
from bpf.structs import Exchange
from l7proxy.handles import Handles
from l7proxy.message import RequestHead
from l7proxy.streams import ClientStream, Handler, Kept

# How soon what is outstanding is looked for again, in seconds; doubling from the first to the last.
_FIRST_LOOK_S, _LAST_LOOK_S = 0.0002, 0.01
# A response that was answered is on its way for no longer.
_DELIVERY_S = 0.1
_NS = 1e-9
# No limit to requests.
_MANY = 1 << 31
_U32 = 0xFFFFFFFF


class Allowed(NamedTuple):
    """Which requests may pass by the proxy: see `bpf.proxy.Offer`. `requests`: how many at most,
    None: any number. `timeout_s`: how long each may take, with its response."""

    generation: int
    egress: int
    ingress: int
    rule: int
    expires_ns: int
    made_ns: int
    series: int
    response_max: int
    requests: int | None
    timeout_s: float | None


class Follower(NamedTuple):
    """How requests that follow one that was answered are treated. `current`: nothing that this was
    decided by has changed. `resume` makes a handler for a response that comes through the proxy
    after all, on this stream, and is told whether others have passed before; `fail` one for a
    request without a response (status, reason, detail), `broken` for one whose response has begun
    and will not end (reason, detail)."""

    allowed: Allowed
    authority: bytes
    current: Callable[[], bool]
    resume: Callable[[ClientStream, bool], Handler]
    fail: Callable[[int, str, str], Handler]
    broken: Callable[[str, str], Handler]


class Pairing:
    """`opened` and `closed` are told when offers stand and when none does any more. `settled` waits
    until nothing is done any more by offers that were withdrawn before."""

    def __init__(
        self,
        handles: Handles,
        client: int,
        opened: Callable[[Pairing], None],
        closed: Callable[[Pairing], None],
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self.offered = False  # requests may pass, or one may be outstanding
        self.due = False  # `take_over` is
        # A response has not come and could still, or a request is not whole: nothing may follow.
        self.lost = False
        self.count = 0  # of requests that have passed while an offer stood, once nothing passes
        self.head = RequestHead(b"GET", b"http", b"", b"/", None, [])  # of what `take_over` gives
        self.wake: Callable[[], None] = lambda: None
        self.active: Callable[[], None] = lambda: None
        self._handles = handles
        self._client = client
        self._opened = opened
        self._closed = closed
        self._settled = settled
        self._kept: Kept | None = None
        self._follower: Follower | None = None
        self._before = _NOTHING  # when it was offered
        self._seen = _NOTHING  # when it was last looked at, and what had changed since
        self._moved_at = 0.0
        self._overdue: tuple[int, str, str] | None = None
        self._happened = asyncio.Event()

    # --- offers -----------------------------------------------------------------------------------

    def propose(self, stream: ClientStream, follower: Follower) -> None:
        """While a response is relayed from `stream`: such requests may pass once it has ended."""
        self._kept = stream.keep(self._on_backend)
        self._follower = follower

    @property
    def proposed(self) -> bool:
        return self._kept is not None and not self.offered

    @property
    def large(self) -> bool:
        """Responses may take more memory than most may."""
        return self._follower is not None and self._follower.allowed.response_max > RESPONSE_MAX

    @property
    def timeout_s(self) -> float | None:
        """Of a request, if it passes by the proxy."""
        return self._follower.allowed.timeout_s if self._follower is not None else None

    def offer(self, received: int, send: Callable[[], bool], most: int | None = None) -> bool:
        """A request was served but for the last bytes of its response, which `send` gives to the
        kernel, all of them, or none (False). The client has sent `received` bytes here, all of them
        done with. `most`: no more requests may pass. Whether they were sent."""
        kept, follower = self._kept, self._follower
        assert kept is not None
        assert follower is not None
        if not kept.held:
            self._kept = self._follower = None
            return False
        if kept.closed or kept.unread or not follower.current():
            self._let_go(reusable=not kept.closed and not kept.unread)
            return False
        passed = self._handles.passed(self._client) or _NOTHING
        allowed = follower.allowed
        requests = min(one for one in (allowed.requests, most, _MANY) if one is not None)
        offer = Offer(
            self._client,
            kept.cookie,
            *allowed[:4],
            client_received=received,
            backend_received=kept.received,
            handed=passed.handed,
            until=passed.forwarded + requests,
            expires_ns=allowed.expires_ns,
            made_ns=allowed.made_ns,
            series=allowed.series,
            response_max=allowed.response_max,
        )
        # The client's next request may come at once: what can be done before goes first.
        ready = not passed.outstanding and self._handles.prepare(offer)
        sent = ready and send()
        if not sent or not self._handles.offer(offer):
            self._handles.forget(kept.cookie)
            self._let_go(reusable=not passed.outstanding)
            return sent
        self._before = self._seen = passed
        self.offered = True
        self.due = False
        self._overdue = None
        self._opened(self)
        return True

    def decline(self) -> None:
        """There will be no offer after this request."""
        if self._kept is not None:
            self._let_go(reusable=True)

    def dissolve(self) -> None:
        """No request passes any more, and `take_over` is due."""
        if self.offered:
            self._handles.withdraw(self._client)
            self._be_due()

    def close(self, *, ended: bool) -> None:
        """The client's connection is gone; `ended`: the client had said that it sends no more."""
        if self.offered:
            self._handles.withdraw(self._client)
            passed = self._handles.passed(self._client)
            self._withdrawn()
            self._let_go(
                reusable=ended
                and passed is not None
                and not passed.outstanding
                and passed.parted == self._before.parted
                and not passed.left
            )
        else:
            self.decline()

    # --- what is outstanding ----------------------------------------------------------------------

    async def take_over(
        self,
        *,
        moved: bool,
        take: Callable[[int], bytes],
        give: Callable[[bytes], Awaitable[None]],
    ) -> Handler | None:
        """From now on everything comes here. When nothing passes by the proxy any more: None, or
        what answers the request that is outstanding (`head`), and nothing else may be answered
        before. `moved`: the client has sent something here since the offer, or its end. `take`
        gives what it has sent, up to so many bytes: the rest of a request that has begun; what
        `give` is told is sent to it: the rest of a response."""
        kept, follower = self._kept, self._follower
        assert kept is not None
        assert follower is not None
        self._handles.withdraw(self._client)
        wait_s = _FIRST_LOOK_S
        brought = 0
        while True:
            passed = self._handles.passed(self._client)
            # What has been received by now was sent after all that has passed of the request: the
            # kernel passes no more of it once something has come here.
            left = passed.unsent - brought if passed is not None and passed.outstanding else 0
            if left and (more := take(left)):
                brought += len(more)
                kept.bring(more)
                self._moved_at = time.monotonic()
            if passed is None or passed.outstanding:
                failure = self._failure(passed, kept)
                if failure is not None:
                    self.lost = True
                    self._withdrawn()
                    self._let_go(reusable=False)
                    self._tell_head(passed, follower)
                    if passed is not None and passed.left:
                        return follower.broken(*failure[1:])
                    return follower.fail(*failure)
                await self._wait(wait_s)
                wait_s = min(2 * wait_s, _LAST_LOOK_S)
                continue
            handed = passed.handed != self._before.handed
            if not moved and not handed:
                # A request could be passing just now, by the offer as it was; by numbers it could
                # not if the client had sent something here, or a response had come here.
                await self._settled()
                moved = True
                continue
            await self._delivery()
            self._withdrawn()
            self.count = passed.forwarded - self._before.forwarded & _U32
            # Of a request in parts one may have been lost on its way, when memory is short: who
            # waits for it would take the next request for it.
            whole = passed.parted == self._before.parted
            if handed and passed.left:
                if await self._bring_back(passed, kept, give):
                    self._let_go(reusable=whole and not kept.unread and not kept.closed)
                    return None
                self.lost = True
                self._let_go(reusable=False)
                self._tell_head(passed, follower)
                return follower.broken("upstream_reset", "the response did not end")
            if handed:
                # What is left of the request may pass or come here: nobody could tell it apart.
                self.lost = passed.unsent != brought
                self._tell_head(passed, follower)
                self._kept = self._follower = None
                stream = kept.resume(self.head, last=not whole)
                return follower.resume(stream, passed.answered != self._before.answered)
            self._let_go(reusable=whole and not kept.unread and not kept.closed)
            return None

    async def _bring_back(
        self, passed: Exchange, kept: Kept, give: Callable[[bytes], Awaitable[None]]
    ) -> bool:
        """The rest of a response that has begun past the proxy; whether it has come."""
        left = passed.left
        while left:
            more = kept.take(left)
            late = self.timeout_s is not None and (
                time.monotonic() - passed.started_ns * _NS > self.timeout_s
            )
            if late or (not more and kept.closed):
                return False
            if more:
                left -= len(more)
                await give(more)
            else:
                await self._wait(_LAST_LOOK_S)
        return True

    async def _delivery(self) -> None:
        """A response that counts as answered is in the client's queue only a moment later, or much
        later if who sends it is interrupted there; nothing of ours may come before it."""
        wait_s = _FIRST_LOOK_S
        while wait_s < _DELIVERY_S and not self._handles.delivered(self._client):
            await asyncio.sleep(wait_s)
            wait_s *= 2

    def _failure(self, passed: Exchange | None, kept: Kept) -> tuple[int, str, str] | None:
        """Why what is outstanding will not come."""
        if passed is None:
            return 502, "pair_lost", "the kernel does not know any more what has passed"
        if self._overdue is not None:
            return self._overdue
        if kept.closed:
            return 502, "upstream_reset", "the backend closed before its response was whole"
        return None

    def _tell_head(self, passed: Exchange | None, follower: Follower) -> None:
        """As far as the kernel has kept it."""
        method, target = b"GET", b"/"
        if passed is not None and passed.shown:
            line, _, _ = passed.head[: passed.shown].partition(b"\r\n")
            method, _, rest = line.partition(b" ")
            target = rest.removesuffix(b" HTTP/1.1")
        self.head = RequestHead(method, b"http", follower.authority, target, None, [])

    async def _wait(self, seconds: float) -> None:
        self._happened.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._happened.wait()
        except TimeoutError:
            pass

    def look(self, body_timeout_s: float) -> None:
        """Notice what has passed; a request that has been outstanding for too long is given up, or
        whose body has not gone on for so long."""
        passed = self._handles.passed(self._client)
        if passed is None:
            self._be_due()
            return
        if passed.forwarded != self._seen.forwarded:
            self.active()
        now = time.monotonic()
        if passed != self._seen:
            self._seen, self._moved_at = passed, now
        if not passed.outstanding:
            return
        timeout_s = self.timeout_s
        if timeout_s is not None and now - passed.started_ns * _NS > timeout_s:
            self._overdue = 504, "request_timeout", "the request timeout has passed"
            self._be_due()
        elif passed.unsent and now - self._moved_at > body_timeout_s:
            self._overdue = 408, "body_timeout", "the request's body did not come"
            self._be_due()

    # --- states -----------------------------------------------------------------------------------

    def _on_backend(self) -> None:
        """The backend has sent something here, or closed."""
        self._happened.set()
        if self.offered:
            self._be_due()

    def _be_due(self) -> None:
        self.due = True
        self._happened.set()
        self.wake()

    def _withdrawn(self) -> None:
        if self._kept is not None:
            self._handles.forget(self._kept.cookie)
        self.offered = self.due = False
        self._closed(self)

    def _let_go(self, *, reusable: bool) -> None:
        kept, self._kept, self._follower = self._kept, None, None
        if kept is not None:
            kept.let_go(reusable=reusable)


_NOTHING = EXCHANGE.unpack(Exchange, bytes(EXCHANGE.size))
