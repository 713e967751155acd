"""`weft explain`: where a request would go, and why not elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from mesh.agent.options import DEFAULT_MESH_ADDRESSES
from mesh.agent.target import TargetError, explained, parse_client, parse_target
from mesh.cli.client import UsageError, ask
from mesh.cli.output import dump, note
from mesh.cli.up import plane
from mesh.cli.validate import load

# Of the candidates not chosen, so many are for people.
_SHOWN = 20

Answer = dict[str, Any]


def run(
    run_dir: Path,
    method: str,
    url: str,
    headers: tuple[str, ...],
    address: str | None,
    client: str | None,
    manifests: Path | None,
    output: str,
    options: dict[str, Any],
) -> None:
    """Exit 0 when a backend or a redirect answers, else 1."""
    try:
        target = parse_target(method, url, list(headers))
        pod = parse_client(client) if client is not None else None
    except TargetError as error:
        raise UsageError(str(error)) from None
    answer: Answer
    if manifests is None:
        query = [("method", method), ("url", url), *(("header", header) for header in headers)]
        if address is not None:
            query.append(("address", address))
        if client is not None:
            query.append(("from", client))
        answer = ask(run_dir, "/explain", query)
    else:
        if pod is not None and not options["mesh_address"]:
            options = {**options, "mesh_address": DEFAULT_MESH_ADDRESSES}
        offline = load(manifests, plane(options))
        if any(problem.level == "error" for problem in offline.problems):
            note(f"some manifests have errors and do not count: weft validate {manifests}")
        sections = offline.config.sections
        answer = msgspec.to_builtins(explained(sections, target, address=address, client=pod))
    if output == "text":
        _show(answer)
    else:
        dump(answer, output)
    raise SystemExit(0 if _served(answer) else 1)


def _served(answer: Answer) -> bool:
    status = answer["status"]
    if status is not None:
        return bool(status < 400)
    return any(backend["share"] and not backend["note"] for backend in answer["backends"])


def _show(answer: Answer) -> None:
    for name in ("gateway", "service", "way", "kernel", "listener", "route"):
        if answer[name]:
            click.echo(f"{name + ':':<10}{answer[name]}")
    if answer["rule_index"] is not None:
        number, match = answer["rule_index"], answer["match_index"]
        name = "" if answer["rule"] in ("", str(number)) else f" ({answer['rule']})"
        click.echo(f"rule:     spec.rules[{number}]{name}, matches[{match}]")
    for text in answer["filters"]:
        click.echo(f"filter:   {text}")
    for backend in answer["backends"]:
        click.echo(_backend(backend))
        for text in backend["filters"]:
            click.echo(f"          filter: {text}")
    if answer["status"] is not None or answer["detail"]:
        status = "none" if answer["status"] is None else answer["status"]
        click.echo(f"answer:   {status}: {answer['detail']}")
    if answer["candidates"]:
        click.echo("\nnot chosen:")
    for one in answer["candidates"][:_SHOWN]:
        rule = f" rule {one['rule']}" if one["rule"] else ""
        click.echo(f"  {one['route']}{rule} on {one['listener']}: {one['reason']}")
    if (more := len(answer["candidates"]) - _SHOWN) > 0:
        click.echo(f"  and {more} that are less near; -o json has them all")


def _backend(backend: Answer) -> str:
    where = ", ".join(backend["endpoints"]) or backend["note"]
    name = (backend["cluster"] or "unresolved").removeprefix("cluster/")
    both = f"{where}; {backend['note']}" if backend["endpoints"] and backend["note"] else where
    return f"backend:  {name} ({backend['share']:.0%}): {both}"
