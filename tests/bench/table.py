"""Rows as tables for a terminal: what was measured, with its ratio to no mesh and to Envoy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from rich.console import Console
from rich.table import Table

from bench.peers import Row

# Heading, field of Row, how it is written, and what it is divided by.
_COLUMNS = (
    ("rps", "rps", "{:,.0f}", ("direct", "envoy")),
    ("p50 µs", "p50_us", "{:,.0f}", ("direct", "envoy")),
    ("p99 µs", "p99_us", "{:,.0f}", ("envoy",)),
    ("hop CPU", "cpu_s_per_1000", "{:.4f}", ("envoy",)),
    ("all CPU", "all_cpu_s_per_1000", "{:.4f}", ("direct",)),
    ("MiB", "rss_mib", "{:,.0f}", ()),
)
# Narrower would break figures in two.
_WIDTH = 130
_LEGEND = """
/direct, /envoy: the figure to the left divided by that hop's. CPU: seconds for 1,000 requests, of
the hop, and of client, hop and backend together."""


def show(rows: Sequence[Row]) -> None:
    """A table for each combination of scenario and connections."""
    console = Console(highlight=False)
    console.width = max(console.width, _WIDTH)
    for (scenario, connections), group in groupby(rows, attrgetter("scenario", "connections")):
        ending = "" if connections == 1 else "s"
        console.print(f"\n[bold]{scenario}, {connections} connection{ending}[/bold]")
        console.print(_table({row.hop: row for row in group}))
    console.print(_LEGEND)


def _table(rows: dict[str, Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("hop", no_wrap=True)
    for heading, _, _, others in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
        for other in others:
            table.add_column(f"/{other}", justify="right", no_wrap=True, style="dim")
    for row in rows.values():
        cells = [row.hop]
        for _, field, form, others in _COLUMNS:
            value = getattr(row, field)
            cells.append(form.format(value))
            cells += (_ratio(value, rows.get(other), field) for other in others)
        table.add_row(*cells)
    return table


def _ratio(value: float, to: Row | None, field: str) -> str:
    reference = getattr(to, field) if to else 0
    return f"{value / reference:.2f}" if reference else ""
