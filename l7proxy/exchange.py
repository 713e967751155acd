"""One request from its head to the end of its response: rule, filters, attempts, relay.

Order, as the specification has it: the entry selects listener and rule, then CORS and redirects,
the rule's filters, a backend by weight with its filters, then attempts until one answers. What goes
wrong is answered here, with a reason that is counted and logged; nothing here knows which HTTP
version either side speaks, or whether the request came through a Gateway or from the mesh.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING

from l7proxy import cors, filters, metrics, session
from l7proxy.accesslog import AccessLog
from l7proxy.attempt import Attempt, Failure
from l7proxy.attempts import Attempts
from l7proxy.choice import choose
from l7proxy.deadline import until, within
from l7proxy.entry import Entry, Reply, Selection
from l7proxy.flows import FlowLog
from l7proxy.followers import follower
from l7proxy.guard import Guard
from l7proxy.lease import Lease
from l7proxy.message import ProtocolError, RequestHead, ResponseHead
from l7proxy.mirror import Mirrors
from l7proxy.pairs import Pairs
from l7proxy.policies import Policies
from l7proxy.record import Record
from l7proxy.request_body import ClientGone, RequestBody
from l7proxy.routing import (
    CompiledBackend,
    CompiledRule,
    RouteIndex,
    RouteMatchResult,
)
from l7proxy.sent import Sent
from l7proxy.streams import ConnectionInfo, ServerStream, StreamReset
from l7proxy.upgrade import to_client, tunnel
from l7proxy.upstream import Clusters
from mesh.model.nodeconfig import CertificateSection, Settings
from mesh.model.section import SectionKey

if TYPE_CHECKING:
    from l7proxy.lane import Lane

_log = logging.getLogger("weft.exchange")

# The only protocol that is upgraded to (RFC 6455): of others nobody could say what passes in the
# tunnel, HTTP requests that no route has judged among them.
_WEBSOCKET = b"websocket"


class Exchanges:
    """What every exchange of a worker shares."""

    def __init__(
        self,
        routes: RouteIndex,
        clusters: Clusters,
        settings: Settings,
        log: AccessLog,
        flows: FlowLog,
        policies: Policies,
        pairs: Pairs,
    ) -> None:
        self.version = 0
        self.routes = routes
        self.clusters = clusters
        self.settings = settings
        self.certificates: Mapping[SectionKey, CertificateSection] = {}
        self.log = log
        self.flows = flows
        self.policies = policies
        self.pairs = pairs
        self.mirrors = Mirrors(clusters)
        self.lane: Callable[[Entry, ConnectionInfo], Lane | None] = lambda *_: None

    async def serve(self, entry: Entry, stream: ServerStream, info: ConnectionInfo) -> None:
        """The `Handler` of the connections that come in by `entry`."""
        await self._serve(_Exchange(self, entry, stream, info))

    async def resume(
        self, entry: Entry, sent: Sent, stream: ServerStream, info: ConnectionInfo
    ) -> None:
        """The same for a request that has gone to its backend past the proxy."""
        await self._serve(_Exchange(self, entry, stream, info, sent))

    async def _serve(self, exchange: _Exchange) -> None:
        try:
            await exchange.run()
        finally:
            self._close(exchange.record, exchange.info)

    def tell(
        self,
        entry: Entry,
        info: ConnectionInfo,
        sent: Sent,
        head: RequestHead,
        reason: str,
        detail: str,
    ) -> None:
        """Of a request that went past the proxy, and its response too (""), or nobody waits for
        it."""
        record = self.record(entry, info, head, sent)
        if reason:
            record.broke_off(reason, detail)
        self._close(record, info)

    def record(
        self, entry: Entry, info: ConnectionInfo, head: RequestHead, sent: Sent | None
    ) -> Record:
        told = sent.told if sent is not None else None
        record = Record(head, told or entry.arrive(head, info, self.settings), entry.gateway)
        record.encryption = entry.encryption
        if sent is not None:
            record.started, record.policy = sent.started, sent.policy
            record.status = sent.status
            record.bytes_in, record.bytes_out = sent.bytes_in, sent.bytes_out
            record.selected(sent.selected)
            record.backend, record.attempts = sent.backend.label, 1
            record.endpoint, record.destination = sent.before.endpoint_id, sent.before.endpoint
            record.way = sent.before.way
        return record

    def _close(self, record: Record, info: ConnectionInfo) -> None:
        record.close(self.log)
        self.flows.request(record, info)


class _Exchange:
    def __init__(
        self,
        shared: Exchanges,
        entry: Entry,
        stream: ServerStream,
        info: ConnectionInfo,
        sent: Sent | None = None,
    ) -> None:
        self._shared = shared
        self._entry = entry
        self._stream = stream
        self.info = info
        self._went = sent
        # Of what follows: the configuration may change before the response is there.
        self._version = shared.pairs.changes.number if sent is None else sent.version
        self._body = RequestBody(stream, sent.body if sent is not None else None)
        self._responded = False
        self.record = shared.record(entry, info, stream.head, sent)

    async def run(self) -> None:
        try:
            await (self._run() if self._went is None else self._resume(self._went))
        except Reply as reply:
            await self._reply(reply.status, reply.reason, reply.detail)
        except ProtocolError as error:  # of the client's body
            await self._reply(error.status, error.reason, error.detail)
        except TimeoutError:
            await self._reply(504, "request_timeout", "the route's request timeout has passed")
        except StreamReset as error:  # of the backend, within its response
            await self._reply(502, "upstream_reset", str(error))
        except ClientGone as error:
            self.record.broke_off("client_gone", str(error))
            self._stream.abort(str(error))
        except asyncio.CancelledError:
            self.record.broke_off("client_gone", "the connection ended")
            self._stream.abort("the connection ended")
            raise
        except Exception:
            _log.exception("request %s failed", self.record.request_id)
            await self._reply(500, "internal", "a fault of the proxy's; its log has it")
        finally:
            await self._body.close()
            self.record.bytes_in += self._body.received

    async def _reply(self, status: int, reason: str, detail: str) -> None:
        self.record.replied(status, reason, detail, whole=not self._responded)
        if self._responded:
            self._stream.abort(detail)
            return
        # What is wrong in here is the log's to tell, not for clients.
        text = f"{detail if status < 500 else reason}\n".encode()
        head = ResponseHead(status, [(b"content-type", b"text/plain; charset=utf-8")], len(text))
        if status == 503:
            head.headers.append((b"retry-after", b"1"))
        try:
            await self._send(head, text)
        except ClientGone as error:
            self.record.broke_off("client_gone", str(error))

    async def _send(self, head: ResponseHead, body: bytes) -> None:
        """Answer from here."""
        self.record.status = head.status
        self._responded = True
        await to_client(self._stream.respond(head))
        if body and self._stream.head.method != b"HEAD":
            await to_client(self._stream.write(body))
            self.record.bytes_out += len(body)
        await to_client(self._stream.finish([]))

    # --- routing --------------------------------------------------------------------------------

    async def _run(self) -> None:
        # With the rule comes what is told to backends.
        self._sent = dataclasses.replace(self._stream.head)
        selected = self._entry.select(self._stream.head, self.info, self._shared.routes)
        match = selected.match
        self.record.selected(selected)
        if match is None:
            raise Reply(404, "no_route", "no route matches")
        rule, head = match.rule, self._stream.head
        if rule.error_status is not None:
            raise Reply(
                rule.error_status, "rule_broken", "the route's rule is not whole; see its status"
            )
        if rule.cors is not None and (answer := cors.preflight(rule.cors, head)) is not None:
            await self._send(answer, b"")
            return
        if rule.redirect is not None:
            location = filters.redirect(rule.redirect, head, selected.port, match)
            await self._send(self._finished_head(location, rule, None), b"")
            return
        timeout = rule.request_timeout_s or self._shared.settings.request_timeout_s
        async with within(timeout) as self._timeout:
            await self._forward(selected, match)

    async def _forward(self, selected: Selection, match: RouteMatchResult) -> None:
        rule = match.rule
        head = filters.request(rule.filters, self._stream.head, match)
        clusters, pairing = self._shared.clusters, self.info.pairing
        backend, prefer, avoid = choose(
            match, clusters, self._stream.head, selected.prefer, pairing
        )
        if backend is None or backend.cluster is None:
            raise Reply(500, "no_backend", "the route has no valid backend for this request")
        if backend.redirect is not None:
            location = filters.redirect(backend.redirect, self._stream.head, selected.port, match)
            await self._send(self._finished_head(location, rule, backend), b"")
            return
        head = filters.request(backend.filters, head, match)
        if head.upgrade not in (None, _WEBSOCKET):
            head = dataclasses.replace(head, upgrade=None)
        self.record.backend = backend.label
        await self._attempt(head, selected, rule, backend, prefer, avoid)

    async def _attempt(
        self,
        head: RequestHead,
        selected: Selection,
        rule: CompiledRule,
        backend: CompiledBackend,
        prefer: str | None,
        avoid: Collection[str] = (),
        sent: Lease | None = None,
    ) -> None:
        """`sent`: where the request has gone already."""
        certificate = self._client_certificate()
        policies = self._shared.policies
        caller = self._entry.caller(self.record.client)
        if caller.gateway and caller.client:
            client = policies.client_of(self.info.peer[0], caller.client)
            caller = caller._replace(client=client, told=policies.told_as(client))
        self._guard = guard = Guard(policies, caller, self._sent, self.record)
        for mirror in (*rule.mirrors, *backend.mirrors):
            if filters.sampled(mirror, random.random):
                copy = dataclasses.replace(head, headers=list(head.headers))
                self._shared.mirrors.send(
                    mirror.cluster, copy, self._body, caller, certificate, guard.quiet()
                )
        attempts = Attempts(
            self._shared.clusters,
            self._stream,
            self._body,
            self.record,
            caller,
            certificate,
            guard,
            self.info.pairing.leave if self.info.pairing is not None else None,
        )
        self._forwarded = head
        attempt, response = await attempts.run(head, rule, backend, prefer, avoid, sent)
        self._propose(selected, backend, attempt.lease, response)
        await self._relay(attempt, response, rule, backend)

    # --- past the proxy ---------------------------------------------------------------------------

    def _propose(
        self, selected: Selection, backend: CompiledBackend, lease: Lease, response: ResponseHead
    ) -> None:
        """Requests like this one, to the same endpoint, may pass by the proxy from now on."""
        pairing, shared = self.info.pairing, self._shared
        if pairing is None:
            return
        if response.upgrade is not None:
            pairing.dissolve()
            return
        found = follower(
            shared.pairs,
            self._version,
            selected,
            backend,
            self._entry.caller(self.record.client),
            lease,
            self.record,
            response,
            lambda sent: partial(shared.resume, self._entry, sent),
            partial(shared.tell, self._entry, self.info),
        )
        if found is not None:
            pairing.propose(lease.stream, found)

    async def _resume(self, sent: Sent) -> None:
        """Relay the response to a request that was judged, and sent, by the kernel."""
        match = sent.selected.match
        assert match is not None
        rule = match.rule
        self._sent = self._forwarded = self._stream.head
        if isinstance(sent.lease, Reply):
            self._responded = sent.status != 0
            if sent.lease.reason == "backend_timeout":
                self._timed_out(sent.before, sent.backend)
            raise sent.lease
        elapsed = time.monotonic() - sent.started
        timeout = rule.request_timeout_s or self._shared.settings.request_timeout_s
        async with within(timeout - elapsed if timeout is not None else None) as self._timeout:
            if sent.told is not None:
                # The first attempt was made; all else is as usual.
                prefer = sent.selected.prefer
                await self._attempt(
                    self._sent, sent.selected, rule, sent.backend, prefer, sent=sent.lease
                )
                return
            limit = None
            if rule.backend_timeout_s is not None:
                limit = asyncio.get_running_loop().time() + rule.backend_timeout_s - elapsed
            attempt = Attempt(sent.lease, self._stream, self._body, limit)
            response = await self._response(attempt, sent.backend)
            self._propose(sent.selected, sent.backend, sent.lease, response)
            await self._relay(attempt, response, rule, sent.backend)

    def _timed_out(self, lease: Lease, backend: CompiledBackend) -> None:
        lease.failed("timeout")
        if not self._responded:
            metrics.UPSTREAM_FAILURES.labels(backend.label, "timeout").inc()

    async def _response(self, attempt: Attempt, backend: CompiledBackend) -> ResponseHead:
        """To a request of which nothing is known but that it was sent: it is not repeated."""
        try:
            async with until(attempt.limit):
                response = await attempt.response(self._sent, sent=True)
        except TimeoutError:  # the backend's; the request's comes as a cancellation
            self._timed_out(attempt.lease, backend)
            raise Reply(
                504, "backend_timeout", "no response in the route's backend timeout"
            ) from None
        if isinstance(response, Failure):
            metrics.UPSTREAM_FAILURES.labels(backend.label, response.reason).inc()
            raise Reply(response.status, response.reason, response.detail)
        return response

    def _client_certificate(self) -> tuple[SectionKey, CertificateSection] | None:
        key = self._entry.client_certificate
        if key is None:
            return None
        certificate = self._shared.certificates.get(key)
        if certificate is None:
            raise Reply(502, "client_certificate", f"the gateway's certificate {key} is missing")
        return key, certificate

    # --- response --------------------------------------------------------------------------------

    def _finished_head(
        self, head: ResponseHead, rule: CompiledRule, backend: CompiledBackend | None
    ) -> ResponseHead:
        """A response head with all that the route adds to it."""
        if backend is not None:
            filters.response(backend.filters, head)
        filters.response(rule.filters, head)
        if rule.cors is not None:
            cors.respond(rule.cors, self._stream.head, head)
        return head

    async def _relay(
        self, attempt: Attempt, head: ResponseHead, rule: CompiledRule, backend: CompiledBackend
    ) -> None:
        self._finished_head(head, rule, backend)
        if rule.session is not None:
            header = session.response_header(
                rule.session,
                attempt.lease.endpoint_id,
                time.time(),
                secure=self.info.tls,
                request=self._stream.head,
            )
            if header is not None:
                head.headers.append(header)
        self.record.status = head.status
        self._responded = True
        try:
            if head.upgrade is not None:
                self._timeout.reschedule(None)  # none of the route's counts any more
                await to_client(self._stream.respond(head))
                await tunnel(
                    self._stream,
                    attempt.lease,
                    self._body,
                    self.record,
                    partial(self._guard.watch, attempt.lease.endpoint, self._forwarded),
                    self._shared.settings.idle_timeout_s,
                )
            else:
                async with until(attempt.limit):
                    await self._relay_body(attempt, head)
        except TimeoutError:  # the backend's; the request's comes as a cancellation
            attempt.lease.failed("timeout")
            attempt.abandon("the response took too long")
            raise Reply(
                504, "backend_timeout", "the response did not end in the route's backend timeout"
            ) from None
        except BaseException:
            attempt.abandon("the response broke off")
            raise
        attempt.finish(head.status)

    async def _relay_body(self, attempt: Attempt, head: ResponseHead) -> None:
        stream = self._stream
        await to_client(stream.respond(head))
        while chunk := await attempt.read():
            await to_client(stream.write(chunk))
            self.record.bytes_out += len(chunk)
        await to_client(stream.finish(attempt.lease.stream.trailers))
