"""Requests that have gone to their backends past the exchange, which is to answer them."""

from __future__ import annotations

from typing import NamedTuple

from l7proxy.entry import Reply, Selection
from l7proxy.forwarding import ClientAddress
from l7proxy.lease import Lease
from l7proxy.routing import CompiledBackend


class Sent(NamedTuple):
    """A request that has gone to its backend past the exchange, as one before it. `lease`: for its
    response, or the reply if there will be none. It `started` then, by time.monotonic(), and
    `policy` let it pass; of its body `bytes_in` have gone; of its response `status` (0: nothing
    has come) and `bytes_out` of the body. `told`: who asks, where all of it is known, its `body`
    too, so that it could be sent again. `version`: of all that it was chosen by (`Changes.number`;
    -1: an older one)."""

    selected: Selection
    backend: CompiledBackend
    before: Lease
    lease: Lease | Reply
    started: float
    policy: str = ""
    bytes_in: int = 0
    status: int = 0
    bytes_out: int = 0
    version: int = -1
    told: ClientAddress | None = None
    body: bytes = b""
