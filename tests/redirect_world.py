"""Sockets of workloads and of a proxy for tests of the redirect path: real programs on two cgroups,
and a process in a network namespace of its own that makes sockets in either."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from bpf_world import loader, new_cgroup, pin_directory

from bpf import maps
from bpf.balancer import Balancer
from bpf.podfilter import netns_cookie
from bpf.proxy import ProxyHandles, descriptors
from bpf.reasons import Reason
from bpf.selftest_probe import enter
from bpf.settings import Identities
from bpf.structs import Address, Addresses, Number
from mesh.model.nodeconfig import EntryBackend, LoadBalancerEntry, WorkloadSection
from mesh.model.section import entry_key, workload_key

# Documentation addresses (RFC 5737, RFC 3849), on the namespace's loopback interface.
NODE, NODE6 = "198.51.100.1", "2001:db8:1::1"
OTHER = "198.51.100.2"
VIP, VIP6, MAPPED = "192.0.2.1", "2001:db8::1", "::ffff:192.0.2.1"
TIMEOUT_S = 5
_SIOCSIFADDR = 0x8916
_FIONREAD = 0x541B


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def unread(sock: socket.socket) -> int:
    """What FIONREAD says."""
    return struct.unpack("i", fcntl.ioctl(sock, _FIONREAD, bytes(4)))[0]


def await_that(condition: Callable[[], object]) -> None:
    """Until it holds: the kernel needs a moment, and there is nothing to wait on."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


class World:
    """Pins, cgroups, and, in the forked process, the maps."""

    def __init__(self, pin: Path, workloads: Path, proxies: Path) -> None:
        self.pin = pin
        self.workloads = workloads
        self.proxies = proxies

    def run(self, scenario: Callable[[World], None]) -> None:
        """In a process of its own; what goes wrong there fails here."""
        sys.stdout.flush()
        with tempfile.TemporaryDirectory() as temporary:
            Path(temporary).chmod(0o711)  # workers have no rights
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    tempfile.tempdir = temporary
                    enter(self.workloads)
                    self._addresses()
                    self.balancer = Balancer(self.pin)
                    self.know(True)
                    scenario(self)
                    code = 0
                except BaseException:
                    traceback.print_exc(file=sys.__stderr__)
                finally:
                    os._exit(code)
            _, status = os.waitpid(pid, 0)
        assert status == 0, "the scenario failed; its traceback is on stderr"

    def _addresses(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            for number, text in enumerate((NODE, OTHER)):
                address = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))
                label = f"lo:{number}".encode()
                fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("16s16s8x", label, address))
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
            packed = socket.inet_pton(socket.AF_INET6, NODE6)
            fcntl.ioctl(control, _SIOCSIFADDR, struct.pack("=16sIi", packed, 128, 1))

    # --- in the process ---------------------------------------------------------------------------

    def know(self, sockmap: bool | None, *others: WorkloadSection, meshed: bool = True) -> None:
        """Whose the addresses are: a pod's that may be enrolled, or not; None: nobody's."""
        pod = WorkloadSection(
            "x", "pod", (NODE, NODE6), identity=300, sockmap=bool(sockmap), meshed=meshed
        )
        known = (*others, pod) if sockmap is not None else others
        with contextlib.closing(Identities(self.pin)) as identities:
            assert identities.replace({workload_key("x", one.name): one for one in known}) == {}

    def is_a_pods(self) -> None:
        """This network namespace is that of the pod with the addresses."""
        own = Addresses(Address.of(NODE).packed, Address.of(NODE6).packed)
        with contextlib.closing(
            maps.PinnedMap(self.pin, "namespaces", Number, Addresses)
        ) as namespaces:
            namespaces.put(Number(netns_cookie()), own)

    def handles(self) -> ProxyHandles:
        return ProxyHandles(descriptors(self.pin))

    def counted(self, reason: Reason) -> int:
        return maps.counters(self.pin)[reason]

    @contextlib.contextmanager
    def as_proxy(self) -> Iterator[None]:
        """Sockets made in here are the proxy's."""
        (self.proxies / "cgroup.procs").write_text("0")
        try:
            yield
        finally:
            (self.workloads / "cgroup.procs").write_text("0")

    def listen(self, address: str, port: int = 0) -> socket.socket:
        server = socket.create_server((address, port), family=family_of(address), backlog=64)
        server.settimeout(TIMEOUT_S)
        return server

    def frontend(self, address: str, port: int, *backends: EntryBackend, **flags: int) -> None:
        entry = LoadBalancerEntry(address, port, "TCP", backends, "Service/x/y", **flags)
        assert self.balancer.apply({entry_key(address, port, "TCP"): entry}) == {}

    def connect(self, address: str, port: int) -> socket.socket:
        made = socket.socket(family_of(address), socket.SOCK_STREAM)
        made.settimeout(TIMEOUT_S)
        made.connect((address, port))
        return made

    def accept(self, server: socket.socket) -> socket.socket:
        made, _ = server.accept()
        made.settimeout(TIMEOUT_S)
        return made


def received(sock: socket.socket, size: int) -> bytes:
    """Exactly so many bytes, or fewer at the end."""
    parts = []
    while size and (data := sock.recv(size)):
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


@contextlib.contextmanager
def redirect_world(parent: Path, *options: str) -> Iterator[World]:
    """`options`: of the loader."""
    with new_cgroup() as workloads, new_cgroup() as proxies, pin_directory(parent) as pin:
        done = loader("--pin", pin, "--cgroup", workloads, "--proxy-cgroup", proxies, *options)
        assert done.returncode == 0, done.stderr
        yield World(pin, workloads, proxies)
