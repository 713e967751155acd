"""What the fast lanes of a worker share: the automata of destinations, and what is known of ends.

A destination's automaton is compiled in a thread once enough requests could have used it; until
then, and where there is none (too many rules, no C compiler), the exchange serves. All of it
follows from the sections in force, and is found anew when any has changed. Knows sections, no
sockets.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from l7proxy import native
from l7proxy.automaton import compile_rules
from l7proxy.automaton_plan import HttpRules, Plan, plan
from l7proxy.balance import Member, PoolKey
from l7proxy.entry import Entry, Selection, Standing
from l7proxy.lane import Lane
from l7proxy.peers import Caller, Direct, NoWay, Tunnelled
from l7proxy.route_compile import CompiledBackend, CompiledRule
from l7proxy.streams import ConnectionInfo
from l7proxy.tasks import spawn
from l7proxy.upstream import pool_key
from mesh.model.nodeconfig import Settings

if TYPE_CHECKING:
    from l7proxy.exchange import Exchanges
    from l7proxy.peers import Peers
    from l7proxy.record import Record

_log = logging.getLogger("weft.lanes")

# Requests that an automaton could have judged before it is compiled (50 ms of a thread), and
# matches of a destination beyond which it is not.
WORTH = 32
_MATCHES = 256
# Automata that are kept.
_TABLES = 64

# What the two ends' policies ask of requests.
Asked: TypeAlias = tuple[HttpRules, HttpRules]
_NOTHING: Asked = ((), ())
# A request's rule, its backend, status, and the policy rules that let it pass.
Kind: TypeAlias = tuple["Chosen", str, int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What a request gets. `only`: the rule's backend where there is one; `timeout_s`: how long
    it may take, with its response."""

    selection: Selection
    rule: CompiledRule
    only: CompiledBackend | None
    timeout_s: float | None


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """A client and an endpoint. `key`: of the connections between them; `client`: among whose
    requests they are shared; `told`: the client's address; `asked`: by policies, and `unasked`:
    those that let all requests pass; `until`, by time.monotonic: the identities are valid;
    `records`: of requests that were answered, by what they have in common with others."""

    way: Direct | Tunnelled
    key: PoolKey
    client: str
    told: str
    asked: Asked
    unasked: tuple[str | None, str | None]
    until: float
    records: dict[Kind, Record] = field(default_factory=dict)

    def policy(self, egress: int, ingress: int) -> str:
        """What record.policy is, as the policy rules of these numbers let the request pass."""
        (first, second), (outer, inner) = self.unasked, self.asked
        if egress:
            first = outer[egress - 1].source
        if ingress:
            second = inner[ingress - 1].source
        return second or first or ""


class Aim:
    """A destination's automaton, with what a connection's requests have in common."""

    def __init__(
        self,
        standing: Standing,
        caller: Caller,
        asked: Asked,
        planned: Plan,
        table: native.Table,
        settings: Settings,
    ) -> None:
        self._settings = settings
        self.standing = standing
        self.caller = caller
        self.asked = asked
        lists = [planned.list_of(one) or 0 for one in asked]
        self.adds = standing.adds
        self.requests = native.Requests(table, *lists, told=bool(standing.adds))
        self._plan = planned
        self._chosen: dict[int, Chosen] = {}

    def chosen(self, number: int) -> Chosen | None:
        """Of the rule of this number; None: each attempt at a backend has a timeout of its own."""
        found = self._chosen.get(number)
        if found is None:
            selection = self.standing.selection
            match = selection.match or self._plan.rules[number - 1].result
            if match.rule.backend_timeout_s is not None:
                return None
            backends = match.rule.backends
            only = backends[0] if len(backends) == 1 and backends[0].weight else None
            timeout_s = match.rule.request_timeout_s or self._settings.request_timeout_s
            found = Chosen(selection._replace(match=match), match.rule, only, timeout_s)
            self._chosen[number] = found
        return found


class Lanes:
    """Those of a worker."""

    def __init__(self, exchanges: Exchanges, peers: Peers) -> None:
        self.version = 0  # of all that is remembered
        self.exchanges = exchanges
        self.clusters = exchanges.clusters
        self.log = exchanges.log
        self.flows = exchanges.flows
        self.responses: native.Responses
        self._peers = peers
        self._policies = exchanges.policies
        missing = native.available()
        if missing:
            _log.warning("requests take longer: %s", missing)
        self._available = not missing
        self._plans: dict[tuple[str, Asked], Plan | None] = {}
        self._tables: dict[int, native.Table] = {}
        self._wanted: dict[int, int] = {}  # requests, by generation
        self._compiling: asyncio.Task[None] | None = None
        self.changed(Settings())

    def changed(self, settings: Settings) -> None:
        """Something in force has changed."""
        self.version += 1
        self._settings = settings
        self._plans.clear()
        if self._available:
            self.responses = native.Responses(settings.max_head_bytes, settings.max_headers)

    def lane(self, entry: Entry, info: ConnectionInfo) -> Lane | None:
        """For a new connection over HTTP/1.1; None: its requests are all the exchange's."""
        if not self._available or self._settings.max_requests_per_connection is not None:
            return None
        if not entry.by_host and entry.standing(info, b"", self._settings) is None:
            return None
        return Lane(self, entry, info)

    # --- destinations -----------------------------------------------------------------------------

    def aim(
        self, entry: Entry, info: ConnectionInfo, authority: bytes, asked: Asked | None = None
    ) -> Aim | None:
        """What requests of a connection are judged by, if policies ask for this (None: for what
        those of some endpoint ask); None: there is no automaton (yet)."""
        standing = entry.standing(info, authority, self._settings)
        if standing is None:
            return None
        caller = entry.caller(standing.client)
        if caller.gateway and caller.client:
            client = self._policies.client_of(info.peer[0], caller.client)
            caller = caller._replace(client=client, told=self._policies.told_as(client))
        if asked is None:
            asked = self._guess(standing, caller)
        match = standing.selection.match
        planned = self._plan(standing.selection.listener if match is None else "", asked)
        if planned is None:
            return None
        if match is not None and not _straight(match.rule):
            return None
        table = self._table(planned)
        if table is None:
            return None
        return Aim(standing, caller, asked, planned, table, self._settings)

    def _guess(self, standing: Standing, caller: Caller) -> Asked:
        selection = standing.selection
        if selection.match is not None:
            rules = [selection.match.rule]
        else:
            placed = self.exchanges.routes.placed(selection.listener)
            rules = [match.result.rule for _, match in itertools.islice(placed, 1)]
        for rule in rules:
            for backend in rule.backends[:1]:
                cluster = self.clusters.get(backend.cluster or "")
                endpoint = cluster.any_endpoint() if cluster is not None else None
                if endpoint is not None:
                    asker, pod = self._policies.asker(caller), bool(endpoint.name)
                    address, port = endpoint.address, endpoint.port
                    return self._policies.for_kernel(asker, address, port, pod=pod) or _NOTHING
        return _NOTHING

    def end(self, aim: Aim, member: Member, entry: Entry, info: ConnectionInfo) -> End | None:
        """Of an endpoint; None: the exchange has to look at its requests."""
        caller, endpoint = aim.caller, member.endpoint
        certificate = None
        if entry.client_certificate is not None:
            certificate = self.exchanges.certificates.get(entry.client_certificate)
            if certificate is None:
                return None
        pod = bool(endpoint.name)
        way = self._peers.way(caller, *member.target, pod=pod)
        if isinstance(way, NoWay):
            return None
        workload = way.destination
        if workload is not None and workload.client_headers:
            return None
        until = self._until(caller, way)
        if info.pairing is not None and workload is not None and workload.local:
            left = self.exchanges.pairs.handed.left((caller.client, member.id))
            if not left:
                return None  # soon they need not come here at all
            until = min(until, time.monotonic() + left)
        asker = self._policies.asker(caller)
        asked = self._policies.for_kernel(asker, endpoint.address, endpoint.port, pod=pod)
        if asked is None:
            return None
        if asked == aim.asked:  # so that lanes see it at once
            asked = aim.asked
        unasked = self._policies.unasked(asker, endpoint.address, endpoint.port, pod=pod)
        if any(one is None and not rules for one, rules in zip(unasked, asked, strict=True)):
            return None
        key = pool_key(way, certificate)
        return End(way, key, caller.client, aim.standing.client, asked, unasked, until)

    def _until(self, caller: Caller, way: Direct | Tunnelled) -> float:
        """Until when the way is the one that it is."""
        identities = {way.spiffe_id} if isinstance(way, Direct) else {way.source.spiffe_id}
        if way.destination is not None:
            identities.add(way.destination.spiffe_id)
        now = time.time()
        ends = [self._peers.credentials.until(one) for one in identities if one]
        left = min((one - now for one in ends if one > now), default=float("inf"))
        return time.monotonic() + left

    # --- automata ---------------------------------------------------------------------------------

    def _plan(self, listener: str, asked: Asked) -> Plan | None:
        key = listener, asked
        if key not in self._plans:
            self._plans[key] = self._planned(listener, asked)
        return self._plans[key]

    def _planned(self, listener: str, asked: Asked) -> Plan | None:
        routes = self.exchanges.routes
        matches = sum(1 for _ in itertools.islice(routes.placed(listener), _MATCHES))
        held = sum(len(rule.http or ()) for rules in asked for rule in rules)
        if matches + held >= _MATCHES:
            return None
        return plan(listener, routes, asked, self._settings)

    def _table(self, planned: Plan) -> native.Table | None:
        generation = planned.generation
        table = self._tables.pop(generation, None)
        if table is not None:
            self._tables[generation] = table  # used last
            return table
        self._wanted[generation] = wanted = self._wanted.get(generation, 0) + 1
        if wanted >= WORTH and self._compiling is None:
            self._compiling = spawn(self._compile(planned), name="compile an automaton")
        return None

    async def _compile(self, planned: Plan) -> None:
        try:
            automaton = await asyncio.to_thread(
                compile_rules, planned.ordered, planned.limits, planned.generation
            )
        finally:
            self._compiling = None
            self._wanted.clear()
        while len(self._tables) >= _TABLES:
            del self._tables[next(iter(self._tables))]
        self._tables[planned.generation] = native.Table(automaton.table)


def _straight(rule: CompiledRule) -> bool:
    """What no route is about: its backends as they are."""
    return bool(rule.total_weight) and all(one.cluster is not None for one in rule.backends)
