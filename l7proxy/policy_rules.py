"""One direction of a pod's policies, ready to judge connections and requests.

Which rules are about a peer and port is found once and remembered; of the requests then only
their HTTP rules are asked. Knows numbers of identities, no addresses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple, TypeAlias

from l7proxy.http_policy import CompiledHttp, Mend
from l7proxy.message import RequestHead
from mesh.model.policyconfig import Direction, PolicyRule, PortRange

# Transports of what is judged.
Transport: TypeAlias = Literal["TCP", "UDP", "SCTP", "ICMP", "ICMPv6"]

# Who is asked for at once: one identity, or a Gateway's and that of its client.
Identities: TypeAlias = tuple[int, ...]

_REMEMBERED = 4096


class Verdict(NamedTuple):
    """`source`: the rule or policies that decided; "" where no policy had to. `http`: allowed, but
    only requests that the rules about them let pass. `audit`: what would have been refused, by
    which rule or policies; `audit_http`: that can only be said of each request by itself.
    `mends`: what is changed in the request."""

    allowed: bool
    source: str = ""
    http: bool = False
    audit: str = ""
    audit_http: bool = False
    mends: tuple[Mend, ...] = ()


FREE = Verdict(True)


class CompiledRule(NamedTuple):
    rule: PolicyRule
    http: tuple[CompiledHttp, ...] | None


class _Relevant(NamedTuple):
    """What is about a peer and port. Each the first of its kind, by source; with `all_` those in
    audit mode count too."""

    deny: str | None
    allow: str | None
    http: tuple[CompiledRule, ...]
    all_deny: str | None
    all_allow: str | None
    all_http: tuple[CompiledRule, ...]


class Rules:
    """A Direction. Refused: an HTTP rule in it is none. `asks_for_proof`: whether who the other
    side is has been authenticated can matter."""

    def __init__(self, direction: Direction, where: str) -> None:
        self.direction = direction
        self.rules = [
            CompiledRule(rule, _http(rule, f"{where}.rules[{i}]"))
            for i, rule in enumerate(direction.rules)
        ]
        self.asks_for_proof = any(rule.authenticated for rule in direction.rules)
        self._known: dict[tuple[Identities, Transport, int, bool], _Relevant] = {}
        named = ", ".join(direction.selected_by)
        self._default = f"{named} (default deny)" if named else "default deny"

    def connection(
        self,
        identities: Identities,
        transport: Transport,
        port: int,
        *,
        authenticated: bool = False,
    ) -> Verdict:
        """Of a connection or datagram, whatever it carries. For ICMP `port` is the type."""
        relevant = self._relevant(identities, transport, port, authenticated)
        verdict = self._refuse(relevant.deny, relevant.allow, bool(relevant.http))
        if not verdict.allowed:
            return verdict
        told = self._told(relevant.all_deny, relevant.all_allow, bool(relevant.all_http))
        later = relevant.all_allow is None and bool(relevant.all_http)
        later &= not told and self.direction.default_deny
        if relevant.allow is None and relevant.http and self._closed:
            return Verdict(True, relevant.http[0].rule.source, True, told)
        return Verdict(True, verdict.source, False, told, later)

    def request(
        self,
        identities: Identities,
        port: int,
        head: RequestHead,
        *,
        authenticated: bool = False,
    ) -> Verdict:
        """Of a request on a TCP connection."""
        relevant = self._relevant(identities, "TCP", port, authenticated)
        source, mends = (relevant.allow, ()) if relevant.allow else _match(relevant.http, head)
        verdict = self._refuse(relevant.deny, source, False)
        if not verdict.allowed:
            return verdict
        matched = relevant.all_allow or source or _match(relevant.all_http, head)[0]
        told = self._told(relevant.all_deny, matched, False)
        return Verdict(True, verdict.source, audit=told, mends=mends)

    def for_kernel(
        self, identities: Identities, port: int, *, authenticated: bool = False
    ) -> tuple[PolicyRule, ...] | None:
        """What `request` comes to where nothing but heads is looked at: the rules of which one must
        hold, () none must; None: that is not all (something is refused, mended, or to be told)."""
        relevant = self._relevant(identities, "TCP", port, authenticated)
        told = relevant[:3] != relevant[3:] or (self.direction.default_deny and not self._closed)
        if relevant.deny is not None or told:
            return None
        if relevant.allow is not None:
            return ()
        rules = tuple(one.rule for one in relevant.http)
        if self._closed:
            return rules or None
        mends = any(
            header.on_mismatch in ("ADD", "DELETE", "REPLACE")
            for rule in rules
            for http in rule.http or ()
            for header in http.headers
        )
        return None if mends else ()

    def unasked(
        self, identities: Identities, port: int, *, authenticated: bool = False
    ) -> str | None:
        """The rule that lets all requests pass, "" where none has to; None: that is said of each
        request by itself."""
        relevant = self._relevant(identities, "TCP", port, authenticated)
        return relevant.allow if relevant.allow is not None or relevant.http else ""

    @property
    def _closed(self) -> bool:
        return self.direction.default_deny and not self.direction.audit

    def _refuse(self, deny: str | None, allow: str | None, http: bool) -> Verdict:
        if deny is not None:
            return Verdict(False, deny)
        if allow is not None:
            return Verdict(True, allow)
        if http or not self._closed:
            return FREE
        return Verdict(False, self._default)

    def _told(self, deny: str | None, allow: str | None, http: bool) -> str:
        """What would be refused if nothing were in audit mode; "" nothing."""
        if deny is not None:
            return deny
        if allow is not None or http or not self.direction.default_deny:
            return ""
        return self._default

    def _relevant(
        self, identities: Identities, transport: Transport, port: int, authenticated: bool
    ) -> _Relevant:
        key = (identities, transport, port, authenticated)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            about = [
                one
                for one in self.rules
                if (one.rule.deny or authenticated or not one.rule.authenticated)
                and concerns(one.rule, identities, transport, port)
            ]
            enforced = [one for one in about if not one.rule.audit]
            found = self._known[key] = _Relevant(*_sorted(enforced), *_sorted(about))
        return found


def concerns(rule: PolicyRule, identities: Identities, transport: Transport, port: int) -> bool:
    """Whether a rule is about a peer and port."""
    if rule.peers is not None and rule.peers.isdisjoint(identities):
        return False
    return not rule.ports or any(_in(one, transport, port) for one in rule.ports)


def _in(ports: PortRange, transport: Transport, port: int) -> bool:
    return ports.protocol in (transport, "ANY") and ports.first <= port <= ports.last


def _sorted(
    rules: Iterable[CompiledRule],
) -> tuple[str | None, str | None, tuple[CompiledRule, ...]]:
    """The first rule that denies, the first that allows whatever is asked, and those that ask."""
    deny = next((one.rule.source for one in rules if one.rule.deny), None)
    allows = [one for one in rules if not one.rule.deny]
    allow = next((one.rule.source for one in allows if one.http is None), None)
    return deny, allow, tuple(one for one in allows if one.http is not None)


def _match(rules: Iterable[CompiledRule], head: RequestHead) -> tuple[str | None, tuple[Mend, ...]]:
    """The first rule that a request holds, and what all that it holds mend."""
    source: str | None = None
    mends: dict[Mend, None] = {}
    for one in rules:
        for http in one.http or ():
            found = http.judge(head)
            if found is not None:
                source = source or one.rule.source
                mends.update(dict.fromkeys(found))
    return source, tuple(mends)


def _http(rule: PolicyRule, where: str) -> tuple[CompiledHttp, ...] | None:
    if rule.http is None:
        return None
    return tuple(CompiledHttp(one, f"{where}.http[{i}]") for i, one in enumerate(rule.http))
