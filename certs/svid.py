"""X.509-SVIDs: keys and requests of those who hold them, and judging those of peers.

By X509-SVID.md of the SPIFFE standards. A chain is verified against the roots of the trust domain
that stands in its own SPIFFE ID and no others; `cryptography` builds and checks the path. Knows
certificates, no sockets; no error holds a key.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import ExtensionPolicy, PolicyBuilder, VerificationError

from certs.bundle import Bundle
from certs.errors import NotTrusted
from certs.keypair import BadCertificate, check_keypair
from certs.spiffe import BadSpiffeId, SpiffeId, parse

# A leaf and at most two intermediates: ours has one, a brought one may have its own above it.
_MAX_CHAIN = 4

_CA_POLICY = ExtensionPolicy.webpki_defaults_ca()
# The leaf is judged by `svid_of`, which asks for more than the web's rules and for other names.
_LEAF_POLICY = ExtensionPolicy.permit_all()


def new_request(spiffe_id: SpiffeId) -> tuple[str, str]:
    """A new P-256 key and the request for its certificate: (key_pem, csr_pem)."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(spiffe_id))]),
            critical=True,
        )
        .sign(key, hashes.SHA256())
    )
    return (
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        request.public_bytes(Encoding.PEM).decode(),
    )


def peer_identity(
    chain: Sequence[bytes],
    bundles: Mapping[str, Bundle],
    now: float,
    expected: SpiffeId | None = None,
) -> SpiffeId:
    """Who a peer is that proved to have the key of `chain[0]` (in TLS 1.3: CertificateVerify).

    `chain` is what it presented, DER, leaf first; `bundles` by trust domain; `now` in seconds since
    1970 UTC; `expected`: who it has to be. NotTrusted: it is not, with a reason to count.
    """
    try:
        spiffe_id = _verified(chain, bundles, datetime.datetime.fromtimestamp(now, datetime.UTC))
    except NotTrusted:
        raise
    except Exception as error:
        # A stranger made these certificates, and what `cryptography` raises over them is more than
        # it documents (InvalidVersion, say, is no ValueError).
        raise NotTrusted("no_certificate", f"a certificate is malformed: {_short(error)}") from None
    if expected is not None and spiffe_id != expected:
        raise NotTrusted("wrong_identity", f"it is {spiffe_id}, not {expected}")
    return spiffe_id


def _verified(
    chain: Sequence[bytes], bundles: Mapping[str, Bundle], moment: datetime.datetime
) -> SpiffeId:
    """Whose chain it is. NotTrusted, and whatever the library raises: it is no good one."""
    if not chain:
        raise NotTrusted("no_certificate", "no certificate was presented")
    if len(chain) > _MAX_CHAIN:
        raise NotTrusted("unknown_issuer", f"a chain of {len(chain)} is longer than {_MAX_CHAIN}")
    leaf, *issuers = (x509.load_der_x509_certificate(one) for one in chain)
    spiffe_id = svid_of(leaf)
    bundle = bundles.get(spiffe_id.trust_domain)
    if bundle is None:
        known = ", ".join(sorted(bundles)) or "none"
        raise NotTrusted(
            "wrong_trust_domain",
            f"{spiffe_id}: there is no trust bundle for its trust domain, but for: {known}",
        )
    _check_life(leaf, moment, str(spiffe_id))
    for issuer in issuers:
        _check_life(issuer, moment, f"an issuer of {spiffe_id}")
    verifier = (
        PolicyBuilder()
        .store(bundle.store)
        .time(moment)
        .max_chain_depth(_MAX_CHAIN)
        .extension_policies(ca_policy=_CA_POLICY, ee_policy=_LEAF_POLICY)
        .build_client_verifier()
    )
    try:
        verifier.verify(leaf, issuers)
    except VerificationError as error:
        raise NotTrusted(
            "unknown_issuer",
            f"{spiffe_id} has no valid path to a root of {spiffe_id.trust_domain}: {_short(error)}",
        ) from None
    return spiffe_id


def _check_life(certificate: x509.Certificate, moment: datetime.datetime, who: str) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if moment < start:
        raise NotTrusted("not_yet_valid", f"{who} is valid from {start:%Y-%m-%dT%H:%M:%SZ}")
    if moment > end:
        raise NotTrusted("expired", f"{who} was valid until {end:%Y-%m-%dT%H:%M:%SZ}")


def holds(
    chain_pem: str, key_pem: str, spiffe_id: SpiffeId, bundles: Mapping[str, Bundle], now: float
) -> x509.Certificate:
    """The leaf of an SVID of `spiffe_id` that whoever has this key may use, now. NotTrusted: it is
    none, or another key's."""
    try:
        check_keypair(chain_pem, key_pem)
        chain = x509.load_pem_x509_certificates(chain_pem.encode())
    except (BadCertificate, ValueError) as error:
        raise NotTrusted("no_certificate", str(error)) from None
    peer_identity([one.public_bytes(Encoding.DER) for one in chain], bundles, now, spiffe_id)
    return chain[0]


def svid_of(leaf: x509.Certificate) -> SpiffeId:
    """The SPIFFE ID of a certificate that keeps the rules for leaves (X509-SVID.md sections 2, 3.1,
    4 and 5.2); who issued it and when it is valid is not looked at. NotTrusted: it breaks one."""
    try:
        extensions = leaf.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usage = extensions.get_extension_for_class(x509.KeyUsage)
        purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        constraints = _optional(extensions, x509.BasicConstraints)
    except x509.ExtensionNotFound as error:
        raise _not_an_svid(f"it has no extension {error.oid._name}") from None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise _not_an_svid(f"its extensions are malformed: {_short(error)}") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise _not_an_svid(f"it has {len(uris)} URI names instead of one")
    try:
        spiffe_id = parse(uris[0])
    except BadSpiffeId as error:
        raise _not_an_svid(str(error)) from None
    if not spiffe_id.path:
        raise _not_an_svid(f"{spiffe_id} is a trust domain's, not a workload's")
    if constraints is not None and constraints.ca:
        raise _not_an_svid(f"the certificate of {spiffe_id} is an authority's (CA)")
    if not usage.critical or not usage.value.digital_signature:
        raise _not_an_svid(f"{spiffe_id} has no critical key usage digitalSignature")
    if usage.value.key_cert_sign or usage.value.crl_sign:
        raise _not_an_svid(f"{spiffe_id} has key usage keyCertSign or cRLSign")
    if not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= set(purposes):
        raise _not_an_svid(f"{spiffe_id} is not for both serverAuth and clientAuth")
    return spiffe_id


def _optional(
    extensions: x509.Extensions, kind: type[x509.BasicConstraints]
) -> x509.BasicConstraints | None:
    try:
        return extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _not_an_svid(why: str) -> NotTrusted:
    return NotTrusted("not_an_svid", f"the certificate is no X.509-SVID: {why}")


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
