"""HTTP/1.1 connections without I/O: `ServerCodec` faces a client, `ClientCodec` a backend.

Bytes are put in, events come out (`RequestHead` or `ResponseHead`, `Data`…, `EndOfMessage`), one
message at a time; heads and bodies to send become bytes. A codec knows framing and persistence of
its own connection. It knows no sockets, no timers, and no other connection.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import TypeAlias

from l7proxy.http1_body import (
    BodyReader,
    BodyWriter,
    ChunkedReader,
    CloseReader,
    LengthReader,
    ReceiveBuffer,
    encode_head,
)
from l7proxy.http1_head import check_incomplete, has_body, parse_request, parse_response
from l7proxy.message import (
    BodyLength,
    Data,
    EndOfMessage,
    Framing,
    Headers,
    ProtocolError,
    RequestHead,
    ResponseHead,
)
from mesh.model.nodeconfig import Settings

ServerEvent: TypeAlias = RequestHead | Data | EndOfMessage
ClientEvent: TypeAlias = ResponseHead | Data | EndOfMessage

# A backend that keeps sending 1xx responses never comes to the point.
_MAX_INFORMATIONAL = 50

_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}
_STATUS_LINES = {
    status: b"HTTP/1.1 %d %b\r\n" % (status, _PHRASES.get(status, b""))
    for status in range(100, 1000)
}
NO_BODY_MEANS_EMPTY = frozenset((b"POST", b"PUT", b"PATCH"))


class ServerCodec:
    """The server's end of a connection.

    `next_event` yields a request head, its body, `EndOfMessage`, and then nothing until
    `next_request` is called: pipelined requests wait in the buffer while one is answered. After a
    101 every byte is `Data`. After a ProtocolError nothing more may be read.
    """

    def __init__(self, scheme: bytes, settings: Settings) -> None:
        self.buffer = ReceiveBuffer()
        self.keep_alive = True
        self.request_complete = False
        self.raw_head = b""  # of the request
        self._scheme = scheme
        self._settings = settings
        self._reader: BodyReader | None = None
        self._head: RequestHead | None = None
        self._empty_line_skipped = False
        self._writer = BodyWriter(Framing.NONE)

    def receive(self, data: bytes) -> None:
        self.buffer.put(data)

    @property
    def between_requests(self) -> bool:
        """No byte of a next request has come."""
        return self._head is None and not self.buffer.left

    @property
    def ends_by_close(self) -> bool:
        """The client knows the end of the response by the connection's only: HTTP/1.0, tunnels."""
        return self._writer.ends_by_close

    @property
    def request_whole(self) -> bool:
        """All of the request has come, and nothing behind it."""
        nothing_due = isinstance(self._reader, LengthReader) and not self._reader.left
        return not self.buffer.left and (self.request_complete or nothing_due)

    @property
    def cut_short(self) -> bool:
        """Whether, if nothing more came, the request is known not to be whole."""
        if isinstance(self._reader, LengthReader):
            return self._reader.left > self.buffer.left
        return isinstance(self._reader, ChunkedReader) and not self.buffer.left

    def next_event(self) -> ServerEvent | None:
        """The next event, or None if more bytes, or `next_request`, are needed first."""
        if self._head is None:
            return self._next_head()
        if self._reader is None:
            return None
        event = self._reader.next(self.buffer)
        if event.__class__ is EndOfMessage:
            self._reader = None
            self.request_complete = True
        return event

    def _next_head(self) -> RequestHead | None:
        buffer = self.buffer
        # RFC 9112 §2.2: one empty line before a request line, as old clients send after a body.
        if (
            not self._empty_line_skipped
            and buffer.left >= 2
            and buffer.data.startswith(b"\r\n", buffer.position)
        ):
            self._empty_line_skipped = True
            buffer.take(2)
        if not buffer.left:
            return None
        searched = buffer.searched
        length = buffer.find(b"\r\n\r\n")
        limit = self._settings.max_head_bytes
        if length > limit or (length < 0 and buffer.left > limit):
            if b"\r\n" in buffer.data[buffer.position : buffer.position + limit]:
                raise ProtocolError(431, "head_too_large", f"a head larger than {limit} bytes")
            raise ProtocolError(414, "target_too_long", f"a request line over {limit} bytes")
        if length < 0:
            check_incomplete(buffer.data, buffer.position, searched)
            return None
        self.raw_head = buffer.take(length)
        head, wanted = parse_request(self.raw_head, self._scheme, self._settings)
        self._head = head
        self.keep_alive = self.keep_alive and wanted
        if head.body is Framing.STREAM:
            self._reader = ChunkedReader(self._settings, self._settings.max_body_bytes, 400)
        else:
            self._reader = LengthReader(head.body if isinstance(head.body, int) else 0)
        return head

    def next_request(self) -> None:
        """The request has been read and answered whole: go on to the next one."""
        self._head = None
        self._empty_line_skipped = False
        self.request_complete = False

    def resume(self, head: RequestHead) -> None:
        """A request that has come another way is to be answered; only between requests."""
        self._head = head
        self._reader = None
        self.request_complete = True

    def informational(self, head: ResponseHead) -> bytes:
        """A 1xx response other than 101; nothing for a client that does not know them."""
        if self._head is not None and self._head.version == b"1.0":
            return b""
        return encode_head(_STATUS_LINES[head.status], head.headers)

    def response(self, head: ResponseHead) -> bytes:
        """The final response head. What follows goes through `data` and `end`."""
        request = self._head
        if head.status == 101 and head.upgrade is not None:
            self._reader = CloseReader()
            self._writer = BodyWriter(Framing.CLOSE)
            self.keep_alive = False
            own = [(b"connection", b"upgrade"), (b"upgrade", head.upgrade)]
            return encode_head(_STATUS_LINES[101], own + head.headers)
        method, version = (b"", b"1.0") if request is None else (request.method, request.version)
        silent = not has_body(head.status, method)
        framing = _response_framing(head, method, silent, version)
        if framing is Framing.CLOSE and not silent:
            self.keep_alive = False
        self._writer = BodyWriter(framing, silent=silent)
        own = _framing_fields(framing)
        if not self.keep_alive:
            own.append((b"connection", b"close"))
        elif version == b"1.0":
            own.append((b"connection", b"keep-alive"))
        if not any(name == b"date" for name, _ in head.headers):
            own.append((b"date", date()))
        return encode_head(_STATUS_LINES[head.status], head.headers + own)

    def error(self, error: ProtocolError) -> bytes:
        """A whole response that tells of `error`; the connection is to be closed after it."""
        self.keep_alive = False
        text = b"%b\n" % error.detail.encode()
        content = [(b"content-type", b"text/plain; charset=utf-8")]
        head = self.response(ResponseHead(error.status, content, len(text)))
        return b"".join((head, *self._writer.data(text)))

    @property
    def response_complete(self) -> bool:
        """Nothing is left of a response whose length was declared."""
        return self._writer.complete

    def data(self, data: bytes) -> Sequence[bytes]:
        return self._writer.data(data)

    def end(self, trailers: Headers) -> bytes:
        return self._writer.end(trailers)


def _response_framing(
    head: ResponseHead, method: bytes, silent: bool, version: bytes
) -> BodyLength:
    body = head.body
    if silent:
        # HEAD and 304 may tell what a GET would have got; nothing is made up for them.
        told = method == b"HEAD" or head.status == 304
        return body if told and (body is not Framing.STREAM or version != b"1.0") else Framing.NONE
    if body is Framing.NONE:
        return 0
    if isinstance(body, int):
        return body
    # Chunks tell the client an end from a breaking off; HTTP/1.0 has nothing better than the close.
    return Framing.CLOSE if version == b"1.0" else Framing.STREAM


def _framing_fields(body: BodyLength) -> Headers:
    if body is Framing.STREAM:
        return [(b"transfer-encoding", b"chunked")]
    if isinstance(body, int):
        return [(b"content-length", b"%d" % body)]
    return []


_last_date = (0, b"")


def date() -> bytes:
    """The value of Date, made once a second."""
    global _last_date
    now = int(time.time())
    if _last_date[0] != now:
        _last_date = (now, formatdate(now, usegmt=True).encode())
    return _last_date[1]


class ClientCodec:
    """The client's end of a connection: `request`, then events until `EndOfMessage`."""

    def __init__(self, settings: Settings) -> None:
        self.buffer = ReceiveBuffer()
        self.keep_alive = True
        self._settings = settings
        self._head: RequestHead | None = None
        self._reader: BodyReader | None = None
        self._informational = 0
        self._writer = BodyWriter(Framing.NONE)

    @property
    def response_due(self) -> bool:
        """A request went out and its response has not ended."""
        return self._head is not None

    def request(self, head: RequestHead) -> bytes:
        """The request head. ValueError: a field or the target would break out of its line."""
        self._head = head
        self._reader = None
        self._informational = 0
        self._writer = BodyWriter(head.body)
        own = [(b"host", head.authority)]
        if head.body is Framing.NONE:
            if head.method in NO_BODY_MEANS_EMPTY:  # RFC 9110 §8.6
                own.append((b"content-length", b"0"))
        else:
            own += _framing_fields(head.body)
        options = []
        if head.upgrade is not None:
            options.append(b"upgrade")
            own.append((b"upgrade", head.upgrade))
        if head.trailers_ok:
            options.append(b"te")
            own.append((b"te", b"trailers"))
        if options:
            own.append((b"connection", b", ".join(options)))
        if head.expect_continue:
            own.append((b"expect", b"100-continue"))
        line = b"%b %b HTTP/1.1\r\n" % (head.method, head.target)
        if line.count(b" ") != 2:
            raise ValueError("a request line with blanks in its parts")
        return encode_head(line, own + head.headers)

    def data(self, data: bytes) -> Sequence[bytes]:
        return self._writer.data(data)

    def end(self, trailers: Headers) -> bytes:
        return self._writer.end(trailers)

    def receive(self, data: bytes) -> None:
        self.buffer.put(data)

    def next_event(self) -> ClientEvent | None:
        """The next event, or None if more bytes (or a request) are needed."""
        if self._head is None:
            return None
        if self._reader is None:
            return self._next_head(self._head)
        event = self._reader.next(self.buffer)
        if event.__class__ is EndOfMessage:
            self._head = None
        return event

    def receive_eof(self) -> EndOfMessage | None:
        """The backend closed, and `next_event` has nothing more: the end of the message if the
        closing was its end, None if it broke off."""
        if isinstance(self._reader, CloseReader) and self._head is not None:
            self._head = None
            return EndOfMessage()
        return None

    def _next_head(self, request: RequestHead) -> ResponseHead | None:
        length = self.buffer.find(b"\r\n\r\n")
        limit = self._settings.max_head_bytes
        if length > limit or (length < 0 and self.buffer.left > limit):
            raise ProtocolError(502, "head_too_large", f"a response head over {limit} bytes")
        if length < 0:
            begin = self.buffer.data[self.buffer.position : self.buffer.position + 7]
            if not b"HTTP/1.".startswith(begin):
                raise ProtocolError(502, "bad_status_line", "the backend does not speak HTTP/1.1")
            return None
        head, keep_alive = parse_response(
            self.buffer.take(length), request.method, request.upgrade, self._settings.max_headers
        )
        if head.status == 101:
            self._reader = CloseReader()
            self._writer = BodyWriter(Framing.CLOSE)
            self.keep_alive = False
        elif head.status < 200:
            self._informational += 1
            if self._informational > _MAX_INFORMATIONAL:
                raise ProtocolError(502, "too_many_informational", "too many 1xx responses")
        else:
            self.keep_alive = keep_alive
            self._reader = self._body_reader(head, request.method)
        return head

    def _body_reader(self, head: ResponseHead, method: bytes) -> BodyReader:
        if not has_body(head.status, method):
            return LengthReader(0)
        if head.body is Framing.CLOSE:
            return CloseReader()
        if head.body is Framing.STREAM:
            return ChunkedReader(self._settings, None, 502)
        return LengthReader(head.body if isinstance(head.body, int) else 0)
