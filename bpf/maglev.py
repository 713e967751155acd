"""Maglev tables with weights: which backend each slot of a frontend's table names.

After "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016), section 3.4: each
backend fills slots in an order of its own, so a backend that comes or goes moves few of the others'
slots. A backend of half the weight takes every second turn. Pure computation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

# Primes just below powers of two: any step visits every slot, and a table fills its block.
SIZES = (251, 1021, 4093, 16381, 65521)
# Slots per backend (the largest share is 2 % over the smallest), and for the lightest backend.
_SLOTS_PER_BACKEND = 50
_SLOTS_FOR_LIGHTEST = 10
# Extreme weights do not get the largest tables: they would take the room of many frontends.
_MOST_FOR_WEIGHTS = 16381


def size_for(weights: Sequence[int]) -> int:
    """The size of the table for backends of these weights, all positive."""
    for_weights = _SLOTS_FOR_LIGHTEST * sum(weights) // min(weights)
    wanted = max(_SLOTS_PER_BACKEND * len(weights), min(for_weights, _MOST_FOR_WEIGHTS))
    return next((size for size in SIZES if size >= wanted), SIZES[-1])


def shares(weights: Sequence[int], size: int) -> list[int]:
    """How many slots each of the positive weights has: less than one from its exact share, but one
    at least. Of equal remainders the first is rounded up."""
    total = sum(weights)
    slots = [max(1, size * weight // total) for weight in weights]
    by_lack = sorted(range(len(weights)), key=lambda at: slots[at] * total - size * weights[at])
    left = size - sum(slots)
    for at in by_lack[: max(left, 0)]:
        slots[at] += 1
    # What the lightest were given beyond their shares is taken from the heaviest.
    for _ in range(-left):
        slots[slots.index(max(slots))] -= 1
    return slots


def table(backends: Sequence[tuple[bytes, int]], size: int) -> list[int]:
    """A table of `size` (a prime, not less than there are backends) slots, each a position in
    `backends`: distinct names in order, with positive weights."""
    turns = shares([weight for _, weight in backends], size)
    at, step = [], []
    for name, _ in backends:
        digest = hashlib.blake2b(name, digest_size=16).digest()
        at.append(int.from_bytes(digest[:8], "big") % size)
        step.append(int.from_bytes(digest[8:], "big") % (size - 1) + 1)
    slots = [-1] * size
    # A turn costs as many rounds' savings as make the largest share: who has it, has one a round.
    most = max(turns)
    saved = [0] * len(backends)
    for _ in range(most):
        for position, turn in enumerate(turns):
            saved[position] += turn
            if saved[position] < most:
                continue
            saved[position] -= most
            slot = at[position]
            while slots[slot] >= 0:
                slot = (slot + step[position]) % size
            slots[slot] = position
            at[position] = (slot + step[position]) % size
    return slots


def ring(table: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Each slot's position and the slot of another: followed from any, those lead through all
    positions of the table and back. Who is after whom is as random as the table."""
    first = {position: at for at, position in reversed([*enumerate(table)])}
    order = sorted(first, key=first.__getitem__)
    after = dict(zip(order, (first[one] for one in (*order[1:], order[0])), strict=True))
    for position in table:
        yield position, after[position]
