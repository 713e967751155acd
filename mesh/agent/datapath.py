"""The eBPF data path as a destination of the configuration: load-balancer entries, identities and
policies into its maps, descriptors to the proxies, programs to the cgroups.

In this order: the self-test; the loader, a process of its own; the maps are filled, and the proxies
have their descriptors; the first whole configuration is in force everywhere; then `enforce` points
the kernel to the proxies and attaches the programs, also to the pods that are there. What an
earlier agent left in force stays so until then, and also where something fails: the gateway goes
on, says what is not as it should be, and tries again. Knows nothing of how entries come about.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from bpf import attach, pins, podfilter, settings, versions
from bpf.balancer import Balancer
from bpf.enforcement import ENFORCED, EnforcedSection, Enforcement
from bpf.errors import DatapathError
from bpf.proxy import descriptors
from mesh.agent import loading
from mesh.agent.options import Steering
from mesh.model.nodeconfig import (
    MESH_HTTP_PORT,
    MESH_RELAY_PORT,
    LoadBalancerEntry,
    Section,
    WorkloadSection,
)
from mesh.model.policyconfig import PolicySection
from mesh.model.section import SectionKey, port_key

_log = logging.getLogger("weft.agent")

# What failed is tried again after this long, then twice that, ...
_RETRY_S = 1.0
_MAX_RETRY_S = 60.0
# A kernel whose redirects, or requests that pass by the proxy, have failed their checks this often
# is one that cannot do them.
_REDIRECT_TESTS = 6
# Workers take descriptors at once; one that does not must not hold up the others.
_TAKE_S = 3.0
_NOT_YET = "not all workers have their first configuration yet"
# Between two looks at whether the sockets of other versions have closed.
_TIDY_S = 30.0


class _Maps(NamedTuple):
    """What is filled."""

    balancer: Balancer
    enforcement: Enforcement


class Datapath:
    """`loading`: until it was tried to load it. `why_not`: why this agent has put nothing in force,
    in words; None: it has. `pairs`: requests may pass by the proxy. `refused`: sections not in
    force. `hand_over` gives descriptors to the
    proxies; `changed` is called after each attempt; `node` is this one's name."""

    def __init__(
        self,
        options: Steering,
        addresses: tuple[str, ...],
        hand_over: Callable[[Mapping[str, int]], None],
        changed: Callable[[], None],
        node: str | None,
    ) -> None:
        self.cgroup = options.cgroup
        self.pins = options.pins
        self.loading = True
        self.why_not: str | None = _NOT_YET
        self.pairs = False
        self._options = options
        self._addresses = addresses
        self._hand_over = hand_over
        self._changed = changed
        self._node = node
        self._entries: dict[SectionKey, LoadBalancerEntry] = {}
        self._enforced: dict[SectionKey, EnforcedSection] = {}
        self._made_ns = 0  # of the configuration these are from
        self._unenforced: dict[SectionKey, str] = {}
        self._unbalanced: dict[SectionKey, str] = {}
        # What is not as it should be: in all, of sending by redirect, of requests that pass by the
        # proxy, of pods.
        self._broken: str | None = None
        self._by_tcp: str | None = None
        self._through: str | None = None
        self._unfiltered: list[str] = []
        self._tests = 0
        self._tested = False
        self._redirects = False
        self._loaded = False
        # Everything that the kernel is to send to is there; it was told so.
        self._ready = False
        self._pointed = False
        self._bound: frozenset[tuple[str, int]] = frozenset()
        self._lock: int | None = None
        self._synced = False
        self._maps: _Maps | None = None
        self._taken = asyncio.Event()
        self._again = asyncio.Event()
        self.in_force = asyncio.Event()

    async def run(self) -> None:
        """For ever: put the data path in force, as often as it takes; when it is, let go of what
        other versions left once their sockets have closed."""
        pauses = _pauses()
        while True:
            await self._attempt()
            self.loading = False
            self._changed()
            if not self._settled:
                await asyncio.sleep(next(pauses))
                continue
            pauses = _pauses()
            while self._settled:
                self._again.clear()
                try:
                    await asyncio.wait_for(self._again.wait(), _TIDY_S)
                except TimeoutError:
                    self._tidy()

    @property
    def _settled(self) -> bool:
        return self._broken is None and self._tested and not self._unfiltered

    async def _attempt(self) -> None:
        """Whatever is still to be done."""
        try:
            if self._lock is None:
                attach.check_cgroup(self._options.cgroup)
                self._lock = pins.lock(self.pins)
            try:
                if not self._tested:
                    await self._test()
                if not self._loaded:
                    loading.check_places(self._options)
                    await loading.load(self.pins)
                    self._loaded = True
            finally:
                # Maps that were there before are kept as they should be in any case.
                self._open()
            self._give_handles()
            await self._until_taken()
        except (DatapathError, OSError) as error:
            self._break(error)
        else:
            self._broken = None
            if not self._ready:
                self.why_not = _NOT_YET
        if self._ready:
            self.enforce()

    async def _test(self) -> None:
        """DatapathError: this kernel is not one to steer on, or not as it was asked for."""
        loading.check_places(self._options)
        verdict = await loading.test(self._options)
        self._tests += 1
        mode = self._options.mode
        self._redirects = mode != "proxy" and verdict.redirect is None
        self.pairs = self._options.pairs and verdict.pairs is None
        before, self._through = self._through, verdict.pairs if self._options.pairs else None
        if self._through is not None and self._through != before:
            _log.error("all requests go through the proxy: %s", self._through)
        if not self.pairs:
            attach.detach_pairs(self.pins)
        if not self._redirects:
            # Programs that are attached by now may have been told otherwise.
            left = pins.other_versions(self.pins)
            versions.stop_redirects(self.pins, (pins.version(), *left))
        if verdict.steering is not None:
            raise DatapathError(verdict.steering)
        if mode == "kernel" and verdict.redirect is not None:
            raise DatapathError(f"--datapath=kernel, and {verdict.redirect}")
        if self._options.http == "on" and verdict.pairs is not None:
            raise DatapathError(f"--http-in-kernel=on, and {verdict.pairs}")
        right = mode == "proxy" or (verdict.redirect is None and self._through is None)
        self._tested = right or self._tests >= _REDIRECT_TESTS
        before, self._by_tcp = self._by_tcp, verdict.redirect if mode == "auto" else None
        if self._by_tcp is not None and self._by_tcp != before:
            _log.error("%s", self.failures[-1])

    def _open(self) -> None:
        """DatapathError, OSError, unless nothing was loaded."""
        if self._maps is None:
            try:
                balancer = Balancer(self.pins)
                self._maps = _Maps(
                    balancer, Enforcement(self.pins, self._node, mtls=self._options.mtls)
                )
            except (DatapathError, OSError):
                if self._loaded:
                    raise
            else:
                self._replace()

    def _give_handles(self) -> None:
        """To the proxies: before the programs are attached, and they may be in need of them."""
        self._taken.clear()
        handles = descriptors(self.pins)
        self._hand_over(handles)
        for fd in handles.values():
            os.close(fd)

    def handles_taken(self) -> None:
        """All proxies have the descriptors."""
        self._taken.set()

    async def _until_taken(self) -> None:
        try:
            await asyncio.wait_for(self._taken.wait(), _TAKE_S)
        except TimeoutError:
            _log.error(
                "not all workers have taken the data path's descriptors after %g s: going on "
                "without them",
                _TAKE_S,
            )

    @property
    def opened(self) -> bool:
        """The maps are there, and filled."""
        return self._maps is not None

    @property
    def left(self) -> bool:
        """Programs are attached, by this agent or by one before it."""
        return pins.link_path(self.pins, "connect4").exists()

    @property
    def through(self) -> str | None:
        """Why all requests go through the proxy although they may pass by it; None: they need
        not."""
        if self._options.http == "auto" and self._options.mode == "proxy":
            return "--datapath=proxy"
        return self._through

    @property
    def failures(self) -> list[str]:
        """What is not as it should be, in words; empty if all is well."""
        result = []
        if self._broken is not None:
            what = f"workloads in {self.cgroup} are not steered as they should be"
            result.append(f"{what}: {self._broken}")
        if self._by_tcp is not None:
            result.append(f"the proxy sends to workloads by TCP, not by redirect: {self._by_tcp}")
        if self._through is not None:
            result.append(f"all requests go through the proxy: {self._through}")
        return [*result, *self._unfiltered]

    def _break(self, error: Exception) -> None:
        before, self._broken = self._broken, str(error)
        self.why_not = self._broken
        if self._broken != before:
            _log.error("%s", self.failures[0])

    # --- the configuration ------------------------------------------------------------------------

    def publish(
        self, put: Mapping[SectionKey, Section], remove: tuple[SectionKey, ...], made_ns: int
    ) -> None:
        """Take what is for the data path of a step from one version to the next, the first one
        whole: what an agent before this one left goes with it. `made_ns` as in Delta: workers that
        keep up have the version."""
        self._made_ns = made_ns
        entries = {key: one for key, one in put.items() if isinstance(one, LoadBalancerEntry)}
        enforced = {key: one for key, one in put.items() if isinstance(one, ENFORCED)}
        self._entries.update(entries)
        self._enforced.update(enforced)
        gone = tuple(key for key in remove if self._entries.pop(key, None) is not None)
        left = tuple(key for key in remove if self._enforced.pop(key, None) is not None)
        if not self._synced:
            self._synced = True
            self._replace()
        elif self._maps is not None:
            self._maps.enforcement.end_offers(made_ns)
            if enforced or left:
                self._unenforced = self._maps.enforcement.apply(enforced, left)
            for key in (*entries, *gone):
                self._unbalanced.pop(key, None)
            self._unbalanced |= self._maps.balancer.apply(entries, gone)

    def _replace(self) -> None:
        if self._maps is not None and self._synced:
            self._maps.enforcement.end_offers(self._made_ns)
            self._unenforced = self._maps.enforcement.replace(self._enforced)
            self._unbalanced = self._maps.balancer.replace(self._entries)

    def local_pods(self) -> dict[str, tuple[str, ...]]:
        """This node's pods, by namespace/name/uid, with their addresses."""
        return {
            f"{one.namespace}/{one.name}/{one.uid}": one.addresses
            for one in self._enforced.values()
            if isinstance(one, WorkloadSection) and one.local
        }

    @property
    def refused(self) -> dict[SectionKey, str]:
        """Sections that are not in force, and why."""
        return {**self._unenforced, **self._unbalanced}

    def refusals(self) -> dict[SectionKey, str]:
        """By section, why it is not in force here; all of the mesh's ports, and all policies, where
        nothing is steered. Nothing while that is being found out."""
        if self.why_not is None or self.loading:
            return self.refused
        why = f"workloads are not steered here: {self.why_not}"
        return {
            **self.refused,
            **{port_key(address, MESH_HTTP_PORT): why for address in self._addresses},
            **{key: why for key, one in self._enforced.items() if isinstance(one, PolicySection)},
        }

    def rule(self, number: int) -> str:
        """Where a rule comes from that the kernel names; "": not known."""
        return self._maps.enforcement.source(number) if self._maps is not None else ""

    def enforce(self) -> None:
        """Everything that the kernel is to send to is there: point it to the proxies, attach. Where
        nothing was loaded, what an earlier agent left is pointed to them."""
        self._ready = True
        if self._maps is None:
            return
        try:
            self._point()
            if not self._loaded:
                return
            versions.stop_redirects(self.pins, pins.other_versions(self.pins))
            # Policy is kept at pods' interfaces wherever connections are steered to.
            self._filter()
            attach.attach(
                self.pins,
                self._options.cgroup,
                self._options.proxy_cgroup,
                pairs=self.pairs,
            )
            # What came meanwhile, by what another version has.
            self._filter()
            if self._unfiltered:
                self._again.set()
        except (DatapathError, OSError) as error:
            self._break(error)
            self._again.set()
        else:
            if self.why_not is not None:
                how = "by redirect" if self._redirects else "by TCP"
                _log.info("workloads in %s are steered; proxies answer them %s", self.cgroup, how)
            self.why_not = None
            self.in_force.set()

    def _filter(self) -> None:
        versions.take_over(self.pins)
        self._unfiltered = podfilter.renew(self.pins, self._options.pods)

    def rebound(self, bound: frozenset[tuple[str, int]]) -> None:
        """These addresses and ports are Weft's now: the kernel sends to no others."""
        self._bound = bound
        if self._pointed:
            try:
                self._point()
            except (DatapathError, OSError) as error:
                self._break(error)
                self._again.set()

    def _point(self) -> None:
        ports = (MESH_HTTP_PORT, MESH_RELAY_PORT)
        places = [(address, port) for address in self._addresses for port in ports]
        there = [place for place in places if place in self._bound]
        settings.steer_to_proxy(
            self.pins,
            there,
            sockmap=self._redirects,
            mtls=self._options.mtls,
            home=podfilter.netns_cookie() if self._options.nested else 0,
        )
        self._pointed = True

    def _tidy(self) -> None:
        """Let go of the maps of other versions whose sockets have closed, also where proxies hold
        them. Not while their programs may still be attached."""
        if self.why_not is None:
            try:
                if versions.retire(self.pins):
                    self._give_handles()
            except OSError as error:
                _log.error("maps of another version at %s stay: %s", self.pins, error)

    def close(self) -> None:
        """Let go of the maps; what is in them stays in force."""
        if self._maps is not None:
            self._maps.balancer.close()
            self._maps.enforcement.close()
        if self._lock is not None:
            os.close(self._lock)


def _pauses() -> Iterator[float]:
    pause = _RETRY_S
    while True:
        yield pause
        pause = min(2 * pause, _MAX_RETRY_S)
