"""Series of requests that pass by the proxy: their numbers, and that these are let go."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from bpf_world import needs_bpf
from prometheus_client import REGISTRY
from redirect_world import World, redirect_world

from bpf import layout, syscall
from bpf.maps import open_pinned, possible_cpus
from bpf.structs import Passed, PassedKey
from l7proxy.handles import Kernel
from l7proxy.series import Series, SeriesNumbers, SeriesReader
from l7proxy.series_room import SeriesRoom
from mesh.agent.flow_peers import Peers
from mesh.agent.flows import FlowStore
from mesh.agent.passed import PassedBy

pytestmark = needs_bpf
BACKEND = "cluster/Service/series/web/80"


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("series"), "--pairs") as made:
        yield made


def series(number: int) -> Series:
    names = ("mesh", "l", "r", "0", "s", BACKEND, "e", f"10.0.0.{number}")
    return Series(*names, "10.0.1.1", 80, egress=("p",))


def count(world: World, number: int, status: int) -> None:
    """Three requests, as the programs would."""
    faster = struct.pack("=14Q", 1, *[0] * 13)
    one = layout.PASSED.pack(Passed(3, 5, 7, 2 * 10**9, faster))
    values = one + bytes(layout.PASSED.size * (possible_cpus() - 1))
    fd = open_pinned(world.pin, "passed")
    syscall.update(fd, layout.PASSED_KEY.pack(PassedKey(number, 0, 0, status)), values)
    os.close(fd)


def of_worker(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"gateway": "mesh", "backend": BACKEND, **labels})


async def test_series_that_nobody_uses_make_room(world: World, tmp_path: Path) -> None:
    """What was counted under them in the kernel is counted by the worker then, once."""
    kernel = Kernel()
    kernel.handles = world.handles()
    room = SeriesRoom(SeriesNumbers(str(tmp_path), limit=4), kernel, look_s=0.01)
    passed = PassedBy(world.pin, tmp_path, FlowStore(Peers()), None)
    passed.start()

    own = [room.number(series(number)) for number in range(4)]
    assert room.number(series(4)) is None
    assert REGISTRY.get_sample_value("weft_pair_series_full") == 1
    numbers = [one.number for one in own if one is not None]
    for number in numbers[:2]:
        for status in (200, 499):
            count(world, number, status)
    assert sum(one.passed.requests for one in passed.counted()) == 12

    del own[0]  # those that somebody holds stay
    async with asyncio.timeout(5):
        while room.number(series(4)) is None:
            await asyncio.sleep(0.01)
    assert sum(one.passed.requests for one in passed.counted()) == 6
    assert {one.series for one in passed.counted()} == {series(1)}
    name = "weft_http_requests_total"
    assert of_worker(name, route="r", rule="0", code="200") == 3
    assert of_worker(name, route="r", rule="0", code="4xx") == 3
    name = "weft_http_request_duration_seconds"
    assert of_worker(f"{name}_sum") == 4
    assert of_worker(f"{name}_bucket", le="0.001") == 2
    assert of_worker(f"{name}_bucket", le="+Inf") == 6
    assert of_worker("weft_http_response_body_bytes_total") == 14

    # Its number is nobody's any more, in the file neither; others have theirs.
    async with asyncio.timeout(5):
        while SeriesReader(tmp_path).get(numbers[0]) is not None:
            await asyncio.sleep(0.01)
    reader = SeriesReader(tmp_path)
    assert reader.get(numbers[1]) == series(1)
    newest = room.number(series(4))
    assert newest is not None
    assert reader.get(newest.number) == series(4)
    assert REGISTRY.get_sample_value("weft_pair_series_full") == 0
    passed.close()


def test_a_reader_follows_a_file_that_is_written_anew(tmp_path: Path) -> None:
    numbers, reader = SeriesNumbers(str(tmp_path), limit=4), SeriesReader(tmp_path)
    first, second = (numbers.number(series(number)) for number in range(2))
    assert first is not None
    assert second is not None
    assert reader.get(first.number) == series(0)
    number = first.number
    del first
    assert numbers.unused() == {}
    assert numbers.unused() == {number: series(0)}
    asyncio.run(numbers.forget((number,)))
    third = numbers.number(series(2))
    assert third is not None
    assert [reader.get(one.number) for one in (third, second)] == [series(2), series(1)]
    assert reader.get(number) is None


def test_a_number_that_was_used_meanwhile_stays(tmp_path: Path) -> None:
    """Since it was found unused something may have been counted under it."""
    numbers, reader = SeriesNumbers(str(tmp_path), limit=4), SeriesReader(tmp_path)
    number = getattr(numbers.number(series(0)), "number", 0)
    assert numbers.unused() == {}
    unused = numbers.unused()
    assert unused == {number: series(0)}
    assert numbers.number(series(0)) is not None  # and nobody holds it any more
    asyncio.run(numbers.forget(unused))
    assert reader.get(number) == series(0)
    assert getattr(numbers.number(series(0)), "number", 0) == number
