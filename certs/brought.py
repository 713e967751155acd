"""An authority that somebody brings: tls.crt, tls.key and ca.crt, as cert-manager keeps them in a
Secret, from a directory (such as a mounted Secret) or from a manifest of the Secret.

A self-signed tls.crt is a root, under which Weft makes its own intermediates; another one issues
SVIDs itself, and ca.crt is its root. Knows what makes a certificate an authority's; errors name the
file and never quote a key.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from certs.bundle import is_authority
from certs.errors import AuthorityError
from certs.keypair import BadCertificate, check_keypair
from certs.state import Signer, check_private

_FILES = ("tls.crt", "tls.key", "ca.crt")


def from_directory(directory: Path) -> Signer:
    """AuthorityError: a file is missing, open to others, or not what it should be."""
    data = {}
    for name in _FILES:
        path = directory / name
        try:
            if name == "tls.key":
                check_private(path, "chmod 600 (of a mounted Secret: defaultMode: 0400)")
            data[name] = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise AuthorityError(f"{path} cannot be read: {error.strerror}") from None
    return from_secret(data, str(directory))


def from_secret(data: Mapping[str, bytes], where: str) -> Signer:
    """The data of a Secret. AuthorityError: it is no authority's; `where` is named in it."""
    for name in _FILES[:2]:
        if not data.get(name):
            raise AuthorityError(f"{where}: {name} is missing")
    try:
        pair = check_keypair(data["tls.crt"], data["tls.key"])
    except BadCertificate as error:
        raise AuthorityError(f"{where}: {error}") from None
    if pair.not_after <= datetime.datetime.now(datetime.UTC):
        raise AuthorityError(f"{where}: tls.crt has expired ({pair.not_after:%Y-%m-%d %H:%M} UTC)")
    chain = x509.load_pem_x509_certificates(data["tls.crt"])
    key = data["tls.key"].decode()
    if pair.key_type == "Ed25519":
        raise AuthorityError(f"{where}: the key is Ed25519: use ECDSA or RSA")
    for certificate in chain:
        if not is_authority(certificate):
            raise AuthorityError(
                f"{where}: {certificate.subject.rfc4514_string()} is not a certificate of an "
                "authority (CA and keyCertSign; in cert-manager isCA: true)"
            )
    if _issued_by(chain[0], chain[0]):
        return Signer(root=_pem(chain[:1]), root_key=key, brought=True)
    roots = _roots(data.get("ca.crt", b""), chain, where)
    # cert-manager leaves the root out of tls.crt, others put it there.
    between = [one for one in chain if one not in roots]
    root = next((one for one in roots if _issued_by(between[-1], one)), None)
    if not all(_issued_by(lower, upper) for lower, upper in itertools.pairwise(between)):
        root = None
    if root is None:
        raise AuthorityError(f"{where}: tls.crt does not lead to a root in ca.crt")
    return Signer(root=_pem([root]), chain=_pem(between), issuer_key=key, brought=True)


def _roots(pem: bytes, chain: list[x509.Certificate], where: str) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(pem) if pem.strip() else []
    except (ValueError, UnsupportedAlgorithm):
        raise AuthorityError(f"{where}: ca.crt holds something else than certificates") from None
    roots = [one for one in (*found, *chain) if _issued_by(one, one) and is_authority(one)]
    if not roots:
        raise AuthorityError(
            f"{where}: tls.crt is an intermediate, and ca.crt holds no root: put its root there"
        )
    return roots


def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def _pem(certificates: list[x509.Certificate]) -> str:
    return "".join(one.public_bytes(Encoding.PEM).decode() for one in certificates)
