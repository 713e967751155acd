"""What all sections of a NodeConfig share: how keys are spelt, what values inside are made of.

Knows names only.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

# A section's key is "<kind>/<identifier>"; only the constructors below spell it.
SectionKey: TypeAlias = str


def port_key(address: str, port: int) -> SectionKey:
    return f"port/{address}|{port}"


def certificate_key(namespace: str, name: str) -> SectionKey:
    return f"certificate/{namespace}/{name}"


def route_key(kind: str, namespace: str, name: str) -> SectionKey:
    return f"route/{kind}/{namespace}/{name}"


def cluster_key(kind: str, namespace: str, name: str, port: int | None) -> SectionKey:
    return f"cluster/{kind}/{namespace}/{name}/{port}"


def entry_key(address: str, port: int, protocol: str) -> SectionKey:
    return f"entry/{address}|{port}/{protocol}"


def service_key(namespace: str, name: str, port: int) -> SectionKey:
    return f"service/{namespace}/{name}/{port}"


def workload_key(namespace: str, name: str) -> SectionKey:
    return f"workload/{namespace}/{name}"


def node_key(name: str) -> SectionKey:
    return f"node/{name}"


def svid_key(spiffe_id: str) -> SectionKey:
    return f"svid/{spiffe_id}"


def bundle_key(trust_domain: str) -> SectionKey:
    return f"bundle/{trust_domain}"


def policy_key(namespace: str, pod: str) -> SectionKey:
    return f"policy/{namespace}/{pod}"


def cidr_key(cidr: str) -> SectionKey:
    return f"cidr/{cidr}"


SETTINGS_KEY: SectionKey = "settings"


def service_listener(namespace: str, name: str, port: int, consumer: str | None = None) -> str:
    """The id of a Service port as a listener that mesh routes attach to. Routes of the Service's
    own namespace attach to the one for everybody; those of another namespace (`consumer`) to the
    one that only clients of that namespace see (GEP-1324, producer and consumer routes)."""
    own = f"Service/{namespace}/{name}/{port}"
    return own if consumer is None else f"{own}/{consumer}"


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """A value inside a section."""
