"""The self-test's process in the steered cgroup: serves on loopback and connects to frontends.

`python -m bpf.selftest_probe CGROUP PROXY_CGROUP PINS` joins the cgroup, enters a network namespace
of its own, and answers each line it reads ("serve", "steered", "redirected", "detached") with a
line of JSON. Nothing routes to the frontends there, so what is not steered fails at once. It ends
with its input.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

# By IP version; TEST-NET-1 (RFC 5737) and the documentation prefix (RFC 3849).
FRONTENDS = {"4": "192.0.2.1", "6": "2001:db8::1"}
LOOPBACK = {"4": "127.0.0.1", "6": "::1"}
PORT = 80
REFUSED_PORT = 81

_MAPPED = "::ffff:" + FRONTENDS["4"]
_GREETING = b"weft"
TIMEOUT_S = 2.0
_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_IFREQ = "16sh14x"


def enter(cgroup: Path) -> None:
    """Joins the cgroup, then a new network namespace whose loopback interface is up."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "a new network namespace")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        found = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack(_IFREQ, b"lo", 0))
        flags = struct.unpack(_IFREQ, found)[1] | _IFF_UP
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack(_IFREQ, b"lo", flags))


def serve() -> dict[str, int]:
    """Starts a server for each protocol and version that the kernel has; their ports."""
    ports: dict[str, int] = {}
    for version, address in LOOPBACK.items():
        try:
            stream = socket.create_server((address, 0), family=family_of(address))
            datagrams = socket.socket(family_of(address), socket.SOCK_DGRAM)
            datagrams.bind((address, 0))
        except OSError:
            continue  # a kernel without IPv6: its checks fail and say so
        for name, server, loop in (("TCP", stream, _greet), ("UDP", datagrams, _answer)):
            ports[name + version] = server.getsockname()[1]
            threading.Thread(target=loop, args=(server,), daemon=True).start()
    return ports


def steered() -> dict[str, str]:
    """Checks with the frontends in force: why each fact does not hold, "" if it does."""
    checks: dict[str, Callable[[], str]] = {
        "connect4": lambda: _greeted(FRONTENDS["4"]),
        "connect6": lambda: _greeted(FRONTENDS["6"]),
        "mapped": lambda: _greeted(_MAPPED),
        "getpeername4": lambda: _peer(FRONTENDS["4"]),
        "getpeername6": lambda: _peer(FRONTENDS["6"]) or _peer(_MAPPED),
        "udp4": lambda: _answered(FRONTENDS["4"]),
        "udp6": lambda: _answered(FRONTENDS["6"]) or _answered(_MAPPED),
        "refusal": lambda: "; ".join(filter(None, map(_refused, (*FRONTENDS.values(), _MAPPED)))),
    }
    return {name: _tried(check) for name, check in checks.items()}


def detached() -> dict[str, str]:
    """Checks after the pins are gone. The kernel detaches a moment later (bpf_link_put leaves it to
    a work queue)."""
    deadline = time.monotonic() + TIMEOUT_S
    while (why := _still_steered()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return {"detach": why}


def _still_steered() -> str:
    try:
        connected(FRONTENDS["4"]).close()
    except OSError as error:
        if error.errno == errno.ENETUNREACH:
            return ""
        return f"connecting fails with {error}, where ENETUNREACH was expected"
    return "a connection is still sent elsewhere"


def _tried(check: Callable[[], str]) -> str:
    try:
        return check()
    except OSError as error:
        return f"{error.strerror or error}: the programs have no effect on this kernel"


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def connected(address: str, port: int = PORT) -> socket.socket:
    made = socket.socket(family_of(address), socket.SOCK_STREAM)
    made.settimeout(TIMEOUT_S)
    try:
        made.connect((address, port))
    except OSError:
        made.close()
        raise
    return made


def _greeted(address: str) -> str:
    with connected(address) as connection:
        found = connection.recv(len(_GREETING), socket.MSG_WAITALL)
    return "" if found == _GREETING else f"connected to {address}, but not to the backend"


def _peer(address: str) -> str:
    with connected(address) as connection:
        host, port = connection.getpeername()[:2]
    found = "" if (host, port) == (address, PORT) else f"{host} port {port}"
    return found and f"getpeername says {found} where {address} port {PORT} was asked for"


def _answered(address: str) -> str:
    with socket.socket(family_of(address), socket.SOCK_DGRAM) as client:
        client.settimeout(TIMEOUT_S)
        client.sendto(b"?", (address, PORT))
        data, sender = client.recvfrom(64)
    if data != _GREETING or sender[:2] != (address, PORT):
        return f"what was sent to {address} port {PORT} was answered from {sender[0]} {sender[1]}"
    return ""


def _refused(address: str) -> str:
    try:
        connected(address, REFUSED_PORT).close()
    except ConnectionRefusedError:
        return ""
    except OSError as error:
        return f"refusing {address} gives {error} in place of ECONNREFUSED"
    return f"{address} without backends is not refused"


def _greet(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            connection.sendall(_GREETING)


def _answer(server: socket.socket) -> None:
    while True:
        _, sender = server.recvfrom(64)
        server.sendto(_GREETING, sender)


def main() -> int:
    cgroup, proxy_cgroup, pin = map(Path, sys.argv[1:4])
    enter(cgroup)
    # They take what is here.
    from bpf import selftest_filter, selftest_pairs, selftest_redirect

    def redirected() -> dict[str, str]:
        world = selftest_redirect.World(cgroup, proxy_cgroup, pin)
        checks = selftest_redirect.checks(world)
        checks["pairs"] = lambda: selftest_pairs.check(world)
        checks |= selftest_filter.checks(pin)
        return {name: _tried(check) for name, check in checks.items()}

    commands: dict[str, Callable[[], dict[str, int] | dict[str, str]]] = {
        "serve": serve,
        "steered": steered,
        "redirected": redirected,
        "detached": detached,
    }
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
