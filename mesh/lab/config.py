"""lab.yaml: what a lab consists of, as somebody writes it.

    name: shop                    # a DNS label; default lab
    ranges:                       # an IPv4 and an IPv6 range each; all have defaults
      pods: [10.244.0.0/16, "fd00:10:244::/48"]       # each node gets a /24 and a /64 of it
      services: [10.96.0.0/16, "fd00:10:96::/112"]    # ClusterIPs
      nodes: [172.18.0.0/24, "fd00:172:18::/64"]      # the link between nodes
      outside: [192.168.18.0/24, "fd00:192:168::/64"] # clients outside the cluster
    nodes: [{name: a}, {name: b}]
    outside: [{name: client}]     # has a route to the nodes and none to pods
    pods:
      - name: cart
        namespace: shop           # default default
        replicas: 2               # cart-1 and cart-2; without it one pod of just this name
        node: a                   # default: each next pod on the next node
        labels: {app: cart}       # default {app: NAME}
        annotations: {}
        serviceAccount: cart      # default default
        command: [python3, shop.py, cart]  # runs in lab.yaml's directory; without it nothing runs
        env: {KEY: value}
        ports: [{name: http, port: 8080, protocol: TCP}]  # ready when all of these are open
    services:
      - name: cart
        namespace: shop
        selector: {app: cart}     # default {app: NAME}
        headless: false           # true: no ClusterIP, the name leads to the pods' addresses
        sessionAffinity: None     # or ClientIP
        ports: [{name: http, port: 80, targetPort: http, protocol: TCP, appProtocol: http}]
    namespaces:                   # those of pods and Services are there without being named here
      - {name: shop, labels: {team: red}, annotations: {}}
    manifests: [routes.yaml, gateways]  # files and directories with further objects, relative to
                                  # lab.yaml: all nodes read them where they are, an edit takes
                                  # effect at once. Gateways listen on the nodes' addresses
    trustDomain: cluster.local    # of the lab's authority, and how long its SVIDs are valid; these
    svidLife: 1h                  # are the defaults
    httpInKernel: true            # false: the nodes' Weft runs with --http-in-kernel=off

Field names and meanings are those of Kubernetes' Pod and Service where it has them. Pods share
files and process ids with the host; network, cgroup, host name and /etc/resolv.conf are their own.

Knows the format and what must hold of it, nothing of addresses that are given out or of the kernel.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from certs.spiffe import BadSpiffeId, check_trust_domain
from mesh.lab.errors import LabError
from mesh.model import scalars as s
from mesh.model.errors import FieldError, InvalidObject
from mesh.model.meta import Model
from mesh.model.schema import read
from mesh.sources.manifest import UnreadableError, read_documents
from mesh.sources.tree import is_manifest

# Of a lab.
MAX_NAME = 32
# A node's range: IPv4 leaves 253 addresses for pods.
NODE_PREFIXES = (24, 64)
MAX_PODS_PER_NODE = 253
# "node/a" and "outside/client" name places beside the pods' "NAMESPACE/NAME".
RESERVED_NAMESPACES = ("node", "outside")

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=63, pattern=s.DNS_LABEL)]
LabName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_NAME, pattern=s.DNS_LABEL)]
Protocol: TypeAlias = Literal["TCP", "UDP"]
# An IPv4 and an IPv6 range.
Range: TypeAlias = Annotated[tuple[str, ...], Meta(min_length=2, max_length=2)]


class RangesConfig(Model, frozen=True, kw_only=True):
    pods: Range = ("10.244.0.0/16", "fd00:10:244::/48")
    services: Range = ("10.96.0.0/16", "fd00:10:96::/112")
    nodes: Range = ("172.18.0.0/24", "fd00:172:18::/64")
    outside: Range = ("192.168.18.0/24", "fd00:192:168::/64")


class NamedConfig(Model, frozen=True, kw_only=True):
    """A node, or a client outside."""

    name: Name


class NamespaceConfig(Model, frozen=True, kw_only=True):
    name: Name
    labels: dict[str, str] = msgspec.field(default_factory=dict)
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class ContainerPort(Model, frozen=True, kw_only=True):
    name: str = ""
    port: s.PortNumber
    protocol: Protocol = "TCP"


class PodConfig(Model, frozen=True, kw_only=True):
    """`uid`: of a pod that an API server has, which no file says."""

    name: Name
    namespace: Name = "default"
    replicas: Annotated[int, Meta(ge=1, le=500)] | None = None
    node: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] = msgspec.field(default_factory=dict)
    service_account: Name = "default"
    command: tuple[str, ...] = ()
    env: dict[str, str] = msgspec.field(default_factory=dict)
    ports: tuple[ContainerPort, ...] = ()
    uid: str = ""

    def names(self) -> tuple[str, ...]:
        if self.replicas is None:
            return (self.name,)
        return tuple(f"{self.name}-{number + 1}" for number in range(self.replicas))

    def all_labels(self) -> dict[str, str]:
        return {"app": self.name} if self.labels is None else self.labels


class ServicePortConfig(Model, frozen=True, kw_only=True):
    """`target_port` None is the same as `port`; a string is the name of a port of the pods."""

    name: str = ""
    port: s.PortNumber
    target_port: s.PortNumber | str | None = None
    protocol: Protocol = "TCP"
    app_protocol: str | None = None


class ServiceConfig(Model, frozen=True, kw_only=True):
    name: Name
    namespace: Name = "default"
    selector: dict[str, str] | None = None
    headless: bool = False
    session_affinity: Literal["None", "ClientIP"] = "None"
    ports: tuple[ServicePortConfig, ...] = ()

    def all_selector(self) -> dict[str, str]:
        return {"app": self.name} if self.selector is None else self.selector


class LabConfig(Model, frozen=True, kw_only=True):
    name: LabName = "lab"
    ranges: RangesConfig = RangesConfig()
    nodes: tuple[NamedConfig, ...]
    outside: tuple[NamedConfig, ...] = ()
    pods: tuple[PodConfig, ...] = ()
    services: tuple[ServiceConfig, ...] = ()
    namespaces: tuple[NamespaceConfig, ...] = ()
    manifests: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    trust_domain: str = "cluster.local"
    http_in_kernel: bool = True
    svid_life: s.Duration = "1h"


def read_config(file: Path) -> LabConfig:
    """LabError: it cannot be read, or breaks the format; one line for each thing that is wrong."""
    try:
        documents = read_documents(file.read_bytes())
    except OSError as error:
        raise LabError(f"{file}: cannot be read: {error.strerror}") from None
    except UnreadableError as error:
        raise LabError(f"{file}: {error}") from None
    if len(documents) != 1:
        raise LabError(f"{file}: has {len(documents)} YAML documents: a lab is exactly one")
    wrong = [f"{file}: {path}: {what}" for path, what in documents[0].errors]
    if wrong:
        raise LabError("\n".join(wrong))
    try:
        config = read(documents[0].value, LabConfig)
        errors = (*_broken(config), *_missing(config, file.parent))
        if errors:
            raise InvalidObject(errors)
    except InvalidObject as invalid:
        raise LabError("\n".join(f"{file}: {error}" for error in invalid.errors)) from None
    return config


def _broken(config: LabConfig) -> Iterator[FieldError]:
    """What the schema does not say."""
    if not config.nodes:
        yield FieldError("nodes", "a lab has at least one node", "add one, such as {name: a}")
    try:
        check_trust_domain(config.trust_domain)
    except BadSpiffeId as error:
        yield FieldError("trustDomain", "the name of a trust domain", str(error))
    yield from _ranges(config)
    yield from _twice("nodes", ((f"nodes[{i}]", one.name) for i, one in enumerate(config.nodes)))
    yield from _twice(
        "outside", ((f"outside[{i}]", one.name) for i, one in enumerate(config.outside))
    )
    yield from _twice(
        "pods",
        (
            (f"pods[{i}]", f"{pod.namespace}/{name}")
            for i, pod in enumerate(config.pods)
            for name in pod.names()
        ),
    )
    yield from _twice(
        "services",
        (
            (f"services[{i}]", f"{one.namespace}/{one.name}")
            for i, one in enumerate(config.services)
        ),
    )
    yield from _twice(
        "namespaces",
        ((f"namespaces[{i}]", one.name) for i, one in enumerate(config.namespaces)),
    )
    for i, one in enumerate(config.namespaces):
        yield from _labels(f"namespaces[{i}].labels", one.labels)
    nodes = [node.name for node in config.nodes]
    for i, pod in enumerate(config.pods):
        yield from _pod(f"pods[{i}]", pod, nodes)
    for i, service in enumerate(config.services):
        yield from _service(f"services[{i}]", service, config.pods)


def _missing(config: LabConfig, directory: Path) -> Iterator[FieldError]:
    for i, text in enumerate(config.manifests):
        path = directory / text
        if not path.is_dir() and not (path.is_file() and is_manifest(path.name)):
            rule = "a directory, or a file *.yaml, *.yml or *.json"
            yield FieldError(f"manifests[{i}]", rule, f"{path} is none: name one that is there")


def _twice(what: str, named: Iterable[tuple[str, str]]) -> Iterator[FieldError]:
    first: dict[str, str] = {}
    for path, name in named:
        if name in first:
            where = f"{name!r} is also that of {first[name]}: choose another one"
            yield FieldError(f"{path}.name", f"names of {what} are unique", where)
        first.setdefault(name, path)


def _ranges(config: LabConfig) -> Iterator[FieldError]:
    """Right families, room enough, and none inside another."""
    found: list[tuple[str, IPv4Network | IPv6Network]] = []
    counts = {"services": len(config.services) + 10, "nodes": len(config.nodes) + 2}
    for field in ("pods", "services", "nodes", "outside"):
        for i, text in enumerate(getattr(config.ranges, field)):
            path, version = f"ranges.{field}[{i}]", (4, 6)[i]
            try:
                network = ip_network(text)
            except ValueError as error:
                yield FieldError(path, "an address range", f"{error}: write such as 10.96.0.0/16")
                continue
            if network.version != version:
                rule = "the first range is IPv4, the second IPv6"
                yield FieldError(path, rule, f"{text} is IPv{network.version}: change their order")
                continue
            if field == "pods":
                room = 2 ** max(0, NODE_PREFIXES[i] - network.prefixlen)
                enough = network.prefixlen <= NODE_PREFIXES[i] and room >= len(config.nodes)
                need = f"a /{NODE_PREFIXES[i]} for each of {len(config.nodes)} nodes"
            else:
                need_count = counts.get(field, len(config.outside) + 2)
                enough, need = network.num_addresses > need_count, f"{need_count} addresses"
            if not enough:
                yield FieldError(path, f"has room for {need}", f"{text} has not: take a larger one")
            for other_path, other in found:
                if other.version == network.version and other.overlaps(network):
                    rule = f"does not overlap with {other_path}"
                    yield FieldError(path, rule, f"{text} and {other} do")
            found.append((path, network))


def _pod(path: str, pod: PodConfig, nodes: list[str]) -> Iterator[FieldError]:
    if pod.namespace in RESERVED_NAMESPACES:
        rule = f"{' and '.join(RESERVED_NAMESPACES)} are no namespaces in a lab"
        yield FieldError(f"{path}.namespace", rule, "choose another one")
    if pod.node is not None and pod.node not in nodes:
        have = f"{pod.node!r} is not: the lab has {', '.join(nodes) or 'none'}"
        yield FieldError(f"{path}.node", "one of the lab's nodes", have)
    yield from _labels(f"{path}.labels", pod.all_labels())
    names = Counter(port.name for port in pod.ports if port.name)
    for name, count in names.items():
        if count > 1:
            yield FieldError(f"{path}.ports", "names of ports are unique", f"{name!r} stands twice")
    for key in pod.env:
        if not key or "=" in key or "\0" in key + pod.env[key]:
            rule = 'a name without "=", and neither it nor the value holds NUL'
            yield FieldError(f"{path}.env", rule, f"{key!r} breaks it")
    if any("\0" in word for word in pod.command):
        yield FieldError(f"{path}.command", "no word holds NUL", "remove it")


def _labels(path: str, labels: dict[str, str]) -> Iterator[FieldError]:
    for key, value in labels.items():
        if not re.match(s.LABEL_KEY, key):
            yield FieldError(path, "keys are label keys of Kubernetes", f"{key!r} is not")
        if len(value) > 63 or not re.match(s.LABEL_VALUE, value):
            yield FieldError(f"{path}.{key}", "a label value of Kubernetes", f"{value!r} is not")


def _service(
    path: str, service: ServiceConfig, pods: tuple[PodConfig, ...]
) -> Iterator[FieldError]:
    yield from _labels(f"{path}.selector", service.all_selector())
    if not service.all_selector():
        rule = "a Service of the lab selects pods"
        yield FieldError(f"{path}.selector", rule, "name a label of theirs, such as {app: cart}")
    if not service.ports and not service.headless:
        yield FieldError(f"{path}.ports", "at least one port", "add one, such as {port: 80}")
    yield from _twice(
        "ports of a Service",
        ((f"{path}.ports[{i}]", port.name) for i, port in enumerate(service.ports)),
    )
    targets = [
        pod
        for pod in pods
        if pod.namespace == service.namespace
        and service.all_selector().items() <= pod.all_labels().items()
    ]
    have = sorted({port.name for pod in targets for port in pod.ports if port.name})
    for i, port in enumerate(service.ports):
        if isinstance(port.target_port, str) and port.target_port not in have:
            rule = "a port number, or the name of a port of the selected pods"
            found = f"{port.target_port!r} is none: they have {', '.join(have) or 'no named port'}"
            yield FieldError(f"{path}.ports[{i}].targetPort", rule, found)
