"""The attempts of one request: endpoint after endpoint until one gives a response that stands.

What is repeated without being asked to is what RFC 9110 §9.2.2 lets a proxy repeat; what a route
asks for is GEP-1731's. Knows clusters and attempts, nothing of routes' choice or of clients.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Collection

from l7proxy import forwarding, metrics
from l7proxy.attempt import IDEMPOTENT, Attempt, Failure
from l7proxy.deadline import until
from l7proxy.entry import Reply
from l7proxy.guard import DENIED, POLICY_DENIED, Guard
from l7proxy.lease import Lease, NotAllowed
from l7proxy.message import RequestHead, ResponseHead
from l7proxy.peers import Caller, Direct, Tunnelled, caller_identity
from l7proxy.pool import DENIED_THERE, UpstreamError
from l7proxy.record import Record
from l7proxy.request_body import RequestBody
from l7proxy.routing import CompiledBackend, CompiledRule
from l7proxy.streams import ServerStream
from l7proxy.upstream import Clusters
from mesh.model.nodeconfig import CertificateSection
from mesh.model.routeconfig import Retry
from mesh.model.section import SectionKey

# How often a request is sent again although no route asks for it: where that is safe.
_SAFE_REPEATS = 2
_BACKOFF_CAP_S = 10.0
_MAX_DOUBLINGS = 16


class Attempts:
    """On behalf of `caller`; `certificate` is what TLS backends are shown; `guard` judges the
    request; `chosen` is told the id of each endpoint that it may go to."""

    def __init__(
        self,
        clusters: Clusters,
        stream: ServerStream,
        body: RequestBody,
        record: Record,
        caller: Caller,
        certificate: tuple[SectionKey, CertificateSection] | None,
        guard: Guard,
        chosen: Callable[[str], None] | None,
    ) -> None:
        self._clusters = clusters
        self._stream = stream
        self._body = body
        self._record = record
        self._caller = caller
        self._certificate = certificate
        self._guard = guard
        self._chosen = chosen

    async def run(
        self,
        head: RequestHead,
        rule: CompiledRule,
        backend: CompiledBackend,
        prefer: str | None,
        wrong: Collection[str] = (),
        sent: Lease | None = None,
    ) -> tuple[Attempt, ResponseHead]:
        """`wrong`: endpoints that it should not go to if there are others; `sent`: to where the
        request, without a body, has gone already. Reply: no endpoint gave a response that
        stands."""
        retry = rule.retry
        repeats, retries = _SAFE_REPEATS, 0
        avoid = set(wrong)
        while True:
            if sent is None:
                outcome = await self._attempt(head, rule, backend, prefer, avoid)
            else:
                first = Attempt(sent, self._stream, self._body, None)
                outcome = await self._outcome(first, head, backend, sent=True)
                sent = None
            failure = outcome if isinstance(outcome, Failure) else None
            status = outcome.status if isinstance(outcome, Failure) else outcome[1].status
            safe = failure is not None and failure.repeatable and repeats > 0
            asked = (
                retry is not None
                and retries < retry.attempts
                and (status in retry.codes or (failure is not None and failure.retryable))
            )
            if not (safe or asked) or not self._body.repeatable:
                if isinstance(outcome, Failure):
                    raise Reply(outcome.status, outcome.reason, outcome.detail)
                return outcome
            metrics.RETRIES.labels(backend.label).inc()
            if not isinstance(outcome, Failure):
                attempt, _ = outcome
                attempt.finish(status)
            # Other endpoints' kept connections may be stale as well; this one's next is a new one.
            stale = failure is not None and failure.stale
            prefer = self._record.endpoint if stale else None
            if not stale:
                avoid.add(self._record.endpoint)
            if safe:
                repeats -= 1
            elif retry is not None:
                await self._back_off(retry, retries)
                retries += 1

    async def _attempt(
        self,
        head: RequestHead,
        rule: CompiledRule,
        backend: CompiledBackend,
        prefer: str | None,
        avoid: set[str],
    ) -> tuple[Attempt, ResponseHead] | Failure:
        cluster = self._clusters.get(backend.cluster or "")
        if cluster is None:
            return Failure(503, "no_endpoints", f"{backend.label} is not known here")
        self._record.attempts += 1
        self._record.endpoint = ""
        self._record.way = None
        timeout = rule.backend_timeout_s
        limit = asyncio.get_running_loop().time() + timeout if timeout is not None else None
        attempt: Attempt | None = None
        try:
            async with until(limit):
                lease = await cluster.acquire(
                    self._caller,
                    client_certificate=self._certificate,
                    avoid=avoid,
                    prefer=prefer,
                    allows=self._guard.allowing(head),
                    chosen=self._chosen,
                )
                self._record.endpoint = lease.endpoint_id
                self._record.destination = lease.endpoint
                self._record.way = lease.way
                attempt = Attempt(lease, self._stream, self._body, limit)
                forwarded = self._guard.forward(lease.endpoint, self._told(head, lease.way))
                if forwarded is None:
                    attempt.abandon("policy refuses it")
                    return _refused()
                return await self._outcome(attempt, forwarded, backend)
        except NotAllowed:
            return _refused()
        except UpstreamError as error:
            if error.reason == DENIED_THERE:
                return _refused()
            metrics.UPSTREAM_FAILURES.labels(backend.label, error.reason).inc()
            # Nothing has been sent.
            return Failure(error.status, error.reason, str(error), retryable=True)
        except TimeoutError:
            metrics.UPSTREAM_FAILURES.labels(backend.label, "timeout").inc()
            if attempt is not None:
                attempt.lease.failed("timeout")
            return Failure(
                504,
                "backend_timeout",
                "no response in the route's backend timeout",
                retryable=attempt is None or head.method in IDEMPOTENT,
            )

    async def _outcome(
        self, attempt: Attempt, head: RequestHead, backend: CompiledBackend, *, sent: bool = False
    ) -> tuple[Attempt, ResponseHead] | Failure:
        response = await attempt.response(head, sent=sent)
        if isinstance(response, Failure):
            metrics.UPSTREAM_FAILURES.labels(backend.label, response.reason).inc()
            return response
        return attempt, response

    def _told(self, head: RequestHead, way: Direct | Tunnelled) -> RequestHead:
        """The head for this endpoint: it may ask to be told who the client is."""
        asks = way.destination is not None and way.destination.client_headers
        if not asks or self._record.encryption is not None:  # the client's node has told it
            return head
        head = dataclasses.replace(head)
        # Behind a Gateway the address stands there already.
        address = None if self._caller.gateway else self._caller.client
        forwarding.tell_client(head, address, caller_identity(way))
        return head

    async def _back_off(self, retry: Retry, retries: int) -> None:
        """Wait at least the route's backoff, doubled with every retry, jittered upwards."""
        if retry.backoff_ms:
            doubled = retry.backoff_ms / 1000 * 2 ** min(retries, _MAX_DOUBLINGS)
            wait = max(retry.backoff_ms / 1000, min(doubled, _BACKOFF_CAP_S))
            await asyncio.sleep(wait * (1 + random.random() / 4))


def _refused() -> Failure:
    metrics.POLICY.labels("request", "denied").inc()
    return Failure(403, POLICY_DENIED, DENIED)
