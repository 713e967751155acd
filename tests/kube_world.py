"""An API server, and the source that follows it, for tests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from apiserver.server import ApiServer

from mesh.model.meta import ObjectKey
from mesh.sources.kubernetes import KubernetesSource
from mesh.sources.kubernetes_client import Backoff

CRDS = Path(__file__).parent.parent.parent / "shared/gateway-api/crds/experimental"
CILIUM_CRDS = Path(__file__).parent.parent.parent / "shared/cilium/crds"
WAIT_S = 20
GROUP = "gateway.networking.k8s.io"
CILIUM = "cilium.io"
CONTROLLER = "weft.dev/gateway-controller"

KUBECTL = shutil.which("kubectl") or ""

needs_kubectl = pytest.mark.skipif(not KUBECTL, reason="no kubectl")
needs_cilium_crds = pytest.mark.skipif(not CILIUM_CRDS.exists(), reason="no ../shared/cilium/crds")
needs_crds = pytest.mark.skipif(not CRDS.exists(), reason="no ../shared/gateway-api/crds")


def quick() -> Backoff:
    return Backoff(0.001, 0.02)


def config_map(name: str, value: str = "1", namespace: str = "default", **metadata: Any) -> Any:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace, **metadata},
        "data": {"ca.crt": value},
    }


def route(name: str, path: str = "/", namespace: str = "default") -> Any:
    return {
        "apiVersion": f"{GROUP}/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "parentRefs": [{"name": "gw"}],
            "rules": [{"matches": [{"path": {"type": "PathPrefix", "value": path}}]}],
        },
    }


def gateway_class(name="weft", controller=CONTROLLER):
    return {
        "apiVersion": f"{GROUP}/v1",
        "kind": "GatewayClass",
        "metadata": {"name": name},
        "spec": {"controllerName": controller},
    }


def gateway(name="gw", class_name="weft", port=80):
    return {
        "apiVersion": f"{GROUP}/v1",
        "kind": "Gateway",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "gatewayClassName": class_name,
            "listeners": [{"name": "http", "port": port, "protocol": "HTTP"}],
        },
    }


def tls_secret(name, namespace="default", host="a.example", **other):
    made = trustme.CA().issue_cert(
        host, not_before=datetime.now(UTC) - timedelta(days=1), not_after=None
    )
    chain = b"".join(one.bytes() for one in made.cert_chain_pems)
    pair = {"tls.crt": chain, "tls.key": made.private_key_pem.bytes(), "more": b"private"}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "type": "kubernetes.io/tls",
        "data": {key: base64.b64encode(value).decode() for key, value in pair.items()},
        **other,
    }


def policy(kind, name="p", *, fqdn=False):
    """`fqdn`: with something that Weft does not enforce."""
    metadata = {"name": name, "namespace": "default"}
    if kind == "NetworkPolicy":
        spec = {"podSelector": {}, "policyTypes": ["Ingress"]}
        return {
            "apiVersion": "networking.k8s.io/v1",
            "kind": kind,
            "metadata": metadata,
            "spec": spec,
        }
    if kind == "CiliumClusterwideNetworkPolicy":
        del metadata["namespace"]
    spec = {"endpointSelector": {}, "ingress": [{}]}
    if fqdn:
        spec["egress"] = [{"toFQDNs": [{"matchName": "example.com"}]}]
    return {"apiVersion": f"{CILIUM}/v2", "kind": kind, "metadata": metadata, "spec": spec}


def cilium_crds(*, conditions):
    """`conditions`: as they are since Cilium 1.16, a list of the status by type."""
    for file in sorted(CILIUM_CRDS.glob("*.yaml")):
        crd = yaml.safe_load(file.read_text())
        if conditions:
            status = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
            names = ("type", "status", "reason", "message", "lastTransitionTime")
            status["properties"]["conditions"] = {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status"],
                    "properties": {name: {"type": "string"} for name in names},
                },
            }
        yield crd


class Following:
    """What a source has said. `state`: what is in force by kind and key; `told`: every change of
    an object, in order."""

    def __init__(self, source: KubernetesSource) -> None:
        self.source = source
        self.state: dict[str, dict[ObjectKey, Any]] = {}
        self.told: list[tuple[str, str, Any]] = []
        self.problems: tuple[Any, ...] = ()
        self.complete = False
        self.versions: Any = {}
        self._changed = asyncio.Condition()

    async def run(self) -> None:
        async with contextlib.aclosing(self.source.updates()) as updates:
            async for update in updates:
                async with self._changed:
                    self._take(update)
                    self._changed.notify_all()

    def _take(self, update: Any) -> None:
        for kind, changes in update.changes.items():
            state = self.state.setdefault(kind, {})
            for key, obj in changes.items():
                self.told.append((kind, key.name, obj))
                if obj is None:
                    # Nothing goes that was not there.
                    del state[key]
                else:
                    state[key] = obj
        self.problems, self.complete = update.problems, update.complete
        self.versions = update.versions

    async def until(self, holds: Callable[[], Any]) -> None:
        async with asyncio.timeout(WAIT_S), self._changed:
            await self._changed.wait_for(holds)

    async def reached(self, server: ApiServer, kind: str) -> None:
        """Until everything that is on the server now has been told of a kind, by a write that
        comes after it."""
        namespace = "Namespace" if kind == "Namespace" else "ConfigMap"
        assert namespace
        await self.until(lambda: self.versions.get(kind, 0) >= server.store.revision)

    def values(self) -> dict[str, str]:
        """The ConfigMaps' values by name."""
        return {k.name: obj.data["ca.crt"] for k, obj in self.state.get("ConfigMap", {}).items()}

    def changes(self, kind: str = "ConfigMap") -> list[tuple[str, str | None]]:
        return [
            (name, None if obj is None else obj.data["ca.crt"])
            for told, name, obj in self.told
            if told == kind
        ]


@contextlib.asynccontextmanager
async def following(
    server: ApiServer, tmp_path: Path, *, wait: bool = True, token: str = "admin", **options: Any
) -> AsyncIterator[Following]:
    """A source on this server, once it is complete."""
    options = {"backoff": quick, "discovery_s": 0.05, **options}
    kubeconfig = server.kubeconfig(tmp_path / "kubeconfig", token=token)
    found = Following(KubernetesSource(kubeconfig, **options))
    task = asyncio.get_running_loop().create_task(found.run())
    try:
        if wait:
            await found.until(lambda: found.complete)
        yield found
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await found.source.close()
