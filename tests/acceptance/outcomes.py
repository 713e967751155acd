"""What becomes of tests, and how it is told."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from acceptance.cases import Case

PASS, FAIL, NOT_SUPPORTED, SKIPPED = "PASS", "FAIL", "not supported", "skipped"


class Outcome(NamedTuple):
    """`own`: the test data lacks the test; its steps are ours."""

    test: str
    profiles: tuple[str, ...]
    result: str
    detail: str
    seconds: float
    own: bool = False
    mesh: bool = False


def without_running(case: Case, result: str, detail: str) -> Outcome:
    return Outcome(case.name, case.profiles, result, detail, 0.0, case.own, case.mesh)


async def of_running(case: Case, attempt: Callable[[], Awaitable[None]]) -> Outcome:
    """Whatever goes wrong in a test fails that test and no other."""
    started = time.monotonic()
    result, detail = PASS, ""
    try:
        await attempt()
    except Exception as error:
        result, detail = FAIL, str(error) or type(error).__name__
    seconds = time.monotonic() - started
    return Outcome(case.name, case.profiles, result, detail, seconds, case.own, case.mesh)


def report(outcome: Outcome) -> None:
    detail = f"  {outcome.detail}" if outcome.detail else ""
    print(f"{outcome.result:<13} {outcome.seconds:5.1f} s  {outcome.test}{detail}", flush=True)


def summary(outcomes: list[Outcome]) -> list[str]:
    """A line per profile, and one for mesh tests that count in none: passed of all, what the others
    are, and how many are not of the test data."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        for profile in outcome.profiles:
            groups.setdefault(profile, []).append(outcome)
    if others := [outcome for outcome in outcomes if outcome.mesh and not outcome.profiles]:
        groups["MESH, in no profile"] = others
    lines = []
    for profile, members in groups.items():
        counts = Counter(outcome.result for outcome in members)
        rest = [f"{counts[what]} {what}" for what in (FAIL, NOT_SUPPORTED, SKIPPED) if counts[what]]
        if own := sum(outcome.own for outcome in members):
            rest.append(f"{own} with steps of our own")
        more = f" ({', '.join(rest)})" if rest else ""
        lines.append(f"{profile} {counts[PASS]}/{counts.total()}{more}")
    return lines


def failed(outcomes: list[Outcome]) -> bool:
    """Whether the run as a whole failed: a test of a profile that is to be passed in full did."""
    wanted = {"GATEWAY-HTTP", "MESH-HTTP", "WEFT-MESH"}
    return any(outcome.result == FAIL and wanted & set(outcome.profiles) for outcome in outcomes)
