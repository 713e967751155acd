"""Which of a rule's backends a request goes to, which endpoint it prefers, and which it avoids.

Knows sessions, weights, and what a pairing has given its share; no I/O.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection

from l7proxy import session
from l7proxy.held import Place
from l7proxy.message import RequestHead
from l7proxy.pairing import Pairing
from l7proxy.routing import CompiledBackend, CompiledRule, RouteMatchResult, pick_backend
from l7proxy.upstream import Clusters

# A lesser part of requests is none.
_ROUNDED = 1e-9


def choose(
    match: RouteMatchResult,
    clusters: Clusters,
    head: RequestHead,
    prefer: str | None,
    pairing: Pairing | None,
) -> tuple[CompiledBackend | None, str | None, Collection[str]]:
    """The backend (None as `pick_backend`); the endpoint to prefer, by its id: that which the
    request's session asks for, if it is there, else `prefer`; and those to avoid: the kernel has
    given them their share."""
    rule = match.rule
    if rule.session is not None:
        wanted = session.endpoint_for(head, rule.session, time.time())
        if wanted is not None:
            for backend in rule.backends:
                cluster = clusters.get(backend.cluster or "")
                if cluster is not None and backend.weight and cluster.has(wanted):
                    return backend, wanted, ()
    taken = pairing.taken((match.route, rule.index)) if pairing is not None else ()
    at = _pick_untaken(rule, taken) if taken else None
    if at is None:
        return pick_backend(rule, random.random), prefer, ()
    return rule.backends[at], prefer, {one.endpoint for one in taken if one.backend == at}


def _pick_untaken(rule: CompiledRule, taken: Collection[Place]) -> int | None:
    """A backend's index, by what is left of its weight; None: nothing is."""
    rest = [backend.weight / rule.total_weight for backend in rule.backends]
    for place in taken:
        rest[place.backend] -= place.share
    rest = [share if share > _ROUNDED else 0.0 for share in rest]
    return random.choices(range(len(rest)), rest)[0] if any(rest) else None
