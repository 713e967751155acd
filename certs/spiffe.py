"""SPIFFE IDs: spiffe://<trust domain>/<path>, and that of a workload, .../ns/<namespace>/sa/<name>.

By the SPIFFE-ID specification (spiffe/standards/SPIFFE-ID.md, section 2), which is narrower than
URIs: no user, port, query, fragment or percent-encoding, and one spelling of each ID, so that IDs
are compared as text. Knows names only, no certificates.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_SCHEME = "spiffe://"
# Section 2.3, "maximum SPIFFE ID length", and 2.1.
_MAX_ID = 2048
_MAX_TRUST_DOMAIN = 255
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
# Of a host name (RFC 1035, section 2.3.4), and so of SNI.
_MAX_NAME = 253
_MAX_LABEL = 63

# The workload as which a Gateway's proxy speaks to workloads of other nodes.
GATEWAY_NAMESPACE = "weft-system"
GATEWAY_SERVICE_ACCOUNT = "weft-gateway"


class BadSpiffeId(ValueError):
    """A text is no SPIFFE ID, or one that cannot be used here; which, and why."""


class SpiffeId(NamedTuple):
    """`path` begins with "/", or is "" for the trust domain itself. Make it with `parse`,
    `workload` or `gateway`, which check."""

    trust_domain: str
    path: str

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain}{self.path}"

    @property
    def workload(self) -> tuple[str, str] | None:
        """Namespace and name of the service account; None: it is of another form."""
        match self.path.split("/"):
            case ["", "ns", namespace, "sa", service_account]:
                return namespace, service_account
        return None


def parse(text: str) -> SpiffeId:
    """BadSpiffeId: it is none."""
    if len(text) > _MAX_ID:
        raise BadSpiffeId(f"a SPIFFE ID has at most {_MAX_ID} bytes, this one {len(text)}")
    if not text.startswith(_SCHEME):
        raise BadSpiffeId(f"{text!r} does not begin with {_SCHEME}")
    trust_domain, slash, path = text.removeprefix(_SCHEME).partition("/")
    check_trust_domain(trust_domain)
    for segment in path.split("/") if slash else ():
        if segment in ("", ".", "..") or not _SEGMENT.fullmatch(segment):
            raise BadSpiffeId(
                f"{text!r}: path segment {segment!r} is not made of letters, digits, '.', '-' and "
                "'_', or is empty or a dot segment"
            )
    return SpiffeId(trust_domain, slash + path)


def check_trust_domain(name: str) -> str:
    """The name as it is. BadSpiffeId: it cannot be a trust domain's."""
    if len(name) > _MAX_TRUST_DOMAIN or not _TRUST_DOMAIN.fullmatch(name):
        raise BadSpiffeId(
            f"{name[:300]!r} is no trust domain: 1 to {_MAX_TRUST_DOMAIN} small letters, digits, "
            "'.', '-' and '_'"
        )
    return name


def workload(trust_domain: str, namespace: str, service_account: str) -> SpiffeId:
    """BadSpiffeId: one of the names cannot be in one."""
    found = parse(f"{_SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}")
    if found.workload != (namespace, service_account):
        raise BadSpiffeId(f"{namespace!r} and {service_account!r} cannot be names in a SPIFFE ID")
    return found


def gateway(trust_domain: str) -> SpiffeId:
    """Who a Gateway's proxy is, on every node. BadSpiffeId: no trust domain's name."""
    return workload(trust_domain, GATEWAY_NAMESPACE, GATEWAY_SERVICE_ACCOUNT)


def to_sni(spiffe_id: SpiffeId) -> str:
    """The server name by which a proxy asks for a workload: sa.<name>.ns.<namespace>.<trust
    domain>. BadSpiffeId: no workload's, or too long, or not to be told from another one (a service
    account may have ".ns." in its name)."""
    names = spiffe_id.workload
    if names is None:
        raise BadSpiffeId(f"{spiffe_id} is no workload's: /ns/<namespace>/sa/<service account>")
    namespace, service_account = names
    name = f"sa.{service_account}.ns.{namespace}.{spiffe_id.trust_domain}".lower()
    if from_sni(name) != spiffe_id:
        raise BadSpiffeId(f"{spiffe_id} cannot be written as a server name (SNI)")
    return name


def from_sni(name: str) -> SpiffeId | None:
    """The workload that a server name asks for; None: it has another form."""
    if len(name) > _MAX_NAME or not all(0 < len(one) <= _MAX_LABEL for one in name.split(".")):
        return None
    service_account, _, rest = name.removeprefix("sa.").partition(".ns.")
    namespace, _, trust_domain = rest.partition(".")
    try:
        found = workload(trust_domain, namespace, service_account)
    except BadSpiffeId:
        return None
    return found if name.startswith("sa.") else None
