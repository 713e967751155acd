"""What can be wrong with certificates of peers and with requests for certificates.

A reason is a word that is counted; `why` is for people. Neither ever holds key material.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

NotTrustedReason: TypeAlias = Literal[
    "no_certificate",  # none was presented, or what was presented is no X.509 certificate
    "not_an_svid",  # the leaf breaks the rules of X509-SVID
    "wrong_trust_domain",  # there is no trust bundle for the trust domain of its SPIFFE ID
    "not_yet_valid",
    "expired",
    "unknown_issuer",  # no valid path to a root of the trust domain of its SPIFFE ID
    "wrong_identity",  # valid, but somebody else's
    "session_forgotten",  # it resumes one of which nothing is known any more
]


class NotTrusted(Exception):
    """A peer is not who it says, or not who it should be. `reason` is for counters."""

    def __init__(self, reason: NotTrustedReason, why: str) -> None:
        super().__init__(why)
        self.reason: NotTrustedReason = reason
        self.why = why


class AuthorityError(Exception):
    """An authority's files, or certificates given to it, cannot be used: which, why, what to do."""


RefusedReason: TypeAlias = Literal[
    "too_large",
    "malformed",  # no PKCS #10 request, or not signed by its own key
    "weak_key",
    "not_one_uri",
    "bad_spiffe_id",
    "wrong_trust_domain",
    "not_on_this_node",  # no pod of the node that asks runs as that service account
    "issuer_expired",  # the authority has nothing to sign with
    "too_many",
]


class IssueRefused(Exception):
    """A certificate is not issued. `reason` is for counters."""

    def __init__(self, reason: RefusedReason, why: str) -> None:
        super().__init__(why)
        self.reason: RefusedReason = reason
        self.why = why
