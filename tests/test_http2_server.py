"""Http2Server against the h2 library as a raw client, over real sockets."""

from __future__ import annotations

import asyncio

import h2.events
import pytest
from h2.errors import ErrorCodes
from tests.http2_peer import GET, POST, RawPeer, ServerUnderTest, echo

from l7proxy.message import Framing, ProtocolError, ResponseHead
from l7proxy.streams import ConnectionInfo, ServerStream, StreamReset
from mesh.model.nodeconfig import Settings


async def test_get_and_echo() -> None:
    async with ServerUnderTest() as server:
        peer = await server.peer()
        first = peer.request()
        second = peer.request(POST, b"hello")
        status, fields, body = await peer.response(first)
        assert (status, fields[b"x-path"], body) == (200, b"/", b"")
        assert b"date" in fields
        status, fields, body = await peer.response(second)
        assert (status, fields[b"content-length"], body) == (200, b"5", b"hello")
        assert server.refused == []
