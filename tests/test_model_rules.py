"""Every check with an object it accepts and one it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.model.decode import RULES, InvalidObject, decode, parse, update_errors
from mesh.model.meta import Model
from mesh.model.rules import Check, Finding, Rules
from tests.model_cases import CASES, GW, PORTLESS, Case, http, manifest, path


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.bad['kind']}-{case.rule[:70]}")
def test_check(case: Case) -> None:
    decode(case.good)
    with pytest.raises(InvalidObject) as refused:
        decode(case.bad)
    places = [error.path for error in refused.value.errors if error.rule.startswith(case.rule)]
    assert places == [case.where]


def test_every_check_accepts_and_refuses_here() -> None:
    said: dict[tuple[type[Model], str | None, str], set[bool]] = {}

    def recorded(check: Check) -> Check:
        results = said.setdefault((check.model, check.field, check.rule), set())

        def find(value: Any) -> Finding:
            finding = check.find(value)
            results.add(finding is None)
            return finding

        return check._replace(find=find)

    rules = Rules([recorded(check) for check in RULES.checks], ())
    for case in CASES:
        for raw in (case.good, case.bad):
            rules.errors(parse(raw))
    assert {key for key, results in said.items() if results != {True, False}} == set()


def test_all_errors_are_reported_at_once() -> None:
    raw = http(
        {"matches": [{"path": {"value": "a"}}], "backendRefs": [PORTLESS]},
        {"filters": [{"type": "CORS"}]},
        parentRefs=[GW, GW],
    )
    with pytest.raises(InvalidObject) as refused:
        decode(raw)
    assert [error.path for error in refused.value.errors] == [
        "spec.parentRefs",
        "spec.rules[0].matches[0].path",
        "spec.rules[0].backendRefs[0]",
        "spec.rules[1].filters[0]",
    ]
    assert all(error.message for error in refused.value.errors)


def gateway_class(name: str) -> Any:
    return decode(manifest("GatewayClass", {"controllerName": name}))


def test_controller_name_is_immutable() -> None:
    old, new = gateway_class("a.example/x"), gateway_class("a.example/y")
    (error,) = update_errors(old, new)
    assert (error.path, error.rule) == ("spec.controllerName", "Value is immutable")
    assert update_errors(old, old) == ()


def test_update_of_other_kinds() -> None:
    assert update_errors(decode(path("/a")), decode(path("/b"))) == ()
