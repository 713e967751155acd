"""Who is meant: selectors, entities, ranges of addresses and Services as numbers of identities.

Functions of the derivation (mesh.policy.tables has the tables they read). A selector reads only
the sets of labels that stand under one of its own terms, so that a new pod makes those selectors
think again that could mean it. Knows nothing of rules beyond whom they name.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple, Protocol, TypeAlias

from mesh.model.core import EndpointSlice, Namespace, Service
from mesh.model.derive import View
from mesh.model.identity import Reserved
from mesh.model.meta import ObjectKey
from mesh.model.node import Node
from mesh.model.nodeconfig import NodeSection
from mesh.policy import cidr
from mesh.policy.spec import Cidr, LabelKey, Peers, Selector, ServiceRef, Spec, SpecKey

Identities: TypeAlias = frozenset[int]
_NOBODY: Identities = frozenset()

# Under what a set of labels stands: a label with its value, or everything.
Bucket: TypeAlias = tuple[str, str, str]
_EVERY: Bucket = ("", "", "")
_WHOLE = ("0.0.0.0/0", "::/0")
# Ranges by those in which they lie: of specs that select pods of this node, whose addresses have
# their identities here; and of all, for selectors, which are there before it is known whom they are
# about.
_HERE, _ALL = "ranges_within_here", "ranges_within"
_API_SERVER = ObjectKey("default", "kubernetes")
_SERVICE_NAME = "kubernetes.io/service-name"
_NAME_LABEL = "kubernetes.io/metadata.name"

_ENTITIES = {
    "host": Reserved.HOST,
    "remote-node": Reserved.REMOTE_NODE,
    "ingress": Reserved.INGRESS,
    "health": Reserved.HEALTH,
    "init": Reserved.INIT,
    "unmanaged": Reserved.UNMANAGED,
}


class Labels(Hashable, Protocol):
    """A set of labels (gateway.workloads.LabelSet)."""

    @property
    def namespace(self) -> str: ...
    @property
    def service_account(self) -> str: ...
    @property
    def labels(self) -> tuple[tuple[str, str], ...]: ...


# --- selectors -----------------------------------------------------------------------------------


def buckets(labels: Labels, number: int) -> Iterator[Bucket]:
    """Under what a set of labels is looked up (for an index)."""
    yield _EVERY
    yield "namespace", "", labels.namespace
    yield "account", "", labels.service_account
    for key, value in labels.labels:
        yield "label", key, value


def selectors(key: SpecKey, spec: Spec) -> Iterator[Selector]:
    """All that a spec selects by labels (for an index)."""
    yield spec.subject
    for side in (spec.ingress, spec.egress):
        yield from side.requires
        for rule in side.rules:
            if rule.peers is not None:
                yield from rule.peers.selectors


def selected(view: View, selector: Selector) -> Identities:
    """Whom a selector means."""
    found: set[int] = set()
    for labels in _candidates(view, selector):
        if all(term.holds(_value(view, labels, term.key)) for term in selector.terms):
            found.add(view.get("identities", labels))
    if any(term.key.kind == "reserved" for term in selector.terms):
        for name in (*_ENTITIES, "world", "kube-apiserver"):
            if all(term.holds(_reserved(term.key, name)) for term in selector.terms):
                found |= entity(view, name, _ALL) or _NOBODY
    return frozenset(found)


def _candidates(view: View, selector: Selector) -> Iterable[Labels]:
    """The sets of labels that stand under the term that leaves the fewest, by its kind."""
    order = ("label", "account", "namespace")
    narrow = [term for term in selector.terms if term.operator == "In" and term.key.kind in order]
    if not narrow:
        return view.bucket("labelled", _EVERY)
    term = min(narrow, key=lambda one: (order.index(one.key.kind), len(one.values), one))
    return {
        labels
        for value in term.values
        for labels in view.bucket("labelled", (term.key.kind, term.key.name, value))
    }


def _value(view: View, labels: Labels, key: LabelKey) -> str | None:
    match key.kind:
        case "label":
            return next((value for name, value in labels.labels if name == key.name), None)
        case "namespace":
            return labels.namespace
        case "account":
            return labels.service_account
        case "namespace label":
            return _namespace_label(view, labels.namespace, key.name)
        case _:
            return None


def _namespace_label(view: View, namespace: str, name: str) -> str | None:
    """The API server labels each namespace with its name."""
    if name == _NAME_LABEL:
        return namespace
    found: Namespace | None = view.get("Namespace", ObjectKey("", namespace))
    return found.metadata.labels.get(name) if found is not None else None


def _reserved(key: LabelKey, name: str) -> str | None:
    return "" if key == LabelKey("reserved", name) else None


# --- ranges of addresses -------------------------------------------------------------------------


def ranges(key: SpecKey, spec: Spec) -> Iterator[str]:
    """All ranges that a spec names, those that it excepts too (for an index)."""
    for side in (spec.ingress, spec.egress):
        for rule in side.rules:
            for one in rule.peers.cidrs if rule.peers is not None else ():
                yield one.cidr
                yield from one.excepts


def range_number(view: View, text: str) -> int:
    return cidr.number(text)


def ranges_of_number(text: str, number: int) -> Iterator[int]:
    """The number of a range (for an index)."""
    yield number


def range_identity(view: View, text: str) -> int:
    """The identity of a range: its number, and what tells it from others with the same."""
    number: int = view.get("range_numbers", text)
    rivals = view.bucket("ranges_of_number", number)
    return cidr.apart(number, sorted(rivals).index(text) if len(rivals) > 1 else 0)


def enclosing(text: str, identity: int) -> Iterator[str]:
    """The ranges in which one lies (for an index)."""
    return cidr.around(text)


def _within(view: View, text: str, index: str = _HERE) -> Identities:
    """A range and all that are within it, for an address has the identity of the longest."""
    inside = view.bucket(index, text)
    return frozenset(view.get("range_identities", one) for one in inside)


def _in_range(view: View, one: Cidr) -> Identities:
    """LookupError: it cannot be told from other ranges; then its policy denies."""
    for text in (one.cidr, *one.excepts):
        if view.get("range_identities", text) is None:
            raise LookupError(f"{text} has no identity")
    found = _within(view, one.cidr) - _api_at(view, "host", "remote-node")
    for part in one.excepts:
        found -= _within(view, part)
    return found


# --- nodes and the API server ---------------------------------------------------------------------


class Outside(NamedTuple):
    """The addresses of an EndpointSlice that are no pod's, as ranges; `api_server`: they are the
    API server's."""

    ranges: frozenset[str]
    api_server: bool


def node_addresses(key: ObjectKey, node: NodeSection) -> Iterator[str]:
    """The addresses of a node, as ranges (for an index)."""
    return map(cidr.canonical, node.addresses)


def pod_ranges(key: ObjectKey, node: Node) -> Iterator[str]:
    """From which ranges a node's pods have their addresses (for an index). Whoever has one of them
    and is not known yet is a new pod, not somebody out in the world."""
    for text in node.spec.pod_cidrs:
        with suppress(ValueError):
            yield cidr.canonical(text)


def outside(view: View, key: ObjectKey) -> Outside | None:
    """None: there are none, or no policy could mean them by their Service."""
    piece: EndpointSlice = view.get("EndpointSlice", key)
    service = ObjectKey(key.namespace, piece.metadata.labels.get(_SERVICE_NAME, ""))
    api_server = service == _API_SERVER
    if piece.address_type == "FQDN" or not (api_server or _asked_for(view, service)):
        return None
    found = frozenset(
        cidr.canonical(address)
        for endpoint in piece.endpoints
        for address in endpoint.addresses[:1]
        if view.get("holders", address) is None
    )
    return Outside(found, api_server) if found else None


def outside_ranges(key: ObjectKey, found: Outside) -> frozenset[str]:
    """For an index."""
    return found.ranges


def api_ranges(key: ObjectKey, found: Outside) -> frozenset[str]:
    """Those of the API server (for an index)."""
    return found.ranges if found.api_server else frozenset()


def api_places(node: str) -> Callable[[View, str], str]:
    """Which entity an address of the API server belongs to besides; `node`: this node's name."""

    def compute(view: View, text: str) -> str:
        names = {key.name for key in view.bucket("node_at", text)}
        if not names:
            return "world"
        return "host" if node in names else "remote-node"

    return compute


def _asked_for(view: View, service: ObjectKey) -> bool:
    return bool(
        view.bucket("services_asked_for", service)
        or view.bucket("services_asked_for", ObjectKey(service.namespace, ""))
        or view.bucket("services_asked_for", ObjectKey("", ""))
    )


def services(key: SpecKey, spec: Spec) -> Iterator[ObjectKey]:
    """The Services that a spec names; those by labels under an empty name (for an index)."""
    for rule in spec.egress.rules:
        for ref in rule.peers.services if rule.peers is not None else ():
            yield ObjectKey(ref.namespace, ref.name)


def slice_of(key: ObjectKey, piece: EndpointSlice) -> Iterator[ObjectKey]:
    """The Service of an EndpointSlice (for an index)."""
    yield ObjectKey(key.namespace, piece.metadata.labels.get(_SERVICE_NAME, ""))


def service_scopes(key: ObjectKey, service: Service) -> Iterator[str]:
    """Where Services are looked for by labels (for an index)."""
    yield key.namespace
    yield ""


def _service(view: View, ref: ServiceRef) -> Identities:
    """The endpoints of Services: pods by identity, others by address."""
    if ref.selector is None:
        names = [ObjectKey(ref.namespace, ref.name)]
    else:
        names = [
            key
            for key in view.bucket("services_in", ref.namespace)
            if _selects(ref.selector, view.get("Service", key))
        ]
    found: set[int] = set()
    for name in names:
        for piece in view.bucket("slices_by_service", name):
            found.update(_endpoints(view, view.get("EndpointSlice", piece)))
    return frozenset(found)


def _selects(selector: Selector, service: Service) -> bool:
    labels = service.metadata.labels
    return all(term.holds(labels.get(term.key.name)) for term in selector.terms)


def _endpoints(view: View, piece: EndpointSlice) -> Iterator[int]:
    for endpoint in piece.endpoints if piece.address_type != "FQDN" else ():
        for address in endpoint.addresses[:1]:
            holder = view.get("holders", address)
            if holder is not None:
                section = view.get("workloads", holder.pod)
                if section is not None:
                    yield section.identity
            else:
                identity = view.get("range_identities", cidr.canonical(address))
                if identity is not None:
                    yield identity


def _api_server(view: View) -> Identities:
    """The addresses of the API server have identities of their own, also where a node has them."""
    return _api_at(view, "world", "host", "remote-node") | {Reserved.KUBE_APISERVER}


def _api_at(view: View, *places: str) -> Identities:
    """Those of them that belong to one of these entities besides."""
    found = {text: view.get("api_places", text) for text in view.bucket("api_server", "")}
    those = (view.get("range_identities", text) for text, at in found.items() if at in places)
    return frozenset(one for one in those if one is not None)


# --- entities ------------------------------------------------------------------------------------


def entity(view: View, name: str, index: str = _HERE) -> Identities | None:
    """None: everybody. `index`: the one of ranges."""
    match name:
        case "all":
            return None
        case "none":
            return _NOBODY
        case "world":
            inside = (_within(view, one, index) for one in _WHOLE)
            outer = frozenset((Reserved.WORLD,)).union(*inside)
            return outer - _api_at(view, "host", "remote-node")
        case "cluster":
            pods = (view.get("identities", one) for one in view.bucket("labelled", _EVERY))
            return frozenset((*pods, *_ENTITIES.values())) | _api_server(view)
        case "kube-apiserver":
            return _api_server(view)
    return _api_at(view, name) | {_ENTITIES[name]}


def resolve(view: View, peers: Peers | None) -> Identities | None:
    """Whom a rule means; None: everybody."""
    if peers is None:
        return None
    found: set[int] = set()
    for selector in peers.selectors:
        found |= view.get("selected", selector) or _NOBODY
    for name in peers.entities:
        those = entity(view, name)
        if those is None:
            return None
        found |= those
    for one in peers.cidrs:
        found |= _in_range(view, one)
    for ref in peers.services:
        found |= _service(view, ref)
    return frozenset(found)
