"""`weft policy get` and `weft policy explain`: whom policies select, and what they decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from mesh.cli.client import UsageError, ask
from mesh.cli.options import run_dir_option
from mesh.cli.output import dump, note, table

# Of the pods that a policy selects so many are named; -o wide names all.
_NAMED = 3


@click.group()
def policy() -> None:
    """NetworkPolicies and Cilium's: whom they select, and what they decide.

    Exit codes: 0 well, 1 refused, 2 wrong usage, 3 no gateway runs.
    """


@policy.command("get")
@click.option("-n", "--namespace", help="Only of this namespace.  [default: all]")
@click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json", "yaml"]),
    default="table",
    help="Format.",
)
@run_dir_option
def get(namespace: str | None, output: str, run_dir: Path) -> None:
    """Show all policies: which pods they select, and whether they are enforced.

    Exit codes: 0 all are enforced as written, 1 some are refused, 3 no gateway runs.
    """
    items = ask(run_dir, "/policies")["items"]
    items = [one for one in items if namespace in (None, one["namespace"])]
    if output in ("json", "yaml"):
        dump({"items": items}, output)
    elif items:
        headers = ["NAMESPACE", "NAME", "KIND", "SELECTS", "STATE"]
        table(headers, [_row(one, wide=output == "wide") for one in items])
    else:
        note("no policies")
    raise SystemExit(1 if any(one["unmet"] for one in items) else 0)


def _row(item: dict[str, Any], *, wide: bool) -> list[str]:
    pods = item["pods"]
    shown = pods if wide else pods[:_NAMED]
    more = f" and {len(pods) - len(shown)} more" if len(pods) > len(shown) else ""
    state = item["unmet"] or ("audited" if item["audit"] else "enforced")
    selects = (", ".join(shown) + more) or "no pods"
    return [item["namespace"] or "<none>", item["name"], item["kind"], selects, state]


@policy.command("explain")
@click.argument("method", required=False)
@click.argument("path", required=False)
@click.option(
    "--from", "source", metavar="POD", required=True, help="NAMESPACE/POD, or an address."
)
@click.option("--to", "destination", metavar="POD", required=True, help="The same.")
@click.option("--port", metavar="N", required=True, help="Of the pod; of ICMP the type.")
@click.option("--protocol", default="TCP", show_default=True, help="TCP, UDP, SCTP, ICMP, ICMPv6.")
@click.option("-H", "--header", metavar="'NAME: VALUE'", multiple=True, help="May be repeated.")
@click.option(
    "--manifests",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Explain for this directory; no gateway need run.",
)
@click.option(
    "-o", "--output", type=click.Choice(["text", "json", "yaml"]), default="text", help="Format."
)
@run_dir_option
def explain(
    method: str | None,
    path: str | None,
    source: str,
    destination: str,
    port: str,
    protocol: str,
    header: tuple[str, ...],
    manifests: Path | None,
    output: str,
    run_dir: Path,
) -> None:
    """Say whether a connection, or the request METHOD PATH, may pass from one pod to another, which
    rule decides, and what would change that.

    Both pods' policies count, those of their own nodes. The port is the pod's, not its Service's.

    Exit codes: 0 it passes, 1 it is refused, 2 wrong usage, 3 no gateway runs.
    """
    query = [("from", source), ("to", destination), ("port", port), ("protocol", protocol)]
    query += [("method", method)] if method is not None else []
    query += [("path", path)] if path is not None else []
    if manifests is None:
        answer = ask(run_dir, "/policy/explain", [*query, *(("header", one) for one in header)])
    else:
        answer = _offline(manifests, dict(query), header)
    if output == "text":
        _show(answer)
    else:
        dump(answer, output)
    raise SystemExit(0 if answer["allowed"] else 1)


def _offline(directory: Path, query: dict[str, str], headers: tuple[str, ...]) -> dict[str, Any]:
    from gateway.control import Options
    from mesh.agent.policies import Sections, explained, parse
    from mesh.policy.explain import QuestionError
    from mesh.sources.directory import Manifests

    manifests = Manifests(directory)
    update = manifests.scan()
    if any(problem.level == "error" for problem in update.problems):
        note(f"some manifests have errors and do not count: weft validate {directory}")
    options = Options(mesh_addresses=("127.0.0.1", "::1"))
    try:
        question = parse(query, headers)
        # Nothing is ever gone in a first reading.
        sections = Sections(None, options, update.changes)
        found: dict[str, Any] = msgspec.to_builtins(explained(question, sections, manifests.origin))
    except QuestionError as error:
        raise UsageError(str(error)) from None
    return found


def _show(answer: dict[str, Any]) -> None:
    for text in answer["notes"]:
        click.echo(text)
    for side in answer["sides"]:
        click.echo(f"{side['direction'] + ' of ' + side['pod'] + ':':<32} {side['verdict']}")
        click.echo(f"  by:   {side['by']}")
        for file in side["files"]:
            click.echo(f"  file: {file}")
        for hint in side["hints"]:
            click.echo(f"  {'else' if side['verdict'] == 'allowed' else 'see'}:  {hint}")
    click.echo(f"answer: {'it passes' if answer['allowed'] else 'it is refused'}")
