"""Connecting to an endpoint: by redirect where it is a workload of this node and the kernel offers
that, by TCP everywhere else.

On a connection that the kernel has enrolled nothing may be sent before the far socket is known. If
that does not show itself (TCP_DEFER_ACCEPT waits for data first), the connection is left, the
endpoint is remembered as plain, and a fresh connection is made, which never was enrolled.
"""

from __future__ import annotations

import asyncio
import functools
import socket
from collections.abc import Callable
from typing import NamedTuple

from bpf.structs import Target
from l7proxy import metrics
from l7proxy.dial import DialFailed, dial, reset_on_close
from l7proxy.handles import Handles, Kernel

# When to ask again for the far socket, in seconds; some 20 ms in all.
_STEPS_S = (0.0002, 0.0005, 0.001, 0.002, 0.004, 0.006, 0.006)


class Reached(NamedTuple):
    """A connected socket. `unread`: what is sent goes by redirect, and this tells how many bytes of
    memory the receiver holds of it, whose socket's cookie is `cookie`."""

    sock: socket.socket
    unread: Callable[[], int] | None = None
    cookie: int = 0


async def reach(kernel: Kernel, address: str, port: int, timeout_s: float) -> Reached:
    """DialFailed. `timeout_s` is for each of two connections at most."""
    sock = await dial(address, port, timeout_s)
    handles = kernel.handles
    if handles is None:
        return Reached(sock)
    cookie = await _paired(handles, sock)
    if cookie is None:
        _abort(sock)
        _mark_plain(handles, address, port)
        sock = await dial(address, port, timeout_s)
        cookie = await _paired(handles, sock)
        if cookie is None:
            _abort(sock)
            raise DialFailed("connect_unpaired", "the kernel does not tell whom it redirects to")
    return Reached(sock, functools.partial(handles.queued, cookie) if cookie else None, cookie)


async def _paired(handles: Handles, sock: socket.socket) -> int | None:
    """The far socket's cookie, 0 for TCP; None: it did not show itself."""
    try:
        cookie = handles.pair(sock.fileno())
        for step in _STEPS_S:
            if cookie is not None:
                break
            await asyncio.sleep(step)
            cookie = handles.pair(sock.fileno())
    except OSError as error:
        _abort(sock)
        raise DialFailed("connect_failed", f"the kernel was asked and said: {error}") from None
    except BaseException:
        _abort(sock)
        raise
    return cookie


def _mark_plain(handles: Handles, address: str, port: int) -> None:
    metrics.PLAIN.inc()
    try:
        handles.mark_plain(Target.of(address, port, "TCP"))
    except OSError as error:
        raise DialFailed("connect_failed", f"the kernel refused to remember: {error}") from None


def _abort(sock: socket.socket) -> None:
    reset_on_close(sock)
    sock.close()
