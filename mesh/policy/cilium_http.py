"""toPorts[].rules of Cilium's policies: HTTP rules as the proxy takes them; all else is refused.

Source: Cilium's pkg/policy/api/http.go and the CRD's descriptions. Regular expressions are compiled
here once, to be refused by field, and bounded for a policy as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator

from l7proxy.field_rules import Refused, check_modifiable, check_name, check_value
from l7proxy.http_policy import regex_size
from mesh.model import ciliumnetworkpolicy as c
from mesh.model.policyconfig import HeaderRule, HttpRule
from mesh.policy.problems import Problems

# Of all expressions of a policy together, in RE2's instructions.
MAX_REGEX_SIZE = 20_000

_NOT_SUPPORTED = "is not supported"


def http_rules(group: c.PortRule, where: str, problems: Problems) -> tuple[HttpRule, ...] | None:
    """None: nothing is asked of requests."""
    fields: tuple[tuple[str, object], ...] = (
        ("listener", group.listener),
        ("originatingTLS", group.originating_tls),
        ("terminatingTLS", group.terminating_tls),
        ("serverNames", group.server_names),
    )
    for name, value in fields:
        if value:
            problems.add(f"{where}.{name}", _NOT_SUPPORTED)
    rules = group.rules
    if rules is None:
        return None
    fields = (
        ("dns", rules.dns),
        ("kafka", rules.kafka),
        ("l7", rules.l7),
        ("l7proto", rules.l7proto),
    )
    for name, value in fields:
        if value:
            problems.add(f"{where}.rules.{name}", f"{_NOT_SUPPORTED}; only http is")
    if not rules.http:
        return None
    place = f"{where}.rules.http"
    if not group.ports:
        problems.add(f"{where}.ports", "HTTP rules need ports")
    for index, port in enumerate(group.ports):
        if port.protocol != "TCP":
            problems.add(
                f"{where}.ports[{index}].protocol",
                f"HTTP rules go with TCP only, and this says {port.protocol}",
            )
        if port.port.strip("0") == "":
            problems.add(f"{where}.ports[{index}].port", "HTTP rules do not go with port 0")
    return tuple(
        _rule(rule, f"{place}[{index}]", problems) for index, rule in enumerate(rules.http)
    )


def _rule(rule: c.PortRuleHTTP, where: str, problems: Problems) -> HttpRule:
    for name, source in (("method", rule.method), ("path", rule.path), ("host", rule.host)):
        if source:
            _count(source, f"{where}.{name}", problems)
    return HttpRule(
        rule.method or None,
        rule.path or None,
        rule.host or None,
        (*_headers(rule, where, problems), *_matches(rule, where, problems)),
    )


def _count(source: str, field: str, problems: Problems) -> None:
    try:
        problems.regex_size += regex_size(source, field)
    except Refused as error:
        problems.add(field, str(error).removeprefix(f"{field}: "))
        return
    if problems.regex_size > MAX_REGEX_SIZE:
        problems.add(
            field,
            "the policy's regular expressions are too large together: more than"
            f" {MAX_REGEX_SIZE} instructions; make several policies, or simpler ones",
        )
        problems.regex_size = 0  # said once


def _headers(rule: c.PortRuleHTTP, where: str, problems: Problems) -> Iterator[HeaderRule]:
    """ "Name: value" with a blank between, or a name alone."""
    for index, text in enumerate(rule.headers):
        name, blank, value = text.partition(" ")
        field = f"{where}.headers[{index}]"
        yield from _header(
            name.removesuffix(":") if blank else name, value if blank else None, field, problems
        )


def _matches(rule: c.PortRuleHTTP, where: str, problems: Problems) -> Iterator[HeaderRule]:
    for index, match in enumerate(rule.header_matches):
        field = f"{where}.headerMatches[{index}]"
        if match.secret is not None:
            problems.add(f"{field}.secret", f"{_NOT_SUPPORTED}; use value")
        for header in _header(match.name, match.value or None, field, problems):
            action = match.mismatch or "DENY"
            if action in ("ADD", "DELETE", "REPLACE"):
                try:
                    check_modifiable(match.name, f"{field}.name")
                except Refused as error:
                    problems.add(f"{field}.name", str(error).removeprefix(f"{field}.name: "))
            if action in ("ADD", "REPLACE") and not match.value:
                problems.add(f"{field}.value", f"{action} needs a value")
            yield HeaderRule(header.name, header.value, action)


def _header(name: str, value: str | None, field: str, problems: Problems) -> Iterator[HeaderRule]:
    try:
        check_name(name, field)
        if value is not None:
            check_value(value, field)
    except Refused as error:
        problems.add(field, str(error).removeprefix(f"{field}: "))
    else:
        yield HeaderRule(name.lower(), value)
