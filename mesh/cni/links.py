"""The two ends of a veth pair, by rtnetlink(7).

Asked through a socket of the network namespace that one end is in, which need not be this process's
own: no right is needed for that. Knows nothing of pods.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

_RTM_NEWLINK, _RTM_GETLINK, _NLMSG_ERROR = 16, 18, 2
_NLM_F_REQUEST = 1
_IFLA_IFNAME, _IFLA_LINK, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 5, 18, 1
_HEADER, _INFO, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BxHiII"), struct.Struct("=HH")
_WAIT_S = 5.0


class Link(NamedTuple):
    """`number` is its index; `peer` that of the other end in its own namespace, 0: there is none;
    `kind` is the kernel's word, such as "veth"."""

    number: int
    peer: int
    kind: str


def find(netlink: socket.socket, name: str) -> Link:
    """The interface of that name, in the namespace of the socket. OSError: there is none."""
    netlink.settimeout(_WAIT_S)
    wanted = _attribute(_IFLA_IFNAME, name.encode() + b"\0")
    body = _INFO.pack(0, 0, 0, 0, 0) + wanted
    head = _HEADER.pack(_HEADER.size + len(body), _RTM_GETLINK, _NLM_F_REQUEST, 1, 0)
    netlink.send(head + body)
    answer = netlink.recv(1 << 16)
    _, kind, *_ = _HEADER.unpack_from(answer)
    if kind == _NLMSG_ERROR:
        (number,) = struct.unpack_from("=i", answer, _HEADER.size)
        raise OSError(-number, f"no interface {name}")
    if kind != _RTM_NEWLINK:
        raise OSError(0, f"netlink answers with message {kind}")
    index = _INFO.unpack_from(answer, _HEADER.size)[2]
    found = dict(_attributes(answer[_HEADER.size + _INFO.size :]))
    about = dict(_attributes(found.get(_IFLA_LINKINFO, b"")))
    (peer,) = struct.unpack("=I", found.get(_IFLA_LINK, bytes(4)))
    return Link(index, peer, about.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode())


def _attribute(kind: int, value: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(data)
        if size < _ATTRIBUTE.size:
            return
        yield kind & 0x3FFF, data[_ATTRIBUTE.size : size]
        data = data[size + -size % 4 :]
