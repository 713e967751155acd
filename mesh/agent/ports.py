"""Binding listening sockets, and saying precisely why one cannot be bound.

Knows sockets, routes and /proc, nothing of what listens.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from mesh.model.channel import PortAddress

BACKLOG = 4096
_TCP_LISTEN = "0A"  # /proc/net/tcp, column st


# Documentation addresses (RFC 5737, RFC 3849): nobody's, so only a default route leads there.
_ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


class BindError(Exception):
    """Why a port is not bound and what to do, in a line."""


def bind(port: PortAddress) -> socket.socket:
    """A listening socket. "::" takes IPv4 too (RFC 3493 §3.7), or only IPv4 where the host has no
    IPv6."""
    try:
        if port.address == "::":
            with contextlib.suppress(_NoIPv6):
                return _bind(socket.AF_INET6, port)
            return _bind(socket.AF_INET, PortAddress("0.0.0.0", port.port))
        return _bind(socket.AF_INET6 if ":" in port.address else socket.AF_INET, port)
    except (OSError, _NoIPv6) as error:
        raise BindError(_explain(error, port)) from None


def reached_at(bind_address: str) -> tuple[str, ...]:
    """The addresses at which others reach what listens on `bind_address`: itself, or for a wildcard
    those this host sends from when it speaks to others, or 127.0.0.1 where it speaks to nobody."""
    families = {"0.0.0.0": [socket.AF_INET], "::": [socket.AF_INET, socket.AF_INET6]}
    if bind_address not in families:
        return (bind_address,)
    found = (_source(family) for family in families[bind_address])
    return tuple(filter(None, found)) or ("127.0.0.1",)


def is_here(address: str) -> bool:
    """Whether something can listen on an address of this host."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


def _source(family: socket.AddressFamily) -> str | None:
    # Connecting a datagram socket asks for a route and sends nothing.
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect((_ELSEWHERE[family], 9))
        return str(sock.getsockname()[0])
    return None


class _NoIPv6(Exception):
    pass


def _bind(family: socket.AddressFamily, port: PortAddress) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno == errno.EAFNOSUPPORT:
            raise _NoIPv6 from None
        raise
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(port.address != "::"))
        sock.bind((port.address, port.port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRNOTAVAIL and port.address == "::":
            raise _NoIPv6 from None
        raise
    sock.setblocking(False)
    return sock


def _explain(error: Exception, port: PortAddress) -> str:
    if isinstance(error, _NoIPv6):
        return f"this host has no IPv6: give the Gateway an IPv4 address instead of {port.address}"
    number = error.errno if isinstance(error, OSError) else None
    match number:
        case errno.EADDRINUSE:
            who = holder(port.port) or "another process"
            return f"port {port.port} is in use by {who}: stop it, or choose another port"
        case errno.EACCES:
            return (
                f"no permission for port {port.port}: run as root, or grant CAP_NET_BIND_SERVICE, "
                f"or sysctl net.ipv4.ip_unprivileged_port_start={port.port}"
            )
        case errno.EADDRNOTAVAIL:
            return (
                f"{port.address} is not an address of this host: add it (ip address add "
                f"{port.address} dev lo), or choose another address or --address-pool"
            )
    why = error.strerror if isinstance(error, OSError) else error
    return f"{why}: choose another address or port"


def holder(port: int) -> str | None:
    """Who listens on a TCP port, as "name (pid N)"; None where /proc does not tell."""
    inodes = _listening_inodes(port)
    holders: dict[int, str] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for fd in os.scandir(process / "fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(fd.path) in inodes:
                        holders[int(process.name)] = (process / "comm").read_text().strip()
    if os.getpid() in holders:
        return "this gateway itself, for another address"
    return ", ".join(f"{name} (pid {pid})" for pid, name in sorted(holders.items())[:3]) or None


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _TCP_LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{columns[9]}]")
    return inodes
