"""What came of a run: what was wrong, and what else is not as it should be. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from bpf.constants import LARGE_RESPONSE_MAX
from bpf.reasons import Reason
from l7proxy.redirect import MOST
from torture.clients import Loss, Totals, unexplained
from torture.kills import Kill
from torture.scene import Target

# What a connection may be charged for while its reader does not read. TCP's own receive queues are
# kept far below it, by run.TCP_RMEM in pods and by the proxy for its own sockets (l7proxy.dial), so
# that what is more has come by redirect or to a proxy that lets it.
QUEUE_BOUND = 4 << 20
# What comes by redirect is bounded by the proxy (l7proxy.redirect): MOST and one write, which
# sock_diag charges for twice; what passes by the proxy by one response.
REDIRECT_BOUND = 2 * MOST + LARGE_RESPONSE_MAX
# Of all that is complete, so much must have passed by the proxies.
LEAST_PASSED = 0.1
# Each is a bug wherever it happens.
_NEVER = (Reason.UNPAIRED, Reason.ENROL_FAILED, Reason.STALE_TABLE, Reason.NO_ORIGIN)


class Paths(NamedTuple):
    """Connections of a pod by how their bytes came."""

    redirect: int = 0
    tcp: int = 0


class Evidence(NamedTuple):
    """`said_wrong` by clients and pods, in words; `mixed`: connections that had bytes both ways.
    `paths` and `pairs` (messages of the loopback pair) by pod. `queue`: the longest receive queue
    in bytes, and whose; `redirect_queue`: of those filled by redirect. `counts` by node.
    `passing`: nodes whose clients ask pods of the same node for what may pass by the proxy."""

    totals: Totals
    said_wrong: Sequence[str]
    mixed: Sequence[str]
    losses: Sequence[Loss]
    kills: Sequence[Kill]
    paths: Mapping[str, Paths]
    pairs: Mapping[str, int]
    queue: tuple[int, str]
    redirect_queue: tuple[int, str]
    counts: Mapping[str, Mapping[Reason, int]]
    passing: Set[str]

    @property
    def wrong(self) -> list[str]:
        """Transfers that nobody meant to break and that were not complete and right; and wrong
        bytes of any."""
        lost = unexplained(self.losses, self.kills)
        return [*self.said_wrong, *(f"lost: {loss.text}{self._when(loss)}" for loss in lost)]

    def _when(self, loss: Loss) -> str:
        ended = max((one for one in self.kills if one.after <= loss.at), default=None, key=_after)
        if ended is None:
            return ""
        opened, lost = ((at - ended.after) / 1e6 for at in (loss.since, loss.at))
        return (
            f" (opened {opened:.0f} ms and lost {lost:.0f} ms after {ended.process} of "
            f"{ended.node} ended)"
        )

    @property
    def broken_by_us(self) -> int:
        return len(self.losses) - len(unexplained(self.losses, self.kills))


def problems(evidence: Evidence, targets: Sequence[Target]) -> Iterator[str]:
    """Which path was taken, and what it took, where that is not as it should be."""
    queue, whose = evidence.queue
    if queue > QUEUE_BOUND:
        yield (
            f"a connection of {whose} was charged for {queue >> 10} KiB that were not read, more "
            f"than {QUEUE_BOUND >> 10} KiB"
        )
    by_redirect, whose = evidence.redirect_queue
    if by_redirect > REDIRECT_BOUND:
        yield (
            f"a connection of {whose} was charged for {by_redirect >> 10} KiB that came by "
            f"redirect and were not read, more than {REDIRECT_BOUND >> 10} KiB"
        )
    for text in evidence.mixed:
        yield f"by redirect and by TCP: {text}"
    if not evidence.totals.by_redirect and any(target.redirected for target in targets):
        yield "no client got anything by redirect"
    for target in targets:
        found = Paths(*map(sum, zip(*(evidence.paths[pod] for pod in target.pods), strict=True)))
        if target.redirected is False and found.redirect:
            yield f"{target.text} is not kept off the fast path: {found.redirect} connections"
        if target.redirected and not found.redirect:
            yield f"{target.text} got nothing by redirect"
    for pod, messages in evidence.pairs.items():
        if not messages:
            yield f"the loopback pair of {pod} has not run: see its log"
    for node, counts in evidence.counts.items():
        for reason in _NEVER:
            if counts[reason]:
                yield f"node {node}: {reason.name} {counts[reason]}: {reason.meaning}"
        if node in evidence.passing and not counts[Reason.PAIR_REQUEST]:
            yield f"node {node}: no request has passed by the proxy"
    passed = sum(counts[Reason.PAIR_REQUEST] for counts in evidence.counts.values())
    if evidence.passing and passed < evidence.totals.complete * LEAST_PASSED:
        complete = evidence.totals.complete
        yield f"only {passed} requests have passed by the proxy, and {complete} were complete"
    # The proxy learns of a reset by a send that misses, once for each connection.
    missed = sum(counts[Reason.REDIRECT_MISSED] for counts in evidence.counts.values())
    meant = evidence.totals.broken + evidence.broken_by_us
    if missed > meant:
        yield f"{missed} redirects missed, and only {meant} transfers were broken on purpose"


def _after(kill: Kill) -> int:
    return kill.after


def grouped(texts: Sequence[str]) -> Iterator[str]:
    """The same thing once, with the first example and how often it was said."""
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(re.sub(r"\d+", "", text.partition(": ")[2])[:60], []).append(text)
    for same in groups.values():
        yield same[0] if len(same) == 1 else f"{len(same)} times such as {same[0]}"
