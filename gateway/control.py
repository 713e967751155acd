"""The control plane of a node's gateways: objects and the data plane's answers in, NodeConfig
sections and statuses out.

Pure but for its own memory: no I/O, no clock. The tables, what they are keyed by and in which order
they follow from each other stand in `_rules`; each is computed by the module of its concern, and
only where something it read has changed (mesh.model.derive).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from gateway import (
    attachment,
    backend_tls,
    backends,
    classes,
    cluster_ips,
    entries,
    listeners,
    mixed,
    outcomes,
    places,
    pod_entries,
    pod_ports,
    problems,
    routes,
    services,
    states,
    status,
    tls_refs,
    workloads,
)
from gateway.addresses import pool_of
from gateway.keys import ROUTE_KINDS, PortKey, RouteKey
from gateway.listeners import Merged
from gateway.node import Mesh
from mesh.model.derive import Change, Derivation, Index, Rule
from mesh.model.meta import ObjectKey
from mesh.model.nodeconfig import Section, Settings
from mesh.model.section import (
    SETTINGS_KEY,
    SectionKey,
    certificate_key,
    entry_key,
    node_key,
    port_key,
    route_key,
    service_key,
    workload_key,
)
from mesh.policy import tables as policy
from mesh.policy.report import Row, rows

KINDS = (
    "Namespace",
    "Service",
    "EndpointSlice",
    "Secret",
    "ConfigMap",
    "Pod",
    "Node",
    "GatewayClass",
    "Gateway",
    "ListenerSet",
    "ReferenceGrant",
    "BackendTLSPolicy",
)


class Options(msgspec.Struct, frozen=True):
    """`addresses`: the pool, CIDRs and addresses; empty: no pool, and Gateways that name no address
    listen on `bind_address` and say `advertise` in status.addresses. `mesh_addresses`: where the
    proxy takes what workloads ask Services for, at most one of each family; empty: there is no
    mesh. `node`: this node's name, as in Pods' spec.nodeName. `authority`: there is one, so that
    workloads have identities of `trust_domain` and connect to other nodes by mutual TLS.
    `policy_audit`: what policies refuse is only told."""

    controller_name: str = "weft.dev/gateway-controller"
    addresses: tuple[str, ...] = ()
    bind_address: str = "0.0.0.0"
    advertise: tuple[str, ...] = ()
    settings: Settings = Settings()
    node: str = ""
    mesh_addresses: tuple[str, ...] = ()
    authority: bool = False
    trust_domain: str = "cluster.local"
    policy_audit: bool = False

    @property
    def mesh(self) -> Mesh:
        trust_domain = self.trust_domain if self.authority else ""
        return Mesh(self.node, self.mesh_addresses, trust_domain)


class Outcome(NamedTuple):
    """What follows from a change. `statuses`: None where an object has none any more; their
    conditions have no times yet (gateway.status.with_transition_times). `problems`: what is wrong
    with an object and has no place in a status; None: nothing any more. `ports`: all that are
    wanted now. `failures`: defects of ours, by table and key; what they concern is absent."""

    put: dict[SectionKey, Section]
    remove: tuple[SectionKey, ...]
    statuses: dict[tuple[str, ObjectKey], msgspec.Struct | None]
    problems: dict[tuple[str, ObjectKey], tuple[str, ...] | None]
    ports: frozenset[PortKey]
    failures: Mapping[tuple[str, Any], Exception] = {}


class ControlPlane:
    def __init__(self, options: Options) -> None:
        """ValueError: the pool is not made of addresses and CIDRs, bind_address is none, or there
        are two mesh addresses of one family."""
        ipaddress.ip_address(options.bind_address)
        pool_of(options.addresses)
        options.mesh.check()
        self._options = options
        self._derivation = Derivation(
            (*KINDS, "Route", "Policy", "refusals", "binds"), _rules(options), _indexes(options)
        )
        self._started = False

    def apply(
        self,
        changes: Mapping[str, Mapping[ObjectKey, Any]],
        *,
        refusals: Mapping[SectionKey, str | None] = {},
        binds: Mapping[PortKey, str | None] = {},
    ) -> Outcome:
        """Take changed objects (None: gone) by kind, sections that the data plane refused (None: no
        longer), and ports ("": bound, text: why not, None: not known). Kinds that are not modelled
        here are ignored."""
        inputs: dict[str, Mapping[Any, Any]] = {
            kind: objects for kind, objects in changes.items() if kind in KINDS
        }
        inputs["Route"] = {
            RouteKey(kind, *key): route
            for kind in ROUTE_KINDS
            for key, route in changes.get(kind, {}).items()
        }
        inputs["Policy"] = dict(policy.inputs(changes))
        inputs["refusals"], inputs["binds"] = refusals, binds
        changed = self._derivation.apply(inputs)
        put: dict[SectionKey, Section] = {}
        remove: list[SectionKey] = []
        if not self._started:
            self._started = True
            put[SETTINGS_KEY] = self.settings
            put.update(self._options.mesh.sections())
        for table, section_key in _SECTIONS.items():
            for key, change in changed.get(table, {}).items():
                if change.new is None:
                    remove.append(section_key(key))
                else:
                    put[section_key(key)] = change.new
        # The same key may go in one table and come in another.
        gone = tuple(key for key in remove if key not in put)
        return Outcome(
            put,
            gone,
            _by_object(changed, _STATUSES, ("route_status", "network_policy_status")),
            _by_object(changed, _PROBLEMS, ("route_problems", "network_policy_problems")),
            self._options.mesh.ports.union(self._derivation.tables["ports"]),  # type: ignore[arg-type]
            dict(self._derivation.failures),
        )

    @property
    def settings(self) -> Settings:
        """The proxies'."""
        gateway = self._options.mesh.gateway_spiffe_id
        return msgspec.structs.replace(self._options.settings, gateway_spiffe_id=gateway)

    def wanted_secrets(self) -> frozenset[ObjectKey]:
        """The Secrets that Gateways refer to and may."""
        found: Mapping[Any, Any] = self._derivation.indexes["wanted_secrets"]
        return frozenset(found)

    def gateway_ports(self, gateway: ObjectKey) -> tuple[int, ...]:
        """The ports of a Gateway's listeners, those of its ListenerSets too, in order."""
        merged: tuple[Merged, ...] = self._derivation.tables["merged"].get(gateway, ())
        return tuple(sorted({m.spec.port for m in merged if m.problem is m.conflict is None}))

    def policies(self) -> tuple[Row, ...]:
        """Whom the policies select, and which are refused."""
        return tuple(rows(self._derivation.tables, self._derivation.indexes))


def _by_object(
    changed: Mapping[str, Mapping[Any, Change]],
    tables: Mapping[str, str],
    of_kinds: tuple[str, ...],
) -> dict[tuple[str, ObjectKey], Any]:
    """The changed entries of `tables` (of objects of one kind) and of those in `of_kinds`, whose
    keys name the kind."""
    result: dict[tuple[str, ObjectKey], Any] = {}
    for table, kind in tables.items():
        for key, change in changed.get(table, {}).items():
            result[kind, key] = change.new
    for table in of_kinds:
        for key, change in changed.get(table, {}).items():
            result[key.kind, ObjectKey(key.namespace, key.name)] = change.new
    return result


# The tables whose entries are sections, and those that are statuses or problems.
_SECTIONS: dict[str, Callable[[Any], SectionKey]] = {
    "ports": lambda key: port_key(*key),
    "certificates": lambda key: certificate_key(*key),
    "sections": lambda key: route_key(*key),
    "clusters": lambda key: key.section,
    "service_entries": lambda key: entry_key(*key),
    "gateway_entries": lambda key: entry_key(key[0], key[1], "TCP"),
    "pod_entries": lambda key: entry_key(key[0], key[1], "TCP"),
    "service_sections": lambda key: service_key(*key),
    "workload_sections": lambda key: workload_key(*key),
    "nodes": lambda key: node_key(key.name),
    **policy.SECTIONS,
}
_STATUSES = {
    "class_status": "GatewayClass",
    "gateway_status": "Gateway",
    "listener_set_status": "ListenerSet",
    "policy_status": "BackendTLSPolicy",
}
_PROBLEMS = {
    "namespace_problems": "Namespace",
    "node_problems": "Node",
    "pod_problems": "Pod",
    "policy_problems": "BackendTLSPolicy",
    "service_problems": "Service",
}


def _rules(options: Options) -> tuple[Rule, ...]:
    name = options.controller_name
    place = places.places(options.bind_address, options.advertise)
    mesh = options.mesh
    return (
        # What is ours, and who listens to what.
        Rule("classes", "GatewayClass", classes.classes(name)),
        Rule("gateways", "Gateway", classes.gateways),
        Rule("set_parents", "ListenerSet", listeners.set_parents),
        Rule("merged", "gateways", listeners.merged),
        Rule("gateway_doors", "gateways", listeners.gateway_doors),
        Rule("set_doors", "set_parents", listeners.set_doors),
        # Nodes and workloads.
        Rule("node_states", "Node", workloads.node_states),
        Rule("node_holders", "nodes_at", workloads.node_holders),
        Rule("nodes", "node_states", workloads.nodes),
        Rule("namespaces", "Namespace", workloads.namespaces),
        Rule("pods", "Pod", workloads.pods),
        Rule("holders", "pods_at", workloads.holders),
        Rule("set_numbers", "label_sets", workloads.numbers),
        Rule("identities", "label_sets", workloads.identities),
        *policy.before_workloads(mesh.node, options.policy_audit),
        Rule("workloads", "pods", workloads.workloads(mesh)),
        *policy.rules(mesh.on, options.policy_audit),
        # Addresses and ports.
        Rule("service_claims", "Service", cluster_ips.claims),
        Rule("service_owners", "claimed_by", cluster_ips.owners),
        Rule("cluster_ips", "service_claims", cluster_ips.cluster_ips(mesh)),
        Rule("requests", "gateways", places.requests(options.addresses)),
        Rule("allocation", "requested", places.allocation),
        Rule("places", "gateways", place),
        Rule("claims", "gateways", places.claims),
        Rule("owners", "claimants", places.owners(mesh)),
        # TLS material.
        Rule("secret_refs", "gateways", tls_refs.secret_refs),
        Rule("keypairs", "wanted_secrets", tls_refs.keypairs),
        Rule("certificates", "keypairs", tls_refs.certificates),
        Rule("gateway_tls", "gateways", tls_refs.gateway_tls),
        # Listeners and the ports they are served on.
        Rule("states", "gateways", states.states),
        Rule("ports", "owners", states.ports),
        # Routes.
        Rule("service_doors", "Service", services.doors(mesh)),
        Rule("policies", "BackendTLSPolicy", backend_tls.policies),
        Rule("parents", "Route", attachment.parents(mesh)),
        Rule("translations", "parents", routes.translate),
        Rule("candidates", "parents", outcomes.candidates),
        Rule("mixed", "grpc_listeners", mixed.mixed),
        Rule("attached", "parents", attachment.attached),
        Rule("routes", "attached", outcomes.routes),
        Rule("sections", "routes", outcomes.sections),
        Rule("mesh_listeners", "routes_of_listener", lambda view, listener: True),
        Rule("services", "http_ports", services.services(mesh)),
        Rule("service_sections", "services", services.section),
        Rule("clusters", "cluster_users", backends.cluster(mesh)),
        Rule("service_gateways", "used_from", lambda view, pair: True),
        # Load-balancer entries.
        Rule("slice_ports", "EndpointSlice", pod_ports.slice_ports(mesh)),
        Rule("said", "slices_that_say", lambda view, said: True),
        Rule("workload_sections", "workloads", workloads.sections),
        Rule("service_entries", "service_frontends", entries.service_entry(mesh)),
        Rule("gateway_entries", "gateway_frontends", entries.gateway_entry),
        Rule("pod_entries", "said_at", pod_entries.pod_entry(mesh)),
        # Statuses, and problems of objects that have none.
        Rule("class_status", "classes", status.class_status(mesh)),
        Rule("gateway_status", "gateways", status.gateway_status),
        Rule("listener_set_status", "set_parents", status.listener_set_status),
        Rule("route_status", "attached", outcomes.route_status(name, mesh)),
        Rule("policy_status", "policies", backend_tls.policy_status(name)),
        Rule("namespace_problems", "Namespace", problems.of_namespace(mesh)),
        Rule("node_problems", "Node", problems.of_node),
        Rule("pod_problems", "Pod", problems.of_pod(mesh)),
        Rule("policy_problems", "policies", problems.of_policy),
        Rule("route_problems", "Route", problems.of_route),
        Rule("service_problems", "Service", problems.of_service(mesh)),
    )


def _indexes(options: Options) -> tuple[Index, ...]:
    return (
        Index("grants_in", "ReferenceGrant", lambda key, grant: (key.namespace,)),
        Index("slices_of", "EndpointSlice", backends.slice_service),
        Index("policies_on", "BackendTLSPolicy", backend_tls.targets),
        Index("nodes_at", "node_states", workloads.nodes_at),
        Index("claimed_by", "service_claims", cluster_ips.claimed),
        Index("cluster_ips_at", "cluster_ips", cluster_ips.addresses),
        Index("service_frontends", "cluster_ips", cluster_ips.frontends),
        Index("sets_of", "set_parents", listeners.set_gateway),
        Index("default_gateways", "gateways", classes.default_scope),
        Index("requested", "requests", lambda key, request: ("",)),
        Index("claimants", "claims", lambda key, claims: claims),
        Index("wanted_secrets", "secret_refs", tls_refs.wanted_secrets),
        Index("gateway_frontends", "ports", entries.gateway_frontends(options.advertise)),
        Index("pods_at", "pods", workloads.pods_at),
        Index("label_sets", "pods", workloads.label_sets),
        Index("sets_of_number", "set_numbers", workloads.sets_of_number),
        Index("http_ports", "service_doors", services.http_ports),
        Index("routes_of_listener", "routes", outcomes.mesh_listeners),
        Index("listeners_of_service", "mesh_listeners", services.listener_port),
        Index("slices_that_say", "slice_ports", pod_ports.said_in_slice),
        Index("slices_that_say", "judged", pod_ports.said_by_policy),
        Index("said_at", "said", pod_ports.said_at),
        Index("said_of", "said", pod_ports.said_of),
        Index("grpc_listeners", "candidates", mixed.grpc_listeners),
        Index("http_at", "candidates", mixed.http_at),
        Index("http_under", "candidates", mixed.http_under),
        Index("rejected", "mixed", mixed.rejected),
        Index("routes_on", "routes", outcomes.route_listeners),
        Index("cluster_users", "routes", outcomes.route_clusters),
        Index("cluster_users", "services", services.own_clusters),
        Index("used_from", "routes", outcomes.service_gateways),
        *policy.INDEXES,
        Index("gateways_of_service", "service_gateways", lambda pair, _: (pair[0],)),
    )
