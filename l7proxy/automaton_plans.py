"""All plans of a node: what its workloads ask of its workloads, destination by destination.

A plan is for one listener and the policy rules of two ends (l7proxy.pairs makes the same from the
same): one for each combination that this node's pods can come to. Kept from the sections as a
worker keeps them. No I/O.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Set

from l7proxy.automaton_plan import HttpRules, Plan, plan
from l7proxy.credentials import Credentials
from l7proxy.field_rules import Refused
from l7proxy.peers import Caller, Peers
from l7proxy.policies import Policies
from l7proxy.routing import RouteIndex
from mesh.model.nodeconfig import (
    ClusterSection,
    Endpoint,
    Section,
    ServiceSection,
    Settings,
    WorkloadSection,
)
from mesh.model.policyconfig import CidrSection, PolicySection
from mesh.model.routeconfig import RouteSection
from mesh.model.section import SETTINGS_KEY, SectionKey, service_listener

_log = logging.getLogger("weft.automata")

_KINDS = (
    Settings,
    RouteSection,
    ServiceSection,
    ClusterSection,
    WorkloadSection,
    PolicySection,
    CidrSection,
)
_NOTHING: tuple[HttpRules, HttpRules] = ((), ())


class Plans:
    def __init__(self, sections: Mapping[SectionKey, Section] | None = None) -> None:
        self._settings = Settings()
        self.routes = RouteIndex()
        self._peers = Peers(Credentials(), self._settings)
        self._policies = Policies(self._peers)
        self._services: dict[SectionKey, ServiceSection] = {}
        self._clusters: dict[SectionKey, ClusterSection] = {}
        self._workloads: dict[SectionKey, WorkloadSection] = {}
        # Where each route stands.
        self._places: dict[SectionKey, tuple[str, ...]] = {}
        self._plans: dict[tuple[str, HttpRules, HttpRules], Plan] = {}
        self.apply(sections or {}, ())

    def apply(self, put: Mapping[SectionKey, Section], remove: Iterable[SectionKey]) -> bool:
        """A step from one version to the next; whether plans may have changed. What is refused
        leaves in force what a worker has in force then."""
        kinds = {type(section) for section in put.values()}
        for key in remove:
            kinds.add(self._remove(key))
        for key, section in put.items():
            try:
                self._put(key, section)
            except Refused:
                pass
            except Exception:  # of this section; the others must not wait for its mending
                _log.exception("section %s cannot be planned", key)
        self._policies.told()
        if Settings in kinds:
            self._plans.clear()
        return bool(kinds & set(_KINDS))

    def _put(self, key: SectionKey, section: Section) -> None:
        match section:
            case Settings():
                self._settings = section
            case RouteSection():
                self.routes.put(key, section)
                self._moved(key, tuple(one.listener for one in section.attachments))
            case ServiceSection():
                self._services[key] = section
            case ClusterSection():
                self._clusters[key] = section
            case WorkloadSection():
                self._peers.put_workload(key, section)
                self._workloads[key] = section
            case PolicySection() | CidrSection():
                self._policies.put(key, section)

    def _moved(self, key: SectionKey, places: tuple[str, ...]) -> None:
        """A route has changed: the plans of where it stood and where it stands are others."""
        affected = {*self._places.pop(key, ()), *places}
        if places:
            self._places[key] = places
        for one in [one for one in self._plans if one[0] in affected]:
            del self._plans[one]

    def _remove(self, key: SectionKey) -> type:
        """What it was; `object`: nothing that counts here."""
        if key == SETTINGS_KEY:
            self._settings = Settings()
            return Settings
        if key.startswith("route/"):
            self.routes.remove(key)
            self._moved(key, ())
            return RouteSection
        if self._services.pop(key, None) is not None:
            return ServiceSection
        known = self._clusters.pop(key, None) or self._workloads.pop(key, None)
        self._peers.remove_workload(key)
        self._policies.remove(key)
        return (
            object if known is None and not key.startswith(("policy/", "cidr/")) else ClusterSection
        )

    # --- plans ------------------------------------------------------------------------------------

    def all(self) -> dict[int, Plan]:
        """By generation, of all that pods of this node may be asked for."""
        here = self._here()
        asked = {_NOTHING}
        if self._policies.any:  # also pods that are asked for by their own addresses
            clusters = self._clusters.values()
            asked |= self._asked({one for cluster in clusters for one in cluster.endpoints}, "")
        found = {one.generation: one for one in self._of("", *asked)}
        for service in self._services.values():
            found |= {one.generation: one for one in self._planned(service, here)}
        return found

    def of(self, service: ServiceSection) -> list[Plan]:
        """Those of a Service port, whoever asks and wherever its pods are; the first is without
        policies."""
        return list(self._planned(service, None))

    def _planned(self, service: ServiceSection, here: Set[str] | None) -> Iterator[Plan]:
        """`here`: only what may go to these addresses."""
        place = (service.namespace, service.name, service.port)
        own = service_listener(*place)
        listeners = {own if service.producers else "": ""}
        listeners |= {service_listener(*place, one): one for one in service.consumers}
        for listener, namespace in listeners.items():
            endpoints = self._endpoints(listener, service)
            if here is not None and here.isdisjoint(one.address for one in endpoints):
                continue
            asked = {_NOTHING}
            if self._policies.any:
                asked |= self._asked(endpoints, namespace)
            yield from self._of(listener, *sorted(asked, key=repr))

    def _here(self) -> set[str]:
        local = (one for one in self._workloads.values() if one.local)
        return {address for one in local for address in one.addresses}

    def _of(self, listener: str, *asked: tuple[HttpRules, HttpRules]) -> Iterator[Plan]:
        for both in asked:
            found = self._plans.get((listener, *both))
            if found is None:
                found = plan(listener, self.routes, both, self._settings)
                self._plans[(listener, *both)] = found
            yield found

    def _endpoints(self, listener: str, service: ServiceSection) -> set[Endpoint]:
        """What requests there may go to."""
        clusters = {
            backend.cluster
            for _, match in self.routes.placed(listener)
            for backend in match.result.rule.backends
        }
        found = (self._clusters.get(one or "") for one in clusters or {service.cluster})
        return {endpoint for one in found if one is not None for endpoint in one.endpoints}

    def _asked(
        self, endpoints: Iterable[Endpoint], namespace: str
    ) -> set[tuple[HttpRules, HttpRules]]:
        """What policies ask of requests of this node's pods (of a namespace, "": of all) to those
        of its pods; what is not the kernel's to decide is left out."""
        local = [one for one in self._workloads.values() if one.local]
        here = self._here()
        result = set()
        for endpoint in endpoints:
            if endpoint.address not in here:
                continue
            for client in local:
                if namespace in ("", client.namespace):
                    asker = self._policies.asker(Caller(client.addresses[0]))
                    place = endpoint.address, endpoint.port
                    asked = self._policies.for_kernel(asker, *place, pod=True)
                    if asked is not None:
                        result.add(asked)
        return result
