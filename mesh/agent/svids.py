"""The identities of this node: which it must hold, requests for them, and their renewal in time.

Which follows from the node's own workloads (and the Gateways'); keys are made here and leave this
process to the workers only. Renewed at half life; while that fails traffic goes on, and people are
warned; what has expired is taken from the workers, and connections fail closed. Knows sections and
time, no sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from cryptography import x509

from certs.bundle import BadBundle, Bundle
from certs.errors import NotTrusted
from certs.spiffe import BadSpiffeId, SpiffeId, gateway, parse
from certs.svid import holds, new_request
from certs.wire import MAX_REQUESTS
from mesh.agent.authority import AuthorityClient, NoAnswer
from mesh.agent.svid_file import Kept, SvidFile
from mesh.model.meta import say_duration
from mesh.model.nodeconfig import Section, SvidSection, TrustBundleSection, WorkloadSection
from mesh.model.section import SectionKey, bundle_key, svid_key

_log = logging.getLogger("weft.agent")

# Of its life, when an SVID is renewed: nodes that started together do not ask together.
_RENEW_AT = (0.45, 0.55)
# After a failure, and twice that after another.
_RETRY_S = 0.25
_MAX_RETRY_S = 5.0
# Clocks are set: no timer is trusted for longer.
_MAX_WAIT_S = 60.0

# Puts and removes sections; the future is done when the workers have them in force.
Put: TypeAlias = Callable[
    [dict[SectionKey, Section], tuple[SectionKey, ...]], "asyncio.Future[None]"
]


@dataclass(slots=True)
class _Identity:
    """An identity that this node must hold. `since`: from when `held` is valid; `due`: when to ask
    for it next, seconds since 1970; `why`: what went wrong the last `failures` times."""

    spiffe_id: SpiffeId
    workloads: set[SectionKey] = field(default_factory=set)
    held: SvidSection | None = None
    since: float = 0.0
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
    """What this node holds, kept up to date by `run`. The workers are told by way of `attach`."""

    def __init__(
        self,
        client: AuthorityClient,
        trust_domain: str,
        file: SvidFile,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.failures: Counter[str] = Counter()
        self._client = client
        self._file = file
        self._now = now
        self._bundles: dict[str, Bundle] = {}
        self._gateway = gateway(trust_domain)
        self._identities: dict[str, _Identity] = {}
        self._workloads: dict[SectionKey, str] = {}
        self._kept: dict[str, SvidSection] = {}
        self._unreachable = ""
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._put: Put

    def attach(self, put: Put) -> None:
        """Where sections go; what the agent before has left goes there at once."""
        self._put = put
        kept = self._file.read()
        with contextlib.suppress(BadBundle):
            self._bundles = _bundles(kept.bundles)
        for section in kept.svids:
            with contextlib.suppress(NotTrusted, BadSpiffeId):
                spiffe_id = parse(section.spiffe_id)
                holds(section.chain_pem, section.key_pem, spiffe_id, self._bundles, self._now())
                self._kept[section.spiffe_id] = section
        self._put(_bundle_sections(self._bundles), ())
        self._want(str(self._gateway), "")

    # --- which identities ------------------------------------------------------------------------

    def workloads_changed(
        self, put: Mapping[SectionKey, Section], remove: Iterable[SectionKey]
    ) -> None:
        """What the control plane says of workloads: those of this node need their SVIDs."""
        less: list[tuple[str, SectionKey]] = []
        for key in (*put, *remove):
            section = put.get(key)
            wanted = ""
            if isinstance(section, WorkloadSection) and section.local:
                wanted = section.spiffe_id
            before = self._workloads.pop(key, "")
            if wanted:
                self._workloads[key] = wanted
            if before != wanted:
                less.append((before, key))
                self._want(wanted, key)
        # Last: a pod may have taken another one's place.
        for spiffe_id, key in less:
            self._no_more(spiffe_id, key)

    def _want(self, spiffe_id: str, workload: SectionKey) -> None:
        if not spiffe_id:
            return
        identity = self._identities.get(spiffe_id)
        if identity is None:
            try:
                identity = self._identities[spiffe_id] = _Identity(parse(spiffe_id))
            except BadSpiffeId as error:
                _log.error("%s cannot have an identity: %s", workload, error)
                return
            kept = self._kept.pop(spiffe_id, None)
            if kept is not None and kept.not_after > self._now():
                self._hold(identity, kept)
                self._put({svid_key(spiffe_id): kept}, ())
        if workload:
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

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_bundles(), name="trust bundles")
            group.create_task(self._renew(), name="SVIDs")
            group.create_task(self._watch(), name="SVIDs that expire")

    def _change(
        self, put: dict[SectionKey, Section], remove: tuple[SectionKey, ...] = ()
    ) -> asyncio.Future[None]:
        held = (one.held for one in self._identities.values())
        self._file.write(
            Kept(
                {name: bundle.to_pem() for name, bundle in self._bundles.items()},
                (*(one for one in held if one is not None), *self._kept.values()),
            )
        )
        return self._put(put, remove)

    async def _follow_bundles(self) -> None:
        have, failures = "", 0
        while True:
            try:
                # After a failure without waiting for news: whether it answers is news.
                answer = await self._client.bundle("" if failures else have)
                bundles = _bundles(answer.bundles)
            except (NoAnswer, BadBundle) as error:
                self._unreachable = str(error)
                if not self._bundles:
                    self._fail(self._identities.values(), "no_answer", str(error))
                await asyncio.sleep(_pause(failures))
                failures += 1
                continue
            if failures:
                failures, self._unreachable = 0, ""
                self._try_again()
            if answer.tag != have:
                gone = tuple(bundle_key(name) for name in self._bundles.keys() - bundles.keys())
                self._bundles = bundles
                self._wake.set()
                await self._change(_bundle_sections(bundles), gone)
                have = answer.tag

    def _try_again(self) -> None:
        """The authority is back."""
        for one in self._identities.values():
            if one.failures:
                one.due = self._now()
        self._wake.set()

    async def _renew(self) -> None:
        while True:
            self._wake.clear()
            now = self._now()
            for one in self._identities.values():
                if one.due > now + _MAX_WAIT_S and (one.failures or now < one.since):
                    one.due = now  # by a clock that was ahead
            due = [one for one in self._identities.values() if one.due <= now][:MAX_REQUESTS]
            if due and self._bundles:
                await self._request(due)
                continue
            moments = [now + _MAX_WAIT_S]
            moments += [one.due for one in self._identities.values() if one.due > now]
            await _until(self._wake, min(moments) - now)

    async def _watch(self) -> None:
        """Expire what has, whatever the authority does."""
        while True:
            self._news.clear()
            now = self._now()
            self._expire(now)
            ends = [one.held.not_after for one in self._identities.values() if one.held]
            await _until(self._news, min([now + _MAX_WAIT_S, *ends]) - now)

    async def _request(self, due: list[_Identity]) -> None:
        """Ask for these, all at once; each answer counts for itself."""
        made = [new_request(one.spiffe_id) for one in due]
        try:
            answers = await self._client.sign([csr_pem for _, csr_pem in made])
        except NoAnswer as error:
            self._fail(due, "no_answer", str(error))
            return
        put: dict[SectionKey, Section] = {}
        for identity, (key_pem, _), answer in zip(due, made, answers, strict=True):
            spiffe_id = str(identity.spiffe_id)
            if answer.refused:
                why = f"the authority refuses: {answer.refused}: {answer.why}"
                self._fail([identity], answer.refused, why)
                continue
            try:
                leaf = holds(
                    answer.chain_pem, key_pem, identity.spiffe_id, self._bundles, self._now()
                )
            except NotTrusted as error:
                why = f"the authority's answer cannot be used: {error}"
                self._fail([identity], error.reason, why)
                continue
            end = int(leaf.not_valid_after_utc.timestamp())
            section = SvidSection(spiffe_id, answer.chain_pem, key_pem, end)
            self._hold(identity, section)
            # Its workloads may have gone meanwhile.
            if self._identities.get(spiffe_id) is identity:
                put[svid_key(spiffe_id)] = section
        if put:
            self._change(put)

    def _hold(self, identity: _Identity, section: SvidSection) -> None:
        if identity.failures:
            _log.info("%s has an SVID again", identity.spiffe_id)
        identity.held, identity.failures, identity.why = section, 0, ""
        self._news.set()
        leaf = x509.load_pem_x509_certificate(section.chain_pem.encode())
        identity.since = leaf.not_valid_before_utc.timestamp()
        left = section.not_after - self._now()
        identity.due = self._now() + left * random.uniform(*_RENEW_AT)

    def _fail(self, identities: Iterable[_Identity], reason: str, why: str) -> None:
        now = self._now()
        for one in identities:
            self.failures[reason] += 1
            if one.why != why:
                _log.warning("no new SVID for %s: %s", one.spiffe_id, why)
            one.why = why
            pause = _pause(one.failures)
            one.failures += 1
            if one.held is not None:
                pause = min(pause, max(_RETRY_S, (one.held.not_after - now) / 8))
            one.due = now + pause

    def _expire(self, now: float) -> None:
        gone = []
        for spiffe_id, one in self._identities.items():
            if one.held is not None and one.held.not_after <= now:
                _log.error("the SVID of %s has expired: %s", spiffe_id, one.why)
                one.held = None
                one.failures = max(one.failures, 1)
                gone.append(svid_key(spiffe_id))
        if gone:
            self._change({}, tuple(gone))

    # --- what can be asked -----------------------------------------------------------------------

    @property
    def bundles(self) -> Mapping[str, Bundle]:
        """By trust domain."""
        return self._bundles

    def waiting(self) -> bool:
        """Whether some identity was never asked for yet, or the answer is outstanding."""
        return any(one.held is None and not one.failures for one in self._identities.values())

    def seconds_left(self) -> dict[str, float]:
        """Of each identity's SVID; 0 where there is no valid one."""
        now = self._now()
        return {
            spiffe_id: max(0.0, one.held.not_after - now) if one.held else 0.0
            for spiffe_id, one in self._identities.items()
        }

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
        result = []
        if self._file.problem:
            result.append(
                f"{self._file.problem}: if this agent ends while the authority is away, the next "
                "one has no SVIDs"
            )
        held = [one.held.not_after for one in self._identities.values() if one.held]
        if self._unreachable:
            left = f"; the first SVID expires in {say_duration(min(held) - now)}" if held else ""
            result.append(f"{self._unreachable}{left}")
        for spiffe_id, one in sorted(self._identities.items()):
            if one.failures and one.held is None:
                result.append(
                    f"{spiffe_id} has no valid SVID, so its connections to other nodes are "
                    f"refused: {one.why}"
                )
            elif one.failures and one.held is not None:
                result.append(
                    f"the SVID of {spiffe_id} cannot be renewed, it expires in "
                    f"{say_duration(one.held.not_after - now)}: {one.why}"
                )
        return result


async def _until(event: asyncio.Event, seconds: float) -> None:
    """Whichever comes first."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()


def _bundles(pem: Mapping[str, str]) -> dict[str, Bundle]:
    return {name: Bundle.from_pem(name, text) for name, text in pem.items()}


def _bundle_sections(bundles: Mapping[str, Bundle]) -> dict[SectionKey, Section]:
    return {
        bundle_key(name): TrustBundleSection(name, one.to_pem()) for name, one in bundles.items()
    }


def _pause(failures: int) -> float:
    """Seconds until the next try after so many that failed before."""
    return float(min(_MAX_RETRY_S, _RETRY_S * 2 ** min(failures, 20)) * random.uniform(0.8, 1.2))
