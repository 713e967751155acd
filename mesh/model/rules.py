"""What must hold of an object beyond its schema: the register of checks and the walk that applies
them, and the uniqueness that list types ask for.

A check belongs to a model, or to one field of it, and holds wherever that model occurs. The checks
themselves stand in `rules_core`, `rules_gateway`, `rules_routes` and `rules_filters`; this module
knows no kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple, get_args, get_origin

from mesh.model.errors import FieldError
from mesh.model.meta import Model
from mesh.model.schema import found, hints, unwrap, wire_names

# What a check says: None, or what was found and what to do.
Finding = str | None


class Check(NamedTuple):
    """`find` is handed the value of `field` (an attribute's name; None: the model itself), never
    None and never an empty list or map. `rule` is the message of the CRD's rule."""

    model: type[Model]
    field: str | None
    rule: str
    find: Callable[[Any], Finding]


class Transition(NamedTuple):
    """A check of a field's old value against its new one."""

    model: type[Model]
    field: str
    rule: str
    find: Callable[[Any, Any], Finding]


class _Field(NamedTuple):
    attribute: str
    name: str
    checks: tuple[Check, ...]
    keys: tuple[str, ...]
    unique: bool
    listed: bool
    inner: _Plan | None


class _Plan(NamedTuple):
    checks: tuple[Check, ...]
    fields: tuple[_Field, ...]


class Rules:
    """A set of checks, ready to be applied to objects."""

    def __init__(self, checks: Sequence[Check], transitions: Sequence[Transition]) -> None:
        self.checks = tuple(checks)
        self.transitions = tuple(transitions)
        self._plan = cache(self._make_plan)

    def errors(self, obj: Model) -> list[FieldError]:
        """Everything that breaks a rule, in the order of the fields."""
        errors: list[FieldError] = []
        plan = self._plan(type(obj))
        if plan is not None:
            _walk(plan, obj, "", errors)
        return errors

    def update_errors(self, old: Model, new: Model) -> list[FieldError]:
        """What forbids `new` to take the place of `old`, an object of the same kind and key."""
        return _compare(self.transitions, old, new, "")

    def _make_plan(self, model: type[Model]) -> _Plan | None:
        """What to look at below `model`; None where nothing is checked."""
        fields = []
        for name, attribute in wire_names(model).items():
            bare, metas = unwrap(hints(model)[attribute])
            listed = get_origin(bare) is tuple
            item = unwrap(get_args(bare)[0])[0] if listed else bare
            extra = {key: value for meta in metas for key, value in (meta.extra or {}).items()}
            field = _Field(
                attribute=attribute,
                name=name,
                checks=self._checks(model, attribute),
                keys=extra.get("list_map_keys", ()),
                unique=extra.get("set", False),
                listed=listed,
                inner=self._plan(item) if _is_model(item) else None,
            )
            if field.checks or field.keys or field.unique or field.inner:
                fields.append(field)
        checks = self._checks(model, None)
        return _Plan(checks, tuple(fields)) if checks or fields else None

    def _checks(self, model: type[Model], field: str | None) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if c.model is model and c.field == field)


def duplicates(keys: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Pairs of indexes whose keys are equal, each later one with the first of its kind."""
    first: dict[Hashable, int] = {}
    return [
        (first[key], index)
        for index, key in enumerate(keys)
        if first.setdefault(key, index) != index
    ]


def _is_model(bare: Any) -> bool:
    return isinstance(bare, type) and issubclass(bare, Model)


def _walk(plan: _Plan, value: Any, path: str, errors: list[FieldError]) -> None:
    for check in plan.checks:
        finding = check.find(value)
        if finding is not None:
            errors.append(FieldError(path, check.rule, finding))
    for field in plan.fields:
        item = getattr(value, field.attribute)
        if item is None or item == () or item == {}:
            continue
        where = f"{path}.{field.name}" if path else field.name
        for check in field.checks:
            finding = check.find(item)
            if finding is not None:
                errors.append(FieldError(where, check.rule, finding))
        if field.keys:
            _unique_keys(field.keys, item, where, errors)
        if field.unique and len(set(item)) != len(item):
            for first, later in duplicates(item):
                errors.append(
                    FieldError(
                        f"{where}[{later}]",
                        "x-kubernetes-list-type: set",
                        f"{found(item[later])} already stands at [{first}]; keep one",
                    )
                )
        if field.inner is None:
            continue
        if field.listed:
            for index, element in enumerate(item):
                _walk(field.inner, element, f"{where}[{index}]", errors)
        else:
            _walk(field.inner, item, where, errors)


def _unique_keys(
    names: tuple[str, ...], items: Sequence[Model], where: str, errors: list[FieldError]
) -> None:
    if len(items) == 1:
        return
    keys = [tuple(getattr(item, name) for name in names) for item in items]
    for first, later in duplicates(keys):
        key = ", ".join(
            f"{name} {found(part)}" for name, part in zip(names, keys[later], strict=True)
        )
        errors.append(
            FieldError(
                f"{where}[{later}]",
                f"x-kubernetes-list-map-keys: {', '.join(names)}",
                f"{key} already stands at [{first}]; each may stand once",
            )
        )


def _compare(
    transitions: Sequence[Transition], old: Model, new: Model, path: str
) -> list[FieldError]:
    errors = []
    for name, attribute in wire_names(type(new)).items():
        before, after = getattr(old, attribute), getattr(new, attribute)
        where = f"{path}.{name}" if path else name
        for transition in transitions:
            if transition.model is type(new) and transition.field == attribute:
                finding = transition.find(before, after)
                if finding is not None:
                    errors.append(FieldError(where, transition.rule, finding))
        if isinstance(before, Model) and isinstance(after, Model):
            errors += _compare(transitions, before, after, where)
    return errors
