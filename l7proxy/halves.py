"""Ending one half of a connection, while the other goes on. Knows transports, no protocol."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from l7proxy.tls_stream import TLSStream
from l7proxy.turn import Turn


def end_half(transport: asyncio.Transport) -> None:
    """Tell the peer that no more will come. Only once the transport has nothing left to write."""
    if isinstance(transport, TLSStream | Turn):
        transport.half_close()
        return
    own = transport.get_extra_info("socket")
    # Not by the transport's own way: uvloop frees a handle twice then. uvloop's socket objects
    # cannot be shut down; a duplicate of the descriptor can.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(own.fileno())) as duplicate:
        duplicate.shutdown(socket.SHUT_WR)
