"""The test data: cases, their manifests, and what of them the gateway claims to support."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SHARED = Path(__file__).resolve().parents[3] / "shared" / "gateway-api"
Json = dict[str, Any]

# The suite has tests that run another test's steps on manifests of their own.
SAME_STEPS = {
    "HTTPRouteBackendRequestHeaderModifier": "HTTPRouteRequestHeaderModifier",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A test of the suite: objects to apply, then steps in order."""

    name: str
    profiles: tuple[str, ...]
    features: tuple[str, ...]
    manifests: tuple[str, ...]
    steps: tuple[Json, ...]

    def unsupported(self, claimed: frozenset[str]) -> str:
        """Why the gateway does not claim to pass this; "" if it does."""
        missing = [name for name in self.features if name not in claimed]
        return f"needs {', '.join(missing)}" if missing else ""


def load_cases(root: Path = SHARED) -> list[Case]:
    tests = json.loads((root / "cases.json").read_text())["tests"]
    steps = {test["shortName"]: test["steps"] for test in tests}
    return [
        Case(
            name=test["shortName"],
            profiles=tuple(test["profiles"]),
            features=tuple(feature["name"] for feature in test["features"]),
            manifests=tuple(test["manifests"]),
            steps=tuple(test["steps"] or steps.get(SAME_STEPS.get(test["shortName"], ""), ())),
        )
        for test in tests
    ]


def load_objects(path: Path, replacements: dict[str, str]) -> list[Json]:
    """The objects of a manifest file, placeholders replaced."""
    text = path.read_text()
    for placeholder, value in replacements.items():
        text = text.replace(placeholder, value)
    return [document for document in yaml.safe_load_all(text) if document]


def guarded(step: Json, claimed: frozenset[str]) -> bool:
    """Whether the step's feature guard lets it run: every "X" claimed, no "not X" claimed."""
    return all(
        (guard.removeprefix("not ") in claimed) != guard.startswith("not ")
        for guard in step.get("if", ())
    )
