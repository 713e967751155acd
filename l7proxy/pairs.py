"""Requests and responses that pass by the proxy: which ones may, and for how long.

After a request of a workload to a workload of this node the sockets at both far ends are offered to
the kernel as a pair (`pairing`). This module decides whether, by the automaton's plan of the
destination, and takes pairs back when something has changed that they were decided by: each
connection's next request comes to the proxy, and what is right then is offered anew. It looks after
pairs now and then: what takes too long is given up. Knows sections, no sockets.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from bpf.constants import LARGE_PAIRS, LARGE_RESPONSE_MAX, RESPONSE_HEAD_MAX, RESPONSE_MAX
from l7proxy.automaton_plan import HttpRules, Plan, plan
from l7proxy.changes import Changes
from l7proxy.entry import Selection
from l7proxy.handles import Kernel
from l7proxy.held import Allowed
from l7proxy.holdoff import HoldOff
from l7proxy.pairing import Pairing
from l7proxy.peers import Caller, Direct, Peers, Tunnelled
from l7proxy.policies import Asker, Policies
from l7proxy.route_compile import NO_ROUTE
from l7proxy.routing import CompiledRule, RouteIndex
from l7proxy.schedule import Schedule
from l7proxy.series import Series
from l7proxy.series_room import SeriesRoom
from l7proxy.streams import ConnectionInfo
from l7proxy.tasks import spawn
from mesh.model.nodeconfig import Endpoint, Section, Settings
from mesh.model.section import SectionKey

# How often pairs are looked after, in seconds: four times in the shortest timeout of a request.
# Each look takes some 10 µs.
_LOOK_S, _LEAST_LOOK_S = 0.25, 0.01
_FOR_EVER_NS = 2**63
# As the proxy answers.
_REQUEST_LATE = 504, "request_timeout", "the route's request timeout has passed"
_BACKEND_LATE = 504, "backend_timeout", "no response in the route's backend timeout"


class Refusal(NamedTuple):
    """Why requests do not pass by the proxy."""

    why: str


class Pairs:
    """Those of a worker."""

    def __init__(
        self,
        kernel: Kernel,
        routes: RouteIndex,
        policies: Policies,
        peers: Peers,
        room: SeriesRoom,
    ) -> None:
        self.settings = Settings()
        self.changes = Changes()
        # By client and endpoint id: whose responses the kernel leaves to the proxy.
        self.handed = HoldOff()
        self._kernel = kernel
        self._routes = routes
        self._policies = policies
        self._peers = peers
        self._room = room
        self._open: set[Pairing] = set()
        self._large: set[Pairing] = set()  # as in Pairing
        self._schedule = Schedule(self._look)
        self._plans: dict[tuple[str, HttpRules, HttpRules], Plan] = {}
        self._settling: asyncio.Task[None] | None = None

    def pairing(self, info: ConnectionInfo) -> Pairing | None:
        """For a new connection over HTTP/1.1; None: its requests all go through the proxy."""
        steered, handles = info.steered, self._kernel.handles
        if not self.settings.http_in_kernel or steered is None or not steered.cookie:
            return None
        if handles is None or info.tls:
            return None
        made = self.changes, self._opened, self._closed, self._settled
        return Pairing(handles, steered.cookie, *made)

    def changed(self, made_ns: int, sections: Iterable[tuple[SectionKey, Section]]) -> None:
        """Another configuration is in force: requests that were decided by one of these, as it was
        or is, come to the proxy again."""
        self.changes.note(made_ns, sections)
        self._plans.clear()
        for pairing in tuple(self._open):
            pairing.changed()

    def allowed(
        self,
        selected: Selection,
        rule: CompiledRule,
        caller: Caller,
        way: Direct | Tunnelled,
        endpoint: Endpoint,
        series: Series,
        *,
        length: int,
    ) -> Allowed | Refusal:
        """What may follow a request that went to `endpoint` and was answered with so many bytes.
        `series`: what is known but for policies."""
        if not self.settings.http_in_kernel:
            return Refusal("they are to go through the proxy")
        if not isinstance(way, Direct) or way.destination is None or not way.destination.local:
            return Refusal("the endpoint is no workload of this node")
        if way.destination.client_headers:
            return Refusal("the endpoint is told who its clients are")
        expires_ns = self._expiry_ns(caller, way)
        if isinstance(expires_ns, Refusal):
            return expires_ns
        asker = self._policies.asker(caller)
        asked = self._policies.for_kernel(asker, endpoint.address, endpoint.port, pod=True)
        if asked is None:
            return Refusal("a policy refuses, mends or tells of requests")
        match = selected.match
        if match is None:
            return Refusal("no rule was selected")
        found = self._plan(selected.listener if match.route is not NO_ROUTE else "", *asked)
        egress, ingress = map(found.list_of, asked)
        if egress is None or ingress is None:
            return Refusal("a policy's rules are not in the kernel")
        number = 1
        if match.route is not NO_ROUTE:
            name = match.route, rule.index
            numbers = (
                number
                for number, one in enumerate(found.rules, 1)
                if (one.result.route, one.result.rule.index) == name
            )
            number = next(numbers, 0)
            if not number:
                return Refusal("the rule is not in the kernel")
        if why := found.rules[number - 1].why:
            return Refusal(why)
        counted = self._room.number(self._with_policies(series, asker, endpoint, asked))
        if counted is None:
            return Refusal("there is no room to count them")
        times = (
            (rule.request_timeout_s or self.settings.request_timeout_s, _REQUEST_LATE),
            (rule.backend_timeout_s, _BACKEND_LATE),
        )
        limits = [(seconds, late) for seconds, late in times if seconds is not None]
        return Allowed(
            found.generation,
            egress,
            ingress,
            number,
            expires_ns,
            counted,
            self._response_max(length),
            *min(limits, default=(None, _REQUEST_LATE)),
        )

    def _with_policies(
        self,
        series: Series,
        asker: Asker,
        endpoint: Endpoint,
        asked: tuple[HttpRules, HttpRules],
    ) -> Series:
        always = self._policies.unasked(asker, endpoint.address, endpoint.port, pod=True)
        egress, ingress = (
            (one or "", *(rule.source for rule in rules))
            for one, rules in zip(always, asked, strict=True)
        )
        return msgspec.structs.replace(series, egress=egress, ingress=ingress)

    def _response_max(self, length: int) -> int:
        """A few connections may have long responses, if they have had some."""
        large = RESPONSE_MAX // 2 < length <= LARGE_RESPONSE_MAX - RESPONSE_HEAD_MAX
        return LARGE_RESPONSE_MAX if large and len(self._large) < LARGE_PAIRS else RESPONSE_MAX

    def _expiry_ns(self, caller: Caller, way: Direct) -> int | Refusal:
        """Until when, by CLOCK_MONOTONIC, both ends have valid identities."""
        if not self._peers.has_authority:
            return _FOR_EVER_NS
        workload = self._peers.at(caller.client)
        ends = (workload, way.destination)
        if any(one is None or not one.spiffe_id for one in ends):
            return Refusal("one end has no identity")
        until = min(self._peers.credentials.until(one.spiffe_id) for one in ends if one is not None)
        left = until - time.time()
        if left <= 0:
            return Refusal("one end's certificate is not valid")
        return time.monotonic_ns() + int(left * 1e9)

    def _plan(self, listener: str, egress: HttpRules, ingress: HttpRules) -> Plan:
        key = listener, egress, ingress
        found = self._plans.get(key)
        if found is None:
            found = plan(listener, self._routes, (egress, ingress), self.settings)
            self._plans[key] = found
        return found

    async def _settled(self) -> None:
        """One wait is for all that have begun to wait before it."""
        if self._settling is None:
            self._settling = spawn(self._settle(), name="settle")
        await asyncio.shield(self._settling)

    async def _settle(self) -> None:
        handles = self._kernel.handles
        await asyncio.sleep(0)
        self._settling = None
        if handles is not None:
            await asyncio.to_thread(handles.settle)

    # --- looking after ----------------------------------------------------------------------------

    def _opened(self, pairing: Pairing) -> None:
        self._open.add(pairing)
        self._large.discard(pairing)
        if pairing.large:
            self._large.add(pairing)
        self._look_again(pairing)

    def _closed(self, pairing: Pairing) -> None:
        self._open.discard(pairing)
        self._large.discard(pairing)
        self._schedule.drop(pairing)

    def _look(self, pairing: Pairing) -> None:
        try:
            pairing.look(self.settings.body_timeout_s)
        finally:
            if pairing in self._open:
                self._look_again(pairing)

    def _look_again(self, pairing: Pairing) -> None:
        timeout_s = pairing.timeout_s
        seconds = _LOOK_S if timeout_s is None else min(timeout_s / 4, _LOOK_S)
        self._schedule.within(pairing, max(seconds, _LEAST_LOOK_S))
