"""TLS over a transport: ends of halves, truncation, pieces of any size, what refused peers hear."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from loops import on_both_loops
from rekeyer import Rekeyer

from certs.selfsigned import Authority
from l7proxy.tls import load_certificate
from l7proxy.tls_stream import TLSStream
from mesh.model.nodeconfig import CertificateSection

AUTHORITY = Authority.create("test root")


def context(*, server: bool) -> ssl.SSLContext:
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    found.minimum_version = ssl.TLSVersion.TLSv1_3
    found.load_verify_locations(cadata=AUTHORITY.certificate_pem)
    if server:
        found.num_tickets = 0
        load_certificate(found, CertificateSection(*AUTHORITY.issue(dns=["a.test"])), "test")
    return found


SERVER, CLIENT = context(server=True), context(server=False)


class Heard(asyncio.Protocol):
    """What a protocol above is told."""

    def __init__(self) -> None:
        self.data = b""
        self.events: list[object] = []
        self.changed = asyncio.Event()
        self.paused = asyncio.Event()

    def pause_writing(self) -> None:
        self.paused.set()

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.changed.set()

    def eof_received(self) -> bool:
        self.events.append("end")
        self.changed.set()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.events.append(type(exc))
        self.changed.set()

    async def until(self, size: int, *events: object) -> None:
        while len(self.data) < size or self.events != list(events):
            self.changed.clear()
            await self.changed.wait()


@asynccontextmanager
async def pair(
    client: ssl.SSLContext = CLIENT,
) -> AsyncIterator[tuple[TLSStream, TLSStream, Heard, Heard]]:
    """Client, server and who is above them, before the handshake."""
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    one = TLSStream(client, server_hostname="a.test")
    other = TLSStream(SERVER, server_side=True)
    await loop.create_connection(lambda: one, sock=ours)
    await loop.create_connection(lambda: other, sock=theirs)
    heard = Heard(), Heard()
    try:
        yield one, other, *heard
    finally:
        one.abort()
        other.abort()
        while not (one.lost and other.lost):
            await asyncio.sleep(0)


@on_both_loops
async def test_one_half_ends_and_the_other_goes_on():
    async with pair() as (one, other, here, there):
        await asyncio.gather(one.handshake(), other.handshake())
        one.set_protocol(here)
        other.set_protocol(there)
        one.write(b"question")
        one.half_close()
        one.write(b"too late")
        await there.until(8, "end")
        data = random.Random(1).randbytes(1 << 20)
        for start in range(0, len(data), 100_001):
            other.write(data[start : start + 100_001])
        await here.until(len(data))
        assert here.data == data
        other.close()
        await here.until(len(data), "end")
        assert there.data == b"question"
        one.close()
        await here.until(len(data), "end", type(None))


@on_both_loops
async def test_an_end_without_close_notify_is_a_reset():
    async with pair() as (one, other, here, there):
        await asyncio.gather(one.handshake(), other.handshake())
        one.set_protocol(here)
        other.set_protocol(there)
        one.write(b"half a quest")
        await there.until(12)
        one.abort()
        await there.until(12, ConnectionResetError)


@on_both_loops
async def test_what_comes_before_there_is_a_protocol_is_kept():
    async with pair() as (one, other, here, _):
        await asyncio.gather(one.handshake(), other.handshake())
        other.writelines([b"abc", b"", b"def" * 100_000])
        other.half_close()
        assert await one.read_exactly(3) == b"abc"
        one.set_protocol(here)
        await here.until(300_000, "end")
        assert here.data == b"def" * 100_000


@on_both_loops
async def test_who_ends_before_the_first_bytes_has_not_said_them():
    async with pair() as (one, other, _, _):
        await asyncio.gather(one.handshake(), other.handshake())
        other.write(b"a")
        other.half_close()
        with pytest.raises(ConnectionResetError):
            await one.read_exactly(2)


@on_both_loops
async def test_records_in_pieces_of_any_size():
    """Byte by byte, and several records at once."""
    async with pair() as (one, other, here, _):
        await asyncio.gather(one.handshake(), other.handshake())
        one.set_protocol(here)
        chance = random.Random(1)
        sent = b""
        wire: list[bytes] = []
        below, other._below = other._below, Wire(wire)  # type: ignore[assignment]
        for size in (1, 2, 100, 16384, 16385, 50_000):
            data = chance.randbytes(size)
            sent += data
            other.write(data)
        other.half_close()
        stream = b"".join(wire)
        for start in range(400):
            one.data_received(stream[start : start + 1])
        position = 400
        while position < len(stream):
            step = chance.choice((1, 5, 6, 1000, 40_000))
            one.data_received(stream[position : position + step])
            position += step
        assert (here.data, here.events) == (sent, ["end"])
        one.data_received(b"what comes after the end is nothing")
        assert (here.data, here.events) == (sent, ["end"])
        other._below = below


class Wire:
    """A transport that keeps what it is given."""

    def __init__(self, wire: list[bytes]) -> None:
        self._wire = wire

    def write(self, data: bytes) -> None:
        self._wire.append(data)

    def is_closing(self) -> bool:
        return False


@on_both_loops
async def test_a_changed_byte_ends_it():
    async with pair() as (one, other, here, _):
        await asyncio.gather(one.handshake(), other.handshake())
        one.set_protocol(here)
        one.data_received(b"\x17\x03\x03\x00\x20" + bytes(32))
        await here.until(0, ssl.SSLError)


@on_both_loops
async def test_who_is_refused_hears_why():
    """asyncio's own TLS closes without an alert."""
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    async with pair(stranger) as (one, other, _, _):
        results = await asyncio.gather(
            one.handshake(), other.read_exactly(1), return_exceptions=True
        )
        assert isinstance(results[0], ssl.SSLCertVerificationError)
        assert isinstance(results[1], ssl.SSLError)
        assert "UNKNOWN_CA" in str(results[1])


@on_both_loops
async def test_who_asks_for_new_keys_and_reads_no_answers_is_cut_off(tmp_path):
    client = context(server=False)
    client.keylog_filename = str(tmp_path / "keys")
    async with pair(client) as (one, other, here, there):
        await asyncio.gather(one.handshake(), other.handshake())
        one.set_protocol(here)
        other.set_protocol(there)
        rekeyer = Rekeyer(tmp_path / "keys")
        # As often as it likes while it reads.
        for size in range(1, 200, 20):
            one._lower.write(rekeyer.key_updates(20) + rekeyer.data(b"x"))
            await there.until(size // 20 + 1)
        one.pause_reading()
        other.write(b"x" * (1 << 20))
        await there.paused.wait()
        one._lower.write(rekeyer.key_updates(32) + rekeyer.data(b"x"))
        await there.until(11)
        one._lower.write(rekeyer.key_updates(2))  # OpenSSL answers when the next one comes
        await there.until(11, ssl.SSLError)
