"""Accepts connections on one port: limits, who is at the far end, drain.

Every connection counts from its first moment, a TLS one before its handshake. What becomes of an
accepted connection is for subclasses: HTTP (`http_acceptor`) or a relay (`relay`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from l7proxy import metrics
from l7proxy.handles import Steered
from l7proxy.tasks import spawn
from mesh.model.nodeconfig import Settings

# Connections taken in one go, before others get their turn.
_BATCH = 32


class Drainable(Protocol):
    def drain(self) -> None: ...


@dataclass(slots=True)
class Admission:
    """Counts this worker's client connections, in all and by client address."""

    total: int = 0
    by_client: Counter[str] = field(default_factory=Counter)
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def enter(self, client: str, settings: Settings) -> str | None:
        """Count a connection in; or the reason why it must not be."""
        if self.total >= settings.max_connections:
            return "max_connections"
        if self.by_client[client] >= settings.max_connections_per_client:
            return "max_connections_per_client"
        self.total += 1
        self.by_client[client] += 1
        self.idle.clear()
        metrics.CONNECTIONS.set(self.total)
        return None

    def move(self, before: str, client: str, settings: Settings) -> str | None:
        """Count a connection as another client's from now on; or the reason why it must not be."""
        if self.by_client[client] >= settings.max_connections_per_client:
            return "max_connections_per_client"
        self.by_client[client] += 1
        self._uncount(before)
        return None

    def leave(self, client: str) -> None:
        self.total -= 1
        self._uncount(client)
        if not self.total:
            self.idle.set()
        metrics.CONNECTIONS.set(self.total)

    def _uncount(self, client: str) -> None:
        self.by_client[client] -= 1
        if not self.by_client[client]:
            del self.by_client[client]


class Client(NamedTuple):
    """A connection that was let in: its far end, what the kernel knows of it, and the settings in
    force as it came."""

    address: tuple[str, int]
    steered: Steered | None
    settings: Settings


class Acceptor:
    """Takes the connections of one port, and remembers the open ones.

    `identify`, where given, tells by descriptor what the kernel knows of a connection; one of which
    it knows nothing is closed at once. Once drained the acceptor lets nobody in any more, those who
    are in the middle of a handshake included.
    """

    def __init__(
        self,
        *,
        settings: Callable[[], Settings],
        admission: Admission,
        identify: Callable[[int], Steered | None] | None = None,
    ) -> None:
        self.draining = False
        self.open: set[Drainable] = set()
        self._settings = settings
        self._admission = admission
        self._identify = identify

    def accept(self, listening: socket.socket) -> None:
        """Take what waits on a listening socket (not blocking), a bounded number: other workers
        accept on it too. OSError: no descriptor or memory is left for another connection."""
        for _ in range(_BATCH):
            try:
                sock, peer = listening.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionAbortedError:
                continue
            self._take(sock, plain(peer))

    def _take(self, sock: socket.socket, address: tuple[str, int]) -> None:
        steered = None
        if self._identify is not None:
            steered = self._identify(sock.fileno())
            if steered is None:
                count_refused("unknown_origin")
                sock.close()
                return
        settings = self._settings()
        if refused := self._admission.enter(address[0], settings):
            count_refused(refused)
            with sock:
                self.turn_away(sock, refused)
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        spawn(self.begin(sock, Client(address, steered, settings)), name="accept")

    async def begin(self, sock: socket.socket, client: Client) -> None:
        """Serve an admitted connection, whose end `left` must be told."""
        raise NotImplementedError

    def turn_away(self, sock: socket.socket, reason: str) -> None:
        """Say, if that can be said, why a connection is closed."""

    def left(self, connection: Drainable, client: Client) -> None:
        """An admitted connection is over; `connection` is what it had become. Once for each."""
        self.open.discard(connection)
        self._admission.leave(client.address[0])

    def drain(self) -> None:
        self.draining = True
        for connection in tuple(self.open):
            connection.drain()

    def cut_off(self) -> None:
        """The drain's deadline has passed, and the process is about to end."""


def count_refused(reason: str) -> None:
    metrics.REFUSED.labels(reason).inc()


def plain(address: tuple[str, int]) -> tuple[str, int]:
    """(address, port) with IPv4-mapped IPv6 as IPv4, and without scope."""
    host = address[0].partition("%")[0]
    if host.startswith("::ffff:"):
        mapped = ipaddress.IPv6Address(host).ipv4_mapped
        host = str(mapped) if mapped else host
    return host, address[1]
