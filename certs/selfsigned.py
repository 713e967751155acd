"""A small throw-away authority for demonstrations and tests: one root that issues leaves.

Not for production: its key lives in memory only, there is no revocation and no rotation. That of a
mesh is `certs.authority`.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs.issue import Issuer, Life

# Certificates are valid from a little earlier: clocks differ.
_SKEW = datetime.timedelta(hours=1)
_AUTHORITY_LIFE = datetime.timedelta(days=3650)


class Authority:
    """A self-signed ECDSA P-256 root. `certificate_pem` is what clients trust."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer

    @classmethod
    def create(cls, name: str) -> Authority:
        start = datetime.datetime.now(datetime.UTC) - _SKEW
        return cls(Issuer.new_root(name, Life(start, start + _AUTHORITY_LIFE)))

    @property
    def certificate_pem(self) -> str:
        return self._issuer.certificate.public_bytes(Encoding.PEM).decode()

    def issue(
        self,
        *,
        dns: Iterable[str] = (),
        ips: Iterable[str] = (),
        uris: Iterable[str] = (),
        client: bool = False,
        days: float = 365,
    ) -> tuple[str, str]:
        """A new P-256 key and its certificate: (chain_pem, key_pem). It is for servers, with
        `client` for clients only. Negative `days`: expired that long ago."""
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in dns]
        names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips]
        names += [x509.UniformResourceIdentifier(uri) for uri in uris]
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.datetime.now(datetime.UTC)
        end = now + datetime.timedelta(days=days)
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        certificate = self._issuer.leaf(
            key.public_key(),
            names,
            Life(min(now, end) - _SKEW, end),
            common_name="client" if client else "server",
            purposes=[purpose],
        )
        return (
            certificate.public_bytes(Encoding.PEM).decode(),
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        )
