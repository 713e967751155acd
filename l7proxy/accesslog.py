"""The access log: one line a request on standard output.

A reader that does not read must never stop the proxy, so lines of bounded length gather in a
bounded list that a thread writes out; what does not fit is lost and counted. All workers share one
output: lines go out in pieces that a pipe takes whole (PIPE_BUF, pipe(7)), so that they do not mix.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import select
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import msgspec

from l7proxy import metrics
from mesh.model.flow import Encryption

_MAX_LINES = 10_000
_FLUSH_S = 0.1
_CLOSE_S = 1.0
_ATOMIC = select.PIPE_BUF - 1  # a torn line is ended before the next piece
# What clients choose freely is cut so that every line is an atomic one, in characters.
_MAX_TEXT = 1000
MAX_NAME = 255


def cut(text: bytes, limit: int = _MAX_TEXT) -> str:
    """Bytes of a client's as text, no longer than a log line bears."""
    if len(text) <= limit:
        return text.decode("latin-1")
    return text[:limit].decode("latin-1") + "…"


@lru_cache(maxsize=16)
def protocol(version: bytes) -> str:
    """ "HTTP/1.1" of b"1.1"."""
    return "HTTP/" + version.decode("latin-1")


class AccessLogEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of an answered request. Times in milliseconds, sizes in body bytes.

    `encryption` and the identities are of the connection to the endpoint: who both ends have proved
    to be, the client on whose behalf it was made. `reason` says why the proxy answered itself, or
    how the exchange broke off; "" for neither.
    """

    time: str
    client: str
    method: str
    host: str
    path: str
    protocol: str
    status: int
    duration_ms: float
    bytes_in: int
    bytes_out: int
    request_id: str
    gateway: str = ""
    listener: str = ""
    route: str = ""
    rule: str = ""
    backend: str = ""
    endpoint: str = ""
    encryption: Encryption = "none"
    client_identity: str = ""
    endpoint_identity: str = ""
    attempts: int = 0
    user_agent: str = ""
    reason: str = ""
    detail: str = ""


def as_text(entry: AccessLogEntry) -> bytes:
    """The entry as a line for people; quoting keeps whatever a client sent on one line."""
    line = (
        f"{entry.time} {entry.client} {entry.method} {entry.host}{entry.path} {entry.protocol} "
        f"{entry.status} {entry.duration_ms:.1f}ms {entry.bytes_in}/{entry.bytes_out}B "
        f"route={entry.route or '-'} backend={entry.backend or '-'} "
        f"endpoint={entry.endpoint or '-'} id={entry.request_id}"
        + (f" reason={entry.reason}: {entry.detail}" if entry.reason else "")
    )
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line).encode() + b"\n"


class AccessLog:
    """Writes entries to the descriptor `fd` in the format of the settings."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self.format: Literal["json", "text", "off"] = "json"
        self._loop = loop
        self._fd = fd
        self._lines: list[bytes] = []
        self._writing = False
        self._torn = False
        self._encoder = msgspec.json.Encoder()
        self._batches: queue.SimpleQueue[list[bytes] | None] = queue.SimpleQueue()
        # A daemon: while the reader does not read, it must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
        self._thread.start()

    @property
    def wanted(self) -> bool:
        return self.format != "off"

    def write(self, entry: AccessLogEntry) -> None:
        if len(self._lines) >= _MAX_LINES:
            metrics.LOG_LOST.inc()
            return
        if self.format == "json":
            self._lines.append(self._encoder.encode(entry) + b"\n")
        else:
            self._lines.append(as_text(entry))
        if not self._writing:
            self._writing = True
            self._loop.call_later(_FLUSH_S, self._flush)

    def _flush(self) -> None:
        lines, self._lines = self._lines, []
        self._batches.put(lines)

    def _flushed(self) -> None:
        if self._lines:
            self._loop.call_later(_FLUSH_S, self._flush)
        else:
            self._writing = False

    def close(self) -> None:
        """Write what is left, as far as the reader takes it within a moment. The last call."""
        self._batches.put(self._lines)
        self._batches.put(None)
        self._thread.join(_CLOSE_S)

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        while (lines := self._batches.get()) is not None:
            for piece in _pieces(lines):
                self._write_out(piece)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._flushed)

    def _write_out(self, data: bytes) -> None:
        if self._torn:
            data = b"\n" + data
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:  # another process has made the pipe or terminal so
                select.select((), (self._fd,), ())
            except OSError:
                metrics.LOG_LOST.inc(bytes(view).count(b"\n"))
                self._torn = len(view) < len(data)
                return
        self._torn = False


def _pieces(lines: list[bytes]) -> Iterator[bytes]:
    """Whole lines, of at most _ATOMIC bytes together."""
    start = size = 0
    for end, line in enumerate(lines):
        if size + len(line) > _ATOMIC and end > start:
            yield b"".join(lines[start:end])
            start, size = end, 0
        size += len(line)
    if start < len(lines):
        yield b"".join(lines[start:])
