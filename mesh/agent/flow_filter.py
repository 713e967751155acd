"""Which flow records somebody wants: the words of `weft observe` and the API, as a predicate.

Several values of one filter: any of them; several filters: all of them. Knows records and text.
"""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import get_args

from mesh.agent.flow_peers import RESERVED
from mesh.agent.flows import Matches
from mesh.model.flow import Flow, Peer, Verdict

_UNITS_S = {"ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_STATUS = re.compile(r"(\d{1,3})(?:-(\d{1,3}))?|([1-5])xx", re.IGNORECASE)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_L4 = ("TCP", "UDP", "ICMP", "ICMPV6", "OTHER")


class FilterError(Exception):
    """A filter cannot be understood; which, and how to write it."""


def compile_filters(filters: Iterable[tuple[str, str]]) -> Matches:
    """From (name, value) pairs, names as in FILTERS. FilterError."""
    grouped: dict[str, list[Matches]] = {}
    for name, value in filters:
        grouped.setdefault(name, []).append(FILTERS[name](value))
    groups = [_any(ones) for ones in grouped.values()]
    return lambda flow: all(matches(flow) for matches in groups)


def _any(ones: list[Matches]) -> Matches:
    return ones[0] if len(ones) == 1 else lambda flow: any(matches(flow) for matches in ones)


def since_ns(text: str) -> int:
    """The moment meant by "5m" (so long ago) or by an RFC 3339 time, in nanoseconds since 1970
    UTC. FilterError."""
    parts = _DURATION.findall(text)
    if parts and "".join(map("".join, parts)) == text:
        ago = sum(float(number) * _UNITS_S[unit] for number, unit in parts)
        return time.time_ns() - int(ago * 1e9)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise FilterError(
            f"since {text}: not a duration like 30s, 5m or 1h30m, nor a time with its zone like "
            "2025-11-25T15:04:05Z"
        )
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


# --- ends ----------------------------------------------------------------------------------------


def _peer(text: str) -> Callable[[Peer], bool]:
    if not text:
        raise FilterError("an empty name of a pod: give NAMESPACE/POD, NAMESPACE/, or an address")
    if text in RESERVED.values():
        return lambda peer: peer.identity in RESERVED and RESERVED[peer.identity] == text
    if "=" in text:
        return _labels(text)
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return _pod(text)
    if network.num_addresses == 1:
        address = str(network.network_address)
        return lambda peer: peer.address == address
    return lambda peer: bool(peer.address) and ipaddress.ip_address(peer.address) in network


def _labels(text: str) -> Callable[[Peer], bool]:
    wanted = []
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not (name and equals) or value.startswith("=") or name.endswith("!"):
            raise FilterError(f"{text}: labels are written NAME=VALUE, several with commas between")
        wanted.append((name, value))
    return lambda peer: all(peer.labels.get(name) == value for name, value in wanted)


def _pod(text: str) -> Callable[[Peer], bool]:
    namespace, slash, prefix = text.rpartition("/")
    if "/" in namespace or (slash and not namespace):
        raise FilterError(
            f"{text}: not NAMESPACE/POD, NAMESPACE/, the beginning of a pod's name, an address, a "
            "CIDR, NAME=VALUE of a label, world or host"
        )
    return lambda peer: (
        bool(peer.pod)
        and peer.pod.startswith(prefix)
        and (not namespace or peer.namespace == namespace)
    )


def _from(text: str) -> Matches:
    matches = _peer(text)
    return lambda flow: matches(flow.source)


def _to(text: str) -> Matches:
    matches = _peer(text)
    return lambda flow: matches(flow.destination)


# --- the rest ------------------------------------------------------------------------------------


def _verdict(text: str) -> Matches:
    verdict = text.upper()
    if verdict not in get_args(Verdict):
        raise FilterError(f"verdict {text}: must be one of {', '.join(get_args(Verdict))}")
    return lambda flow: flow.verdict == verdict


def _status(text: str) -> Matches:
    match = _STATUS.fullmatch(text)
    if match is None:
        raise FilterError(f"http-status {text}: give a code (404), a class (5xx) or 500-504")
    first, last, group = match.groups()
    if group:
        least, most = int(group) * 100, int(group) * 100 + 99
    else:
        least, most = int(first), int(last or first)
    return lambda flow: flow.http is not None and least <= flow.http.status <= most


def _method(text: str) -> Matches:
    method = text.upper()
    return lambda flow: flow.http is not None and flow.http.method.upper() == method


def _path(text: str) -> Matches:
    return lambda flow: flow.http is not None and flow.http.path.startswith(text)


def _service(text: str) -> Matches:
    """NAMESPACE/NAME:PORT, of which NAMESPACE/ and :PORT may be absent; NAMESPACE/ is all of it."""
    namespace, _, rest = text.rpartition("/")
    name, _, port = rest.partition(":")

    def matches(flow: Flow) -> bool:
        if not flow.service:
            return False
        its_namespace, _, its_rest = flow.service.partition("/")
        its_name, _, its_port = its_rest.rpartition(":")
        return (
            namespace in ("", its_namespace) and name in ("", its_name) and port in ("", its_port)
        )

    return matches


def _protocol(text: str) -> Matches:
    protocol = text.upper()
    if protocol in _L4:
        return lambda flow: flow.protocol.upper() == protocol
    if protocol == "HTTP":
        return lambda flow: flow.http is not None
    if protocol.startswith("HTTP/"):
        return lambda flow: flow.http is not None and flow.http.protocol.startswith(protocol)
    raise FilterError(f"protocol {text}: give TCP, UDP, ICMP, ICMPv6, HTTP, HTTP/1.1 or HTTP/2")


FILTERS: dict[str, Callable[[str], Matches]] = {
    "from": _from,
    "to": _to,
    "verdict": _verdict,
    "http-status": _status,
    "http-method": _method,
    "http-path": _path,
    "service": _service,
    "protocol": _protocol,
}
