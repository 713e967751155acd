"""The automata of requests in the kernel, kept in step with the configuration.

Plans are made in a thread, of one step of the configuration after the other. A generation that is
no longer planned is taken out then, before anything new is compiled: what names it is the proxy's.
Until then it judges by what it was made of, for workers that have not taken the step yet: it never
means anything else, and workers offer nothing by an old one once they have (l7proxy.pairs), or are
thought to (`bpf.settings.Generation.end_offers`). New ones are compiled one by one in a thread, the
smallest lists first, and put in force as they are done; until then their requests go through the
proxy as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from bpf.automaton import Automata, Full
from bpf.errors import DatapathError
from l7proxy.automaton import compile_rules
from l7proxy.automaton_plan import Plan
from l7proxy.automaton_plans import Plans
from mesh.model.nodeconfig import Section
from mesh.model.section import SectionKey

_log = logging.getLogger("weft.agent")

_Step: TypeAlias = tuple[Mapping[SectionKey, Section], tuple[SectionKey, ...]]


class KernelAutomata:
    """`in_force`: generations that the kernel judges by; `refused`: those that it did not take, and
    why: not tried again before the configuration changes."""

    def __init__(self, directory: Path) -> None:
        """The pin directory."""
        self.in_force: set[int] = set()
        self.refused: dict[int, str] = {}
        self._directory = directory
        self._plans = Plans()
        self._wanted: dict[int, Plan] = {}
        self._maps: Automata | None = None
        self._steps: list[_Step] = []
        self._stepped = asyncio.Event()
        self._again = asyncio.Event()

    def publish(self, put: Mapping[SectionKey, Section], remove: tuple[SectionKey, ...]) -> None:
        """A step from one version to the next, the first one whole."""
        self._steps.append((put, remove))
        self._stepped.set()

    def rules(self) -> dict[str, str]:
        """The rules of routes between this node's workloads, "<kind>/<ns>/<name> rule <label>", and
        why each is the proxy's; "": it is not."""
        return {
            f"{one.result.route.label} rule {one.result.rule.label}": one.why or refused
            for plan in self._wanted.values()
            for one in plan.rules
            if plan.listener
            for refused in (self.refused.get(plan.generation, ""),)
        }

    def open(self) -> None:
        """The maps are there, maybe with what an agent before this one left."""
        if self._maps is None:
            try:
                self._maps = Automata(self._directory)
                self.in_force = self._maps.generations()
            except (DatapathError, OSError) as error:
                _log.error("requests are not judged in the kernel: %s", error)
        self._let_go()
        self._again.set()

    def close(self) -> None:
        """What is in force stays so."""
        if self._maps is not None:
            self._maps.close()

    async def run(self) -> None:
        """For ever: plan, and compile what is planned."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._plan(), name="plans")
            group.create_task(self._compile(), name="compile")

    async def _plan(self) -> None:
        while True:
            await self._stepped.wait()
            self._stepped.clear()
            steps, self._steps = self._steps, []
            planned = await asyncio.to_thread(self._planned, steps)
            if planned is not None:
                self._wanted = planned
                self.refused = {}  # what goes may leave room
                self._let_go()
                self._again.set()

    def _planned(self, steps: Sequence[_Step]) -> dict[int, Plan] | None:
        """None: as before. In a thread: nobody else has the plans."""
        changed = [self._plans.apply(*step) for step in steps]
        return self._plans.all() if any(changed) or not self._wanted else None

    async def _compile(self) -> None:
        while True:
            await self._again.wait()
            self._again.clear()
            while self._maps is not None and (missing := self._missing()) is not None:
                automaton = await asyncio.to_thread(
                    compile_rules, missing.ordered, missing.limits, missing.generation
                )
                # The configuration may have changed meanwhile.
                if missing.generation in self._wanted:
                    self._put(missing.generation, automaton.table)

    def _missing(self) -> Plan | None:
        there = self.in_force | self.refused.keys()
        missing = [one for number, one in self._wanted.items() if number not in there]
        return min(missing, key=lambda one: sum(map(len, one.ordered)), default=None)

    def _put(self, generation: int, table: bytes) -> None:
        assert self._maps is not None
        try:
            self._maps.put(generation, table)
        except (Full, OSError) as error:
            self.refused[generation] = f"the kernel does not take its table: {error}"
            _log.error("an automaton of requests is not in the kernel: %s", error)
        else:
            self.in_force.add(generation)

    def _let_go(self) -> None:
        if self._maps is None or not self._wanted:
            return
        for generation in self.in_force - self._wanted.keys():
            try:
                self._maps.remove(generation)
            except OSError as error:
                _log.error("an old automaton of requests stays in the kernel: %s", error)
            else:
                self.in_force.discard(generation)
