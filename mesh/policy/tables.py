"""The tables of policy in the derivation: what they are keyed by, and in which order they follow.

They build on tables of gateway.control: `identities` (by set of labels), `holders` (by address),
`pods` and `workloads` (by pod), and `nodes`. Of policies it reads `Policy`, all kinds in one table.
A changed policy is computed again, and the sections of the pods that it selects or did; a new set
of labels makes those selectors think again that name one of its labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mesh.model.derive import Index, Rule, View
from mesh.model.meta import ObjectKey
from mesh.model.networkpolicy import NetworkPolicy
from mesh.model.section import SectionKey, cidr_key, policy_key
from mesh.policy import (
    audit,
    cilium,
    demands,
    judged,
    kubernetes,
    peers,
    sections,
    status,
    unreadable,
)
from mesh.policy.spec import KINDS, PolicyKey, Rulebook, Spec, SpecKey, oversized, refused

# The tables whose entries are sections.
SECTIONS: dict[str, Callable[[Any], SectionKey]] = {
    "cidr_sections": cidr_key,
    "pod_policies": lambda key: policy_key(*key),
    "unknown_pods": lambda key: policy_key("", ""),
}


def before_workloads(node: str, everything_audited: bool) -> tuple[Rule, ...]:
    """Whom policies name, and what workloads depend on. `node`: this node's name."""
    return (
        Rule("rulebooks", "Policy", rulebook),
        Rule("specs", "spec_keys", spec),
        # Whom they name.
        Rule("outside", "EndpointSlice", peers.outside),
        Rule("range_numbers", "ranges", peers.range_number),
        Rule("range_identities", "ranges", peers.range_identity),
        Rule("api_places", "api_range", peers.api_places(node)),
        Rule("selected", "selectors", peers.selected),
        # At which ports they want mutual TLS.
        Rule("port_names", "pods", sections.port_names),
        Rule("demands", "spec_keys", demands.demands(everything_audited)),
        Rule("demanded", "pods", demands.demanded),
    )


def rules(mesh: bool, everything_audited: bool) -> tuple[Rule, ...]:
    """What is in force. `mesh`: there is one on this node."""
    return (
        Rule("subjects", "spec_keys", sections.subjects),
        Rule("named_here", "spec_keys", sections.named_here),
        Rule("identities_here", "ranges_here", sections.range_here),
        Rule("cidr_sections", "ranges_told", sections.cidr_sections),
        Rule("resolved", "spec_keys", sections.resolved(everything_audited)),
        Rule("judged", "spec_keys", judged.judged),
        Rule("pod_policies", "workloads", sections.pod_policies),
        Rule("unknown_pods", "closing", sections.unknown),
        Rule("network_policy_problems", "Policy", audit.problems),
        Rule("network_policy_status", "rulebooks", status.status(mesh)),
    )


INDEXES = (
    Index("spec_keys", "rulebooks", lambda key, book: ((key, i) for i in range(len(book.specs)))),
    Index("labelled", "identities", peers.buckets),
    Index("selectors", "specs", peers.selectors),
    Index("ranges", "specs", peers.ranges),
    Index("ranges", "outside", peers.outside_ranges),
    Index("ranges_told", "specs", peers.ranges),
    Index("ranges_told", "outside", peers.outside_ranges),
    Index("ranges_told", "Node", peers.pod_ranges),
    Index("ranges_of_number", "range_numbers", peers.ranges_of_number),
    Index("ranges_within", "range_identities", peers.enclosing),
    Index("hosted", "workloads", sections.hosted),
    Index("ranges_here", "named_here", lambda key, found: found),
    Index("ranges_here", "outside", peers.outside_ranges),
    Index("ranges_here", "Node", peers.pod_ranges),
    Index("pod_ranges", "Node", peers.pod_ranges),
    Index("ranges_within_here", "identities_here", peers.enclosing),
    Index("api_range", "outside", peers.api_ranges),
    Index("api_server", "api_places", lambda text, place: ("",)),
    Index("node_at", "nodes", peers.node_addresses),
    Index("services_asked_for", "specs", peers.services),
    Index("services_in", "Service", peers.service_scopes),
    Index("slices_by_service", "EndpointSlice", peers.slice_of),
    Index("pods_of_identity", "workloads", sections.identity_of),
    Index("refused_policies", "refusals", status.refused_sections),
    Index("closing", "resolved", sections.closing),
    Index("judged_at", "judged", judged.places),
    Index("specs_on", "subjects", sections.subject_identities),
    Index("demands_on", "demands", lambda key, demand: demand.whom),
)


def inputs(
    changes: Mapping[str, Mapping[ObjectKey, Any]],
) -> Iterator[tuple[PolicyKey, Any]]:
    """The changes of policies, under the keys of the table `Policy`."""
    for kind in KINDS:
        for key, policy in changes.get(kind, {}).items():
            yield PolicyKey(kind, *key), policy


def rulebook(view: View, key: PolicyKey) -> Rulebook:
    policy = view.get("Policy", key)
    if isinstance(policy, NetworkPolicy):
        book = kubernetes.translate(policy)
    else:
        book = cilium.translate(policy)
    why = (*filter(None, (unreadable.why(policy),)), *oversized(book.specs))
    return refused(book.specs, (*book.problems, *why)) if why else book


def spec(view: View, key: SpecKey) -> Spec:
    policy, index = key
    book: Rulebook = view.get("rulebooks", policy)
    return book.specs[index]
