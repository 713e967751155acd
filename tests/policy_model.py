"""What policies mean, as plainly as can be: manifests in, yes or no out, everything looked at anew.

Written from the documentation alone, to be compared with what Weft does; it shares no code with it.

- https://kubernetes.io/docs/concepts/services-networking/network-policies/
- https://docs.cilium.io/en/stable/security/policy/ (rule basics, layer 3, layer 4, layer 7, deny
  policies, Kubernetes constructs), and the descriptions in the CRDs
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Any

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    namespace: str
    name: str
    address: str
    labels: dict[str, str] = field(default_factory=dict, hash=False)
    account: str = "default"
    ports: dict[str, tuple[str, int]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Outside:
    """An address that is no pod's. `entity`: world, host (the pods' own node) or remote-node."""

    address: str
    entity: str = "world"


Party = Pod | Outside


@dataclass
class World:
    """`namespaces`: their labels; `services`: endpoints' addresses by (namespace, name); policies
    as manifests."""

    pods: list[Pod]
    namespaces: dict[str, dict[str, str]]
    policies: list[Manifest]
    services: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    def allowed(
        self, source: Party, destination: Party, protocol: str, port: int, request: Any = None
    ) -> bool:
        """`port` of ICMP is the type. `request`: method, host, path, headers of an HTTP request;
        without one it is asked whether there may be a connection."""
        return all(self.sides(source, destination, protocol, port, request))

    def sides(
        self, source: Party, destination: Party, protocol: str, port: int, request: Any = None
    ) -> tuple[bool, bool]:
        """Whether it may leave, and whether it may arrive."""
        if source == destination:
            return True, True  # "Pods cannot block access to themselves"
        what = (protocol, port, request)
        return (
            self._side("egress", source, destination, *what),
            self._side("ingress", destination, source, *what),
        )

    def _side(
        self, direction: str, subject: Party, other: Party, protocol: str, port: int, request: Any
    ) -> bool:
        if not isinstance(subject, Pod):
            return True
        if direction == "ingress" and isinstance(other, Outside) and other.entity == "host":
            return True  # a pod's own node may always reach it, and nothing can be said against it
        isolated = allowed = False
        policies = [
            policy
            for policy in self.policies
            if policy["metadata"].get("annotations", {}).get("weft.dev/policy-audit") != "true"
        ]
        specs = [
            (policy, spec)
            for policy in policies
            if policy["kind"] != "NetworkPolicy"
            for spec in [policy.get("spec"), *(policy.get("specs") or ())]
            if spec and self._cilium_subject(policy, spec, subject)
        ]
        side = "from" if direction == "ingress" else "to"
        requires = [
            (policy, selector)
            for policy, spec in specs
            for rule in spec.get(direction) or ()
            for selector in rule.get(f"{side}Requires") or ()
        ]
        for policy in policies:
            if policy["kind"] != "NetworkPolicy":
                continue
            if not self._np_selects(policy, direction, subject):
                continue
            isolated = True
            here = isinstance(other, Outside) and other.entity == "host"
            target = other if direction == "egress" else subject
            allowed |= here or any(
                self._np_rule(policy, direction, rule, other, target, protocol, port, requires)
                for rule in policy["spec"].get(direction) or ()
            )
        denied = False
        for policy, spec in specs:
            rules, denies = spec.get(direction) or (), spec.get(f"{direction}Deny") or ()
            default = (spec.get("enableDefaultDeny") or {}).get(direction)
            isolated |= bool(rules or denies) if default is None else default
            match = (policy, direction, other, other if side == "to" else subject)
            denied |= any(self._cilium(*match, one, protocol, port, None, ()) for one in denies)
            allowed |= any(
                self._cilium(*match, one, protocol, port, request, requires) for one in rules
            )
        return not denied and (allowed or not isolated)

    # --- NetworkPolicy ----------------------------------------------------------------------------

    def _np_selects(self, policy: Manifest, direction: str, pod: Pod) -> bool:
        spec = policy["spec"]
        types = spec.get("policyTypes") or (
            ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]
        )
        return (
            direction.capitalize() in types
            and pod.namespace == policy["metadata"]["namespace"]
            and _selects(spec.get("podSelector") or {}, pod.labels)
        )

    def _np_rule(
        self,
        policy: Manifest,
        direction: str,
        rule: Manifest,
        other: Party,
        target: Party,
        protocol: str,
        port: int,
        requires: Any,
    ) -> bool:
        """What Cilium's policies require of peers that are selected by labels, they require of
        those that a NetworkPolicy selects, too: otherwise they "must be met" by nobody."""
        peers = rule.get("from" if direction == "ingress" else "to")
        if peers and not any(self._np_peer(policy, peer, other) for peer in peers):
            return False
        met = all(self._cilium_peer(where, one, other) for where, one in requires)
        if peers and isinstance(other, Pod) and not met:
            return False
        ports = rule.get("ports")
        return not ports or any(_np_port(one, target, protocol, port) for one in ports)

    def _np_peer(self, policy: Manifest, peer: Manifest, other: Party) -> bool:
        if "ipBlock" in peer:
            block = peer["ipBlock"]
            return (
                isinstance(other, Outside)
                and other.entity == "world"
                and _inside(other.address, block["cidr"])
                and not any(_inside(other.address, one) for one in block.get("except") or ())
            )
        if not isinstance(other, Pod):
            return False
        if "namespaceSelector" in peer:
            labels = {**self.namespaces.get(other.namespace, {})}
            labels["kubernetes.io/metadata.name"] = other.namespace
            if not _selects(peer["namespaceSelector"] or {}, labels):
                return False
        elif other.namespace != policy["metadata"]["namespace"]:
            return False
        return _selects(peer.get("podSelector") or {}, other.labels)

    # --- Cilium's ---------------------------------------------------------------------------------

    def _labels(self, pod: Pod) -> dict[str, str]:
        """A pod's labels as Cilium has them, all of source k8s."""
        of_namespace = {
            f"io.cilium.k8s.namespace.labels.{key}": value
            for key, value in self.namespaces.get(pod.namespace, {}).items()
        }
        return {
            **pod.labels,
            **of_namespace,
            "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name": pod.namespace,
            "io.kubernetes.pod.namespace": pod.namespace,
            "io.cilium.k8s.policy.serviceaccount": pod.account,
        }

    def _cilium_subject(self, policy: Manifest, spec: Manifest, pod: Pod) -> bool:
        namespace = policy["metadata"].get("namespace")
        if namespace is not None and namespace != pod.namespace:
            return False
        return _cilium_selects(spec["endpointSelector"], self._labels(pod))

    def _cilium_peer(self, policy: Manifest, selector: Manifest, other: Party) -> bool:
        if not isinstance(other, Pod):
            return False
        keys = [*(selector.get("matchLabels") or {})]
        keys += [one["key"] for one in selector.get("matchExpressions") or ()]
        named = any(key.endswith("io.kubernetes.pod.namespace") for key in keys)
        namespace = policy["metadata"].get("namespace")
        if not named and namespace is not None and other.namespace != namespace:
            return False
        return _cilium_selects(selector, self._labels(other))

    def _cilium(
        self,
        policy: Manifest,
        direction: str,
        other: Party,
        target: Party,
        rule: Manifest,
        protocol: str,
        port: int,
        request: Any,
        requires: Any,
    ) -> bool:
        """Whether a rule matches. One that names neither peers nor ports matches nothing."""
        side = "from" if direction == "ingress" else "to"
        names = ("Endpoints", "CIDR", "CIDRSet", "Entities", "Services")
        peers = [rule.get(f"{side}{name}") for name in names]
        if all(one is None for one in peers):
            if not rule.get("toPorts") and not rule.get("icmps"):
                return False
        elif not self._cilium_peers(policy, *peers, other, requires):
            return False
        if rule.get("icmps"):
            return any(
                _icmp(one, protocol, port) for group in rule["icmps"] for one in group["fields"]
            )
        if not rule.get("toPorts"):
            return True
        return any(
            (
                not group.get("ports")
                or any(_port(one, target, protocol, port) for one in group["ports"])
            )
            and _http(group, request)
            for group in rule["toPorts"]
        )

    def _cilium_peers(
        self,
        policy: Manifest,
        endpoints: Any,
        cidrs: Any,
        cidr_set: Any,
        entities: Any,
        services: Any,
        other: Party,
        requires: Any,
    ) -> bool:
        if any(self._cilium_peer(policy, one, other) for one in endpoints or ()):
            return all(self._cilium_peer(where, one, other) for where, one in requires)
        outside = isinstance(other, Outside) and other.entity == "world"
        if outside and any(_inside(other.address, one) for one in cidrs or ()):
            return True
        if outside and any(
            _inside(other.address, one["cidr"])
            and not any(_inside(other.address, but) for but in one.get("except") or ())
            for one in cidr_set or ()
        ):
            return True
        if any(_is(one, other) for one in entities or ()):
            return True
        return any(
            self._serves(self.services[ref["namespace"], ref["serviceName"]], other)
            for ref in (one["k8sService"] for one in services or ())
        )

    def _serves(self, endpoints: list[str], other: Party) -> bool:
        """A Service's endpoints are known by their labels, as all pods are: who has the same ones
        is one of them to policy."""
        return other.address in endpoints or any(
            pod.address in endpoints and self._labels(pod) == self._labels(other)
            for pod in self.pods
            if isinstance(other, Pod)
        )


def _is(entity: str, other: Party) -> bool:
    if entity == "all":
        return True
    if entity == "cluster":
        return isinstance(other, Pod) or other.entity in ("host", "remote-node")
    return isinstance(other, Outside) and other.entity == entity


def _inside(address: str, cidr: str) -> bool:
    """RFC 4291 section 2.5.5.2: a mapped address is one of IPv4."""
    one, network = ipaddress.ip_address(address), ipaddress.ip_network(cidr, strict=False)
    if one.version == 4 and network.version == 6 and network.prefixlen >= 96:
        one = ipaddress.IPv6Address(f"::ffff:{one}")
    return one in network


# --- selectors and ports


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for one in selector.get("matchExpressions") or ():
        value, values = labels.get(one["key"]), one.get("values") or ()
        holds = {
            "In": value is not None and value in values,
            "NotIn": value is None or value not in values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }[one["operator"]]
        if not holds:
            return False
    return True


def _cilium_selects(selector: Manifest, labels: dict[str, str]) -> bool:
    def plain(key: str) -> str:
        return key.removeprefix("k8s:").removeprefix("any:")

    return _selects(
        {
            "matchLabels": {
                plain(key): value for key, value in (selector.get("matchLabels") or {}).items()
            },
            "matchExpressions": [
                {**one, "key": plain(one["key"])} for one in selector.get("matchExpressions") or ()
            ],
        },
        labels,
    )


def _np_port(wanted: Manifest, target: Party, protocol: str, port: int) -> bool:
    if wanted.get("protocol", "TCP") != protocol:
        return False
    number = wanted.get("port")
    if number is None:
        return True
    if isinstance(number, str):
        return isinstance(target, Pod) and target.ports.get(number) == (protocol, port)
    return number <= port <= wanted.get("endPort", number)


def _port(wanted: Manifest, target: Party, protocol: str, port: int) -> bool:
    asked = wanted.get("protocol", "ANY")
    if protocol not in ("TCP", "UDP", "SCTP") or asked not in ("ANY", protocol):
        return False
    text = wanted["port"]
    if not text.isdigit():
        return isinstance(target, Pod) and target.ports.get(text.lower()) == (protocol, port)
    number = int(text)
    return number == 0 or number <= port <= wanted.get("endPort", number)


def _icmp(wanted: Manifest, protocol: str, type: int) -> bool:
    family = {"IPv4": "ICMP", "IPv6": "ICMPv6"}[wanted.get("family", "IPv4")]
    names = {"EchoRequest": 8, "EchoReply": 0} if family == "ICMP" else {"EchoRequest": 128}
    number = names.get(wanted["type"], wanted["type"])
    return protocol == family and int(number) == type


# --- requests


def _http(group: Manifest, request: Any) -> bool:
    rules = (group.get("rules") or {}).get("http")
    return not rules or request is None or any(_http_rule(one, request) for one in rules)


def _http_rule(rule: Manifest, request: Any) -> bool:
    """`request`: method, host, path, and a list of headers."""
    method, host, path, headers = request
    for expression, value in (("method", method), ("path", path), ("host", host)):
        if rule.get(expression) and not re.fullmatch(rule[expression], value):
            return False
    for text in rule.get("headers") or ():
        name, _, value = text.partition(": ")
        if not _has(headers, name, value or None):
            return False
    for one in rule.get("headerMatches") or ():
        if not one.get("mismatch") and not _has(headers, one["name"], one.get("value")):
            return False
    return True


def _has(headers: list[tuple[str, str]], name: str, value: str | None) -> bool:
    found = [have for key, have in headers if key.lower() == name.lower()]
    return bool(found) and value in (None, ",".join(found))
