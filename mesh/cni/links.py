"""The two ends of a veth pair and its addresses, by rtnetlink(7).

Asked through a socket of the network namespace that one end is in, which need not be this process's
own: no right is needed for that. Knows nothing of pods.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from ipaddress import ip_address
from typing import NamedTuple

_RTM_NEWLINK, _RTM_GETLINK, _NLMSG_ERROR, _NLMSG_DONE = 16, 18, 2, 3
_RTM_NEWADDR, _RTM_GETADDR = 20, 22
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFLA_IFNAME, _IFLA_LINK, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 5, 18, 1
_IFADDR = struct.Struct("=BBBBI")
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
    wanted = _attribute(_IFLA_IFNAME, name.encode() + b"\0")
    _ask(netlink, _RTM_GETLINK, _NLM_F_REQUEST, _INFO.pack(0, 0, 0, 0, 0) + wanted)
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


def addresses(netlink: socket.socket, number: int) -> set[str]:
    """Of the interface with this index, in the namespace of the socket. OSError."""
    _ask(netlink, _RTM_GETADDR, _NLM_F_REQUEST | _NLM_F_DUMP, _IFADDR.pack(0, 0, 0, 0, 0))
    found: set[str] = set()
    while True:
        answer = netlink.recv(1 << 16)
        while answer:
            size, kind, *_ = _HEADER.unpack_from(answer)
            if kind != _RTM_NEWADDR:
                if kind == _NLMSG_DONE:
                    return found
                raise OSError(0, f"netlink answers with message {kind}")
            *_, index = _IFADDR.unpack_from(answer, _HEADER.size)
            about = dict(_attributes(answer[_HEADER.size + _IFADDR.size : size]))
            if index == number:
                # On links of two ends _IFA_ADDRESS is the other one's.
                found.add(str(ip_address(about.get(_IFA_LOCAL) or about[_IFA_ADDRESS])))
            answer = answer[size + -size % 4 :]


def _ask(netlink: socket.socket, what: int, flags: int, body: bytes) -> None:
    netlink.settimeout(_WAIT_S)
    netlink.send(_HEADER.pack(_HEADER.size + len(body), what, flags, 1, 0) + body)


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
