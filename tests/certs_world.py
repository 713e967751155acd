"""Certificates for tests, right ones and wrong ones."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs.bundle import Bundle
from certs.issue import Issuer, Life

# A moment, in seconds since 1970 UTC; and the lives of what is made here.
NOW = 1_800_000_000.0
LIFE = Life.between(NOW - 60, NOW + 3600)
LONG = Life.between(NOW - 86_400, NOW + 86_400)
TODAY = Life.between(time.time() - 3600, time.time() + 86_400)

BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
CART = "spiffe://cluster.local/ns/shop/sa/cart"


def usage(**true: bool) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: true.get(name, False) for name in names})


class Domain:
    """A trust domain with a root and an intermediate."""

    def __init__(self, name: str, life: Life = LONG, intermediate_life: Life = LONG) -> None:
        self.name = name
        self.root = Issuer.new_root(f"root of {name}", life, f"spiffe://{name}")
        self.intermediate = self.root.new_intermediate(f"intermediate of {name}", intermediate_life)

    @property
    def bundle(self) -> Bundle:
        return Bundle(self.name, [self.root.certificate])

    @property
    def key(self) -> ec.EllipticCurvePrivateKey:
        """The intermediate's, to sign what `Issuer` would not."""
        key = self.intermediate._key
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key

    def leaf(
        self,
        *uris: str,
        life: Life = LIFE,
        key_usage: x509.KeyUsage | None = None,
        critical: bool = True,
        purposes: Iterable[x509.ObjectIdentifier] | None = BOTH,
        ca: bool = False,
        more: x509.ExtensionType | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> x509.Certificate:
        """Signed by the intermediate; what is not given is as in an SVID."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.intermediate.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(life.not_before)
            .not_valid_after(life.not_after)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(key_usage or usage(digital_signature=True), critical=critical)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        if purposes is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        if more is not None:
            builder = builder.add_extension(more, critical=True)
        return builder.sign(self.key, hashes.SHA256())

    def chain(self, *uris: str, **how: object) -> list[bytes]:
        """A leaf and the intermediate, DER."""
        return der(self.leaf(*uris, **how), self.intermediate.certificate)  # type: ignore[arg-type]


def der(*certificates: x509.Certificate) -> list[bytes]:
    return [one.public_bytes(Encoding.DER) for one in certificates]


def request(
    *uris: str,
    key: ec.EllipticCurvePrivateKey | None = None,
    dns: Iterable[str] = (),
    subject: str = "",
    ca: bool = False,
) -> str:
    """A certificate request, PEM, that may ask for more than it should."""
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    names += [x509.DNSName(name) for name in dns]
    attributes = [x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)] if subject else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if ca:
        builder = builder.add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
    signed = builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    return signed.public_bytes(Encoding.PEM).decode()


def leaf_of(chain_pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificates(chain_pem.encode())[0]


def chain_der(chain_pem: str) -> list[bytes]:
    return der(*x509.load_pem_x509_certificates(chain_pem.encode()))


def seconds(moment: datetime.datetime) -> float:
    return moment.timestamp()
