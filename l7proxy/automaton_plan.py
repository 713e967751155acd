"""What of a destination's routes and policies the kernel decides: ordered rules, lists and numbers.

A plan follows from the sections alone, so that the agent, which compiles it (l7proxy.automaton),
and each worker, which offers connections to the kernel, have the same without talking: numbers of
rules, of lists of policy rules, and the generation that stands for all of it. A rule that needs the
proxy is in the plan too, at its place: no lower rule answers in its stead. No I/O.

The reference for what rules mean is l7proxy.routing and l7proxy.http_policy.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from bpf import layout
from l7proxy.automaton_rules import PUNT, Condition, Limits, Rule
from l7proxy.route_compile import (
    NO_ROUTE,
    CompiledMatch,
    CompiledRule,
    RouteMatchResult,
    RouteRef,
    ValueCondition,
)
from l7proxy.routing import RouteIndex
from mesh.model.nodeconfig import Settings
from mesh.model.policyconfig import HttpRule, PolicyRule

# Rules of one direction of policies, of which one must hold (Rules.for_kernel).
HttpRules: TypeAlias = tuple[PolicyRule, ...]

_HERE = Path(__file__).parent
# Of longer heads the proxy decides (bpf/programs/automaton.h).
_HEAD_MAX = 8000
_PATHS = ("Exact", "RegularExpression", "PathPrefix")


class PlannedRule(NamedTuple):
    """A route's rule under its number; `result`: of the first of its matches. `why` it is the
    proxy's; "": it is not."""

    result: RouteMatchResult
    why: str


class Plan(NamedTuple):
    """`rules`: number 1 is the first; `lists` too, and in each the policy rules. `ordered`: what is
    compiled: the routes' list and then those of `lists`, whose verdicts are these numbers."""

    listener: str
    rules: tuple[PlannedRule, ...]
    lists: tuple[HttpRules, ...]
    ordered: tuple[tuple[Rule, ...], ...]
    limits: Limits
    generation: int

    def list_of(self, rules: HttpRules | None) -> int | None:
        """The number of the list that must let a request pass, 0: none must; None: the kernel must
        not decide."""
        if not rules:
            return None if rules is None else 0
        return self.lists.index(rules) + 1 if rules in self.lists else None


def plan(
    listener: str,
    routes: RouteIndex,
    policies: Iterable[HttpRules],
    settings: Settings,
) -> Plan:
    """Of a listener (its id; "": what no route is about, rule 1 is as the request asks).
    `policies`: all that may be asked of requests there."""
    rules: list[PlannedRule] = []
    if listener:
        ordered = tuple(_routes(listener, routes, rules))
    else:
        straight = CompiledRule(0, None, (), total_weight=0)
        rules.append(PlannedRule(RouteMatchResult(NO_ROUTE, straight, None, 0), ""))
        ordered = (Rule((), 1),)
    lists = tuple(sorted({one for one in policies if one}, key=_text))
    everything = ordered, *(tuple(_policies(one)) for one in lists)
    limits = Limits(
        min(settings.max_head_bytes, _HEAD_MAX), settings.max_headers, settings.max_body_bytes
    )
    names = [(one.result.route, one.result.rule.index) for one in rules]
    text = repr((_edition(), listener, names, [*map(_text, lists)], everything, limits))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return Plan(
        listener, tuple(rules), lists, everything, limits, int.from_bytes(digest, "big") | 1
    )


@functools.cache
def _edition() -> str:
    """Goes into the generation: what compiles or walks tables in another way makes others."""
    sources = (*sorted(_HERE.glob("automaton*.py")), layout.AUTOMATON_SOURCE)
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _text(rules: HttpRules) -> str:
    return repr([(one.source, one.http) for one in rules])


# --- routes ---------------------------------------------------------------------------------------


def _routes(listener: str, routes: RouteIndex, rules: list[PlannedRule]) -> Iterator[Rule]:
    """In the order in which l7proxy.routing asks them: by host, kind of path, precedence."""
    numbers: dict[tuple[RouteRef, int], int] = {}
    for pattern, match in sorted(routes.placed(listener), key=_precedence):
        result = match.result
        name = result.route, result.rule.index
        number = numbers.get(name)
        if number is None:
            rules.append(PlannedRule(result, needs_proxy(result.rule)))
            number = numbers[name] = len(rules)
        yield Rule(tuple(_match(pattern, match)), PUNT if rules[number - 1].why else number)


def _precedence(placed: tuple[bytes, CompiledMatch]) -> tuple[object, ...]:
    pattern, match = placed
    return (
        (pattern == b"*", pattern.startswith(b"*"), -len(pattern), pattern),
        _PATHS.index(match.path_type),
        match.order,
    )


def _match(pattern: bytes, match: CompiledMatch) -> Iterator[Condition]:
    if pattern != b"*":
        yield Condition("hostname", "exact", pattern)
    if match.method is not None:
        yield Condition("method", "exact", match.method)
    if match.regex is not None:
        yield Condition("path", "regex", match.path)
    elif match.path_type == "Exact":
        yield Condition("path", "exact", match.path)
    elif match.path:
        yield Condition("path", "prefix", match.path)
    for condition in match.headers:
        yield _value("header", condition)
    for condition in match.query:
        yield _value("query", condition)


def _value(of: Literal["header", "query"], condition: ValueCondition) -> Condition:
    kind: Literal["exact", "regex"] = "exact" if condition.regex is None else "regex"
    if of == "header" and condition.name == b"host":
        return Condition("host", kind, condition.value)
    return Condition(of, kind, condition.value, condition.name)


def needs_proxy(rule: CompiledRule) -> str:
    """Why requests of a rule must go through the proxy; "": they need not."""
    backends = rule.backends
    reasons = (
        (rule.error_status is not None, "it answers with an error"),
        (rule.redirect or any(one.redirect for one in backends), "it redirects"),
        (not rule.total_weight, "it has no backend"),
        (any(one.cluster is None for one in backends), "a backend of its does not exist"),
        (rule.cors, "it answers for CORS"),
        (rule.mirrors or any(one.mirrors for one in backends), "it mirrors requests"),
        (rule.session, "it keeps sessions"),
        (rule.retry, "it retries"),
        (rule.client_headers, "it tells backends who the client is"),
        (_changes(rule), "it changes headers or paths"),
    )
    return "; ".join(why for holds, why in reasons if holds)


def _changes(rule: CompiledRule) -> bool:
    filters = [rule.filters, *(one.filters for one in rule.backends)]
    return any(one.request or one.response or one.rewrite for one in filters)


# --- policies -------------------------------------------------------------------------------------


def _policies(rules: HttpRules) -> Iterator[Rule]:
    """Verdicts are the numbers of the policy rules. Every rule that a request holds mends it, not
    only the first; so those come first, as the proxy's."""
    held = [(number, one) for number, rule in enumerate(rules, 1) for one in rule.http or ()]
    for _, one in held:
        if any(header.on_mismatch in ("ADD", "DELETE", "REPLACE") for header in one.headers):
            yield Rule(tuple(_asks(one)), PUNT)
    for number, one in held:
        yield Rule(tuple(_asks(one)), number)


def _asks(rule: HttpRule) -> Iterator[Condition]:
    if rule.method is not None:
        yield Condition("method", "regex", rule.method.encode())
    if rule.path is not None:
        yield Condition("path", "regex", rule.path.encode())
    if rule.host is not None:
        yield Condition("hostname", "regex", rule.host.encode())
    for one in rule.headers:
        if one.on_mismatch != "DENY":
            continue
        value = one.value.encode() if one.value is not None else b""
        if one.name != "host":
            kind: Literal["exact", "present"] = "exact" if one.value is not None else "present"
            yield Condition("header", kind, value, one.name.encode())
        elif one.value is not None:  # there always is one
            yield Condition("hostname", "either", value)
