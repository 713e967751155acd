"""Audit mode of a policy or of all policies of a Namespace, by annotation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mesh.model.derive import View
from mesh.policy.spec import PolicyKey

AUDIT = "weft.dev/policy-audit"


def audited(obj: Any) -> bool:
    """What is refused is only told. A value that is none is no reason to let anything pass."""
    return obj.metadata.annotations.get(AUDIT) == "true"  # type: ignore[no-any-return]


def problems(view: View, key: PolicyKey) -> tuple[str, ...] | None:
    """Of a policy (for the derivation)."""
    return tuple(misused(view.get("Policy", key))) or None


def misused(obj: Any) -> Iterator[str]:
    """What is wrong with the annotation of a policy or Namespace."""
    value = obj.metadata.annotations.get(AUDIT, "false")
    if value not in ("true", "false"):
        yield (
            f"annotation {AUDIT} is {value[:100]!r}, not 'true' or 'false'; until that is mended,"
            " policies are enforced"
        )
