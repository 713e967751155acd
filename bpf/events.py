"""What the programs tell of connections and datagrams: records of the ring buffer `events`.

Knows `struct event` (bpf/layout.py), not who is behind an address.
"""

from __future__ import annotations

from typing import NamedTuple

from bpf import layout, structs
from bpf.reasons import Reason
from bpf.structs import Target

_REASONS = {int(reason): reason for reason in Reason}


class SocketEvent(NamedTuple):
    """`time_ns` by CLOCK_MONOTONIC. A workload in the network namespace with cookie `netns` and
    address `source` wanted `asked` and was given `peer`. Addresses and ports are zero where they
    are not known or there is none; so is `netns`. A reason with an errno: it was refused, by a rule
    of policy where `rule` is not 0 (bpf.policies)."""

    time_ns: int
    netns: int
    source: Target
    asked: Target
    peer: Target
    reason: Reason
    rule: int = 0


def decode(record: bytes) -> SocketEvent:
    """ValueError: not an event, or of another version."""
    if len(record) != layout.EVENT.size:
        raise ValueError(f"an event of {len(record)} bytes, not {layout.EVENT.size}")
    event = layout.EVENT.unpack(structs.Event, record)
    if event.reason not in _REASONS:
        raise ValueError(f"an event with reason {event.reason}")
    source, asked, peer = (
        layout.TARGET.unpack(Target, packed) for packed in (event.source, event.asked, event.peer)
    )
    return SocketEvent(
        event.time_ns, event.netns, source, asked, peer, _REASONS[event.reason], event.rule
    )
