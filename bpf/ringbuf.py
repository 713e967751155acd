"""A consumer of a BPF ring buffer, without libbpf. Knows records as bytes, not what is in them.

How the memory is laid out and shared (kernel: Documentation/bpf/ringbuf.rst, kernel/bpf/ringbuf.c):
a page with the consumer's position, which user space writes; a page with the producer's, which it
may only read; then the data, mapped twice in a row, so that a record that runs over the end of the
buffer still lies in one piece. Positions are bytes since the beginning and never wrap. A record is
a header of 8 bytes (its length and two flags) and its bytes, padded to 8.

Order of memory accesses: the kernel marks a record BUSY, moves its position past it, fills it in
and takes the mark away, each step a release. We read position, header, record in this order, and
move our position past a record only when we have read it. x86 keeps such an order by itself;
elsewhere `_fence` does. A wake-up is not lost, although the kernel wakes only a consumer that has
caught up: epoll asks it again each time, if it is level-triggered (asyncio's add_reader is).
"""

from __future__ import annotations

import mmap
import os
import threading

_PAGE = mmap.PAGESIZE
_BUSY = 1 << 31  # still being written
_DISCARDED = 1 << 30
_LENGTH = _DISCARDED - 1
_HEADER = 8


class RingBuffer:
    """The one consumer of a ring buffer. What it has read is free for the kernel to use again; a
    consumer that comes later goes on where it stopped."""

    def __init__(self, fd: int, size: int) -> None:
        """`fd`: the map's, the instance's from now on; `size`: its max_entries, in bytes."""
        self._fd = fd
        self._size = size
        self._consumer = mmap.mmap(fd, _PAGE)
        self._producer = mmap.mmap(fd, _PAGE + 2 * size, prot=mmap.PROT_READ, offset=_PAGE)
        self._taken = memoryview(self._consumer)[:8].cast("Q")
        self._written = memoryview(self._producer)[:8].cast("Q")
        self._headers = memoryview(self._producer)[_PAGE:].cast("I")
        self._lock = threading.Lock()
        self._lock.acquire()

    def fileno(self) -> int:
        """Readable while there are records."""
        return self._fd

    def close(self) -> None:
        for view in (self._taken, self._written, self._headers):
            view.release()
        self._consumer.close()
        self._producer.close()
        os.close(self._fd)

    def read(self, limit: int) -> list[bytes]:
        """Up to `limit` records, oldest first; fewer: there are no more now."""
        position, end = self._taken[0], self._written[0]
        self._fence()
        places: list[tuple[int, int]] = []
        while position < end and len(places) < limit:
            at = position % self._size
            header = self._headers[at // 4]
            if header & _BUSY:
                break
            length = header & _LENGTH
            if not header & _DISCARDED:
                places.append((_PAGE + at + _HEADER, length))
            position += _HEADER + (length + 7 & ~7)
        self._fence()
        records = [self._producer[start : start + length] for start, length in places]
        self._fence()
        self._taken[0] = position
        return records

    def _fence(self) -> None:
        """What is read before stays before what is read or written after: giving a lock back is a
        release, taking it again an acquire."""
        self._lock.release()
        self._lock.acquire()
