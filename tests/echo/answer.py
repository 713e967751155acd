"""What an echo backend answers, whichever protocol carried the request.

Knows no sockets. The shape of the JSON and the special paths are those that Gateway API's
conformance cases look at: path, host, method, proto, headers, httpPort, namespace, pod, tls;
/health, /status/NNN, /retry; query `delay`; request header X-Echo-Set-Header.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import parse_qs

Fields = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Pod:
    """Who answers: a pod's name and namespace, and the address it listens on."""

    name: str
    namespace: str
    address: str


class Seen(NamedTuple):
    """A request as it arrived. `target` is the request URI; `tls` is None on plain connections."""

    method: str
    target: str
    proto: str
    host: str
    headers: Fields
    port: int
    tls: dict[str, object] | None = None


class Answer(NamedTuple):
    status: int
    headers: Fields
    body: bytes


@dataclass(slots=True)
class Memory:
    """What pods remember: one log for all of them, and how often /retry was tried."""

    log: list[tuple[Pod, str]] = field(default_factory=list)
    tries: Counter[tuple[Pod, str]] = field(default_factory=Counter)

    def echoed(self, pod_prefix: str, namespace: str, uri: str) -> bool:
        """Whether a pod of this name has "Echoing back request made to <uri> to client" in its
        log (a line that goes on after the URI counts, as it does for a regular expression)."""
        line = log_line(uri).removesuffix(" to client")
        return any(
            pod.name.startswith(pod_prefix) and pod.namespace == namespace and line in text
            for pod, text in self.log
        )


def log_line(uri: str) -> str:
    return f"Echoing back request made to {uri} to client"


_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0}


def duration(text: str) -> float:
    """Seconds of a Go duration with one unit, like 500ms or 1s."""
    found = re.fullmatch(r"([0-9.]+)(ms|s|m)", text)
    if not found:
        raise ValueError(f"not a duration: {text}")
    return float(found[1]) * _UNITS[found[2]]


async def answer(pod: Pod, seen: Seen, memory: Memory) -> Answer:
    path, _, query_text = seen.target.partition("?")
    query = {name: values[0] for name, values in parse_qs(query_text).items()}
    if path == "/health":
        return Answer(200, [("Content-Type", "text/plain")], b"OK")
    if "delay" in query:
        await asyncio.sleep(duration(query["delay"]))
    status = 200
    if found := re.fullmatch(r"/status/(\d{3})", path):
        status = int(found[1])
    elif path == "/retry" or path.startswith("/retry/"):
        status = await _retry(pod, query, memory)
    memory.log.append((pod, log_line(seen.target)))
    headers = [("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")]
    return Answer(status, headers + wanted_headers(seen.headers), echo_json(pod, seen))


async def _retry(pod: Pod, query: dict[str, str], memory: Memory) -> int:
    """The first `succeedAfter` tries with the same uuid get `responseCode`, after `delayRetry`."""
    key = (pod, query.get("uuid", ""))
    memory.tries[key] += 1
    if memory.tries[key] > int(query.get("succeedAfter", "0")):
        return 200
    if "delayRetry" in query:
        await asyncio.sleep(duration(query["delayRetry"]))
    return int(query.get("responseCode", "500"))


def wanted_headers(headers: Fields) -> Fields:
    """What X-Echo-Set-Header asks for: "name:value,name:value"."""
    wanted = []
    for name, text in headers:
        if name.lower() == "x-echo-set-header":
            for pair in filter(None, (part.strip() for part in text.split(","))):
                key, _, value = pair.partition(":")
                wanted.append((key, value.strip()))
    return wanted


def echo_json(pod: Pod, seen: Seen) -> bytes:
    headers: dict[str, list[str]] = {}
    for name, value in seen.headers:
        headers.setdefault("-".join(part.capitalize() for part in name.split("-")), []).append(
            value
        )
    body: dict[str, object] = {
        "path": seen.target,
        "host": seen.host,
        "method": seen.method,
        "proto": seen.proto,
        "headers": headers,
        "httpPort": str(seen.port),
        "namespace": pod.namespace,
        "ingress": "",
        "service": "",
        "pod": pod.name,
    }
    if seen.tls is not None:
        body["tls"] = seen.tls
    return json.dumps(body, indent=1).encode()
