"""The worker's Prometheus metrics.

Kept by prometheus_client in memory-mapped files (PROMETHEUS_MULTIPROC_DIR, set before this module
is imported), one a process: they outlive the worker, so counters of all workers, dead ones too, add
up exactly. The admin port reads them; the worker serves nothing itself.
"""

from __future__ import annotations

import os

from prometheus_client import Counter, Gauge, Histogram, values

from l7proxy.metric_files import FileValue

if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    values.ValueClass = FileValue

REQUESTS = Counter(
    "weft_http_requests_total",
    "Requests answered, by route, backend and status code",
    ("gateway", "route", "rule", "backend", "code"),
)
DURATION = Histogram(
    "weft_http_request_duration_seconds",
    "From the request's head to the end of its response",
    # Not by route: with its buckets a series takes as much memory as all else of a route.
    ("gateway", "backend"),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
REQUEST_BYTES = Counter(
    "weft_http_request_body_bytes_total",
    "Bytes of the bodies of these requests",
    ("gateway", "backend"),
)
RESPONSE_BYTES = Counter(
    "weft_http_response_body_bytes_total",
    "Bytes of the bodies of their responses",
    ("gateway", "backend"),
)
BY_POLICY = Counter(
    "weft_http_requests_by_policy_total",
    "The same, by SPIFFE IDs of both ends, the policy that has decided, and class of status (2xx)",
    ("source", "destination", "policy", "class"),
)
LOCAL_REPLIES = Counter(
    "weft_http_local_replies_total",
    "Requests the proxy answered itself because something was wrong, by reason",
    ("reason",),
)
REFUSED = Counter(
    "weft_downstream_refused_total",
    "Connections and messages of clients cut off by a limit or a protocol rule, by reason",
    ("reason",),
)
CONNECTIONS = Gauge(
    "weft_downstream_connections",
    "Open connections of clients",
    multiprocess_mode="livesum",
)
UPSTREAM_FAILURES = Counter(
    "weft_upstream_failures_total",
    "Attempts that failed, by backend and reason",
    ("backend", "reason"),
)
UPSTREAM_CONNECTIONS = Gauge(
    "weft_upstream_connections",
    "Open connections to a backend's endpoints",
    ("backend",),
    multiprocess_mode="livesum",
)
UPSTREAM_IDLE = Gauge(
    "weft_upstream_idle_connections",
    "Of the open connections those that wait for a request",
    ("backend",),
    multiprocess_mode="livesum",
)
UPSTREAM_PENDING = Gauge(
    "weft_upstream_pending_requests",
    "Requests that wait for a connection to a backend's endpoint",
    ("backend",),
    multiprocess_mode="livesum",
)
UPSTREAM_EJECTED = Gauge(
    "weft_upstream_ejected_endpoints",
    "Endpoints of a backend that a worker leaves alone for a while; the most of any worker",
    ("backend",),
    multiprocess_mode="livemax",
)
RETRIES = Counter("weft_upstream_retries_total", "Requests sent again", ("backend",))
PAIRS_PAUSED = Counter(
    "weft_http_pairs_paused_total",
    "Times that a client's requests were not let pass by the proxy for a while, as their responses "
    "could not: chunked, with Keep-Alive, too long, 502 to 504",
    ("backend",),
)
PAIRS_REFUSED = Counter(
    "weft_http_pairs_refused_total",
    "Times that requests could have passed by the proxy, had there been room in the kernel's maps",
)
MIRRORED = Counter(
    "weft_mirrored_requests_total",
    "Requests also sent to a mirror, by backend and outcome",
    ("backend", "outcome"),
)
CONFIG_VERSION = Gauge(
    "weft_worker_config_version",
    "Version of the configuration this worker has in force",
    multiprocess_mode="livemin",
)
CONFIG_REFUSED = Gauge(
    "weft_worker_config_refused_sections",
    "Sections of the configuration this worker has refused",
    multiprocess_mode="livemax",
)
LOG_LOST = Counter("weft_access_log_lost_total", "Access log lines lost to a slow reader")
RELAYED = Counter(
    "weft_relayed_connections_total",
    "Connections of workloads that were relayed and have ended, by how",
    ("outcome",),
)
PLAIN = Counter(
    "weft_upstream_plain_total",
    "Connections left because the kernel did not show the far socket in time",
)
FLOWS_LOST = Counter(
    "weft_worker_flows_lost_total",
    "Flow records that were not sent: no agent, or one that does not read",
)
TUNNELS = Gauge(
    "weft_tunnels",
    "Open connections with other nodes by mutual TLS, out or in",
    ("direction",),
    multiprocess_mode="livesum",
)
TUNNELS_OUTLIVING = Gauge(
    "weft_tunnels_outliving",
    "Of the tunnels those that are older than a certificate they were made with",
    multiprocess_mode="livesum",
)
TUNNEL_FAILURES = Counter(
    "weft_tunnel_failures_total",
    "Connections with other nodes that were not made, or cut off, by reason",
    ("reason",),
)
SERIES = Gauge(
    "weft_pair_series",
    "Series (route, both ends) that requests past the proxy are counted under: 20,000 of a worker",
    multiprocess_mode="livesum",
)
SERIES_FULL = Gauge(
    "weft_pair_series_full",
    "Workers with no room for another of these: such requests go through them",
    multiprocess_mode="livesum",
)
POLICY = Counter(
    "weft_policy_refusals_total",
    "Requests and connections that policy refused, and (audited) those that it would have",
    ("what", "verdict"),
)
