"""Weft beside its peers: the same client and backend, one hop or another in between.

Every combination of scenario and number of connections is measured for all hops in turn before the
next; each round begins with another hop. What is reported of a combination is the median of the
rounds, figure by figure. Knows how to measure, not where things run (bench.world).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.processes import usage
from bench.world import Hop, world
from bench.wrk import load

CONNECTIONS = (1, 32)
# Before anything counts: caches are warm, upstream connections open.
_WARM_S = 0.3
# After the point, in build/bench.json.
_DIGITS = {"rps": 1, "p50_us": 1, "p99_us": 1, "cpu_s_per_1000": 6, "rss_mib": 1}


class Row(NamedTuple):
    """One combination. `cpu_s_per_1000` is the hop's, for 1,000 requests; `all_cpu_s_per_1000`
    that of client, hop and backend, which is not in build/bench.json."""

    scenario: str
    hop: str
    connections: int
    rps: float
    p50_us: float
    p99_us: float
    cpu_s_per_1000: float
    rss_mib: float
    all_cpu_s_per_1000: float

    def published(self) -> dict[str, object]:
        """What build/bench.json says."""
        return {
            name: round(value, _DIGITS[name]) if name in _DIGITS else value
            for name, value in self._asdict().items()
            if name != "all_cpu_s_per_1000"
        }


class Work(NamedTuple):
    """What clients do of a scenario: request `path` with these headers."""

    scenario: str
    path: str
    headers: tuple[str, ...] = ()


# By the bytes of a head, and of a body; `http-file` is `http-45` to a backend that sends head and
# body of a response apart.
WORKS = (
    Work("http-45", "small"),
    Work("http-650", "small", (f"x-filler: {'y' * 590}",)),
    Work("http-file", "file"),
    Work("http-1m", "1MiB"),
)


def compare(
    hops: Sequence[str],
    rounds: int,
    seconds: float,
    directory: Path,
    run_dir: Path,
    name: str,
    connections: Sequence[int] = CONNECTIONS,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Rows in the order of scenarios, connections, hops. `directory` is empty and for files,
    `run_dir` and `name` are the lab's. BenchFailed, LoadFailed, LabError: there is nothing to
    measure, or requests fail."""
    with world(hops, directory, run_dir, name) as made:
        works = [(work, made) for work in WORKS]
        return alternate(works, rounds, seconds, directory, connections, progress)


def alternate(
    works: Sequence[tuple[Work, Sequence[Hop]]],
    rounds: int,
    seconds: float,
    directory: Path,
    connections: Sequence[int] = CONNECTIONS,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Each work on its hops. LoadFailed."""
    rows: dict[tuple[str, int, str], list[Row]] = {
        (work.scenario, count, hop.name): []
        for work, hops in works
        for count in connections
        for hop in hops
    }
    work, hops = works[0]
    for hop in hops:
        measure(hop, work, max(connections), _WARM_S, directory)
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for work, hops in works:
            first = number % len(hops)
            for count in connections:
                for hop in (*hops[first:], *hops[:first]):
                    row = measure(hop, work, count, seconds, directory)
                    rows[work.scenario, count, hop.name].append(row)
    return [median(several) for several in rows.values()]


def measure(hop: Hop, work: Work, connections: int, seconds: float, directory: Path) -> Row:
    """One run."""
    hop_before, backend_before = usage(hop.roots), usage((hop.backend_pid,))
    url = f"{hop.url}/{work.path}"
    done = load(url, connections, seconds, directory, hop.enter, *work.headers)
    hop_after, backend_after = usage(hop.roots), usage((hop.backend_pid,))
    hop_cpu_s = hop_after.cpu_s - hop_before.cpu_s
    all_cpu_s = hop_cpu_s + backend_after.cpu_s - backend_before.cpu_s + done.cpu_s
    return Row(
        work.scenario,
        hop.name,
        connections,
        rps=done.requests / done.seconds,
        p50_us=done.p50_us,
        p99_us=done.p99_us,
        cpu_s_per_1000=1000 * hop_cpu_s / done.requests,
        rss_mib=hop_after.rss_mib,
        all_cpu_s_per_1000=1000 * all_cpu_s / done.requests,
    )


def median(rows: Iterable[Row]) -> Row:
    """Of runs of one combination, figure by figure."""
    rows = list(rows)
    figures = zip(*(row[3:] for row in rows), strict=True)
    return Row(*rows[0][:3], *map(statistics.median, figures))
