"""A request's body on its way: read once from the client, sent to each attempt and to mirrors.

The first bytes are kept so that an attempt can be repeated; past the bound they are let go and the
request cannot be repeated any more. Mirrors get copies through bounded queues: one that does not
keep up is cut off and never slows the request.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

from l7proxy.message import Headers
from l7proxy.streams import ServerStream, StreamReset
from l7proxy.tasks import spawn

_KEEP_BYTES = 64 * 1024
_MIRROR_BYTES = 256 * 1024


class ClientGone(Exception):
    """The client went away in mid-message; there is nobody to answer."""


class MirrorFeed:
    """The copy of a body for one mirror: chunks, then b""; None instead once it is cut off."""

    def __init__(self) -> None:
        self._chunks: deque[bytes | None] = deque()
        self._size = 0
        self._more = asyncio.Event()
        self.trailers: Headers = []

    def put(self, chunk: bytes | None) -> None:
        if self._chunks and self._chunks[-1] is None:
            return
        self._size += len(chunk or b"")
        self._chunks.append(chunk if self._size <= _MIRROR_BYTES else None)
        self._more.set()

    async def get(self) -> bytes | None:
        while not self._chunks:
            self._more.clear()
            await self._more.wait()
        chunk = self._chunks[0]
        if chunk is not None:
            self._chunks.popleft()
            self._size -= len(chunk)
        return chunk


class RequestBody:
    """Reads a stream's body on behalf of one attempt at a time; `whole`: it has been read, or it is
    none of the proxy's any more (b"")."""

    def __init__(self, stream: ServerStream, whole: bytes | None = None) -> None:
        self._stream = stream
        self._length = stream.head.body if isinstance(stream.head.body, int) else None
        self._kept = [whole] if whole else []
        self._kept_size = self.received = len(whole or b"")
        self._whole = whole is not None
        self._feeds: list[MirrorFeed] = []
        self._reading: asyncio.Task[None] | None = None
        self.repeatable = True

    def feed(self) -> MirrorFeed:
        """A copy of the body for a mirror; only before the first attempt."""
        feed = MirrorFeed()
        self._feeds.append(feed)
        return feed

    def attempt(self) -> BodyAttempt:
        """The body from its first byte. Only while `repeatable`, and not beside another attempt."""
        return BodyAttempt(self)

    @property
    def trailers(self) -> Headers:
        """Valid once the body has come whole; one of known length has none (RFC 9112 §6.5)."""
        return self._stream.trailers if self._length is None else []

    async def _more(self) -> bytes:
        """The next bytes from the client, b"" at the end; kept and copied as they pass."""
        if self._whole:
            return b""
        try:
            chunk = await self._stream.read()
        except StreamReset as error:
            raise ClientGone(str(error)) from error
        self.received += len(chunk)
        if chunk and self.repeatable:
            self._kept_size += len(chunk)
            if self._kept_size > _KEEP_BYTES:
                self.repeatable = False
                self._kept.clear()
            else:
                self._kept.append(chunk)
        if chunk:
            for feed in self._feeds:
                feed.put(chunk)
        if not chunk or self.received == self._length:
            # Known here and now: the backend's answer may come before the end is asked for.
            self._whole = True
            for feed in self._feeds:
                feed.trailers = self.trailers
                feed.put(b"")
        return chunk

    async def tunnelled(self) -> bytes:
        """The client's next bytes in a tunnel (after a 101), b"" when it has ended its side."""
        try:
            chunk = await self._stream.read()
        except StreamReset as error:
            raise ClientGone(str(error)) from error
        self.received += len(chunk)
        return chunk

    def pump(self, reading: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run what reads this body beside the caller. One at a time: cancel it before the next."""
        self._reading = spawn(reading, name=name)
        return self._reading

    async def close(self) -> None:
        """No more will be read. Returns when nobody waits for the client's bytes any more, so that
        the connection can go on; mirrors that still wait are cut off."""
        if self._reading is not None and not self._reading.done():
            self._reading.cancel()
            await asyncio.wait((self._reading,))
        if not self._whole:
            for feed in self._feeds:
                feed.put(None)


class BodyAttempt:
    """One pass over a body: what was kept, then what still comes."""

    def __init__(self, body: RequestBody) -> None:
        self._body = body
        self._position = 0

    async def read(self) -> bytes:
        kept = self._body._kept
        if self._position < len(kept):
            chunk = kept[self._position]
            self._position += 1
            return chunk
        chunk = await self._body._more()
        if chunk:
            self._position += 1
        return chunk
