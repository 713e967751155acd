"""The automata of a Service: how large, what they read, which rules the kernel decides and why not
the others; for `weft bpf automaton` and `weft explain`.

Compiled anew from the sections alone, as the agent does it. Nothing is put in force.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import msgspec

from l7proxy.automaton import Automaton, compile_rules
from l7proxy.automaton_plan import Plan
from l7proxy.automaton_plans import Plans
from l7proxy.automaton_rules import Condition
from l7proxy.native import Native, available
from l7proxy.route_compile import RouteMatchResult
from mesh.model.nodeconfig import Section, ServiceSection, Settings
from mesh.model.section import SETTINGS_KEY, SectionKey


class ExplainedRule(msgspec.Struct, frozen=True):
    """`route` is "<kind>/<namespace>/<name>" ("" where no route is about a request), `rule` its
    name or index; `why` the kernel leaves it to the proxy, "": it does not."""

    number: int
    route: str
    rule: str
    why: str


class ExplainedAutomaton(msgspec.Struct, frozen=True):
    """`listener` "": of requests that no route is about. `policies`: the rules that must let
    requests pass. `bytes` of all tables, `states` by `classes` of bytes; `atoms`: what is read of a
    request beside `paths` kinds of paths; `limit`: which was in the way of further rules."""

    service: str
    listener: str
    generation: str
    policies: tuple[str, ...]
    bytes: int
    states: int
    classes: int
    paths: int
    atoms: tuple[str, ...]
    limit: str
    compile_ms: float
    rules: tuple[ExplainedRule, ...]


def describe(
    sections: Mapping[SectionKey, Section], namespace: str, name: str, port: int | None = None
) -> list[ExplainedAutomaton]:
    """Those of a Service, of all its ports or of one; empty: no port of its speaks HTTP here."""
    plans = Plans(sections)
    return [
        _described(service, one)
        for service in _services(sections)
        if (service.namespace, service.name) == (namespace, name) and port in (None, service.port)
        for one in plans.of(service)
    ]


def kernel_words(
    sections: Mapping[SectionKey, Section],
    service: ServiceSection,
    listener: str,
    match: RouteMatchResult | None,
    head: bytes,
) -> str:
    """Whether the kernel decides a request that gets this rule (None: that no route is about).
    `head`: as its client sends it; without a compiled automaton only the rule is looked at."""
    plan = next(one for one in Plans(sections).of(service) if one.listener == listener)
    number = 1
    if match is not None:
        names = [(one.result.route, one.result.rule.index) for one in plan.rules]
        number = names.index((match.route, match.rule.index)) + 1
    automaton = compile_rules(plan.ordered, plan.limits)
    why = reason(plan, automaton, number)
    if not why and not available() and Native(automaton.table).judge(head).rule != number:
        why = "something in this request's head is the proxy's to read"
    if why:
        return f"no: {why}"
    settings = sections.get(SETTINGS_KEY)
    on = isinstance(settings, Settings) and settings.http_in_kernel
    return f"{'yes' if on else 'it could (HTTP in the kernel is off)'}, between pods of one node"


def _services(sections: Mapping[SectionKey, Section]) -> list[ServiceSection]:
    found = [one for _, one in sorted(sections.items()) if isinstance(one, ServiceSection)]
    return sorted(found, key=lambda one: one.port)


def _described(service: ServiceSection, plan: Plan) -> ExplainedAutomaton:
    began = time.perf_counter()
    automaton = compile_rules(plan.ordered, plan.limits, plan.generation)
    took = time.perf_counter() - began
    return ExplainedAutomaton(
        service=f"{service.namespace}/{service.name}:{service.port}",
        listener=plan.listener,
        generation=f"{plan.generation:016x}",
        policies=tuple(rule.source for rules in plan.lists for rule in rules),
        bytes=len(automaton.table),
        states=automaton.states,
        classes=automaton.classes,
        paths=automaton.paths,
        atoms=tuple(map(_words, automaton.facts)),
        limit=automaton.limit,
        compile_ms=round(took * 1000, 1),
        rules=tuple(
            ExplainedRule(
                number,
                one.result.route.label if plan.listener else "",
                one.result.rule.label,
                why,
            )
            for number, (one, why) in enumerate(
                zip(plan.rules, reasons(plan, automaton), strict=True), 1
            )
        ),
    )


def reasons(plan: Plan, automaton: Automaton) -> list[str]:
    """Of each rule."""
    return [reason(plan, automaton, number) for number in range(1, len(plan.rules) + 1)]


def reason(plan: Plan, automaton: Automaton, number: int) -> str:
    """Why the kernel leaves a rule to the proxy; "": it does not."""
    if why := plan.rules[number - 1].why:
        return why
    own = [at for at, rule in enumerate(plan.ordered[0]) if rule.verdict == number]
    beyond = [at for at in own if at >= automaton.kept[0]]
    if beyond:
        return f"the tables would be too large: {automaton.limit}"
    left_out = {
        condition: automaton.left_out[condition]
        for at in own
        for condition in plan.ordered[0][at].conditions
        if condition in automaton.left_out
    }
    return "; ".join(f"{_words(one)} is not for tables: {why}" for one, why in left_out.items())


def _words(condition: Condition) -> str:
    what: str = condition.of
    if condition.name:
        what += f" {condition.name.decode('latin-1')}"
    value = condition.value.decode("latin-1")
    match condition.kind:
        case "present":
            return f"{what} is there"
        case "prefix":
            return f"{what} under {value}"
        case "regex":
            return f"{what} matches {value}"
        case _:
            return f"{what} is {value}"
