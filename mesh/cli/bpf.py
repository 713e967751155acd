"""`weft bpf`: what is in the kernel, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from l7proxy.explain_automaton import describe
from mesh.agent.options import DEFAULT_MESH_ADDRESSES
from mesh.agent.target import TargetError, parse_service
from mesh.cli.client import UsageError, ask
from mesh.cli.output import dump
from mesh.cli.up import plane
from mesh.cli.validate import load

# Of the atoms, so many are for people.
_SHOWN = 20


def automaton(
    run_dir: Path, service: str, manifests: Path | None, output: str, options: dict[str, Any]
) -> None:
    """Exit 0; 1 if no port of the Service speaks HTTP here, or there is no such Service."""
    try:
        named = parse_service(service)
    except TargetError as error:
        raise UsageError(str(error)) from None
    if manifests is None:
        items = ask(run_dir, "/bpf/automaton", [("service", service)])["items"]
    else:
        if not options["mesh_address"]:
            options = {**options, "mesh_address": DEFAULT_MESH_ADDRESSES}
        sections = load(manifests, plane(options)).config.sections
        items = [
            {**msgspec.to_builtins(one), "in_force": None, "refused": ""}
            for one in describe(sections, *named)
        ]
    if output != "text":
        dump({"items": items}, output)
    elif not items:
        click.echo(f"no port of Service {service} has its HTTP requests routed or judged here")
    else:
        click.echo("\n\n".join(map(_shown, items)))
    raise SystemExit(0 if items else 1)


def _shown(one: dict[str, Any]) -> str:
    force = {True: "in force", False: "not in force", None: "not asked for"}[one["in_force"]]
    if one["refused"]:
        force += f": {one['refused']}"
    lines = [
        f"service:    {one['service']}",
        f"listener:   {one['listener'] or 'none: no route is about it'}",
        f"generation: {one['generation']} ({force})",
        f"size:       {one['bytes']} bytes: {one['states']} states, {one['classes']} classes of"
        f" bytes; compiled in {one['compile_ms']:.0f} ms",
        f"atoms:      {len(one['atoms'])}, and {one['paths']} kinds of paths",
    ]
    lines += [f"            {atom}" for atom in one["atoms"][:_SHOWN]]
    if (more := len(one["atoms"]) - _SHOWN) > 0:
        lines.append(f"            and {more} more; -o json has them all")
    lines += [f"policy:     {source}" for source in one["policies"]]
    if one["limit"]:
        lines.append(f"limit:      {one['limit']}: the rules from there on are the proxy's")
    for rule in one["rules"]:
        name = f"{rule['route']} rule {rule['rule']}" if rule["route"] else "as it is asked for"
        where = f"proxy: {rule['why']}" if rule["why"] else "kernel"
        lines.append(f"rule {rule['number']:<6} {name}: {where}")
    return "\n".join(lines)
