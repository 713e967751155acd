"""What is remembered of one request for the access log and the metrics."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from l7proxy import metrics
from l7proxy.accesslog import AccessLog, AccessLogEntry
from l7proxy.forwarding import ClientAddress
from l7proxy.message import RequestHead
from l7proxy.routing import RouteMatchResult


@lru_cache(maxsize=16_384)
def _duration(gateway: str, route: str, rule: str, backend: str) -> Any:
    return metrics.DURATION.labels(gateway, route, rule, backend)


@lru_cache(maxsize=32_768)
def _requests(gateway: str, route: str, rule: str, backend: str, code: int) -> Any:
    return metrics.REQUESTS.labels(gateway, route, rule, backend, code)


class Record:
    """Filled in while the exchange goes on; `close` counts and logs it."""

    __slots__ = (
        "attempts", "backend", "bytes_in", "bytes_out", "client", "detail", "endpoint", "gateway",
        "head", "host", "listener", "path", "reason", "request_id", "route", "rule", "started",
        "status",
    )  # fmt: skip

    def __init__(self, head: RequestHead, client: ClientAddress, gateway: str) -> None:
        self.started = time.monotonic()
        self.head = head
        self.host = head.authority
        self.path = head.target
        self.client = client.address
        self.request_id = client.request_id
        self.gateway = gateway
        self.listener = ""
        self.route = ""
        self.rule = ""
        self.backend = ""
        self.endpoint = ""
        self.attempts = 0
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.reason = ""
        self.detail = ""

    def matched(self, match: RouteMatchResult) -> None:
        self.route = match.route.label
        self.rule = match.rule.label

    def replied(self, status: int, reason: str, detail: str, *, whole: bool) -> None:
        """The proxy answered `status` itself, or (not `whole`) broke a response off."""
        if whole:
            self.status = status
        self.reason, self.detail = reason, detail
        metrics.LOCAL_REPLIES.labels(reason).inc()

    def broke_off(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail

    def close(self, log: AccessLog) -> None:
        """Count the request, write its line. A client gone before a response counts as code 499."""
        elapsed = time.monotonic() - self.started
        code = self.status or 499
        _requests(self.gateway, self.route, self.rule, self.backend, code).inc()
        _duration(self.gateway, self.route, self.rule, self.backend).observe(elapsed)
        if not log.wanted:
            return
        agent = next((value for name, value in self.head.headers if name == b"user-agent"), b"")
        log.write(
            AccessLogEntry(
                time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                client=self.client,
                method=self.head.method.decode("latin-1"),
                host=self.host.decode("latin-1"),
                path=self.path.decode("latin-1"),
                protocol="HTTP/" + self.head.version.decode("latin-1"),
                status=code,
                duration_ms=round(elapsed * 1000, 3),
                bytes_in=self.bytes_in,
                bytes_out=self.bytes_out,
                request_id=self.request_id,
                gateway=self.gateway,
                listener=self.listener,
                route=self.route,
                rule=self.rule,
                backend=self.backend,
                endpoint=self.endpoint,
                attempts=self.attempts,
                user_agent=agent.decode("latin-1"),
                reason=self.reason,
                detail=self.detail,
            )
        )
