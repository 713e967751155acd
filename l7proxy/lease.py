"""A stream to an endpoint for one request, and why there may be none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from l7proxy.balance import Member
from l7proxy.peers import Direct, Tunnelled
from l7proxy.pool import Pool, UpstreamError
from l7proxy.streams import ClientStream
from mesh.model.nodeconfig import Endpoint

if TYPE_CHECKING:
    from l7proxy.upstream import Cluster


class NoEndpoints(UpstreamError):
    def __init__(self, why: str) -> None:
        super().__init__("no_endpoints", why)


class Overflow(UpstreamError):
    def __init__(self, limit: int) -> None:
        super().__init__(
            "max_pending",
            f"too many requests already wait for a connection: {limit} at most, and of one client "
            "no more than there is room for beside them",
        )


class NotAllowed(UpstreamError):
    """There are endpoints, and policy lets the request go to none of them."""

    status = 403

    def __init__(self) -> None:
        super().__init__("policy_denied", "access denied")


class TLSBroken(UpstreamError):
    status = 502

    def __init__(self, why: str) -> None:
        super().__init__("tls_broken", why)


class Lease:
    """A stream to an endpoint, for one request. `reused`: its connection served others before;
    `way`: how it was made."""

    __slots__ = ("_cluster", "_held", "_member", "_pool", "reused", "stream", "way")

    def __init__(
        self,
        cluster: Cluster,
        member: Member,
        pool: Pool,
        stream: ClientStream,
        way: Direct | Tunnelled,
        *,
        reused: bool,
    ) -> None:
        self.stream = stream
        self.way = way
        self.reused = reused
        self._cluster = cluster
        self._member = member
        self._pool = pool
        self._held = True

    @property
    def endpoint_id(self) -> str:
        return self._member.id

    @property
    def endpoint(self) -> Endpoint:
        return self._member.endpoint

    @property
    def pool(self) -> object:
        """Whose connections requests like this one go over."""
        return self._pool

    @property
    def ejected(self) -> bool:
        """The endpoint is left alone for a while."""
        return self._member.ejected

    @property
    def endpoints(self) -> int:
        """How many there are to choose from."""
        return self._cluster.endpoints

    def again(self, stream: ClientStream) -> Lease:
        """For a further stream of its connection."""
        self._member.load += 1
        way = self.way
        return Lease(self._cluster, self._member, self._pool, stream, way, reused=True)

    def succeeded(self, status: int) -> None:
        """The endpoint answered: 502, 503 and 504 count toward its ejection."""
        self._cluster.count_answer(self._member, status)

    def failed(self, kind: str) -> None:
        """The endpoint did not answer as it should: "reset", "timeout", "protocol"."""
        if kind == "reset" and self.reused:
            # Most likely the endpoint closed idle connections, and the others are gone as well.
            self._pool.close_idle()
            if not self._cluster.http2:
                return
        self._cluster.count_failure(self._member)

    def release(self) -> None:
        """The request is done with the endpoint. Idempotent; the connection is kept by itself once
        the stream has ended."""
        if self._held:
            self._held = False
            self._member.load -= 1
