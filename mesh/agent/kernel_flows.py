"""What the eBPF data path tells: its events as flow records, its counters by reason.

Reads the pinned ring buffer and the pinned counters; loads and attaches nothing. Observability
fails open: where these cannot be read, traffic goes on, and `failure` says why.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

from bpf import constants, events, maps
from bpf.errors import DatapathError
from bpf.events import SocketEvent
from bpf.reasons import Reason
from bpf.ringbuf import RingBuffer
from bpf.structs import Target
from mesh.agent.flows import FlowStore
from mesh.model.flow import Flow, Peer

_log = logging.getLogger("weft.agent")

# Events taken in one go; the loop has others to serve.
_BATCH = 512
_NOBODY = bytes(16)
# Reasons that records of what was not refused have too.
_NAMED = (Reason.POLICY_AUDIT, Reason.FROM_HOST)
_Protocol: TypeAlias = Literal["TCP", "UDP", "ICMP", "ICMPv6", "other"]
_PROTOCOLS: dict[int, _Protocol] = {
    socket.IPPROTO_TCP: "TCP",
    socket.IPPROTO_UDP: "UDP",
    socket.IPPROTO_ICMP: "ICMP",
    socket.IPPROTO_ICMPV6: "ICMPv6",
}


class KernelFlows:
    """Events become records from `start` to `close`."""

    def __init__(self, pins: Path, store: FlowStore, source: Callable[[int], str]) -> None:
        """`source` names a rule of policy by the number that the kernel has for it."""
        self.failure: str | None = None
        self._pins = pins
        self._store = store
        self._source = source
        self._ring: RingBuffer | None = None
        self._lost = 0
        self._loop = asyncio.get_running_loop()

    def start(self) -> None:
        """Again: nothing, unless it failed."""
        if self._ring is not None:
            return
        try:
            self._lost = maps.counters(self._pins)[Reason.EVENTS_LOST]
            fd = maps.open_pinned(self._pins, "events")
        except DatapathError as error:
            failure = f"the eBPF data path's events are not seen: {error}"
            if failure != self.failure:
                _log.error("%s", failure)
            self.failure = failure
            return
        self.failure = None
        self._ring = RingBuffer(fd, constants.EVENT_PAGES * 4096)
        self._loop.add_reader(fd, self._readable)

    def close(self) -> None:
        """What is in the ring buffer stays for the next agent."""
        if self._ring is not None:
            self._loop.remove_reader(self._ring.fileno())
            self._ring.close()
            self._ring = None

    def counters(self) -> dict[Reason, int]:
        """By reason, since the maps were made; empty where they cannot be read."""
        try:
            return maps.counters(self._pins)
        except DatapathError:
            return {}

    def _readable(self) -> None:
        assert self._ring is not None
        # The wall clock may be set while Weft runs: hence by each batch.
        epoch_ns = time.time_ns() - time.monotonic_ns()
        records = self._ring.read(_BATCH)
        undecodable = 0
        for record in records:
            try:
                event = events.decode(record)
            except ValueError:
                undecodable += 1
            else:
                self._store.record(self._flow(event, epoch_ns))
        if undecodable:
            self._store.count_lost("undecodable", undecodable)
        if len(records) < _BATCH:  # it was not full, so nothing was lost
            return
        lost = self.counters().get(Reason.EVENTS_LOST, self._lost)
        if lost > self._lost:
            self._store.count_lost("kernel", lost - self._lost)
            self._lost = lost

    def _flow(self, event: SocketEvent, epoch_ns: int) -> Flow:
        refused = event.reason.errno is not None
        named = refused or event.reason in _NAMED
        protocol: _Protocol = _PROTOCOLS.get(event.asked.protocol, "other")
        asked = _peer(event.asked)
        flow = Flow(
            time=epoch_ns + event.time_ns,
            verdict="DROPPED" if refused else "FORWARDED",
            source=_peer(event.source),
            destination=asked if event.peer.address == _NOBODY else _peer(event.peer),
            protocol=protocol,
            reason=event.reason.name if named else "",
            policy=self._source(event.rule),
            service=self._store.peers.service(asked.address, asked.port, protocol),
        )
        return flow if refused else self._store.peers.proven(flow)


def _peer(target: Target) -> Peer:
    if target.address == _NOBODY:
        return Peer()
    if target.is_ipv4:
        return Peer(socket.inet_ntop(socket.AF_INET, target.address[12:]), target.port)
    return Peer(socket.inet_ntop(socket.AF_INET6, target.address), target.port)
