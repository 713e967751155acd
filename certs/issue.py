"""Making certificates: of authorities (root, intermediate) and of those whom they vouch for.

ECDSA with SHA-256. What a certificate says is decided here and by the caller; nothing of a request
but its public key gets into it. Knows X.509, no files; an issuer's key is used and never shown.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certs.spiffe import SpiffeId

IssuerKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

_FOR_BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class Life(NamedTuple):
    """From when until when a certificate is valid; UTC."""

    not_before: datetime.datetime
    not_after: datetime.datetime

    @classmethod
    def between(cls, start: float, end: float) -> Life:
        """Seconds since 1970 UTC."""
        utc = datetime.UTC
        return cls(
            datetime.datetime.fromtimestamp(math.floor(start), utc),
            datetime.datetime.fromtimestamp(math.floor(end), utc),
        )


class Issuer:
    """A certificate of an authority and its key."""

    def __init__(self, certificate: x509.Certificate, key: IssuerKey) -> None:
        self.certificate = certificate
        self._key = key

    def key_pem(self) -> bytes:
        """For the authority's own file, mode 0600, and nothing else."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @classmethod
    def new_root(cls, name: str, life: Life, uri: str | None = None) -> Issuer:
        """A self-signed root. `uri`: its trust domain as a SPIFFE ID (X509-SVID.md section 3.2)."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _authority(name, x509.Name(_name(name)), key.public_key(), life, None, uri)
        return cls(builder.sign(key, hashes.SHA256()), key)

    def new_intermediate(self, name: str, life: Life, uri: str | None = None) -> Issuer:
        """An authority that signs leaves only."""
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = self.certificate.subject
        builder = _authority(name, issuer, key.public_key(), life, 0, uri)
        return Issuer(self._sign(builder), key)

    def svid(
        self, public_key: CertificatePublicKeyTypes, spiffe_id: SpiffeId, life: Life
    ) -> x509.Certificate:
        """An X.509-SVID (X509-SVID.md sections 2 and 4)."""
        return self.leaf(
            public_key, (x509.UniformResourceIdentifier(str(spiffe_id)),), life, purposes=_FOR_BOTH
        )

    def leaf(
        self,
        public_key: CertificatePublicKeyTypes,
        names: Iterable[x509.GeneralName],
        life: Life,
        *,
        common_name: str | None = None,
        purposes: Iterable[x509.ObjectIdentifier] = _FOR_BOTH,
    ) -> x509.Certificate:
        """A certificate of somebody who is no authority."""
        names = list(names)
        subject = _name(common_name) if common_name else []
        builder = (
            _builder(x509.Name(subject), self.certificate.subject, public_key, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        )
        if names:
            # RFC 5280 section 4.2.1.6: critical where there is no subject.
            builder = builder.add_extension(
                x509.SubjectAlternativeName(names), critical=not subject
            )
        return self._sign(builder)

    def _sign(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return builder.add_extension(identifier, critical=False).sign(self._key, hashes.SHA256())


def _authority(
    name: str,
    issuer: x509.Name,
    public_key: CertificatePublicKeyTypes,
    life: Life,
    path_length: int | None,
    uri: str | None,
) -> x509.CertificateBuilder:
    builder = (
        _builder(x509.Name(_name(name)), issuer, public_key, life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )
    if uri is None:
        return builder
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    return builder.add_extension(names, critical=False)


def _name(common_name: str) -> list[x509.NameAttribute[str]]:
    return [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: CertificatePublicKeyTypes, life: Life
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(life.not_before)
        .not_valid_after(life.not_after)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
