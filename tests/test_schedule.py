"""Looking at many things, each in time."""

from __future__ import annotations

import asyncio

from loops import advance, on_both_loops, on_virtual_loop

from l7proxy.schedule import Schedule


async def pass_on() -> None:
    for _ in range(100):
        await asyncio.sleep(0)


@on_virtual_loop
async def test_each_is_looked_at_once_and_by_its_time():
    seen: list[str] = []
    schedule = Schedule(seen.append)
    schedule.within("c", 300)
    schedule.within("a", 200)
    schedule.within("b", 100)
    schedule.within("b", 250)  # that is later
    schedule.within("c", 50)
    schedule.within("d", 10)
    schedule.drop("d")
    schedule.drop("e")
    await pass_on()
    assert seen == []
    for seconds, expected in ((60, "c"), (60, "cb"), (100, "cba"), (200, "cba")):
        advance(seconds)
        await pass_on()
        assert "".join(seen) == expected


@on_virtual_loop
async def test_what_is_dropped_may_come_back():
    seen: list[str] = []
    schedule = Schedule(seen.append)
    schedule.within("a", 10)
    schedule.drop("a")
    schedule.within("a", 100)
    advance(50)
    await pass_on()
    assert seen == []
    advance(60)
    await pass_on()
    assert seen == ["a"]


@on_virtual_loop
async def test_many_are_looked_at_without_a_look_at_any_other():
    """However many there are: one look each, and nobody waits for all of them."""
    looks, met = [0] * 5_000, 0
    schedule = Schedule(lambda one: looks.__setitem__(one, looks[one] + 1))
    for number in range(5_000):
        schedule.within(number, 100)
    assert sum(looks) == 0
    advance(101)
    while sum(looks) < 5_000:
        before = sum(looks)
        await asyncio.sleep(0)
        assert sum(looks) - before <= 128
        met += 1
    assert set(looks) == {1}
    assert met >= 5_000 // 128


@on_both_loops
async def test_a_look_may_ask_for_the_next_one_or_fail():
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: failures.append(told))
    done = asyncio.Event()
    seen = 0

    def look(one: str) -> None:
        nonlocal seen
        if one == "fails":
            raise ValueError
        seen += 1
        if seen == 3:
            done.set()
        schedule.within(one, 0.001)

    schedule = Schedule(look)
    schedule.within("fails", 0)
    schedule.within("goes on", 0)
    await done.wait()
    schedule.drop("goes on")
    assert len(failures) == 1
