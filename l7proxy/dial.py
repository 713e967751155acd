"""Connecting to an address, and what can go wrong with it. Knows sockets, no protocol."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct

# Seconds before the first probe, between probes; probes unanswered until the end.
_KEEPALIVE = (
    (socket.TCP_KEEPIDLE, 60),
    (socket.TCP_KEEPINTVL, 10),
    (socket.TCP_KEEPCNT, 3),
)
_IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h; Python 3.12 has it

# How much a peer may send that has not been read yet, bytes: enough for 8 Gbit/s at a round trip of
# 1 ms. The kernel takes it as half of the memory it charges a socket for (SO_RCVBUF in socket(7)),
# and never as more than net.core.rmem_max; without it, as much as net.ipv4.tcp_rmem allows.
RECEIVE_BUFFER = 1 << 20
# struct linger, of a close that resets, and of one in good order (socket(7)).
_RESET, _ORDERLY = struct.pack("ii", 1, 0), struct.pack("ii", 0, 0)


class DialFailed(Exception):
    """`reason` is counted, snake case."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


async def dial(
    address: str, port: int, timeout_s: float, *, source: str | None = None
) -> socket.socket:
    """A connected socket, not blocking. `source`: the address to connect from. DialFailed."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise DialFailed("connect_failed", error.strerror or str(error)) from None
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        bound_unread(sock)
        if source is not None:
            # Ports are shared between peers, as without an address of our own (ip(7)).
            sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))
        await _connect(sock, (address, port), timeout_s)
    except BaseException as error:
        sock.close()
        match error:
            case TimeoutError():
                why = f"not connected within {timeout_s:g} s"
                raise DialFailed("connect_timeout", why) from None
            case ConnectionRefusedError():
                raise DialFailed("connect_refused", error.strerror or str(error)) from None
            case OSError():
                raise DialFailed("connect_failed", error.strerror or str(error)) from None
        raise
    return sock


async def _connect(sock: socket.socket, to: tuple[str, int], timeout_s: float) -> None:
    """OSError, TimeoutError."""
    # On one node it has mostly been decided by the time that the first call returns.
    error = sock.connect_ex(to) and sock.connect_ex(to)
    if error in (errno.EINPROGRESS, errno.EALREADY):
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(sock, to)
    elif error:
        raise OSError(error, os.strerror(error))


def bound_unread(sock: socket.socket) -> None:
    """Before it is connected; accepted connections inherit it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


def keep_alive(sock: socket.socket) -> None:
    """Find out peers that went without a word; accepted connections inherit it (tcp(7))."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def reset_on_close(sock: socket.socket, on: bool = True) -> None:
    """Whether a close tells the peer by a reset that it is no orderly end, which it then is whoever
    closes: the kernel for a process that was killed, too. What the peer does not have yet is lost.
    OSError: the connection is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET if on else _ORDERLY)
