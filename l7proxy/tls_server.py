"""TLS toward clients: one port's context, and the certificate for every SNI.

The port's context holds no certificate. The SNI callback finds the listener (most specific
hostname) and hands the handshake over to a context with the listener's certificate; no listener, no
handshake. What guards the port (client validation, versions, tickets) is the port's context's, so
no SNI leads around it; the other contexts repeat it because OpenSSL takes the trust store from
them. Sessions belong to the port's context: a new ServerTLS resumes none. In TLS 1.2 a resumed
connection counts as one for its session's name, whatever SNI comes with it.

Client validation: Python's ssl has no verify callback, so "AllowInsecureFallback" does not ask for
a certificate at all; backends cannot learn the identity even of clients that have a valid one.
Of a refused handshake clients see only that the connection ends: asyncio and uvloop close without
sending the alert.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping

from certs.keypair import KeyPair, check_keypair
from l7proxy import metrics, tls
from l7proxy.tls import TLSRefused as TLSRefused
from mesh.model.nodeconfig import CertificateSection, Listener, PortSection
from mesh.model.section import SectionKey

_ALPN = ["h2", "http/1.1"]


class _ServerObject(tls.BoundedObject):
    """Remembers the SNI, which Python's server side does not tell otherwise."""

    sni: str | None = None


class ServerTLS:
    """TLS of an HTTPS port with the certificates in force when it was made.

    Certificates that are missing are left out; a listener without any refuses its handshakes.
    TLSRefused: the client validation cannot be put in force.
    """

    def __init__(
        self, section: PortSection, certificates: Mapping[SectionKey, CertificateSection]
    ) -> None:
        self._validation = section.client_validation
        self._certificates = {
            key: certificates[key]
            for listener in section.listeners
            for key in listener.certificates
            if key in certificates
        }
        self._listeners = {listener.hostname or "*": listener for listener in section.listeners}
        self._contexts: dict[tuple[SectionKey, ...], ssl.SSLContext] = {}
        self._names: dict[SectionKey, KeyPair] = {}
        self.context = self._new_context()
        self.context.sslobject_class = _ServerObject
        self.context.sni_callback = self._choose

    check_certificate = staticmethod(tls.check_certificate)

    @staticmethod
    def sni_of(ssl_object: ssl.SSLObject) -> str | None:
        """The SNI a client of this port sent, lower case."""
        return ssl_object.sni if isinstance(ssl_object, _ServerObject) else None

    def _new_context(self) -> ssl.SSLContext:
        context = tls.new_context(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(_ALPN)
        validation = self._validation
        if validation is not None and validation.mode == "AllowValidOnly":
            tls.trust(context, validation.ca_pem, "client validation: CA bundle")
            # A resumed session would outlive the client's certificate (by two hours in TLS 1.2,
            # where Python leaves no way to do without).
            context.num_tickets = 0
        return context

    def _choose(self, ssl_object: ssl.SSLObject, sni: str | None, _: ssl.SSLContext) -> int | None:
        """The sni_callback: a context by SNI, or the alert that ends the handshake."""
        if self._validation is not None and self._validation.mode == "RefuseAll":
            metrics.REFUSED.labels("tls_client_validation_broken").inc()
            return int(ssl.ALERT_DESCRIPTION_ACCESS_DENIED)
        name = sni.lower().rstrip(".") if sni else None
        listener = self._listener(name)
        context = self._context(listener, name) if listener is not None else None
        if context is None:
            metrics.REFUSED.labels("tls_unknown_name").inc()
            return int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
        if isinstance(ssl_object, _ServerObject):
            ssl_object.sni = name
        ssl_object.context = context
        return None

    def _listener(self, name: str | None) -> Listener | None:
        """Most specific hostname first (nodeconfig.Listener)."""
        if name is not None:
            if (exact := self._listeners.get(name)) is not None:
                return exact
            rest = name
            while "." in rest:
                rest = rest.partition(".")[2]
                if (wildcard := self._listeners.get(f"*.{rest}")) is not None:
                    return wildcard
        return self._listeners.get("*")

    def _context(self, listener: Listener, name: str | None) -> ssl.SSLContext | None:
        keys = tuple(key for key in listener.certificates if key in self._certificates)
        if len(keys) > 1:
            keys = self._suited(keys, name)
        if not keys:
            return None
        context = self._contexts.get(keys)
        if context is None:
            context = self._new_context()
            for key in keys:
                tls.load_certificate(context, self._certificates[key], key)
            self._contexts[keys] = context
        return context

    def _suited(self, keys: tuple[SectionKey, ...], name: str | None) -> tuple[SectionKey, ...]:
        """Of a listener's certificates those that carry the name, or all if none does; of these the
        first of every key type, among which OpenSSL picks by what the client can do."""
        pairs = [(key, self._pair(key)) for key in keys]
        carrying = [(key, pair) for key, pair in pairs if name is not None and covers(pair, name)]
        first: dict[str, SectionKey] = {}
        for key, pair in carrying or pairs:
            first.setdefault(pair.key_type, key)
        return tuple(first.values())

    def _pair(self, key: SectionKey) -> KeyPair:
        if key not in self._names:
            section = self._certificates[key]
            self._names[key] = check_keypair(section.chain_pem, section.key_pem)
        return self._names[key]


def covers(pair: KeyPair, name: str) -> bool:
    """A DNS SAN is the name, or a wildcard for its first label (RFC 6125 §6.4.3)."""
    wildcard = "*." + name.partition(".")[2]
    return name in pair.dns or wildcard in pair.dns
