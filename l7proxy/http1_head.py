"""HTTP/1.1 heads: from the raw bytes of one head to a `RequestHead` or `ResponseHead`.

This is the security core: a head is either understood in exactly one way or refused. The bytes are
held against a strict grammar of our own; a request that has more to it than a method, a path and
fields is then read by h11 as well, and both must have read the same. (That plain heads are read
alike is tested, not checked again for each: h11 takes three times as long as everything else here.)
Pure functions; knows no connection beyond the head it is given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import h11

from l7proxy.message import BodyLength, Framing, Headers, ProtocolError, RequestHead, ResponseHead
from l7proxy.normalise import TOKEN, normalise_authority, normalise_target, strip_hop_by_hop
from mesh.model.nodeconfig import Settings

_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/([0-9]\.[0-9])\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [\t -~\x80-\xff]*)?\r\n")
_FIELDS = re.compile(rb"(?:" + TOKEN + rb":[\t -~\x80-\xff]*\r\n)*")
_FIELD = re.compile(rb"([^:]+):([^\r]*)\r\n")
_LENGTH = re.compile(rb"0|[1-9][0-9]{0,17}")
_CODINGS = re.compile(rb"(?:" + TOKEN + rb"[ \t]*,[ \t]*)*chunked")
_ABSOLUTE = re.compile(rb"(https?)://([^/?#]*)([^#]*)", re.IGNORECASE)

# What cannot be part of a head however it goes on; looked for while it is incomplete, so that it is
# answered at once and not by a timer. A CR at the end may yet get its LF.
_HOPELESS = re.compile(rb"\x00|(?<!\r)\n|\r(?!\n|\Z)|\n[ \t]")
_METHOD_START = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]")

_PERSISTENCE = frozenset((b"close", b"keep-alive"))
_SPECIAL = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect"))
# Of those what a head that everybody reads alike may have.
_PLAIN = frozenset((b"host", b"content-length"))


class Request(NamedTuple):
    """`keep_alive`: the client wants the connection to stay open after the response."""

    head: RequestHead
    keep_alive: bool


class Response(NamedTuple):
    """`keep_alive`: the backend leaves the connection open, and its end is not the body's end."""

    head: ResponseHead
    keep_alive: bool


def parse_request(block: bytes, scheme: bytes, settings: Settings) -> Request:
    """A request head from its request line to the empty line, both included.

    `scheme` is the connection's. ProtocolError: 400; 413 a declared length over the limit; 417 an
    expectation other than 100-continue; 431 too many fields; 501 a method or coding not served;
    505 a version other than 1.0 and 1.1.
    """
    line = _REQUEST_LINE.match(block)
    if line is None:
        raise _diagnosis(block[: block.index(b"\r\n") + 2], "bad_request_line")
    method, target, version = line.group(1, 2, 3)
    if version not in (b"1.1", b"1.0"):
        raise ProtocolError(505, "bad_version", "only HTTP/1.0 and HTTP/1.1 are served here")
    if method == b"CONNECT" or method == b"TRACE":
        # This is no forward proxy, and TRACE shows a script the cookies that it must not see.
        raise ProtocolError(501, "method_not_served", f"{method.decode()} is not served")
    fields = parse_fields(block[line.end() : -2], settings.max_headers)
    special: dict[bytes, list[bytes]] = {}
    headers = []
    for field in fields:
        if field[0] in _SPECIAL:
            special.setdefault(field[0], []).append(field[1])
        else:
            headers.append(field)
    hosts = special.get(b"host", [])
    authority, path, query = _destination(method, target, hosts, version, scheme, settings)
    if len(special) == len(hosts) == 1:
        body: BodyLength = Framing.NONE
    else:
        body = _request_body(special, version, settings.max_body_bytes)
    headers, connection, upgrade, trailers_ok = strip_hop_by_hop(headers)
    plain = (
        version == b"1.1"
        and target[:1] == b"/"
        and special.keys() <= _PLAIN
        and connection <= _PERSISTENCE
        and upgrade is None
        and block.isascii()
    )
    if not plain:
        _second_opinion(block, method, target, fields)
    keep_alive = b"close" not in connection
    if version == b"1.0":
        keep_alive = keep_alive and b"keep-alive" in connection
    bodyless = body is Framing.NONE or body == 0
    expects = _expects(special) and version == b"1.1" and not bodyless
    # HTTP/1.0 cannot upgrade (RFC 9110 §7.8); nor is a request with a body let become a tunnel.
    if version == b"1.0" or not bodyless:
        upgrade = None
    head = RequestHead(
        method,
        scheme,
        authority,
        path,
        query,
        headers,
        body,
        version,
        expects,
        upgrade,
        trailers_ok,
    )
    return Request(head, keep_alive)


def parse_response(
    block: bytes, method: bytes, upgrade: bytes | None, max_headers: int
) -> Response:
    """A response head to a request with `method` that offered `upgrade`.

    Everything wrong is ProtocolError 502. With HEAD and 304 `body` is what was declared, though no
    body follows: see `has_body`.
    """
    try:
        return _parse_response(block, method, upgrade, max_headers)
    except ProtocolError as error:
        raise ProtocolError(502, error.reason, f"response: {error.detail}") from None


def has_body(status: int, method: bytes) -> bool:
    """Whether body bytes follow a response head (RFC 9112 §6.3)."""
    return method != b"HEAD" and status >= 200 and status not in (204, 304)


def _parse_response(
    block: bytes, method: bytes, upgrade: bytes | None, max_headers: int
) -> Response:
    line = _STATUS_LINE.match(block)
    if line is None:
        raise _diagnosis(block[: block.index(b"\r\n") + 2], "bad_status_line")
    http10 = line[1] == b"0"
    status = int(line[2])
    fields = parse_fields(block[line.end() : -2], max_headers)
    lengths: list[bytes] = []
    codings: list[bytes] = []
    headers = []
    for field in fields:
        if field[0] == b"content-length":
            lengths.append(field[1])
        elif field[0] == b"transfer-encoding":
            codings.append(field[1])
        else:
            headers.append(field)
    if codings and http10:
        raise ProtocolError(400, "coding_in_http10", "Transfer-Encoding in HTTP/1.0")
    body = _framing(lengths, codings)
    headers, connection, switched, _ = strip_hop_by_hop(headers)
    if status == 101:
        if upgrade is None or switched != upgrade:
            raise ProtocolError(400, "bad_upgrade", "101 to something that was not offered")
    elif status < 200 or status == 204:
        # Were they believed, what follows would be the next response.
        if body not in (Framing.NONE, 0):
            raise ProtocolError(400, "body_without_body", f"a {status} response declares a body")
        body = Framing.NONE
    elif body is Framing.NONE and has_body(status, method):
        body = Framing.CLOSE
    keep_alive = (
        body is not Framing.CLOSE
        and b"close" not in connection
        and (not http10 or b"keep-alive" in connection)
    )
    return Response(
        ResponseHead(status, headers, body, switched if status == 101 else None), keep_alive
    )


def parse_fields(block: bytes, max_headers: int) -> Headers:
    """Field lines (RFC 9112 §5), each with its CRLF; names in lower case, values stripped.
    ProtocolError 400, or 431 too_many_headers."""
    if _FIELDS.fullmatch(block) is None:
        raise _diagnosis(block, "bad_header")
    fields = [(name.lower(), value.strip(b" \t")) for name, value in _FIELD.findall(block)]
    if len(fields) > max_headers:
        raise ProtocolError(431, "too_many_headers", f"more than {max_headers} header fields")
    return fields


def check_incomplete(data: bytes, start: int, new: int) -> None:
    """Refuse the beginning of a request head, `data[start:]`, that cannot become a valid one; up to
    `new` it was looked at before. ProtocolError 400."""
    if _METHOD_START.match(data, start) is None and data[start:] != b"\r":
        raise ProtocolError(400, "bad_request_line", "not an HTTP request")
    if _HOPELESS.search(data, max(start, new - 1)) is not None:
        raise _diagnosis(data[start:], "bad_header")


def _diagnosis(block: bytes, otherwise: str) -> ProtocolError:
    """Which rule of the grammar the bytes break, for people and for counting."""
    for pattern, reason, detail in _FAULTS:
        if pattern.search(block) is not None:
            return ProtocolError(400, reason, detail)
    return ProtocolError(400, otherwise, otherwise.replace("_", " "))


_FAULTS = (
    (re.compile(rb"\x00"), "nul_byte", "a NUL byte in the head"),
    (re.compile(rb"(?<!\r)\n"), "bare_lf", "a line ends in LF without CR"),
    (re.compile(rb"\r(?!\n|\Z)"), "bare_cr", "a CR without LF"),
    (re.compile(rb"(?:\A|\n)[ \t]"), "obs_fold", "a header line starts with white space"),
    (re.compile(rb"(?:\A|\n)[^:\r\n]*[ \t]:"), "space_before_colon", "white space before a colon"),
    (re.compile(rb"[\x01-\x08\x0b\x0c\x0e-\x1f\x7f]"), "control_byte", "a control byte"),
)


def _second_opinion(block: bytes, method: bytes, target: bytes, fields: Headers) -> None:
    """h11 must read the same: a flaw of either parser alone opens no gap."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=len(block))
    try:
        connection.receive_data(block)
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise ProtocolError(error.error_status_hint, "bad_head", str(error)) from None
    if (
        not isinstance(event, h11.Request)
        or event.method != method
        or event.target != target
        or len(event.headers) != len(fields)
        # h11 gives Transfer-Encoding in lower case.
        or any(
            theirs != ours and (theirs[0] != b"transfer-encoding" or theirs[1] != ours[1].lower())
            for theirs, ours in zip(event.headers, fields, strict=True)
        )
    ):
        raise ProtocolError(400, "ambiguous_head", "the head can be read in two ways")


def _destination(
    method: bytes,
    target: bytes,
    hosts: list[bytes],
    version: bytes,
    scheme: bytes,
    settings: Settings,
) -> tuple[bytes, bytes, bytes | None]:
    """Authority, path and query (RFC 9112 §3.2, §3.3)."""
    if len(hosts) > 1:
        raise ProtocolError(400, "several_hosts", "more than one Host field")
    if not hosts and version == b"1.1":
        raise ProtocolError(400, "no_host", "the request has no Host field")
    authority = normalise_authority(hosts[0]) if hosts else b""
    if target[:1] != b"/" and (absolute := _ABSOLUTE.fullmatch(target)) is not None:
        if absolute[1].lower() != scheme:
            raise ProtocolError(400, "other_scheme", "the target's scheme is not the connection's")
        named = normalise_authority(absolute[2])
        # RFC 9112 §3.2.2 lets the target win; one who sends two hosts wants to be read twice.
        if hosts and named != authority:
            raise ProtocolError(400, "host_conflict", "Host is not the host of the target")
        authority = named
        target = absolute[3]
        if target[:1] != b"/":
            target = b"*" if method == b"OPTIONS" and not target else b"/" + target
    path, query = normalise_target(target, settings, method)
    return authority, path, query


def _request_body(
    special: Mapping[bytes, list[bytes]], version: bytes, limit: int | None
) -> BodyLength:
    codings = special.get(b"transfer-encoding", [])
    if codings and version == b"1.0":
        raise ProtocolError(400, "coding_in_http10", "Transfer-Encoding in HTTP/1.0")
    body = _framing(special.get(b"content-length", []), codings)
    if isinstance(body, int) and limit is not None and body > limit:
        raise ProtocolError(413, "body_too_large", f"the body is larger than {limit} bytes")
    return body


def _framing(lengths: list[bytes], codings: list[bytes]) -> BodyLength:
    """RFC 9112 §6.3, with everything refused on which implementations have ever differed."""
    if codings:
        if lengths:
            raise ProtocolError(
                400, "length_and_coding", "both Content-Length and Transfer-Encoding"
            )
        coding = codings[0].lower()
        if len(codings) > 1 or _CODINGS.fullmatch(coding) is None:
            raise ProtocolError(400, "bad_coding", "Transfer-Encoding is not chunked")
        if coding != b"chunked":
            raise ProtocolError(501, "coding_not_served", "transfer codings besides chunked")
        return Framing.STREAM
    if not lengths:
        return Framing.NONE
    if len(lengths) > 1:
        raise ProtocolError(400, "several_lengths", "more than one Content-Length")
    if _LENGTH.fullmatch(lengths[0]) is None:
        raise ProtocolError(400, "bad_length", "Content-Length is not a plain decimal number")
    return int(lengths[0])


def _expects(special: Mapping[bytes, list[bytes]]) -> bool:
    expectations = special.get(b"expect", ())
    if any(value.lower() != b"100-continue" for value in expectations):
        raise ProtocolError(417, "bad_expectation", "only 100-continue can be expected")
    return bool(expectations)
