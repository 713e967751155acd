"""The test data: cases, their manifests, and what of them Weft claims to support."""

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
    """A test of the suite: objects to apply, then steps in order. `objects` come beside those of
    the manifests; `own`: objects or steps are not of the test data."""

    name: str
    profiles: tuple[str, ...]
    features: tuple[str, ...]
    manifests: tuple[str, ...]
    steps: tuple[Json, ...]
    objects: tuple[Json, ...] = ()
    own: bool = False

    @property
    def mesh(self) -> bool:
        return "Mesh" in self.features

    def unsupported(self, claimed: frozenset[str]) -> str:
        """Why Weft does not claim to pass this; "" if it does."""
        missing = [name for name in self.features if name not in claimed]
        return f"needs {', '.join(missing)}" if missing else ""

    def all_objects(self, replacements: dict[str, str]) -> list[Json]:
        from_files = [
            obj for path in self.manifests for obj in load_objects(SHARED / path, replacements)
        ]
        return [*from_files, *self.objects]


def load_cases(root: Path = SHARED) -> list[Case]:
    """All tests that the test data has steps for, or at least manifests."""
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


def published(root: Path = SHARED) -> list[Case]:
    """All tests of the suite by name, with profiles and features and nothing else."""
    cases = []
    for line in (root / "features.md").read_text().splitlines():
        # | ShortName | YAML | Level | Features | Profiles | P | Conv |
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 7 or cells[2] not in ("Core", "Extended"):
            continue
        features = tuple(cell.split()[0] for cell in cells[3].split(", "))
        profiles = tuple(cells[4].split(", ")) if cells[4] != "none" else ()
        cases.append(Case(cells[0], profiles, features, (), ()))
    return cases


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
