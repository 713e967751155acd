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
from typing import Any

import msgspec

from gateway.conditions import make
from mesh.model.gateway import Gateway, GatewayStatus, GatewayStatusAddress
from mesh.model.meta import ObjectKey
from mesh.model.references import GROUP
from mesh.sources.kubernetes import KubernetesSource
from mesh.sources.kubernetes_client import APPLY, MANAGER, Backoff, ServerError, object_path

_log = logging.getLogger("weft.controller")

Json = dict[str, Any]
GATEWAY_LABEL = f"{GROUP}/gateway-name"
_MANAGED_LABEL = "app.kubernetes.io/managed-by"
_MANAGED_BY = "weft.dev"
_MAX_NAME = 63
_MAX_ADDRESSES = 16


class Balancers:
    """Made while `enabled`. `wants(key)`: whether a Gateway is to have one; `ports(key)`: those of
    its listeners."""

    def __init__(
        self,
        source: KubernetesSource,
        wants: Callable[[ObjectKey], bool],
        ports: Callable[[ObjectKey], tuple[int, ...]],
    ) -> None:
        self.enabled = False
        self._source = source
        self._wants = wants
        self._ports = ports
        self._nodes: tuple[str, ...] = ()
        self._dirty: set[ObjectKey] = set()
        self._applied: dict[str, Json] = {}
        self._wake = asyncio.Event()

    def look_again(self, gateways: Iterable[ObjectKey]) -> None:
        """These Gateways, or what their Services look like, may have changed."""
        self._dirty.update(gateways)
        self._wake.set()

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
        return there is not None and there.metadata.labels.get(_MANAGED_LABEL) != _MANAGED_BY

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
                    if error.status in (400, 403, 404, 422):
                        continue
                    self._dirty.add(key)
                    await backoff.wait(error.retry_after_s)
                else:
                    backoff.reset()

    async def _bring_about(self, key: ObjectKey) -> None:
        if self._foreign(key):
            return
        gateway = self._source.get("Gateway", key)
        name = service_name(key.name)
        there = self._source.get("Service", ObjectKey(key.namespace, name))
        # A Service has to have a port.
        if isinstance(gateway, Gateway) and self._wants(key) and self._ports(key):
            if there is None:
                # Deleted by somebody, or not there yet.
                self._applied.pop(_path("v1", "services", key.namespace, name), None)
            for path, body in _objects(gateway, self._ports(key), self._nodes):
                if self._applied.get(path) != body:
                    query = {"fieldManager": MANAGER, "force": "true"}
                    await self._source.client.request(
                        "PATCH", path, query, body, content_type=APPLY
                    )
                    self._applied[path] = body
        elif there is not None:
            path = _path("v1", "services", key.namespace, name)
            await self._source.client.request("DELETE", path)
            self._applied.pop(path, None)


def service_name(gateway: str) -> str:
    """Of the Service of a Gateway: a DNS label, which a Gateway's name need not be."""
    name = f"weft-{gateway}"
    if len(name) <= _MAX_NAME and "." not in name:
        return name
    digest = hashlib.sha256(gateway.encode()).hexdigest()[:8]
    return f"{name[: _MAX_NAME - 9].replace('.', '-')}-{digest}"


def _path(version: str, plural: str, namespace: str, name: str) -> str:
    return object_path(version, plural, {"namespace": namespace, "name": name})


def _objects(
    gateway: Gateway, ports: tuple[int, ...], nodes: tuple[str, ...]
) -> list[tuple[str, Json]]:
    """The Service, and an EndpointSlice for each family of addresses."""
    name, namespace = service_name(gateway.metadata.name), gateway.metadata.namespace
    infrastructure = gateway.spec.infrastructure
    labels = {
        **(infrastructure.labels if infrastructure else {}),
        GATEWAY_LABEL: gateway.metadata.name[:_MAX_NAME],
        _MANAGED_LABEL: _MANAGED_BY,
    }
    metadata: Json = {
        "namespace": namespace,
        "labels": labels,
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
    service: Json = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**metadata, "name": name},
        "spec": {
            "type": "LoadBalancer",
            "ports": [
                {"name": f"port-{port}", "protocol": "TCP", "port": port, "targetPort": port}
                for port in ports
            ],
        },
    }
    result = [(_path("v1", "services", namespace, name), service)]
    for family, number in (("IPv4", 4), ("IPv6", 6)):
        found = [one for one in nodes if ipaddress.ip_address(one).version == number]
        if not found:
            continue
        slice_name = f"{name}-{family.lower()}"
        body: Json = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                **metadata,
                "labels": {**labels, "kubernetes.io/service-name": name},
                "name": slice_name,
            },
            "addressType": family,
            "ports": [{"name": f"port-{p}", "protocol": "TCP", "port": p} for p in ports],
            "endpoints": [{"addresses": [one], "conditions": {"ready": True}} for one in found],
        }
        path = _path("discovery.k8s.io/v1", "endpointslices", namespace, slice_name)
        result.append((path, body))
    return result
