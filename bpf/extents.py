"""Which parts of the slots are taken: a buddy allocator of power-of-two blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Extent(NamedTuple):
    """`size` slots from `offset`; the block it lies in is `size` rounded up to a power of two."""

    offset: int
    size: int

    @property
    def block(self) -> int:
        return 1 << (self.size - 1).bit_length()


class Extents:
    """Free and taken blocks of a range of `total` (a power of two) slots."""

    def __init__(self, total: int, taken: Iterable[Extent] = ()) -> None:
        """`taken` blocks do not overlap."""
        self._total = total
        # By block size: free offsets, the longest free first.
        self._free: dict[int, dict[int, None]] = {1 << n: {} for n in range(total.bit_length())}
        self._add_free(0, total, sorted(taken))

    def _add_free(self, offset: int, block: int, taken: list[Extent]) -> None:
        if not taken:
            self._free[block][offset] = None
        elif taken[0].block < block:
            half = block // 2
            middle = offset + half
            self._add_free(offset, half, [extent for extent in taken if extent.offset < middle])
            self._add_free(middle, half, [extent for extent in taken if extent.offset >= middle])

    def take(self, size: int) -> Extent | None:
        """Room for `size` slots; None: there is none."""
        block = Extent(0, size).block
        found = next((b for b, free in self._free.items() if b >= block and free), None)
        if found is None:
            return None
        offset = next(iter(self._free[found]))
        del self._free[found][offset]
        while found > block:
            found //= 2
            self._free[found][offset + found] = None
        return Extent(offset, size)

    def release(self, extent: Extent) -> None:
        """Gives back what `take` gave."""
        offset, block = extent.offset, extent.block
        while block < self._total and offset ^ block in self._free[block]:
            del self._free[block][offset ^ block]
            offset &= ~block
            block *= 2
        self._free[block][offset] = None
