"""A small world for tests and measurements of route changes: a Gateway, a Service, routes by the
thousand, each in a file of its own that is renamed into place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

NAMESPACE, HOST, PORT = "shop", "shop.example.test", 8080


def base(backend_address: str, backend_port: int) -> list[dict[str, Any]]:
    """GatewayClass, Gateway, and a Service with one endpoint."""
    return [
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "GatewayClass",
            "metadata": {"name": "weft"},
            "spec": {"controllerName": "weft.dev/gateway-controller"},
        },
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": {"name": "gw", "namespace": NAMESPACE},
            "spec": {
                "gatewayClassName": "weft",
                "listeners": [{"name": "http", "port": PORT, "protocol": "HTTP"}],
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "backend", "namespace": NAMESPACE},
            "spec": {"ports": [{"port": 80, "targetPort": backend_port}]},
        },
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": "backend-a",
                "namespace": NAMESPACE,
                "labels": {"kubernetes.io/service-name": "backend"},
            },
            "addressType": "IPv4",
            "ports": [{"port": backend_port}],
            "endpoints": [{"addresses": [backend_address], "conditions": {"ready": True}}],
        },
    ]


def route(name: str, path: str, filters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """An HTTPRoute of one rule."""
    rule: dict[str, Any] = {
        "matches": [{"path": {"type": "PathPrefix", "value": path}}],
        "backendRefs": [{"name": "backend", "port": 80}],
    }
    if filters:
        rule["filters"] = filters
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"parentRefs": [{"name": "gw"}], "hostnames": [HOST], "rules": [rule]},
    }


def prepare(directory: Path, name: str, objects: list[dict[str, Any]]) -> tuple[Path, Path]:
    """A manifest file that is written and not yet in its place: what to rename to what."""
    unfinished = directory / f".{name}.tmp"
    unfinished.write_text(yaml.safe_dump_all(objects))
    return unfinished, directory / f"{name}.yaml"


def write(directory: Path, name: str, objects: list[dict[str, Any]]) -> None:
    """A manifest file, whole or not there."""
    unfinished, place = prepare(directory, name, objects)
    unfinished.rename(place)
