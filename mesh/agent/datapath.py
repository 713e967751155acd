"""The eBPF data path as a destination of the configuration: load-balancer entries into its maps.

The loader, a process of its own, brings the programs to the cgroup whose workloads are steered; the
maps are reached by their pins, and what is in them stays in force while no agent lives. Where that
fails, the gateway goes on without, and says so. Knows nothing of how entries come about.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from bpf.balancer import Balancer
from bpf.errors import DatapathError
from mesh.model.nodeconfig import LoadBalancerEntry, Section, SectionKey

_log = logging.getLogger("weft.agent")


class Datapath:
    """`loading`: until `start` has ended. `failure`: why nothing is steered, None if all is well;
    `refused`: entries not in force."""

    def __init__(self, cgroup: Path, pins: Path) -> None:
        self.cgroup = cgroup
        self.refused: dict[SectionKey, str] = {}
        self.loading = True
        self.failure: str | None = None
        self._pins = pins
        self._entries: dict[SectionKey, LoadBalancerEntry] = {}
        self._synced = False
        self._balancer: Balancer | None = None

    async def start(self) -> None:
        """Load the programs, adopt the maps, put in force what was published so far."""
        try:
            await self._load()
            self._balancer = Balancer(self._pins)
        except DatapathError as error:
            self.failure = f"workloads in {self.cgroup} are not steered: {error}"
            _log.error("%s", self.failure)
        else:
            self._replace()
            _log.info("workloads in %s are steered", self.cgroup)
        self.loading = False

    async def _load(self) -> None:
        loader = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bpf.loader", f"--pin={self._pins}"),
            f"--cgroup={self.cgroup}",
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, said = await loader.communicate()
        except asyncio.CancelledError:
            loader.kill()
            raise
        if loader.returncode != 0:
            why = said.decode(errors="replace").strip().removeprefix("weft: ")
            raise DatapathError(why or f"the loader ended with status {loader.returncode}")

    def publish(self, put: Mapping[SectionKey, Section], remove: tuple[SectionKey, ...]) -> None:
        """Take the load-balancer entries of a step from one version to the next, the first one
        whole: what an agent before this one left goes with it."""
        entries = {key: one for key, one in put.items() if isinstance(one, LoadBalancerEntry)}
        self._entries.update(entries)
        gone = tuple(key for key in remove if self._entries.pop(key, None) is not None)
        if not self._synced:
            self._synced = True
            self._replace()
        elif self._balancer is not None and (entries or gone):
            for key in (*entries, *gone):
                self.refused.pop(key, None)
            self.refused |= self._balancer.apply(entries, gone)

    def _replace(self) -> None:
        if self._balancer is not None and self._synced:
            self.refused = self._balancer.replace(self._entries)

    def close(self) -> None:
        """Let go of the maps; what is in them stays in force."""
        if self._balancer is not None:
            self._balancer.close()
