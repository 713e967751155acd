"""Clusters: an endpoint and a stream to it for every request.

Balances, keeps connections per endpoint and client certificate, and those to other nodes per
workload on whose behalf they are (identities never share one), goes to another endpoint when
connecting fails, and leaves failing endpoints alone for a while. Knows nothing of requests beyond
the status that `Lease.succeeded` is told.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Collection
from typing import NamedTuple

from l7proxy.balance import Allows, Balancer, Choice, Member, PoolKey
from l7proxy.connect import connect_through, connect_to
from l7proxy.fair import Shares
from l7proxy.handles import Kernel
from l7proxy.lease import Lease, NoEndpoints, NotAllowed, Overflow, TLSBroken
from l7proxy.peers import Caller, Direct, NoWay, Tunnelled
from l7proxy.pool import DENIED_THERE, ConnectFailed, Pool, Retired, UpstreamError
from l7proxy.streams import ClientConnection
from l7proxy.tls_client import ClientTLS, TLSRefused
from l7proxy.tunnel import Digger
from mesh.model.nodeconfig import CertificateSection, ClusterSection, Endpoint, Settings
from mesh.model.section import SectionKey

# Connecting is not tried at further endpoints once this many connect timeouts have passed.
_CONNECT_TIMEOUTS = 3
# Client certificates whose TLS contexts a cluster keeps.
_MAX_IDENTITIES = 8
_NOBODY = Caller()


# Gateway errors speak of the endpoint's health; a 500 may be the request's fault.
_GATEWAY_ERRORS = frozenset((502, 503, 504))


class ClusterStats(NamedTuple):
    """`connections`: open ones, the `idle` included; `pending`: requests that wait for one;
    `ejected`: endpoints."""

    connections: int = 0
    idle: int = 0
    pending: int = 0
    ejected: int = 0

    def plus(self, other: ClusterStats) -> ClusterStats:
        return ClusterStats(*map(sum, zip(self, other, strict=True)))


class Clusters:
    """The clusters in force, by section key."""

    def __init__(
        self,
        settings: Settings,
        kernel: Kernel | None = None,
        digger: Digger | None = None,
    ) -> None:
        self.settings = settings
        self._kernel = kernel or Kernel()
        self._digger = digger
        self._clusters: dict[SectionKey, Cluster] = {}

    def put(self, key: SectionKey, section: ClusterSection, *, label: str | None = None) -> None:
        """`label`: its name in statistics, the key by default. TLSRefused: its TLS cannot be put in
        force."""
        cluster = self._clusters.get(key)
        if cluster is None:
            self._clusters[key] = Cluster(
                key,
                section,
                lambda: self.settings,
                kernel=self._kernel,
                digger=self._digger,
                label=label or key,
            )
        else:
            cluster.replace(section)

    def remove(self, key: SectionKey) -> None:
        if (cluster := self._clusters.pop(key, None)) is not None:
            cluster.close()

    def get(self, key: SectionKey) -> Cluster | None:
        return self._clusters.get(key)

    def stats(self) -> dict[str, ClusterStats]:
        """Of the clusters that have anything to tell, by label; most of thousands have not."""
        stats: dict[str, ClusterStats] = {}
        for cluster in self._clusters.values():
            if cluster.in_use:
                before = stats.get(cluster.label)
                own = cluster.stats()
                stats[cluster.label] = own if before is None else own.plus(before)
        return stats

    def close(self) -> None:
        """Close what is idle; connections in use close when their streams have ended."""
        for key in tuple(self._clusters):
            self.remove(key)


class Cluster:
    """The endpoints of one backend."""

    def __init__(
        self,
        key: SectionKey,
        section: ClusterSection,
        settings: Callable[[], Settings],
        *,
        kernel: Kernel | None = None,
        digger: Digger | None = None,
        label: str = "",
    ) -> None:
        self.key = key
        self.label = label or key
        self.http2 = section.protocol == "h2c"
        self._settings = settings
        self._kernel = kernel or Kernel()
        self._digger = digger or Digger.alone(settings())
        self._peers = self._digger.peers
        # Asking for it costs a system call (Python before 3.12).
        self._loop = asyncio.get_running_loop()
        self._pending = Shares(section.max_pending)
        self._balancer = Balancer()
        self._pools: set[Pool] = set()
        self._section = section
        self._tls = _checked_tls(key, section)
        self._balancer.update(section.endpoints)

    def replace(self, section: ClusterSection) -> None:
        """Put another section in force; endpoints that stay keep their connections unless TLS or
        the protocol has changed."""
        before = self._section
        same = (before.tls, before.protocol) == (section.tls, section.protocol)
        if not same:
            self._tls = _checked_tls(self.key, section)
        self._section = section
        self.http2 = section.protocol == "h2c"
        gone = self._balancer.update(section.endpoints if same else ())
        if not same:  # what is known of endpoints' health may be TLS's fault
            self._balancer.update(section.endpoints)
        for member in gone:
            _retire(member)
        self._pending.limit = section.max_pending
        for pool in self._pools:
            pool.set_limit(section.max_connections_per_endpoint)

    def close(self) -> None:
        for member in self._balancer.update(()):
            _retire(member)

    def has(self, endpoint: str) -> bool:
        """`endpoint` is the id of one of the endpoints in force."""
        return endpoint in self._balancer.members

    @property
    def endpoints(self) -> int:
        return len(self._balancer.members)

    @property
    def in_use(self) -> bool:
        return bool(self._pools or self._pending.taken or self._balancer.ejected)

    def stats(self) -> ClusterStats:
        return ClusterStats(
            connections=sum(pool.connections for pool in self._pools),
            idle=sum(pool.idle for pool in self._pools),
            pending=self._pending.taken,
            ejected=len(self._balancer.ejected),
        )

    def count_answer(self, member: Member, status: int) -> None:
        """It has answered: 502, 503 and 504 count toward its ejection."""
        if status in _GATEWAY_ERRORS:
            self.count_failure(member)
        else:
            member.failures = 0

    def count_failure(self, member: Member) -> None:
        self._balancer.failed(member, self._loop.time(), self._settings())

    # --- leases -----------------------------------------------------------------------------------

    async def acquire(
        self,
        caller: Caller = _NOBODY,
        *,
        client_certificate: tuple[SectionKey, CertificateSection] | None = None,
        avoid: Collection[str] = (),
        prefer: str | None = None,
        allows: Allows | None = None,
        chosen: Callable[[str], None] | None = None,
    ) -> Lease:
        """A stream to an endpoint, on behalf of `caller`. `avoid`: ids of endpoints to use only if
        there are no others; `prefer`: the id of the one to use if it is there and healthy;
        `allows`: those to which it says no are not used; `chosen` is told the id of each that is
        asked for a connection.

        Connecting that fails goes on at another endpoint until all were tried. How long to wait is
        the caller's to bound, by cancelling. NoEndpoints, NotAllowed, Overflow, TLSBroken,
        ConnectFailed (the last one).
        """
        choice = Choice(self._balancer, self._settings(), avoid, prefer, allows, chosen)
        member = choice.next(self._loop.time())
        if member is None:
            if choice.refused:
                raise NotAllowed
            raise NoEndpoints(f"{self.key} has no ready endpoints")
        certificate = client_certificate[1] if client_certificate is not None else None
        way = self._peers.way(caller, *member.target, pod=bool(member.endpoint.name))
        if not isinstance(way, NoWay):
            pool = self._pool(member, caller, way, certificate)
            if (stream := pool.take(caller.client)) is not None:
                member.load += 1
                return Lease(self, member, pool, stream, way, reused=True)
        return await self._acquire_slowly(member, caller, certificate, choice)

    async def _acquire_slowly(
        self,
        member: Member | None,
        caller: Caller,
        certificate: CertificateSection | None,
        choice: Choice,
    ) -> Lease:
        settings = self._settings()
        loop = self._loop
        patience = loop.time() + _CONNECT_TIMEOUTS * settings.connect_timeout_s
        failure: UpstreamError = NoEndpoints(f"{self.key} has no endpoints any more")
        if not self._pending.may_take(caller.client):
            raise Overflow(self._pending.limit)
        self._pending.take(caller.client)
        try:
            while member is not None:
                member.load += 1
                try:
                    way = await self._peers.settled_way(
                        caller,
                        *member.target,
                        settings.connect_timeout_s,
                        pod=bool(member.endpoint.name),
                    )
                    if isinstance(way, NoWay):
                        raise ConnectFailed(member.id, way.reason, way.why)
                    pool = self._pool(member, caller, way, certificate)
                    stream, reused = await pool.wait(caller.client)
                    return Lease(self, member, pool, stream, way, reused=reused)
                except ConnectFailed as error:
                    member.load -= 1
                    failure = error
                    choice.tried.add(member.id)
                    if loop.time() >= patience:
                        break
                except Retired:
                    member.load -= 1
                except BaseException:
                    member.load -= 1
                    raise
                member = choice.next(loop.time())
        finally:
            self._pending.give(caller.client)
        raise failure

    def any_endpoint(self) -> Endpoint | None:
        return next((one.endpoint for one in self._balancer.members.values()), None)

    def choose(self, prefer: str | None) -> Member | None:
        """An endpoint for a request, as `acquire` begins; None: there is none."""
        return self._balancer.pick(self._loop.time(), self._settings(), prefer=prefer)

    def _pool(
        self,
        member: Member,
        caller: Caller,
        way: Direct | Tunnelled,
        certificate: CertificateSection | None,
    ) -> Pool:
        key = pool_key(way, certificate)
        return member.pools.get(key) or self._new_pool(member, key, caller, certificate)

    # --- connecting -------------------------------------------------------------------------------

    def _new_pool(
        self,
        member: Member,
        key: PoolKey,
        caller: Caller,
        certificate: CertificateSection | None,
    ) -> Pool:
        tls = self._client_tls(certificate)
        http2 = self.http2
        source = key[0] if isinstance(key, tuple) else None

        async def connect(
            on_change: Callable[[ClientConnection], None],
        ) -> tuple[ClientConnection, select.poll]:
            if source is None:
                return await connect_to(
                    member, tls, self._settings(), self._kernel, on_change, http2=http2
                )
            return await connect_through(
                self._digger, caller, source, member, tls, self._settings(), on_change, http2=http2
            )

        def on_failure(error: ConnectFailed) -> None:
            if error.reason != DENIED_THERE:  # of the client, not of the endpoint
                self.count_failure(member)

        def on_empty() -> None:
            self._pools.discard(pool)
            if member.pools.get(key) is pool:
                del member.pools[key]

        pool = Pool(
            connect,
            endpoint=member.id,
            limit=self._section.max_connections_per_endpoint,
            shared=http2,
            on_failure=on_failure,
            on_empty=on_empty,
        )
        member.pools[key] = pool
        self._pools.add(pool)
        return pool

    def _client_tls(self, certificate: CertificateSection | None) -> ClientTLS | None:
        """TLSBroken: TLS is asked for and cannot be had."""
        section = self._section
        if section.tls is None:
            if section.protocol == "wss":
                raise TLSBroken(f"{self.key} is wss, but no BackendTLSPolicy says whom to trust")
            return None
        if section.tls.broken is not None:
            raise TLSBroken(section.tls.broken)
        tls = self._tls.get(certificate)
        if tls is None:
            try:
                tls = ClientTLS(section.tls, certificate, http2=self.http2)
            except TLSRefused as error:
                raise TLSBroken(f"{self.key}: {error}") from None
            if len(self._tls) >= _MAX_IDENTITIES:
                self._tls = {None: self._tls[None]}  # certificates rotate
            self._tls[certificate] = tls
        return tls


def pool_key(way: Direct | Tunnelled, certificate: CertificateSection | None) -> PoolKey:
    """Under which name a member has the connections that are made so."""
    return certificate if isinstance(way, Direct) else (way.source, certificate)


def _retire(member: Member) -> None:
    for pool in tuple(member.pools.values()):
        pool.retire()
    member.pools.clear()


def _checked_tls(
    key: SectionKey, section: ClusterSection
) -> dict[CertificateSection | None, ClientTLS]:
    """The cluster's TLS without a client certificate, where there is one."""
    if section.tls is None or section.tls.broken is not None:
        return {}
    try:
        return {None: ClientTLS(section.tls, None, http2=section.protocol == "h2c")}
    except TLSRefused as error:
        raise TLSRefused(f"{key}: {error}") from None
