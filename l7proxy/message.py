"""Heads and body framing of HTTP messages as the proxy sees them: one form for HTTP/1.1 and HTTP/2.

Everything is bytes; header names are lower case; hop-by-hop fields (RFC 9110 §7.6.1), Host and
framing fields are never in `headers`: codecs take them out and put them in. This module knows no
I/O and no routes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TypeAlias

Headers: TypeAlias = list[tuple[bytes, bytes]]


class Framing(enum.Enum):
    """How the length of a body is known, where it is not a number (RFC 9112 §6)."""

    NONE = "no body"
    STREAM = "chunked, or HTTP/2 DATA until END_STREAM"
    CLOSE = "until the connection closes (responses only)"


# A body's length in bytes, or how it is framed. Content-Length: 0 is 0, not NONE.
BodyLength: TypeAlias = int | Framing


@dataclass(slots=True)
class RequestHead:
    """A request as routing judges it and as the upstream will see it.

    `authority` is the lower-case host with its port as sent, b"" only for HTTP/1.0 without Host;
    `path` is normalised (RFC 3986 §6.2.2) and starts with "/" (or is b"*" for OPTIONS);
    `query` is None without "?", else the bytes after it, unchanged.
    `upgrade` is the lower-case protocol of an Upgrade that Connection names (RFC 9110 §7.8).
    """

    method: bytes
    scheme: bytes
    authority: bytes
    path: bytes
    query: bytes | None
    headers: Headers
    body: BodyLength = Framing.NONE
    version: bytes = b"1.1"
    expect_continue: bool = False
    upgrade: bytes | None = None
    trailers_ok: bool = False

    @property
    def host(self) -> bytes:
        """The authority without its port; IPv6 literals keep their brackets."""
        return host_of(self.authority)

    @property
    def target(self) -> bytes:
        return self.path if self.query is None else self.path + b"?" + self.query


def host_of(authority: bytes) -> bytes:
    host, colon, port = authority.rpartition(b":")
    return host if colon and (port.isdigit() or not port) else authority


@dataclass(slots=True)
class ResponseHead:
    """A response head; 1xx too. `upgrade`: a 101 whose connection now carries that protocol."""

    status: int
    headers: Headers
    body: BodyLength = Framing.NONE
    upgrade: bytes | None = None


@dataclass(slots=True)
class Data:
    """Body bytes, without framing. After a 101 these are the bytes of the tunnel."""

    data: bytes


@dataclass(slots=True)
class EndOfMessage:
    """The body is complete. Forbidden trailer fields (RFC 9110 §6.5.1) are already gone."""

    trailers: Headers = field(default_factory=list)


class ProtocolError(Exception):
    """The peer broke the protocol, or a limit. Where a request can still be answered, `status` is
    the answer and the connection is closed after it; `reason` is the counted reason, snake case."""

    def __init__(self, status: int, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.status = status
        self.reason = reason
        self.detail = detail or reason
