"""One torture run in a lab that is up: clients, kills, memory, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lab_world import Lab

from bpf.maps import counters
from mesh.lab.kernel import inside, write_sysctls
from mesh.lab.plan import Plan
from mesh.lab.state import LabDir
from torture.clients import Client, Totals, add
from torture.kills import Kill, kill, until_served
from torture.programs import Programs
from torture.scene import BACKEND_PORT, Scene
from torture.sockets import Sockets
from torture.verdict import Evidence, Paths

CONNECTIONS = 40
# net.ipv4.tcp_rmem, which is for IPv6 too, of all pods: see verdict.QUEUE_BOUND.
TCP_RMEM = "4096 131072 1048576"
_LOOK_S = 0.2
# So many more times targets are asked whose requests may pass by the proxy of the client's node.
_OWN = 6
# Pauses end, then whatever is under way does.
_END_S = 60.0
# Which process ends next; on both nodes in turn.
_VICTIMS = ("weft-agent", "weft-worker")


class Goal(NamedTuple):
    """At least so many transfers and so long; given up after `limit_s`; `kill_s` between kills."""

    transfers: int
    seconds: float
    limit_s: float
    kill_s: float


class _Watch:
    """What of the sockets is remembered: the longest receive queues, and whose, of all and of those
    that are filled by redirect; and how many of a backend's connections there were of each kind."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self.queue = self.redirect_queue = (0, "")
        self._sockets = Sockets(places)
        self._inodes: dict[tuple[str, bool], set[int]] = defaultdict(set)

    def look(self) -> None:
        for seen in self._sockets.look():
            self.queue = max(self.queue, (seen.queue, seen.where))
            if seen.redirected:
                self.redirect_queue = max(self.redirect_queue, (seen.queue, seen.where))
            # 0: nobody's any more.
            if seen.port == BACKEND_PORT and seen.inode and (seen.redirected or seen.received > 1):
                self._inodes[seen.where, seen.redirected].add(seen.inode)

    def paths(self, where: str) -> Paths:
        return Paths(len(self._inodes[where, True]), len(self._inodes[where, False]))

    def close(self) -> None:
        self._sockets.close()


async def torture(
    lab: Lab,
    scene: Scene,
    programs: Programs,
    goal: Goal,
    seed: int,
    progress: Callable[[str], None],
) -> Evidence:
    """`progress` gets a line now and then."""
    files = LabDir(lab.run_dir, lab.name)
    plan = files.existing_plan()
    places = {place.key: place.netns for place in (*plan.pods, *plan.nodes)}
    for pod in plan.pods:
        with inside(pod.netns):
            write_sysctls({"net.ipv4.tcp_rmem": TCP_RMEM})  # type: ignore[dict-item]
    node_of = {pod.key: pod.node for pod in plan.pods}
    hosts: dict[str, frozenset[str]] = {}
    for target in scene.targets:
        far = frozenset(node_of[pod] for pod in target.pods)
        hosts[target.host] = hosts.get(target.host, frozenset()) | far
    clients = [Client(pod, node_of[pod], hosts) for pod in scene.clients]
    watch = _Watch(places)
    kills: list[Kill] = []
    try:
        async with asyncio.TaskGroup() as tasks:
            for number, client in enumerate(clients, 1):
                own = [
                    target
                    for target in scene.targets
                    if any(node_of[pod] == client.node and target.passes(pod) for pod in node_of)
                ]
                command = (
                    *(programs.client, str(number), str(seed), str(CONNECTIONS // len(clients))),
                    *(target.text for target in (*scene.targets, *_OWN * own)),
                )
                await client.start(
                    tasks, lab.arguments("exec", client.pod, "--", *map(str, command))
                )
            enough = asyncio.Event()
            killing = _kill_now_and_then(plan, goal.kill_s, seed, kills, enough)
            tasks.create_task(killing)
            start = said = time.monotonic()
            while True:
                await asyncio.sleep(_LOOK_S)
                watch.look()
                now = time.monotonic()
                totals = add(clients)
                if now - said >= 5:
                    said = now
                    progress(_line(now - start, totals, len(kills), watch.queue[0]))
                reached = totals.complete >= goal.transfers and now - start >= goal.seconds
                if reached or now - start >= goal.limit_s:
                    break
            enough.set()
            for client in clients:
                client.stop()
            for client in clients:
                await client.ended(_END_S)
    finally:
        watch.close()
    return _evidence(files, plan, scene, clients, kills, watch)


async def _kill_now_and_then(
    plan: Plan, every_s: float, seed: int, kills: list[Kill], enough: asyncio.Event
) -> None:
    chooser = random.Random(seed)
    number = 0
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(enough.wait(), every_s * chooser.uniform(0.5, 1.5))
            return
        node = plan.nodes[number // 2 % len(plan.nodes)]
        done = kill(node, _VICTIMS[number % 2])
        number += 1
        if done and done.process == "weft-worker":
            done = done._replace(served=await asyncio.to_thread(until_served, node))
        if done:
            kills.append(done)


def _evidence(
    files: LabDir,
    plan: Plan,
    scene: Scene,
    clients: list[Client],
    kills: list[Kill],
    watch: _Watch,
) -> Evidence:
    wrong = [text for client in clients for text in client.wrong]
    mixed = [text for client in clients for text in client.mixed]
    paths = {pod.key: Paths() for pod in plan.pods}
    pairs = {pod.key: 0 for pod in plan.pods}
    for pod in plan.pods:
        for line in files.log(pod).read_text(errors="replace").splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "WRONG":
                wrong.append(f"{pod.key}: {rest}")
            elif kind == "MIXED":
                mixed.append(f"{pod.key}: {rest}")
            elif kind == "paths":
                paths[pod.key] = Paths(*map(int, rest.split()))
            elif kind == "pair":
                pairs[pod.key] = int(rest)
    for target in scene.targets:
        if target.seen:
            paths |= {pod: watch.paths(pod) for pod in target.pods}
    return Evidence(
        totals=add(clients),
        said_wrong=wrong,
        mixed=mixed,
        losses=[loss for client in clients for loss in client.losses],
        kills=kills,
        paths=paths,
        pairs=pairs,
        queue=watch.queue,
        redirect_queue=watch.redirect_queue,
        counts={node.name: counters(files.weft(node.name).pins) for node in plan.nodes},
        passing={client.node for client in clients}
        & {pod.node for pod in plan.pods for one in scene.targets if one.passes(pod.key)},
    )


def _line(seconds: float, totals: Totals, kills: int, queue: int) -> str:
    return (
        f"{seconds:4.0f} s: {totals.complete} complete, {totals.broken} broken on purpose, "
        f"{totals.wrong} wrong, {totals.bytes >> 20} MiB, {kills} kills, "
        f"longest receive queue {queue >> 10} KiB"
    )
