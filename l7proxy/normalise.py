"""What every request and response must satisfy, whichever HTTP version carried it.

Pure functions from bytes to their one normal form, or `ProtocolError`. What comes out is what
routes match and what is forwarded: no other module reads a target, an authority or a connection
option in a way of its own. It knows no framing and no I/O.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from l7proxy.message import Headers, ProtocolError
from mesh.model.nodeconfig import Settings

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"

# RFC 9110 §7.6.1, and the Proxy-* fields, which are meant for the first proxy: this one.
# Trailer is end-to-end since RFC 9110 and stays.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"te",
        b"transfer-encoding",
        b"upgrade",
    )
)

# End-to-end fields that framing, routing, or somebody's security depends on. A sender that names
# one in Connection wants a proxy to delete it on the way to the backend (RFC 9110 §7.6.1 forbids).
_PROTECTED = frozenset(
    (
        b"accept",
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-length",
        b"content-range",
        b"content-type",
        b"cookie",
        b"date",
        b"expect",
        b"forwarded",
        b"host",
        b"location",
        b"max-forwards",
        b"origin",
        b"range",
        b"referer",
        b"set-cookie",
        b"user-agent",
        b"vary",
        b"via",
        b"www-authenticate",
        b"x-real-ip",
        b"x-request-id",
    )
)
_PROTECTED_PREFIXES = (b"x-forwarded-", b"access-control-", b"sec-", b"if-")

# RFC 9110 §6.5.1: what frames, routes, authenticates or describes a message comes in its head or
# not at all. Dropped from trailers.
_NEVER_TRAILERS = (
    HOP_BY_HOP
    | (_PROTECTED - {b"accept", b"user-agent"})
    | {b"trailer", b"age", b"allow", b"expires", b"retry-after", b"warning", b"pragma"}
)

_NAME = re.compile(TOKEN)
_VALUE = re.compile(rb"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")
_TOKEN_LIST = re.compile(rb"[ \t,]*(?:" + TOKEN + rb"[ \t]*(?:,[ \t,]*|\Z))*")

_PLAIN_PATH = re.compile(rb"(?:/(?!\.)[A-Za-z0-9\-._~!$&'()*+,;=:@]+)*/?")
_TARGET_BYTES = re.compile(rb"[!\"$-\[\]-~]+")  # printable, but no "#" and no backslash
_QUERY = re.compile(rb"[!\"$-~]*")
_BAD_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(rb"%[0-9A-Fa-f]{2}")
_NOT_PCHAR = re.compile(rb"[^A-Za-z0-9\-._~!$&'()*+,;=:@/%]")
_SLASHES = re.compile(rb"//+")
# A dot segment for a backend that decodes %2F or %5C, or takes ";" off a segment's end first.
_HIDDEN_DOTS = re.compile(rb"/\.\.?(?:;|%2F|%5C)|(?:%2F|%5C)\.\.?(?=/|;|%2F|%5C|\Z)")
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
_UNESCAPED = {
    b"%" + form: bytes((code,)) if code in _UNRESERVED else b"%%%02X" % code
    for code in range(1, 256)
    for form in {
        f"{high}{low}".encode()
        for high in (f"{code >> 4:x}", f"{code >> 4:X}")
        for low in (f"{code & 15:x}", f"{code & 15:X}")
    }
}

_AUTHORITY = re.compile(
    rb"(?P<host>[A-Za-z0-9_~-]+(?:\.[A-Za-z0-9_~-]+)*)\.?(?P<port>:(?:[1-9][0-9]{0,4})?)?"
    rb"|\[(?P<v6>[0-9A-Fa-f:.]+)\](?P<port6>:(?:[1-9][0-9]{0,4})?)?"
)


def check_header(name: bytes, value: bytes) -> None:
    """Refuse a field that could be read in two ways further on.

    `name` must be a token (RFC 9110 §5.1; any case, underscores are kept), `value` free of control
    bytes other than tab, CR and LF above all, and of white space at its ends (RFC 9110 §5.5;
    callers strip what HTTP/1.1 allows there). Bytes from 0x80 on are opaque and pass.
    ProtocolError 400: bad_header_name, bad_header_value.
    """
    if _NAME.fullmatch(name) is None:
        raise ProtocolError(400, "bad_header_name", "a header name has bytes it must not have")
    if _VALUE.fullmatch(value) is None:
        raise ProtocolError(400, "bad_header_value", f"the value of {name.decode()} is not valid")


def normalise_target(
    raw: bytes, settings: Settings, method: bytes = b""
) -> tuple[bytes, bytes | None]:
    """The path and query of an origin-form target (HTTP/2: `:path`), in normal form.

    - Path: escapes of unreserved characters are decoded, the others upper-cased; printable ASCII
      outside pchar is escaped; `//` becomes `/` with `settings.merge_slashes`; then dot segments
      are removed (RFC 3986 §6.2.2). `%2F` stays as it is. Normalising twice changes nothing.
    - Query: the bytes after the first "?", unchanged; None without "?".
    - b"*" only where `method` is OPTIONS (RFC 9112 §3.2.4); it has no query.

    Refused rather than guessed at, ProtocolError 400:
    - bad_target: not starting with "/", a fragment, blanks, controls or bytes from 0x80 on, and
      the backslash, which some backends take for "/";
    - bad_escape: "%" without two hexadecimal digits, and %00;
    - path_above_root: RFC 3986 §5.2.4 would clamp "/../x" to "/x", but no honest client sends it,
      and backends that do not clamp leave their document root;
    - hidden_dot_segment: "..;", "..%2F", "%5C..": plain names here, a way up for some backends.
    """
    path, mark, rest = raw.partition(b"?")
    query = rest if mark else None
    if query and _QUERY.fullmatch(query) is None:
        raise ProtocolError(400, "bad_target", "the query has bytes that must be escaped")
    if path[:1] == b"/":
        if path == b"/" or _PLAIN_PATH.fullmatch(path) is not None:
            return path, query
        return _normalise_path(path, settings.merge_slashes), query
    if raw == b"*" and method == b"OPTIONS":
        return raw, None
    raise ProtocolError(400, "bad_target", "the request target is not an absolute path")


def _normalise_path(path: bytes, merge_slashes: bool) -> bytes:
    if _TARGET_BYTES.fullmatch(path) is None:
        raise ProtocolError(400, "bad_target", "the path has bytes that must be escaped")
    if b"%" in path:
        if _BAD_ESCAPE.search(path) is not None or b"%00" in path:
            raise ProtocolError(400, "bad_escape", "the path has an escape that is not valid")
        path = _ESCAPE.sub(lambda match: _UNESCAPED[match[0]], path)
    path = _NOT_PCHAR.sub(lambda match: b"%%%02X" % ord(match[0]), path)
    if merge_slashes:
        path = _SLASHES.sub(b"/", path)
    if _HIDDEN_DOTS.search(path) is not None:
        raise ProtocolError(400, "hidden_dot_segment", "the path hides a dot segment")
    return _remove_dot_segments(path) if b"/." in path else path


def _remove_dot_segments(path: bytes) -> bytes:
    """RFC 3986 §5.2.4 for a path that starts with "/"."""
    kept: list[bytes] = []
    segments = path[1:].split(b"/")
    for segment in segments:
        if segment == b"..":
            if not kept:
                raise ProtocolError(400, "path_above_root", "the path leads above its root")
            kept.pop()
        elif segment != b".":
            kept.append(segment)
    if segments[-1] in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)


def normalise_authority(raw: bytes) -> bytes:
    """`host[:port]` of Host, `:authority` or an absolute-form target, in normal form.

    Lower case; one trailing dot and an empty port are dropped, since the host is the same one
    (RFC 3986 §6.2.3). IPv6 literals in brackets, without zone. Of RFC 3986's reg-name the escapes
    and sub-delims are refused: no DNS name has them and backends decode them differently.
    ProtocolError 400 bad_host; also for the empty authority and for user information.
    """
    match = _AUTHORITY.fullmatch(raw)
    if match is None or len(raw) > 262:
        raise ProtocolError(400, "bad_host", "the host is not a valid host[:port]")
    host, port, v6, port6 = match.group("host", "port", "v6", "port6")
    if host is None:
        try:
            ipaddress.IPv6Address(v6.decode())
        except ValueError:
            raise ProtocolError(400, "bad_host", "not a valid IPv6 address") from None
        host, port = b"[" + v6 + b"]", port6
    if port is None or port == b":":
        return bytes(host.lower())
    if int(port[1:]) > 65535:
        raise ProtocolError(400, "bad_host", "the host's port is above 65535")
    return bytes(host.lower() + port)


class EndToEnd(NamedTuple):
    """What is left of a field section for the next hop, and what this hop was told.

    `connection`: lower-case options of Connection. `upgrade`: the lower-case protocol to offer,
    where Connection says so. `trailers_ok`: TE names "trailers".
    """

    headers: Headers
    connection: frozenset[bytes]
    upgrade: bytes | None
    trailers_ok: bool


_NO_OPTIONS: frozenset[bytes] = frozenset()
_KEEP_ALIVE = frozenset((b"keep-alive",))


def strip_hop_by_hop(headers: Headers) -> EndToEnd:
    """Take the hop-by-hop fields (RFC 9110 §7.6.1) out of fields with lower-case names.

    Connection, all that it names, and `HOP_BY_HOP` go; order and duplicates of the rest stay. The
    list is not changed; it is returned itself if nothing had to go. Upgrades to HTTP/2 or TLS are
    never offered on: they would take the connection past this proxy's eyes.
    ProtocolError 400 bad_connection: Connection is no token list or names a field that is not
    the connection's to remove.
    """
    found = [field for field in headers if field[0] in HOP_BY_HOP]
    if not found:
        return EndToEnd(headers, _NO_OPTIONS, None, False)
    options: frozenset[bytes] = _NO_OPTIONS
    upgrade: bytes | None = None
    trailers_ok = False
    for name, value in found:
        if name == b"connection":
            options |= _options(value)
        elif name == b"te":
            trailers_ok |= any(
                coding.partition(b";")[0].strip() == b"trailers"
                for coding in value.lower().split(b",")
            )
        elif name == b"upgrade" and upgrade is None:
            upgrade = _offered(value)
    gone = HOP_BY_HOP | options if options - _KEEP_ALIVE else HOP_BY_HOP
    kept = [field for field in headers if field[0] not in gone]
    return EndToEnd(kept, options, upgrade if b"upgrade" in options else None, trailers_ok)


def _options(value: bytes) -> frozenset[bytes]:
    if value in (b"keep-alive", b"Keep-Alive"):
        return _KEEP_ALIVE
    if _TOKEN_LIST.fullmatch(value) is None:
        raise ProtocolError(400, "bad_connection", "Connection is not a list of tokens")
    options = frozenset(option.strip() for option in value.lower().split(b",")) - {b""}
    for option in options:
        if option in _PROTECTED or option.startswith(_PROTECTED_PREFIXES):
            raise ProtocolError(
                400, "bad_connection", f"Connection must not name {option.decode()}"
            )
    return options


def _offered(value: bytes) -> bytes | None:
    """The first protocol of an Upgrade field that a backend may be offered."""
    for item in value.lower().split(b","):
        protocol = item.strip()
        if _NAME.fullmatch(protocol.replace(b"/", b"", 1)) is not None and not protocol.startswith(
            (b"h2", b"http/", b"tls/")
        ):
            return protocol
    return None


def filter_trailers(headers: Headers) -> Headers:
    """Trailer fields (lower-case names, each already checked) that may be sent on: RFC 9110
    §6.5.1. The forbidden ones are dropped, which every recipient may do."""
    return [
        field
        for field in headers
        if field[0] not in _NEVER_TRAILERS and not field[0].startswith(_PROTECTED_PREFIXES)
    ]
