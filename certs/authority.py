"""The authority of a trust domain: signs requests for certificates, and replaces its own in time.

The order of a root's rotation: the next root is published in the bundle; when every node has that
bundle, or has lost what it held of the old one, SVIDs are issued under the next root; the old one
stays in the bundle until everything under it has expired. Each step is written to disk before it is
done (`certs.state`). Knows certificates and time as it is told, no pods, no network: who may ask
for what is the caller's to say.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple, cast

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from certs.bundle import Bundle
from certs.errors import AuthorityError, IssueRefused
from certs.issue import Issuer, IssuerKey, Life
from certs.spiffe import BadSpiffeId, SpiffeId, check_trust_domain, parse
from certs.state import Retiring, Signer, State, StateFile

# Certificates are valid from a little earlier: clocks of nodes differ.
SKEW_S = 60.0
# A P-256 request is 500 bytes; more than this is none of ours.
MAX_REQUEST = 8 * 1024
_DAY_S = 86_400.0
# Former roots at a time; a bundle has to stay small.
_MAX_RETIRING = 8
# What is left of an issuer's life when it is replaced.
_ROOT_LEFT = 0.2
_INTERMEDIATE_LEFT = 1 / 3


class Lives(NamedTuple):
    """How long certificates are valid, in seconds."""

    root_s: float = 3650 * _DAY_S
    intermediate_s: float = 30 * _DAY_S
    svid_s: float = 3600.0


class Issued(NamedTuple):
    """`chain_pem`: leaf, then intermediates; `not_after` in seconds since 1970 UTC."""

    spiffe_id: SpiffeId
    chain_pem: str
    not_after: int


class Described(NamedTuple):
    """A certificate of the authority, for people. `role`: "root" or "intermediate"; `state`:
    "active", "next" or "retiring"; times in seconds since 1970 UTC, `until`: when a retiring one
    goes."""

    role: str
    state: str
    subject: str
    serial: str
    not_before: float
    not_after: float
    brought: bool = False
    until: float | None = None


class Authority:
    """One trust domain's authority, in a directory of its own."""

    def __init__(
        self,
        directory: Path,
        trust_domain: str,
        lives: Lives,
        now: float,
        brought: Signer | None = None,
    ) -> None:
        """Opens it, or makes it (of what is `brought`, if anything). AuthorityError: it cannot be
        used."""
        try:
            self._uri = f"spiffe://{check_trust_domain(trust_domain)}"
        except BadSpiffeId as error:
            raise AuthorityError(str(error)) from None
        self._lives = lives
        self._file = StateFile(directory)
        try:
            state = self._file.read()
            if state is None:
                signer = self._complete(brought or self._new_root(now), now)
                state = State(trust_domain, 1, signer, lives.svid_s)
                self._file.write(state)
            elif state.trust_domain != trust_domain:
                raise AuthorityError(
                    f"{directory} is the authority of {state.trust_domain}, not of {trust_domain}: "
                    "choose another directory"
                )
            self._state = state
            self._load()
            if lives.svid_s > state.longest_life_s:
                self._change(longest_life_s=lives.svid_s)
        except ValueError:
            # The library's own words could quote the file.
            self._file.close()
            raise self._file.damaged() from None
        except BaseException:
            self._file.close()
            raise

    @property
    def version(self) -> int:
        """Of the bundle: rises when its roots change."""
        return self._state.version

    @property
    def trust_domain(self) -> str:
        return self._state.trust_domain

    def close(self) -> None:
        self._file.close()

    # --- issuing ---------------------------------------------------------------------------------

    def sign(self, request_pem: str, allowed: Collection[SpiffeId], now: float) -> Issued:
        """A certificate for the one SPIFFE ID in a request, which has to be one of `allowed`; the
        request's public key is taken over and nothing else. IssueRefused: why not."""
        spiffe_id, key = _read_request(request_pem)
        if spiffe_id.trust_domain != self.trust_domain:
            raise IssueRefused(
                "wrong_trust_domain", f"{spiffe_id} is not of trust domain {self.trust_domain}"
            )
        if spiffe_id not in allowed:
            raise IssueRefused("not_on_this_node", f"{spiffe_id} is no identity of this node's")
        if why := self.problem(now):
            raise IssueRefused("issuer_expired", why)
        end = min(
            now + self._lives.svid_s,
            *(one.not_valid_after_utc.timestamp() for one in (self._root, *self._chain)),
        )
        leaf = self._issuer.svid(key, spiffe_id, Life.between(now - SKEW_S, end))
        chain = leaf.public_bytes(Encoding.PEM).decode() + self._state.signer.chain
        return Issued(spiffe_id, chain, math.floor(end))

    def problem(self, now: float) -> str:
        """Why nothing can be issued now, or ""."""
        for one in (self._root, *self._chain):
            if why := _unusable(one, now):
                remedy = "bring another" if self._state.signer.brought else "it is being replaced"
                return f"{why}: {remedy}"
        return ""

    def bundle(self) -> Bundle:
        """All roots that certificates in use may lead to."""
        state = self._state
        roots = {state.signer.root, *(one.root for one in state.retiring)}
        if state.next is not None:
            roots.add(state.next.root)
        # In an order that does not tell which of them is in use.
        return Bundle.from_pem(self.trust_domain, "".join(sorted(roots)))

    # --- rotation --------------------------------------------------------------------------------

    def rotate_root(self, now: float) -> None:
        """Publish the next root, made here. AuthorityError: a rotation is under way already."""
        self._publish_next(self._new_root(now), now)

    def _bring(self, signer: Signer, now: float) -> None:
        """Go over to what was brought, if it is another one."""
        state = self._state
        if _same(state.signer, signer):
            return
        if signer.root in (state.signer.root, *(one.root for one in state.retiring)):
            # Everybody trusts it: only who issues under it changes.
            self._go_over(signer, now)
        else:
            self._publish_next(signer, now)

    def rotate_intermediate(self, now: float) -> None:
        """Issue under a new intermediate from now on. AuthorityError: this one was brought."""
        signer = self._state.signer
        if not signer.root_key:
            raise AuthorityError(
                "the intermediate was brought: renew it where it comes from, and Weft takes it over"
            )
        self._change(signer=self._complete(signer, now))
        self._load()

    def tick(self, now: float, everywhere: int, brought: Signer | None = None) -> float:
        """Do what is due. `everywhere`: the bundle's version that all nodes have; `brought`: the
        authority to go over to. Returns when to look again at the latest (seconds since 1970 UTC).
        AuthorityError: a step could not be written down, and was not done."""
        self._heed_clock(now)
        state = self._state
        if state.next is not None and (
            everywhere >= state.next_version
            or now >= state.next_since + state.longest_life_s
            or _unusable(self._root, now)  # and so is all that was issued
        ):
            self._go_over(state.next, now)
        state = self._state
        kept = tuple(one for one in state.retiring if one.until > now)
        if kept != state.retiring:
            self._change(retiring=kept, version=state.version + 1)
        due = [one.until for one in kept]
        if self._state.next is None:
            if brought is not None:
                if not _unusable(_one(brought.root), now):
                    self._bring(brought, now)
            elif not self._state.signer.brought:
                if not _lasts(self._root, _ROOT_LEFT, now):
                    self.rotate_root(now)
                due.append(max(_replaced_at(self._root, _ROOT_LEFT), now + 1))
        if self._state.next is not None:
            due.append(max(self._state.next_since + self._state.longest_life_s, now + 1))
        if _unusable(self._root, now):
            due.append(now + 1 if self._state.next is not None else math.inf)
        elif self._state.signer.root_key:
            if not _lasts(self._chain[0], _INTERMEDIATE_LEFT, now):
                self.rotate_intermediate(now)
            due.append(max(_replaced_at(self._chain[0], _INTERMEDIATE_LEFT), now + 1))
        return min(due, default=math.inf)

    def _heed_clock(self, now: float) -> None:
        """Forget what is of no use any more, or was made or noted by a clock that was ahead."""
        state = self._state
        if state.next is None:
            return
        if _unusable(_one(state.next.root), now):
            self._change(next=None, version=state.version + 1)
        elif state.next_since > now:
            self._change(next_since=now)

    def describe(self) -> list[Described]:
        """All certificates of the authority, keys left out."""
        state = self._state
        brought = state.signer.brought
        result = [_described("root", "active", self._root, brought)]
        own = brought and not state.signer.root_key
        result += [_described("intermediate", "active", one, own) for one in self._chain]
        if state.next is not None:
            result.append(_described("root", "next", _one(state.next.root), state.next.brought))
        for one in state.retiring:
            result.append(_described("root", "retiring", _one(one.root))._replace(until=one.until))
        return result

    def _publish_next(self, signer: Signer, now: float) -> None:
        if self._state.next is not None:
            raise AuthorityError("a rotation of the root is under way: wait until it is through")
        if len(self._state.retiring) >= _MAX_RETIRING:
            raise AuthorityError(
                f"{_MAX_RETIRING} former roots are still in use: wait until one has gone"
            )
        version = self._state.version + 1
        self._change(next=signer, next_version=version, next_since=now, version=version)

    def _go_over(self, signer: Signer, now: float) -> None:
        """Issue under another root, or another issuer of the same."""
        state = self._state
        retiring = [one for one in state.retiring if one.root != signer.root]
        version = state.version
        if signer.root != state.signer.root:
            # What was issued a moment ago is valid for as long.
            retiring.append(Retiring(state.signer.root, now + state.longest_life_s))
        self._change(
            signer=self._complete(signer, now),
            next=None if state.next is None or _same(state.next, signer) else state.next,
            retiring=tuple(retiring),
            version=version,
        )
        self._load()

    def _change(self, **changes: object) -> None:
        state = msgspec.structs.replace(self._state, **changes)
        self._file.write(state)
        self._state = state

    def _load(self) -> None:
        signer = self._state.signer
        self._root = _one(signer.root)
        self._chain = x509.load_pem_x509_certificates(signer.chain.encode())
        self._issuer = Issuer(self._chain[0], _key(signer.issuer_key))
        self.bundle()

    def _new_root(self, now: float) -> Signer:
        life = Life.between(now - SKEW_S, now + self._lives.root_s)
        number = f"{x509.random_serial_number():x}"[:8]
        root = Issuer.new_root(f"Weft root {number}", life, self._uri)
        return Signer(root=_pem(root.certificate), root_key=root.key_pem().decode())

    def _complete(self, signer: Signer, now: float) -> Signer:
        """With a new intermediate, if its root may make one."""
        if not signer.root_key:
            return signer
        certificate = _one(signer.root)
        if why := _unusable(certificate, now):
            raise AuthorityError(f"{why}: it can issue nothing")
        root = Issuer(certificate, _key(signer.root_key))
        end = min(now + self._lives.intermediate_s, certificate.not_valid_after_utc.timestamp())
        number = f"{x509.random_serial_number():x}"[:8]
        intermediate = root.new_intermediate(
            f"Weft intermediate {number}", Life.between(now - SKEW_S, end), self._uri
        )
        return msgspec.structs.replace(
            signer,
            chain=_pem(intermediate.certificate),
            issuer_key=intermediate.key_pem().decode(),
        )


def _read_request(pem: str) -> tuple[SpiffeId, ec.EllipticCurvePublicKey]:
    if len(pem) > MAX_REQUEST:
        raise IssueRefused("too_large", f"a request has at most {MAX_REQUEST} bytes")
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        signed, key = request.is_signature_valid, request.public_key()
        names = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        signed, key, uris = request.is_signature_valid, request.public_key(), []
    except Exception:
        # Of more kinds than the library documents; see certs.svid.
        raise IssueRefused("malformed", "it is no certificate request (PKCS #10, PEM)") from None
    if not signed:
        raise IssueRefused("malformed", "the request is not signed by its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in (
        "secp256r1",
        "secp384r1",
    ):
        raise IssueRefused("weak_key", "its key is neither ECDSA P-256 nor P-384")
    if len(uris) != 1:
        raise IssueRefused("not_one_uri", f"it has {len(uris)} URI names instead of one")
    try:
        return parse(uris[0]), key
    except BadSpiffeId as error:
        raise IssueRefused("bad_spiffe_id", str(error)) from None


def _same(one: Signer, other: Signer) -> bool:
    """Whether two are the same as they were given, before anything was made under them."""
    if one.root != other.root:
        return False
    return bool(one.root_key and other.root_key) or one.chain == other.chain


def _replaced_at(certificate: x509.Certificate, left: float) -> float:
    start = certificate.not_valid_before_utc.timestamp()
    end = certificate.not_valid_after_utc.timestamp()
    return end - (end - start) * left


def _lasts(certificate: x509.Certificate, left: float, now: float) -> bool:
    """Whether it need not be replaced: as it would have to be too where it was made by a clock that
    was ahead."""
    return certificate.not_valid_before_utc.timestamp() <= now < _replaced_at(certificate, left)


def _unusable(certificate: x509.Certificate, now: float) -> str:
    """Why it cannot be used now, or ""."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    subject = certificate.subject.rfc4514_string()
    if end.timestamp() <= now:
        return f"{subject} has expired ({end:%Y-%m-%d %H:%M} UTC)"
    if start.timestamp() > now:
        return f"{subject} is not valid before {start:%Y-%m-%d %H:%M} UTC"
    return ""


def _described(
    role: str, state: str, certificate: x509.Certificate, brought: bool = False
) -> Described:
    return Described(
        role,
        state,
        certificate.subject.rfc4514_string(),
        f"{certificate.serial_number:x}",
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
        brought,
    )


def _one(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()


def _key(pem: str) -> IssuerKey:
    return cast(IssuerKey, load_pem_private_key(pem.encode(), None))
