"""Requests that have gone to their backends past the exchange, which is to answer them."""

from __future__ import annotations

from typing import NamedTuple

from l7proxy.entry import Reply, Selection
from l7proxy.forwarding import ClientAddress
from l7proxy.lease import Lease
from l7proxy.routing import CompiledBackend


class Sent(NamedTuple):
    """A request that has gone to its backend past the exchange, as one before it. `lease`: for its
    response, or the reply if there will be none; `responded`: a part has come. `told`: who asks,
    where its head is known; then also when it `started`, and by which `policy` it was let pass."""

    selected: Selection
    backend: CompiledBackend
    before: Lease
    lease: Lease | Reply
    responded: bool = False
    told: ClientAddress | None = None
    started: float = 0.0
    policy: str = ""
