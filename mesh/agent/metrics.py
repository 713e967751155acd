"""Metrics: the workers' (in files, see l7proxy.metrics) and the agent's own, collected on demand.

Knows prometheus_client; reads the agent, never changes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.multiprocess import MultiProcessCollector

if TYPE_CHECKING:
    from mesh.agent.node import Node


class WorkersNow(NamedTuple):
    """Of all workers: open connections with other nodes by mutual TLS, `outliving`: those that are
    older than a certificate they were made with; `series_full`: workers with no room to count
    further series of requests past the proxy."""

    tunnels_out: int
    tunnels_in: int
    tunnels_outliving: int
    series_full: int


class _AgentCollector:
    """The agent's own metrics, made from its state when they are asked for."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        node = self._node
        workers = node.rollout.workers
        version = node.rollout.config.version
        yield _gauge("weft_config_version", "Version of the configuration made last", version)
        yield _gauge("weft_workers", "Workers that are connected", len(workers))
        behind = sum(worker.version != version for worker in workers)
        yield _gauge("weft_workers_behind", "Connected workers with an older version", behind)
        yield _gauge("weft_ready", "1 when ready", int(not node.not_ready()))
        yield SummaryMetricFamily(
            "weft_config_ack_seconds",
            "From sending a configuration to a worker to its acknowledgement",
            count_value=node.rollout.ack_count,
            sum_value=node.rollout.ack_seconds,
        )
        objects = GaugeMetricFamily("weft_objects", "Objects in force, by kind", labels=("kind",))
        for kind, count in node.object_counts().items():
            objects.add_metric((kind,), count)
        yield objects
        problems = GaugeMetricFamily(
            "weft_source_problems", "Problems in the manifests, by level", labels=("level",)
        )
        levels = Counter(problem.level for problem in node.problems)
        for level in ("error", "unsupported", "note"):
            problems.add_metric((level,), levels[level])
        yield problems
        yield _counters(
            "weft_flows",
            "Connections and requests in flow records",
            "verdict",
            node.flows.seen.items(),
        )
        yield _counters(
            "weft_flows_lost",
            "Flow records that did not get where they should",
            "where",
            node.flows.lost.items(),
        )
        if node.svids is not None:
            left = GaugeMetricFamily(
                "weft_svid_expiry_seconds",
                "Until the SVID of an identity of this node expires; 0 without a valid one",
                labels=("spiffe_id",),
            )
            for spiffe_id, seconds in node.svids.seconds_left().items():
                left.add_metric((spiffe_id,), seconds)
            yield left
            text = "SVIDs that were asked for and not got, by reason"
            yield _counters(
                "weft_svid_issuance_failures", text, "reason", node.svids.failures.items()
            )
        if node.kernel is not None and (found := node.kernel.counters()):
            counts = ((reason.name, count) for reason, count in found.items())
            text = "What the eBPF programs did, since their maps were made"
            yield _counters("weft_datapath_events", text, "reason", counts)


class _WorkersCollector:
    """Those of the workers, and of the requests that have passed by them."""

    def __init__(self, node: Node, metrics_dir: Path) -> None:
        self._node = node
        collector: Any = MultiProcessCollector
        self._files = collector(None, path=str(metrics_dir))

    def collect(self) -> Iterable[Metric]:
        passed = self._node.passed
        return self._files.collect() if passed is None else passed.merged(self._files.collect)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counters(name: str, text: str, label: str, counts: Iterable[tuple[str, int]]) -> Metric:
    """A counter (its samples are called <name>_total) with one label."""
    result = CounterMetricFamily(name, text, labels=(label,))
    for value, count in counts:
        result.add_metric((value,), count)
    return result


def registry(node: Node, metrics_dir: Path) -> CollectorRegistry:
    """Everything there is now. Cheap to make; the files are read when it is collected."""
    result = CollectorRegistry()
    result.register(_AgentCollector(node))
    if metrics_dir.is_dir():
        result.register(_WorkersCollector(node, metrics_dir))
    return result


def exposition(node: Node, metrics_dir: Path) -> bytes:
    """Prometheus' text format."""
    return bytes(generate_latest(registry(node, metrics_dir)))


def samples(node: Node, metrics_dir: Path) -> list[dict[str, Any]]:
    """The same for programs: name, labels and value of every sample, buckets left out."""
    return [
        {"name": sample.name, "labels": sample.labels, "value": sample.value}
        for metric in registry(node, metrics_dir).collect()
        for sample in metric.samples
        if not sample.name.endswith("_bucket")
    ]


def workers_now(metrics_dir: Path) -> WorkersNow:
    """Read from their files of such gauges alone."""
    files = [str(path) for path in metrics_dir.glob("gauge_livesum_*.db")]
    merge: Any = MultiProcessCollector.merge
    found = {
        (sample.name, sample.labels.get("direction")): int(sample.value)
        for metric in merge(files)
        for sample in metric.samples
    }
    return WorkersNow(
        found.get(("weft_tunnels", "out"), 0),
        found.get(("weft_tunnels", "in"), 0),
        found.get(("weft_tunnels_outliving", None), 0),
        found.get(("weft_pair_series_full", None), 0),
    )
