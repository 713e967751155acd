"""toPorts and icmps of Cilium's policies: ports by number, range and name; ICMP types.

Source: Cilium's pkg/policy/api/l4.go, rule_validation.go and icmp.go; IANA's ICMP and ICMPv6 type
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from mesh.model import ciliumnetworkpolicy as c
from mesh.model.rules_policy import PORT_NAME
from mesh.policy.problems import Problems
from mesh.policy.spec import PortSpec

_TRANSPORTS: tuple[Literal["TCP", "UDP", "SCTP"], ...] = ("TCP", "UDP", "SCTP")

_IPV4 = {
    "EchoReply": 0,
    "DestinationUnreachable": 3,
    "Redirect": 5,
    "Echo": 8,
    "EchoRequest": 8,
    "RouterAdvertisement": 9,
    "RouterSelection": 10,
    "TimeExceeded": 11,
    "ParameterProblem": 12,
    "Timestamp": 13,
    "TimestampReply": 14,
    "Photuris": 40,
    "ExtendedEchoRequest": 42,
    "ExtendedEcho Reply": 43,
    "ExtendedEchoReply": 43,
}
_IPV6 = {
    "DestinationUnreachable": 1,
    "PacketTooBig": 2,
    "TimeExceeded": 3,
    "ParameterProblem": 4,
    "EchoRequest": 128,
    "EchoReply": 129,
    "MulticastListenerQuery": 130,
    "MulticastListenerReport": 131,
    "MulticastListenerDone": 132,
    "RouterSolicitation": 133,
    "RouterAdvertisement": 134,
    "NeighborSolicitation": 135,
    "NeighborAdvertisement": 136,
    "RedirectMessage": 137,
    "RouterRenumbering": 138,
    "ICMPNodeInformationQuery": 139,
    "ICMPNodeInformationResponse": 140,
    "InverseNeighborDiscoverySolicitation": 141,
    "InverseNeighborDiscoveryAdvertisement": 142,
    "HomeAgentAddressDiscoveryRequest": 144,
    "HomeAgentAddressDiscoveryReply": 145,
    "MobilePrefixSolicitation": 146,
    "MobilePrefixAdvertisement": 147,
    "DuplicateAddressRequestCodeSuffix": 157,
    "DuplicateAddressConfirmationCodeSuffix": 158,
    "ExtendedEchoRequest": 160,
    "ExtendedEchoReply": 161,
}


def port_specs(
    ports: tuple[c.PortProtocol, ...], where: str, problems: Problems
) -> tuple[PortSpec, ...]:
    """No ports: all of them."""
    return tuple(
        spec
        for index, port in enumerate(ports)
        for spec in _port(port, f"{where}.ports[{index}]", problems)
    )


def _port(port: c.PortProtocol, where: str, problems: Problems) -> Iterator[PortSpec]:
    protocols = _TRANSPORTS if port.protocol == "ANY" else (port.protocol,)
    name = port.port.lower()
    if PORT_NAME.match(name):
        yield from (PortSpec(protocol, name=name) for protocol in protocols)
        return
    if not (port.port.isascii() and port.port.isdigit() and int(port.port) <= 65535):
        problems.add(f"{where}.port", f"{port.port!r} is neither 0 to 65535 nor a port's name")
        return
    first, last = int(port.port), port.end_port or int(port.port)
    if first == 0:
        first, last = 0, 65535
    elif not first <= last <= 65535:
        problems.add(f"{where}.endPort", f"{last} is not between {first} and 65535")
        return
    yield from (PortSpec(protocol, first, last) for protocol in protocols)


def icmp_ports(
    rules: tuple[c.ICMPRule, ...], where: str, problems: Problems
) -> tuple[PortSpec, ...]:
    """Types as ports of protocol ICMP or ICMPv6."""
    found = []
    for index, rule in enumerate(rules):
        for number, field in enumerate(rule.fields):
            type = _type(field)
            if type is None:
                problems.add(
                    f"{where}[{index}].fields[{number}].type",
                    f"{field.type!r} is no ICMP type of {field.family}",
                )
            else:
                protocol: Literal["ICMP", "ICMPv6"] = "ICMP" if field.family == "IPv4" else "ICMPv6"
                found.append(PortSpec(protocol, type, type))
    if not found:
        problems.add(where, "names no type")
    return tuple(found)


def _type(field: c.ICMPField) -> int | None:
    given = field.type
    if isinstance(given, str):
        if not (given.isascii() and given.isdigit() and len(given) < 4):
            return (_IPV4 if field.family == "IPv4" else _IPV6).get(given)
        given = int(given)
    return given if 0 <= given <= 255 else None
