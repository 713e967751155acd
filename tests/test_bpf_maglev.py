"""Maglev tables and the room they are kept in."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpf import maglev
from bpf.extents import Extent, Extents


def names(count: int) -> list[bytes]:
    return [f"10.0.0.{number}:80".encode() for number in range(count)]


def found_shares(weights: list[int], size: int) -> list[int]:
    backends = list(zip(names(len(weights)), weights, strict=True))
    counts = Counter(maglev.table(backends, size))
    assert sum(counts.values()) == size
    return [counts[position] for position in range(len(weights))]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20, 81])
def test_equal_weights_have_equal_shares(count):
    found = found_shares([1] * count, maglev.size_for([1] * count))
    assert max(found) - min(found) <= 1


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=12))
def test_shares_follow_weights(weights):
    size = maglev.size_for(weights)
    for weight, found in zip(weights, found_shares(weights, size), strict=True):
        assert abs(found - size * weight / sum(weights)) < 1


def test_the_lightest_is_never_left_out():
    weights = [1, 1_000_000]
    assert found_shares(weights, maglev.size_for(weights))[0] == 1


@pytest.mark.parametrize("count", [4, 10])
def test_a_backend_that_goes_moves_few_of_the_others(count):
    backends = [(name, 1) for name in names(count)]
    size = maglev.size_for([1] * count)
    before = maglev.table(backends, size)
    after = maglev.table(backends[:-1], size)
    own = before.count(count - 1)
    moved = sum(was != now for was, now in zip(before, after, strict=True)) - own
    # The paper measures a few per cent with tables of a hundred slots per backend.
    assert moved <= size // 8


def test_sizes_are_primes_that_fill_their_blocks():
    for size in maglev.SIZES:
        assert all(size % divisor for divisor in range(2, int(size**0.5) + 1))
        assert size > 0.97 * Extent(0, size).block


@pytest.mark.parametrize(
    ("weights", "size"),
    [
        ([1], 251),
        ([1] * 5, 251),
        ([1] * 6, 1021),
        ([1] * 2000, 65521),
        ([1, 99], 1021),
        ([1, 10**6], 16381),
    ],
)
def test_size_for(weights, size):
    assert maglev.size_for(weights) == size


@pytest.mark.parametrize(
    ("weights", "size", "slots"),
    [
        ([1], 7, [7]),
        ([1, 1], 7, [4, 3]),
        ([1, 1, 1], 7, [3, 2, 2]),
        ([1, 1000, 1], 7, [1, 5, 1]),
        ([5, 1, 1], 7, [5, 1, 1]),
        ([1, 500, 500, 500], 11, [1, 4, 3, 3]),
        ([1] * 7, 7, [1] * 7),
    ],
)
def test_shares(weights, size, slots):
    assert maglev.shares(weights, size) == slots


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12))
def test_the_others_are_found_one_after_the_other(weights):
    table = maglev.table([(str(n).encode(), weight) for n, weight in enumerate(weights)], 251)
    slots = list(maglev.ring(table))
    assert [position for position, _ in slots] == table
    for at in range(251):
        found = set()
        for _ in weights:
            position, at = slots[at]
            found.add(position)
        assert found == set(range(len(weights)))


# --- extents ------------------------------------------------------------------------------------


def test_room_runs_out_and_comes_back():
    extents = Extents(1024)
    taken = [extents.take(251) for _ in range(4)]
    assert None not in taken
    assert extents.take(1) is None
    extents.release(taken[1])
    assert extents.take(1021) is None
    assert extents.take(200) == Extent(taken[1].offset, 200)
    for extent in (*taken[:1], Extent(taken[1].offset, 200), *taken[2:]):
        extents.release(extent)
    assert extents.take(1021) == Extent(0, 1021)


@settings(deadline=None)
@given(st.lists(st.one_of(st.integers(1, 300), st.none()), max_size=60))
def test_extents_never_overlap_and_survive_a_restart(steps):
    """Numbers take that much, None releases the oldest; after each step, a fresh allocator told of
    what is taken has the same room."""
    extents, taken = Extents(1024), []
    for step in steps:
        if step is None:
            if taken:
                extents.release(taken.pop(0))
        elif (extent := extents.take(step)) is not None:
            taken.append(extent)
        slots = [slot for e in taken for slot in range(e.offset, e.offset + e.size)]
        assert len(slots) == len(set(slots))
        assert all(slot < 1024 for slot in slots)
        again = Extents(1024, taken)
        for size in (1024, 512, 256):
            fits, fits_again = extents.take(size), again.take(size)
            assert (fits is None) == (fits_again is None)
            for allocator, found in ((extents, fits), (again, fits_again)):
                if found is not None:
                    allocator.release(found)
