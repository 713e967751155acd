"""Many clients at once whose requests pass by the proxy or do not, as chance has it: every answer
must be the one to its request, and no request may reach the backend that was not to.

WEFT_STRESS_S: for so many seconds (3).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from bpf_world import needs_bpf
from redirect_world import NODE, OTHER, VIP, World, redirect_world
from support.mesh import mesh_route, workload
from support.proxy import ok, rule, to
from test_mesh_kernel import Node, node, scenario, served
from test_pairs_kernel import Counts, configure

from bpf.settings import Generation
from mesh.model.nodeconfig import ClusterSection, Endpoint, EntryBackend, Section
from mesh.model.routeconfig import PathMatch, RouteMatch
from mesh.model.section import cluster_key

pytestmark = needs_bpf
SECONDS = float(os.environ.get("WEFT_STRESS_S", "3"))
_CLIENTS = 24
_SIZES = (0, 1, 100, 5_000, 60_000, 70_000, 400_000)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("stress"), "--pairs") as made:
        yield made


class Kind(NamedTuple):
    """What a request asks for, and what it must get; `status` 0: any, and then the end."""

    method: str
    path: str
    status: int
    size: int = 0


def kinds(chance: random.Random) -> Kind:
    size = chance.choice(_SIZES)
    return chance.choice(
        (
            *[Kind("GET", "/size", 200, chance.choice(_SIZES[:4]))] * 8,
            Kind("GET", "/size", 200, size),
            Kind("GET", "/chunked", 200, size),
            Kind("GET", "/parts", 200, size),
            *[Kind("GET", "/body", 200, chance.choice(_SIZES[1:5]))] * 2,
            Kind("GET", "/late", 200, min(size, 5_000)),
            Kind("GET", "/drips", 200, 1_500),
            Kind("HEAD", "/size", 200, size),
            Kind("PUT", "/echo", 200, size),
            Kind("POST", "/echo", 200, size),
            Kind("GET", "/nothing", 204),
            Kind("GET", "/same", 304),
            Kind("GET", "/hint", 200, 100),
            Kind("GET", "/missing", 404, 10),
            Kind("GET", "/bye", 200, 100),
            *[Kind("GET", "/denied", 404)] * 2,
        )
    )


def content(number: str, size: int) -> bytes:
    """Another one for every request."""
    word = f"{number};".encode()
    return (word * (size // len(word) + 1))[:size]


class Backend:
    """Answers as the path says; sees to it that it gets what was sent, and nothing else."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.served = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    self.wrong.append(f"ends with {error.partial[:80]!r}")
                return
            lines = head.decode("latin-1").split("\r\n")
            fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            method, target, _ = lines[0].split(" ")
            _, path, number, size = target.split("/")
            body = await self._body(reader, fields)
            if path == "denied" or (body and body != content(number, int(size))):
                self.wrong.append(f"{lines[0]}: {len(body)} bytes")
            self.served += 1
            if not await self._answer(writer, method, path, content(number, int(size))):
                return

    @staticmethod
    async def _body(reader: asyncio.StreamReader, fields: dict[str, str]) -> bytes:
        if "transfer-encoding" not in fields:
            return await reader.readexactly(int(fields.get("content-length", "0")))
        body = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += await reader.readexactly(size)
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return body

    @staticmethod
    async def _answer(writer: asyncio.StreamWriter, method: str, path: str, body: bytes) -> bool:
        whole = ok(body)
        match path:
            case "size" if method == "HEAD":
                writer.write(whole[: len(whole) - len(body)])
            case "chunked":
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                for at in range(0, len(body), 7_000):
                    part = body[at : at + 7_000]
                    writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                    await writer.drain()
                writer.write(b"0\r\nx-end: 1\r\n\r\n")
            case "parts":
                for at in (1, 17, 30, len(whole)):
                    writer.write(whole[:at])
                    whole = whole[at:]
                    await asyncio.sleep(0)
            case "body":
                writer.write(whole[: -len(body)])
                await asyncio.sleep(0)
                writer.write(body)
            case "drips":
                for at in range(len(whole) - len(body), len(whole)):
                    writer.write(
                        whole[at : at + 1] if at > len(whole) - len(body) else whole[: at + 1]
                    )
                    await asyncio.sleep(0)
            case "late":
                await asyncio.sleep(0.003)
                writer.write(whole)
            case "nothing":
                writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
            case "same":
                writer.write(b"HTTP/1.1 304 Not Modified\r\n\r\n")
            case "hint":
                writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n" + whole)
            case "missing":
                writer.write(ok(body, status="404 Not Found"))
            case "bye":
                writer.write(ok(body, "connection: close"))
            case _:
                writer.write(whole)
        await writer.drain()
        return path != "bye"


class Client:
    """One connection after another; requests are sent ahead of their answers, in pieces, and read
    slowly, sometimes."""

    def __init__(self, number: int, until: float) -> None:
        self._chance = random.Random(number)
        self._name = f"c{number}"
        self._until = until
        self.asked = 0

    async def run(self) -> None:
        while time.monotonic() < self._until:
            reader, writer = await asyncio.open_connection(VIP, 80, local_addr=(OTHER, 0))
            writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                for _ in range(self._chance.randrange(1, 40)):
                    if time.monotonic() >= self._until:
                        break
                    await self._some(reader, writer)
                if self._chance.random() < 0.3:
                    writer.write_eof()
                    assert await reader.read() == b""
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def _some(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ahead = self._chance.choice((1, 1, 1, 1, 2, 5))
        sent = []
        data = b""
        for _ in range(ahead):
            self.asked += 1
            kind, number = kinds(self._chance), f"{self._name}-{self.asked}"
            data += self._request(kind, number)
            sent.append((kind, number))
        writing = asyncio.ensure_future(self._write(writer, data))
        for kind, number in sent:
            await self._answer(reader, kind, number)
        await writing

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        if self._chance.random() < 0.8:
            writer.write(data)
        else:
            at = 0
            while at < len(data):
                size = self._chance.choice((1, 20, 70, 3_000, len(data)))
                writer.write(data[at : at + size])
                at += size
                await asyncio.sleep(self._chance.choice((0, 0, 0.001)))
        await writer.drain()

    def _request(self, kind: Kind, number: str) -> bytes:
        head = f"{kind.method} {kind.path}/{number}/{kind.size} HTTP/1.1\r\nHost: web\r\n"
        body = content(number, kind.size)
        if kind.method == "PUT":
            return f"{head}Content-Length: {kind.size}\r\n\r\n".encode() + body
        if kind.method == "POST":
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            return (
                f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk + b"0\r\nx: y\r\n\r\n"
            )
        if self._chance.random() < 0.1:
            head += f"X-Long: {'z' * self._chance.choice((10, 600, 7_900, 8_100))}\r\n"
        return f"{head}\r\n".encode()

    async def _answer(self, reader: asyncio.StreamReader, kind: Kind, number: str) -> None:
        if self._chance.random() < 0.1:
            await asyncio.sleep(0.005)
        status, fields = 100, {}
        while status < 200:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            status = int(head[0].split(" ")[1])
            fields = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        told = f"{kind} {number} got {head[0]}"
        assert status == kind.status, told
        if kind.method == "HEAD" or status in (204, 304):
            return
        body = await Backend._body(reader, fields)
        if kind.path != "/denied":
            assert body == content(number, kind.size), told


async def change(here: Node, until: float) -> int:
    """Now and then something else is in force: that comes to the same, or is about others."""
    number = 0
    with contextlib.closing(Generation(here.world.pin)) as generation:
        while time.monotonic() < until:
            await asyncio.sleep(0.02)
            number += 1
            others = workload("x", "10.244.9.9", "front", node="far", identity=400 + number % 2)
            put = route(f"n{number % 2}") if number % 5 == 0 else others
            assert await here.proxy.apply(put) == {}
            generation.end_offers(here.proxy.config.made_ns)
    return number


def route(name: str) -> dict[str, Section]:
    """To two backends, and for some paths to the second only."""
    matches = [RouteMatch(PathMatch("PathPrefix", f"/{one}")) for one in PATHS]
    both = to("web"), to("second", 2)
    return mesh_route(
        "r",
        rule(*both, matches=tuple(matches[::2]), name=name),
        rule(to("second"), matches=tuple(matches[1::2])),
    )


PATHS = [
    "size",
    "body",
    "chunked",
    "parts",
    "late",
    "drips",
    "echo",
    "nothing",
    "same",
    "hint",
    "missing",
    "bye",
]


def test_every_answer_is_the_one_to_its_request(world):
    async def test(world: World) -> None:
        backend = Backend()
        async with node(world) as here, served(backend) as port, served(backend) as other:
            own = EntryBackend(NODE, other, sockmap=True)
            here.world.frontend(NODE, other, own, http=True, sockmap=True)
            key = cluster_key("Service", "default", "second", 80)
            second = ClusterSection((Endpoint(NODE, other, "web-0"),))
            await configure(here, port, route("n0") | {key: second})
            counts = Counts(world)
            until = time.monotonic() + SECONDS
            clients = [Client(number, until) for number in range(_CLIENTS)]
            _, *ends = await asyncio.gather(
                change(here, until), *(one.run() for one in clients), return_exceptions=True
            )
            wrong = [end for end in (_, *ends) if isinstance(end, BaseException)]
            print(sum(one.asked for one in clients), "asked,", counts.since)
            assert not wrong, wrong[:3]
            assert not backend.wrong, backend.wrong[:3]
            passed, answered, _ = counts.since
            assert passed >= answered > 50, f"hardly a request has passed by the proxy: {passed}"

    scenario(world, test)
