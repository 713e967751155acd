"""Sets of generated policies for the matrix: of all kinds, no two of the same effect, and such that
some connections are allowed and some are not."""

from __future__ import annotations

import contextlib

import hypothesis
import policy_cases as cases
from hypothesis import HealthCheck, Phase
from policy_model import Manifest, Pod

EACH = 6
# Of the connections between pods, how many a set may leave allowed to be of interest.
_SHARE = (0.15, 0.85)


class _Enough(Exception):
    """There are as many as were wanted."""


def generate(seed: int, wanted: int, each: int = EACH) -> list[list[Manifest]]:
    """The same ones for the same seed and versions of Python and hypothesis."""
    found: dict[tuple[bool, ...], list[Manifest]] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=40 * wanted,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(cases.policies(each, least=each))
    def collect(policies: list[Manifest]) -> None:
        if len(found) == wanted:
            raise _Enough
        decisions = _decisions(policies)
        if _SHARE[0] < sum(decisions) / len(decisions) < _SHARE[1]:
            found.setdefault(decisions, policies)

    with contextlib.suppress(_Enough):
        collect()
    assert len(found) == wanted, f"only {len(found)} of {wanted} sets"
    return list(found.values())


def _decisions(policies: list[Manifest]) -> tuple[bool, ...]:
    """About the connections of pods with each other."""
    model = cases.model(policies)
    pods: list[Pod] = cases.PODS
    return tuple(
        model.allowed(one, other, *what)
        for one in pods
        for other in pods
        if one != other
        for what in cases.WHAT
    )
