"""The connections to one endpoint for one identity, and the requests that wait for one.

A request takes a kept connection if there is one, else it waits for whatever is there first: a
connection that comes free or a new one. Clients take turns there, and none gets all connections of
HTTP/1.1 (`fair`); one of HTTP/2 is shared by many. Connecting goes on beside the requests, so one
that is given up costs nothing. Knows ClientConnection only, no protocol, no balancing.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Awaitable, Callable

from l7proxy.fair import Line, Shares
from l7proxy.streams import ClientConnection, ClientStream
from l7proxy.tasks import spawn

# Idle connections are closed after this long, in seconds: a little before the 5 s of Node.js,
# Apache httpd and uvicorn, so that they rarely close one just as it is used again.
IDLE_S = 4.0
# Of an idle connection's time: one that is in use has none.
_BUSY = _NEVER = float("inf")


class UpstreamError(Exception):
    """No connection for a request. `reason` is counted (snake case), `status` what the client is
    told."""

    status = 503

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


class ConnectFailed(UpstreamError):
    """An endpoint could not be connected to, TLS included."""

    def __init__(self, endpoint_id: str, reason: str, why: str) -> None:
        super().__init__(reason, f"{endpoint_id}: {why}")
        self.endpoint_id = endpoint_id
        self.status = 502 if reason.startswith("tls_") else 503


# The reason where a pod of another node is not to be reached by this client.
DENIED_THERE = "tunnel_refused_policy_denied"


class Retired(Exception):
    """The pool takes no requests any more: its endpoint has left or TLS has changed."""


# A new connection that reports to the given callback, and a poll that tells when its peer is gone;
# or ConnectFailed.
Connect = Callable[
    [Callable[[ClientConnection], None]], Awaitable[tuple[ClientConnection, "select.poll"]]
]
_Waiter = asyncio.Future[tuple[ClientStream, bool]]


class Pool:
    """`endpoint` is the id of where they go, `limit` is the most connections, `shared`: they carry
    several streams (HTTP/2); `on_failure` is told of every connect that failed, `on_empty` when
    nothing is left."""

    __slots__ = (
        "_connect",
        "_connecting",
        "_connections",
        "_endpoint",
        "_held",
        "_kept",
        "_line",
        "_loop",
        "_on_empty",
        "_on_failure",
        "_ready",
        "_retired",
        "_shared",
        "_shares",
        "_sweep",
        "_sweep_due",
    )

    def __init__(
        self,
        connect: Connect,
        *,
        endpoint: str,
        limit: int,
        shared: bool,
        on_failure: Callable[[ConnectFailed], None],
        on_empty: Callable[[], None],
    ) -> None:
        self._endpoint = endpoint
        self._shares = Shares(limit)
        self._connect = connect
        self._shared = shared
        self._on_failure = on_failure
        self._on_empty = on_empty
        self._loop = asyncio.get_running_loop()
        self._connections: dict[ClientConnection, select.poll] = {}
        # With room for a stream; since when idle. The last used comes last and is used first.
        self._ready: dict[ClientConnection, float] = {}
        self._connecting = 0
        self._line: Line[_Waiter] = Line()
        # By which client those in use are held; not those that are shared.
        self._held: dict[ClientConnection, str] = {}
        # Of those in use the ones that are kept for later, and have not been recalled.
        self._kept: dict[ClientConnection, None] = {}
        self._retired = False
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_due = _NEVER

    @property
    def connections(self) -> int:
        return len(self._connections)

    @property
    def idle(self) -> int:
        return sum(since != _BUSY for since in self._ready.values())

    def set_limit(self, limit: int) -> None:
        """Fewer connections come about as those in use are closed."""
        self._shares.limit = limit
        self._connect_more()

    def take(self, client: str) -> ClientStream | None:
        """A stream on a kept connection, if one has room and `client` may have it."""
        connection = self.lend(client)
        if connection is None:
            return None
        stream = connection.open()
        if connection.capacity > 0:
            self._ready[connection] = _BUSY
        return stream

    def lend(self, client: str, *, sure: bool = True) -> ClientConnection | None:
        """The same before a stream is opened; one must be, or what stands for it, at once. Not
        `sure`: the endpoint may have closed it a moment ago, and the request can be repeated."""
        while self._ready and (self._shared or self._shares.may_take(client)):
            connection, _ = self._ready.popitem()
            if connection.capacity > 0:
                if not sure or not self._connections[connection].poll(0):
                    self._hold(connection, client)
                    return connection
                # Closed by the endpoint, which the event loop is yet to find out.
                connection.close()
        return None

    async def wait(self, client: str) -> tuple[ClientStream, bool]:
        """A stream as soon as there is one, and whether its connection had been used before.

        ConnectFailed: connecting failed on this request's behalf. Retired: ask elsewhere.
        """
        if self._retired:
            raise Retired
        waiter: _Waiter = self._loop.create_future()
        self._line.join(client, waiter)
        self._connect_more()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.cancelled():
                self._line.leave(client, waiter)
            elif waiter.exception() is None:
                waiter.result()[0].abort("the request was given up")
            raise

    def retire(self) -> None:
        """Nothing new: idle connections close, those in use once their streams have ended."""
        self._retired = True
        self._ready.clear()
        while waiting := self._line.next(lambda _: True):
            if not waiting[1].done():
                waiting[1].set_exception(Retired())
        self._stop_sweep()
        for connection in tuple(self._connections):
            self._serve(connection, used=True)

    def close_idle(self) -> None:
        """Drop idle connections: one of them turned out to be closed by the endpoint."""
        for connection, since in tuple(self._ready.items()):
            if since != _BUSY:
                del self._ready[connection]
                connection.close()

    # --- connections ------------------------------------------------------------------------------

    def _may_take(self, client: str) -> bool:
        return self._shared or self._shares.may_take(client)

    def _hold(self, connection: ClientConnection, client: str) -> None:
        if not self._shared:
            self._held[connection] = client
            self._shares.take(client)

    def _connect_more(self) -> None:
        """As many connects as requests wait that may have one; one at a time where a connection
        serves many."""
        lengths = tuple(self._line.lengths())
        if self._shared:
            wanted = int(bool(lengths))
        else:
            room_for = self._shares.room_for
            wanted = sum(min(count, room_for(client)) for client, count in lengths)
        room = self._shares.limit - len(self._connections)
        while self._connecting < min(wanted, room):
            self._connecting += 1
            spawn(self._add(), name="connect upstream")
        if sum(count for _, count in lengths) > self._connecting:
            self._recall()

    def _recall(self) -> None:
        """Of the connections that are only kept for later the one that has been so for longest."""
        while self._kept:
            connection = next(iter(self._kept))
            del self._kept[connection]
            if connection.recall():
                return

    async def _add(self) -> None:
        try:
            connection, peer_gone = await self._connect(self._changed)
            if connection.closed:
                why = "it closed the connection at once"
                raise ConnectFailed(self._endpoint, "connect_closed", why)
        except ConnectFailed as error:
            self._connecting -= 1
            self._on_failure(error)
            self._fail_waiters(error)
            self._connect_more()
            self._check_empty()
            return
        except BaseException as error:
            self._connecting -= 1
            self._fail_waiters(UpstreamError("internal", f"connecting failed: {error!r}"))
            raise
        self._connecting -= 1
        self._connections[connection] = peer_gone
        self._serve(connection, used=False)

    def _fail_waiters(self, error: UpstreamError) -> None:
        """A connect was for one request; for all where it would have served them."""
        while waiting := self._line.next(self._may_take):
            if not waiting[1].done():
                waiting[1].set_exception(error)
                if not self._shared:
                    return

    def _changed(self, connection: ClientConnection) -> None:
        """A stream ended, capacity changed, or the connection closed."""
        if connection in self._connections:
            self._serve(connection, used=True)

    def _serve(self, connection: ClientConnection, *, used: bool) -> None:
        active = connection.active > 0
        if self._kept:
            self._kept.pop(connection, None)
        if connection.held:
            self._kept[connection] = None
        if not active:
            if (holder := self._held.pop(connection, None)) is not None:
                self._shares.give(holder)
            if self._retired:
                connection.close()
        capacity = connection.capacity
        if not capacity and connection.closed:
            self._ready.pop(connection, None)
            if not active:
                self._connections.pop(connection, None)
                self._connect_more()
                self._check_empty()
            return
        if self._retired:
            return
        while self._line and capacity and (waiting := self._line.next(self._may_take)):
            client, waiter = waiting
            if not waiter.done():
                self._hold(connection, client)
                waiter.set_result((connection.open(), used))
                capacity = connection.capacity
                active = used = True
        # Moves to the end: used last, used first.
        self._ready.pop(connection, None)
        if capacity:
            if active:
                self._ready[connection] = _BUSY
            else:
                since = self._loop.time() if connection.used is None else connection.used
                self._ready[connection] = since
                self._sweep_at(since + IDLE_S)
        if self._line:
            self._connect_more()

    def _close_expired(self) -> None:
        self._stop_sweep()
        now = self._loop.time()
        oldest = _BUSY
        for connection, since in tuple(self._ready.items()):
            if since <= now - IDLE_S:
                del self._ready[connection]
                connection.close()
            elif since < oldest:
                oldest = since
        if oldest != _BUSY:
            self._sweep_at(oldest + IDLE_S)

    def _sweep_at(self, when: float) -> None:
        """By the event loop's time, at the latest."""
        if when < self._sweep_due:
            self._stop_sweep()
            self._sweep_due = when
            self._sweep = self._loop.call_at(when, self._close_expired)

    def _stop_sweep(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep, self._sweep_due = None, _NEVER

    def _check_empty(self) -> None:
        if not self._connections and not self._connecting and not self._line:
            self._stop_sweep()
            self._on_empty()
