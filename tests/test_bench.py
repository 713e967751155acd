"""`make bench`: that it measures at all. What it measures is nobody's promise."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from bench.peers import Row, compare, median
from bench.processes import usage
from bench.wrk import percentile, without_added
from lab_world import needs_root

_MISSING = [program for program in ("wrk", "nginx", "curl") if shutil.which(program) is None]


@needs_root
@pytest.mark.skipif(bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}")
def test_rows_of_one_hop(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    name = f"bench-{os.getpid()}"
    rows = compare(["nginx"], 1, 0.5, directory, tmp_path / "run", name, connections=(2,))
    published = [row.published() for row in rows]
    assert [(row["scenario"], row["hop"], row["connections"]) for row in published] == [
        ("http-45", "nginx", 2),
        ("http-650", "nginx", 2),
        ("http-file", "nginx", 2),
        ("http-1m", "nginx", 2),
    ]
    for row in published:
        assert list(row) == [
            *("scenario", "hop", "connections"),
            *("rps", "p50_us", "p99_us", "cpu_s_per_1000", "rss_mib"),
        ]
        figures = list(row.values())[3:]
        assert all(isinstance(figure, float | int) and figure > 0 for figure in figures)
        assert row["p50_us"] <= row["p99_us"]
    assert not any(path.name.startswith(f"weft.{name}.") for path in Path("/run/netns").iterdir())


def test_median_of_each_figure_by_itself() -> None:
    figures = ((1, 9, 5, 1, 1, 1), (2, 8, 4, 2, 2, 2), (3, 7, 6, 9, 3, 3))
    rounds = [Row("small", "envoy", 1, *several) for several in figures]
    assert median(rounds) == Row("small", "envoy", 1, 2, 8, 5, 2, 2, 2)


def test_descendants_count_and_others_do_not() -> None:
    mine, parents = usage((os.getpid(),)), usage((os.getppid(),))
    assert 0 < mine.rss_mib < parents.rss_mib
    assert usage(()) == (0, 0)


def test_requests_that_wrk_has_added_do_not_count() -> None:
    chance = random.Random(1)
    made = Counter(
        chance.choice((20, 30, 40, 300, 3_000)) + chance.randrange(9) for _ in range(500)
    )
    for interval in (7, 25, 31):
        counts = Counter(made)
        for value in (one for one in made if one >= 2 * interval):  # stats_correct
            for less in range(value - interval, interval, -interval):
                counts[less] += made[value]
        assert +Counter(without_added(counts, interval)) == made
    assert percentile(made, 0.0001) == min(made)
    assert percentile(made, 1) == max(made)
    assert percentile({1: 98, 5: 1, 9: 1}, 0.99) == 5
