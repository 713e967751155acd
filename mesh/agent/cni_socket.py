"""Where the CNI plugin on the host (mesh/cni/weft-cni.c) asks: a unix socket in the run directory.

Each question is answered in a thread: it waits for the kernel, and for who else changes pods.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from l7proxy.tasks import spawn
from mesh.cni import plugin

_BACKLOG = 128
_WAIT_S = 10.0
_MAX_BYTES = 1 << 21


class CniSocket:
    """The server. A question that is none is not answered, and no answer means: try again later."""

    def __init__(self, path: Path, place: plugin.Place) -> None:
        self._path = path
        self._place = place

    async def run(self) -> None:
        """For ever. A socket that an agent before this one left is replaced. OSError."""
        self._path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            mask = os.umask(0o177)
            try:
                listener.bind(str(self._path))
            finally:
                os.umask(mask)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            loop = asyncio.get_running_loop()
            while True:
                connection, _ = await loop.sock_accept(listener)
                spawn(asyncio.to_thread(self._answer, connection), name="CNI")

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            connection.settimeout(_WAIT_S)
            mark, fds, _, _ = socket.recv_fds(connection, 1, 1)
            held = [stack.enter_context(socket.socket(fileno=fd)) for fd in fds]
            if not mark:
                return
            question = bytearray()
            while part := connection.recv(1 << 16):
                question += part
                if len(question) > _MAX_BYTES:
                    return
            # As if there were one more variable in front, for where there is none.
            variables, end, stdin = (b"\0" + question).partition(b"\0\0")
            if not end:
                return
            pairs = variables.decode(errors="replace").split("\0")
            environment = dict(one.split("=", 1) for one in pairs if one)
            said = plugin.answer(environment, stdin, held[0] if held else None, self._place)
            connection.sendall(b"%d%s" % (said.status, said.output))
