"""The flow record: one connection or request as somebody saw it, close to Hubble's flow.

Workers write what they know, which is addresses; the agent adds who stands behind those (`Peer`
fields beyond address and port) as it stores the record. Knows shapes only. Flows can be lost under
load, which is counted; counters (metrics) are exact and separate.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

Verdict: TypeAlias = Literal["FORWARDED", "DROPPED", "ERROR"]
# "mtls" between nodes; "local": on one node, both ends with identities.
Encryption: TypeAlias = Literal["none", "mtls", "local"]


class Peer(msgspec.Struct, frozen=True, omit_defaults=True):
    """One end. `pod` and what follows are empty for what is no pod; `identity` as in
    WorkloadSection, 0 unknown; `spiffe_id`: who it has proved to be."""

    address: str = ""
    port: int = 0
    namespace: str = ""
    pod: str = ""
    service_account: str = ""
    labels: dict[str, str] = {}
    identity: int = 0
    spiffe_id: str = ""


class HttpFlow(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request. `status` 0: the client went before there was one; `latency_ms` from the head's
    arrival to the end of the response."""

    method: str
    host: str
    path: str
    status: int
    protocol: str = "HTTP/1.1"
    latency_ms: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    request_id: str = ""


class Flow(msgspec.Struct, frozen=True, omit_defaults=True):
    """`time`: nanoseconds since 1970 UTC. `source` asked, `destination` is who got it (or would
    have). `service`: "<ns>/<name>:<port>" where a Service was asked for. FORWARDED: passed on;
    DROPPED: refused by policy, filter or load balancer; ERROR: could not be passed on. `reason`
    says why it was not, by the name that is also counted. `http` None: a connection (or datagram).
    `gateway` is "<ns>/<name>" for requests from outside.
    """

    time: int
    verdict: Verdict
    source: Peer
    destination: Peer
    protocol: Literal["TCP", "UDP", "ICMP", "ICMPv6", "other"] = "TCP"
    reason: str = ""
    node: str = ""
    service: str = ""
    http: HttpFlow | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    gateway: str = ""
    route: str = ""
    policy: str = ""
    encryption: Encryption = "none"


class Flows(msgspec.Struct, frozen=True, tag="flows"):
    """Worker to agent: records, and how many were lost since the message before."""

    records: tuple[Flow, ...]
    lost: int = 0
