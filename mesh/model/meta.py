"""What every Kubernetes object has: metadata, keys, label selectors, conditions, durations.

Sources: Kubernetes apimachinery meta/v1, GEP-2257 (durations). Knows no particular kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from mesh.model import scalars as s

# Labels of what Weft makes for others ("Recommended Labels"; "EndpointSlices", "Management": other
# controllers leave them alone).
MANAGED_LABEL = "app.kubernetes.io/managed-by"
SLICE_MANAGED_LABEL = "endpointslice.kubernetes.io/managed-by"
MANAGED_BY = "weft.dev"


class ObjectKey(NamedTuple):
    """An object within its kind. `namespace` is "" for cluster-scoped kinds."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", gc=False):
    """Base of every object and part of one. Sequences are tuples; maps are dicts that nobody
    changes. An absent list is (), another absent field None or its schema's default."""


class LenientModel(Model, frozen=True, forbid_unknown_fields=False, gc=False):
    """A part of which only some fields are read: others are passed over, not refused."""


class OwnerReference(Model, frozen=True, kw_only=True):
    api_version: str
    kind: str
    name: str
    uid: str
    controller: bool | None = None
    block_owner_deletion: bool | None = None


class ManagedFieldsEntry(Model, frozen=True, kw_only=True):
    manager: str | None = None
    operation: str | None = None
    api_version: str | None = None
    time: s.Timestamp | None = None
    fields_type: str | None = None
    fields_v1: dict[str, Any] | None = msgspec.field(default=None, name="fieldsV1")
    subresource: str | None = None


class ObjectMeta(Model, frozen=True, kw_only=True):
    """metav1.ObjectMeta. Times are RFC 3339 as they were written."""

    name: str = ""
    generate_name: str | None = None
    namespace: str = ""
    self_link: str | None = None
    uid: str | None = None
    resource_version: str | None = None
    generation: s.Int64 | None = None
    creation_timestamp: s.Timestamp | None = None
    deletion_timestamp: s.Timestamp | None = None
    deletion_grace_period_seconds: s.Int64 | None = None
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    annotations: dict[str, str] = msgspec.field(default_factory=dict)
    owner_references: tuple[OwnerReference, ...] = ()
    finalizers: tuple[str, ...] = ()
    managed_fields: tuple[ManagedFieldsEntry, ...] = ()


class LabelSelectorRequirement(Model, frozen=True, kw_only=True):
    """metav1.LabelSelectorRequirement. The schema allows any operator; one that Kubernetes does
    not know selects nothing."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
            case "DoesNotExist":
                return self.key not in labels
        return False


class LabelSelector(Model, frozen=True, kw_only=True):
    """metav1.LabelSelector: all of it must hold, so an empty one selects everything."""

    match_expressions: tuple[LabelSelectorRequirement, ...] = ()
    match_labels: dict[str, str] = msgspec.field(default_factory=dict)

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            requirement.matches(labels) for requirement in self.match_expressions
        )


class Condition(Model, frozen=True, kw_only=True):
    """metav1.Condition."""

    type: Annotated[
        str,
        Meta(
            max_length=316,
            pattern=r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
            r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])\Z",
        ),
    ]
    status: Literal["True", "False", "Unknown"]
    reason: Annotated[
        str,
        Meta(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?\Z"),
    ]
    message: Annotated[str, Meta(max_length=32768)]
    last_transition_time: s.Timestamp
    observed_generation: s.NonNegativeInt64 | None = None


_UNITS = {"h": 3_600_000, "m": 60_000, "s": 1_000, "ms": 1}
_TERM = re.compile(r"([0-9]{1,5})(ms|h|m|s)")
_DURATION = re.compile(r"(?:[0-9]{1,5}(?:h|m|s|ms)){1,4}")


def parse_duration(text: str) -> int:
    """A GEP-2257 duration ("1h30m", "10ms", "0s") in milliseconds. ValueError: not one."""
    if not _DURATION.fullmatch(text):
        raise ValueError(
            f"{text!r} is not a duration: up to four numbers of at most five digits, each with a"
            ' unit h, m, s or ms, such as "1h30m" or "500ms"'
        )
    return sum(int(count) * _UNITS[unit] for count, unit in _TERM.findall(text))


_SAID = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


def say_duration(seconds: float) -> str:
    """For people: the two largest units, whole, such as "1h5m"; "0s" for none or less."""
    left = max(0, int(seconds))
    for size, unit, part, smaller in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if left >= size:
            return f"{left // size}{unit}{left % size // part}{smaller}"
    return f"{left}s"
