"""What both sides of the proxy's TLS share: certificates and CA bundles into OpenSSL contexts.

Python's ssl reads keys from files only, so they pass through an anonymous file in memory (memfd),
never through a disk; that works without root too. Knows PEM and contexts, no connections. No error
here ever holds key material.
"""

from __future__ import annotations

import os
import ssl
from typing import Any

from certs.keypair import BadCertificate, check_ca_bundle, check_keypair
from mesh.model.nodeconfig import CertificateSection, SvidSection
from mesh.model.section import SectionKey

# TLS 1.2: forward secrecy and AEAD only, which is also all that HTTP/2 allows (RFC 9113 §9.2.2).
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


# What a peer may make us answer while it reads nothing: 32 key updates, each a record of 27 bytes.
# OpenSSL has no limit of its own.
MAX_UNREAD_ANSWERS = 32 * 27


class TLSRefused(Exception):
    """A section whose TLS cannot be put in force, and why."""


class BoundedObject(ssl.SSLObject):
    """A connection of asyncio's TLS, which asks for new keys no more often than it reads the
    answers (RFC 8446 §4.6.3). As long as its peer reads, asyncio empties `outgoing` at once."""

    _outgoing: ssl.MemoryBIO
    _unread = 0

    @classmethod
    def _create(cls, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **rest: Any) -> Any:
        self = super()._create(incoming, outgoing, **rest)  # type: ignore[misc]
        self._outgoing = outgoing
        return self

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """ssl.SSLError: it asks too often."""
        before = self._outgoing.pending
        try:
            return super().read(len, buffer)
        finally:
            if not before:
                self._unread = 0
            elif self._outgoing.pending > before:
                self._unread += self._outgoing.pending - before
                if self._unread > MAX_UNREAD_ANSWERS:
                    raise unread()


def unread() -> ssl.SSLError:
    """A peer asks for new keys again and again, and reads no answer."""
    return ssl.SSLError("too many key updates of a peer that reads nothing")


def new_context(protocol: int) -> ssl.SSLContext:
    """TLS 1.2 or 1.3 without renegotiation and compression. `protocol` is ssl.PROTOCOL_TLS_*."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslobject_class = BoundedObject
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    return context


def check_certificate(key: SectionKey, section: CertificateSection) -> None:
    """TLSRefused unless TLS can use the certificate and its key."""
    try:
        check_keypair(section.chain_pem, section.key_pem)
    except BadCertificate as error:
        raise TLSRefused(f"{key}: {error}") from None
    load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), section, key)


def load_certificate(
    context: ssl.SSLContext, section: CertificateSection | SvidSection, key: str
) -> None:
    """Add a chain and its key; one of each key type may be in a context. `key` is for errors."""
    fd = os.memfd_create("weft-certificate", os.MFD_CLOEXEC)
    with os.fdopen(fd, "wb") as file:
        file.write(section.key_pem.encode() + b"\n" + section.chain_pem.encode())
        file.flush()
        try:
            # A password of our own, or OpenSSL would ask the terminal for one.
            context.load_cert_chain(f"/proc/self/fd/{fd}", password=b"")
        except ssl.SSLError as error:
            why = error.reason or "not usable"
            raise TLSRefused(f"{key}: OpenSSL refuses the certificate or key: {why}") from None
        except OSError as error:
            raise TLSRefused(f"{key}: cannot be loaded, is /proc mounted? ({error})") from None


def trust(context: ssl.SSLContext, ca_pem: str, what: str) -> None:
    """Peers must present a certificate that leads to one in `ca_pem`; an intermediate listed there
    is an anchor too, as in Go's verifier. `what` is for errors."""
    try:
        bundle = check_ca_bundle(ca_pem)
        context.load_verify_locations(cadata=bundle)
    except (BadCertificate, ssl.SSLError) as error:
        raise TLSRefused(f"{what}: {error}") from None
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
