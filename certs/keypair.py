"""Judges PEM certificates and keys before anything is built on them.

Knows X.509 and what OpenSSL takes at its security level 2; knows no Secrets and no connections.
Neither a repr nor an error ever holds key material.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal, TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

KeyType: TypeAlias = Literal["RSA", "EC", "Ed25519"]

_Key: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

_MIN_RSA_BITS = 2048
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
# Signatures that OpenSSL refuses at security level 2.
_WEAK_HASHES = (hashes.MD5, hashes.SHA1)


class BadCertificate(ValueError):
    """What is wrong with a certificate, a key or a bundle, and what to do; no key material."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """What is known of a certificate whose key matches it. Times are UTC; `fingerprint` is the
    SHA-256 of the leaf in hexadecimal; names are lower case. An expired one is still a KeyPair."""

    key_type: KeyType
    not_before: datetime.datetime
    not_after: datetime.datetime
    dns: tuple[str, ...]
    ips: tuple[str, ...]
    uris: tuple[str, ...]
    fingerprint: str


def check_keypair(chain_pem: bytes | str, key_pem: bytes | str) -> KeyPair:
    """Judge a chain (leaf first) and its private key, as in a kubernetes.io/tls Secret."""
    leaf = _certificates(_bytes(chain_pem), "the certificate")[0]
    key = _private_key(_bytes(key_pem))
    if _spki(key.public_key()) != _spki(leaf.public_key()):
        raise BadCertificate("the private key does not belong to the certificate")
    signed_with = leaf.signature_hash_algorithm
    if isinstance(signed_with, _WEAK_HASHES):
        raise BadCertificate(f"the certificate is signed with {signed_with.name}; use SHA-256")
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names = x509.SubjectAlternativeName([])
    except Exception as error:  # of more kinds than the library documents
        raise BadCertificate(f"the certificate's extensions are malformed: {error}") from None
    return KeyPair(
        key_type=_key_type(key),
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
        dns=tuple(name.lower() for name in names.get_values_for_type(x509.DNSName)),
        ips=tuple(str(ip) for ip in names.get_values_for_type(x509.IPAddress)),
        uris=tuple(names.get_values_for_type(x509.UniformResourceIdentifier)),
        fingerprint=leaf.fingerprint(hashes.SHA256()).hex(),
    )


def check_ca_bundle(pem: bytes | str) -> str:
    """The certificates of a bundle as plain PEM, comments and duplicates left out."""
    found = dict.fromkeys(_certificates(_bytes(pem), "the CA bundle"))
    return "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in found)


def _bytes(pem: bytes | str) -> bytes:
    return pem.encode() if isinstance(pem, str) else pem


def _certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    if b"-----BEGIN CERTIFICATE-----" not in pem:
        raise BadCertificate(
            f"{what} holds no PEM certificate (-----BEGIN CERTIFICATE-----)"
            if pem.strip()
            else f"{what} is empty"
        )
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        for one in certificates:
            one.public_key()
    except Exception as error:  # InvalidVersion, say, is no ValueError
        raise BadCertificate(f"{what} cannot be parsed: {_short(error)}") from None
    return certificates


def _private_key(pem: bytes) -> _Key:
    if not pem.strip():
        raise BadCertificate("the private key is empty")
    try:
        # RSA's own validation takes 40 ms; a signature, below, shows as much.
        key = serialization.load_pem_private_key(
            pem, password=None, unsafe_skip_rsa_key_validation=True
        )
    except TypeError:
        raise BadCertificate("the private key is encrypted; store it in plain") from None
    except (ValueError, UnsupportedAlgorithm):
        # The library's own words could quote the input.
        raise BadCertificate("the private key is not a PEM private key") from None
    if isinstance(key, rsa.RSAPrivateKey):
        if key.key_size < _MIN_RSA_BITS:
            raise BadCertificate(
                f"the RSA key has {key.key_size} bits; TLS needs {_MIN_RSA_BITS} or more"
            )
        try:
            signature = key.sign(b"", padding.PKCS1v15(), hashes.SHA256())
            key.public_key().verify(signature, b"", padding.PKCS1v15(), hashes.SHA256())
        except (ValueError, InvalidSignature):
            raise BadCertificate("the RSA key is inconsistent: it cannot sign") from None
        return key
    if isinstance(key, ec.EllipticCurvePrivateKey):
        if key.curve.name not in _CURVES:
            raise BadCertificate(f"curve {key.curve.name} is not supported; use P-256 or P-384")
        return key
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key
    raise BadCertificate("the key is neither RSA, ECDSA nor Ed25519")


def _key_type(key: _Key) -> KeyType:
    if isinstance(key, rsa.RSAPrivateKey):
        return "RSA"
    return "EC" if isinstance(key, ec.EllipticCurvePrivateKey) else "Ed25519"


def _spki(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
