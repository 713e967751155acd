"""What reaches a backend past the proxy is what the table in force let pass, and as the proxy would
have had it: while tables change, at the limits of a head, and whatever clients send."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from bpf_world import needs_bpf
from redirect_world import OTHER, VIP, World, redirect_world
from support import policy as policies
from support.mesh import mesh_route
from support.proxy import get, ok, read_message, rule, to
from test_http1_hostile import LLHTTP, SMUGGLING, with_host
from test_mesh_kernel import Node, node, scenario, served
from test_pairs_kernel import Backend, Counts, allowed, change, configure, paired, with_backend

from bpf.reasons import Reason
from mesh.model.nodeconfig import Settings
from mesh.model.section import SETTINGS_KEY

pytestmark = needs_bpf
_CLIENTS = 8
_SWITCHES = 8


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("judged"), "--pairs") as made:
        yield made


# --- tables that change ---------------------------------------------------------------------------


class Asked(NamedTuple):
    """By the number of the tables in force when it was sent, and when it was answered; None: they
    were being changed."""

    target: str
    before: int | None
    after: int | None
    status: int


class Echo:
    """A backend that answers with what it was asked for."""

    def __init__(self) -> None:
        self.targets: Counter[str] = Counter()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (message := await read_message(reader)) is not None:
            target = message.start.split(" ")[1]
            self.targets[target] += 1
            writer.write(ok(target.encode()))
            await writer.drain()


async def ask(number: int, in_force: list[int | None], asked: list[Asked]) -> None:
    """Over one connection, until there are no tables any more."""
    reader, writer = await asyncio.open_connection(VIP, 80, local_addr=(OTHER, 0))
    try:
        for count in itertools.count():
            before = in_force[-1]
            if before == -1:
                return
            # Of each kind a few at a time: after one that is refused the next ones are offered.
            target = f"/{'aaaabbbb'[count % 8]}/{number}/{count}"
            writer.write(get(target, "web").encode())
            message = await read_message(reader)
            assert message is not None, target
            if message.status == 200:
                assert message.body == target.encode()
            asked.append(Asked(target, before, in_force[-1], message.status))
    finally:
        writer.transport.abort()


def test_two_tables_in_turns(world):
    """One allows /a and denies /b, the other one the reverse: whoever asks while one of them is in
    force is answered by that, on pairs that are open, and the backend sees nothing else."""
    tables = [
        allowed(policies.rule(one, 301, http=policies.http(path=f"/{one}/.*"))) for one in "ab"
    ]

    async def test(world: World) -> None:
        echo = Echo()
        async with node(world) as here, served(echo) as port:
            await configure(here, port, mesh_route("r", rule(to("web"))))
            await change(here, tables[0])
            in_force: list[int | None] = [0]
            asked: list[Asked] = []
            clients = [asyncio.ensure_future(ask(one, in_force, asked)) for one in range(_CLIENTS)]
            for number in range(1, _SWITCHES + 1):
                passed = world.counted(Reason.PAIR_REQUEST)
                async with asyncio.timeout(10):
                    while world.counted(Reason.PAIR_REQUEST) < passed + 10 * _CLIENTS:
                        await asyncio.sleep(0.005)
                        assert not any(one.done() for one in clients)
                in_force.append(None)
                await change(here, tables[number % 2])
                in_force.append(number)
            in_force.append(-1)
            await asyncio.gather(*clients)
            reached = {one.target for one in asked if one.status == 200}
            assert {one.status for one in asked} == {200, 403}
            assert echo.targets == Counter(reached)
            sure = [one for one in asked if one.before is not None and one.before == one.after]
            wrong = [
                one
                for one in sure
                if (one.status == 200) != (one.target[1] == "ab"[one.before % 2])
            ]
            assert not wrong, wrong[:3]
            assert {one.before for one in sure} == set(range(_SWITCHES))

    scenario(world, test)


# --- the limits of a head -------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "passes"), [(7_999, 1), (8_000, 1), (8_001, 0)])
def test_a_head_as_long_as_may_pass_and_one_byte_more(world, size, passes):
    """With and without a body behind it."""

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            for body in ("", "abc"):
                head = "PUT /long HTTP/1.1\r\nHost: web\r\n" if body else get("/long", "web")[:-2]
                head += f"Content-Length: {len(body)}\r\n" if body else ""
                head += "x-long: " + "".join(f"{n:05}" for n in range(1600))
                head = head[: size - 4] + "\r\n\r\n"
                assert len(head) == size
                counts = Counts(world)
                assert (await own.ask(head + body)).body == (body.encode() or b"/long")
                assert counts.since == (passes, passes, 0)
                sent = {line.split(": ")[0].lower(): line.split(": ")[1] for line in fields(head)}
                assert {name.lower(): value for name, value in backend.heads[-1]} == sent
                await own.pair()

    with_backend(world, test)


def fields(head: str) -> list[str]:
    return head[:-4].split("\r\n")[1:]


# --- whatever clients send ------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_a_request_that_will_never_be_whole_is_nobody_s_to_wait_for(world, apart):
    """Its client has said that it sends no more. With no pair it is given up at once, too."""

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            own.writer.write(b"PUT /p HTTP/1.1\r\nHost: web\r\nContent-Length: 9\r\n\r\n1234")
            if apart:
                await asyncio.sleep(0.05)
                own.writer.write(b"56")
            own.writer.write_eof()
            assert await own.ended()
            assert counts.since == (1, 0, 0)
        async with paired(world) as own:  # by another connection
            assert (await own.ask(get("/a", "web"))).body == b"/a"
        records = (await here.proxy.flows()).records
        assert [one.http.path for one in records if one.http.status == 0] == ["/p"]

    with_backend(world, test, body_timeout_s=1)


class Seen(NamedTuple):
    """What a backend understood."""

    line: str
    fields: tuple[tuple[str, str], ...]
    body: bytes


class Witness:
    """A backend that tells its clients how many bytes of which request it has understood."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (message := await read_message(reader)) is not None:
            # Of the connection, and framing of its own, is what each hop says as it likes.
            own = ("connection", "transfer-encoding", "content-length")
            given = [(name.lower(), value.strip(" \t")) for name, value in message.headers]
            told = tuple(sorted(one for one in given if one[0] not in own))
            self.seen.append(Seen(message.start, told, message.body))
            text = f"[{message.start} {len(message.body)}]".encode()
            head, _, body = ok(text).partition(b"\r\n\r\n")
            silent = message.start.startswith("HEAD ")
            writer.write(head + b"\r\n\r\n" + (b"" if silent else body))
            await writer.drain()


class Outcome(NamedTuple):
    """What a client was told, and what its backend was."""

    statuses: list[bytes]
    bodies: list[bytes]
    seen: list[Seen]


async def outcome(
    world: World, witness: Witness, parts: tuple[bytes, ...], *, passing: bool
) -> Outcome:
    async with paired(world, first=False) as own:
        await own.ask(get("/first", "web"))
        if passing:
            await own.offered()
        witness.seen.clear()
        for part in parts:
            own.writer.write(part)
            await asyncio.sleep(0.001)  # so that they are messages of their own
        own.writer.write_eof()
        answers = b""
        with contextlib.suppress(ConnectionResetError):
            while more := await own.reader.read(1 << 16):
                answers += more
        statuses = re.findall(rb"HTTP/1\.1 ([2-5]\d\d) ", answers)
        return Outcome(statuses, re.findall(rb"\[[^\]]*\]", answers), list(witness.seen))


@pytest.mark.skipif(not LLHTTP, reason="../shared/http is not there")
@pytest.mark.parametrize("apart", [False, True])
def test_what_others_test_their_parsers_with_has_the_same_outcome_on_a_pair(world, apart):
    """llhttp's cases, and published attacks; `apart`: what stands behind the first head."""
    found = [b64decode(case["bytes"]) for case in LLHTTP if case["type"] == "request"]
    found = [*found, *map(with_host, found), *SMUGGLING]
    cases: dict[tuple[bytes, ...], None] = {}
    for one in found:
        head, end, rest = one.partition(b"\r\n\r\n")
        cases[(head + end, rest) if apart and rest else (one,)] = None

    async def test(world: World) -> None:
        witness = Witness()
        async with node(world) as here, served(witness) as port:
            await configure(here, port, mesh_route("r", rule(to("web"))))
            counts = Counts(world)
            passing = [await outcome(world, witness, one, passing=True) for one in cases]
            passed = counts.since[0]
            await change(here, {SETTINGS_KEY: Settings()})
            for parts, other in zip(cases, passing, strict=True):
                assert other == await outcome(world, witness, parts, passing=False), parts
            assert counts.since[0] == passed > 5
            assert sum(len(one.seen) for one in passing) > passed

    scenario(world, test)
