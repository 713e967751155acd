"""What is remembered of one request for the access log, the metrics and its flow."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, TypeAlias

from bpf.structs import Passed, PassedKey
from l7proxy import metrics
from l7proxy.accesslog import MAX_NAME, AccessLog, AccessLogEntry, cut, protocol
from l7proxy.entry import Selection
from l7proxy.forwarding import ClientAddress
from l7proxy.message import Headers, RequestHead
from l7proxy.peers import Direct, Tunnelled, identities
from l7proxy.route_compile import NO_ROUTE
from l7proxy.series import Series
from mesh.model.flow import Encryption, Peer, Verdict
from mesh.model.nodeconfig import Endpoint
from mesh.model.statuses import code

# Series live as long as the process, also when their route has gone. Further ones are counted
# together, by gateway and code, under this name.
_MAX_SERIES = 20_000
_OTHER = "(other)"
# Labels that do not make many.
_FEW = ("gateway", "code", "class")
_durations: dict[tuple[str, ...], Any] = {}
_requests: dict[tuple[str, ...], Any] = {}
_by_policy: dict[tuple[str, ...], Any] = {}
_bytes_in: dict[tuple[str, ...], Any] = {}
_bytes_out: dict[tuple[str, ...], Any] = {}


def _series(known: dict[tuple[str, ...], Any], metric: Any, *labels: str) -> Any:
    series = known.get(labels)
    if series is None:
        if len(known) >= _MAX_SERIES:
            names = zip(metric._labelnames, labels, strict=True)
            labels = tuple(one if name in _FEW else _OTHER for name, one in names)
        series = known[labels] = metric.labels(*labels)
    return series


class _Counted:
    """The values that requests of one kind change. `_bounds`: of `_buckets`."""

    __slots__ = ("_bounds", "_buckets", "_by_policy", "_in", "_out", "_place", "_requests", "_sum")

    def __init__(self, key: _Key) -> None:
        gateway, backend, route, rule, status, own, other, policy = key
        requests = _series(_requests, metrics.REQUESTS, gateway, route, rule, backend, status)
        durations = _series(_durations, metrics.DURATION, gateway, backend)
        by_policy = _series(_by_policy, metrics.BY_POLICY, own, other, policy, f"{status[0]}xx")
        self._requests = requests._value
        self._sum = durations._sum
        self._buckets: Sequence[Any] = durations._buckets
        self._bounds: Sequence[float] = durations._upper_bounds
        self._by_policy = by_policy._value
        self._place = gateway, backend
        self._in: Any = None
        self._out: Any = None

    def add(self, elapsed: float, bytes_in: int, bytes_out: int) -> None:
        """One of them."""
        self._requests.inc(1.0)
        # As the histogram's observe() does, which looks at one bucket after the other.
        self._sum.inc(elapsed)
        self._buckets[bisect_left(self._bounds, elapsed)].inc(1.0)
        self._by_policy.inc(1.0)
        self._add_bytes(bytes_in, bytes_out)

    def add_passed(self, passed: Passed) -> None:
        """Those that the kernel has counted."""
        self._requests.inc(passed.requests)
        self._sum.inc(passed.elapsed_ns * 1e-9)
        faster = memoryview(passed.faster).cast("Q").tolist()
        slower = passed.requests - sum(faster)
        for bucket, count in zip(self._buckets, (*faster, slower), strict=True):
            bucket.inc(count)
        self._by_policy.inc(passed.requests)
        self._add_bytes(passed.bytes_in, passed.bytes_out)

    def _add_bytes(self, bytes_in: int, bytes_out: int) -> None:
        if bytes_in:
            if self._in is None:
                self._in = _series(_bytes_in, metrics.REQUEST_BYTES, *self._place)._value
            self._in.inc(bytes_in)
        if bytes_out:
            if self._out is None:
                self._out = _series(_bytes_out, metrics.RESPONSE_BYTES, *self._place)._value
            self._out.inc(bytes_out)


# Gateway, backend, route, rule, code, both ends' identities, policy.
_Key: TypeAlias = tuple[str, str, str, str, str, str, str, str]
_counted: dict[_Key, _Counted] = {}


def _found(key: _Key) -> _Counted:
    found = _counted.get(key)
    if found is None:
        found = _Counted(key)
        if len(_counted) < _MAX_SERIES:
            _counted[key] = found
    return found


def count_passed(series: Series, key: PassedKey, passed: Passed) -> None:
    """Requests of a series that the kernel has counted, and counts no more."""
    place = series.gateway, series.backend
    ends = series.client_identity, series.endpoint_identity
    policy = series.policy(key.egress, key.ingress)
    kind = *place, series.route, series.rule, code(key.status), *ends, policy
    _found(kind).add_passed(passed)


class Ends(NamedTuple):
    """Whom the flow of a request names."""

    source: Peer
    destination: Peer
    gateway: str
    encryption: Encryption


class Record:
    """Filled in while the exchange goes on; `close` counts and logs it."""

    __slots__ = (
        "_counted", "attempts", "backend", "bytes_in", "bytes_out", "client", "destination",
        "detail", "elapsed", "encryption", "endpoint", "ends", "gateway", "head", "host",
        "listener", "path", "policy", "reason", "request_id", "route", "rule", "service", "started",
        "status", "verdict", "way",
    )  # fmt: skip

    def __init__(self, head: RequestHead, client: ClientAddress, gateway: str) -> None:
        self.started = time.monotonic()
        self.elapsed = 0.0
        self.verdict: Verdict = "FORWARDED"
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
        self.destination: Endpoint | None = None
        self.way: Direct | Tunnelled | None = None
        self.service = ""
        self.attempts = 0
        self.status = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.reason = ""
        self.detail = ""
        self.policy = ""
        self.encryption: Encryption | None = None
        # What it has in common with others, once it is closed (`again`).
        self._counted: _Counted | None = None
        self.ends: Ends | None = None

    def selected(self, selected: Selection) -> None:
        self.listener = selected.listener
        self.service = selected.service
        if (match := selected.match) is not None and match.route is not NO_ROUTE:
            self.route = match.route.label
            self.rule = match.rule.label

    def replied(self, status: int, reason: str, detail: str, *, whole: bool) -> None:
        """The proxy answered `status` itself, or (not `whole`) broke a response off."""
        if whole:
            self.status = status
        self.verdict = "DROPPED" if whole and status < 500 else "ERROR"
        self.reason, self.detail = reason, detail
        metrics.LOCAL_REPLIES.labels(reason).inc()

    def broke_off(self, reason: str, detail: str, verdict: Verdict = "ERROR") -> None:
        self.verdict = verdict
        self.reason, self.detail = reason, detail

    def series(self) -> Series:
        """What requests like this one, that go to the same endpoint, have in common."""
        endpoint = self.destination
        assert endpoint is not None
        own, other = identities(self.way)
        return Series(
            gateway=self.gateway,
            listener=self.listener,
            route=self.route,
            rule=self.rule,
            service=self.service,
            backend=self.backend,
            endpoint=self.endpoint,
            client=self.client,
            address=endpoint.address,
            port=endpoint.port,
            pod=endpoint.name,
            client_identity=own,
            endpoint_identity=other,
            encryption=self.encryption or (self.way.encryption if self.way else "none"),
        )

    def _kind(self) -> _Key:
        ends = identities(self.way)
        place = self.gateway, self.backend
        return *place, self.route, self.rule, code(self.status), *ends, self.policy

    def again(
        self,
        method: bytes,
        host: bytes,
        path: bytes,
        headers: Headers,
        request_id: str,
        started: float,
        bytes_in: int,
        bytes_out: int,
    ) -> None:
        """It is closed: let it be that of another request, which differs in this."""
        head = self.head
        head.method, head.headers = method, headers
        self.host, self.path = host, path
        self.request_id = request_id
        self.started = started
        self.bytes_in, self.bytes_out = bytes_in, bytes_out

    def close(self, log: AccessLog) -> None:
        """Count the request, write its line. A client gone before a response counts as code 499."""
        self.elapsed = elapsed = time.monotonic() - self.started
        counted = self._counted
        if counted is None:
            counted = self._counted = _found(self._kind())
        counted.add(elapsed, self.bytes_in, self.bytes_out)
        if not log.wanted:
            return
        way = self.way
        own, other = identities(way)
        agent = next((value for name, value in self.head.headers if name == b"user-agent"), b"")
        log.write(
            AccessLogEntry(
                time=datetime.now(UTC).isoformat(timespec="milliseconds"),
                client=self.client,
                method=cut(self.head.method, MAX_NAME),
                host=cut(self.host, MAX_NAME),
                path=cut(self.path),
                protocol=protocol(self.head.version),
                status=self.status or 499,
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
                encryption=way.encryption if way is not None else "none",
                client_identity=own,
                endpoint_identity=other,
                attempts=self.attempts,
                user_agent=cut(agent, MAX_NAME),
                reason=self.reason,
                detail=self.detail[:MAX_NAME],
            )
        )
