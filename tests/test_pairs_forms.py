"""Requests and responses of every form on a pair, pipelined and in pieces: a backend gets exactly
the requests that policy let pass, byte by byte and in order, and clients the answers to theirs.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import test_pairs_stress as stress
from bpf_world import needs_bpf
from redirect_world import World, redirect_world
from support import policy as policies
from support.mesh import mesh_route
from support.proxy import rule, to
from test_mesh_kernel import Node, node, scenario, served
from test_pairs_kernel import Counts, Paired, allowed, change, configure, paired

from mesh.model.routeconfig import PathMatch, RouteMatch

pytestmark = needs_bpf


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("forms"), "--pairs") as made:
        yield made


class Request(NamedTuple):
    """`body` as it is sent, and `content` what it says. `size` of the response's body."""

    head: bytes
    status: int = 200
    size: int = 0
    body: bytes = b""
    content: bytes = b""

    @property
    def sent(self) -> bytes:
        return self.head + self.body

    @property
    def answer(self) -> bytes:
        return stress.content("n", self.size)

    @property
    def method(self) -> str:
        return self.head.decode().partition(" ")[0]


def request(
    path: str, size: int = 0, *fields: str, method: str = "GET", status: int = 200
) -> Request:
    lines = [f"{method} /{path}/n/{size} HTTP/1.1", "Host: web", *fields, "", ""]
    return Request("\r\n".join(lines).encode(), status, size)


def with_length(size: int, *fields: str) -> Request:
    made = request("echo", size, f"Content-Length: {size}", *fields, method="PUT")
    return made._replace(body=made.answer, content=made.answer)


def chunked(size: int, piece: int, extension: str = "", trailer: str = "") -> Request:
    made = request("echo", size, "Transfer-Encoding: chunked", method="POST")
    pieces = [made.answer[at : at + piece] for at in range(0, size, piece)]
    framed = b"".join(b"%x%b\r\n%b\r\n" % (len(one), extension.encode(), one) for one in pieces)
    return made._replace(body=framed + f"0\r\n{trailer}\r\n".encode(), content=made.answer)


DENIED = request("denied", status=403)
FORMS = {
    "get": request("size", 100),
    "empty": request("size", 0),
    "head": request("size", 100, method="HEAD"),
    "parts": request("parts", 50),
    "chunked-response": request("chunked", 20_000),
    "late": request("late", 300),
    "long": request("size", 70_000),
    "204": request("nothing", status=204),
    "304": request("same", status=304),
    "304-with-length": request("unchanged", status=304),
    "1xx": request("hint", 30),
    "404": request("missing", 9, status=404),
    "denied": DENIED,
    "denied-put": with_length(30)._replace(
        head=b"PUT /denied/n/30 HTTP/1.1\r\nHost: web\r\nContent-Length: 30\r\n\r\n", status=403
    ),
    "put": with_length(30),
    "put-nothing": with_length(0),
    "put-long": with_length(70_000),
    "post": chunked(30, 7),
    "post-trailers": chunked(3_000, 999, ";a=b", "x-sum: 1\r\nx-more: 2\r\n"),
    "post-nothing": chunked(0, 1),
    "get-length": request("size", 5, "Content-Length: 0"),
}


def fields(head: bytes) -> list[str]:
    """Lines; the proxy may send names in lower case (RFC 9110 section 5.1)."""
    start, *lines = head.decode("latin-1").split("\r\n")
    parts = (line.partition(":") for line in lines)
    return [start, *(name.lower() + colon + value for name, colon, value in parts)]


class Backend(stress.Backend):
    """Remembers what reached it: heads' lines, and bodies."""

    def __init__(self) -> None:
        super().__init__()
        self.reached: list[tuple[list[str], bytes]] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError as error:
                if error.partial:
                    self.reached.append(([repr(error.partial)], b""))
                return
            start, *lines = head.decode("latin-1").split("\r\n")
            method, target, _ = start.split(" ")
            body = await self._body(
                reader, dict(one.lower().split(": ", 1) for one in lines if one)
            )
            _, path, number, size = target.split("/")
            if path != "first":
                self.reached.append((fields(head), body))
            content = stress.content(number, int(size))
            match path:
                case "unchanged":  # the length of what it does not send (RFC 9110 section 15.4.5)
                    writer.write(b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n")
                case "reset" | "cut":
                    head, _, _ = stress.ok(content).partition(content)
                    writer.write(head + content[: len(content) // 2])
                    await writer.drain()
                    linger = struct.pack("ii", path == "reset", 0)
                    sock = writer.get_extra_info("socket")
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    return
                case _:
                    if not await self._answer(writer, method, path, content):
                        return
            await writer.drain()


async def ready(here: Node, port: int) -> None:
    """Everything but /denied may pass."""
    paths = ("first", "unchanged", "reset", "cut", "denied", *stress.PATHS)
    matches = tuple(RouteMatch(PathMatch("PathPrefix", f"/{one}")) for one in paths)
    await configure(here, port, mesh_route("r", rule(to("web"), matches=matches)))
    path = f"/({'|'.join(one for one in paths if one != 'denied')})/.*"
    await change(here, allowed(policies.rule("some", 301, http=policies.http(path=path))))


async def pair(own: Paired) -> None:
    """And one request passes: else others are not let pass for a while, after eight whose responses
    could not."""
    for _ in "12":
        own.writer.write(request("size", 1).head.replace(b"/size/", b"/first/"))
        assert await answer(own, "GET") == (200, b"n")
        await own.offered()


async def answer(own: Paired, method: str) -> tuple[int, bytes]:
    """Status and body of the next one."""
    status, fields = 100, {}
    while status < 200:
        start, *lines = (await own.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(start.split(" ")[1])
        fields = dict(line.lower().split(": ", 1) for line in lines if line)
    if method == "HEAD" or status in (204, 304):
        return status, b""
    return status, await stress.Backend._body(own.reader, fields)


async def check(own: Paired, backend: Backend, sent: Sequence[Request]) -> None:
    """All that was sent is answered, in order, and what was let pass reached the backend."""
    for one in sent:
        status, body = await answer(own, one.method)
        assert status == one.status, one.head
        if one.status not in (204, 304, 403) and one.method != "HEAD":
            assert body == one.answer, one.head
    wanted = [(fields(one.head), one.content) for one in sent if one.status != 403]
    assert backend.reached == wanted
    backend.reached.clear()


Test = Callable[[Paired, Backend], Awaitable[None]]


def with_node(world: World, test: Test) -> None:
    async def run(world: World) -> None:
        backend = Backend()
        async with node(world) as here, served(backend) as port:
            await ready(here, port)
            async with paired(world, first=False) as own:
                sock = own.writer.get_extra_info("socket")
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await test(own, backend)

    scenario(world, run)


@pytest.mark.parametrize("at_once", [True, False], ids=["one-message", "message-by-message"])
def test_any_form_behind_any_other(world, at_once):
    async def test(own: Paired, backend: Backend) -> None:
        counts = Counts(world)
        for two in itertools.product(FORMS.values(), repeat=2):
            await pair(own)
            if at_once:
                own.writer.write(b"".join(one.sent for one in two))
            else:
                for one in two:
                    own.writer.write(one.sent)
                    await asyncio.sleep(0)
            await check(own, backend, two)
        # Those in one message are the proxy's.
        assert at_once or counts.since[0] > len(FORMS) ** 2 * 3 / 2

    with_node(world, test)


@pytest.mark.parametrize("name", FORMS)
def test_any_form_in_pieces(world, name):
    """Cut anywhere in its head and just behind it, and into bytes, with others behind it."""

    async def test(own: Paired, backend: Backend) -> None:
        one, behind = FORMS[name], FORMS["get"]
        cuts = [[at] for at in range(1, len(one.head) + min(len(one.body), 12))]
        cuts.append([*range(1, min(len(one.sent), 200))])
        for cut in cuts:
            await pair(own)
            own.writer.write(one.sent[: cut[0]])
            for begin, end in itertools.pairwise((*cut, len(one.sent))):
                await asyncio.sleep(0)
                own.writer.write(one.sent[begin:end])
            own.writer.write(DENIED.sent + behind.sent)
            await check(own, backend, (one, DENIED, behind))

    with_node(world, test)


def test_a_request_that_expects_to_be_told_to_go_on(world):
    """The proxy gives the backend a second to say so."""

    async def test(own: Paired, backend: Backend) -> None:
        await pair(own)
        some = (FORMS["get"], with_length(30, "Expect: 100-continue"), DENIED)
        for one in some:
            own.writer.write(one.sent)
            await asyncio.sleep(0)
        await check(own, backend, some)

    with_node(world, test)


def test_the_largest_bodies_that_pass(world):
    """64 KiB of a request with its head."""

    async def test(own: Paired, backend: Backend) -> None:
        size = 65_536 - len(with_length(65_000).head)
        for more, passes in ((-1, 1), (0, 1), (1, 0)):
            for cut in (None, len(with_length(size).head)):
                await pair(own)
                counts = Counts(world)
                one = with_length(size + more)
                own.writer.write(one.sent[:cut])
                if cut:
                    await asyncio.sleep(0)
                    own.writer.write(one.sent[cut:])
                await check(own, backend, [one])
                assert counts.since[0] == passes

    with_node(world, test)


def test_the_last_request_of_a_client(world):
    """`Connection: close`: nothing behind it is anybody's."""

    async def run(world: World) -> None:
        backend = Backend()
        async with node(world) as here, served(backend) as port:
            await ready(here, port)
            for name, one in FORMS.items():
                last = one._replace(
                    head=one.head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
                )
                async with paired(world, first=False) as own:
                    await pair(own)
                    own.writer.write(last.sent + FORMS["get"].sent)
                    status, _ = await answer(own, one.method)
                    assert (name, status) == (name, one.status)
                    assert await own.ended()
            asked = [head[0] for head, _ in backend.reached]
            wanted = [one for one in FORMS.values() if one.status != 403]
            assert asked == [fields(one.head)[0] for one in wanted]

    scenario(world, run)


def test_readers_that_are_slow(world):
    """What they ask meanwhile waits; nothing is lost of what they do not read for long."""

    async def test(own: Paired, backend: Backend) -> None:
        for size in (60_000, 70_000, 1_000_000, 1_000_000, 2_000_000, 2_200_000, 5_000_000):
            await pair(own)
            some = (request("size", size), DENIED, request("body", 9_000), FORMS["post"])
            for one in some:
                own.writer.write(one.sent)
                await asyncio.sleep(0.01)  # for an answer that is not read
            head = await own.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            body = b""
            while len(body) < size:
                body += await own.reader.read(min(50_000, size - len(body)))
                await asyncio.sleep(0)
            assert body == some[0].answer
            assert backend.reached.pop(0)[0] == fields(some[0].head)
            await check(own, backend, some[1:])

    with_node(world, test)


@pytest.mark.parametrize("path", ["cut", "reset"])
def test_backends_that_break_off(world, path):
    """By an end, by a reset: so does the client's answer, and nothing behind it is asked."""

    async def run(world: World) -> None:
        backend = Backend()
        async with node(world) as here, served(backend) as port:
            await ready(here, port)
            for size in (2, 1_000, 60_000, 200_000):
                one = request(path, size)
                async with paired(world, first=False) as own:
                    await pair(own)
                    own.writer.write(one.sent)
                    await asyncio.sleep(0)
                    own.writer.write(FORMS["get"].sent)
                    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                        await answer(own, "GET")
                assert [head for head, _ in backend.reached] == [fields(one.head)]
                backend.reached.clear()

    scenario(world, run)
