"""`weft get`: objects with their status as the running gateway has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mesh.cli.client import CliError, UsageError, ask
from mesh.cli.output import dump, note, table
from mesh.cli.tables import rows
from mesh.cli.validate import describe
from mesh.model.decode import KINDS, KindInfo
from mesh.sources.documents import Problem


def kind_info(text: str) -> KindInfo:
    """A kind by any name that people use: Gateway, gateways, gtw, gateways.gateway.networking..."""
    wanted = text.lower()
    for (group, kind), info in KINDS.items():
        names = {kind.lower(), info.plural, *info.short}
        if wanted in names | {f"{name}.{group}" for name in names}:
            return info
    known = ", ".join(sorted(info.plural for info in KINDS.values()))
    raise UsageError(f"there is no kind {text!r} in Weft: it has {known}; and problems")


def run(
    run_dir: Path,
    kind: str,
    name: str | None,
    namespace: str | None,
    all_namespaces: bool,
    output: str,
) -> None:
    if kind.lower() in ("problem", "problems"):
        _problems(run_dir, output)
        return
    info = kind_info(kind)
    query = [("kind", info.kind)]
    if info.namespaced and not all_namespaces:
        query.append(("namespace", namespace or "default"))
    if name is not None:
        query.append(("name", name))
    items: list[dict[str, Any]] = ask(run_dir, "/objects", query)["items"]
    where = "" if all_namespaces or not info.namespaced else f" in {namespace or 'default'}"
    if name is not None and not items:
        raise CliError(f"there is no {info.kind} {name}{where}; -A looks in all namespaces")
    if output in ("json", "yaml"):
        single = name is not None and len(items) == 1
        dump(items[0] if single else {"apiVersion": "v1", "kind": "List", "items": items}, output)
    elif items:
        shown = info.namespaced and all_namespaces
        table(*rows(info.kind, items, namespaces=shown, wide=output == "wide"))
    else:
        note(f"no {info.plural}{where}{'; -A looks in all namespaces' if where else ''}")


def _problems(run_dir: Path, output: str) -> None:
    items = ask(run_dir, "/problems")["items"]
    if output in ("json", "yaml"):
        dump({"items": items}, output)
        return
    for item in items:
        click.echo(describe(Problem(**item)))
    if not items:
        note("no problems in the manifests")
