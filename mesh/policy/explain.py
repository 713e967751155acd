"""Why a connection or request may pass or not, from what is in force: the deciding rule or default
of each side, and what would change the answer.

Egress is decided on the node of who asks, ingress on that of who is asked, so the sections of both
are wanted. Pure; knows sections, no objects.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Literal, NamedTuple

import msgspec

from l7proxy.credentials import Credentials
from l7proxy.field_rules import Refused
from l7proxy.message import ProtocolError, RequestHead
from l7proxy.normalise import normalise_authority, normalise_target
from l7proxy.peers import Peers
from l7proxy.policies import Policies
from l7proxy.policy_rules import Identities, Rules, Transport, concerns
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import NodeSection, Section, Settings, WorkloadSection
from mesh.model.policyconfig import CidrSection, PolicyRule, PolicySection, PortRange
from mesh.model.section import SETTINGS_KEY, SectionKey, workload_key

# The sections of a node, by its name.
SectionsOf = Callable[[str], Mapping[SectionKey, Section]]

# Of what would change the answer the nearest are told.
_HINTS = 5
_OWN_NODE = "a pod's own node is always allowed"
_PROOF = (
    "only where mutual TLS proves both ends, or both are pods of one node, with SVIDs that are"
    " valid (weft certs list)"
)


class QuestionError(Exception):
    """It cannot be answered; what is wrong and what to do."""


class Question(NamedTuple):
    """`source` and `destination`: NAMESPACE/POD, or an address. `method` None: a connection."""

    source: str
    destination: str
    port: int
    protocol: Transport = "TCP"
    method: str | None = None
    path: str = "/"
    headers: tuple[tuple[str, str], ...] = ()


class SideAnswer(msgspec.Struct, frozen=True):
    """`verdict` of the policies of `pod` for one direction; "audited": it passes, and would not
    without audit mode. `by`: the rule that decided, or the default; `policies`: those that this
    names; `files`: where they stand, filled in by who knows; `hints`: what would change it."""

    direction: Literal["egress", "ingress"]
    pod: str
    verdict: Literal["allowed", "denied", "audited"]
    by: str
    policies: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()


class Answer(msgspec.Struct, frozen=True):
    allowed: bool
    sides: tuple[SideAnswer, ...]
    notes: tuple[str, ...] = ()


def explain(question: Question, sections_of: SectionsOf, here: str) -> Answer:
    """QuestionError. `here`: a node whose sections name all pods."""
    sections = sections_of(here)
    source = _party(question.source, sections)
    destination = _party(question.destination, sections)
    if isinstance(source, str) and isinstance(destination, str):
        raise QuestionError("neither end is a pod, so no policy is asked")
    if source == destination:
        return Answer(True, (), ("a pod can always reach itself",))
    head = _head(question)
    sides: list[SideAnswer] = []
    notes: list[str] = []
    if isinstance(source, WorkloadSection):
        policies = _in_force(sections_of(source.node))
        peer: Identities = (policies.identity(_address(destination)),)
        rules = policies.rules_at(source.addresses[0])
        sides.append(_side("egress", source, rules[1] if rules else None, peer, question, head))
    if isinstance(destination, WorkloadSection):
        policies = _in_force(sections_of(destination.node))
        peer = (
            (source.identity,)
            if isinstance(source, WorkloadSection)
            else (policies.identity(source),)
        )
        rules = policies.rules_at(destination.addresses[0])
        if peer == (Reserved.HOST,):
            name, why = f"{destination.namespace}/{destination.name}", _OWN_NODE
            return Answer(True, (SideAnswer("ingress", name, "allowed", why),))
        sides.append(
            _side("ingress", destination, rules[0] if rules else None, peer, question, head)
        )
    return Answer(all(one.verdict != "denied" for one in sides), tuple(sides), tuple(notes))


def _party(text: str, sections: Mapping[SectionKey, Section]) -> WorkloadSection | str:
    """A pod, or an address that is none's."""
    try:
        address = str(ipaddress.ip_address(text))
    except ValueError:
        namespace, _, name = text.rpartition("/")
        found = sections.get(workload_key(namespace or "default", name))
        if isinstance(found, WorkloadSection):
            return found
        raise QuestionError(
            f"there is no pod {text} with an address; write NAMESPACE/NAME, or an address"
        ) from None
    for section in sections.values():
        if isinstance(section, WorkloadSection) and address in section.addresses:
            return section
    return address


def _address(party: WorkloadSection | str) -> str:
    return party if isinstance(party, str) else party.addresses[0]


def _head(question: Question) -> RequestHead | None:
    """QuestionError: no backend would ever see such a request."""
    if question.method is None:
        return None
    host = question.destination.rpartition("/")[2]
    fields = []
    for name, value in question.headers:
        if name.lower() == "host":
            host = value
        else:
            fields.append((name.lower().encode(), value.encode()))
    host = f"[{host}]" if ":" in host and "." not in host and host.count(":") > 1 else host
    method = question.method.upper().encode()
    try:
        path, query = normalise_target(question.path.encode(), Settings(), method)
        authority = normalise_authority(host.encode())
    except ProtocolError as error:
        raise QuestionError(f"the proxy refuses such a request with 400: {error}") from None
    return RequestHead(method, b"http", authority, path, query, fields)


def _in_force(sections: Mapping[SectionKey, Section]) -> Policies:
    settings = sections.get(SETTINGS_KEY)
    peers = Peers(Credentials(), settings if isinstance(settings, Settings) else Settings())
    policies = Policies(peers)
    for key, section in sections.items():
        match section:
            case WorkloadSection():
                peers.put_workload(key, section)
            case NodeSection():
                peers.put_node(key, section)
            case CidrSection() | PolicySection():
                try:
                    policies.put(key, section)
                except Refused:
                    pass  # it denies everything, as it does where it is in force
    return policies


# --- one side ------------------------------------------------------------------------------------


def _side(
    direction: Literal["egress", "ingress"],
    pod: WorkloadSection,
    rules: Rules | None,
    peer: Identities,
    question: Question,
    head: RequestHead | None,
) -> SideAnswer:
    name = f"{pod.namespace}/{pod.name}"
    if rules is None or not (rules.direction.rules or rules.direction.default_deny):
        hint = f"a policy that selects {name} for {direction} refuses what it does not allow"
        return SideAnswer(
            direction, name, "allowed", f"no policy selects it for {direction}", hints=(hint,)
        )
    asked = (peer, question.protocol, question.port)
    verdict = rules.connection(*asked, authenticated=True)
    if head is not None:
        verdict = rules.request(peer, question.port, head, authenticated=True)
    by = verdict.source or "nothing refuses it"
    if verdict.audit:
        by = verdict.audit
    elif verdict.http:
        by = f"{verdict.source}, for the requests that it names"
    said: Literal["allowed", "denied", "audited"] = (
        "denied" if not verdict.allowed else "audited" if verdict.audit else "allowed"
    )
    if said == "allowed":
        hints = _without(rules, verdict.source, asked, head)
    else:
        hints = _nearest(rules, by, asked, head)
    unproven = rules.connection(*asked)
    if head is not None:
        unproven = rules.request(peer, question.port, head)
    if verdict.allowed != unproven.allowed:
        hints = chain((_PROOF,), hints)
    return SideAnswer(direction, name, said, by, tuple(_named(by)), (), tuple(hints)[:_HINTS])


def _named(by: str) -> Iterator[str]:
    """The policies in a source: "Kind namespace/name place", or several after commas."""
    for part in by.removesuffix(" (default deny)").split(", "):
        words = part.split(" ")
        if len(words) > 1 and words[0].endswith("NetworkPolicy"):
            yield f"{words[0]} {words[1]}"


def _without(
    rules: Rules,
    source: str,
    asked: tuple[Identities, Transport, int],
    head: RequestHead | None,
) -> Iterator[str]:
    """What would become of it without the rule that allows it."""
    if not source:
        yield "a rule that denies it, or a policy with default deny, would refuse it"
        return
    others = [
        one.rule.source
        for one in rules.rules
        if not one.rule.deny and one.rule.source != source and concerns(one.rule, *asked)
        if one.http is None or (head is not None and any(not h.mismatch(head) for h in one.http))
    ]
    if others:
        yield f"without that rule {others[0]} allows it as well"
    elif rules.direction.default_deny:
        named = ", ".join(rules.direction.selected_by)
        yield f"without that rule it is refused by default, by {named}"


def _nearest(
    rules: Rules,
    by: str,
    asked: tuple[Identities, Transport, int],
    head: RequestHead | None,
) -> Iterator[str]:
    """What would have to be otherwise for it to pass."""
    identities, transport, port = asked
    denying = [one.rule for one in rules.rules if one.rule.source == by and one.rule.deny]
    if denying:
        yield f"{by} denies it, whatever allows it: it would have to name others or other ports"
        return
    near: list[str] = []
    far: list[str] = []
    for one in rules.rules:
        rule = one.rule
        if rule.deny or not rule.source.partition(" ")[0].endswith("NetworkPolicy"):
            continue
        peer = rule.peers is None or not rule.peers.isdisjoint(identities)
        there = concerns(rule, identities, transport, port)
        if there and one.http is not None and head is not None:
            for number, http in enumerate(one.http):
                near.append(f"{rule.source} http[{number}]: {http.mismatch(head)}")
        elif there and rule.audit:
            near.append(f"{rule.source} would allow it, but is in audit mode")
        elif peer and not there:
            near.append(f"{rule.source} allows this peer, but only {_ports(rule)}")
        elif rule.peers is not None and concerns(_for_all(rule), identities, transport, port):
            far.append(f"{rule.source} allows this port, but not this peer")
    yield from (*near, *far) or ("a rule for this peer and port in one of them would allow it",)


def _for_all(rule: PolicyRule) -> PolicyRule:
    return msgspec.structs.replace(rule, peers=None)


def _ports(rule: PolicyRule) -> str:
    return ", ".join(map(_range, rule.ports)) or "other ports"


def _range(ports: PortRange) -> str:
    if (ports.first, ports.last) == (0, 65535):
        return ports.protocol
    last = f"-{ports.last}" if ports.last != ports.first else ""
    return f"{ports.protocol} {ports.first}{last}"
