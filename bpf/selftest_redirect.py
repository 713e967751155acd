"""The self-test's checks of what lies between proxy and workloads, for bpf.selftest_probe.

One process plays both: a socket belongs to the cgroup in which it was made. Each check says why its
fact does not hold, "" if it does, or raises the OSError that it met.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bpf import maps, pins, settings, syscall
from bpf.attach import open_program
from bpf.balancer import Balancer
from bpf.proxy import Origin, ProxyHandles, descriptors
from bpf.reasons import Reason
from bpf.selftest_probe import TIMEOUT_S, connected, family_of
from bpf.structs import Target
from mesh.model.nodeconfig import (
    MESH_HTTP_PORT,
    MESH_RELAY_PORT,
    EntryBackend,
    LoadBalancerEntry,
    WorkloadSection,
)
from mesh.model.section import entry_key, workload_key

# The node, on the loopback interface: TEST-NET-2 (RFC 5737), documentation prefix (RFC 3849).
NODE = {"4": "198.51.100.1", "6": "2001:db8:1::1"}
_SERVICE = {"4": "192.0.2.2", "6": "2001:db8::2"}
_HTTP, _TCP = 80, 5432
_MANY = bytes(range(251)) * 4000
_SIOCSIFADDR, _FIONREAD = 0x8916, 0x541B
_TCX_INGRESS, _TCX_EGRESS = 46, 47
_LOOPBACK_INDEX = 1
_NOBODY = 65534


class Taken(NamedTuple):
    """Both ends of a connection, and what the proxy knows of it."""

    workload: socket.socket
    proxy: socket.socket
    origin: Origin

    def close(self) -> None:
        self.workload.close()
        self.proxy.close()


class World:
    """The sockets' world: two cgroups, one network namespace, the real maps."""

    def __init__(self, cgroup: Path, proxy_cgroup: Path, pin: Path) -> None:
        self._cgroup, self._proxy_cgroup, self.pin = cgroup, proxy_cgroup, pin
        _add_addresses()
        self.handles = ProxyHandles(descriptors(pin))
        self._entries = Balancer(pin)
        workload = WorkloadSection("self-test", "workload", tuple(NODE.values()), identity=256)
        known = {workload_key(workload.namespace, workload.name): workload}
        for why in settings.Identities(pin).apply(known).values():
            raise OSError(0, why)
        self._servers: dict[tuple[str, int], socket.socket] = {}
        for version, address in NODE.items():
            self.frontend(_SERVICE[version], _HTTP, http=True, sockmap=True)
            with self.as_proxy():
                self._servers[version, _HTTP] = server(address, MESH_HTTP_PORT)
        self.frontend(_SERVICE["4"], _TCP, EntryBackend("198.51.100.77", _TCP, remote=True))
        with self.as_proxy():
            self._servers["4", _TCP] = server(NODE["4"], MESH_RELAY_PORT)
        ports = [(one, port) for one in NODE.values() for port in (MESH_HTTP_PORT, MESH_RELAY_PORT)]
        settings.steer_to_proxy(pin, ports, sockmap=True)

    @contextlib.contextmanager
    def as_proxy(self) -> Iterator[None]:
        (self._proxy_cgroup / "cgroup.procs").write_text("0")
        try:
            yield
        finally:
            (self._cgroup / "cgroup.procs").write_text("0")

    def frontend(self, address: str, port: int, *backends: EntryBackend, **flags: bool) -> None:
        entry = LoadBalancerEntry(address, port, "TCP", backends, "self-test", **flags)
        for why in self._entries.apply({entry_key(address, port, "TCP"): entry}).values():
            raise OSError(0, why)

    def taken(self, version: str, port: int = _HTTP) -> Taken:
        """A workload's connection, accepted by the proxy."""
        workload = connected(_SERVICE[version], port)
        proxy, _ = self._servers[version, port].accept()
        proxy.settimeout(TIMEOUT_S)
        origin = self.handles.origin(proxy.fileno())
        if origin is None:
            raise OSError(0, "nothing is known of a connection that was steered to the proxy")
        return Taken(workload, proxy, origin)


def checks(world: World) -> dict[str, Callable[[], str]]:
    """By fact, in order."""
    return {
        "relay": lambda: _relay(world),
        "redirect4": lambda: _redirect(world, "4"),
        "redirect6": lambda: _redirect(world, "6"),
        "fionread": lambda: _fionread(world),
        "queue": lambda: _queue(world),
        "half_close": lambda: _half_close(world),
        "backend": lambda: _backend(world),
        "deferred": lambda: _deferred(world),
        "miss": lambda: _miss(world),
        "filter": lambda: _filter(world),
        "events": lambda: _events(world),
    }


def _relay(world: World) -> str:
    with contextlib.closing(world.taken("4", _TCP)) as pair:
        os.seteuid(_NOBODY)
        try:
            origin = world.handles.origin(pair.proxy.fileno())
        finally:
            os.seteuid(0)
        if origin is None or origin.asked != Target.of(_SERVICE["4"], _TCP, "TCP"):
            return f"asked for {_SERVICE['4']} port {_TCP}, and the proxy was told {origin}"
        return "" if origin.backend else "the proxy was not told which backend was chosen"


def _redirect(world: World, version: str) -> str:
    with contextlib.closing(world.taken(version)) as pair:
        if not pair.origin.enrolled:
            return "the sockets were not enrolled"
        before = maps.counters(world.pin)[Reason.REDIRECTED]
        pair.proxy.sendall(_MANY)
        if received(pair.workload, len(_MANY)) != _MANY:
            return "other bytes arrived than were sent"
        if maps.counters(world.pin)[Reason.REDIRECTED] == before:
            return "the bytes came by TCP"
        pair.workload.sendall(_MANY[:1000])
        return "" if received(pair.proxy, 1000) == _MANY[:1000] else "and other bytes came back"


def _fionread(world: World) -> str:
    with contextlib.closing(world.taken("4")) as pair:
        pair.proxy.sendall(b"weft")
        select.select([pair.workload], [], [], TIMEOUT_S)
        found = unread(pair.workload)
        return "" if found == 4 else f"4 bytes wait, and FIONREAD says {found}"


def _queue(world: World) -> str:
    with contextlib.closing(world.taken("4")) as pair:
        before = world.handles.queued(pair.origin.cookie)
        pair.proxy.sendall(_MANY)
        full = world.handles.queued(pair.origin.cookie)
        received(pair.workload, len(_MANY))
        after = world.handles.queued(pair.origin.cookie)
        if before or after or full < len(_MANY):
            return f"{len(_MANY)} bytes waited, and {before}, {full}, {after} were counted"
        return ""


def _half_close(world: World) -> str:
    with contextlib.closing(world.taken("4")) as pair:
        pair.proxy.sendall(b"weft")
        pair.proxy.shutdown(socket.SHUT_WR)
        found = received(pair.workload, 5)
        return "" if found == b"weft" else f"{len(found)} of 4 bytes came before the end"


def _backend(world: World) -> str:
    with server(NODE["4"]) as backend:
        port = backend.getsockname()[1]
        world.frontend(NODE["4"], port, EntryBackend(NODE["4"], port, sockmap=True))
        with world.as_proxy():
            proxy = connected(NODE["4"], port)
        with proxy:
            taken, _ = backend.accept()
            with taken:
                taken.settimeout(TIMEOUT_S)
                cookie = world.handles.pair(proxy.fileno())
                if not cookie:
                    return "the backend's socket was not enrolled"
                proxy.sendall(b"weft")
                select.select([taken], [], [], TIMEOUT_S)
                if unread(taken) != 4 or not world.handles.queued(cookie):
                    return "what was sent to it did not come by redirect"
                return "" if received(taken, 4) == b"weft" else "other bytes arrived"


def _deferred(world: World) -> str:
    with server(NODE["4"]) as backend:
        backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        port = backend.getsockname()[1]
        target = Target.of(NODE["4"], port, "TCP")
        world.frontend(NODE["4"], port, EntryBackend(NODE["4"], port, sockmap=True))
        with world.as_proxy():
            with connected(NODE["4"], port) as proxy:
                if world.handles.pair(proxy.fileno()) is not None:
                    return "its socket counts as there although it is not"
            world.handles.mark_plain(target)
            with connected(NODE["4"], port) as proxy:
                found = world.handles.pair(proxy.fileno())
        return "" if found == 0 else "a connection to it is enrolled although it was ruled out"


def _miss(world: World) -> str:
    with contextlib.closing(world.taken("4")) as pair:
        pair.workload.close()
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while time.monotonic() < deadline:
                pair.proxy.sendall(b"weft")
        except OSError:
            return ""
        return "what is sent to a socket that is gone is not refused"


def _filter(world: World) -> str:
    """On the loopback interface of the namespace, with a program that does nothing to a packet."""
    program = open_program(world.pin, "queue")
    try:
        for attach_type in (_TCX_INGRESS, _TCX_EGRESS):
            os.close(syscall.link(program, _LOOPBACK_INDEX, attach_type))
    except OSError as error:
        return f"{error.strerror}: it takes a kernel with tcx (6.6)"
    finally:
        os.close(program)
    return ""


def _events(world: World) -> str:
    fd = syscall.pinned(str(pins.map_path(world.pin, "events")))
    try:
        with server(NODE["4"]) as listening:
            connected(*listening.getsockname()).close()
        ready = select.poll()
        ready.register(fd, select.POLLIN)
        return "" if ready.poll(TIMEOUT_S * 1000) else "a connection was opened, and none came"
    finally:
        os.close(fd)


# --- sockets --------------------------------------------------------------------------------------


def _add_addresses() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        address = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(NODE["4"]))
        fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("16s16s8x", b"lo:0", address))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
        packed = socket.inet_pton(socket.AF_INET6, NODE["6"])
        fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("=16sIi", packed, 128, _LOOPBACK_INDEX))
        # Tentative until a work queue has seen that loopback needs no detection of duplicates.
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                control.bind((NODE["6"], 0))
                return
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL or time.monotonic() > deadline:
                    raise
                time.sleep(0.001)


def server(address: str, port: int = 0) -> socket.socket:
    made = socket.create_server((address, port), family=family_of(address))
    made.settimeout(TIMEOUT_S)
    return made


def received(sock: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer at the end."""
    found = bytearray()
    while len(found) < size and (data := sock.recv(size - len(found))):
        found += data
    return bytes(found)


def unread(sock: socket.socket) -> int:
    (found,) = struct.unpack("i", fcntl.ioctl(sock, _FIONREAD, bytes(4)))
    return int(found)
