"""TCP sockets of network namespaces, seen from outside: how much unread memory each is charged for,
and how its bytes came: sock_diag(7).

Redirected bytes are not in a socket's receive queue, nor bounded by its SO_RCVBUF, but they are
charged to it, so SK_MEMINFO_RMEM_ALLOC has them. TCP does not count them as received.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mesh.lab.kernel import inside

# linux/sock_diag.h, linux/inet_diag.h, linux/netlink.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_DONE = 3
_INFO, _SKMEMINFO = 2, 7
_ESTABLISHED_OR_CLOSING = 0xFFF & ~(1 << 10 | 1 << 6)  # all but LISTEN and TIME_WAIT
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI48x")
# struct inet_diag_msg, of which the local port and the inode; two fields of struct tcp_info.
_MESSAGE = struct.Struct("=4x2s62xI")
_PORT = struct.Struct("!H")
_BYTES = struct.Struct("=120xQQ")
_ATTRIBUTE = struct.Struct("=HH")
_U32 = struct.Struct("=I")
# An answer is longer, a FIN shorter.
_SOMETHING = 16


class Seen(NamedTuple):
    """A socket: whose, its inode, its port, bytes of memory that it was not yet read of, and bytes
    that it sent and that it received by TCP."""

    where: str
    inode: int
    port: int
    queue: int
    sent: int
    received: int

    @property
    def redirected(self) -> bool:
        """It got bytes, for it holds some, or answered (of a server), and none came by TCP, where a
        FIN counts as one."""
        return self.received <= 1 and (self.queue > 0 or self.sent > _SOMETHING)


class Sockets:
    """Of network namespaces; opened in each once, asked any time from anywhere."""

    def __init__(self, namespaces: Mapping[str, str | Path]) -> None:
        """By the names that `look` tells."""
        self._diag: dict[str, socket.socket] = {}
        for name, netns in namespaces.items():
            with inside(netns):
                self._diag[name] = socket.socket(
                    socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG
                )

    def close(self) -> None:
        for one in self._diag.values():
            one.close()

    def look(self) -> Iterator[Seen]:
        """All connected ones as they are now."""
        for where, diag in self._diag.items():
            for family in (socket.AF_INET, socket.AF_INET6):
                yield from _dump(diag, family, where)


def _dump(diag: socket.socket, family: int, where: str) -> Iterator[Seen]:
    extensions = 1 << (_INFO - 1) | 1 << (_SKMEMINFO - 1)
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, extensions, _ESTABLISHED_OR_CLOSING)
    size = _HEADER.size + len(request)
    diag.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 0, 0) + request)
    done = False
    while not done:
        data = diag.recv(1 << 18)
        while data:
            length, kind, *_ = _HEADER.unpack_from(data)
            done = kind == _DONE
            if kind == _SOCK_DIAG_BY_FAMILY:
                yield _seen(where, data[_HEADER.size : length])
            data = data[(length + 3) & ~3 :]


def _seen(where: str, message: bytes) -> Seen:
    port, inode = _MESSAGE.unpack_from(message)
    attributes = message[_MESSAGE.size :]
    queue = sent = received = 0
    while attributes:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _SKMEMINFO:
            queue = _U32.unpack_from(attributes, _ATTRIBUTE.size)[0]
        elif kind == _INFO:
            sent, received = _BYTES.unpack_from(attributes, _ATTRIBUTE.size)
        attributes = attributes[(length + 3) & ~3 :]
    return Seen(where, inode, _PORT.unpack(port)[0], queue, sent, received)
