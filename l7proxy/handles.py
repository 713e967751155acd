"""What the proxy asks the kernel about its own sockets toward workloads, as text and numbers.

`Handles` is what `bpf.proxy.ProxyHandles` does; `Kernel` holds the ones in force, which come after
the worker has started and are replaced when the agent pins new programs. Knows no bpf.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
from collections.abc import Callable, Container
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, Protocol

from bpf.structs import Target

if TYPE_CHECKING:
    from bpf.proxy import Offer, Origin
    from bpf.structs import Exchange, Passed, PassedKey


_log = logging.getLogger("weft.handles")


class Handles(Protocol):
    """See `bpf.proxy.ProxyHandles`. OSError of any of them: the kernel refused to answer."""

    def origin(self, fd: int) -> Origin | None:
        """What is known of an accepted connection; None: no workload was steered here."""

    def pair(self, fd: int) -> int | None:
        """The far socket's cookie once the proxy may send by redirect; 0: by TCP; None: not yet
        known, and nothing may be sent."""

    def queued(self, cookie: int) -> int:
        """Bytes of memory that a workload's socket holds unread; 0 once it is gone."""

    def mark_plain(self, backend: Target) -> None:
        """Connections to it are not enrolled from now on."""

    def prepare(self, offer: Offer) -> bool:
        """All of an offer but what makes it stand. False: there is no room."""

    def offer(self, offer: Offer) -> bool:
        """From now on requests pass by the proxy. False: there is no room."""

    def withdraw(self, client: int) -> None:
        """No request of this socket passes any more."""

    def answered(self, backend: int) -> int:
        """Requests that this socket has answered past the proxy since it was offered."""

    def forget(self, backend: int) -> int:
        """No response of this socket passes any more."""

    def settle(self) -> None:
        """Blocks until nothing is done any more by offers that were withdrawn."""

    def delivered(self, client: int) -> bool:
        """All that was counted as passed is in this socket's queue; may say no although it is."""

    def passed(self, client: int) -> Exchange | None:
        """What has passed by the proxy; None: nothing is known."""

    def counted(self, series: Container[int]) -> list[PassedKey]:
        """What has passed is counted under, of these series. Takes long; in any thread."""

    def take_counted(self, key: PassedKey) -> Passed | None:
        """What is counted there, which then it is not any more."""


class Destination(NamedTuple):
    """An address as text, IPv4-mapped ones as IPv4, and a TCP port."""

    address: str
    port: int


class Steered(NamedTuple):
    """Of a workload's connection: what it asked for, and the backend that the kernel has chosen
    (None: the proxy chooses). `unread`: what the proxy sends goes by redirect, and this tells how
    many bytes of memory the workload's socket holds of it; `cookie` is that socket's, else 0."""

    asked: Destination
    backend: Destination | None = None
    unread: Callable[[], int] | None = None
    cookie: int = 0


class Kernel:
    """The handles in force, None until they are there. Connections keep those they began with: the
    maps before may be others, and still have their sockets."""

    def __init__(self) -> None:
        self.handles: Handles | None = None

    def steered(self, fd: int) -> Steered | None:
        """Of an accepted connection; None: nobody was steered here, as far as we are told."""
        handles = self.handles
        if handles is None:
            return None
        try:
            origin = handles.origin(fd)
        except OSError as error:
            _log.error("the kernel does not tell who connected: %s", error)
            return None
        if origin is None:
            return None
        return Steered(
            _text(origin.asked),
            _text(origin.backend) if origin.backend is not None else None,
            functools.partial(handles.queued, origin.cookie) if origin.enrolled else None,
            origin.cookie if origin.enrolled else 0,
        )


@lru_cache(maxsize=4096)
def _text(target: Target) -> Destination:
    packed = ipaddress.IPv6Address(target.address)
    return Destination(str(packed.ipv4_mapped or packed), target.port)
