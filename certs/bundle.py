"""Trust bundles: the roots of a trust domain, as PEM and as SPIFFE bundle documents.

The document is a JWK Set (SPIFFE_Trust_Domain_and_Bundle.md section 4, X509-SVID.md section 6);
its keys of other kinds (JWT-SVID) are passed over. Knows certificates, no files and no network.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.verification import Store

from certs.spiffe import BadSpiffeId, check_trust_domain

# More than any rotation needs; a bundle is tried root by root.
MAX_ROOTS = 32
_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}


class BadBundle(ValueError):
    """A trust bundle cannot be used: why, and what to do."""


class Bundle:
    """A trust domain and its roots, at least one."""

    def __init__(self, trust_domain: str, roots: Iterable[x509.Certificate]) -> None:
        try:
            self.trust_domain = check_trust_domain(trust_domain)
        except BadSpiffeId as error:
            raise BadBundle(str(error)) from None
        self.roots = tuple(dict.fromkeys(roots))
        if not 0 < len(self.roots) <= MAX_ROOTS:
            raise BadBundle(
                f"the bundle of {trust_domain} has {len(self.roots)} roots: it needs 1 to "
                f"{MAX_ROOTS}"
            )
        for root in self.roots:
            if not is_authority(root):
                raise BadBundle(
                    f"the bundle of {trust_domain}: {root.subject.rfc4514_string()} is not a "
                    "certificate of an authority (CA, keyCertSign)"
                )
        self.store = Store(list(self.roots))

    @classmethod
    def from_pem(cls, trust_domain: str, pem: str | bytes) -> Bundle:
        """BadBundle: it holds something else than certificates of authorities."""
        try:
            found = x509.load_pem_x509_certificates(pem.encode() if isinstance(pem, str) else pem)
        except Exception:  # of more kinds than the library documents
            raise BadBundle(f"the bundle of {trust_domain} holds no PEM certificates") from None
        return cls(trust_domain, found)

    @classmethod
    def parse(cls, trust_domain: str, data: str | bytes) -> Bundle:
        """PEM, or a SPIFFE bundle document. BadBundle: it is neither."""
        data = data.encode() if isinstance(data, str) else data
        read = cls.from_document if data.lstrip().startswith(b"{") else cls.from_pem
        return read(trust_domain, data)

    def to_pem(self) -> str:
        return "".join(root.public_bytes(Encoding.PEM).decode() for root in self.roots)

    @classmethod
    def from_document(cls, trust_domain: str, document: str | bytes) -> Bundle:
        """A SPIFFE bundle document. BadBundle: it is none, or has no root for X.509-SVIDs."""
        where = f"the bundle document of {trust_domain}"
        try:
            keys = msgspec.json.decode(document, type=_Document).keys
        except msgspec.MsgspecError as error:
            raise BadBundle(f"{where} is no JWK Set: {error}") from None
        roots = []
        for number, key in enumerate(keys):
            if key.use != "x509-svid":
                continue
            if len(key.x5c) != 1:
                raise BadBundle(f"{where}: keys[{number}].x5c must hold exactly one certificate")
            try:
                roots.append(x509.load_der_x509_certificate(base64.b64decode(key.x5c[0])))
            except Exception:  # of more kinds than the library documents
                raise BadBundle(f"{where}: keys[{number}].x5c is no certificate") from None
        return cls(trust_domain, roots)

    def to_document(self, sequence: int, refresh_hint_s: int) -> bytes:
        """The SPIFFE bundle document, JSON. `sequence` rises with every change; readers look again
        after `refresh_hint_s` seconds."""
        keys = [_jwk(root) for root in self.roots]
        document = {
            "keys": keys,
            "spiffe_sequence": sequence,
            "spiffe_refresh_hint": refresh_hint_s,
        }
        return msgspec.json.format(msgspec.json.encode(document))


class _Key(msgspec.Struct):
    use: str = ""
    x5c: tuple[str, ...] = ()


class _Document(msgspec.Struct):
    keys: tuple[_Key, ...]


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether it may sign certificates (X509-SVID.md sections 4.1 and 4.3)."""
    try:
        extensions = certificate.extensions
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
        return (
            extensions.get_extension_for_class(x509.BasicConstraints).value.ca
            and usage.key_cert_sign
        )
    except Exception:  # no extension, two, or one that cannot be read
        return False


def _jwk(root: x509.Certificate) -> dict[str, object]:
    """RFC 7517 section 4, RFC 7518 sections 6.2.1 and 6.3.1."""
    key = root.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        numbers = key.public_numbers()
        size = (key.curve.key_size + 7) // 8
        kind = {
            "kty": "EC",
            "crv": _CURVES[key.curve.name],
            "x": _base64url(numbers.x.to_bytes(size, "big")),
            "y": _base64url(numbers.y.to_bytes(size, "big")),
        }
    elif isinstance(key, rsa.RSAPublicKey):
        public = key.public_numbers()
        kind = {
            "kty": "RSA",
            "n": _base64url(public.n.to_bytes((public.n.bit_length() + 7) // 8, "big")),
            "e": _base64url(public.e.to_bytes((public.e.bit_length() + 7) // 8, "big")),
        }
    else:
        raise BadBundle(
            f"{root.subject.rfc4514_string()} has a key that bundle documents cannot hold: "
            "use ECDSA or RSA"
        )
    certificate = base64.b64encode(root.public_bytes(Encoding.DER)).decode()
    return {**kind, "use": "x509-svid", "x5c": [certificate]}


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
