"""What agents and the authority say to each other: HTTP and JSON on a node's own unix socket.

POST /v1/svids: an IssueRequest, answered by an IssueAnswer with an answer for each request, in
order; 429 with Retry-After where it is too much at once. GET /v1/bundle?have=TAG: a BundleAnswer,
once there is one with another tag than that, or after `WAIT_S`. An agent sends a tag only when its
proxies have that bundle in force: the authority waits for that before it issues under a new root.
Knows shapes only.
"""

from __future__ import annotations

import msgspec

# Of a POST, and of certificates in it.
MAX_BODY = 256 * 1024
MAX_REQUESTS = 64
# How long a question for a bundle is held that has not changed.
WAIT_S = 30.0


class IssueRequest(msgspec.Struct, frozen=True):
    """PKCS #10 requests, PEM, at most MAX_REQUESTS."""

    requests: tuple[str, ...]


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A chain (PEM, leaf first), or a reason (certs.errors.RefusedReason) and why."""

    chain_pem: str = ""
    refused: str = ""
    why: str = ""


class IssueAnswer(msgspec.Struct, frozen=True):
    answers: tuple[Answer, ...]


class BundleAnswer(msgspec.Struct, frozen=True):
    """The roots (PEM) of each trust domain: the authority's own and federated ones."""

    tag: str
    trust_domain: str
    bundles: dict[str, str]
