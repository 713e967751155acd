"""Reading a directory without a gateway: what is wrong in it, and what would not be accepted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import click

from gateway.control import ControlPlane, Options
from mesh.agent.unmet import unmet, warnings
from mesh.cli.output import dump
from mesh.cli.up import plane
from mesh.model.decode import Object, encode
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
    statuses: dict[tuple[str, ObjectKey], Any] = {**first.statuses, **second.statuses}
    config, _ = NodeConfig.empty().change({**first.put, **second.put}, second.remove)
    found = {ident: unmet(encode(status)) for ident, status in statuses.items() if status}
    told = [(ident, why) for ident, why in found.items() if why]
    told += ((ident, why) for ident, said in first.problems.items() for why in said or ())
    # Nothing is ever gone in a first reading.
    objects = cast(dict[str, dict[ObjectKey, Object]], update.changes)
    problems = [*update.problems, *warnings(objects, told, manifests.origin)]
    counts = {kind: len(ones) for kind, ones in sorted(objects.items())}
    return Offline(sorted(problems), config, counts)


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
