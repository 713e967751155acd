"""The self-test's check of requests that pass by the proxy, for bpf.selftest_probe.

By a real table, of a little automaton that is written by hand: this package knows no rules that one
could be compiled from.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from array import array

from bpf.automaton import Automata
from bpf.constants import PAIR_SHARES, RESPONSE_MAX
from bpf.proxy import Offer
from bpf.selftest_probe import TIMEOUT_S, connected
from bpf.selftest_redirect import NODE, Taken, World, received, server, unread
from bpf.structs import Way
from mesh.model.nodeconfig import EntryBackend

# More than a page, so that it is in pieces.
_VALUE = b"a" * 5000
REQUEST = b"GET /weft HTTP/1.1\r\nHost: weft\r\nA: " + _VALUE + b"\r\n\r\n"
DENIED = REQUEST.replace(b"/weft", b"/left")
_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nweft"
_MANY, _FOR_EVER_NS = 1 << 30, 1 << 63
_GENERATION, _RULE = 1, 1

# struct automaton, automaton_found and automaton_rule of bpf/programs/automaton.h.
_HEADER, _FOUND, _CANDIDATE = map(struct.Struct, ("=Q8IQQ256s", "=IIQ4Q", "=3QII"))
_COLUMNS, _WORD = 256, 4
_FOUND_SHIFT, _EVENT = 20, 1 << 31
_END, _HOST, _HOST_END = 1, 3, 4
_HOST_SEEN, _NONE = 1, 0xFFFF
_HEAD_MAX, _NO_LIMIT = 8000, (1 << 64) - 1


def table() -> bytes:
    """It knows REQUEST, with any value of its last field, which its one rule is about, and DENIED,
    which none is about; everything else is the proxy's."""
    begin, _, end = REQUEST.partition(_VALUE)
    path, host = begin.index(b"weft "), begin.index(b"weft\r")
    founds = [
        (0, 0, 0),
        (0, 1, 0),  # the path of REQUEST,
        (0, 2, 0),  # that of DENIED
        (_HOST, 0, _HOST_SEEN),
        (_HOST_END, 0, 0),
        (_END, 0, 0),
    ]
    events = {host: 3, begin.index(b"\r\nA:"): 4}
    # Rows: the end of everything; the value, in which bytes are skipped; one for each other byte.
    rows = [array("I", [0] * _COLUMNS), array("I", [0] * _COLUMNS)]
    rows[1][0x20:0x7F] = array("I", [_COLUMNS] * (0x7F - 0x20))

    def cell(row: int, found: int = 0) -> int:
        return row * _COLUMNS | (found << _FOUND_SHIFT | _EVENT if found else 0)

    for at, byte in enumerate(begin):
        row = array("I", [0] * _COLUMNS)
        after = len(rows) + 1 if at + 1 < len(begin) else 1
        row[byte] = cell(after, 1 if at == path else events.get(at, 0))
        if at == path:
            row[DENIED[at]] = cell(after, 2)
        rows.append(row)
    rows[1][end[0]] = cell(len(rows))
    for byte in end[1:-1]:
        row = array("I", [0] * _COLUMNS)
        row[byte] = cell(len(rows) + 1)
        rows.append(row)
    rows.append(array("I", [0] * _COLUMNS))
    rows[-1][end[-1]] = cell(0, 5)

    words = array("I", [cell for row in rows for cell in row])
    found_at = len(words)
    for what, path_class, seen in founds:
        words.frombytes(_FOUND.pack(what, path_class, 0, seen, 0, 0, 0))
    rule_at, none_at = len(words), len(words) + _CANDIDATE.size // _WORD
    words.frombytes(_CANDIDATE.pack(0, 0, 0, _RULE, 0) + _CANDIDATE.pack(0, 0, 0, _NONE, 0))
    # By the paths' classes.
    lists = (none_at, rule_at, none_at)
    lists_at = len(words)
    words.extend(lists)
    start, plain = 2 * _COLUMNS, 2 * _COLUMNS
    header = _HEADER.pack(
        *(_GENERATION, start, plain, found_at, lists_at, len(lists), 0, _HEAD_MAX, 0),
        *(_NO_LIMIT, 0, bytes(range(_COLUMNS))),
    )
    return header + words.tobytes()


def check(world: World) -> str:
    """Why the fact does not hold, "" if it does."""
    with contextlib.closing(Automata(world.pin)) as automata:
        automata.put(_GENERATION, table())
    with contextlib.closing(world.taken("4")) as taken, server(NODE["4"]) as listening:
        port = listening.getsockname()[1]
        world.frontend(NODE["4"], port, EntryBackend(NODE["4"], port, sockmap=True))
        with world.as_proxy():
            upstream = connected(NODE["4"], port)
        with upstream, listening.accept()[0] as backend:
            for sock in (upstream, backend):
                sock.settimeout(TIMEOUT_S)
            return _pass(world, taken, upstream, backend)


def _pass(world: World, taken: Taken, upstream: socket.socket, backend: socket.socket) -> str:
    handles, client, proxy = world.handles, taken.workload, taken.proxy
    way = Way(handles.pair(upstream.fileno()) or 0, 0, _RULE, PAIR_SHARES, RESPONSE_MAX)
    by_tcp = 0  # so much has the client sent

    def offer() -> None:
        rest = ((way,), by_tcp, (0,), 0, _MANY, _FOR_EVER_NS, 0)
        made = Offer(taken.origin.cookie, _GENERATION, 0, 0, *rest)
        if not (handles.prepare(made) and handles.offer(made)):
            raise OSError(0, "there is no room for a pair")

    offer()
    client.sendall(REQUEST)
    if not _came(REQUEST, backend, not_to=proxy):
        return "a request did not come to its backend as it was"
    client.sendall(REQUEST)
    if not _came(REQUEST, proxy, not_to=backend):
        return "a request did not wait for the answer to the one before it"
    backend.sendall(_RESPONSE)
    if not _came(_RESPONSE, client, not_to=upstream):
        return "a response did not come to its client as it was"
    if not handles.delivered(taken.origin.cookie):
        return "a response that was read counts as being on its way"
    client.sendall(REQUEST)
    if not _came(REQUEST, proxy, not_to=backend):
        return "a request passed one that the proxy was not done with"
    by_tcp += 2 * len(REQUEST)
    offer()
    client.sendall(DENIED)
    if not _came(DENIED, proxy, not_to=backend):
        return "a request that no rule lets pass did not come to the proxy"
    backend.sendall(b"weft")
    if not _came(b"weft", upstream, not_to=client):
        return "what was no response did not come to the proxy"
    # Four bytes that nobody is done with.
    by_tcp += len(DENIED)
    offer()
    client.sendall(REQUEST)
    if not _came(REQUEST, backend, not_to=proxy):
        return "a request did not come to its backend after another was the proxy's"
    backend.sendall(_RESPONSE)
    if not _came(_RESPONSE, upstream, not_to=client):
        return "a response behind something else passed the proxy by"
    passed = handles.passed(taken.origin.cookie)
    right = passed is not None and (passed.forwarded, passed.answered, passed.handed) == (2, 1, 1)
    return "" if right else f"it was counted wrongly: {passed}"


def _came(data: bytes, to: socket.socket, *, not_to: socket.socket) -> bool:
    """Exactly this, and nothing where it should not."""
    try:
        return received(to, len(data)) == data and not unread(not_to)
    except TimeoutError:
        return False
