"""Rules over request heads, as the automaton is compiled from them: shapes only.

A rule is a conjunction of conditions and a verdict; of a list of rules the first whose conditions
hold gives the verdict. The reference for what a condition means is l7proxy.route_match.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

# Verdicts of no rule: the proxy is to decide; no rule holds.
PUNT, NONE = 0, 0xFFFF


class Condition(NamedTuple):
    """`name` is a header's (lower case) or query parameter's. "host" sees the authority, port
    included; "hostname" the host alone: "exact" is a pattern of a route ("*.example.com"), "regex"
    without regard to case and "either" hold for host or authority."""

    of: Literal["method", "path", "host", "hostname", "header", "query"]
    kind: Literal["exact", "prefix", "regex", "present", "either"]
    value: bytes = b""
    name: bytes = b""


class Rule(NamedTuple):
    """`verdict`: PUNT, or a number of the caller's below NONE."""

    conditions: tuple[Condition, ...]
    verdict: int


class Limits(NamedTuple):
    """Beyond which a request is the proxy's: bytes of its head, number of fields, bytes of its body
    (None: none)."""

    head: int
    fields: int
    body: int | None
