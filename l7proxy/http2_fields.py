"""Field sections of HTTP/2 (RFC 9113 §8) to and from the proxy's heads.

Malformed fields concern their stream only, so they are judged here and not by h2, which would give
up the whole connection. Pure functions, and the HPACK decoder that h2 is made to use.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from email.utils import formatdate
from functools import lru_cache

from hpack.hpack import Decoder
from hpack.struct import HeaderTuple, NeverIndexedHeaderTuple

from l7proxy.message import BodyLength, Framing, Headers, ProtocolError, RequestHead, ResponseHead
from l7proxy.normalise import (
    HOP_BY_HOP,
    TOKEN,
    check_header,
    filter_trailers,
    normalise_authority,
    normalise_target,
)
from mesh.model.nodeconfig import Settings

_METHOD = re.compile(TOKEN)
_NOT_VISIBLE = re.compile(rb"[^!-~]")
_UPPER = re.compile(rb"[A-Z]")
_LENGTH = re.compile(rb"[0-9]{1,18}")
# RFC 9113 §8.2.2: these make a message malformed.
_CONNECTION = frozenset(
    [b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"]
)
# Codecs put these in themselves (see message.py).
_FRAMING = HOP_BY_HOP | {b"host", b"content-length", b"expect"}
# What compression contexts must not reveal (RFC 7541 §7.1.3).
_SECRET = frozenset([b"authorization", b"proxy-authorization", b"cookie", b"set-cookie"])
_PSEUDO = frozenset([b":method", b":scheme", b":authority", b":path"])


class FieldDecoder(Decoder):
    """Keeps the fields of the last block in `fields`. A client's h2 is shown only the status, which
    it needs to tell 1xx responses, a server's nothing: what is wrong with a block is not for h2 to
    judge."""

    def __init__(self, max_header_list_size: int, *, responses: bool) -> None:
        super().__init__(max_header_list_size)
        self.fields: Headers = []
        self._responses = responses

    def decode(self, data: bytes, raw: bool = False) -> Iterable[HeaderTuple]:
        fields = list(super().decode(data, raw=True))
        self.fields = [(bytes(name), bytes(value)) for name, value in fields]
        return fields[:1] if self._responses and fields and fields[0][0] == b":status" else []


def request_head(fields: Headers, *, ended: bool, scheme: bytes, settings: Settings) -> RequestHead:
    """The request of a HEADERS block. `ended`: it came with END_STREAM. `scheme` is the
    connection's: what the client claims must be http or https and is else not believed.
    ProtocolError: it is malformed (RFC 9113 §8.1.1) or over a limit."""
    pseudo, regular = _split(fields, _PSEUDO, settings, 400)
    if b":authority" not in pseudo:
        # As from an intermediary that speaks HTTP/1.1 on its other side (RFC 9113 §8.3.1).
        pseudo[b":authority"] = next((value for name, value in regular if name == b"host"), b"")
    for name in _PSEUDO:
        if not pseudo.get(name):
            raise ProtocolError(400, "bad_pseudo_header", f"{name.decode()} is missing")
    method = pseudo[b":method"]
    if not _METHOD.fullmatch(method):
        raise ProtocolError(400, "bad_method", "the method is not a token")
    if method == b"CONNECT":
        raise ProtocolError(501, "connect", "CONNECT is not served here")
    if pseudo[b":scheme"] not in (b"http", b"https"):
        raise ProtocolError(400, "bad_scheme", "the scheme is neither http nor https")
    authority = normalise_authority(pseudo[b":authority"])
    path, query = normalise_target(pseudo[b":path"], settings, method)
    head = RequestHead(method, scheme, authority, path, query, [], version=b"2")
    length: int | None = None
    cookies: list[bytes] = []
    for name, value in regular:
        match name:
            case b"host":
                if normalise_authority(value) != authority:
                    raise ProtocolError(400, "host_mismatch", "Host and :authority differ")
            case b"content-length":
                length = _length(length, value, 400)
            case b"te":
                if value.lower() != b"trailers":
                    raise ProtocolError(400, "connection_header", "TE other than trailers")
                head.trailers_ok = True
            case b"expect":
                if value.lower() != b"100-continue":
                    raise ProtocolError(417, "expectation", "an unknown expectation")
                head.expect_continue = True
            case b"cookie":
                cookies.append(value)
            case _ if name not in HOP_BY_HOP:
                head.headers.append((name, value))
    if cookies:  # crumbs, RFC 9113 §8.2.3
        head.headers.append((b"cookie", b"; ".join(cookies)))
    if ended and length:
        raise ProtocolError(400, "content_length_mismatch", "a Content-Length, but no content")
    if length is not None:
        head.body = length
    else:
        head.body = Framing.NONE if ended else Framing.STREAM
    return head


def response_head(
    fields: Headers, *, ended: bool, method: bytes, settings: Settings
) -> ResponseHead:
    """The response of a HEADERS block to a request of `method`; ProtocolError 502 if malformed."""
    pseudo, regular = _split(fields, frozenset([b":status"]), settings, 502)
    code = pseudo.get(b":status", b"")
    # 101 does not exist in HTTP/2 (RFC 9113 §8.6).
    if len(code) != 3 or not code.isdigit() or not 100 <= int(code) <= 599 or code == b"101":
        raise ProtocolError(502, "bad_status", "the response has no valid :status")
    status = int(code)
    length: int | None = None
    headers: Headers = []
    for name, value in regular:
        if name == b"content-length":
            length = _length(length, value, 502)
        elif name not in _FRAMING:
            headers.append((name, value))
    body: BodyLength = Framing.STREAM
    if status < 200 or status == 204:
        body = Framing.NONE
    elif length is not None:
        body = length
        if ended and length and not bodiless(status, method):
            raise ProtocolError(502, "content_length_mismatch", "Content-Length without content")
    elif ended or bodiless(status, method):
        body = Framing.NONE
    return ResponseHead(status, headers, body)


def trailers_of(fields: Headers, settings: Settings, status: int) -> Headers:
    """Trailer fields without those that trailers must not carry; ProtocolError `status` if
    malformed."""
    _, regular = _split(fields, frozenset(), settings, status)
    return filter_trailers([field for field in regular if field[0] not in _FRAMING])


def bodiless(status: int, method: bytes) -> bool:
    """Whether a response has no content whatever its fields say (RFC 9110 §6.4.1)."""
    return method == b"HEAD" or status < 200 or status in (204, 304)


def request_fields(head: RequestHead, scheme: bytes) -> Headers:
    """The HEADERS block of a request over a connection of `scheme`."""
    fields: Headers = [
        (b":method", head.method),
        (b":scheme", scheme),
        (b":authority", head.authority),
        (b":path", head.target),
        *outgoing(head.headers),
    ]
    if isinstance(head.body, int):
        fields.append((b"content-length", b"%d" % head.body))
    if head.trailers_ok:
        fields.append((b"te", b"trailers"))
    if head.expect_continue:
        fields.append((b"expect", b"100-continue"))
    return fields


def response_fields(head: ResponseHead) -> Headers:
    """The HEADERS block of a response, 1xx too; Date is added to final ones (RFC 9110 §6.6.1)."""
    fields: Headers = [(b":status", b"%d" % head.status), *outgoing(head.headers)]
    if head.status >= 200:
        if isinstance(head.body, int) and head.status != 204:
            fields.append((b"content-length", b"%d" % head.body))
        if not any(name == b"date" for name, _ in head.headers):
            fields.append((b"date", _date(int(time.time()))))
    return fields


def outgoing(headers: Headers) -> Headers:
    """Fields as HTTP/2 may carry them, whatever filters made of them; ProtocolError for one that
    would break out of its field in HTTP/1.1 behind the peer."""
    fields: Headers = []
    for name, value in headers:
        if name in _FRAMING:
            continue
        _check(name, value, 500)
        if name in _SECRET:
            fields.append(NeverIndexedHeaderTuple(name, value))
        else:
            fields.append((name, value))
    return fields


@lru_cache(maxsize=2)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()


def _length(before: int | None, value: bytes, status: int) -> int:
    if before is not None or not _LENGTH.fullmatch(value):
        raise ProtocolError(status, "bad_content_length", "Content-Length is not one number")
    return int(value)


def _check(name: bytes, value: bytes, status: int) -> None:
    if _UPPER.search(name):  # RFC 9113 §8.2.1
        raise ProtocolError(status, "bad_header_name", "a header name is not in lower case")
    try:
        check_header(name, value)
    except ProtocolError as error:
        raise ProtocolError(status, error.reason, error.detail) from None


def _split(
    fields: Headers, allowed: frozenset[bytes], settings: Settings, status: int
) -> tuple[dict[bytes, bytes], Headers]:
    """Pseudo-header fields and the others, both checked; limits are 431 for requests."""
    too_large = 431 if status == 400 else status
    if sum(len(name) + len(value) + 32 for name, value in fields) > settings.max_head_bytes:
        raise ProtocolError(too_large, "head_too_large", "the header list is too large")
    pseudo: dict[bytes, bytes] = {}
    regular: Headers = []
    for name, value in fields:
        if name[:1] == b":":
            if regular or name not in allowed or name in pseudo:
                raise ProtocolError(status, "bad_pseudo_header", f"unexpected {name!r}")
            pseudo[name] = value
            if not value or _NOT_VISIBLE.search(value):
                raise ProtocolError(status, "bad_pseudo_header", f"{name.decode()} is malformed")
        elif name in _CONNECTION:
            raise ProtocolError(status, "connection_header", f"{name.decode()} in HTTP/2")
        else:
            _check(name, value, status)
            regular.append((name, value))
    if len(regular) > settings.max_headers:
        raise ProtocolError(too_large, "too_many_headers", f"{len(regular)} fields")
    return pseudo, regular
