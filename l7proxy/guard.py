"""Policy for one request: which endpoints may get it, and as what.

An endpoint that policy refuses is none for the request, so that others serve it; where none is
left the request is refused. Judged anew for every attempt, since policies may have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from l7proxy import metrics
from l7proxy.message import RequestHead
from l7proxy.peers import Caller
from l7proxy.policies import Policies, mended
from l7proxy.policy_rules import FREE, Verdict
from l7proxy.record import Record
from mesh.model.nodeconfig import Endpoint

# What clients are told, and nothing more; flows and the log name the policy.
DENIED = "access denied"
POLICY_DENIED = "policy_denied"
POLICY_AUDIT = "policy_audit"


class Guard:
    """`caller` asks; `sent` is the request as it came, for the caller's own policies."""

    def __init__(
        self, policies: Policies, caller: Caller, sent: RequestHead, record: Record | None
    ) -> None:
        self._policies = policies
        self._caller = caller
        self._sent = sent
        self._record = record

    def quiet(self) -> Guard:
        """One for a copy of the request, which leaves its record alone."""
        return Guard(self._policies, self._caller, self._sent, None)

    def judge(self, endpoint: Endpoint, head: RequestHead) -> Verdict:
        """Of the request, as it is to be forwarded, to an endpoint."""
        policies = self._policies
        if not policies.any:
            return FREE
        asker, pod = policies.asker(self._caller), bool(endpoint.name)
        return policies.request(asker, endpoint.address, endpoint.port, self._sent, head, pod=pod)

    def watch(self, endpoint: Endpoint, head: RequestHead, cut: Callable[[], None]) -> Watch:
        """Call `cut` as soon as policy refuses what it has let pass, or an identity that it takes
        has gone."""

        def refusal() -> str:
            if not self.judge(endpoint, head).allowed:
                return POLICY_DENIED
            return self._policies.no_way(self._caller, endpoint)

        return Watch(self._policies, refusal, cut)

    def allowing(self, head: RequestHead) -> Callable[[Endpoint], bool]:
        """Which endpoints may get it, for whoever chooses one."""
        return partial(self._allows, head)

    def _allows(self, head: RequestHead, endpoint: Endpoint) -> bool:
        verdict = self.judge(endpoint, head)
        if not verdict.allowed and self._record is not None:
            # If no other endpoint is left, this is why.
            self._record.policy, self._record.destination = verdict.source, endpoint
        return verdict.allowed

    def forward(self, endpoint: Endpoint, head: RequestHead) -> RequestHead | None:
        """The request as the endpoint gets it; None: policy has come to refuse it meanwhile."""
        verdict = self.judge(endpoint, head)
        record = self._record
        if record is not None:
            record.policy = verdict.source
            if verdict.audit:
                record.policy, record.reason = verdict.audit, POLICY_AUDIT
                metrics.POLICY.labels("request", "audited").inc()
        return mended(head, verdict) if verdict.allowed else None


class Watch:
    """Of what goes on for long. `refused`: why it would not be let pass any more, a reason to
    count, which `refusal` gives; "": it would."""

    def __init__(
        self, policies: Policies, refusal: Callable[[], str], cut: Callable[[], None]
    ) -> None:
        self.refused = ""
        self._policies = policies
        self._refusal = refusal
        self._cut = cut
        policies.watchers.add(self.look)
        self.look()

    def look(self) -> None:
        if not self.refused and (reason := self._refusal()):
            self.refused = reason
            self._cut()

    def end(self) -> None:
        self._policies.watchers.discard(self.look)
