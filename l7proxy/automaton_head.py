"""A request head as a deterministic machine over bytes: what of the rules' conditions holds.

The grammar is HTTP/1.1's as the proxy forwards it unchanged (l7proxy.http1_head,
l7proxy.normalise), and narrower where that costs nothing: what is not certainly understood leads
nowhere, and such a head is the proxy's. States are values (tuples), `step` is a pure function;
l7proxy.automaton turns what is reachable into tables.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from l7proxy.automaton_nfa import Bytes, Nfa, States, byte_set
from l7proxy.http1_codec import NO_BODY_MEANS_EMPTY
from l7proxy.normalise import HOP_BY_HOP

_ALPHA = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_DIGITS = b"0123456789"
TOKEN = byte_set(b"!#$%&'*+-.^_`|~" + _DIGITS + _ALPHA)
# l7proxy.normalise: paths that are their own normal form.
_SEGMENT = byte_set(b"-._~!$&'()*+,;=:@" + _ALPHA + _DIGITS)
_QUERY = byte_set(b for b in range(0x21, 0x7F) if b != ord("#"))
# Tabs would be spaces, or go, on the proxy's way: of those round a length a backend may think else.
_VALUE = byte_set(range(0x20, 0x7F))
_HOST = byte_set(b"_~-" + _ALPHA[:26] + _DIGITS)

# Heads with these are the proxy's: they speak of the connection, of framing other than a plain
# length, or of who the client is.
_FORBIDDEN = (HOP_BY_HOP - {b"connection"}) | {b"expect", b"x-forwarded-client-cert"}
_METHODS_FORBIDDEN = (b"CONNECT", b"TRACE")
# Digits of a Content-Length: what a 32-bit number holds for certain.
_LENGTH_DIGITS = 9

State: TypeAlias = tuple[object, ...]


class Mark(enum.IntEnum):
    """What C has to know of beside facts; as in bpf/programs/automaton.h."""

    NONE = 0
    END = 1  # the last byte of the head
    LENGTH = 2  # the first digit of Content-Length
    HOST = 3  # the first byte of the host
    HOST_END = 4  # what follows its last


class Action(NamedTuple):
    """What a step does beside leading on. `sets`: facts that hold from now on; `seen`: a field or
    parameter that rules read, or whose second makes the head the proxy's; `path`: the path
    conditions that hold; `field`: one has ended."""

    sets: frozenset[int] = frozenset()
    seen: object = None
    path: frozenset[int] | None = None
    field: bool = False
    mark: Mark = Mark.NONE


NOTHING = Action()
# Of `seen`, what C has to know of: there is a host; the proxy would say of no body that it is none.
HOST_SEEN, LENGTH_WANTED = "host", "length wanted"
END: State = ("end",)

Step: TypeAlias = tuple[State, Action] | None


class HeadMachine:
    """Conditions by what they are about: `hosts` see host and port, `headers` and `parameters` are
    by name. The numbers of conditions that hold are the facts."""

    def __init__(
        self,
        methods: Nfa,
        paths: Nfa,
        hosts: Nfa,
        headers: Mapping[bytes, Nfa],
        parameters: Mapping[bytes, Nfa],
    ) -> None:
        self._methods = methods
        self._paths = paths
        self._hosts = hosts
        self._headers = headers
        self._parameters = parameters
        self._method_starts = _starts((*_METHODS_FORBIDDEN, *NO_BODY_MEANS_EMPTY))
        self.start: State = ("method", b"", methods.start)
        special = (b"host", b"content-length", b"connection", *_FORBIDDEN)
        self._names = _starts((*headers, *special))
        self._parameter_names = _starts(parameters)

    def alphabets(self) -> set[Bytes]:
        """The sets of bytes that `step` tells apart, single ones aside."""
        sets = {TOKEN, _SEGMENT, _QUERY, _VALUE, _HOST, byte_set(_DIGITS)}
        some = (self._methods, self._paths, self._hosts)
        for nfa in (*some, *self._headers.values(), *self._parameters.values()):
            sets |= nfa.alphabets()
        return sets

    def single_bytes(self) -> bytes:
        """Bytes that are told apart one by one."""
        words = (*self._method_starts, *self._names, *self._parameter_names)
        lower = set(b"".join(words))
        upper = set(bytes(lower).upper())
        return bytes(lower | upper | set(b" /?&=:.%+0123456789\r\n\tHTTP1keep-alivKA"))

    def step(self, state: State, byte: int) -> Step:
        """Where a byte leads, and what it does; None: the head is the proxy's."""
        return getattr(self, f"_in_{state[0]}")(state, byte)  # type: ignore[no-any-return]

    # --- request line -----------------------------------------------------------------------------

    def _in_method(self, state: State, byte: int) -> Step:
        _, text, reached = state
        assert text is None or isinstance(text, bytes)
        assert isinstance(reached, frozenset)
        if byte == 0x20 and text != b"" and text not in _METHODS_FORBIDDEN:
            seen = LENGTH_WANTED if text in NO_BODY_MEANS_EMPTY else None
            return ("target",), Action(self._methods.holding(reached), seen)
        if not TOKEN >> byte & 1:
            return None
        text = _further(text, byte, self._method_starts)
        return ("method", text, self._methods.step(reached, byte)), NOTHING

    def _in_target(self, state: State, byte: int) -> Step:
        if byte != 0x2F:
            return None
        return ("path", True, self._paths.step(self._paths.start, byte)), NOTHING

    def _in_path(self, state: State, byte: int) -> Step:
        _, at_segment, reached = state
        assert isinstance(reached, frozenset)
        if byte in b" ?":
            action = Action(path=self._paths.holding(reached))
            return (("version", 0) if byte == 0x20 else self._parameter()), action
        if byte == 0x2F:
            if at_segment:
                return None
        elif not _SEGMENT >> byte & 1 or (at_segment and byte == 0x2E):
            return None
        return ("path", byte == 0x2F, self._paths.step(reached, byte)), NOTHING

    def _parameter(self) -> State:
        return ("name", b"") if self._parameters else ("query",)

    def _in_query(self, state: State, byte: int) -> Step:
        if byte == 0x20:
            return ("version", 0), NOTHING
        return (state, NOTHING) if _QUERY >> byte & 1 else None

    def _in_name(self, state: State, byte: int) -> Step:
        """The name of a query parameter. Escapes are not read here: the proxy decodes them."""
        _, text = state
        assert text is None or isinstance(text, bytes)
        if byte in b" &":
            nfa = self._parameters.get(text) if text is not None else None
            action = NOTHING
            if nfa is not None and text:
                action = _read("query", text, nfa, nfa.start)
            return (("version", 0) if byte == 0x20 else self._parameter()), action
        if byte in b"%+" or not _QUERY >> byte & 1:
            return None
        if byte == 0x3D:
            nfa = self._parameters.get(text) if text is not None else None
            return ("argument", text, nfa.start if nfa else None), NOTHING
        return ("name", _further(text, byte, self._parameter_names)), NOTHING

    def _in_argument(self, state: State, byte: int) -> Step:
        _, name, reached = state
        nfa = self._parameters[name] if isinstance(name, bytes) and reached is not None else None
        if byte in b" &":
            action = NOTHING
            if nfa is not None:
                assert isinstance(reached, frozenset)
                action = _read("query", name, nfa, reached)
            return (("version", 0) if byte == 0x20 else self._parameter()), action
        if byte in b"%+" or not _QUERY >> byte & 1:
            return None
        if nfa is not None:
            assert isinstance(reached, frozenset)
            return ("argument", name, nfa.step(reached, byte)), NOTHING
        return ("argument", None, None), NOTHING

    def _in_version(self, state: State, byte: int) -> Step:
        _, at = state
        assert isinstance(at, int)
        text = b"HTTP/1.1\r\n"
        if byte != text[at]:
            return None
        if at + 1 < len(text):
            return ("version", at + 1), NOTHING
        return ("field", b""), NOTHING

    # --- fields -----------------------------------------------------------------------------------

    def _in_field(self, state: State, byte: int) -> Step:
        """The name of a field, or the empty line."""
        _, text = state
        assert text is None or isinstance(text, bytes)
        if text == b"" and byte == 13:
            return ("last",), NOTHING
        if byte == 0x3A and text != b"":
            return self._value_of(text)
        if not TOKEN >> byte & 1:
            return None
        return ("field", _further(text, bytes((byte,)).lower()[0], self._names)), NOTHING

    def _in_last(self, state: State, byte: int) -> Step:
        return (END, Action(mark=Mark.END)) if byte == 10 else None

    def _value_of(self, name: bytes | None) -> Step:
        if name in _FORBIDDEN:
            return None
        if name == b"host":
            return ("host", "before", self._hosts.start), NOTHING
        if name == b"content-length":
            return ("length", "before", 0), NOTHING
        if name == b"connection":
            return ("connection", -1), NOTHING
        nfa = self._headers.get(name) if name is not None else None
        if nfa is not None:
            return ("value", name, None, nfa.start), NOTHING
        return ("text",), NOTHING

    def _in_text(self, state: State, byte: int) -> Step:
        if byte == 13:
            return ("line",), NOTHING
        return (state, NOTHING) if _VALUE >> byte & 1 else None

    def _in_line(self, state: State, byte: int) -> Step:
        return (("field", b""), Action(field=True)) if byte == 10 else None

    def _in_value(self, state: State, byte: int) -> Step:
        """Of a field that rules read. `before`: where the value ended if the blanks since then are
        its last ones; None: it has not begun."""
        _, name, before, now = state
        assert isinstance(name, bytes)
        assert isinstance(now, frozenset)
        nfa = self._headers[name]
        if byte == 13:
            ended = before if isinstance(before, frozenset) else now
            return ("line",), _read("header", name, nfa, ended)
        if not _VALUE >> byte & 1:
            return None
        if byte == 0x20:
            return (
                state if before is None else ("value", name, before, nfa.step(now, byte))
            ), NOTHING
        now = nfa.step(now, byte)
        return ("value", name, now, now), NOTHING

    def _in_host(self, state: State, byte: int) -> Step:
        """In normal form: lower case, no final dot; a port without leading zeros. IPv6 is the
        proxy's. `part`: before the value, in a label, after a dot, digits of the port, after it."""
        _, part, reached = state
        assert isinstance(reached, frozenset)
        holding = Action(self._hosts.holding(reached), HOST_SEEN, mark=Mark.HOST_END)
        ended = part == "label" or (isinstance(part, int) and part > 0)
        if byte == 13:
            if part == "after":
                return ("line",), NOTHING
            return (("line",), holding) if ended else None
        if byte == 0x20:
            if part in ("before", "after"):
                return state, NOTHING
            return (("host", "after", frozenset()), holding) if ended else None
        to: object
        if isinstance(part, int):
            # At most four digits: more might be above 65535.
            if byte not in _DIGITS or part == 4 or (part == 0 and byte == 0x30):
                return None
            to = part + 1
        elif _HOST >> byte & 1 and part in ("before", "label", "dot"):
            to = "label"
        elif byte == 0x2E and part == "label":
            to = "dot"
        elif byte == 0x3A and part == "label":
            to = 0
        else:
            return None
        begins = Action(mark=Mark.HOST) if part == "before" else NOTHING
        return ("host", to, self._hosts.step(reached, byte)), begins

    def _in_length(self, state: State, byte: int) -> Step:
        _, part, digits = state
        assert isinstance(digits, int)
        if byte == 0x20:
            if part == "before":
                return state, NOTHING
            return ("length", "after", 0), NOTHING
        if byte == 13:
            return (("line",), NOTHING) if part != "before" else None
        if byte not in _DIGITS or part in ("after", "zero") or digits == _LENGTH_DIGITS:
            return None
        to = "zero" if part == "before" and byte == 0x30 else "digits"
        begins = Action(seen="content-length", mark=Mark.LENGTH) if part == "before" else NOTHING
        return ("length", to, digits + 1), begins

    def _in_connection(self, state: State, byte: int) -> Step:
        """A lone keep-alive."""
        _, at = state
        assert isinstance(at, int)
        text = b"keep-alive"
        if at == -1:
            if byte == 0x20:
                return state, NOTHING
            at = 0
        if at < len(text):
            if bytes((byte,)).lower()[0] != text[at]:
                return None
            return ("connection", at + 1), NOTHING
        if byte == 0x20:
            return state, NOTHING
        return (("line",), NOTHING) if byte == 13 else None


def _read(kind: str, name: object, nfa: Nfa, reached: States) -> Action:
    """A named value was read whole. Of one that comes twice the proxy knows what it means."""
    return Action(nfa.holding(reached), (kind, name))


def _starts(words: object) -> frozenset[bytes]:
    """All beginnings of words."""
    assert not isinstance(words, bytes)
    return frozenset(word[:n] for word in words for n in range(len(word) + 1))  # type: ignore[attr-defined]


def _further(text: bytes | None, byte: int, starts: frozenset[bytes]) -> bytes | None:
    """A word read so far; None: it is none that anybody asks for."""
    if text is None:
        return None
    longer = text + bytes((byte,))
    return longer if longer in starts else None
