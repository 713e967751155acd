"""A client that keeps one connection and sends GET after GET on it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import NamedTuple


class Answer(NamedTuple):
    """Header names are lower case; the body has been read and left."""

    status: int
    headers: dict[str, str]


class KeptConnection:
    """One HTTP/1.1 connection. A response that ends it is an error of the next `get`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def open(cls, address: str, port: int) -> KeptConnection:
        return cls(*await asyncio.open_connection(address, port))

    async def get(self, path: str, host: str) -> Answer:
        """ConnectionError, IncompleteReadError: there was no whole response."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")[:-2]
        fields = (line.partition(":") for line in lines)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        await self._reader.readexactly(int(headers["content-length"]))
        return Answer(int(first.split()[1]), headers)

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
