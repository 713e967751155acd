"""One client's connection whose requests may pass by the proxy, and the connections to backends
that they go to.

While an offer stands, requests and their responses may go between the far sockets without being
seen here. Each backend gets its share of a rule's requests; those in the share of one without a
connection yet come here, and what has served one is offered together with the others. The first
byte that the client sends here ends all that by itself: the kernel passes nothing while bytes of
the client are not known to be done with. So before anything that was sent here is looked at,
`take_over` finds out what is outstanding: nothing; or a response that the kernel left to the proxy;
or one that is still to come. Only then the connections are the proxy's again. Knows counters and
cookies, no HTTP but heads it is given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Hashable

from bpf.layout import EXCHANGE
from bpf.proxy import Offer
from bpf.structs import Exchange
from l7proxy import metrics
from l7proxy.begun import Begun, begun
from l7proxy.changes import Changes
from l7proxy.handles import Handles
from l7proxy.held import Follower, Held, Holding, Place, to_offer
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


class Pairing:
    """`opened` is told when connections are offered, `closed` when none is held any more. `settled`
    waits until nothing is done any more by offers that were withdrawn before."""

    def __init__(
        self,
        handles: Handles,
        client: int,
        changes: Changes,
        opened: Callable[[Pairing], None],
        closed: Callable[[Pairing], None],
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        self.offered = False  # requests may pass, or one may be outstanding
        self.due = False  # `take_over` is
        # A response has not come and could still, or a request is not whole: nothing may follow.
        self.lost = False
        self.count = 0  # of requests that have passed while an offer stood, once nothing passes
        self.head = _UNKNOWN  # of what `take_over` gives
        self.wake: Callable[[], None] = lambda: None
        self.active: Callable[[], None] = lambda: None
        self._handles = handles
        self._client = client
        self._changes = changes
        self._opened = opened
        self._settled = settled
        self._proposal: tuple[Kept, Follower] | None = None
        self._held = Holding(handles, client, lambda: closed(self))
        self._missed = False  # a request that is served comes from the others' share
        self._gone = False  # the client is
        self._offer: Offer | None = None  # what stands
        self._before = _NOTHING  # when it was offered
        self._seen = _NOTHING  # when it was last looked at, and what had changed since
        self._moved_at = 0.0
        self._overdue: tuple[int, str, str] | None = None
        self._happened = asyncio.Event()

    # --- offers -----------------------------------------------------------------------------------

    def propose(self, stream: ClientStream, follower: Follower) -> None:
        """While a response is relayed from `stream`: such requests may pass once it has ended."""
        kept = stream.keep(self._on_backend)
        self._proposal = (kept, follower) if kept is not None else None

    @property
    def proposed(self) -> bool:
        return (self._proposal is not None or len(self._held) > 0) and not self.offered

    def taken(self, rule: Hashable) -> Collection[Place]:
        """Those of a rule that the request to be served is not for: they have had their share."""
        if not self._missed:
            return ()
        places = (one.place for one in self._held.followers)
        return [place for place in places if place.rule == rule]

    def leave(self, endpoint: str) -> None:
        """A request that is served is to go there."""
        self._held.leave(endpoint)

    @property
    def large(self) -> bool:
        """Responses may take more memory than most may."""
        return self._held.large

    @property
    def timeout_s(self) -> float | None:
        """Of a request, if it passes by the proxy: the shortest there is."""
        return self._held.timeout_s

    def offer(self, received: int, send: Callable[[], bool], most: int | None = None) -> bool:
        """A request was served but for the last bytes of its response, which `send` gives to the
        kernel, all of them, or none (False). The client has sent `received` bytes here, all of them
        done with. `most`: no more requests may pass. Whether they were sent."""
        passed = self._handles.passed(self._client) or _NOTHING
        self._choose(passed.parted)
        if not self._held:
            return False
        allowed = [one.allowed for one in self._held.followers]
        newest = allowed[-1]
        offer = Offer(
            self._client,
            *newest[:3],
            ways=tuple(way for held in self._held for way in held.ways),
            client_received=received,
            backends_received=tuple(
                held.kept.received for held in self._held for _ in held.followers
            ),
            handed=passed.handed,
            until=passed.forwarded + min(_MANY if most is None else most, _MANY),
            expires_ns=min(one.expires_ns for one in allowed),
            made_ns=self._changes.made_ns,
        )
        # The client's next request may come at once: what can be done before goes first.
        for held in self._held:
            held.answered = 0
        ready = not passed.outstanding
        room = ready and self._handles.prepare(offer)
        sent = room and send()
        if not sent or not (room := self._handles.offer(offer)):
            if ready and not room:
                metrics.PAIRS_REFUSED.inc()
            self._held.forget()
            self._held.let_go(passed if not passed.outstanding else None)
            return sent
        self._offer = offer
        self._before = self._seen = passed
        self.offered = True
        self.due = False
        self._overdue = None
        self._opened(self)
        return True

    def _choose(self, parted: int) -> None:
        """Hold what is proposed, and of the others what can be offered with it, the newest."""
        proposal, self._proposal = self._proposal, None
        self._missed = False
        if proposal is not None:
            kept = proposal[0]
            # A backend that answers what it has not read would be sent more and more: the kernel
            # looks at the sender's own queue only.
            if kept.held and not self._handles.queued(kept.cookie):
                self._held.add(*proposal, parted)
            else:
                kept.let_go(reusable=True)
        self._held.keep(to_offer(self._held))

    def decline(self) -> None:
        """There will be no offer after this request."""
        if self._proposal is not None:
            self._proposal[0].let_go(reusable=True)
            self._proposal = None
        self._missed = False
        if self._held:
            self._held.let_go(self._handles.passed(self._client))

    def changed(self) -> None:
        """Another configuration is in force, by which what is offered may still be right."""
        if not self._held.current:
            self.dissolve()
        elif self._offer is not None:
            self._offer = self._offer._replace(made_ns=self._changes.made_ns)
            if not self._handles.offer(self._offer):
                self.dissolve()

    def dissolve(self) -> None:
        """No request passes any more, and `take_over` is due; what is held while a request is
        served is let go."""
        if self.offered:
            self._withdraw()
            self._be_due()
        else:
            self._held.keep([])

    def close(self, *, ended: bool) -> None:
        """The client's connection is gone; `ended`: the client had said that it sends no more."""
        self._gone = True
        if self.offered:
            self._withdraw()
            self._withdrawn()
            # Now that no response passes any more: it is told of here, or the kernel has.
            passed = self._handles.passed(self._client)
            whole = passed is not None and not self._under_way(passed)
            if passed is not None and not whole:
                follower = self._held.last(passed).last(passed)
                follower.over(self._begun(passed, follower), "client_gone", "the connection ended")
            self._held.let_go(passed if ended and whole else None)
        else:
            self.decline()

    # --- what is outstanding ----------------------------------------------------------------------

    def _under_way(self, passed: Exchange) -> bool:
        """A request without a response, or one that has begun and is the proxy's to end."""
        handed = passed.handed != self._before.handed
        return bool(passed.outstanding or (handed and passed.left))

    async def take_over(
        self,
        *,
        moved: bool,
        ended: Callable[[], bool],
        take: Callable[[int], bytes],
        give: Callable[[bytes], Awaitable[None]],
    ) -> Handler | None:
        """From now on everything comes here. When nothing passes by the proxy any more: None, or
        what answers the request that is outstanding (`head`), and nothing else may be answered
        before. `moved`: the client has sent something here since the offer, or its end; `ended`:
        its end. `take` gives what it has sent, up to so many bytes: the rest of a request that has
        begun; what `give` is told is sent to it: the rest of a response."""
        self._withdraw()
        wait_s = _FIRST_LOOK_S
        brought = 0
        asked = moved
        while self.offered:
            passed = self._handles.passed(self._client)
            if passed is None:  # nobody can tell what came before and what comes now
                self.lost = True
                self._withdrawn()
                self._held.let_go(None)
                return None
            last = self._held.last(passed)
            kept, follower = last.kept, last.last(passed)
            # What has been received by now was sent after all that has passed of the request: the
            # kernel passes no more of it once something has come here.
            left = passed.unsent - brought if passed.outstanding else 0
            if left and (more := take(left)):
                brought += len(more)
                kept.bring(more)
                self._moved_at = time.monotonic()
            # What a backend sends is counted before it comes here, unless its socket was enrolled
            # before the program was attached: then this is the response, and nobody counts it.
            uncounted = bool(passed.outstanding and kept.unread and not passed.left)
            if passed.outstanding and not uncounted:
                failure = self._failure(kept, cut=ended() and passed.unsent != brought)
                # Where it went is sure only if it was not just then on its way there.
                if failure is not None and self._handles.passed(self._client) == passed:
                    self.lost = True
                    self._withdrawn()
                    self._held.let_go(None)
                    begun = self._begun(passed, follower)
                    if not failure[0]:
                        follower.over(begun, *failure[1:])
                        return None
                    if begun.status:
                        return follower.broken(begun, *failure[1:])
                    return follower.fail(begun, *failure)
                if self._held.others_unfit(last):
                    await self._settled()
                    self._drop_others()
                    continue
                await self._wait(wait_s)
                wait_s = min(2 * wait_s, _LAST_LOOK_S)
                continue
            handed = uncounted or passed.handed != self._before.handed
            if not moved and not handed:
                # A request could be passing just now, by the offer as it was; by numbers it could
                # not if the client had sent something here, or a response had come here.
                await self._settled()
                moved = True
                continue
            await self._delivery()
            if not self.offered:
                break
            self._withdrawn()
            self.count = passed.forwarded - self._before.forwarded & _U32
            if handed and passed.left:
                self._held.take(last)
                self._held.let_go(passed)
                begun = self._begun(passed, follower)
                missing = await self._bring_back(passed, last, give)
                if not missing:
                    last.let_go(passed.parted)
                    follower.over(begun._replace(bytes_out=passed.bytes_out), "", "")
                    return None
                self.lost = True
                kept.let_go(reusable=False)
                begun = begun._replace(bytes_out=passed.bytes_out - missing)
                if self._gone:
                    follower.over(begun, "client_gone", "the connection ended")
                    return None
                return follower.broken(begun, "upstream_reset", "the response did not end")
            if handed:
                # What is left of the request may pass or come here: nobody could tell it apart.
                self.lost = uncounted or passed.unsent != brought
                begun = self._begun(passed._replace(unsent=passed.unsent - brought), follower)
                self._held.take(last)
                self._held.keep_good()
                last_one = uncounted or passed.parted != last.parted
                return follower.resume(begun, kept.resume(self.head, last=last_one))
            # What follows is served here, and then these are offered again, with one more.
            self._missed = passed.missed != self._before.missed
            if asked:
                self._held.keep_good()
            else:
                self._held.let_go(passed)
            return None
        return None  # the client is gone

    def _drop_others(self) -> None:
        """Let go what cannot be offered any more and what is outstanding has not gone to; nothing
        passes by the offer any more."""
        passed = self._handles.passed(self._client)
        if passed is not None and self.offered:
            self._held.drop(self._held.others_unfit(self._held.last(passed)), passed.parted)

    async def _bring_back(
        self, passed: Exchange, last: Held, give: Callable[[bytes], Awaitable[None]]
    ) -> int:
        """The rest of a response that has begun past the proxy; how many bytes have not come."""
        left, kept = passed.left, last.kept
        timeout_s = last.last(passed).allowed.timeout_s
        while left:
            more = kept.take(left)
            late = timeout_s is not None and (
                time.monotonic() - passed.started_ns * _NS > timeout_s
            )
            if late or self._gone or (not more and kept.closed):
                return left
            if more:
                left -= len(more)
                await give(more)
            else:
                await self._wait(_LAST_LOOK_S)
        return 0

    async def _delivery(self) -> None:
        """A response that counts as answered is in the client's queue only a moment later, or much
        later if who sends it is interrupted there; nothing of ours may come before it."""
        wait_s = _FIRST_LOOK_S
        while wait_s < _DELIVERY_S and not self._handles.delivered(self._client):
            await asyncio.sleep(wait_s)
            wait_s *= 2

    def _failure(self, kept: Kept, *, cut: bool) -> tuple[int, str, str] | None:
        """Why what is outstanding will not come; with status 0 nobody waits for it. `cut`: there
        will be no more of the request."""
        if cut:
            return 0, "client_gone", "the client ended in the middle of its request"
        if self._overdue is not None:
            return self._overdue
        if kept.closed:
            return 502, "upstream_reset", "the backend closed before its response was whole"
        return None

    def _begun(self, passed: Exchange, follower: Follower) -> Begun:
        """The last request; `head` is told."""
        found = begun(passed, follower.authority)
        self.head = found.head
        return found

    async def _wait(self, seconds: float) -> None:
        self._happened.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._happened.wait()
        except TimeoutError:
            pass

    def look(self, body_timeout_s: float) -> None:
        """Notice what has passed; a request that has been outstanding for too long is given up, or
        whose body has not gone on for so long; what nothing has passed over for too long is not
        held any more."""
        if not self.offered:
            self._held.keep_good()
            return
        passed = self._handles.passed(self._client)
        if passed is None or not self._held.current:
            self._be_due()
            return
        if self._used(passed):
            self.active()
        now = time.monotonic()
        if passed != self._seen:
            self._seen, self._moved_at = passed, now
            for held in self._held:
                held.note(self._handles.answered(held.kept.cookie))
        if not passed.outstanding:
            if any(held.old for held in self._held):
                self._be_due()
            return
        last = self._held.last(passed)
        last.used = now
        allowed = last.last(passed).allowed
        timeout_s = allowed.timeout_s
        if timeout_s is not None and now - passed.started_ns * _NS > timeout_s:
            self._overdue = allowed.late
            self._be_due()
        elif passed.unsent and now - self._moved_at > body_timeout_s:
            self._overdue = 408, "body_timeout", "the request's body did not come"
            self._be_due()

    @property
    def in_use(self) -> bool:
        """A request passes, or has since `look` noticed any."""
        passed = self._handles.passed(self._client) if self.offered else None
        return passed is not None and self._used(passed)

    def _used(self, passed: Exchange) -> bool:
        return bool(passed.outstanding) or passed.forwarded != self._seen.forwarded

    # --- states -----------------------------------------------------------------------------------

    def _on_backend(self) -> None:
        """A backend has sent something here, or closed; or others wait for its connection."""
        self._happened.set()
        if self.offered:
            self._be_due()
        else:
            self._held.keep_good()

    def _be_due(self) -> None:
        self.due = True
        self._happened.set()
        self.wake()

    def _withdraw(self) -> None:
        self._offer = None
        self._handles.withdraw(self._client)

    def _withdrawn(self) -> None:
        self.offered = self.due = False
        self._held.forget()


_NOTHING = EXCHANGE.unpack(Exchange, bytes(EXCHANGE.size))
_UNKNOWN = RequestHead(b"GET", b"http", b"", b"/", None, [])
