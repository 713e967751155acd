"""What the agent does as its node's CNI plugin: answers, sees to its place on the node, and to pods
that are older than it.

The place is taken once the programs are in force, and given up when the agent ends for good: the
programs then go as well. Where it cannot be told whether that is so, all stays: no new pod runs
until an agent is back, and none without policy.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bpf import pins, podfilter
from bpf.errors import DatapathError
from mesh.agent.cni_socket import CniSocket
from mesh.agent.options import Steering
from mesh.cni.adopt import adopt
from mesh.cni.install import Installation
from mesh.cni.plugin import Place

if TYPE_CHECKING:
    from mesh.agent.daemonset import DaemonSet

_log = logging.getLogger("weft.agent")

# Between two looks at pods that did not come through the plugin, or whose end it was not told of.
_LOOK_S = 5.0


class CniPlugin:
    """`pods()`: this node's that the cluster knows, by namespace/name/uid, with their addresses;
    `in_force`: the programs are; `daemonset` None: nobody says that the agent ends for good."""

    def __init__(
        self,
        socket: Path,
        steer: Steering,
        in_force: asyncio.Event,
        pods: Callable[[], Mapping[str, tuple[str, ...]]],
        daemonset: DaemonSet | None,
    ) -> None:
        self._place = Place(steer.pins, steer.pods)
        self._server = CniSocket(socket, self._place)
        self._in_force = in_force
        self._pods = pods
        self._daemonset = daemonset
        self._directories = steer.cni
        self._look = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        self._old: dict[str, str] = {}
        self._installation = (
            Installation(steer.cni.bin, steer.cni.conf, socket, self._look.set)
            if steer.cni is not None
            else None
        )

    @property
    def failures(self) -> list[str]:
        """What is not as it should be, in words."""
        result = list(self._installation.problems) if self._installation is not None else []
        result += [
            f"pod {about.rpartition('/')[0]} is older than the CNI plugin, and what it sends and "
            f"gets past the proxies is not filtered: {why}: restart it"
            for about, why in sorted(self._old.items())
        ]
        return result

    async def run(self) -> None:
        """For ever. OSError: the socket cannot be made."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._server.run(), name="CNI socket")
            if self._installation is not None:
                self._keeping = group.create_task(self._keep(self._installation), name="CNI place")
                group.create_task(self._look_for_pods(), name="CNI pods")
            if self._daemonset is not None:
                group.create_task(self._daemonset.run(), name="DaemonSet")

    async def _keep(self, installation: Installation) -> None:
        await self._in_force.wait()
        await installation.run()

    async def _look_for_pods(self) -> None:
        assert self._directories is not None
        await self._in_force.wait()
        missed: dict[str, str] = {}
        while True:
            try:
                await asyncio.to_thread(podfilter.tidy, self._place.pins, self._place.records)
                found = await asyncio.to_thread(
                    adopt, self._place, self._directories.netns, self._pods()
                )
            except (OSError, DatapathError) as error:
                _log.error("pods that are older than the CNI plugin: %s", error)
            else:
                # What has just ended is in the cluster for a moment.
                stays = {about: why for about, why in found.items() if about in missed}
                missed = found
                for about in stays.keys() - self._old.keys():
                    _log.error("pod %s is older than the CNI plugin: %s", about, stays[about])
                self._old = stays
            self._look.clear()
            try:
                await asyncio.wait_for(self._look.wait(), _LOOK_S)
            except TimeoutError:
                continue

    async def leave(self) -> None:
        """The node is going to end. If it is for good, new pods are not to wait for it: until
        cancelled, or the place is given up."""
        if self._installation is not None and self._daemonset is not None:
            await self._daemonset.unwanted.wait()
            self._give_up(self._installation)

    def _give_up(self, installation: Installation) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        installation.remove(needed=bool(podfilter.attachments(self._place.records)))

    def close(self) -> bool:
        """At the end; whether it is for good: then nothing stays that steers or filters."""
        if self._installation is None or self._daemonset is None:
            return False
        if not self._daemonset.unwanted.is_set():
            return False
        _log.info("the DaemonSet is gone, or has no CNI plugin any more: taking all away")
        self._give_up(self._installation)
        try:
            pins.remove(self._place.pins)
            podfilter.forget(self._place.records)
        except (DatapathError, OSError) as error:
            _log.error("not all was taken away: %s", error)
        return True
