"""One node's control plane at work: source in, configurations out, statuses when they are true.

One step at a time: while a version is on its way to the workers, changes gather; when it is
acknowledged (or a worker has missed its deadline), statuses that belong to it are published and
the next step takes everything gathered. A single change goes out at once. Knows the order of
things, no sockets and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from gateway.control import ControlPlane
from gateway.keys import PortKey
from mesh.agent.automata import KernelAutomata
from mesh.agent.cni_plugin import CniPlugin
from mesh.agent.datapath import Datapath
from mesh.agent.flows import FlowStore
from mesh.agent.kernel_flows import KernelFlows
from mesh.agent.passed import PassedBy
from mesh.agent.rollout import Rollout
from mesh.agent.status_store import StatusStore
from mesh.agent.svids import Svids
from mesh.model.channel import Bound, PortAddress
from mesh.model.decode import Object
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import Section
from mesh.model.section import SETTINGS_KEY, SectionKey
from mesh.policy.report import Row
from mesh.sources.documents import Problem
from mesh.sources.update import SourceUpdate

_log = logging.getLogger("weft.agent")

# The supervisor answers at once; if it does not, statuses do not wait for it.
_BIND_LIMIT_S = 5.0

K = TypeVar("K")


class Node:
    """The state of the agent. `want(ports)` asks the supervisor for ports; `ready` is called once,
    when the first whole configuration is in force."""

    def __init__(
        self,
        *,
        plane: ControlPlane,
        rollout: Rollout,
        want: Callable[[tuple[PortAddress, ...]], None],
        ready: Callable[[], None],
        datapath: Datapath | None,
        flows: FlowStore,
        kernel: KernelFlows | None = None,
        passed: PassedBy | None = None,
        svids: Svids | None = None,
        automata: KernelAutomata | None = None,
        cni: CniPlugin | None = None,
    ) -> None:
        self.rollout = rollout
        self.flows = flows
        self.kernel = kernel
        self.passed = passed
        self.datapath = datapath
        self.svids = svids
        self.automata = automata
        self.cni = cni
        self.objects: dict[str, dict[ObjectKey, Object]] = {}
        self.problems: tuple[Problem, ...] = ()
        # What the control plane says of objects that statuses do not say.
        self.told: dict[tuple[str, ObjectKey], tuple[str, ...]] = {}
        self.statuses = StatusStore()
        self.bound: Bound | None = None
        self.synced = False
        self.ready_once = False
        # Whether this node is about to end.
        self.leaving = False
        self.failures: Mapping[tuple[str, Any], Exception] = {}
        # Up to which version of the source everything is in force, and who wants to know.
        self.in_force: Mapping[str, int] = {}
        self.settled: Callable[[], None] = lambda: None
        self._versions: Mapping[str, int] = {}
        self._said: tuple[Any, ...] = ()
        self._steps = 0
        self._plane = plane
        self._want = want
        self._ready = ready
        self._wanted: tuple[PortAddress, ...] = ()
        self._want_deadline = 0.0
        self._pending: dict[str, dict[ObjectKey, Object | None]] = {}
        self._refusals: dict[SectionKey, str] = {}
        self._binds: dict[PortKey, str] = {}
        self._unpublished: dict[tuple[str, ObjectKey], Any] = {}
        # Sections that are not the control plane's, for the next version, and who waits for it.
        self._more_put: dict[SectionKey, Section] = {}
        self._more_remove: set[SectionKey] = set()
        self._awaited: list[asyncio.Future[None]] = []
        self._on_the_way: list[asyncio.Future[None]] = []
        # Of the data path, until the workers have it.
        self._kernel_put: dict[SectionKey, Section] = {}
        self._kernel_remove: set[SectionKey] = set()
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if svids is not None:
            svids.attach(self.sections_changed)

    # --- what comes in ---------------------------------------------------------------------------

    def source_changed(self, update: SourceUpdate) -> None:
        for kind, changes in update.changes.items():
            self._pending.setdefault(kind, {}).update(changes)
            objects = self.objects.setdefault(kind, {})
            for key, obj in changes.items():
                if obj is None:
                    objects.pop(key, None)
                else:
                    objects[key] = obj
        self.problems = update.problems
        self.synced = self.synced or update.complete
        self._versions = update.versions
        self._wake.set()

    def bound_changed(self, bound: Bound) -> None:
        self.bound = bound
        self._wake.set()

    def sections_changed(
        self, put: Mapping[SectionKey, Section], remove: tuple[SectionKey, ...]
    ) -> asyncio.Future[None]:
        """Sections that do not come from objects: they go out with the next version. The future is
        done when all workers that keep up have it in force."""
        for key in remove:
            self._more_put.pop(key, None)
        self._more_remove |= set(remove)
        self._more_put.update(put)
        self._more_remove -= put.keys()
        self._awaited.append(self._loop.create_future())
        self._wake.set()
        return self._awaited[-1]

    def let_pass(self, pairs: bool) -> None:
        """Whether requests may pass by the proxies, as the workers are to know."""
        settings = self._plane.settings
        now = self._more_put.get(SETTINGS_KEY, self.rollout.config.sections.get(SETTINGS_KEY))
        settings = msgspec.structs.replace(settings, http_in_kernel=pairs)
        if settings != (now or self._plane.settings):
            self.sections_changed({SETTINGS_KEY: settings}, ())

    def look_again(self) -> None:
        """Workers or the data path have changed."""
        self._wake.set()

    # --- the work --------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever: a step whenever something came in."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.synced and not self._waiting() and self._step():
                pass

    def _waiting(self) -> bool:
        """Whether an answer to the last step is outstanding."""
        if self.rollout.config.version == 0:
            return False
        unanswered = not self._bound_answers() and self._loop.time() < self._want_deadline
        return unanswered or self.rollout.in_flight

    def _bound_answers(self) -> bool:
        bound = self.bound
        if bound is None:
            return False
        return {*bound.bound, *(port for port, _ in bound.failed)} == set(self._wanted)

    def _step(self) -> bool:
        """Derive from everything that came in; publish what is settled. Whether to go on."""
        self._tell_kernel()
        for future in self._on_the_way:
            if not future.done():  # who waited may have been cancelled
                future.set_result(None)
        self._on_the_way = []
        if not self.ready_once and not self.not_ready():
            self.ready_once = True
            if self.datapath is not None:
                self.datapath.enforce()
            _log.info("ready: configuration %d is in force", self.rollout.config.version)
            self._ready()
        first = self.rollout.config.version == 0
        refusals = self._known_refusals()
        binds = self._known_binds()
        news = self._pending or self._awaited
        if news or refusals != self._refusals or binds != self._binds or first:
            changes, self._pending = self._pending, {}
            self._steps += 1
            before = self._refusals, self._binds
            for key, why in refusals.items() - self._refusals.items():
                _log.error("%s is refused: %s", key, why)
            self._refusals, self._binds = refusals, binds
            if self.datapath is not None:
                self.datapath.rebound(frozenset(port for port, why in binds.items() if not why))
            outcome = self._plane.apply(
                changes,
                refusals=_difference(before[0], refusals),
                binds=_difference(before[1], binds),
            )
            self._unpublished.update(outcome.statuses)
            for ident, told in outcome.problems.items():
                self.told.pop(ident, None)
                if told is not None:
                    self.told[ident] = told
            if self.svids is not None:
                self.svids.workloads_changed(outcome.put, outcome.remove)
            self._publish({**outcome.put, **self._more_put}, (*outcome.remove, *self._more_remove))
            self._note_failures(outcome.failures)
            ports = tuple(PortAddress(address, port) for address, port in sorted(outcome.ports))
            if first or ports != self._wanted:
                self._ask(ports)
            return True
        # What the kernel does is not known before it was told.
        if self._unpublished and (self.datapath is None or not self.datapath.loading):
            self.statuses.publish(self._unpublished)
            self._unpublished = {}
        if not first and (self.datapath is None or not self.datapath.loading):
            self._settle()
        return False

    def _settle(self) -> None:
        self.in_force = self._versions
        said = (self._steps, self._refusals, self._binds, self.ready_once)
        if said != self._said:
            self._said = said
            self.settled()

    @property
    def refusals(self) -> Mapping[SectionKey, str]:
        """What the data plane refuses, and why."""
        return self._refusals

    def _publish(self, put: dict[SectionKey, Section], remove: tuple[SectionKey, ...]) -> None:
        self._more_put, self._more_remove = {}, set()
        self._on_the_way, self._awaited = self._awaited, []
        if put or remove:
            self.flows.peers.publish(put, remove)
            self.rollout.publish(put, remove)
            if self.automata is not None:
                self.automata.publish(put, remove)
            self._keep_for_kernel(put, remove)

    def _keep_for_kernel(
        self, put: Mapping[SectionKey, Section], remove: tuple[SectionKey, ...]
    ) -> None:
        if self.datapath is None:
            return
        for key in remove:
            self._kernel_put.pop(key, None)
        self._kernel_put.update(put)
        self._kernel_remove |= set(remove)
        self._kernel_remove -= put.keys()

    def _tell_kernel(self) -> None:
        """What the workers have by now: it sends nobody to a proxy that does not know better."""
        put, remove = self._kernel_put, tuple(self._kernel_remove)
        if self.datapath is not None and (put or remove):
            self._kernel_put, self._kernel_remove = {}, set()
            self.datapath.publish(put, remove, self.rollout.config.made_ns)

    def _ask(self, ports: tuple[PortAddress, ...]) -> None:
        self._wanted = ports
        self._want_deadline = self._loop.time() + _BIND_LIMIT_S
        self._loop.call_later(_BIND_LIMIT_S, self._wake.set)
        self._want(ports)

    def _note_failures(self, failures: Mapping[tuple[str, Any], Exception]) -> None:
        for cell, error in failures.items():
            if self.failures.get(cell) is not error:
                _log.error("defect in deriving %s of %s", *cell, exc_info=error)
        self.failures = failures

    def _known_refusals(self) -> dict[SectionKey, str]:
        refusals = dict(self.rollout.refusals())
        return refusals if self.datapath is None else {**refusals, **self.datapath.refusals()}

    def _known_binds(self) -> dict[PortKey, str]:
        if self.bound is None:
            return {}
        known = {(port.address, port.port): why for port, why in self.bound.failed}
        known.update({(port.address, port.port): "" for port in self.bound.bound})
        return known

    def policies(self) -> tuple[Row, ...]:
        """Whom the policies select, and which are refused."""
        return self._plane.policies()

    # --- what can be asked -----------------------------------------------------------------------

    def object_counts(self) -> Counter[str]:
        return Counter({kind: len(objects) for kind, objects in self.objects.items() if objects})

    def not_ready(self) -> list[str]:
        """Why the node is not ready; empty when it is. Once ready, it stays so while any worker
        serves."""
        reasons = []
        workers = self.rollout.workers
        if self.leaving:
            reasons.append("it is being shut down")
        if not self.synced:
            reasons.append("the manifests have not been read yet")
            reasons += [
                f"{one.kind}: {one.message}".removeprefix(": ")
                for one in self.problems
                if (one.rule, one.level) == ("source", "error")
            ]
        if not workers:
            reasons.append("no worker is connected")
        if self.ready_once or reasons:
            return reasons
        version = self.rollout.config.version
        if len(workers) < self.rollout.expected:
            reasons.append(f"{len(workers)} of {self.rollout.expected} workers are connected")
        reasons += [
            f"worker {worker.id} (pid {worker.pid}) has not acknowledged configuration {version}"
            for worker in workers
            if worker.version is None or version == 0
        ]
        if not self._bound_answers():
            reasons.append("the ports have not been bound yet")
        if self.datapath is not None and self.datapath.loading:
            reasons.append("the eBPF data path is being tested and loaded")
        if self.svids is not None and self.svids.waiting():
            reasons.append("the authority has not been asked for all SVIDs yet")
        return reasons

    def degraded(self) -> list[str]:
        """What is not as it should be although the node may be ready."""
        workers = self.rollout.workers
        result = [
            f"worker {worker.id} (pid {worker.pid}) does not acknowledge configurations; it has "
            f"version {worker.version}, the current one is {self.rollout.config.version}"
            for worker in workers
            if worker.lagging
        ]
        if len(workers) < self.rollout.expected:
            result.append(f"{len(workers)} of {self.rollout.expected} workers are connected")
        if self.bound is not None:
            result += [
                f"not listening on {port.address} port {port.port}: {why}"
                for port, why in self.bound.failed
            ]
        refusals = self.rollout.refusals()
        result += [f"{key} is refused by the proxy: {why}" for key, why in refusals.items()]
        if self.datapath is not None:
            refusals = self.datapath.refused
            result += [f"{key} is refused by eBPF: {why}" for key, why in refusals.items()]
            result += self.datapath.failures
        if self.automata is not None and self.automata.failed:
            result.append(f"all requests go through the proxy: {self.automata.failed}")
        if self.cni is not None:
            result += self.cni.failures
        if self.kernel is not None and self.kernel.failure is not None:
            result.append(self.kernel.failure)
        if self.svids is not None:
            result += self.svids.degraded()
        result += [
            f"a defect in Weft: deriving {table} of {key} failed, it is absent: {error!r}"
            for (table, key), error in self.failures.items()
        ]
        return result


def _difference(before: Mapping[K, str], after: Mapping[K, str]) -> dict[K, str | None]:
    """What to put and (None) remove to get from one to the other."""
    result: dict[K, str | None] = {key: None for key in before if key not in after}
    result.update({key: why for key, why in after.items() if before.get(key) != why})
    return result
