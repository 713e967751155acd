"""The listening sockets of a worker: connections are accepted where somebody takes them."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import TypeAlias

from l7proxy import metrics
from l7proxy.acceptor import Acceptor
from l7proxy.dial import bound_unread, keep_alive

_log = logging.getLogger("weft.listening")
Bind: TypeAlias = tuple[str, int]

# How long nothing is accepted once descriptors or memory have run out, in seconds.
_PAUSE_S = 0.5


class Listening:
    """`acceptor_at` says who takes the connections of a port now; None: they wait."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, acceptor_at: Callable[[Bind], Acceptor | None]
    ) -> None:
        self._loop = loop
        self._acceptor_at = acceptor_at
        self._bound: dict[Bind, socket.socket] = {}
        self._closed = False

    def put(self, bind: Bind, sock: socket.socket) -> None:
        """Take over a socket; a second one for the same port replaces the first."""
        self.drop(bind)
        if self._closed:
            sock.close()
            return
        sock.setblocking(False)
        # Accepted connections inherit it; the proxy may have nothing to send for long.
        keep_alive(sock)
        bound_unread(sock)
        self._bound[bind] = sock
        self.start(bind)

    def drop(self, bind: Bind) -> None:
        self.stop(bind)
        if sock := self._bound.pop(bind, None):
            sock.close()

    def close(self) -> None:
        """Now, and whatever is still put."""
        self._closed = True
        for bind in tuple(self._bound):
            self.drop(bind)

    def start(self, bind: Bind) -> None:
        """Somebody may take connections from now on."""
        if (sock := self._bound.get(bind)) and self._acceptor_at(bind) is not None:
            self._loop.add_reader(sock.fileno(), self._accept, bind)

    def stop(self, bind: Bind) -> None:
        if sock := self._bound.get(bind):
            self._loop.remove_reader(sock.fileno())

    def _accept(self, bind: Bind) -> None:
        acceptor = self._acceptor_at(bind)
        assert acceptor is not None
        try:
            acceptor.accept(self._bound[bind])
        except OSError as error:
            _log.error("nothing is accepted on %s port %d for a moment: %s", *bind, error)
            metrics.REFUSED.labels("accept_failed").inc()
            self.stop(bind)
            self._loop.call_later(_PAUSE_S, self.start, bind)
