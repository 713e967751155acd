"""What configuration may say about header fields, and how a refusal is told.

Knows field names and values (RFC 9110 §5), nothing of routes.
"""

from __future__ import annotations

from l7proxy.message import ProtocolError
from l7proxy.normalise import HOP_BY_HOP, check_header

# The codecs own framing, connection options (RFC 9110 §7.6.1) and Host; configuration that changed
# them could make the upstream see another request than the one that was judged.
_OWNED = {
    **dict.fromkeys(HOP_BY_HOP, "it belongs to one connection"),
    b"trailer": "it belongs to the message's framing",
    b"transfer-encoding": "it belongs to the message's framing",
    b"content-length": "it belongs to the message's framing",
    b"expect": "the proxy handles it",
    b"host": "use a URLRewrite filter with a hostname",
    b"x-forwarded-client-cert": "it is reserved for identities the proxy has verified",
}


class Refused(Exception):
    """A section cannot be put in force. The message names the field and says why; the value before
    stays in force."""


def check_name(name: str, where: str) -> bytes:
    """A field name in lower case; Refused if it is none (RFC 9110 §5.1)."""
    raw = name.lower().encode()
    _check(raw, b"", where)
    return raw


def check_value(value: str, where: str) -> bytes:
    """A field value; Refused with CR, LF, NUL, other controls or blanks around it (§5.5)."""
    raw = value.encode()
    _check(b"x", raw, where)
    return raw


def check_modifiable(name: str, where: str) -> bytes:
    """A name that a filter may set, add or remove."""
    raw = check_name(name, where)
    if why := _OWNED.get(raw):
        raise Refused(f"{where}: header {name!r} cannot be changed by a filter; {why}")
    return raw


def _check(name: bytes, value: bytes, where: str) -> None:
    try:
        check_header(name, value)
    except ProtocolError as error:
        raise Refused(f"{where}: {(value or name).decode()!r}: {error.detail}") from None
