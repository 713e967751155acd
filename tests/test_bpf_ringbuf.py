"""The ring buffer's consumer, against a real program that fills one, and records half written."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
from array import array
from pathlib import Path

import pytest
from bpf_world import needs_bpf, pin_directory

from bpf import events, layout, pins, syscall
from bpf.events import SocketEvent
from bpf.reasons import Reason
from bpf.ringbuf import RingBuffer
from bpf.structs import Target

SIZE = 4096
SCHED_CLS = 3
ANY = 1 << 20
HEADER = 8


class Producer:
    """The program and the descriptor of its ring buffer."""

    def __init__(self, program: int, ring: int) -> None:
        self.program = program
        self.ring = ring
        self._next = 0

    def emit(self, count: int, words: int = 1, *, discard: bool = False) -> int:
        """Writes records; how many had no place."""
        order = struct.pack("=4I48x", count, words, self._next, discard)
        self._next += count
        lost = syscall.run(self.program, order)
        assert lost >= 0
        return lost

    def consumer(self) -> RingBuffer:
        return RingBuffer(os.dup(self.ring), SIZE)


@pytest.fixture(scope="module")
def module():
    from bpf.compiler import Module

    return Module(Path(__file__).with_name("bpf_ringbuf.c"))


@pytest.fixture
def producer(module, tmp_path):
    """With an empty ring buffer, reached by a pin."""
    template = module.map_fd("records")
    program = syscall.load_program(
        "emit",
        SCHED_CLS,
        0,
        module.program("emit", {template: "events"}).instructions({"events": template}),
        "GPL",
    )
    with pin_directory(tmp_path) as directory:
        pins.prepare(directory)
        path = str(pins.map_path(directory, "records"))
        syscall.pin(template, path)
        pinned = syscall.pinned(path)
        left = RingBuffer(os.dup(pinned), SIZE)
        left.read(ANY)
        left.close()
        yield Producer(program, pinned)
        os.close(pinned)
    os.close(program)


def numbers(records: list[bytes]) -> list[int]:
    """Each record's number; all words of a record are the same."""
    found = []
    for record in records:
        words = array("I", record)
        assert len(set(words)) == 1
        found.append(words[0])
    return found


@needs_bpf
def test_records_come_in_order_and_once(producer):
    ring = producer.consumer()
    assert ring.read(ANY) == []
    producer.emit(3, words=2)
    records = ring.read(ANY)
    assert [len(record) for record in records] == [8, 8, 8]
    assert numbers(records) == [0, 1, 2]
    assert ring.read(ANY) == []
    producer.emit(5)
    assert numbers(ring.read(2)) == [3, 4]
    assert numbers(ring.read(ANY)) == [5, 6, 7]
    ring.close()


@needs_bpf
@pytest.mark.parametrize("words", [1, 2, 3, 20, 57, 64])
def test_records_run_over_the_end_of_the_buffer(producer, words):
    """Several times round, with lengths that are padded and such that do not divide the buffer."""
    ring = producer.consumer()
    at_once = SIZE // (HEADER + 8 * 64) or 1
    seen = 0
    for _ in range(5 * SIZE // (at_once * (HEADER + 4 * words))):
        assert producer.emit(at_once, words) == 0
        records = ring.read(ANY)
        assert {len(record) for record in records} == {4 * words}
        assert numbers(records) == list(range(seen, seen + at_once))
        seen += at_once
    ring.close()


@needs_bpf
def test_a_full_buffer_loses_the_newest_and_reading_makes_room(producer):
    ring = producer.consumer()
    lost = sum(producer.emit(64, words=64) for _ in range(2))
    kept = 128 - lost
    assert kept == (SIZE - 1) // (HEADER + 256)
    assert numbers(ring.read(1)) == [0]
    assert producer.emit(1, words=64) == 0
    assert numbers(ring.read(ANY)) == [*range(1, kept), 128]
    ring.close()


@needs_bpf
def test_discarded_records_are_skipped(producer):
    ring = producer.consumer()
    producer.emit(1)
    producer.emit(4, discard=True)
    producer.emit(1)
    assert numbers(ring.read(ANY)) == [0, 5]
    ring.close()


@needs_bpf
def test_the_next_consumer_goes_on_where_the_last_stopped(producer):
    first = producer.consumer()
    producer.emit(6)
    assert numbers(first.read(4)) == [0, 1, 2, 3]
    first.close()
    second = producer.consumer()
    assert numbers(second.read(ANY)) == [4, 5]
    second.close()


@needs_bpf
def test_asyncio_waits_for_records(producer):
    async def consume() -> list[int]:
        ring, found, done = producer.consumer(), [], asyncio.Event()

        def readable() -> None:
            found.extend(numbers(ring.read(3)))
            if len(found) == 500:
                done.set()

        loop = asyncio.get_running_loop()
        loop.add_reader(ring.fileno(), readable)
        async with asyncio.timeout(30):
            for _ in range(50):
                assert await asyncio.to_thread(producer.emit, 10) == 0
                # The next ten come when these have been taken, or while they are.
                if found and found[-1] % 2:
                    await asyncio.sleep(0)
            await done.wait()
        loop.remove_reader(ring.fileno())
        ring.close()
        return found

    assert asyncio.run(consume()) == list(range(500))


def test_a_record_that_is_being_written_is_waited_for():
    """No program can be stopped in the middle of a record: the memory is laid out by hand."""
    page = mmap.PAGESIZE
    fd = os.memfd_create("ring")
    os.ftruncate(fd, 2 * page + 2 * SIZE)
    memory = mmap.mmap(fd, 2 * page + 2 * SIZE)

    def record(at: int, header: int, text: bytes) -> None:
        memory[2 * page + at : 2 * page + at + 16] = struct.pack("=II8s", header, 0, text)

    busy = 1 << 31
    record(0, 5, b"first")
    record(16, 6 | busy, b"halfwa")
    record(32, 5, b"third")
    memory[page : page + 8] = struct.pack("=Q", 48)
    ring = RingBuffer(fd, SIZE)
    assert ring.read(ANY) == [b"first"]
    assert ring.read(ANY) == []
    record(16, 6, b"second")
    assert ring.read(ANY) == [b"second", b"third"]
    assert memory[:8] == struct.pack("=Q", 48)
    ring.close()
    memory.close()


def test_events():
    source, asked, peer = (
        Target.of(address, port, "TCP")
        for address, port in (("10.244.0.5", 0), ("10.96.0.10", 80), ("10.244.1.6", 8080))
    )
    packed = (layout.TARGET.pack(one) for one in (source, asked, peer))
    record = layout.EVENT.format.pack(17, 4711, *packed, Reason.BALANCED, 3)
    assert events.decode(record) == SocketEvent(17, 4711, source, asked, peer, Reason.BALANCED, 3)
    assert asked.protocol == socket.IPPROTO_TCP
    with pytest.raises(ValueError, match="87 bytes"):
        events.decode(record[:-1])
    with pytest.raises(ValueError, match="reason 2147483647"):
        events.decode(record[:76] + b"\xff\xff\xff\x7f" + record[80:])
