"""mesh.model.derive: whatever the steps, the tables equal those computed from nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.model.derive import Change, Derivation, Index, Rule, View

# The sample: orders of goods with prices. A chain of rules keyed by tables and by indexes, with a
# value that often stays equal (`size`), an entry that comes and goes (`total`), and an error.
GOODS = st.integers(0, 3)
ORDERS = st.integers(0, 5)


def total(view: View, order: int) -> int | None:
    goods = view.get("orders", order)
    prices = [view.get("prices", good) for good in goods]
    return None if None in prices else sum(prices)


def size(view: View, order: int) -> str:
    return "large" if view.get("totals", order) > 10 else "small"


def demand(view: View, good: int) -> tuple[int, ...]:
    return tuple(sorted(view.bucket("orders_by_good", good)))


def share(view: View, good: int) -> int:
    orders = view.get("demand", good)
    return 100 // len([o for o in orders if view.get("sizes", o) == "large"])


def census(view: View, size: str) -> int:
    return len(view.bucket("orders_by_size", size))


def sample(calls: Counter[tuple[str, Any]] | None = None) -> Derivation:
    def counted(rule: Rule) -> Rule:
        def compute(view: View, key: Any) -> Any:
            if calls is not None:
                calls[rule.name, key] += 1
            return rule.compute(view, key)

        return rule._replace(compute=compute)

    rules = (
        Rule("totals", "orders", total),
        Rule("sizes", "totals", size),
        Rule("demand", "orders_by_good", demand),
        Rule("shares", "demand", share),
        Rule("census", "orders_by_size", census),
    )
    indexes = (
        Index("orders_by_good", "orders", lambda key, goods: goods),
        Index("orders_by_size", "sizes", lambda key, size: (size,)),
    )
    return Derivation(("orders", "prices"), tuple(map(counted, rules)), indexes)


steps = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "orders": st.dictionaries(
                ORDERS, st.none() | st.lists(GOODS, max_size=3).map(tuple), max_size=4
            ),
            "prices": st.dictionaries(GOODS, st.none() | st.integers(0, 9), max_size=3),
        },
    ),
    max_size=12,
)


@given(steps)
def test_steps_lead_where_computing_from_nothing_leads(steps: list[dict[str, Any]]) -> None:
    incremental = sample()
    facts: dict[str, dict[Any, Any]] = {"orders": {}, "prices": {}}
    replayed: dict[str, dict[Any, Any]] = {name: {} for name in incremental.tables}
    for step in steps:
        for name, table in incremental.apply(step).items():
            for key, change in table.items():
                assert replayed[name].get(key) == change.old
                assert change.old is not None or change.new is not None
                if change.new is None:
                    del replayed[name][key]
                else:
                    replayed[name][key] = change.new
        for name, entries in step.items():
            facts[name].update(entries)
        assert replayed == incremental.tables
    fresh = sample()
    fresh.apply(facts)
    assert incremental.tables == fresh.tables
    assert incremental.indexes == fresh.indexes
    assert incremental.failures.keys() == fresh.failures.keys()
    # Nothing is remembered that a fresh start would not: no leak.
    assert incremental._reads == fresh._reads
    assert incremental._readers == fresh._readers


def test_only_what_read_a_changed_fact_is_computed_again() -> None:
    calls: Counter[tuple[str, Any]] = Counter()
    derivation = sample(calls)
    derivation.apply({"prices": {0: 4, 1: 7}, "orders": {n: (n % 2,) for n in range(100)}})
    calls.clear()
    changes = derivation.apply({"prices": {0: 5}})
    assert {key for table, key in calls if table == "totals"} == set(range(0, 100, 2))
    # Every total changed, no size did: it stops there.
    assert changes["totals"][2] == Change(4, 5)
    assert "census" not in changes
    assert not [table for table, _ in calls if table in ("shares", "census", "demand")]


def test_setting_what_is_there_changes_nothing() -> None:
    derivation = sample()
    derivation.apply({"prices": {0: 4}})
    assert derivation.apply({"prices": {0: 4, 3: None}}) == {}


def test_a_function_that_raises_costs_its_own_value_only_and_heals() -> None:
    derivation = sample()
    derivation.apply({"prices": {0: 1, 1: 90}, "orders": {1: (0,), 2: (1,)}})
    assert derivation.tables["shares"] == {1: 100}
    assert isinstance(derivation.failures["shares", 0], ZeroDivisionError)
    derivation.apply({"prices": {0: 50}})
    assert derivation.tables["shares"] == {0: 100, 1: 100}
    assert not derivation.failures


def test_a_rule_reads_only_what_stands_before_it() -> None:
    rules = (
        Rule("first", "facts", lambda view, key: view.get("second", key)),
        Rule("second", "facts", lambda view, key: 1),
    )
    derivation = Derivation(("facts",), rules, ())
    derivation.apply({"facts": {1: 1}})
    assert "not a table or index before this rule" in str(derivation.failures["first", 1])


def test_names_are_checked() -> None:
    rule = Rule("a", "facts", lambda view, key: 1)
    with pytest.raises(ValueError, match="name taken"):
        Derivation(("facts",), (rule, rule), ())
    with pytest.raises(ValueError, match="keys not before it"):
        Derivation(("facts",), (rule._replace(keys="later"),), ())


def test_one_index_over_two_tables() -> None:
    indexes = (
        Index("people_in", "orders", lambda who, where: (where,)),
        Index("people_in", "visits", lambda who, where: (where,)),
    )
    count = Rule("counts", "people_in", lambda view, where: len(view.bucket("people_in", where)))
    derivation = Derivation(("orders", "visits"), (count,), indexes)
    derivation.apply({"orders": {"a": "x"}, "visits": {"b": "x", "c": "y"}})
    assert derivation.tables["counts"] == {"x": 2, "y": 1}
    derivation.apply({"orders": {"a": None}})
    assert derivation.tables["counts"] == {"x": 1, "y": 1}
    derivation.apply({"visits": {"b": None, "c": None}})
    assert derivation.tables["counts"] == derivation.indexes["people_in"] == {}


def test_an_index_is_read_when_all_its_tables_are_there() -> None:
    indexes = (
        Index("people_in", "orders", lambda who, where: (where,)),
        Index("people_in", "visits", lambda who, where: (where,)),
    )
    visits = Rule("visits", "orders", lambda view, who: None)
    count = Rule("counts", "people_in", lambda view, where: 1)
    Derivation(("orders",), (visits, count), indexes)
    with pytest.raises(ValueError, match="keys not before it"):
        Derivation(("orders",), (count, visits), indexes)
