"""The end of a client's connection over HTTP/1.1, after its last response.

The client may have more on its way; were it met by a closed socket, the reset could destroy the
response before the client has read it (RFC 9112 §9.6). So only half is closed, and what still comes
is thrown away, for a while and up to a size.
"""

from __future__ import annotations

from l7proxy.http1_link import Deadline, Link

LINGER_S = 2.0
_BYTES = 1024 * 1024
# A TLS connection cannot be half-closed here, so that the client may wait for this to pass.
_SHORT_S = 0.2


class Linger:
    def __init__(self, link: Link) -> None:
        self._link = link
        self._left = _BYTES

    def receive(self, size: int) -> None:
        """So many bytes have come."""
        self._left -= size
        if self._left < 0:
            self._link.wake()

    def end(self) -> None:
        """It has lasted long enough."""
        self._left = -1
        self._link.wake()

    async def run(self, timer: Deadline, *, short: bool) -> None:
        """Until the client has ended, too, or `end`, which `timer` leads to. `short`: the client is
        hardly sending anything."""
        timer.set(_SHORT_S if short else LINGER_S)
        while not self._link.eof and self._left >= 0:
            await self._link.more_input()
        timer.close()
