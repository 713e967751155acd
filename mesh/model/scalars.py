"""Constrained scalar types of Kubernetes and Gateway API, under the names their APIs give them.

They carry the schema's constraints as msgspec Meta; this module knows nothing of objects. Patterns
are the CRDs' own with two differences: `\\Z` stands for `$`, which in Python also matches before a
line feed, and where the CRD's form backtracks exponentially in Python an equal linear one stands.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

from msgspec import Meta

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z"
DNS_SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z"
WILDCARD_DOMAIN = r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z"
LABEL_KEY = (
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
    r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]\Z"
)
LABEL_VALUE = r"^(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?\Z"
# RFC 3339, as metav1.Time is written.
DATE_TIME = (
    r"^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
    r"[Tt]([01]\d|2[0-3]):[0-5]\d:([0-5]\d|60)(\.\d+)?([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)\Z"
)

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Int32: TypeAlias = Annotated[int, Meta(ge=INT32_MIN, le=INT32_MAX)]
PositiveInt32: TypeAlias = Annotated[int, Meta(ge=1, le=INT32_MAX)]
NonNegativeInt32: TypeAlias = Annotated[int, Meta(ge=0, le=INT32_MAX)]
Int64: TypeAlias = Annotated[int, Meta(ge=INT64_MIN, le=INT64_MAX)]
PositiveInt: TypeAlias = Annotated[int, Meta(ge=1, le=INT64_MAX)]
NonNegativeInt64: TypeAlias = Annotated[int, Meta(ge=0, le=INT64_MAX)]
PortNumber: TypeAlias = Annotated[int, Meta(ge=1, le=65535)]
Percent: TypeAlias = Annotated[int, Meta(ge=0, le=100)]
BackendWeight: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000)]
HTTPRouteRetryStatusCode: TypeAlias = Annotated[int, Meta(ge=400, le=599)]

Timestamp: TypeAlias = Annotated[str, Meta(pattern=DATE_TIME)]
# GEP-2257; `mesh.model.meta.parse_duration` gives milliseconds.
Duration: TypeAlias = Annotated[str, Meta(pattern=r"^([0-9]{1,5}(h|m|s|ms)){1,4}\Z")]

Group: TypeAlias = Annotated[
    str,
    Meta(
        max_length=253,
        pattern=r"^\Z|^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z",
    ),
]
Kind: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=63, pattern=r"^[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?\Z")
]
ObjectName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=253)]
Namespace: TypeAlias = Annotated[str, Meta(min_length=1, max_length=63, pattern=DNS_LABEL)]
SectionName: TypeAlias = Annotated[str, Meta(min_length=1, max_length=253, pattern=DNS_SUBDOMAIN)]
Hostname: TypeAlias = Annotated[str, Meta(min_length=1, max_length=253, pattern=WILDCARD_DOMAIN)]
PreciseHostname: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=253, pattern=DNS_SUBDOMAIN)
]
GatewayController: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
        r"\/[A-Za-z0-9\/\-._~%!$&'()*+,;=:]+\Z",
    ),
]
ProtocolType: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=255,
        pattern=r"^[a-zA-Z0-9]([-a-zA-Z0-9]*[a-zA-Z0-9])?\Z"
        r"|[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\/[A-Za-z0-9]+\Z",
    ),
]
# The CRD's pattern anchors only its first and last alternative; kept as it is.
AddressType: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=253,
        pattern=r"^Hostname|IPAddress|NamedAddress"
        r"|[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
        r"\/[A-Za-z0-9\/\-._~%!$&'()*+,;=:]+\Z",
    ),
]
AnnotationValue: TypeAlias = Annotated[str, Meta(max_length=4096)]
LabelValue: TypeAlias = Annotated[str, Meta(max_length=63, pattern=LABEL_VALUE)]

# RFC 9110 token.
HeaderName: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9!#$%&'*+\-.^_\x60|~]+\Z")
]
# The CRD writes `^[!-~]+([\t ]?[!-~]+)*$`, which is exponential in a backtracking engine.
HeaderValue: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=4096, pattern=r"^[!-~]+([\t ][!-~]+)*\Z")
]
HeaderMatchValue: TypeAlias = Annotated[str, Meta(min_length=1, max_length=4096)]
QueryParamMatchValue: TypeAlias = Annotated[str, Meta(min_length=1, max_length=1024)]
Text1024: TypeAlias = Annotated[str, Meta(max_length=1024)]
CORSOrigin: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=253,
        pattern=r"(^\*\Z)|(^(http(s)?):\/\/(((\*\.)?([a-zA-Z0-9\-]+\.)*[a-zA-Z0-9-]+|\*)"
        r"(:([0-9]{1,5}))?)\Z)",
    ),
]
ExternalAuthPath: TypeAlias = Annotated[
    str,
    Meta(max_length=1024, pattern=r"^(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|[%][0-9a-fA-F]{2})+\Z"),
]
AbsoluteURI: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=253,
        pattern=r"^(([^:/?#]+):)(//([^/?#]*))([^?#]*)(\?([^#]*))?(#(.*))?",
    ),
]
WellKnownCACertificates: TypeAlias = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=253,
        pattern=r"^(System|([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/"
        r"([A-Za-z0-9][-A-Za-z0-9_.]{0,61})?[A-Za-z0-9]))\Z",
    ),
]
