"""Maglev tables with weights: which backend each slot of a frontend's table names.

After "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016), section 3.4: each
backend fills slots in an order of its own, so a backend that comes or goes moves few of the others'
slots. Weights as Envoy's: a backend of half the weight takes every second turn. Pure computation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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


def table(backends: Sequence[tuple[bytes, int]], size: int) -> list[int]:
    """A table of `size` (a prime, not less than there are backends) slots, each a position in
    `backends`: distinct names with positive weights. The same for any order of the backends, but
    for the positions."""
    turns = sorted(range(len(backends)), key=lambda position: backends[position][0])
    heaviest = max(weight for _, weight in backends)
    weights = [weight for _, weight in backends]
    at, step = [], []
    for name, _ in backends:
        digest = hashlib.blake2b(name, digest_size=16).digest()
        at.append(int.from_bytes(digest[:8], "big") % size)
        step.append(int.from_bytes(digest[8:], "big") % (size - 1) + 1)
    slots = [-1] * size
    # What each has saved for a turn, which costs the heaviest's weight. All can pay for their
    # first, so none is left out.
    saved = [heaviest - weight for weight in weights]
    left = size
    while True:
        for position in turns:
            saved[position] += weights[position]
            if saved[position] < heaviest:
                continue
            saved[position] -= heaviest
            slot = at[position]
            while slots[slot] >= 0:
                slot = (slot + step[position]) % size
            slots[slot] = position
            at[position] = (slot + step[position]) % size
            left -= 1
            if not left:
                return slots
