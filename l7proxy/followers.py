"""What may follow a request past the proxy, and who answers for it if it comes here after all.

Between the exchange, which has served one, and the pairing, which knows no routes. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable

from l7proxy import metrics
from l7proxy.begun import Begun
from l7proxy.entry import Reply, Selection
from l7proxy.held import Follower, Place
from l7proxy.lease import Lease
from l7proxy.message import RequestHead, ResponseHead
from l7proxy.pairs import Pairs, Refusal
from l7proxy.peers import Caller
from l7proxy.policies import NOWHERE, plain
from l7proxy.record import Record
from l7proxy.routing import CompiledBackend
from l7proxy.sent import Sent
from l7proxy.streams import ClientStream, Handler


def follower(
    pairs: Pairs,
    version: int,
    selected: Selection,
    backend: CompiledBackend,
    caller: Caller,
    lease: Lease,
    record: Record,
    response: ResponseHead,
    resume: Callable[[Sent], Handler],
    tell: Callable[[Sent, RequestHead, str, str], None],
) -> Follower | None:
    """For requests like the one that `backend` has answered so, by `lease`, to the same endpoint.
    `version`: the number of changes when that was chosen. `resume`: what serves one; `tell`: as
    `Exchanges.tell`. None: they come to the proxy."""
    match = selected.match
    if match is None or not lease.endpoint.name:
        return None
    rule, ends = match.rule, (caller.client, lease.endpoint_id)
    clusters = (one.cluster for one in rule.backends if one.cluster is not None)
    # A client that nobody has told of is judged by what stands at NOWHERE.
    ends_at = map(plain, (caller.client, lease.endpoint.address))
    about = frozenset((*ends_at, NOWHERE, *clusters))
    if pairs.changes.since(version, about) or pairs.handed.left(ends):
        return None
    allowed = pairs.allowed(
        selected,
        rule,
        caller,
        lease.way,
        lease.endpoint,
        record.series(),
        length=response.body if isinstance(response.body, int) else 0,
    )
    if isinstance(allowed, Refusal):
        return None
    share = backend.weight / rule.total_weight if rule.total_weight else 1.0
    if lease.endpoint_id != selected.prefer:
        share /= max(lease.endpoints, 1)

    def sent(begun: Begun, answer: Lease | Reply) -> Sent:
        policy = allowed.series.meaning.policy(begun.egress, begun.ingress)
        facts = begun.bytes_in, begun.status, begun.bytes_out
        return Sent(selected, backend, lease, answer, begun.started, policy, *facts, version)

    def resumed(begun: Begun, stream: ClientStream) -> Handler:
        if pairs.handed.failed(ends):
            metrics.PAIRS_PAUSED.labels(backend.label).inc()
        return resume(sent(begun, lease.again(stream)))

    def answered() -> None:
        pairs.handed.passed(ends)
        lease.succeeded(200)

    return Follower(
        allowed,
        Place((match.route, rule.index), rule.backends.index(backend), lease.endpoint_id, share),
        record.head.authority,
        current=lambda: not (lease.ejected or pairs.changes.since(version, about)),
        pool=lease.pool,
        resume=resumed,
        fail=lambda begun, *why: resume(sent(begun, Reply(*why))),
        broken=lambda begun, *why: resume(sent(begun, Reply(502, *why))),
        over=lambda begun, *why: tell(sent(begun, lease), begun.head, *why),
        answered=answered,
    )
