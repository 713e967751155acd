"""One load of wrk: a process in a pod, and the exact figures that it has at the end.

wrk adds to its latencies requests that it would have sent while it waited (stats_correct in
stats.c): a stall of 20 ms before 50,000 quick requests of 20 µs counts as 1,000 slow ones. Who
waits here asks for nothing meanwhile, so those are taken out again: percentiles are of requests
that were made.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

# wrk calls this once at the end; durations are in microseconds.
_SCRIPT = """
function done(summary, latency, requests)
   local errors = summary.errors
   local counts = {}
   for i = 1, #latency do
      counts[i] = string.format("[%d, %d]", latency(i))
   end
   io.write(string.format(
      '\\n{"requests": %d, "duration_us": %d, "latencies": [%s], "errors": %d}\\n',
      summary.requests, summary.duration, table.concat(counts, ", "),
      errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""
# Longer than any run: it is ended by a signal, because wrk itself knows whole seconds only.
_LIMIT = "1h"
_END_S = 10.0


class LoadFailed(Exception):
    """Requests failed, or wrk did; which, why."""


class Load(NamedTuple):
    """`cpu_s` is wrk's own."""

    requests: int
    seconds: float
    p50_us: int
    p99_us: int
    cpu_s: float


def load(
    url: str,
    connections: int,
    seconds: float,
    directory: Path,
    enter: Callable[[], None],
    *headers: str,
) -> Load:
    """Request `url` over so many connections for so long, each as fast as it is answered. `enter`
    is called in the new process. LoadFailed: not every request was answered well."""
    script = directory / "done.lua"
    script.write_text(_SCRIPT)
    argv = ["wrk", "-t1", f"-c{connections}", "-d", _LIMIT, "--latency", "-s", str(script)]
    argv += [word for header in headers for word in ("-H", header)] + [url]
    before = _children_cpu_s()
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=enter,
    )
    try:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=_END_S)
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"wrk on {url} does not end") from None
    finally:
        process.kill()
        process.wait()
    last = output.strip().rpartition("\n")[2]
    if process.returncode != 0 or not last.startswith("{"):
        raise LoadFailed(f"wrk on {url} ended with status {process.returncode}:\n{output}")
    figures = json.loads(last)
    if figures["errors"] or not figures["requests"]:
        raise LoadFailed(f"wrk on {url}: not every request was answered well:\n{output}")
    each = figures["requests"] // connections
    latencies = dict(figures["latencies"])
    if each:
        latencies = without_added(latencies, figures["duration_us"] // each)
    return Load(
        requests=figures["requests"],
        seconds=figures["duration_us"] / 1e6,
        p50_us=percentile(latencies, 0.5),
        p99_us=percentile(latencies, 0.99),
        cpu_s=_children_cpu_s() - before,
    )


def without_added(counts: Mapping[int, int], interval: int) -> dict[int, int]:
    """How many requests took so long, without those that wrk has added: for each of `n`, one of
    n - interval, n - 2 * interval, and so on while that is more than the interval."""
    real: dict[int, int] = {}
    added: Counter[int] = Counter()
    for value in sorted(counts, reverse=True):
        real[value] = counts[value] - added[value]
        if real[value] and value >= 2 * interval:
            for less in range(value - interval, interval, -interval):
                added[less] += real[value]
    return real


def percentile(counts: Mapping[int, int], share: float) -> int:
    """The least value that so many of all do not exceed."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return max(counts)


def _children_cpu_s() -> float:
    """Of those that were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
