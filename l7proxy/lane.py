"""The fast lane of a client's connection over HTTP/1.1: requests and responses that go on as their
own bytes, and of which nothing is read here but what C says.

A request is taken if the destination's automaton allows it (`lanes`), it has come whole at once,
and a kept connection to the endpoint is free; everything else is the exchange's. What turns out to
need it later (an unusual response, none at all, a drain, a timeout) is handed over to the exchange,
as a request that was sent. Counted, logged and told of like any other. Knows no sockets.
"""

from __future__ import annotations

import random
import re
import time
from functools import partial
from typing import TYPE_CHECKING, cast

from l7proxy.entry import Entry
from l7proxy.forwarding import ClientAddress, new_request_id, said_id
from l7proxy.http1_codec import date
from l7proxy.http1_head import parse_fields, parse_request
from l7proxy.lease import Lease
from l7proxy.message import Headers, RequestHead
from l7proxy.record import Record
from l7proxy.routing import pick_backend
from l7proxy.sent import Sent
from l7proxy.streams import ConnectionInfo

if TYPE_CHECKING:
    from l7proxy.balance import Member
    from l7proxy.http1_client import Http1Client
    from l7proxy.http1_server import Http1Server
    from l7proxy.lanes import Aim, Chosen, End, Lanes
    from l7proxy.pool import Pool
    from l7proxy.routing import CompiledBackend
    from l7proxy.upstream import Cluster

# What was found is looked up again after this long: certificates end, and whatever else is
# remembered of a destination's use wants to hear of it.
_FRESH_S = 10.0
# Authorities of one connection that are remembered, and kinds of requests to an endpoint.
_HOSTS = 8
_KINDS = 64
_HOST = re.compile(rb"\r\nhost:[ \t]*([^\r \t]+)[ \t]*\r", re.IGNORECASE)
_USER_AGENT = re.compile(rb"\r\nuser-agent:[ \t]*([^\r]*)", re.IGNORECASE)
_GONE = "the connection ended"
_CUT_SHORT = "the backend closed before its response was whole"


class Lane:
    """`busy`: a request is on its way. `server` is the connection, set by itself."""

    __slots__ = (
        "_aims", "_backend", "_bodiless", "_body", "_chosen", "_cluster", "_connection", "_end",
        "_ends", "_entry", "_found", "_left", "_member", "_new_id", "_out", "_pool", "_request",
        "_reusable", "_shared", "_started", "_status", "_until", "_version", "busy", "info",
        "server",
    )  # fmt: skip

    server: Http1Server
    _backend: CompiledBackend
    _bodiless: bool
    _body: int
    _chosen: Chosen
    _cluster: Cluster
    _connection: Http1Client
    _end: End
    _found: tuple[int, ...]
    _left: int
    _member: Member
    _new_id: str
    _out: int
    _pool: Pool
    _request: bytes
    _reusable: bool
    _started: float
    _status: int

    def __init__(self, shared: Lanes, entry: Entry, info: ConnectionInfo) -> None:
        self.busy = False
        self.info = info
        self._shared = shared
        self._entry = entry
        self._aims: dict[bytes, Aim] = {}  # by authority, where that counts
        self._ends: dict[Member, End] = {}
        self._version = -1
        self._until = 0.0

    # --- the request ------------------------------------------------------------------------------

    def take(self, data: bytes) -> bool:
        """A client's bytes, behind a request that was answered: send them on, if that can be."""
        shared = self._shared
        now = time.monotonic()
        if self._version != shared.version or now > self._until:
            self._version, self._until = shared.version, now + _FRESH_S
            self._aims.clear()
            self._ends.clear()
        authority = b""
        if self._entry.by_host:
            said = _HOST.search(data)
            if said is None:
                return False
            authority = said[1]
        aim = self._aims.get(authority)
        if aim is None:
            aim = shared.aim(self._entry, self.info, authority)
            if aim is None:
                return False
            if len(self._aims) >= _HOSTS:
                self._aims.clear()
            self._aims[authority] = aim
        number = aim.requests.judge(data)
        if not number:
            return False
        chosen = aim.chosen(number)
        if chosen is None:
            return False
        backend = chosen.only or pick_backend(chosen.rule, random.random)
        if backend is None or backend.cluster is None:
            return False
        cluster = shared.clusters.get(backend.cluster)
        if cluster is None or cluster.http2:
            return False
        member = cluster.choose(chosen.selection.prefer)
        if member is None:
            return False
        end = self._ends.get(member)
        if end is None or now > end.until:
            fresh = shared.end(aim, member, self._entry, self.info)
            if fresh is None:
                return False
            end = self._ends[member] = fresh
        if end.asked is not aim.asked and end.asked != aim.asked:
            # This endpoint has other policies: they are looked at from now on.
            aim = shared.aim(self._entry, self.info, authority, end.asked)
            if aim is None or aim.requests.judge(data) != number:
                return False
            self._aims[authority] = aim
        found = aim.requests.found()
        if authority and data[found[4] : found[5]] != authority:
            return False
        pool = member.pools.get(end.key)
        if pool is None:
            return False
        bodiless = data.startswith(b"HEAD ")
        connection = pool.lend(end.client, sure=not (bodiless or data.startswith(b"GET ")))
        if connection is None:
            return False
        member.load += 1
        self._found = found
        self._body = len(data) - found[9]
        self._new_id = ""
        self._bodiless = bodiless
        self._started = now
        self._chosen, self._backend, self._end = chosen, backend, end
        self._cluster, self._member, self._pool = cluster, member, pool
        self._connection = cast("Http1Client", connection)
        self._left = self._status = self._out = 0
        self._reusable = True
        self.busy = True
        if aim.adds:
            self._new_id = new_request_id()
            size, told = found[9] - 2, aim.adds + self._new_id.encode()
            data = b"%b%b\r\n%b" % (data[:size], told, data[size:])
        self._request = data
        self.server.carrying(chosen.timeout_s)
        self._connection.carry(self, data)
        return True

    # --- the response -----------------------------------------------------------------------------

    def response(self, data: bytes) -> None:
        """Bytes of the backend."""
        if self._status:
            self._more(data)
            return
        responses = self._shared.responses
        status = responses.status(data, bodiless=self._bodiless)
        if not status:
            self.hand_over(data)
            return
        self._status = status
        size, dated, left, drop, dropped = responses.found()
        body = len(data) - size
        if left < 0:
            data = data[:left]
            body += left
            left = 0
            self._reusable = False
        if dropped or not dated:
            added = b"" if dated else b"date: %b\r\n" % date()
            data = b"".join(
                (data[:drop], data[dropped : size - 2], added, data[size - 2 :])
                if dropped
                else (data[: size - 2], added, data[size - 2 :])
            )
        self._left = left
        self._pass_on(data, body)

    def _more(self, data: bytes) -> None:
        surplus = len(data) - self._left
        if surplus > 0:
            data = data[:-surplus] if self._left else b""
            self._reusable = False
        self._left -= len(data)
        if data:
            self._pass_on(data, len(data))

    def _pass_on(self, data: bytes, body: int) -> None:
        server = self.server
        if server.gone:
            return  # which is about to be told
        self._out += body
        server.send(data)
        if not self._left and not server.write_paused and self.busy:
            self._finish()

    def hold(self, paused: bool) -> None:
        """The client takes no more, or takes more again."""
        if self.busy:
            self._connection.hold(paused)
            if not paused and self._status and not self._left:
                self._finish()

    def _finish(self) -> None:
        self._cluster.count_answer(self._member, self._status)
        self._leave(reusable=self._reusable)
        self._close_whole()
        self.server.carried()

    # --- other endings ----------------------------------------------------------------------------

    def hand_over(self, received: bytes = b"") -> None:
        """Let the exchange go on. `received` is what has come of the response."""
        server = self.server
        size, end = len(self._request) - self._body, self._found[9] - 2
        # What was added counts against no limit of the client's.
        head, _ = parse_request(self._request[:end] + b"\r\n", server.scheme, server.settings)
        added = self._request[end : size - 2]
        head.headers += parse_fields(added, added.count(b"\r\n"))
        self.busy = False
        stream = self._connection.take_over(head, received)
        lease = Lease(self._cluster, self._member, self._pool, stream, self._end.way, reused=True)
        sent = Sent(
            self._chosen.selection,
            self._backend,
            lease,
            lease,
            self._started,
            self._policy(),
            told=ClientAddress(self._end.told, self._request_id(), False),
            body=self._request[size:],
        )
        server.resume(head, partial(self._shared.exchanges.resume, self._entry, sent))

    def backend_ended(self) -> None:
        """The backend sends no more."""
        if not self._status:
            self.hand_over()
        elif self._left:
            self._break_off(502, "upstream_reset", _CUT_SHORT)

    def expired(self) -> None:
        """The request timeout has passed."""
        if not self._status:
            self.hand_over()
        else:
            self._break_off(504, "request_timeout", "the route's request timeout has passed")

    def _break_off(self, status: int, reason: str, detail: str) -> None:
        """In mid-response."""
        self._leave(reusable=False)
        record = self._record()
        record.replied(status, reason, detail, whole=False)
        self._close(record)
        self.server.abort()

    def client_lost(self) -> None:
        """The client is gone."""
        self._leave(reusable=False)
        record = self._record()
        record.broke_off("client_gone", _GONE)
        self._close(record)

    @property
    def answering(self) -> bool:
        return self._status != 0

    def _leave(self, *, reusable: bool) -> None:
        self.busy = False
        self._member.load -= 1
        self._connection.carried(reusable=reusable)

    # --- what is told -----------------------------------------------------------------------------

    def _close_whole(self) -> None:
        """Of a request that was answered. Those of a kind have one record, one after the other."""
        found, records = self._found, self._end.records
        kind = self._chosen, self._backend.label, self._status, found[0], found[1]
        record = records.get(kind)
        if record is None:
            if len(records) >= _KINDS:
                records.clear()
            record = records[kind] = self._record()
        else:
            data = self._request
            record.again(
                data[: found[8]],
                data[found[4] : found[5]],
                data[found[2] : found[3]],
                self._headers(),
                self._request_id(),
                self._started,
                self._body,
                self._out,
            )
        self._close(record)

    def _record(self) -> Record:
        data, found, end = self._request, self._found, self._end
        head = RequestHead(
            data[: found[8]], b"http", data[found[4] : found[5]], data[found[2] : found[3]], None,
            self._headers(),
        )  # fmt: skip
        told = ClientAddress(end.told, self._request_id(), False)
        record = Record(head, told, self._entry.gateway)
        record.started = self._started
        record.encryption = self._entry.encryption
        record.selected(self._chosen.selection)
        record.backend, record.attempts = self._backend.label, 1
        record.endpoint, record.destination = self._member.id, self._member.endpoint
        record.way, record.policy = end.way, self._policy()
        record.status, record.bytes_in, record.bytes_out = self._status, self._body, self._out
        return record

    def _headers(self) -> Headers:
        """Those that are logged."""
        agent = _USER_AGENT.search(self._request) if self._shared.log.wanted else None
        return [(b"user-agent", agent[1].strip(b" \t"))] if agent is not None else []

    def _request_id(self) -> str:
        if self._new_id:
            return self._new_id
        begin, end = self._found[6:8]
        return said_id(self._request[begin:end]) if end else ""

    def _policy(self) -> str:
        return self._end.policy(self._found[0], self._found[1])

    def _close(self, record: Record) -> None:
        record.close(self._shared.log)
        self._shared.flows.request(record, self.info)
