"""The eBPF data path as a destination of the configuration: load-balancer entries, identities and
policies into its maps, descriptors to the proxies, programs to the cgroups.

In this order: the self-test; the loader, a process of its own; the maps are filled; the first whole
configuration is in force everywhere; then `enforce` points the kernel to the proxies and attaches
the programs. What an earlier agent left in force stays so until then, and also where something
fails: the gateway goes on, and says what is not as it should be. Knows nothing of how entries come
about.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from bpf import attach, maps, pins, selftest, settings
from bpf.balancer import Balancer
from bpf.enforcement import ENFORCED, EnforcedSection, Enforcement
from bpf.errors import DatapathError
from bpf.proxy import descriptors
from mesh.agent.options import Steering
from mesh.model.nodeconfig import (
    MESH_HTTP_PORT,
    MESH_RELAY_PORT,
    LoadBalancerEntry,
    Section,
)
from mesh.model.section import SectionKey, port_key

_log = logging.getLogger("weft.agent")

# Between two looks at whether the sockets of other versions have closed.
_TIDY_S = 30.0


class _Maps(NamedTuple):
    """What is filled."""

    balancer: Balancer
    enforcement: Enforcement


class Datapath:
    """`loading`: until `start` has ended. `failures`: what is not as it should be, in words; empty
    if all is well. `refused`: sections not in force. `redirects`: proxies send to workloads of this
    node by redirect. `hand_over` gives descriptors to the proxies; `node` is this one's name."""

    def __init__(
        self,
        options: Steering,
        addresses: tuple[str, ...],
        hand_over: Callable[[Mapping[str, int]], None],
        node: str | None,
    ) -> None:
        self.cgroup = options.cgroup
        self.pins = options.pins
        self.refused: dict[SectionKey, str] = {}
        self.loading = True
        self.failures: list[str] = []
        self.redirects = False
        self._options = options
        self._addresses = addresses
        self._hand_over = hand_over
        self._node = node
        self._entries: dict[SectionKey, LoadBalancerEntry] = {}
        self._enforced: dict[SectionKey, EnforcedSection] = {}
        self._loaded = False
        self._why_not: str | None = "not all workers have their first configuration yet"
        self._bound: frozenset[tuple[str, int]] = frozenset()
        self._lock: int | None = None
        self._synced = False
        self._maps: _Maps | None = None

    async def start(self) -> None:
        """Test, load, adopt the maps, and fill them with what was published so far."""
        try:
            attach.check_cgroup(self._options.cgroup)
            self._lock = pins.lock(self.pins)
        except DatapathError as error:
            self._break(error)
            self.loading = False
            return
        try:
            await self._test()
            await self._run("bpf.loader", f"--pin={self.pins}")
            self._loaded = True
        except DatapathError as error:
            self._break(error)
        try:
            self._maps = _Maps(Balancer(self.pins), Enforcement(self.pins, self._node))
        except (DatapathError, OSError) as error:
            if self._loaded:
                self._break(error)
        else:
            self._replace()
        self.loading = False

    async def _test(self) -> None:
        """DatapathError: this kernel is not one to steer on, or not as it was asked for."""
        beside = self._options.proxy_cgroup
        if not beside.exists():
            raise DatapathError(
                f"the cgroup {beside} for Weft's own processes could not be made: it takes root, "
                "or name one that is there with --proxy-cgroup"
            )
        attach.check_cgroup(beside)
        if beside.is_relative_to(self.cgroup) or self.cgroup.is_relative_to(beside):
            raise DatapathError(
                f"{beside} (--proxy-cgroup) and {self.cgroup} (--steer) lie in one another, so the "
                "proxy's own connections would be steered to the proxy: name one beside the other"
            )
        # The supervisor has joined it before the proxies' listening sockets were made.
        if not attach.is_member(beside, os.getpid()):
            raise DatapathError(
                f"Weft's own processes are not in {beside}, by which the kernel would know the "
                "proxy's sockets: give --proxy-cgroup one that may have processes (a leaf without "
                "controllers of its children), and start Weft anew"
            )
        where = (f"--directory={self.pins.parent}", f"--cgroup={beside.parent}")
        said = await self._run("bpf.selftest", *where, f"--name={beside.name}.selftest", "--json")
        checks = msgspec.json.decode(said, type=list[selftest.Check])
        wrong = [check for check in checks if not check.ok]
        basic = [check for check in wrong if check.name not in selftest.REDIRECT_FACTS]
        for check in wrong:
            _log.error("self-test: %s: %s: %s", check.name, selftest.FACTS[check.name], check.why)
        if basic:
            raise DatapathError(f"{basic[0].name}: {basic[0].why}")
        self.redirects = self._options.mode != "proxy" and not wrong
        if self._options.mode == "kernel" and wrong:
            raise DatapathError(f"--datapath=kernel, and {wrong[0].name}: {wrong[0].why}")
        if self._options.mode == "auto" and wrong:
            self._fail(
                f"the proxy sends to workloads by TCP, not by redirect: {wrong[0].name}: "
                f"{wrong[0].why}"
            )

    async def _run(self, module: str, *arguments: str) -> bytes:
        """A short-lived process of ours; what it printed. DatapathError: it failed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", module, *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            said, complained = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            raise
        # The self-test's status tells of its checks, which are read one by one.
        if process.returncode != 0 and not said:
            why = complained.decode(errors="replace").strip().removeprefix("weft: ")
            raise DatapathError(why or f"{module} ended with status {process.returncode}")
        return said

    @property
    def opened(self) -> bool:
        """The maps are there, and filled."""
        return self._maps is not None

    def _break(self, error: Exception) -> None:
        self._why_not = str(error)
        self._fail(f"workloads in {self.cgroup} are not steered as they should be: {error}")

    def _fail(self, why: str) -> None:
        self.failures.append(why)
        _log.error("%s", why)

    # --- the configuration ------------------------------------------------------------------------

    def publish(self, put: Mapping[SectionKey, Section], remove: tuple[SectionKey, ...]) -> None:
        """Take what is for the data path of a step from one version to the next, the first one
        whole: what an agent before this one left goes with it."""
        entries = {key: one for key, one in put.items() if isinstance(one, LoadBalancerEntry)}
        enforced = {key: one for key, one in put.items() if isinstance(one, ENFORCED)}
        self._entries.update(entries)
        self._enforced.update(enforced)
        gone = tuple(key for key in remove if self._entries.pop(key, None) is not None)
        left = tuple(key for key in remove if self._enforced.pop(key, None) is not None)
        if not self._synced:
            self._synced = True
            self._replace()
        elif self._maps is not None and (entries or gone or enforced or left):
            for key in (*entries, *gone, *enforced, *left):
                self.refused.pop(key, None)
            if enforced or left:
                self.refused |= self._maps.enforcement.apply(enforced, left)
            self.refused |= self._maps.balancer.apply(entries, gone)

    def _replace(self) -> None:
        if self._maps is not None and self._synced:
            self.refused = self._maps.enforcement.replace(self._enforced)
            self.refused |= self._maps.balancer.replace(self._entries)

    def refusals(self) -> dict[SectionKey, str]:
        """By section, why it is not in force here; all of the mesh's ports where nothing is steered
        to them. Nothing while that is being found out."""
        if self._why_not is None or self.loading:
            return self.refused
        why = f"workloads are not steered here: {self._why_not}"
        return {
            **self.refused,
            **{port_key(address, MESH_HTTP_PORT): why for address in self._addresses},
        }

    def enforce(self) -> None:
        """Everything that the kernel is to send to is there: point it to the proxies, attach."""
        if self._maps is None or not self._loaded:
            return
        try:
            self._point()
            attach.attach(self.pins, self._options.cgroup, self._options.proxy_cgroup)
            handles = descriptors(self.pins)
        except (DatapathError, OSError) as error:
            self._break(error)
        else:
            self._hand_over(handles)
            for fd in handles.values():
                os.close(fd)
            self._why_not = None
            how = "by redirect" if self.redirects else "by TCP"
            _log.info("workloads in %s are steered; proxies answer them %s", self.cgroup, how)

    def rebound(self, bound: frozenset[tuple[str, int]]) -> None:
        """These addresses and ports are Weft's now: the kernel sends to no others."""
        self._bound = bound
        if self._why_not is None:
            try:
                self._point()
            except (DatapathError, OSError) as error:
                self._break(error)

    def _point(self) -> None:
        ports = (MESH_HTTP_PORT, MESH_RELAY_PORT)
        places = [(address, port) for address in self._addresses for port in ports]
        there = [place for place in places if place in self._bound]
        settings.steer_to_proxy(self.pins, there, sockmap=self.redirects)

    async def tidy(self) -> None:
        """For ever: let go of the maps of other versions once their sockets have closed. Not while
        their programs may still be attached."""
        while pins.other_versions(self.pins):
            await asyncio.sleep(_TIDY_S)
            if self._why_not is not None:
                continue
            try:
                maps.retire_versions(self.pins)
            except OSError as error:
                _log.error("maps of another version at %s stay: %s", self.pins, error)

    def close(self) -> None:
        """Let go of the maps; what is in them stays in force."""
        if self._maps is not None:
            self._maps.balancer.close()
            self._maps.enforcement.close()
        if self._lock is not None:
            os.close(self._lock)
