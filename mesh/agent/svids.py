"""The identities of this node: which it must hold, requests for them, and their renewal in time.

Which follows from the node's own workloads (and the Gateways'); keys are made here and leave this
process to the workers only. Renewed at half life; while that fails traffic goes on, and people are
warned; what has expired is taken from the workers, and connections fail closed. Knows sections and
time, no sockets.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from certs.bundle import BadBundle, Bundle
from certs.errors import NotTrusted
from certs.spiffe import BadSpiffeId, SpiffeId, gateway, parse
from certs.svid import holds, new_request
from certs.wire import MAX_REQUESTS, Answer
from mesh.agent.authority import AuthorityClient, NoAnswer
from mesh.model.meta import say_duration
from mesh.model.nodeconfig import Section, SvidSection, TrustBundleSection, WorkloadSection
from mesh.model.section import SectionKey, bundle_key, svid_key

_log = logging.getLogger("weft.agent")

# Of its life, when an SVID is renewed: nodes that started together do not ask together.
_RENEW_AT = (0.45, 0.55)
# After a failure, and twice that after another; never more than an eighth of what is left matters.
_RETRY_S = 0.25
_MAX_RETRY_S = 30.0
# Clocks are set: no timer is trusted for longer.
_MAX_WAIT_S = 60.0

# Puts and removes sections; the future is done when the workers have them in force.
Put: TypeAlias = Callable[
    [dict[SectionKey, Section], tuple[SectionKey, ...]], "asyncio.Future[None]"
]


@dataclass(slots=True)
class _Identity:
    """An identity that this node must hold. `due`: when to ask for it next; `why`: what went wrong
    the last `failures` times."""

    spiffe_id: SpiffeId
    workloads: set[SectionKey] = field(default_factory=set)
    held: SvidSection | None = None
    due: float = 0.0
    failures: int = 0
    why: str = ""


class IdentityStatus(NamedTuple):
    """For people. `workloads`: "<namespace>/<pod>"; `chain_pem` "": there is no SVID; `renewal`:
    when it is asked for next; `why`: what goes wrong, "" if nothing does."""

    spiffe_id: str
    workloads: tuple[str, ...]
    chain_pem: str
    not_after: float | None
    renewal: float
    why: str


class Svids:
    """What this node holds, kept up to date by `run`."""

    def __init__(
        self, client: AuthorityClient, trust_domain: str, now: Callable[[], float] = time.time
    ) -> None:
        self.failures: Counter[str] = Counter()
        self._client = client
        self._now = now
        self._bundles: dict[str, Bundle] = {}
        self._gateway = gateway(trust_domain)
        self._identities = {str(self._gateway): _Identity(self._gateway)}
        self._workloads: dict[SectionKey, str] = {}
        self._unreachable = ""
        self._wake = asyncio.Event()
        self._put: Put | None = None

    # --- which identities ------------------------------------------------------------------------

    def workloads_changed(
        self, put: Mapping[SectionKey, Section], remove: Iterable[SectionKey]
    ) -> None:
        """What the control plane says of workloads: those of this node need their SVIDs."""
        for key in (*remove, *put):
            section = put.get(key)
            wanted = ""
            if isinstance(section, WorkloadSection) and section.local:
                wanted = section.spiffe_id
            before = self._workloads.pop(key, "")
            if wanted:
                self._workloads[key] = wanted
            if before != wanted:
                self._no_more(before, key)
                self._want(wanted, key)

    def _want(self, spiffe_id: str, workload: SectionKey) -> None:
        if not spiffe_id:
            return
        try:
            identity = self._identities.setdefault(spiffe_id, _Identity(parse(spiffe_id)))
        except BadSpiffeId as error:
            _log.error("%s cannot have an identity: %s", workload, error)
            return
        identity.workloads.add(workload)
        self._wake.set()

    def _no_more(self, spiffe_id: str, workload: SectionKey) -> None:
        identity = self._identities.get(spiffe_id)
        if identity is None:
            return
        identity.workloads.discard(workload)
        if not identity.workloads and identity.spiffe_id != self._gateway:
            del self._identities[spiffe_id]
            if identity.held is not None:
                self._change({}, (svid_key(spiffe_id),))

    # --- the work --------------------------------------------------------------------------------

    async def run(self, put: Put) -> None:
        """For ever."""
        self._put = put
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_bundles(), name="trust bundles")
            group.create_task(self._renew(), name="SVIDs")

    def _change(
        self, put: dict[SectionKey, Section], remove: tuple[SectionKey, ...] = ()
    ) -> asyncio.Future[None]:
        assert self._put is not None
        return self._put(put, remove)

    async def _follow_bundles(self) -> None:
        have, failures = "", 0
        while True:
            try:
                answer = await self._client.bundle(have)
                bundles = {name: Bundle.from_pem(name, pem) for name, pem in answer.bundles.items()}
            except (NoAnswer, BadBundle) as error:
                self._fail(self._identities.values() if not self._bundles else (), str(error))
                self._unreachable = str(error)
                await asyncio.sleep(_pause(failures))
                failures += 1
                continue
            failures, self._unreachable = 0, ""
            if answer.tag == have:
                continue
            put: dict[SectionKey, Section] = {
                bundle_key(name): TrustBundleSection(name, one.to_pem())
                for name, one in bundles.items()
            }
            gone = tuple(bundle_key(name) for name in self._bundles.keys() - bundles.keys())
            self._bundles = bundles
            self._wake.set()
            await self._change(put, gone)
            have = answer.tag

    async def _renew(self) -> None:
        while True:
            self._wake.clear()
            now = self._now()
            self._expire(now)
            due = [one for one in self._identities.values() if one.due <= now][:MAX_REQUESTS]
            if due and self._bundles:
                await self._request(due)
                continue
            moments = [now + _MAX_WAIT_S]
            moments += [one.due for one in self._identities.values() if one.due > now]
            moments += [one.held.not_after for one in self._identities.values() if one.held]
            try:
                async with asyncio.timeout(max(0.0, min(moments) - now)):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _request(self, due: list[_Identity]) -> None:
        """Ask for these, all at once; each answer counts for itself."""
        made = [new_request(one.spiffe_id) for one in due]
        try:
            answers = await self._client.sign([csr_pem for _, csr_pem in made])
        except NoAnswer as error:
            self._fail(due, str(error))
            return
        put: dict[SectionKey, Section] = {}
        for identity, (key_pem, _), answer in zip(due, made, answers, strict=True):
            try:
                held = self._take(identity.spiffe_id, key_pem, answer)
            except NotTrusted as error:
                self._fail([identity], f"the authority's answer cannot be used: {error}")
                continue
            except NoAnswer as error:
                self._fail([identity], str(error))
                continue
            if identity.failures:
                _log.info("%s is renewed", identity.spiffe_id)
            identity.held, identity.failures, identity.why = held, 0, ""
            life = held.not_after - self._now()
            identity.due = self._now() + life * random.uniform(*_RENEW_AT)
            # Its workloads may have gone meanwhile.
            if self._identities.get(str(identity.spiffe_id)) is identity:
                put[svid_key(str(identity.spiffe_id))] = held
        if put:
            self._change(put)

    def _take(self, spiffe_id: SpiffeId, key_pem: str, answer: Answer) -> SvidSection:
        """NoAnswer: it is refused; NotTrusted: it is not what was asked for."""
        if answer.refused:
            raise NoAnswer(f"the authority refuses: {answer.refused}: {answer.why}")
        leaf = holds(answer.chain_pem, key_pem, spiffe_id, self._bundles, self._now())
        end = int(leaf.not_valid_after_utc.timestamp())
        return SvidSection(str(spiffe_id), answer.chain_pem, key_pem, end)

    def _fail(self, identities: Iterable[_Identity], why: str) -> None:
        now = self._now()
        for one in identities:
            self.failures[str(one.spiffe_id)] += 1
            if one.why != why:
                _log.warning("no new SVID for %s: %s", one.spiffe_id, why)
            one.why = why
            pause = _pause(one.failures)
            one.failures += 1
            if one.held is not None:
                pause = min(pause, max(_RETRY_S, (one.held.not_after - now) / 8))
            one.due = now + pause

    def _expire(self, now: float) -> None:
        gone = [
            one
            for one in self._identities.values()
            if one.held is not None and one.held.not_after <= now
        ]
        for one in gone:
            _log.error("the SVID of %s has expired: %s", one.spiffe_id, one.why)
            one.held = None
        if gone:
            self._change({}, tuple(svid_key(str(one.spiffe_id)) for one in gone))

    # --- what can be asked -----------------------------------------------------------------------

    @property
    def bundles(self) -> Mapping[str, Bundle]:
        """By trust domain."""
        return self._bundles

    def waiting(self) -> bool:
        """Whether some identity was never asked for yet, or the answer is outstanding."""
        return any(one.held is None and not one.failures for one in self._identities.values())

    def statuses(self) -> list[IdentityStatus]:
        return [
            IdentityStatus(
                spiffe_id,
                tuple(sorted(key.removeprefix("workload/") for key in one.workloads)),
                one.held.chain_pem if one.held else "",
                one.held.not_after if one.held else None,
                one.due,
                one.why,
            )
            for spiffe_id, one in sorted(self._identities.items())
        ]

    def degraded(self) -> list[str]:
        """What is not as it should be, with the time that is left."""
        now = self._now()
        result = [self._unreachable] if self._unreachable else []
        for one in self._identities.values():
            if not one.failures:
                continue
            if one.held is None:
                result.append(
                    f"no valid SVID for {one.spiffe_id}: its connections to other nodes are "
                    f"refused: {one.why}"
                )
            else:
                result.append(
                    f"the SVID of {one.spiffe_id} cannot be renewed, it is valid for another "
                    f"{say_duration(one.held.not_after - now)}: {one.why}"
                )
        return result


def _pause(failures: int) -> float:
    """Seconds until the next try after so many that failed before."""
    return float(min(_MAX_RETRY_S, _RETRY_S * 2 ** min(failures, 20)) * random.uniform(0.8, 1.2))
