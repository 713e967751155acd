"""TLS toward endpoints, as BackendTLSPolicy asks for it.

Without subjectAltNames the certificate must be valid for the policy's hostname; with them it must
carry one of them and the hostname is SNI only (BackendTLSPolicyValidation). Knows contexts and
certificates, no connections.
"""

from __future__ import annotations

import ssl
from typing import cast
from weakref import WeakValueDictionary

from l7proxy import tls
from l7proxy.tls import TLSRefused as TLSRefused
from mesh.model.nodeconfig import CertificateSection, SubjectAltName, UpstreamTLS

# By CA bundle (None: the system's), whether OpenSSL checks the hostname, ALPN, own certificate.
_contexts: WeakValueDictionary[
    tuple[str | None, bool, str, CertificateSection | None], ssl.SSLContext
] = WeakValueDictionary()


class PeerRefused(Exception):
    """The endpoint's TLS is not what the policy asks for; `reason` is counted, snake case."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason = reason


class ClientTLS:
    """How to speak TLS to the endpoints of a cluster, and who we are. `http2`: ALPN must be h2.

    TLSRefused: the CA bundle, the hostname or the certificate cannot be used.
    """

    def __init__(
        self, section: UpstreamTLS, certificate: CertificateSection | None, *, http2: bool
    ) -> None:
        self.server_hostname = section.hostname
        self._sans = section.sans
        self._alpn = "h2" if http2 else "http/1.1"
        self.context = _context(section.ca_pem, not section.sans, self._alpn, certificate)
        try:
            self.context.wrap_bio(
                ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname=section.hostname
            )
        except (ValueError, TypeError) as error:
            why = f"backend TLS: {section.hostname!r} cannot be a server's name: {error}"
            raise TLSRefused(why) from None

    def check(self, ssl_object: ssl.SSLObject) -> None:
        """PeerRefused unless the finished handshake is what the policy asks for."""
        chosen = ssl_object.selected_alpn_protocol()
        if self._alpn == "h2" and chosen != "h2":
            raise PeerRefused("tls_alpn", f"the endpoint does not speak h2 (ALPN: {chosen})")
        if self._sans:
            # Not None: the context demands a certificate.
            peer = cast("dict[str, tuple[tuple[str, str], ...]]", ssl_object.getpeercert())
            names = peer.get("subjectAltName", ())
            if not any(_carries(names, wanted) for wanted in self._sans):
                listed = ", ".join(f"{kind}:{name}" for kind, name in names[:8]) or "none"
                raise PeerRefused(
                    "tls_certificate",
                    f"the endpoint's certificate has none of the subjectAltNames asked for; it has"
                    f" {listed}",
                )


def refusal(error: ssl.SSLError) -> PeerRefused:
    """What a failed handshake means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return PeerRefused(
            "tls_certificate", f"its certificate is not valid: {error.verify_message}"
        )
    return PeerRefused("tls_handshake", f"TLS handshake failed: {error.reason or error}")


def _context(
    ca_pem: str | None, hostname: bool, alpn: str, certificate: CertificateSection | None
) -> ssl.SSLContext:
    key = (ca_pem, hostname, alpn, certificate)
    context = _contexts.get(key)
    if context is None:
        context = tls.new_context(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = hostname
        context.hostname_checks_common_name = False
        context.set_alpn_protocols([alpn])
        if ca_pem is None:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        else:
            tls.trust(context, ca_pem, "backend TLS: CA bundle")
        if certificate is not None:
            tls.load_certificate(context, certificate, "backend TLS: client certificate")
        _contexts[key] = context
    return context


def _carries(names: tuple[tuple[str, str], ...], wanted: SubjectAltName) -> bool:
    if wanted.type == "URI":
        return ("URI", wanted.value) in names
    return any(
        kind == "DNS" and _same_host(name.lower(), wanted.value.lower()) for kind, name in names
    )


def _same_host(name: str, wanted: str) -> bool:
    """Equal, or one is a wildcard for the first label of the other (RFC 6125 §6.4.3). As in OpenSSL
    at least two labels must follow the wildcard."""
    if name == wanted:
        return True
    first, _, rest = name.partition(".")
    wanted_first, _, wanted_rest = wanted.partition(".")
    return rest == wanted_rest and "." in rest and "*" in (first, wanted_first)
