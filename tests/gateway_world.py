"""A ControlPlane and the data plane that answers it, for tests in the language of manifests."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import msgspec
import trustme
import yaml

from gateway.control import ControlPlane, Options
from mesh.model.decode import decode, key_of
from mesh.model.meta import Condition, ObjectKey
from mesh.model.nodeconfig import Section
from mesh.model.section import SectionKey

Objects = dict[str, dict[ObjectKey, Any]]

CLASS = """
apiVersion: gateway.networking.k8s.io/v1
kind: GatewayClass
metadata: {name: weft, generation: 3}
spec: {controllerName: weft.dev/gateway-controller}
"""


def objects(text: str, generation: int | None = 1) -> Objects:
    """The objects of a multi-document YAML text, by kind and key."""
    result: Objects = {}
    for raw in yaml.safe_load_all(text):
        if raw:
            _default(raw, generation)
            obj = decode(raw)
            result.setdefault(obj.kind, {})[key_of(obj)] = obj
    return result


def _default(raw: dict[str, Any], generation: int | None) -> None:
    """Short manifests: the API version follows from the kind, and everything has a generation."""
    kind = raw["kind"]
    versions = {
        "EndpointSlice": "discovery.k8s.io/v1",
        "NetworkPolicy": "networking.k8s.io/v1",
        "CiliumNetworkPolicy": "cilium.io/v2",
        "CiliumClusterwideNetworkPolicy": "cilium.io/v2",
    }
    core = ("Namespace", "Service", "Secret", "ConfigMap", "Pod", "Node")
    gateway_api = "gateway.networking.k8s.io/v1"
    raw.setdefault("apiVersion", "v1" if kind in core else versions.get(kind, gateway_api))
    if generation is not None:
        raw["metadata"].setdefault("generation", generation)


class World:
    """Applies objects and answers as a data plane would: every wanted port is bound, except those
    whose address is in `unbindable` (with the reason)."""

    def __init__(self, options: Options | None = None, unbindable: Mapping[str, str] = {}) -> None:
        self.control = ControlPlane(options or Options(advertise=("192.0.2.10",)))
        self.unbindable = dict(unbindable)
        self.sections: dict[SectionKey, Section] = {}
        self.statuses: dict[tuple[str, ObjectKey], Any] = {}
        self.problems: dict[tuple[str, ObjectKey], tuple[str, ...]] = {}
        self.bound: dict[tuple[str, int], str | None] = {}
        self.answer = True
        self.apply(CLASS)

    def apply(self, text: str, generation: int | None = 1) -> None:
        self.change(objects(text, generation))

    def delete(self, kind: str, name: str, namespace: str = "default") -> None:
        self.change({kind: {ObjectKey(namespace, name): None}})

    def refuse(self, section: SectionKey, reason: str | None) -> None:
        self.change({}, refusals={section: reason})

    def change(self, changes: Mapping[str, Mapping[ObjectKey, Any]], **answers: Any) -> None:
        outcome = self.control.apply(changes, **answers)
        assert not outcome.failures, outcome.failures
        for key in outcome.remove:
            assert key in self.sections
            del self.sections[key]
        self.sections.update(outcome.put)
        for status_key, status in outcome.statuses.items():
            if status is None:
                del self.statuses[status_key]
            else:
                self.statuses[status_key] = status
        for problem_key, told in outcome.problems.items():
            if told is None:
                del self.problems[problem_key]
            else:
                self.problems[problem_key] = told
        if not self.answer:
            return
        answer = {
            port: self.unbindable.get(port[0], "") for port in outcome.ports - self.bound.keys()
        }
        answer |= dict.fromkeys(self.bound.keys() - outcome.ports)
        if answer:
            self.bound = {
                port: result for port, result in (self.bound | answer).items() if result is not None
            }
            self.change({}, binds=answer)

    # --- reading -----------------------------------------------------------------------------

    def status(self, kind: str, name: str, namespace: str = "default") -> Any:
        return self.statuses.get((kind, ObjectKey(namespace, name)))

    def gateway(self, name: str = "gw") -> dict[str, str]:
        return conditions(self.status("Gateway", name).conditions)

    def listener(self, name: str, gateway: str = "gw", kind: str = "Gateway") -> dict[str, str]:
        return conditions(self._listener(name, gateway, kind).conditions)

    def attached(self, name: str, gateway: str = "gw", kind: str = "Gateway") -> int:
        return int(self._listener(name, gateway, kind).attached_routes)

    def _listener(self, name: str, gateway: str, kind: str) -> Any:
        listeners = self.status(kind, gateway).listeners
        return next(one for one in listeners if one.name == name)

    def route(self, name: str, parent: int = 0, kind: str = "HTTPRoute") -> dict[str, str]:
        return conditions(self.status(kind, name).parents[parent].conditions)

    def message(self, kind: str, name: str, type: str, listener: str | None = None) -> str:
        """The message of a condition: the object's, its first parent's, or a listener's."""
        status = self.status(kind, name)
        if listener is not None:
            status = self._listener(listener, name, kind)
        elif hasattr(status, "parents"):
            status = status.parents[0]
        elif hasattr(status, "ancestors"):
            status = status.ancestors[0]
        return next(one.message for one in status.conditions if one.type == type)

    def told(self, kind: str, name: str, namespace: str = "default") -> tuple[str, ...]:
        """The problems of an object that stand in no status."""
        return self.problems.get((kind, ObjectKey(namespace, name)), ())

    def of(self, kind: str) -> dict[SectionKey, Any]:
        """The sections of a kind."""
        return {key: s for key, s in self.sections.items() if key.startswith(kind + "/")}


def conditions(found: Iterable[Condition]) -> dict[str, str]:
    """By type: "True", or the reason where there is more to say."""
    plain = ("Accepted", "Programmed", "ResolvedRefs", "SupportedVersion")
    return {
        one.type: one.status
        if one.status == "True" and one.reason == one.type and one.type in plain
        else f"{one.status} {one.reason}"
        for one in found
    }


def plain(value: Any) -> Any:
    """Sections and statuses as plain data without nulls, to be compared in tests."""
    return _compact(msgspec.json.decode(msgspec.json.encode(value)))


def _compact(value: Any) -> Any:
    if isinstance(value, list):
        return [_compact(one) for one in value]
    if isinstance(value, dict):
        return {
            key: _compact(one) for key, one in value.items() if one is not None or key == "cluster"
        }
    return value


# --- certificates -----------------------------------------------------------------------------


@cache
def authority() -> trustme.CA:
    return trustme.CA()


@cache
def _leaf(*names: str) -> trustme.LeafCert:
    return authority().issue_cert(*names)


def ca_pem() -> str:
    return authority().cert_pem.bytes().decode()


def tls_secret(name: str, *hosts: str, namespace: str = "default") -> str:
    leaf = _leaf(*(hosts or ("example.com",)))
    data = {
        "tls.crt": leaf.cert_chain_pems[0].bytes(),
        "tls.key": leaf.private_key_pem.bytes(),
    }
    return yaml.safe_dump(
        {
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace},
            "type": "kubernetes.io/tls",
            "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
        }
    )


def ca_config_map(name: str, namespace: str = "default") -> str:
    return yaml.safe_dump(
        {
            "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": namespace},
            "data": {"ca.crt": ca_pem()},
        }
    )


BACKEND = """
kind: Service
metadata: {name: backend}
spec:
  clusterIP: 10.96.0.7
  ports: [{name: http, port: 80, targetPort: 8080}]
---
kind: EndpointSlice
metadata:
  name: backend-1
  labels: {kubernetes.io/service-name: backend}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.0.0.2], targetRef: {kind: Pod, name: backend-b}}
- {addresses: [10.0.0.1], conditions: {ready: true}, targetRef: {kind: Pod, name: backend-a}}
"""

GATEWAY = """
kind: Gateway
metadata: {name: gw}
spec:
  gatewayClassName: weft
  listeners: [{name: http, port: 80, protocol: HTTP}]
"""

ROUTE = """
kind: HTTPRoute
metadata: {name: route}
spec:
  parentRefs: [{name: gw}]
  rules: [{backendRefs: [{name: backend, port: 80}]}]
"""


def join(*texts: str) -> str:
    return "\n---\n".join(texts)
