"""What of a request a match looks at, and whether a match holds.

The conditions are tested in one place, for routing and for explanations alike. Sources of values:
repeated headers count as one, joined with "," (RFC 9110 §5.3; Cookie with "; "); query parameters
are read as application/x-www-form-urlencoded (URL standard §5.1: "+" is a space), the first value
of a repeated one counts. "host" is the authority, "upgrade" the protocol asked for,
"content-length" the body's length where it is known: codecs take these out of the headers.
"""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from l7proxy.message import RequestHead
from l7proxy.route_compile import CompiledMatch


class RequestView:
    """A request's values as matches see them; what no match asks for is not computed."""

    __slots__ = ("_headers", "_query", "head")

    def __init__(self, head: RequestHead) -> None:
        self.head = head
        self._headers: dict[bytes, bytes] | None = None
        self._query: dict[bytes, bytes] | None = None

    def header(self, name: bytes) -> bytes | None:
        """A header's value; `name` in lower case."""
        if self._headers is None:
            self._headers = _headers(self.head)
        return self._headers.get(name)

    def parameter(self, name: bytes) -> bytes | None:
        """A query parameter's first value, decoded."""
        if self._query is None:
            self._query = _parameters(self.head.query or b"")
        return self._query.get(name)


def _headers(head: RequestHead) -> dict[bytes, bytes]:
    repeated: dict[bytes, list[bytes]] = {}
    for name, value in head.headers:
        repeated.setdefault(name, []).append(value)
    values = {
        name: (b"; " if name == b"cookie" else b",").join(lines) for name, lines in repeated.items()
    }
    values[b"host"] = head.authority
    if head.upgrade is not None:
        values[b"upgrade"] = head.upgrade
    if isinstance(head.body, int):
        values[b"content-length"] = b"%d" % head.body
    return values


def _parameters(query: bytes) -> dict[bytes, bytes]:
    values: dict[bytes, bytes] = {}
    for pair in query.split(b"&"):
        if pair:
            name, _, value = pair.partition(b"=")
            values.setdefault(_decode(name), _decode(value))
    return values


def _decode(text: bytes) -> bytes:
    text = text.replace(b"+", b" ")
    return unquote_to_bytes(text) if b"%" in text else text


def path_holds(match: CompiledMatch, path: bytes) -> bool:
    """Whether the match's path condition holds, the long way; the index finds the same by look-up.

    A prefix is matched by whole segments: "/abc" holds for "/abc", "/abc/", "/abc/d", not "/abcd".
    """
    if match.path_type == "Exact":
        return path == match.path
    if match.regex is not None:
        return match.regex.matches(path)
    return path == match.path or path.startswith(match.path + b"/")


def rest_holds(match: CompiledMatch, view: RequestView) -> bool:
    """Whether method, headers and query parameters are as the match wants them."""
    if match.method is not None and match.method != view.head.method:
        return False
    return all(c.holds(view.header(c.name)) for c in match.headers) and all(
        c.holds(view.parameter(c.name)) for c in match.query
    )
