"""What a proxy asks of the data path about its own sockets: who is at the far end, and how much
that end has not read yet.

Works with descriptors it is given (`HANDLES`), without rights of its own. A proxy's socket toward a
workload of this node is in one of two states, fixed when the connection is established: plain, or
enrolled, and then what the proxy sends reaches the workload by redirect and never by TCP.
Knows nothing of HTTP.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Container, Mapping
from pathlib import Path
from typing import NamedTuple

from bpf import constants, layout, passed, pins, syscall
from bpf.attach import open_program
from bpf.errors import DatapathError
from bpf.maps import open_pinned
from bpf.structs import (
    Exchange,
    Number,
    Pair,
    Paired,
    Passed,
    PassedKey,
    Proxied,
    Target,
    Way,
)

# Names of maps and of the program, as pinned.
HANDLES = ("proxied", "accepted", "plain", "queue")
# Of this version only.
PAIR_HANDLES = ("pairs", "paired", "exchanges", "holders", "passed")
_PROGRAMS = frozenset(("queue", "holders"))

# The frame that the program `queue` is run with: a cookie and padding; at least an Ethernet header.
_U32 = 0xFFFFFFFF
_FRAME = struct.Struct("=Q56x")


def descriptors(directory: Path) -> dict[str, int]:
    """New descriptors of what is pinned, by VERSION/NAME (HANDLES): of this version of Weft first,
    then of others, whose programs may still be attached and whose sockets still live. One that is
    not whole, or whose maps have entries of other sizes, is left out. OSError."""
    found: dict[str, int] = {}
    for version in (pins.version(), *pins.other_versions(directory)):
        own: dict[str, int] = {}
        try:
            names = HANDLES + PAIR_HANDLES if version == pins.version() else HANDLES
            for name in names:
                opened = open_program if name in _PROGRAMS else open_pinned
                own[f"{version}/{name}"] = opened(directory, name, version)
        except DatapathError:
            for fd in own.values():
                os.close(fd)
        else:
            found |= own
    return found


class Origin(NamedTuple):
    """Of an accepted connection: the target the workload asked for, the backend that the kernel
    has chosen (a relay's, or a client's with session affinity; None where the proxy chooses), the
    workload's socket cookie and its network namespace's, and whether it is enrolled."""

    asked: Target
    backend: Target | None
    cookie: int
    netns: int
    enrolled: bool


class _Version(NamedTuple):
    """Descriptors, as HANDLES."""

    proxied: int
    accepted: int
    plain: int
    queue: int


class _PairMaps(NamedTuple):
    """Descriptors, as PAIR_HANDLES."""

    pairs: int
    paired: int
    exchanges: int
    holders: int
    passed: int


class Offer(NamedTuple):
    """Pairs of a client's socket, by its cookie: requests that the table of `generation` lets
    pass, and its lists `egress` and `ingress` too (0: none is asked), go straight to a backend,
    by one of `ways` (PAIR_WAYS at most) that is for the rule they come to, until `until` have
    been forwarded for the client, or CLOCK_MONOTONIC is at `expires_ns`, or proxies have another
    configuration than that of `made_ns`. `client_received`, and `backends_received` for each way:
    how many bytes the proxy has received since the connection was established, and is done
    with (modulo 2^32); `handed`: likewise responses."""

    client: int
    generation: int
    egress: int
    ingress: int
    ways: tuple[Way, ...]
    client_received: int
    backends_received: tuple[int, ...]
    handed: int
    until: int
    expires_ns: int
    made_ns: int


class ProxyHandles:
    """The descriptors are the instance's from now on. Each socket is one version's, that whose
    programs were attached when it was connected."""

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        """As `bpf.proxy.descriptors` gives them. KeyError: one of HANDLES is missing."""
        versions = dict.fromkeys(key.partition("/")[0] for key in descriptors)
        self._versions = [
            _Version(*(descriptors[f"{version}/{name}"] for name in HANDLES))
            for version in versions
        ]
        own = [descriptors.get(f"{pins.version()}/{name}") for name in PAIR_HANDLES]
        found = [fd for fd in own if fd is not None]
        self._pairs = _PairMaps(*found) if len(found) == len(own) else None

    def origin(self, fd: int) -> Origin | None:
        """What is known of a connection that the proxy accepted; None: no workload steered here
        opened it."""
        _, found = self._look(fd)
        if found is None or not found.cookie:
            return None
        asked, backend = (
            layout.TARGET.unpack(Target, data) for data in (found.asked, found.backend)
        )
        return Origin(
            asked,
            backend if backend.port else None,
            found.cookie,
            found.netns,
            found.state == constants.STATE_ENROLLED,
        )

    def pair(self, fd: int) -> int | None:
        """Of a connection that the proxy opened: the far socket's cookie once it may send there by
        redirect; 0: it sends by TCP; None: ask again, and send nothing until then."""
        version, found = self._look(fd)
        if version is None or found is None or found.state != constants.STATE_ENROLLED:
            return 0
        if found.peer:
            return found.peer
        key = layout.U64.pack(Number(found.cookie))
        data = syscall.lookup(version.accepted, key, layout.U64.size)
        if data is None:
            return None
        peer = layout.U64.unpack(Number, data).value
        value = layout.PROXIED.pack(found._replace(peer=peer))
        syscall.update(version.proxied, layout.U32.pack(Number(fd)), value)
        return peer

    def queued(self, cookie: int) -> int:
        """Bytes of memory that a workload's socket holds unread; 0 once it is gone."""
        frame = _FRAME.pack(cookie)
        return max([0, *(syscall.run(version.queue, frame) for version in self._versions)])

    def mark_plain(self, backend: Target) -> None:
        """Connections to this backend are not enrolled for PLAIN_S seconds: it did not show its
        socket in time (TCP_DEFER_ACCEPT)."""
        now = layout.U64.pack(Number(time.monotonic_ns()))
        for version in self._versions:
            syscall.update(version.plain, layout.TARGET.pack(backend), now)

    # Pairs are of sockets of this version: those of others do not find them.

    def prepare(self, offer: Offer) -> bool:
        """Everything but the client's end, from which on requests pass. False: there is no room."""
        maps = self._pairs
        if maps is None:
            return False
        client = layout.U64.pack(Number(offer.client))
        nothing = bytes(layout.EXCHANGE.size)
        try:
            if not self._put(maps.exchanges, client, nothing, syscall.BPF_NOEXIST):
                return False
        except FileExistsError:
            pass  # of an offer before
        return all(
            self._put(
                maps.paired,
                layout.U64.pack(Number(way.backend)),
                layout.PAIRED.pack(Paired(offer.client, received & _U32, 0)),
            )
            for way, received in zip(offer.ways, offer.backends_received, strict=True)
        )

    def offer(self, offer: Offer) -> bool:
        """From now on what the offer says passes by the proxy. False: there is no room."""
        maps = self._pairs
        assert maps is not None
        number = time.monotonic_ns()
        pair = Pair(
            number,
            offer.client,
            offer.generation,
            offer.egress,
            offer.ingress,
            offer.client_received & _U32,
            offer.handed & _U32,
            offer.until & _U32,
            offer.expires_ns,
            offer.made_ns,
            b"".join(map(layout.WAY.pack, offer.ways)),
            number,
        )
        client = layout.U64.pack(Number(offer.client))
        return self._put(maps.pairs, client, layout.PAIR.pack(pair))

    def _put(self, fd: int, key: bytes, value: bytes, flags: int = syscall.BPF_ANY) -> bool:
        try:
            syscall.update(fd, key, value, flags)
        except OSError as error:
            if error.errno not in (errno.E2BIG, errno.ENOSPC, errno.ENOMEM):
                raise
            return False
        return True

    def withdraw(self, client: int) -> None:
        """No request passes any more; one that is outstanding stays so."""
        if self._pairs is not None:
            syscall.delete(self._pairs.pairs, layout.U64.pack(Number(client)))

    def answered(self, backend: int) -> int:
        """Responses of this socket that have passed since the offer."""
        if self._pairs is None:
            return 0
        key = layout.U64.pack(Number(backend))
        data = syscall.lookup(self._pairs.paired, key, layout.PAIRED.size)
        return 0 if data is None else layout.PAIRED.unpack(Paired, data).answered

    def forget(self, backend: int) -> int:
        """Responses do not pass any more either; how many have since the offer."""
        if self._pairs is None:
            return 0
        key = layout.U64.pack(Number(backend))
        data = syscall.take(self._pairs.paired, key, layout.PAIRED.size)
        return 0 if data is None else layout.PAIRED.unpack(Paired, data).answered

    @staticmethod
    def settle() -> None:
        """Blocks until all programs have ended that may have seen an offer that was withdrawn."""
        syscall.wait_for_programs()

    def delivered(self, client: int) -> bool:
        """No message is on its way into this socket's queue that has already been counted. May be
        wrong if it says no; for as long as something else holds the socket."""
        return self._pairs is None or syscall.run(self._pairs.holders, _FRAME.pack(client)) <= 0

    def passed(self, client: int) -> Exchange | None:
        """What has passed by the proxy, for a client's socket; None: nothing is known."""
        if self._pairs is None:
            return None
        key = layout.U64.pack(Number(client))
        data = syscall.lookup(self._pairs.exchanges, key, layout.EXCHANGE.size)
        return None if data is None else layout.EXCHANGE.unpack(Exchange, data)

    def counted(self, series: Container[int]) -> list[PassedKey]:
        """What has passed is counted under, of these series. Reads all there is."""
        return passed.keys(self._pairs.passed, series) if self._pairs is not None else []

    def take_counted(self, key: PassedKey) -> Passed | None:
        """What is counted there, and it is not any more."""
        return passed.take(self._pairs.passed, key) if self._pairs is not None else None

    def _look(self, fd: int) -> tuple[_Version, Proxied] | tuple[None, None]:
        key = layout.U32.pack(Number(fd))
        for version in self._versions:
            data = syscall.lookup(version.proxied, key, layout.PROXIED.size)
            if data is not None:
                return version, layout.PROXIED.unpack(Proxied, data)
        return None, None
