"""Which plans a node's requests need: those of all that its workloads may ask of one another.

A plan is of one listener and of two lists of policy rules, the client's and the endpoint's; each
worker makes the ones that its connections need (l7proxy.pairs), the agent all of them, from the
same sections. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from l7proxy.automaton_plan import HttpRules, Plan, plan
from l7proxy.credentials import Credentials
from l7proxy.field_rules import Refused
from l7proxy.peers import Caller, Peers
from l7proxy.policies import Policies
from l7proxy.routing import RouteIndex
from mesh.model.nodeconfig import (
    ClusterSection,
    Endpoint,
    NodeSection,
    Section,
    ServiceSection,
    Settings,
    WorkloadSection,
)
from mesh.model.policyconfig import CidrSection, PolicySection
from mesh.model.routeconfig import RouteSection
from mesh.model.section import SETTINGS_KEY, SectionKey, service_listener

_NO_LISTENER = ""


class Plans:
    """What plans follow from, as far as it is in force."""

    def __init__(self) -> None:
        self._settings = Settings()
        self._routes = RouteIndex()
        self._peers = Peers(Credentials(), self._settings)
        self._policies = Policies(self._peers)
        self._sections: dict[SectionKey, Section] = {}

    def apply(self, put: Mapping[SectionKey, Section], remove: Iterable[SectionKey] = ()) -> None:
        """Sections that workers refuse are refused here as well: those before stay."""
        for key in remove:
            self._remove(key, self._sections.pop(key, None))
        for key, section in put.items():
            try:
                self._put(key, section)
            except Refused:
                if not isinstance(section, PolicySection):
                    continue
            self._sections[key] = section
        self._policies.told()

    def _put(self, key: SectionKey, section: Section) -> None:
        match section:
            case Settings():
                self._settings = self._peers.settings = section
            case RouteSection():
                self._routes.put(key, section)
            case WorkloadSection():
                self._peers.put_workload(key, section)
            case NodeSection():
                self._peers.put_node(key, section)
            case CidrSection() | PolicySection():
                self._policies.put(key, section)

    def _remove(self, key: SectionKey, section: Section | None) -> None:
        match section:
            case Settings():
                self._put(SETTINGS_KEY, Settings())
            case RouteSection():
                self._routes.remove(key)
            case WorkloadSection():
                self._peers.remove_workload(key)
            case NodeSection():
                self._peers.remove_node(key)
            case CidrSection() | PolicySection():
                self._policies.remove(key)

    def wanted(self) -> dict[int, Plan]:
        """By generation."""
        asked: set[tuple[str, HttpRules, HttpRules]] = set()
        clients = self._clients()
        for listener, namespace, endpoints in self._ways():
            some = [one for one in clients if namespace in (None, one.namespace)]
            asked |= {
                (listener, *lists)
                for endpoint in endpoints
                for client in some
                if (lists := self._lists(client, endpoint)) is not None
            }
        made = (plan(one, self._routes, lists, self._settings) for one, *lists in asked)
        return {one.generation: one for one in made}

    def _clients(self) -> list[WorkloadSection]:
        """One workload of this node for each that policies and routes tell apart."""
        local = (
            one
            for one in self._sections.values()
            if isinstance(one, WorkloadSection) and one.local and one.meshed and one.addresses
        )
        return list({(one.namespace, one.identity): one for one in local}.values())

    def _lists(
        self, client: WorkloadSection, endpoint: Endpoint
    ) -> tuple[HttpRules, HttpRules] | None:
        asker = self._policies.asker(Caller(client.addresses[0]))
        return self._policies.for_kernel(asker, endpoint.address, endpoint.port)

    def _ways(self) -> Iterator[tuple[str, str | None, list[Endpoint]]]:
        """Listeners, from where they are asked (None: everywhere) and this node's endpoints that
        their requests may go to."""
        clusters: dict[str, list[SectionKey]] = {}
        for route in self._routes.routes():
            named = [
                backend.cluster
                for match in route.matches
                for backend in match.result.rule.backends
                if backend.cluster is not None
            ]
            for listener in {listener for listener, _ in route.places}:
                clusters.setdefault(listener, []).extend(named)
        for service in self._sections.values():
            if not isinstance(service, ServiceSection):
                continue
            own = self._local(service.cluster)
            yield _NO_LISTENER, None, own
            place = service.namespace, service.name, service.port
            for consumer in (None, *service.consumers):
                listener = service_listener(*place, consumer)
                local = [one for key in set(clusters.get(listener, ())) for one in self._local(key)]
                if local:
                    yield listener, consumer, local

    def _local(self, cluster: SectionKey) -> list[Endpoint]:
        section = self._sections.get(cluster)
        if not isinstance(section, ClusterSection) or section.protocol != "http":
            return []
        found = ((self._peers.at(one.address), one) for one in section.endpoints)
        return [one for workload, one in found if workload is not None and workload.local]
