"""What the kernel tells of requests that pass by the proxy: metrics, access log and flow records.

The kernel counts by series, whose meaning the workers have written down (l7proxy.series), and gives
single requests to whoever takes them: so many in a second, the others are lost and counted.
Counters are exact, whoever lives, and are added to those of the workers under the same names.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import Metric
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from bpf import maps
from bpf.constants import PAIR_BOUNDS
from bpf.errors import DatapathError
from bpf.passed import Leftovers, PassedMaps
from bpf.reasons import Reason
from bpf.structs import Passed, PassedKey, Passing
from l7proxy import metrics
from l7proxy.accesslog import MAX_NAME, AccessLog, AccessLogEntry, cut
from l7proxy.begun import shown
from l7proxy.forwarding import said_id
from l7proxy.series import Series, SeriesReader
from mesh.agent.flows import FlowStore
from mesh.model.flow import Flow, HttpFlow, Peer
from mesh.model.statuses import code

_log = logging.getLogger("weft.agent")

# How often single requests are taken, in seconds, and how many at once: what this costs is bounded.
_TAKE_S = 0.25
_BATCH = 512
# How often what is left of sockets that are gone is looked for, in seconds.
_SWEEP_S = 5.0
_NS, _MS = 1e-9, 1e-6
# So often metrics are read until both sides fit.
_READS = 3

# By the name of a sample and its labels.
_Key = tuple[str, frozenset[tuple[str, str]]]


class Counted(NamedTuple):
    """So many have passed of a series, by these numbers of its policy rules."""

    series: Series
    key: PassedKey
    passed: Passed


class PassedBy:
    """`log`: None: there is none."""

    def __init__(
        self, pins: Path, metrics_dir: Path, store: FlowStore, log: AccessLog | None
    ) -> None:
        self._pins = pins
        self._directory = metrics_dir
        self._store = store
        self._log = log
        self._maps: PassedMaps | None = None
        self._leftovers: Leftovers | None = None
        self._reader = SeriesReader(metrics_dir)
        # Metrics are collected, and leftovers swept, in threads.
        self._lock = threading.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._untold = 0  # in all, when somebody last looked

    def start(self) -> None:
        """Again: nothing, unless it failed."""
        if self._maps is not None:
            return
        try:
            with contextlib.ExitStack() as opened:
                self._untold = maps.counters(self._pins)[Reason.PAIR_UNTOLD]
                leftovers = opened.enter_context(contextlib.closing(Leftovers(self._pins)))
                self._maps = PassedMaps(self._pins)
                self._leftovers = leftovers
                opened.pop_all()
        except (DatapathError, OSError) as error:
            _log.error("requests that pass by the proxy are not seen: %s", error)
            return
        self._take()
        self._sweep()

    def close(self) -> None:
        """What was not taken stays for the next agent."""
        for timer in (self._timer, self._sweep_timer):
            if timer is not None:
                timer.cancel()
        if self._log is not None:
            self._log.close()
        with self._lock:
            if self._leftovers is not None:
                self._leftovers.close()
                self._leftovers = None
            if self._maps is not None:
                self._maps.close()
                self._maps = None

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        loop.run_in_executor(None, self._sweep_now)
        self._sweep_timer = loop.call_later(_SWEEP_S, self._sweep)

    def _sweep_now(self) -> None:
        """In a thread: there may be very many."""
        with self._lock:
            if self._leftovers is not None:
                try:
                    self._leftovers.sweep()
                except Exception:
                    _log.exception("what sockets have left in the maps of pairs stays there")

    # --- counters ---------------------------------------------------------------------------------

    def counted(self) -> list[Counted]:
        """Of all series that there are; those of workers whose files are gone are forgotten."""
        found = []
        with self._lock:
            if self._maps is None:
                return []
            for key, passed in list(self._maps.counted()):
                series = self._reader.get(key.series)
                if series is not None:
                    found.append(Counted(series, key, passed))
                else:
                    self._maps.forget(key)
        return found

    def merged(self, others: Callable[[], Iterable[Metric]]) -> Iterator[Metric]:
        """Metrics of the workers, and the same of what has passed by them."""
        lost: Any = metrics.LOG_LOST
        there = {one.key for one in self.counted()}
        for _ in range(_READS):
            found = list(others())
            counted = self.counted()
            before, there = there, {one.key for one in counted}
            if before <= there:
                break
            # Meanwhile a worker has added what was counted here to what it counts itself.
        return merged(found, counted, lost._value.get())

    # --- single requests --------------------------------------------------------------------------

    def _take(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_TAKE_S, self._take)
        assert self._maps is not None
        epoch_ns = time.time_ns() - time.monotonic_ns()
        taken = self._maps.take(_BATCH)
        log = self._log
        for passing in taken:
            series = self._reader.get(passing.series)
            if series is None:
                continue
            line = _Line(passing, series, epoch_ns)
            self._store.record(line.flow())
            if log is not None:
                log.write(line.entry())
        if taken:
            self._note_lost()

    def _note_lost(self) -> None:
        untold = maps.counters(self._pins)[Reason.PAIR_UNTOLD]
        lost, self._untold = untold - self._untold, untold
        if lost > 0:
            self._store.count_lost("kernel", lost)
            if self._log is not None:
                metrics.LOG_LOST.inc(lost)


class _Line:
    """One request, as far as it is known."""

    def __init__(self, passing: Passing, series: Series, epoch_ns: int) -> None:
        self._passing = passing
        self._series = series
        self._time_ns = epoch_ns + passing.started_ns
        # Where no more is known.
        self._shown = shown(passing.head[: passing.shown])

    def _field(self, name: bytes) -> str:
        return cut(self._shown.fields.get(name, b""), MAX_NAME)

    @property
    def _request_id(self) -> str:
        return said_id(self._shown.fields.get(b"x-request-id", b""))

    def flow(self) -> Flow:
        passing, series = self._passing, self._series
        return Flow(
            time=self._time_ns + passing.elapsed_ns,
            verdict="FORWARDED",
            source=Peer(series.client, passing.port, spiffe_id=series.client_identity),
            destination=Peer(
                series.address, series.port, "", series.pod, spiffe_id=series.endpoint_identity
            ),
            service=series.service,
            http=HttpFlow(
                method=cut(self._shown.method, MAX_NAME),
                host=self._field(b"host"),
                path=cut(self._shown.target),
                status=passing.status,
                latency_ms=round(passing.elapsed_ns * _MS, 3),
                bytes_in=passing.bytes_in,
                bytes_out=passing.bytes_out,
                request_id=self._request_id,
            ),
            route=series.route,
            policy=series.policy(passing.egress, passing.ingress),
            encryption=series.encryption,
        )

    def entry(self) -> AccessLogEntry:
        passing, series = self._passing, self._series
        ended = datetime.fromtimestamp((self._time_ns + passing.elapsed_ns) * _NS, UTC)
        return AccessLogEntry(
            time=ended.isoformat(timespec="milliseconds"),
            client=series.client,
            method=cut(self._shown.method, MAX_NAME),
            host=self._field(b"host"),
            path=cut(self._shown.target),
            protocol="HTTP/1.1",
            status=passing.status,
            duration_ms=round(passing.elapsed_ns * _MS, 3),
            bytes_in=passing.bytes_in,
            bytes_out=passing.bytes_out,
            request_id=self._request_id,
            gateway=series.gateway,
            listener=series.listener,
            route=series.route,
            rule=series.rule,
            backend=series.backend,
            endpoint=series.endpoint,
            encryption=series.encryption,
            client_identity=series.client_identity,
            endpoint_identity=series.endpoint_identity,
            attempts=1,
            user_agent=self._field(b"user-agent"),
        )


# --- metrics --------------------------------------------------------------------------------------


def merged(
    others: Iterable[Metric], counted: Iterable[Counted], log_lost: float = 0
) -> Iterator[Metric]:
    """`others`, of the workers, with what has passed by them, and lines of the access log that were
    lost here."""
    lost: Any = metrics.LOG_LOST
    sums = {lost._name: Counter({(f"{lost._name}_total", frozenset[tuple[str, str]]()): log_lost})}
    for one in counted:
        for family, name, labels, value in _samples(one):
            key = name, frozenset(labels.items())
            sums.setdefault(family, Counter())[key] += value  # type: ignore[assignment]
    for metric in others:
        yield _added(metric, sums.pop(metric.name, Counter()))
    for known in _FAMILIES:
        if known._name in sums:
            empty = Metric(known._name, known._documentation, known._type)
            yield _added(empty, sums[known._name])


_number_text: Any = floatToGoString
_FAMILIES: tuple[Any, ...] = (
    metrics.REQUESTS,
    metrics.DURATION,
    metrics.REQUEST_BYTES,
    metrics.RESPONSE_BYTES,
    metrics.BY_POLICY,
)


def _added(metric: Metric, sums: Counter[_Key]) -> Metric:
    result = Metric(metric.name, metric.documentation, metric.type)
    for sample in metric.samples:
        more = sums.pop((sample.name, frozenset(sample.labels.items())), 0)
        result.samples.append(sample._replace(value=sample.value + more))
    for (name, labels), value in sums.items():
        result.samples.append(Sample(name, dict(labels), value))
    return result


def _samples(one: Counted) -> Iterator[tuple[str, str, dict[str, str], float]]:
    """Family, name, labels, value."""
    series, key, passed = one
    place = {"gateway": series.gateway, "backend": series.backend}

    def counter(metric: Any, labels: dict[str, str], value: float) -> Any:
        return metric._name, f"{metric._name}_total", labels, value

    route = place | {"route": series.route, "rule": series.rule, "code": code(key.status)}
    yield counter(metrics.REQUESTS, route, passed.requests)
    if passed.bytes_in:
        yield counter(metrics.REQUEST_BYTES, place, passed.bytes_in)
    if passed.bytes_out:
        yield counter(metrics.RESPONSE_BYTES, place, passed.bytes_out)
    by = {
        "source": series.client_identity,
        "destination": series.endpoint_identity,
        "policy": series.policy(key.egress, key.ingress),
        "class": f"{key.status // 100}xx",
    }
    yield counter(metrics.BY_POLICY, by, passed.requests)
    name, text_of = metrics.DURATION._name, _number_text
    faster = 0
    for bound, count in zip(PAIR_BOUNDS, memoryview(passed.faster).cast("Q"), strict=True):
        faster += count
        le = {"le": text_of(bound * _NS)}
        yield name, f"{name}_bucket", place | le, faster
    yield name, f"{name}_bucket", place | {"le": "+Inf"}, passed.requests
    yield name, f"{name}_count", place, passed.requests
    yield name, f"{name}_sum", place, passed.elapsed_ns * _NS
