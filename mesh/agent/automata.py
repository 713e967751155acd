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
from l7proxy.explain_automaton import reasons
from mesh.model.nodeconfig import Section
from mesh.model.section import SectionKey

_log = logging.getLogger("weft.agent")

_Step: TypeAlias = tuple[Mapping[SectionKey, Section], tuple[SectionKey, ...]]


class KernelAutomata:
    """`in_force`: generations that the kernel judges by; `refused`: those that it did not take, or
    that could not be compiled, and why: not tried again before the configuration changes. `failed`:
    why nothing is planned, so that all requests are the proxy's; "": it is."""

    def __init__(self, directory: Path) -> None:
        """The pin directory."""
        self.in_force: set[int] = set()
        self.refused: dict[int, str] = {}
        self.failed = ""
        self._directory = directory
        self._plans = Plans()
        self._wanted: dict[int, Plan] | None = None  # not known yet
        # Why rules are the proxy's, in the order of a generation's plan: once it is compiled.
        self._reasons: dict[int, list[str]] = {}
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
        why each is the proxy's, for some requests at least; "": it is not."""
        found: dict[str, str] = {}
        for plan in (self._wanted or {}).values():
            reasons = self._reasons.get(plan.generation) or [one.why for one in plan.rules]
            refused = self.refused.get(plan.generation, "")
            for one, why in zip(plan.rules, reasons, strict=True):
                if plan.listener:
                    name = f"{one.result.route.label} rule {one.result.rule.label}"
                    found[name] = found.get(name) or why or refused
        return found

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
            try:
                planned = await asyncio.to_thread(self._planned, steps)
                self.failed = ""
            except Exception as error:  # the next step may mend it
                _log.exception("no request is judged in the kernel")
                self.failed = f"a fault of the agent's, its log has it: {error!r}"
                planned = {}
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
                try:
                    automaton = await asyncio.to_thread(
                        compile_rules, missing.ordered, missing.limits, missing.generation
                    )
                except Exception as error:  # of this one; the others must not wait for its mending
                    _log.exception("an automaton of requests cannot be compiled")
                    self.refused[missing.generation] = f"it cannot be compiled: {error!r}"
                    continue
                # The configuration may have changed meanwhile.
                generation = missing.generation
                if generation in (self._wanted or {}) and self._put(generation, automaton.table):
                    self._reasons[generation] = reasons(missing, automaton)

    def _missing(self) -> Plan | None:
        """Also what an agent before this one has put in force: what it leaves out is not known."""
        there = self._reasons.keys() | self.refused.keys()
        missing = [one for number, one in (self._wanted or {}).items() if number not in there]
        return min(missing, key=lambda one: sum(map(len, one.ordered)), default=None)

    def _put(self, generation: int, table: bytes) -> bool:
        """Whether the kernel judges by it."""
        assert self._maps is not None
        if generation in self.in_force:
            return True
        try:
            self._maps.put(generation, table)
        except (Full, OSError) as error:
            self.refused[generation] = f"the kernel does not take its table: {error}"
            _log.error("an automaton of requests is not in the kernel: %s", error)
            return False
        self.in_force.add(generation)
        return True

    def _let_go(self) -> None:
        if self._wanted is None:
            return
        self._reasons = {key: one for key, one in self._reasons.items() if key in self._wanted}
        if self._maps is None:
            return
        for generation in self.in_force - self._wanted.keys():
            try:
                self._maps.remove(generation)
            except OSError as error:
                _log.error("an old automaton of requests stays in the kernel: %s", error)
            else:
                self.in_force.discard(generation)
