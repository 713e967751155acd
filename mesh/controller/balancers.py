"""A Service of type LoadBalancer for each Gateway that names no address, in front of all nodes.

The Service has no selector: its EndpointSlices name the nodes that serve, which the controller
knows. Both are owned by their Gateway and go with it; the infrastructure labels and annotations of
the Gateway are theirs too (GatewayInfrastructure). Who gives the Service its address is the
cluster's business; once it has one, that is the Gateway's. Knows Services; no conditions.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from gateway.conditions import make
from mesh.model.gateway import Gateway, GatewayStatus, GatewayStatusAddress
from mesh.model.gatewayclass import GatewayClass
from mesh.model.meta import MANAGED_BY, MANAGED_LABEL, SLICE_MANAGED_LABEL, ObjectKey
from mesh.model.references import GROUP
from mesh.sources.kubernetes import KubernetesSource, number
from mesh.sources.kubernetes_client import APPLY, MANAGER, Backoff, ServerError, object_path

_log = logging.getLogger("weft.controller")

Json = dict[str, Any]
GATEWAY_LABEL = f"{GROUP}/gateway-name"
_SERVICE_LABEL = "kubernetes.io/service-name"
_MAX_NAME = 63
_SLICES = "discovery.k8s.io/v1"
_MAX_ADDRESSES = 16
# How long one waits that cannot be written: its namespace's quota or a webhook may be against it.
_REFUSED_S = {403: 30.0, 500: 1.0}
_WHERE = {"Service": ("v1", "services"), "EndpointSlice": (_SLICES, "endpointslices")}


class _Applied(NamedTuple):
    """What was written last: for which Gateway, what, and its resourceVersion since."""

    of: ObjectKey
    body: Json
    version: int


class Balancers:
    """Made while `enabled`. `name`: the controller's; `wants(key)`: whether a Gateway is to have
    one; `ports(key)`: those of its listeners."""

    def __init__(
        self,
        source: KubernetesSource,
        name: str,
        wants: Callable[[ObjectKey], bool],
        ports: Callable[[ObjectKey], tuple[int, ...]],
    ) -> None:
        self.enabled = False
        self._source = source
        self._name = name
        self._wants = wants
        self._ports = ports
        self._nodes: tuple[str, ...] = ()
        self._dirty: set[ObjectKey] = set()
        self._applied: dict[tuple[str, ObjectKey], _Applied] = {}
        self._wake = asyncio.Event()

    def look_again(self, gateways: Iterable[ObjectKey]) -> None:
        """These Gateways, or what their Services look like, may have changed."""
        self._dirty.update(gateways)
        self._wake.set()

    def seen(self, kind: str, key: ObjectKey) -> None:
        """An object is another than before."""
        if (made := self._applied.get((kind, key))) is not None:
            self.look_again((made.of,))

    def nodes_changed(self, addresses: tuple[str, ...]) -> None:
        self._nodes = addresses

    def placed(self, key: ObjectKey, status: GatewayStatus) -> GatewayStatus:
        """The status with the address of the Gateway's Service; while it has none, the Gateway is
        not Programmed: nobody can reach it."""
        addresses = self._addresses(key)
        if addresses:
            return msgspec.structs.replace(status, addresses=addresses[:_MAX_ADDRESSES])
        name = f"Service {key.namespace}/{service_name(key.name)}"
        why = f"{name} has been given no address yet"
        if self._foreign(key):
            why = f"{name} is somebody else's: rename it, and the Gateway gets one of its own"
        conditions = tuple(
            make("Programmed", "False", "AddressNotAssigned", why, one.observed_generation)
            if one.type == "Programmed" and one.status == "True"
            else one
            for one in status.conditions
        )
        return msgspec.structs.replace(status, addresses=(), conditions=conditions)

    def _foreign(self, key: ObjectKey) -> bool:
        """Whether there is a Service of the name that Weft has not made."""
        there = self._source.get("Service", ObjectKey(key.namespace, service_name(key.name)))
        return there is not None and there.metadata.labels.get(MANAGED_LABEL) != MANAGED_BY

    def _addresses(self, key: ObjectKey) -> tuple[GatewayStatusAddress, ...]:
        if self._foreign(key):
            return ()
        written = self._source.written("Service", ObjectKey(key.namespace, service_name(key.name)))
        ingress = ((written.status if written else {}).get("loadBalancer") or {}).get("ingress")
        return tuple(
            GatewayStatusAddress(type="IPAddress", value=one["ip"])
            if one.get("ip")
            else GatewayStatusAddress(type="Hostname", value=one["hostname"])
            for one in ingress or ()
            if one.get("ip") or one.get("hostname")
        )

    async def run(self) -> None:
        """For ever."""
        backoff = Backoff()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.enabled and self._dirty:
                key = self._dirty.pop()
                try:
                    await self._bring_about(key)
                except ServerError as error:
                    _log.error("the Service of Gateway %s cannot be written: %s", key, error)
                    if error.status in (400, 404, 422):
                        continue
                    if (pause := _REFUSED_S.get(error.status)) is not None:
                        # Others do not wait for that.
                        asyncio.get_running_loop().call_later(pause, self.look_again, (key,))
                        continue
                    self._dirty.add(key)
                    await backoff.wait(error.retry_after_s)
                else:
                    backoff.reset()

    async def _bring_about(self, key: ObjectKey) -> None:
        if self._foreign(key):
            return
        gateway = self._source.get("Gateway", key)
        service = ObjectKey(key.namespace, service_name(key.name))
        if isinstance(gateway, Gateway) and self._may_keep(gateway):
            # A Service has to have a port. One that is there outlives mistakes in its Gateway: with
            # it would go the address that clients know.
            if self._wants(key) and self._ports(key):
                for kind, name, body in self._objects(gateway):
                    await self._apply(key, kind, ObjectKey(key.namespace, name), body)
        else:
            if self._source.get("Service", service) is not None:
                await self._source.client.request("DELETE", _path("Service", service))
            self._applied = {one: made for one, made in self._applied.items() if made.of != key}

    def _may_keep(self, gateway: Gateway) -> bool:
        """Whether its Service may stay: it names no address of its own, and is nobody else's. Of a
        class that is not there just now the controller is not known, but was Weft."""
        name = ObjectKey("", gateway.spec.gateway_class_name)
        found = self._source.get("GatewayClass", name)
        ours = not isinstance(found, GatewayClass) or found.spec.controller_name == self._name
        return ours and not gateway.spec.addresses

    async def _apply(self, of: ObjectKey, kind: str, key: ObjectKey, body: Json) -> None:
        """Unless it is so. ServerError: it could not be written."""
        there, before = self._source.written(kind, key), self._applied.get((kind, key))
        if (there is not None and before is not None and before.body == body) and number(
            there.version
        ) <= before.version:
            return
        query = {"fieldManager": MANAGER, "force": "true"}
        answer = await self._source.client.request(
            "PATCH", _path(kind, key), query, body, content_type=APPLY
        )
        version = number(answer["metadata"]["resourceVersion"])
        self._applied[kind, key] = _Applied(of, body, version)

    def _objects(self, gateway: Gateway) -> list[tuple[str, str, Json]]:
        """Kind, name and content of the Service, and of an EndpointSlice for each family of
        addresses that there are, or were."""
        key = ObjectKey(gateway.metadata.namespace, gateway.metadata.name)
        name, ports = service_name(key.name), self._ports(key)
        metadata = _metadata(gateway)
        result = [("Service", name, _service({**metadata, "name": name}, ports))]
        for family, version in (("IPv4", 4), ("IPv6", 6)):
            found = [one for one in self._nodes if ipaddress.ip_address(one).version == version]
            slice_ = ObjectKey(key.namespace, f"{name}-{family.lower()}")
            if found or self._source.get("EndpointSlice", slice_) is not None:
                labels = {
                    **metadata["labels"],
                    _SERVICE_LABEL: name,
                    SLICE_MANAGED_LABEL: MANAGED_BY,
                }
                about = {**metadata, "labels": labels, "name": slice_.name}
                result.append(("EndpointSlice", slice_.name, _slice(about, family, ports, found)))
        return result


def service_name(gateway: str) -> str:
    """Of the Service of a Gateway: a DNS label, which a Gateway's name need not be."""
    name = f"weft-{gateway}"
    if len(name) <= _MAX_NAME and "." not in name:
        return name
    digest = hashlib.sha256(gateway.encode()).hexdigest()[:8]
    return f"{name[: _MAX_NAME - 9].replace('.', '-')}-{digest}"


def gateway_label(gateway: str) -> str:
    """A Gateway's name as the value of a label: at most 63 characters, the last of which is a
    letter or digit ("Labels and selectors", syntax)."""
    return gateway[:_MAX_NAME].rstrip("-.")


def _path(kind: str, key: ObjectKey) -> str:
    version, plural = _WHERE[kind]
    return object_path(version, plural, key._asdict())


def _metadata(gateway: Gateway) -> Json:
    """Of all that is made for a Gateway, but for the name."""
    infrastructure = gateway.spec.infrastructure
    return {
        "namespace": gateway.metadata.namespace,
        "labels": {
            **(infrastructure.labels if infrastructure else {}),
            GATEWAY_LABEL: gateway_label(gateway.metadata.name),
            MANAGED_LABEL: MANAGED_BY,
        },
        "annotations": dict(infrastructure.annotations if infrastructure else {}),
        "ownerReferences": [
            {
                "apiVersion": f"{GROUP}/v1",
                "kind": "Gateway",
                "name": gateway.metadata.name,
                "uid": gateway.metadata.uid,
            }
        ],
    }


def _service(metadata: Json, ports: tuple[int, ...]) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "type": "LoadBalancer",
            "ports": [
                {"name": f"port-{port}", "protocol": "TCP", "port": port, "targetPort": port}
                for port in ports
            ],
        },
    }


def _slice(metadata: Json, family: str, ports: tuple[int, ...], nodes: list[str]) -> Json:
    return {
        "apiVersion": _SLICES,
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": family,
        "ports": [{"name": f"port-{p}", "protocol": "TCP", "port": p} for p in ports],
        "endpoints": [{"addresses": [one], "conditions": {"ready": True}} for one in nodes],
    }
