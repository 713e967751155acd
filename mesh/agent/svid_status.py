"""Identities and trust bundles of this node as plain data, for the API. Certificates only: keys are
not read here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from mesh.agent.svids import IdentityStatus, Svids


def identities(svids: Svids) -> list[dict[str, Any]]:
    """Each identity that the node must hold, and how that is; times in seconds since 1970 UTC."""
    return [_identity(one) for one in svids.statuses()]


def details(svids: Svids) -> dict[str, Any]:
    """The same with all certificates, and those of the trust bundles."""
    return {
        "authority": True,
        "identities": [
            {**_identity(one), "certificates": _certificates(_chain(one))}
            for one in svids.statuses()
        ],
        "bundles": [
            {"trustDomain": name, "certificates": _certificates(bundle.roots)}
            for name, bundle in sorted(svids.bundles.items())
        ],
    }


def _identity(one: IdentityStatus) -> dict[str, Any]:
    chain = _chain(one)
    return {
        "spiffeId": one.spiffe_id,
        "workloads": list(one.workloads),
        "issuer": _common_name(chain[0].issuer) if chain else None,
        "notAfter": one.not_after,
        "renewal": one.renewal,
        "why": one.why,
    }


def _chain(one: IdentityStatus) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(one.chain_pem.encode()) if one.chain_pem else []


def _common_name(name: x509.Name) -> str:
    found = name.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    return str(found[0].value) if found else name.rfc4514_string()


def _certificates(certificates: Iterable[x509.Certificate]) -> list[dict[str, Any]]:
    return [
        {
            "subject": one.subject.rfc4514_string(),
            "names": _names(one),
            "issuer": one.issuer.rfc4514_string(),
            "serial": f"{one.serial_number:x}",
            "notBefore": one.not_valid_before_utc.timestamp(),
            "notAfter": one.not_valid_after_utc.timestamp(),
            "fingerprint": one.fingerprint(hashes.SHA256()).hex(),
            "pem": one.public_bytes(Encoding.PEM).decode(),
        }
        for one in certificates
    ]


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        kind = x509.SubjectAlternativeName
        names = certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names]
