"""Copies of requests for mirrors (HTTPRequestMirrorFilter): sent beside the request, answers
ignored. Mirrors are bounded in number, time and memory, and never delay the request."""

from __future__ import annotations

import asyncio

from l7proxy import metrics
from l7proxy.guard import Guard
from l7proxy.lease import NotAllowed
from l7proxy.message import Framing, ProtocolError, RequestHead
from l7proxy.peers import Caller
from l7proxy.pool import UpstreamError
from l7proxy.request_body import MirrorFeed, RequestBody
from l7proxy.streams import ClientStream, StreamReset
from l7proxy.tasks import spawn
from l7proxy.upstream import Clusters
from mesh.model.nodeconfig import CertificateSection
from mesh.model.section import SectionKey

_MAX_RUNNING = 1024
_DEADLINE_S = 30.0


class Mirrors:
    """The mirrored requests of a worker."""

    def __init__(self, clusters: Clusters) -> None:
        self._clusters = clusters
        self._running = 0

    def send(
        self,
        cluster: SectionKey,
        head: RequestHead,
        body: RequestBody,
        caller: Caller,
        client_certificate: tuple[SectionKey, CertificateSection] | None,
        guard: Guard,
    ) -> None:
        """Mirror a request whose body has not been read yet; `head` is the mirror's own copy. It
        goes only where `guard` lets it."""
        if self._running >= _MAX_RUNNING:
            metrics.MIRRORED.labels(cluster, "overflow").inc()
            return
        head.expect_continue = False
        head.upgrade = None
        feed = body.feed() if head.body is not Framing.NONE else None
        self._running += 1
        run = self._run(cluster, head, feed, caller, client_certificate, guard)
        spawn(run, name=f"mirror to {cluster}")

    async def _run(
        self,
        key: SectionKey,
        head: RequestHead,
        feed: MirrorFeed | None,
        caller: Caller,
        certificate: tuple[SectionKey, CertificateSection] | None,
        guard: Guard,
    ) -> None:
        outcome = "failed"
        try:
            async with asyncio.timeout(_DEADLINE_S):
                outcome = await self._exchange(key, head, feed, caller, certificate, guard)
        except (StreamReset, ProtocolError, UpstreamError, TimeoutError):
            pass
        finally:
            self._running -= 1
            metrics.MIRRORED.labels(key, outcome).inc()

    async def _exchange(
        self,
        key: SectionKey,
        head: RequestHead,
        feed: MirrorFeed | None,
        caller: Caller,
        certificate: tuple[SectionKey, CertificateSection] | None,
        guard: Guard,
    ) -> str:
        cluster = self._clusters.get(key)
        if cluster is None:
            return "no_endpoints"
        allows = guard.allowing(head)
        try:
            lease = await cluster.acquire(caller, client_certificate=certificate, allows=allows)
        except NotAllowed:
            return "denied"
        try:
            forwarded = guard.forward(lease.endpoint, head)
            if forwarded is None:
                return "denied"
            await lease.stream.request(forwarded)
            if feed is not None and not await _send_body(lease.stream, feed):
                return "cut_off"
            while (await lease.stream.response()).status < 200:
                pass
            while await lease.stream.read():
                pass
            return "sent"
        finally:
            lease.stream.abort("mirror")
            lease.release()


async def _send_body(stream: ClientStream, feed: MirrorFeed) -> bool:
    while chunk := await feed.get():
        await stream.write(chunk)
    if chunk is None:
        return False
    await stream.finish(feed.trailers)
    return True
