"""Why the programs did what they did: the one table of reasons, for Python and, generated, for C.

Each reason has a per-CPU counter of its number in the map `counters`. Those with an errno refuse:
the caller's connect(2) or sendmsg(2) fails with it.
"""

from __future__ import annotations

import enum
import errno


@enum.unique
class Reason(enum.IntEnum):
    """Numbers are indices into the counters: append, never renumber."""

    PASSED = 0, None, "the destination is no frontend; left as it was"
    BALANCED = 1, None, "a backend was chosen for a frontend, and nothing stands in between"
    ANSWERED = 2, None, "getpeername or recvmsg answered the frontend the workload asked for"
    NO_BACKENDS = 3, errno.ECONNREFUSED, "the frontend has no backends; kube-proxy rejects it too"
    STALE_TABLE = 4, errno.ECONNREFUSED, "a frontend's table names no backend"
    WRONG_FAMILY = 5, errno.ECONNREFUSED, "an IPv6 backend behind an IPv4 frontend"
    NO_ORIGIN = 6, errno.ENOMEM, "the original destination could not be kept"
    TO_PROXY = 7, None, "to this node's proxy, which routes HTTP requests"
    TO_RELAY = 8, None, "to this node's relay, for a pod of another node"
    ENROLLED = 9, None, "a connection between proxy and workload goes by redirect"
    ENROL_FAILED = 10, None, "a connection could not be enrolled and stays plain or is closed"
    REDIRECTED = 11, None, "a message of the proxy was redirected to a workload's socket"
    REDIRECT_MISSED = 12, None, "a message was for a workload's socket that is gone; send fails"
    UNPAIRED = 13, None, "a message of the proxy came before its receiver was known; send fails"
    EVENTS_LOST = 14, None, "an event was lost: nobody took them out of the full buffer"

    SPOOFED = 15, None, "a pod sent from an address that is not its own; dropped"
    FILTER_FROM_POD = 16, None, "a packet of a pod passed the filter"
    FILTER_TO_POD = 17, None, "a packet for a pod passed the filter"

    MTLS_REQUIRED = 18, errno.EPERM, "not by mutual TLS, to a port that takes nothing else; dropped"
    POLICY_DENIED = 19, errno.EPERM, "policy refuses it"
    POLICY_AUDIT = 20, None, "policy would refuse it, if it were not in audit mode"
    UNJUDGED = 21, errno.EPERM, "what policy cannot judge, as a fragment, or a broadcast; dropped"
    RESET = 22, None, "a refused packet of TCP was answered with RST"
    FORGED = 23, None, "it came from elsewhere in the name of a pod of this node; dropped"
    UNTOLD = 24, None, "a packet was not told of: too many in one second"

    PAIR_REQUEST = 25, None, "a request went straight to its backend's socket"
    PAIR_RESPONSE = 26, None, "a response went straight to its client's socket"
    PAIR_HANDED = 27, None, "the response to such a request was left to the proxy"
    PAIR_BROKEN = 28, None, "a backend sent what was no part of its response; send fails"
    PAIR_UNCOUNTED = 29, None, "a request passed that there was no room to count, by route and ends"
    PAIR_UNTOLD = 30, None, "a request passed of which nobody is told: nobody took others out"

    PLAIN = 31, None, "from elsewhere somebody reached a pod, not by mutual TLS"
    FROM_HOST = 32, None, "the node itself, and not its proxy, reached a pod: a health probe, say"

    errno: int | None
    meaning: str

    def __new__(cls, number: int, code: int | None, meaning: str) -> Reason:
        member = int.__new__(cls, number)
        member._value_ = number
        member.errno = code
        member.meaning = meaning
        return member


def c_header() -> str:
    """The table as C: REASON_<NAME>, ERRNO_<NAME> for those that refuse; REASONS is the count."""
    lines = [f"#define REASONS {len(Reason)}"]
    for reason in Reason:
        lines.append(f"#define REASON_{reason.name} {int(reason)}")
        if reason.errno is not None:
            lines.append(f"#define ERRNO_{reason.name} {reason.errno}")
    return "\n".join(lines) + "\n"
