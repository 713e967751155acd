"""Reading a directory without a gateway: what is wrong in it, and what would not be accepted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import click

from gateway.control import ControlPlane, Options
from mesh.cli.output import dump
from mesh.cli.tables import reasons
from mesh.cli.up import plane
from mesh.model.decode import encode
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import NodeConfig
from mesh.sources.directory import Manifests
from mesh.sources.documents import Problem


class Offline(NamedTuple):
    """What a gateway would make of a directory. Ports count as bound."""

    problems: list[Problem]
    config: NodeConfig
    objects: dict[str, int]


def load(directory: Path, options: Options) -> Offline:
    """Read all files, derive everything."""
    manifests = Manifests(directory)
    update = manifests.scan()
    plane = ControlPlane(options)
    first = plane.apply(update.changes)
    second = plane.apply({}, binds=dict.fromkeys(first.ports, ""))
    statuses = {**first.statuses, **second.statuses}
    config, _ = NodeConfig.empty().change({**first.put, **second.put}, second.remove)
    problems = [*update.problems, *_not_accepted(manifests, statuses)]
    counts = {kind: len(objects) for kind, objects in sorted(update.changes.items())}
    return Offline(sorted(problems), config, counts)


def _not_accepted(
    manifests: Manifests, statuses: dict[tuple[str, ObjectKey], Any]
) -> list[Problem]:
    result = []
    for (kind, key), status in statuses.items():
        if status is None or not (why := reasons({"status": encode(status)})):
            continue
        file, document = manifests.origin(kind, key)
        result.append(
            Problem(
                file,
                document,
                kind=kind,
                namespace=key.namespace,
                name=key.name,
                rule="status",
                message=why,
                level="warning",
            )
        )
    return result


# Rules that only name where a problem was found; the message says it all.
_PLAIN_RULES = frozenset(("", "file", "yaml", "object", "kind", "duplicate", "status"))


def describe(problem: Problem) -> str:
    """A problem in a line: level, file and document, object, field, rule, message."""
    place = problem.file.removeprefix(f"{os.getcwd()}/")
    if problem.document:
        place += f" document {problem.document}"
    name = "/".join(filter(None, (problem.kind, problem.namespace, problem.name)))
    rule = "" if problem.rule in _PLAIN_RULES else problem.rule
    parts = (problem.level, place, name, problem.path, rule, problem.message)
    return ": ".join(part for part in parts if part)


def run(directory: Path, output: str, options: dict[str, Any]) -> None:
    """Print the problems; exit 1 when there are errors."""
    found = load(directory, plane(options))
    errors = sum(problem.level == "error" for problem in found.problems)
    if output != "text":
        items = [problem._asdict() for problem in found.problems]
        dump({"objects": found.objects, "problems": items}, output)
    else:
        for problem in found.problems:
            click.echo(describe(problem))
        objects = ", ".join(f"{count} {kind}" for kind, count in found.objects.items())
        warnings = sum(problem.level in ("warning", "unsupported") for problem in found.problems)
        click.echo(f"{objects or 'no objects'}; errors: {errors}, warnings: {warnings}")
    raise SystemExit(1 if errors else 0)
