"""The way of a configuration to the workers: deltas out, acknowledgements and flow records back.

Knows versions and channels, not what sections mean. A worker that does not acknowledge in time is
left behind and gets the whole value when it answers again; it never holds up the others.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from mesh.model.channel import FrameReader, Proof, encode_frame
from mesh.model.flow import Flows
from mesh.model.nodeconfig import PROXY_SECTIONS, Ack, NodeConfig, Section, for_destination
from mesh.model.section import SectionKey

_log = logging.getLogger("weft.agent")

# A worker that has not acknowledged after this long is lagging.
ACK_LIMIT_S = 5.0
_MAX_PROOFS = 4096


class WorkerState(NamedTuple):
    """For people. `version`: acknowledged, None before the first."""

    id: int
    pid: int
    version: int | None
    lagging: bool
    refused: Mapping[SectionKey, str]


class _Link(asyncio.Protocol):
    """The agent's end of one worker's config channel."""

    def __init__(self, number: int, pid: int, rollout: Rollout) -> None:
        self.id = number
        self.pid = pid
        self.acked: int | None = None
        self.sent: int | None = None
        self.sent_at = 0.0
        self.lagging = False
        self.refused: Mapping[SectionKey, str] = {}
        self._rollout = rollout
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._rollout.link_made(self)

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.receive(data):
                match message:
                    case Ack():
                        self._rollout.link_acked(self, message)
                    case Flows():
                        self._rollout.flows(message)
                    case Proof():
                        self._rollout.pass_on(self, message)
                    case _:
                        raise ValueError(f"{type(message).__name__} is not for an agent")
        except ValueError as error:  # msgspec's errors are ValueErrors
            _log.error("worker %d (pid %d): bad message: %s", self.id, self.pid, error)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._rollout.link_lost(self)

    def pass_on(self, frame: bytes) -> None:
        if self._transport is not None and not self.lagging:
            self._transport.write(frame)

    def send(self, frame: bytes, version: int, now: float) -> None:
        if self._transport is not None:
            self._transport.write(frame)
            self.sent, self.sent_at = version, now

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Rollout:
    """The configuration in force and the workers that have it, or not yet.

    `changed` is called after every acknowledgement, arrival, loss and missed deadline;
    `lost(id, pid)` when a channel ended; `flows` with the flow records of workers.
    """

    def __init__(
        self,
        expected: int,
        changed: Callable[[], None],
        lost: Callable[[int, int], None],
        flows: Callable[[Flows], None] = lambda flows: None,
    ) -> None:
        self.config = NodeConfig.empty()
        self.expected = expected
        self.ack_count = 0
        self.ack_seconds = 0.0
        self.flows = flows
        self._changed = changed
        self._lost = lost
        self._links: dict[int, _Link] = {}
        # The last of each pair, by what stands in it beside the chain: for who was not there.
        self._proofs: dict[Proof, Proof] = {}
        self._loop = asyncio.get_running_loop()
        self._waiting_until = self._loop.time() + ACK_LIMIT_S
        self._loop.call_later(ACK_LIMIT_S, self._changed)

    async def connect(self, number: int, pid: int, sock: socket.socket) -> None:
        """Take the agent's end of a worker's channel; it replaces the one before."""
        sock.setblocking(False)
        link = _Link(number, pid, self)
        before, self._links[number] = self._links.get(number), link
        if before is not None:
            before.close()
        await self._loop.create_connection(lambda: link, sock=sock)

    def publish(self, put: dict[SectionKey, Section], remove: tuple[SectionKey, ...]) -> None:
        """Make the next version and send it to every worker that keeps up."""
        self.config, delta = self.config.change(put, remove, time.monotonic_ns())
        frame = encode_frame(for_destination(delta, PROXY_SECTIONS))
        for link in self._links.values():
            if link.sent is None:
                self.link_made(link)
            elif not link.lagging and link.sent == delta.base:
                self._send(link, frame)

    @property
    def in_flight(self) -> bool:
        """Whether an acknowledgement may still come that the current version waits for. Before all
        workers have come for the first time, those that are missing count, for a while."""
        links = self._links.values()
        if any(not link.lagging and link.acked != self.config.version for link in links):
            return True
        missing = len(links) < self.expected
        return not links or (missing and self._loop.time() < self._waiting_until)

    @property
    def workers(self) -> list[WorkerState]:
        return [
            WorkerState(link.id, link.pid, link.acked, link.lagging, link.refused)
            for _, link in sorted(self._links.items())
        ]

    def refusals(self) -> dict[SectionKey, str]:
        """Every section that some worker refuses, and why."""
        return {key: why for link in self._links.values() for key, why in link.refused.items()}

    # --- called by the links ---------------------------------------------------------------------

    def link_made(self, link: _Link) -> None:
        # Before the first version there is nothing to say: an empty whole would take from the
        # worker what an agent before this one gave it.
        if self.config.version:
            self._send_whole(link)
        self._repeat(link)

    def link_acked(self, link: _Link, ack: Ack) -> None:
        now = self._loop.time()
        self.ack_count += 1
        self.ack_seconds += now - link.sent_at
        link.acked, link.refused = ack.version, ack.refused
        back, link.lagging = link.lagging, False
        if back:
            _log.warning("worker %d (pid %d) answers again", link.id, link.pid)
        if link.acked == link.sent and link.sent != self.config.version:
            self._send_whole(link)
        if back:
            self._repeat(link)
        self._changed()

    def pass_on(self, link: _Link, proof: Proof) -> None:
        """What one worker was told concerns tunnels of the others."""
        pair = msgspec.structs.replace(proof, chain=())
        self._proofs.pop(pair, None)
        self._proofs[pair] = proof
        if len(self._proofs) > _MAX_PROOFS:
            del self._proofs[next(iter(self._proofs))]
        frame = encode_frame(proof)
        for other in self._links.values():
            if other is not link:
                other.pass_on(frame)

    def _repeat(self, link: _Link) -> None:
        for proof in self._proofs.values():
            link.pass_on(encode_frame(proof))

    def link_lost(self, link: _Link) -> None:
        if self._links.get(link.id) is link:
            del self._links[link.id]
            self._lost(link.id, link.pid)
            self._changed()

    def _send_whole(self, link: _Link) -> None:
        self._send(link, encode_frame(for_destination(self.config.whole(), PROXY_SECTIONS)))

    def _send(self, link: _Link, frame: bytes) -> None:
        version = self.config.version
        link.send(frame, version, self._loop.time())
        self._loop.call_later(ACK_LIMIT_S, self._check, link, version)

    def _check(self, link: _Link, version: int) -> None:
        behind = link.acked is None or link.acked < version
        if behind and not link.lagging and self._links.get(link.id) is link:
            _log.error(
                "worker %d (pid %d) has not acknowledged configuration %d after %g s: going on "
                "without it",
                link.id,
                link.pid,
                version,
                ACK_LIMIT_S,
            )
            link.lagging = True
            self._changed()
