"""Policies as NodeConfig carries them: what may reach a pod of this node, and what it may reach.

Everything is resolved: selectors have become identities (numbers as in WorkloadSection, of CIDRs
and of reserved entities too), named ports numbers. Shapes only, like mesh.model.nodeconfig.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec

from mesh.model.section import Part

# What a rule can name instead of a port: "ANY" is every protocol of the others.
PolicyProtocol: TypeAlias = Literal["TCP", "UDP", "SCTP", "ICMP", "ICMPv6", "ANY"]


class PortRange(Part, frozen=True):
    """`first` to `last`, both included; 0 to 65535 is every port. For ICMP they are types."""

    protocol: PolicyProtocol = "ANY"
    first: int = 0
    last: int = 65535


class HeaderRule(Part, frozen=True):
    """A header that must be there with this value (`value` None: with any); name lower case. One
    that stands several times has its values with commas between them. `on_mismatch` says what
    becomes of a request without: "DENY" it does not match the rule; the others let it pass and mend
    it, or only log (CiliumNetworkPolicy headerMatches[].mismatch)."""

    name: str
    value: str | None = None
    on_mismatch: Literal["DENY", "LOG", "ADD", "DELETE", "REPLACE"] = "DENY"


class HttpRule(Part, frozen=True):
    """All that is given must hold. `method`, `path`, `host`: regular expressions (RE2) that must
    match the whole of it (CiliumNetworkPolicy rules.http); path includes no query."""

    method: str | None = None
    path: str | None = None
    host: str | None = None
    headers: tuple[HeaderRule, ...] = ()


class PolicyRule(Part, frozen=True):
    """`source`: kind, namespace/name and place of the rule in it, such as
    "NetworkPolicy shop/allow-cart ingress[0]". `peers` None: everybody. `ports` empty: all.
    `http` None: nothing about requests; else one of them must hold for a request to pass.
    `authenticated`: only by mutual TLS, or on this node. `audit`: it neither allows nor denies, but
    tells what it would do."""

    source: str
    peers: frozenset[int] | None = None
    ports: tuple[PortRange, ...] = ()
    deny: bool = False
    http: tuple[HttpRule, ...] | None = None
    authenticated: bool = False
    audit: bool = False


class Direction(Part, frozen=True):
    """What is in force is what the rules say that have no `audit`: what a deny rule matches is
    refused, whatever allows it; what no allow rule lets pass is refused with `default_deny`, by the
    policies named in `selected_by`, but with `audit` only told (all of those policies are in audit
    mode). What would be refused if all rules counted, and passes, is told as such.

    A connection that only rules with `http` allow must go through a proxy that reads its
    requests."""

    default_deny: bool = False
    audit: bool = False
    selected_by: tuple[str, ...] = ()
    rules: tuple[PolicyRule, ...] = ()


class PolicySection(msgspec.Struct, frozen=True, omit_defaults=True, tag="policy"):
    """What is in force for one pod of this node; a pod without a section is not selected by any
    policy. That for pods that nobody has told of yet has no name, and "::" as address."""

    namespace: str
    pod: str
    identity: int
    addresses: tuple[str, ...]
    ingress: Direction = Direction()
    egress: Direction = Direction()


class CidrSection(msgspec.Struct, frozen=True, omit_defaults=True, tag="cidr"):
    """The identity of addresses that are no pod's: the longest `cidr` that holds one says, and for
    a node's own address that of its NodeSection, unless a section has just that address as `cidr`
    (an API server's on a node). Not `here`: no policy about pods of this node names it, so nobody
    is told apart by it; other nodes are told of it as whose client of a Gateway is."""

    cidr: str
    identity: int
    here: bool = True
