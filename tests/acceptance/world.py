"""What steps act on and look at, and how they wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from echo.answer import Memory

from acceptance.client import Request, RequestFailed, Response, round_trip
from acceptance.exchange import Mismatch
from acceptance.gateway import POLL_S, GatewayProcess
from acceptance.manifests import Ident, Json, Manifests
from acceptance.pods import Pods
from acceptance.statuses import NotYet, fetch

# Passes in a row that count as success, and how long a failure is waited out.
PASSES = 3
_PAUSE_S = 0.05


class StepFailed(Exception):
    """A step's expectation did not come true in time."""


@dataclass(slots=True)
class World:
    """What steps act on and look at."""

    gateway: GatewayProcess
    manifests: Manifests
    pods: Pods
    memory: Memory
    claimed: frozenset[str]
    wait_s: float
    # The file of the running test's objects.
    file: str = ""
    # Generations at the time of the last patch, for assert_generation_changed.
    generations: dict[tuple[str, str, str], int] = field(default_factory=dict)
    # $live values are remembered by their id where they were first read.
    live: dict[tuple[str, str, str, int], Json] = field(default_factory=dict)
    # The last request of a step and what came of it, for people.
    exchange: tuple[Request, Response | RequestFailed] | None = None

    async def send(self, request: Request) -> Response:
        """One exchange, remembered. RequestFailed: there is no whole response."""
        try:
            response = await round_trip(request)
        except RequestFailed as error:
            self.exchange = (request, error)
            raise
        self.exchange = (request, response)
        return response


async def eventually(check: Callable[[], None], wait_s: float) -> None:
    """Call until it raises no NotYet. StepFailed: what it last said."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return check()
        except NotYet as error:
            if time.monotonic() > deadline:
                raise StepFailed(f"not within {wait_s:g} s: {error}") from None
        await asyncio.sleep(POLL_S)


async def converge(attempt: Callable[[], Awaitable[None]], wait_s: float) -> None:
    """Call until it passes three times in a row. StepFailed: why it last did not."""
    deadline = time.monotonic() + wait_s
    passes, attempts = 0, 0
    while passes < PASSES:
        attempts += 1
        try:
            await attempt()
        except (Mismatch, RequestFailed) as error:
            passes = 0
            if time.monotonic() > deadline:
                raise StepFailed(f"{error} (after {attempts} attempts)") from None
            await asyncio.sleep(_PAUSE_S)
        else:
            passes += 1


def apply_patched(world: World, obj: Json) -> None:
    """Write an object that is there already, and remember which generation it had."""
    ident = Ident.of(obj)
    found = fetch(world.gateway, ident.kind, {"namespace": ident.namespace, "name": ident.name})
    world.generations[ident] = found["metadata"].get("generation", 0)
    world.manifests.apply(world.file, obj)
