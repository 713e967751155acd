"""The tables by which the kernel judges requests, kept in step with what is in force.

Compiling takes up to seconds and goes on beside everything else; until a table is there its requests
go through the proxies. Tables that nothing needs any more go at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from bpf.automaton import Automata as Maps
from bpf.automaton import Full
from l7proxy.automaton import compile_rules
from l7proxy.automaton_plan import Plan
from l7proxy.automaton_plans import Plans
from l7proxy.automaton_table import TooLarge
from mesh.model.nodeconfig import Section
from mesh.model.section import SectionKey

_log = logging.getLogger("weft.agent")

# Changes come in many steps.
_SETTLE_S = 0.05


class Automata:
    """Of one pin directory. `plans`: those whose tables are in force; `failures`: why others' are
    not, by generation."""

    def __init__(self, pins: Path) -> None:
        self.plans: dict[int, Plan] = {}
        self.failures: dict[int, str] = {}
        self._pins = pins
        self._source = Plans()
        self._again = asyncio.Event()

    def publish(self, put: Mapping[SectionKey, Section], remove: Iterable[SectionKey] = ()) -> None:
        """A step from one version to the next."""
        self._source.apply(put, remove)
        self._again.set()

    async def run(self) -> None:
        """For ever; from when the maps are there. DatapathError, OSError: they are not (any
        more)."""
        with contextlib.closing(Maps(self._pins)) as maps:
            while True:
                await self._again.wait()
                await asyncio.sleep(_SETTLE_S)
                self._again.clear()
                wanted = self._source.wanted()
                for generation in maps.generations() - wanted.keys():
                    maps.remove(generation)
                self.plans = {key: one for key, one in self.plans.items() if key in wanted}
                self.failures = {key: why for key, why in self.failures.items() if key in wanted}
                known = self.plans.keys() | self.failures.keys()
                for generation in wanted.keys() - known:
                    await self._put(maps, wanted[generation])

    async def _put(self, maps: Maps, plan: Plan) -> None:
        try:
            made = await asyncio.to_thread(
                compile_rules, plan.ordered, plan.limits, plan.generation
            )
            maps.put(plan.generation, made.table)
        except (TooLarge, Full) as error:
            self.failures[plan.generation] = str(error)
            _log.warning("requests of %s are the proxy's: %s", plan.listener or "Services", error)
        else:
            self.plans[plan.generation] = plan
