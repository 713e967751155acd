"""Conditions and the transition times of a status (Gateway API, metav1.Condition).

Conditions are derived without times; `with_transition_times` fills them in at the rim. Nothing here
reads a clock.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from mesh.model.meta import Condition

# As long as its schema lets a message be (metav1.Condition).
_MAX_MESSAGE = 32768


class Problem(NamedTuple):
    """Why something does not hold: a condition's reason, and a message for who can mend it."""

    reason: str
    message: str


def condition(
    type: str, generation: int | None, problem: Problem | None = None, ok: str | None = None
) -> Condition:
    """True with reason `ok` (by default the type's own name), or False with the problem."""
    if problem is None:
        return make(type, "True", ok or type, "", generation)
    return make(type, "False", problem.reason, problem.message, generation)


def make(
    type: str,
    status: Literal["True", "False", "Unknown"],
    reason: str,
    message: str,
    generation: int | None,
) -> Condition:
    return Condition(
        type=type,
        status=status,
        reason=reason,
        message=message if len(message) <= _MAX_MESSAGE else f"{message[: _MAX_MESSAGE - 1]}…",
        last_transition_time="",
        observed_generation=generation,
    )


def problem_text(problems: list[Problem]) -> str:
    """The messages of several problems as one, each once, in order."""
    return "; ".join(dict.fromkeys(problem.message for problem in problems))
