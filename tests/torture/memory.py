"""How much unread memory the TCP sockets of network namespaces are charged for: sock_diag(7).

Redirected bytes are not in a socket's receive queue, nor bounded by its SO_RCVBUF, but they are
charged to it, so SK_MEMINFO_RMEM_ALLOC has them.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from mesh.lab.kernel import inside

# linux/sock_diag.h, linux/inet_diag.h, linux/netlink.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_DONE = 3
_SKMEMINFO = 7
_ESTABLISHED_OR_CLOSING = 0xFFF & ~(1 << 10 | 1 << 6)  # all but LISTEN and TIME_WAIT
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBxI48x")
_MESSAGE = 72
_ATTRIBUTE = struct.Struct("=HH")
_U32 = struct.Struct("=I")


class Queues:
    """Opened in each namespace once; asked any time from anywhere."""

    def __init__(self, namespaces: dict[str, str | Path]) -> None:
        """By the names that `longest` tells."""
        self._sockets: dict[str, socket.socket] = {}
        for name, netns in namespaces.items():
            with inside(netns):
                self._sockets[name] = socket.socket(
                    socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG
                )

    def close(self) -> None:
        for one in self._sockets.values():
            one.close()

    def longest(self) -> tuple[int, str]:
        """Bytes of the longest receive queue that there is now, and whose it is."""
        return max(
            ((queue, name) for name, one in self._sockets.items() for queue in _queues(one)),
            default=(0, ""),
        )


def _queues(netlink: socket.socket) -> Iterator[int]:
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _REQUEST.pack(
            family, socket.IPPROTO_TCP, 1 << (_SKMEMINFO - 1), _ESTABLISHED_OR_CLOSING
        )
        size = _HEADER.size + len(request)
        netlink.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 0, 0) + request)
        done = False
        while not done:
            data = netlink.recv(1 << 18)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                done = kind == _DONE
                if kind == _SOCK_DIAG_BY_FAMILY:
                    yield from _receive_memory(data[_HEADER.size + _MESSAGE : length])
                data = data[(length + 3) & ~3 :]


def _receive_memory(attributes: bytes) -> Iterator[int]:
    while attributes:
        length, kind = _ATTRIBUTE.unpack_from(attributes)
        if kind == _SKMEMINFO:
            yield _U32.unpack_from(attributes, _ATTRIBUTE.size)[0]
        attributes = attributes[(length + 3) & ~3 :]
