"""What the clients say while they run, and what it amounts to."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torture.kills import Kill


class Totals(NamedTuple):
    """Transfers that are complete, broken on purpose and wrong; bytes of bodies; connections by the
    path their bytes took."""

    complete: int = 0
    broken: int = 0
    wrong: int = 0
    bytes: int = 0
    by_redirect: int = 0
    by_tcp: int = 0


class Loss(NamedTuple):
    """A connection from `node` to pods on `far`, opened at `since` and broken at `at`, that nobody
    meant to break."""

    node: str
    far: frozenset[str]
    since: int
    at: int
    text: str


class Client:
    """One client program in one pod. `hosts`: the nodes of their pods, by the name that it asks."""

    def __init__(self, pod: str, node: str, hosts: Mapping[str, frozenset[str]]) -> None:
        self.pod = pod
        self.node = node
        self._hosts = hosts
        self.totals = Totals()
        self.wrong: list[str] = []
        self.mixed: list[str] = []
        self.losses: list[Loss] = []
        self._process: asyncio.subprocess.Process
        self._reading: asyncio.Task[None]

    async def start(self, tasks: asyncio.TaskGroup, command: Sequence[str | Path]) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE
        )
        self._reading = tasks.create_task(self._read())

    def stop(self) -> None:
        """Nothing new; transfers under way come to their end."""
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)

    async def ended(self, limit_s: float) -> None:
        """Ends it in any case."""
        try:
            await asyncio.wait_for(self._process.wait(), limit_s)
        except TimeoutError:
            self.wrong.append(f"{self.pod}: the client does not end")
            self._process.kill()
        await self._reading
        if code := await self._process.wait():
            self.wrong.append(f"{self.pod}: the client ended with {code}")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            kind, _, rest = line.decode(errors="replace").rstrip().partition(" ")
            if kind == "transfers":
                self.totals = Totals(*map(int, rest.split()))
            elif kind == "LOST":
                since, at, text = rest.split(" ", 2)
                far = self._hosts[text.partition(" ")[0]]
                text = f"{self.pod}: {text}"
                self.losses.append(Loss(self.node, far, int(since), int(at), text))
            elif kind == "MIXED":
                self.mixed.append(f"{self.pod}: {rest}")
            else:
                self.wrong.append(f"{self.pod}: {rest}")


def add(clients: Sequence[Client]) -> Totals:
    return Totals(*map(sum, zip(*(client.totals for client in clients), strict=True)))


def unexplained(losses: Sequence[Loss], kills: Sequence[Kill]) -> list[Loss]:
    return [
        loss
        for loss in losses
        if not any(kill.explains(loss.node, loss.far, loss.since, loss.at) for kill in kills)
    ]
