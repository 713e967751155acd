"""The tables by which the kernel judges requests, in their maps (bpf/programs/judge.h).

Tables stand one after another in arenas, and never change: a destination whose rules have changed
gets a new table under a new generation, and is switched to it by one update of `automata`, at once
for all connections. What reads an old one meanwhile is not disturbed: the kernel frees an arena
once nobody reads it. Knows bytes and generations, nothing of rules; needs pins and bpf(2).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from bpf import constants, layout, syscall
from bpf.maps import INNER, open_pinned
from bpf.structs import AutomatonPlace, Number

_ARENAS = "automaton_arenas"
_WORD = 4
# In words: a table may begin below this, and be no longer.
_BEGIN = 1 << 19


class Full(Exception):
    """There is no room for another table."""


class _Arena:
    """One that this process has made. `used`: in words."""

    def __init__(self) -> None:
        self.fd = syscall.create_map("automaton_arena", INNER[_ARENAS])
        self.memory = mmap.mmap(self.fd, constants.AUTOMATON_ARENA)
        self.used = 0

    def append(self, table: bytes) -> int:
        """Where it begins."""
        at = self.used
        self.memory[at * _WORD : at * _WORD + len(table)] = table
        self.used = at + -(-len(table) // (2 * _WORD)) * 2
        return at

    def close(self) -> None:
        self.memory.close()
        os.close(self.fd)


class Automata:
    """The tables in force. One process at a time writes them; one that comes after another finds
    what that one has left. Every method: OSError as bpf(2) has it."""

    def __init__(self, directory: Path) -> None:
        """DatapathError: the maps are not there. Tables of a process before stay in force, in
        arenas that get no others."""
        self._places = open_pinned(directory, "automata")
        self._arenas = open_pinned(directory, _ARENAS)
        self._own: dict[int, _Arena] = {}
        self._filling: int | None = None

    def close(self) -> None:
        for arena in self._own.values():
            arena.close()
        os.close(self._places)
        os.close(self._arenas)

    def generations(self) -> set[int]:
        """Those in force."""
        return {generation for generation, _ in self._entries()}

    def put(self, generation: int, table: bytes) -> None:
        """Put a table in force, unless it is already. Full."""
        key = layout.U64.pack(Number(generation))
        if syscall.lookup(self._places, key, layout.AUTOMATON_PLACE.size) is not None:
            return
        if self._filling is None or self._own[self._filling].used >= _BEGIN:
            self._filling = self._add_arena()
        word = self._own[self._filling].append(table)
        place = layout.AUTOMATON_PLACE.pack(AutomatonPlace(self._filling, word))
        syscall.update(self._places, key, place)

    def remove(self, generation: int) -> None:
        """What names it is the proxy's from now on. Arenas without tables are let go."""
        if not syscall.delete(self._places, layout.U64.pack(Number(generation))):
            return
        used = {place.arena for _, place in self._entries()} | {self._filling}
        for index in self._indices():
            if index not in used:
                syscall.delete(self._arenas, layout.U32.pack(Number(index)))
                if (arena := self._own.pop(index, None)) is not None:
                    arena.close()

    def _add_arena(self) -> int:
        taken = set(self._indices())
        free = next((one for one in range(constants.AUTOMATON_ARENAS) if one not in taken), None)
        if free is None:
            raise Full(f"all {constants.AUTOMATON_ARENAS} arenas have tables in them")
        arena = _Arena()
        syscall.update(
            self._arenas, layout.U32.pack(Number(free)), layout.U32.pack(Number(arena.fd))
        )
        self._own[free] = arena
        return free

    def _indices(self) -> Iterator[int]:
        """The arenas that there are."""
        for index in range(constants.AUTOMATON_ARENAS):
            if syscall.lookup(self._arenas, layout.U32.pack(Number(index)), layout.U32.size):
                yield index

    def _entries(self) -> Iterator[tuple[int, AutomatonPlace]]:
        sizes = layout.U64.size, layout.AUTOMATON_PLACE.size
        for key, value in syscall.entries(self._places, *sizes):
            place = layout.AUTOMATON_PLACE.unpack(AutomatonPlace, value)
            yield layout.U64.unpack(Number, key).value, place
