"""Printing: tables for people, JSON and YAML for programs. Knows no kinds."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click
import yaml
from rich.console import Console
from rich.text import Text

_GOOD = frozenset(("True", "ok", "yes"))
_BAD = frozenset(("False", "no"))


class _Dumper(yaml.SafeDumper):
    """Without anchors: what appears twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(value: Any, output: str) -> None:
    """JSON or YAML on standard output."""
    if output == "json":
        click.echo(json.dumps(value, indent=2, ensure_ascii=False))
    else:
        text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
        click.echo(text, nl=False)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, no lines, nothing wrapped or cut; colour only on a terminal."""
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    console = Console(soft_wrap=True, highlight=False)
    for number, row in enumerate((headers, *rows)):
        line = Text()
        for i, cell in enumerate(row):
            style = "bold" if number == 0 else _style(cell)
            pad = " " * (widths[i] - len(cell) + 3) if i < len(row) - 1 else ""
            line.append(cell, style).append(pad)
        line.rstrip()
        console.print(line)


def _style(cell: str) -> str:
    return "green" if cell in _GOOD else "red" if cell in _BAD else ""


def note(text: str) -> None:
    """Something for people that programs need not see."""
    click.echo(text, err=True)
    sys.stderr.flush()
