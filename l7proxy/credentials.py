"""The identities that this node holds and the roots that it trusts, as TLS needs them.

TLS 1.3 only, with certificates on both sides and ALPN `weft/1`. A session is resumed between the
two identities that made it and no others, until the client has another SVID or the server should
have; a handshake then costs a third. Whoever resumes is judged by the certificates of the session,
as if they had just been shown. There is no early data: Python's ssl sends none and takes none
(RFC 8446 §2.3).

OpenSSL verifies against all roots, to know what it says in an alert; whose they are is verified
after the handshake by `certs.svid`: against the roots of the peer's own trust domain only. Knows
certificates and contexts, no workloads and no connections.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from typing import Any, NamedTuple, cast

from cryptography import x509

from certs.bundle import BadBundle, Bundle
from certs.errors import NotTrusted
from certs.keypair import BadCertificate, check_keypair
from certs.spiffe import BadSpiffeId, parse, to_sni
from certs.svid import peer_identity
from l7proxy import tls
from l7proxy.field_rules import Refused
from mesh.model.nodeconfig import SvidSection, TrustBundleSection
from mesh.model.section import svid_key

ALPN = "weft/1"
# Peers whose chains need not be verified again until one of the certificates ends; sessions.
_MAX_VERIFIED = _MAX_SESSIONS = 4096


class Peer(NamedTuple):
    """A verified peer. `chain`: what it presented, leaf first, DER; `until`: when the first of it
    ends, seconds since 1970 UTC."""

    spiffe_id: str
    trust_domain: str
    until: int
    chain: tuple[bytes, ...]


class SessionKey(NamedTuple):
    """Between whom a session is: two SPIFFE IDs, and the address of the other's node."""

    own: str
    peer: str
    node: str


class _Session(NamedTuple):
    """Not to be used after `until`, seconds since 1970 UTC."""

    session: ssl.SSLSession
    until: float


class _ServerObject(ssl.SSLObject):
    """Remembers who was asked for, and which session the peer would resume: afterwards OpenSSL has
    only that of the next ticket."""

    spiffe_id: str = ""
    resumes: bytes = b""


class Credentials:
    """SVIDs by SPIFFE ID, and trust bundles by trust domain."""

    def __init__(self) -> None:
        self._svids: dict[str, SvidSection] = {}
        self._until: dict[str, int] = {}
        self._names: dict[str, str] = {}  # SPIFFE ID by server name
        self._bundles: dict[str, Bundle] = {}
        self._clients: dict[tuple[str, str], ssl.SSLContext] = {}
        self._servers: dict[str, ssl.SSLContext] = {}
        self._server: ssl.SSLContext | None = None
        self._verified: dict[tuple[bytes, ...], Peer] = {}
        # In a session there is only the leaf. Who was asked for, and what came with it: of peers
        # that ask by their session, of those that are asked by the leaf. The oldest go.
        self._chains: dict[bytes, tuple[str, tuple[bytes, ...]]] = {}
        self._sessions: dict[SessionKey, _Session] = {}

    # --- configuration ----------------------------------------------------------------------------

    def put_svid(self, section: SvidSection) -> None:
        """Refused: the one before stays in force."""
        where = f"the SVID of {section.spiffe_id}"
        try:
            spiffe_id = parse(section.spiffe_id)
            pair = check_keypair(section.chain_pem, section.key_pem)
        except (BadSpiffeId, BadCertificate) as error:
            raise Refused(f"{where}: {error}") from None
        if pair.uris != (section.spiffe_id,):
            raise Refused(f"{where}: its certificate is for {', '.join(pair.uris) or 'nobody'}")
        try:
            tls.load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), section, where)
        except tls.TLSRefused as error:
            raise Refused(str(error)) from None
        self.remove_svid(section.spiffe_id)
        self._svids[section.spiffe_id] = section
        self._until[section.spiffe_id] = min(section.not_after, int(pair.not_after.timestamp()))
        try:
            self._names[to_sni(spiffe_id)] = section.spiffe_id
        except BadSpiffeId:
            pass  # nobody can ask for it, but it can ask

    def remove_svid(self, spiffe_id: str) -> None:
        self._svids.pop(spiffe_id, None)
        self._until.pop(spiffe_id, None)
        self._names = {name: one for name, one in self._names.items() if one != spiffe_id}
        self._servers.pop(spiffe_id, None)
        self._clients = {key: one for key, one in self._clients.items() if key[0] != spiffe_id}
        self._sessions = {key: one for key, one in self._sessions.items() if key.own != spiffe_id}

    def put_bundle(self, section: TrustBundleSection) -> None:
        """Refused: the one before stays in force."""
        try:
            bundle = Bundle.from_pem(section.trust_domain, section.roots_pem)
        except BadBundle as error:
            raise Refused(str(error)) from None
        self._bundles[section.trust_domain] = bundle
        self._forget_contexts()

    def remove_bundle(self, trust_domain: str) -> None:
        self._bundles.pop(trust_domain, None)
        self._forget_contexts()

    def _forget_contexts(self) -> None:
        """And with them all sessions: a context has the key of the tickets that it gave out."""
        self._sessions.clear()
        self._chains.clear()
        self._clients.clear()
        self._servers.clear()
        self._server = None
        self._verified.clear()

    # --- what is there ----------------------------------------------------------------------------

    @property
    def any(self) -> bool:
        return bool(self._svids or self._bundles)

    def trusts(self, trust_domain: str) -> bool:
        return trust_domain in self._bundles

    def until(self, spiffe_id: str) -> int:
        """When an SVID ends; 0: it is not held."""
        return self._until.get(spiffe_id, 0)

    def problem(self, spiffe_id: str, now: float) -> tuple[str, str] | None:
        """Why nobody can be `spiffe_id` now: a reason to count, and words."""
        until = self.until(spiffe_id)
        if until > now:
            return None
        if not until:
            return "svid_missing", f"this node holds no SVID of {spiffe_id}"
        return "svid_expired", f"the SVID of {spiffe_id} has expired {now - until:.0f} s ago"

    # --- contexts ---------------------------------------------------------------------------------

    def client(self, spiffe_id: str, trust_domain: str) -> ssl.SSLContext:
        """To connect as `spiffe_id` to a peer of `trust_domain`; both must be there."""
        context = self._clients.get((spiffe_id, trust_domain))
        if context is None:
            context = _context(ssl.PROTOCOL_TLS_CLIENT)
            context.load_verify_locations(cadata=self._bundles[trust_domain].to_pem())
            self._load(context, spiffe_id)
            self._clients[spiffe_id, trust_domain] = context
        return context

    def server(self) -> ssl.SSLContext:
        """For whoever connects: the server name says as whom it is answered."""
        if self._server is None:
            self._server = self._server_context()
            self._server.sslobject_class = _ServerObject
            self._server.sni_callback = self._choose
        return self._server

    def _server_context(self) -> ssl.SSLContext:
        context = _context(ssl.PROTOCOL_TLS_SERVER)
        # A ticket is the name of a session that is kept here (OpenSSL keeps at most 20,480): of one
        # that holds a session the certificates are decoded, most of what resuming then costs.
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 1
        for bundle in self._bundles.values():
            context.load_verify_locations(cadata=bundle.to_pem())
        return context

    def _choose(self, ssl_object: ssl.SSLObject, sni: str | None, _: ssl.SSLContext) -> int | None:
        """The sni_callback. Without an SVID that is valid there is no handshake."""
        spiffe_id = self._names.get(sni.lower()) if sni else None
        if spiffe_id is None or self.problem(spiffe_id, time.time()) is not None:
            return int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)
        context = self._servers.get(spiffe_id)
        if context is None:
            context = self._server_context()
            self._load(context, spiffe_id)
            self._servers[spiffe_id] = context
        if isinstance(ssl_object, _ServerObject):
            ssl_object.spiffe_id = spiffe_id
            with contextlib.suppress(ValueError):  # there is none yet
                ssl_object.resumes = _session_id(ssl_object)
        ssl_object.context = context
        return None

    def _load(self, context: ssl.SSLContext, spiffe_id: str) -> None:
        tls.load_certificate(context, self._svids[spiffe_id], svid_key(spiffe_id))

    def in_force(self, ssl_object: ssl.SSLObject, own: str, peer: Peer) -> bool:
        """Whether SVID and roots are those with which this end made its handshake, as `own`."""
        if isinstance(ssl_object, _ServerObject):
            return self._servers.get(own) is ssl_object.context
        return self._clients.get((own, peer.trust_domain)) is ssl_object.context

    # --- sessions ---------------------------------------------------------------------------------

    def session(self, key: SessionKey) -> ssl.SSLSession | None:
        """One to resume; its context is that of `client`."""
        kept = self._sessions.get(key)
        return kept.session if kept is not None and kept.until > time.time() else None

    def keep_session(self, key: SessionKey, ssl_object: ssl.SSLObject, peer: Peer) -> None:
        """Once the peer's ticket has come. It serves for half of the time that the certificate has
        which the peer has shown: by then it has another. One that was resumed is kept already."""
        if ssl_object.session_reused:
            return
        if self._clients.get((key.own, peer.trust_domain)) is not ssl_object.context:
            return  # SVID or roots have changed meanwhile
        session, now = ssl_object.session, time.time()
        if session is None or not session.has_ticket:
            return
        if len(self._sessions) >= _MAX_SESSIONS:
            self._sessions.clear()
        self._sessions[key] = _Session(session, now + (peer.until - now) / 2)

    def forget_session(self, key: SessionKey) -> None:
        self._sessions.pop(key, None)

    # --- peers ------------------------------------------------------------------------------------

    def verify(self, ssl_object: ssl.SSLObject, expected: str | None = None) -> Peer:
        """Who the peer of a finished handshake is. NotTrusted: it is nobody, or not `expected`."""
        asked = self.asked_for(ssl_object)
        names = [ssl_object.getpeercert(binary_form=True) or b""]
        if isinstance(ssl_object, _ServerObject):
            names = [ssl_object.resumes, _session_id(ssl_object)]
        if ssl_object.session_reused:
            before, chain = self._chains.get(names[0], ("", ()))
            if not chain:  # roots have changed during the handshake
                raise NotTrusted("session_forgotten", "what was shown in its session is forgotten")
            if before != asked:
                raise NotTrusted("wrong_identity", "it resumes a session between others")
        else:
            names, chain = names[-1:], _presented(ssl_object)
        peer = self.judge(chain)
        if expected is not None and peer.spiffe_id != expected:
            raise NotTrusted("wrong_identity", f"it is {peer.spiffe_id}, not {expected}")
        for name in names:
            self._chains.pop(name, None)
            self._chains[name] = asked, chain
        while len(self._chains) > _MAX_SESSIONS:
            del self._chains[next(iter(self._chains))]
        return peer

    def judge(self, chain: tuple[bytes, ...]) -> Peer:
        """Whose a chain is, now. NotTrusted: nobody's."""
        now = time.time()
        peer = self._verified.get(chain)
        if peer is None or peer.until <= now:
            spiffe_id = peer_identity(chain, self._bundles, now)
            ends = (x509.load_der_x509_certificate(one).not_valid_after_utc for one in chain)
            until = int(min(ends).timestamp())
            peer = Peer(str(spiffe_id), spiffe_id.trust_domain, until, chain)
            if len(self._verified) >= _MAX_VERIFIED:
                self._forget_contexts()
            self._verified[chain] = peer
        return peer

    @staticmethod
    def asked_for(ssl_object: ssl.SSLObject) -> str:
        """As whom the server answered ("" for no server)."""
        return ssl_object.spiffe_id if isinstance(ssl_object, _ServerObject) else ""


def _session_id(ssl_object: ssl.SSLObject) -> bytes:
    session = ssl_object.session
    return session.id if session is not None else b""


def handshake_failure(error: Exception) -> tuple[str, str]:
    """What a handshake without success means: a reason to count, and words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        # X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED (x509_vfy.h)
        reasons = {9: "not_yet_valid", 10: "expired"}
        return reasons.get(error.verify_code, "unknown_issuer"), error.verify_message
    if isinstance(error, ssl.SSLError):
        words = (error.reason or str(error)).lower().replace("_", " ")
        return ("refused_by_peer" if "alert" in words else "handshake"), words
    return "handshake", str(error)


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.check_hostname = False  # identities are verified instead
    context.verify_mode = ssl.CERT_REQUIRED
    # Whatever is in a bundle is an anchor, as to certs.svid.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols([ALPN])
    return context


def _presented(ssl_object: ssl.SSLObject) -> tuple[bytes, ...]:
    """The chain that the peer sent, leaf first, DER. Python has it in public since 3.13; before,
    the object underneath has."""
    public = getattr(ssl_object, "get_unverified_chain", None)
    if public is not None:
        return tuple(public())
    import _ssl

    chain = cast(Any, ssl_object)._sslobj.get_unverified_chain() or ()
    return tuple(one.public_bytes(_ssl.ENCODING_DER) for one in chain)
