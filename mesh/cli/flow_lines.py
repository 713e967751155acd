"""A flow record as a line for people, and as JSON for programs. Knows records, not their way."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec

from mesh.agent.flow_peers import RESERVED
from mesh.agent.flows import Lost
from mesh.model.flow import Flow, Peer

_LOST = {
    "worker": "{} flow records were lost: a proxy worker made them faster than they were taken",
    "kernel": "{} flow records were lost: the kernel's ring buffer was full",
    "undecodable": "{} flow records were lost: the eBPF programs are of another version",
    "follower": "{} flow records are not shown: this command did not keep up",
    "overwritten": "older flow records are no longer held; weft up --flow-buffer N holds more",
}


def compact(flow: Flow, *, wide: bool = False) -> str:
    """Close to hubble observe: time, who, to whom, what, verdict, details."""
    seconds, nanoseconds = divmod(flow.time, 10**9)
    when = f"{datetime.fromtimestamp(seconds):%b %d %H:%M:%S}.{nanoseconds // 10**6:03}"
    to = flow.destination
    # What got no further than its Service has that Service's address for a destination.
    nobody = not to.address or (flow.verdict == "DROPPED" and not to.pod)
    destination = flow.service if nobody and flow.service else _end(to)
    parts = [f"{when}: {_end(flow.source)} -> {destination}", *_what(flow)]
    if flow.reason:
        parts.append(flow.reason)
        if flow.policy and flow.reason.lower().startswith("policy_"):
            parts.append(f"by {flow.policy}")
    if wide:
        parts += [f"{name}={value}" for name, value in _more(flow).items() if value]
    return _printable(" ".join(parts))


def as_json(flow: Flow) -> str:
    """The record's fields; `time` as in RFC 3339, in UTC, to the nanosecond."""
    fields: dict[str, Any] = msgspec.to_builtins(flow)
    seconds, nanoseconds = divmod(flow.time, 10**9)
    fields["time"] = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09}Z"
    # Defaults are left out of the record, but these are looked for.
    fields |= {"protocol": flow.protocol, "encryption": flow.encryption}
    return json.dumps(fields, ensure_ascii=False)


def lost_text(lost: Lost) -> str:
    return _LOST[lost.where].format(lost.count)


def _what(flow: Flow) -> list[str]:
    http = flow.http
    if http is None:
        kind = "connection" if flow.protocol == "TCP" else "datagram"
        return [f"{flow.protocol.lower()}-{kind}", flow.verdict]
    host = http.host or flow.service
    request = f"({http.protocol} {http.method} http://{host}{http.path})"
    status = str(http.status) if http.status else "no-response"
    return ["http-request", flow.verdict, request, status, f"{http.latency_ms:.1f}ms"]


def _more(flow: Flow) -> dict[str, object]:
    """What -o wide adds."""
    http = flow.http
    return {
        "service": flow.service,
        "route": flow.route,
        "gateway": flow.gateway,
        "policy": flow.policy,
        "encryption": flow.encryption if flow.encryption != "none" else "",
        "node": flow.node,
        "from-address": flow.source.address if flow.source.pod else "",
        "to-address": flow.destination.address if flow.destination.pod else "",
        "from-labels": _labels(flow.source),
        "to-labels": _labels(flow.destination),
        "bytes-in": http.bytes_in if http else flow.bytes_in,
        "bytes-out": http.bytes_out if http else flow.bytes_out,
        "request-id": http.request_id if http else "",
    }


def _labels(peer: Peer) -> str:
    if not peer.pod:
        return ""
    return ",".join(f"{name}={value}" for name, value in sorted(peer.labels.items()))


def _end(peer: Peer) -> str:
    port = f":{peer.port}" if peer.port else ""
    if peer.pod:
        return f"{peer.namespace}/{peer.pod}{port}"
    if not peer.address:
        return "unknown"
    address = f"[{peer.address}]" if ":" in peer.address and port else peer.address
    who = RESERVED.get(peer.identity)
    return f"{address}{port} ({who})" if who else f"{address}{port}"


def _printable(text: str) -> str:
    """Clients choose paths and names: nothing of theirs may steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
