"""Secrets and ConfigMaps that the suite makes in code: certificates, keys, trust anchors."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any

from certs.selfsigned import Authority

INFRA = "gateway-conformance-infra"
WEB = "gateway-conformance-web-backend"
APP = "gateway-conformance-app-backend"
# What BackendTLSPolicies verify; pods that serve TLS trust it for client certificates too.
BACKEND_CA = "tls-checks-ca-certificate"


def credentials() -> list[dict[str, Any]]:
    """All of them, as manifests."""
    backend, client, client_on_port = (Authority.create(name) for name in ("a", "b", "c"))

    def server(namespace: str, name: str, dns: Iterable[str], uris: Iterable[str] = ()) -> Any:
        return _secret(namespace, name, *backend.issue(dns=dns, uris=uris))

    def on_its_own(namespace: str, name: str, dns: Iterable[str]) -> Any:
        # For listeners; the cases trust the certificate itself.
        return _secret(namespace, name, *Authority.create(name).issue(dns=dns))

    def for_clients(name: str, authority: Authority) -> Any:
        return _secret(INFRA, name, *authority.issue(client=True))

    def anchor(namespace: str, name: str, authority: Authority) -> Any:
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"namespace": namespace, "name": name},
            "data": {"ca.crt": authority.certificate_pem},
        }

    return [
        on_its_own(WEB, "certificate", ["*"]),
        on_its_own(INFRA, "tls-validity-checks-certificate", ["*", "*.org", "*.wildcard.org"]),
        anchor(WEB, "web-backend-cm", Authority.create("web-backend")),
        anchor(INFRA, "tls-validity-checks-ca-certificate", client),
        for_clients("tls-validity-checks-client-certificate", client),
        anchor(INFRA, "tls-validity-checks-per-port-ca-certificate", client_on_port),
        for_clients("tls-validity-checks-per-port-client-certificate", client_on_port),
        anchor(INFRA, BACKEND_CA, backend),
        server(
            INFRA,
            "tls-checks-certificate",
            ["abc.example.com", "other.example.com"],
            ["spiffe://abc.example.com/test-identity"],
        ),
        for_clients("tls-checks-client-certificate", backend),
        server(INFRA, "tls-passthrough-checks-certificate", ["abc.example.com"]),
        server(APP, "tls-passthrough-checks-certificate", ["abc.example.com"]),
        server(INFRA, "tls-terminate-checks-certificate", ["tls.example.com"]),
        anchor(INFRA, "mismatch-ca-certificate", Authority.create("mismatch")),
    ]


def _secret(namespace: str, name: str, chain_pem: str, key_pem: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": {"namespace": namespace, "name": name},
        "data": {
            "tls.crt": base64.b64encode(chain_pem.encode()).decode(),
            "tls.key": base64.b64encode(key_pem.encode()).decode(),
        },
    }
