"""The access log: one line a request on standard output.

A reader that does not read must never stop the proxy, so lines gather in a bounded list that one
thread at a time writes out; what does not fit is lost and counted.
"""

from __future__ import annotations

import asyncio
import os
from typing import Literal

import msgspec

from l7proxy import metrics

_MAX_LINES = 20_000
_FLUSH_S = 0.1


class AccessLogEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of an answered request. Times in milliseconds, sizes in body bytes.

    `reason` says why the proxy answered itself, or how the exchange broke off; "" for neither.
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

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int = 1) -> None:
        self.format: Literal["json", "text", "off"] = "json"
        self._loop = loop
        self._fd = fd
        self._lines: list[bytes] = []
        self._writing = False
        self._encoder = msgspec.json.Encoder()

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
        done = self._loop.run_in_executor(None, self._write_out, b"".join(lines))
        done.add_done_callback(self._flushed)

    def _write_out(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except OSError:
                metrics.LOG_LOST.inc(bytes(view).count(b"\n"))
                return

    def _flushed(self, _done: asyncio.Future[None]) -> None:
        if self._lines:
            self._loop.call_later(_FLUSH_S, self._flush)
        else:
            self._writing = False

    def close(self) -> None:
        """Write what is left; waits for the reader, so only at the very end."""
        self._write_out(b"".join(self._lines))
        self._lines = []
