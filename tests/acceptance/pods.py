"""What a cluster would do for the cases: Deployments become listening echo pods, Services with
selectors get EndpointSlices. The gateway sees only the EndpointSlices."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from echo.answer import Pod
from echo.server import EchoServers, server_context

from acceptance.client import pem_files
from acceptance.credentials import BACKEND_CA
from acceptance.manifests import Ident, Manifests

Json = dict[str, Any]
HTTP_PORT, H2C_PORT, TLS_PORT = 3000, 3001, 8443


class Pods:
    """Echo pods on addresses of their own, from 127.65.0.1 on."""

    def __init__(self, servers: EchoServers) -> None:
        self._servers = servers
        self._pods: list[tuple[Pod, dict[str, str]]] = []

    async def deploy(self, deployment: Json, manifests: Manifests) -> None:
        """Start a Deployment's replicas. Images other than the echo server are not started."""
        spec = deployment["spec"]
        template = spec["template"]
        container = template["spec"]["containers"][0]
        env = {item["name"]: item.get("value", "") for item in container.get("env", ())}
        if "echo-basic" not in container["image"] or "TCP_ECHO_SERVER" in env:
            return
        metadata = deployment["metadata"]
        for number in range(spec.get("replicas", 1)):
            digest = hashlib.sha256(f"{metadata['namespace']}{metadata['name']}".encode())
            name = f"{metadata['name']}-{digest.hexdigest()[:10]}-{number:05d}"
            count = len(self._pods) + 1
            pod = Pod(name, metadata["namespace"], f"127.65.{count >> 8}.{count & 255}")
            self._pods.append((pod, template["metadata"]["labels"]))
            if "GRPC_ECHO_SERVER" in env:
                await self._servers.h2c(pod, HTTP_PORT, grpc_too=True)
                continue
            await self._servers.http(pod, HTTP_PORT)
            await self._servers.h2c(pod, H2C_PORT)
            if "TLS_SERVER_CERT" in env:
                secret = template["spec"]["volumes"][0]["secret"]["secretName"]
                await self._serve_tls(pod, secret, manifests)

    async def _serve_tls(self, pod: Pod, secret: str, manifests: Manifests) -> None:
        data = manifests.get(Ident("Secret", pod.namespace, secret))["data"]
        chain, key = (base64.b64decode(data[name]).decode() for name in ("tls.crt", "tls.key"))
        anchor = manifests.get(Ident("ConfigMap", "gateway-conformance-infra", BACKEND_CA))
        with pem_files(chain, key) as files:
            context = server_context(*files, anchor["data"]["ca.crt"])
        await self._servers.http(pod, TLS_PORT, context)

    def of(self, namespace: str, selector: dict[str, str]) -> list[Pod]:
        return [
            pod
            for pod, labels in self._pods
            if pod.namespace == namespace and selector.items() <= labels.items()
        ]

    def endpoint_slice(self, service: Json) -> Json | None:
        """The EndpointSlice of a Service; None for one without a selector, whose slices somebody
        else keeps."""
        metadata, spec = service["metadata"], service["spec"]
        if not spec.get("selector"):
            return None
        return {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"{metadata['name']}-pods",
                "namespace": metadata["namespace"],
                "labels": {"kubernetes.io/service-name": metadata["name"]},
            },
            "addressType": "IPv4",
            "ports": [
                {
                    **({"name": port["name"]} if "name" in port else {}),
                    "port": port.get("targetPort", port["port"]),
                    "protocol": port.get("protocol", "TCP"),
                }
                for port in spec["ports"]
            ],
            "endpoints": [
                endpoint(pod) for pod in self.of(metadata["namespace"], spec["selector"])
            ],
        }


def endpoint(pod: Pod) -> Json:
    """An endpoint of an EndpointSlice."""
    return {
        "addresses": [pod.address],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "targetRef": {"kind": "Pod", "name": pod.name, "namespace": pod.namespace},
    }
