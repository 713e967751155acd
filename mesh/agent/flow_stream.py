"""GET /flows of the agent API: flow records as lines of JSON, a mesh.agent.flows.Line each.

?from= &to= &verdict= … (mesh.agent.flow_filter.FILTERS, each may be repeated), &since=, &after=
(nanoseconds since 1970: only later ones), &last=N (0: none of those there are), &follow=1. Records
that there are come by their time, then new ones as they come. A reader that does not keep up holds
up nobody: what it misses is counted and told where it is missing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
from aiohttp import web

from mesh.agent.flow_filter import FILTERS, FilterError, compile_filters, since_ns
from mesh.agent.flows import FlowStore, Line, Lost, Matches
from mesh.model.flow import Flow

# Lines written at once: what a reader that stopped reading has in memory here is bounded by it.
_LINES = 128
_OTHERS = frozenset(("since", "after", "last", "follow"))


async def stream(request: web.Request, store: FlowStore) -> web.StreamResponse:
    """FilterError: the query cannot be understood."""
    query = request.query
    if unknown := sorted(query.keys() - FILTERS.keys() - _OTHERS):
        raise FilterError(f"there is no filter {', '.join(unknown)}")
    matches = compile_filters((name, value) for name, value in query.items() if name in FILTERS)
    since = since_ns(query["since"]) if "since" in query else 0
    earliest = max(since, _number("after", query.get("after", "0")) + 1)
    last = _number("last", query["last"]) if "last" in query else None
    follower = store.follow(matches) if query.get("follow") == "1" else None
    # From here on everything new goes to the follower, and what there was is in `held`.
    held, overwritten = store.held(), store.overwritten
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    try:
        await response.prepare(request)
        found = await asyncio.to_thread(_chosen, held, matches, earliest, last)
        oldest = min((flow.time for flow in held[:1]), default=0)
        if since and overwritten and since < oldest and (last is None or len(found) < last):
            await _write(response, [Line(lost=Lost("overwritten"))])
        await _write(response, [Line(flow) for flow in found])
        while follower is not None and (lines := await follower.batch()):
            await _write(response, lines)
    except ConnectionError:  # the reader has seen enough
        pass
    finally:
        if follower is not None:
            store.unfollow(follower)
    return response


def _number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise FilterError(f"{name} {text}: must be a number, 0 or more")
    return int(text)


def _chosen(held: list[Flow], matches: Matches, earliest: int, last: int | None) -> list[Flow]:
    """The newest `last` of those that match, by time."""
    found: list[Flow] = []
    for flow in reversed(held):
        if last is not None and len(found) >= last:
            break
        if flow.time >= earliest and matches(flow):
            found.append(flow)
    found.reverse()  # as they came, where times are equal
    return sorted(found, key=lambda flow: flow.time)


async def _write(response: web.StreamResponse, lines: list[Line]) -> None:
    """Waits for the reader, that is for its socket."""
    for start in range(0, len(lines), _LINES):
        await response.write(_encoded(lines[start : start + _LINES]))


def _encoded(lines: Iterable[Line]) -> bytes:
    encoder = msgspec.json.Encoder()
    return b"".join(encoder.encode(line) + b"\n" for line in lines)
