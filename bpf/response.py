"""Which responses may pass by the proxy, as tables that bpf/programs/response.h walks.

A head that is whole and nothing out of the ordinary: "HTTP/1.1", a final status, fields by the
grammar of RFC 9110 §5.1 and §5.5, exactly one Content-Length of at most seven digits (none with 204
and 304, which have no body: RFC 9112 §6.3), and none of the fields that concern a connection but
"Connection: keep-alive". Everything else leads to the state that nothing
leads out of, and is the proxy's. No I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from bpf.constants import (
    RESPONSE_ALIVE,
    RESPONSE_DIGIT,
    RESPONSE_DONE,
    RESPONSE_START,
    RESPONSE_STATES,
)

_TOKEN = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TEXT = bytes([9, *range(0x20, 0x7F), *range(0x80, 0x100)])
_REFUSED = 0
_DIGITS = 7
# What a hop says to the next one (RFC 9110 §7.6.1: the proxy takes it out, so it does not pass, not
# even Keep-Alive: that is about the backend's connection), or what the proxy would have to look at.
_UNUSUAL = (
    b"transfer-encoding",
    b"keep-alive",
    b"proxy-connection",
    b"proxy-authenticate",
    b"proxy-authentication-info",
    b"proxy-authorization",
    b"trailer",
    b"te",
    b"upgrade",
)
_LENGTH, _CONNECTION = b"content-length", b"connection"
_BODILESS = (b"204", b"304")
# Endpoints that answer so are left alone for a while: the proxy must know.
_TOLD = (b"502", b"503", b"504")


class _Tables:
    """Cells by state and byte; all refuse until they are said to lead elsewhere."""

    def __init__(self) -> None:
        self._cells = [[_REFUSED] * 256 for _ in range(RESPONSE_STATES)]
        self._cells[RESPONSE_DONE] = [RESPONSE_DONE] * 256
        self._next = RESPONSE_DONE + 1

    def state(self) -> int:
        self._next += 1
        assert self._next <= RESPONSE_STATES
        return self._next - 1

    def lead(self, state: int, over: Iterable[int], to: int, *, digit: bool = False) -> None:
        for byte in over:
            self._cells[state][byte] = to | digit << RESPONSE_DIGIT | 1 << RESPONSE_ALIVE

    def to(self, state: int, byte: int) -> int:
        return self._cells[state][byte] & (RESPONSE_STATES - 1)

    def text(self, state: int, text: bytes, to: int | None = None) -> int:
        """The state behind `text` in either case, or `to` is."""
        for at, byte in enumerate(text):
            last = at == len(text) - 1
            after = to if to is not None and last else self.state()
            self.lead(state, {*bytes([byte]).lower(), *bytes([byte]).upper()}, after)
            state = after
        return state

    def packed(self) -> bytes:
        return b"".join(struct.pack("=256H", *row) for row in self._cells)


def tables() -> bytes:
    """struct responses."""
    table = _Tables()
    line = RESPONSE_START
    for byte in b"HTTP/1.1 ":
        after = table.state()
        table.lead(line, (byte,), after)
        line = after
    # Fields before Content-Length, and behind it.
    behind = _fields(table, None)
    before = _fields(table, behind)
    ends = [_reason(table, fields) for fields in (before, behind)]
    _status(table, line, *ends)
    return table.packed()


def _reason(table: _Tables, fields: int) -> int:
    """The state behind the status."""
    blank, reason, end = (table.state() for _ in range(3))
    table.lead(blank, b" ", reason)
    table.lead(reason, _TEXT, reason)
    table.lead(reason, b"\r", end)
    table.lead(end, b"\n", fields)
    return blank


def _status(table: _Tables, line: int, whole: int, bodiless: int) -> None:
    """Three digits lead to `whole`, those of _BODILESS to `bodiless`, 1xx and _TOLD nowhere."""
    digits = b"0123456789"
    for first in b"2345":
        tens = table.state()
        table.lead(line, (first,), tens)
        other, zero = table.state(), table.state()
        table.lead(tens, digits, other)
        table.lead(tens, b"0", zero)
        table.lead(other, digits, whole)
        for last in digits:
            status = bytes((first, ord("0"), last))
            if status not in _TOLD:
                table.lead(zero, (last,), bodiless if status in _BODILESS else whole)


def _fields(table: _Tables, behind: int | None) -> int:
    """The state in which a field may begin; `behind` is that of fields behind Content-Length, None:
    these are."""
    begin, name, value, end = (table.state() for _ in range(4))
    table.lead(name, _TOKEN, name)
    table.lead(name, b":", value)
    table.lead(value, _TEXT, value)
    table.lead(value, b"\r", end)
    table.lead(end, b"\n", begin)
    table.lead(begin, _TOKEN, name)
    if behind is None:
        last = table.state()
        table.lead(begin, b"\r", last)
        table.lead(last, b"\n", RESPONSE_DONE)
    # Names that mean something are a tree, which is left for `name` as soon as another begins.
    tree: dict[bytes, int] = {b"": begin}
    for known in (_LENGTH, _CONNECTION, *_UNUSUAL):
        for size in range(1, len(known) + 1):
            if known[:size] in tree:
                continue
            here, state = tree[known[: size - 1]], table.state()
            tree[known[:size]] = state
            byte = known[size - 1 : size]
            table.lead(here, byte + byte.upper(), state)
            table.lead(state, _TOKEN, name)
            table.lead(state, b":", value)
    for known in _UNUSUAL:
        table.lead(tree[known], b":", _REFUSED)
    blank = table.state()
    table.lead(tree[_CONNECTION], b":", blank)
    table.lead(blank, b" ", blank)
    kept = table.text(blank, b"keep-alive")
    table.lead(kept, b"\r", end)
    if behind is None:
        table.lead(tree[_LENGTH], b":", _REFUSED)
    else:
        _length(table, tree[_LENGTH], behind)
    return begin


def _length(table: _Tables, name: int, behind: int) -> None:
    blank, end = table.state(), table.state()
    table.lead(name, b":", blank)
    table.lead(blank, b" ", blank)
    table.lead(end, b"\n", behind)
    state, digits = blank, b"0123456789"
    for _ in range(_DIGITS):
        after = table.state()
        table.lead(state, digits, after, digit=True)
        table.lead(after, b"\r", end)
        state = after
