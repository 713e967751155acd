"""Requests that pass by the proxy: a real worker, real programs, workloads' real sockets."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import socket
import struct
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from bpf_world import needs_bpf
from redirect_world import NODE, OTHER, VIP, World, redirect_world
from support import policy as policies
from support.mesh import mesh_route, service, workload
from support.proxy import Message, get, ok, read_body, read_message, rule, to
from support.two_nodes import Authority, life
from test_mesh_kernel import Node, node, scenario, served

from bpf import attach, layout, maps
from bpf import passed as passed_maps
from bpf.automaton import Automata
from bpf.constants import EXCHANGES_MAX
from bpf.reasons import Reason
from bpf.settings import Generation
from bpf.structs import Exchange, Number, Pair
from l7proxy.accesslog import AccessLog
from l7proxy.automaton import compile_rules
from l7proxy.automaton_plans import Plans
from l7proxy.redirect import MOST
from mesh.agent.flow_peers import Peers
from mesh.agent.flows import FlowStore
from mesh.agent.passed import PassedBy
from mesh.model.flow import Flow
from mesh.model.nodeconfig import (
    ClusterSection,
    Endpoint,
    EntryBackend,
    Section,
    Settings,
    WorkloadSection,
)
from mesh.model.policyconfig import HeaderRule
from mesh.model.routeconfig import PathMatch, RouteMatch
from mesh.model.section import SETTINGS_KEY, cluster_key, policy_key, svid_key

pytestmark = needs_bpf
EMPTY = layout.EXCHANGE.unpack(Exchange, bytes(layout.EXCHANGE.size))
FRONT, SHOP = (f"spiffe://cluster.local/ns/{one}/sa/x" for one in ("front", "shop"))
# What /denied is not among.
_PATHS = (
    "first|body|more|over|a|after|again|b|busy|bye|chunked|claims|close|drips|early|held|hint|kept|long|other"
    "|late|p|parts|size|slow|stalls|status|two|twice|up|x"
)
MATCHES = (RouteMatch(PathMatch("RegularExpression", f"/({_PATHS})(/.*)?")),)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("pairs"), "--pairs") as made:
        yield made


async def configure(here: Node, port: int, *more: dict[str, Section], **rest: object) -> None:
    """Service shop/web at VIP:80 with a backend at `port`; clients are pods of another address."""
    here.world.frontend(VIP, 80, http=True, sockmap=True)
    own = EntryBackend(NODE, port, sockmap=True)
    here.world.frontend(NODE, port, own, http=True, sockmap=True)
    here.world.know(True, WorkloadSection("front", "client", (OTHER,), identity=301))
    endpoints = (Endpoint(NODE, port, "web-0"),)
    put = (
        service("web", VIP, producers=True)
        | mesh_route("r", rule(to("web"), matches=MATCHES))
        | workload("client", OTHER, "front", local=True, node="n", identity=301, spiffe_id=FRONT)
        | workload("web-0", NODE, "shop", local=True, node="n", identity=300, spiffe_id=SHOP)
        | {cluster_key("Service", "default", "web", 80): ClusterSection(endpoints)}
        | {SETTINGS_KEY: Settings(http_in_kernel=True, **rest)}  # type: ignore[arg-type]
    )
    for one in more:
        put |= one
    here.plans = Plans()  # type: ignore[attr-defined]
    await change(here, put)


async def change(here: Node, put: dict[str, Section], remove: tuple[str, ...] = ()) -> None:
    """In force, and the kernel has the tables for it."""
    plans: Plans = here.plans  # type: ignore[attr-defined]
    plans.apply(put, remove)
    with contextlib.closing(Automata(here.world.pin)) as automata:
        known = automata.generations()
        for generation, made in plans.all().items():
            if generation in known:
                continue
            table = compile_rules(made.ordered, made.limits, generation).table
            automata.put(generation, table)
    assert await here.proxy.apply(put, remove) == {}


class Backend:
    """A workload's server that answers by the path, and remembers what reached it."""

    def __init__(self) -> None:
        self.targets: list[str] = []
        self.heads: list[list[tuple[str, str]]] = []
        self.go_on = asyncio.Event()  # for /slow
        self.reached = asyncio.Event()  # a /slow has come
        self.lingers = False  # with its own end, when the other one has ended
        self.reader: asyncio.StreamReader | None = None  # of the last request
        self.writer: asyncio.StreamWriter | None = None
        self.ended = asyncio.Event()  # a connection has
        self.fails = False  # whatever it is asked

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (message := await read_message(reader, head_only=True)) is not None:
            method, target, version = message.start.split(" ")
            if target == "/early":
                writer.write(ok(b"early"))
            await read_body(reader, message)
            if target == "/early":
                continue
            assert version == "HTTP/1.1"
            self.targets.append(target)
            self.reader, self.writer = reader, writer
            self.heads.append(message.headers)
            what, _, rest = target[1:].partition("/")
            if self.fails:
                what, rest = "status", "503"
            if what in ("slow", "late", "held"):
                self.reached.set()
                await self.go_on.wait()
            if what == "drips":
                writer.write(ok(b"d" * int(rest))[: -int(rest)])
                for _ in range(min(int(rest), 3_000)):
                    writer.write(b"d")
                    await asyncio.sleep(0)
                if int(rest) > 3_000:
                    return
                continue
            if what == "stalls":
                writer.write(ok(b"x" * 100)[:-50])
                await self.go_on.wait()
            if what == "close":
                writer.write(ok(b"x" * 100)[: int(rest)])
                await writer.drain()
                return
            if what == "held":
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
                continue
            answer = self._answer(method, what, rest, target, message)
            if isinstance(answer, list):
                for part in answer:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.001)  # so that they are messages of their own
            else:
                writer.write(answer)
                await writer.drain()
        self.ended.set()
        if self.lingers:
            await self.go_on.wait()

    def _answer(
        self, method: str, what: str, rest: str, target: str, message: Message
    ) -> bytes | list[bytes]:
        head = b"HTTP/1.1 200 OK\r\n"
        match what:
            case "size":
                body = target.encode() * (int(rest) // len(target) + 1)
                return (
                    ok(body[: int(rest)])
                    if method != "HEAD"
                    else ok(body[: int(rest)])[: -int(rest)]
                )
            case "chunked" | "late":
                head += b"transfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n"
                return [head + b"3\r\nabc\r\n", b"0\r\nx-sum: 1\r\n", b"\r\n"]
            case "body":  # after its head, as by sendfile(2)
                whole = ok(target.encode() * 4000)
                return [whole[:50], whole[50:9000], whole[9000:]]
            case "more":  # than was told
                whole = ok(target.encode())
                return [whole[:-2], whole[-2:], b"smuggled"]
            case "over":
                whole = ok(target.encode())
                return [whole[:-2], whole[-2:] + b"smuggled"]
            case "parts":
                return [*(bytes([byte]) for byte in ok(target.encode()))]
            case "hint":
                return b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" + ok(target.encode())
            case "status":
                if rest in ("204", "304"):
                    return f"HTTP/1.1 {rest} No\r\n\r\n".encode()
                return ok(target.encode(), status=f"{rest} What")
            case "two":  # more than what was asked for
                return ok(target.encode()) + ok(b"smuggled")
            case "twice":
                return head + b"content-length: 1\r\ncontent-length: 2\r\n\r\nab"
            case "bye":
                return ok(target.encode(), "connection: close")
        return ok(message.body or target.encode())


class Counts:
    """What has passed by the proxy since this was made."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._before = self._now()

    def _now(self) -> tuple[int, ...]:
        reasons = (Reason.PAIR_REQUEST, Reason.PAIR_RESPONSE, Reason.PAIR_HANDED)
        return tuple(self._world.counted(one) for one in reasons)

    @property
    def since(self) -> tuple[int, ...]:
        """Requests, responses, responses that were left to the proxy."""
        return tuple(now - before for now, before in zip(self._now(), self._before, strict=True))


class Paired:
    """A client's connection; `pair` returns once its next request may pass by the proxy."""

    def __init__(
        self, world: World, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader, self.writer = reader, writer
        self._world = world
        sock = writer.get_extra_info("socket")
        self.cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")

    async def ask(self, request: str | bytes) -> Message:
        self.writer.write(request if isinstance(request, bytes) else request.encode())
        return await self.answer(head=request[:4] in ("HEAD", b"HEAD"))

    async def answer(self, *, head: bool = False) -> Message:
        message = await read_message(self.reader, head_only=head)
        assert message is not None
        return message

    async def pair(self) -> None:
        assert (await self.ask(get("/first", "web"))).body == b"/first"
        await self.offered()

    async def offered(self, *, stands: bool = True) -> None:
        pairs = maps.PinnedMap(self._world.pin, "pairs", Number, Pair)
        with contextlib.closing(pairs):
            async with asyncio.timeout(5):
                while (pairs.get(Number(self.cookie)) is not None) is not stands:
                    await asyncio.sleep(0.001)

    @property
    def delivered(self) -> bool:
        return self._world.handles().delivered(self.cookie)

    async def ended(self) -> bool:
        """Whether nothing more came before the end."""
        try:
            return await self.reader.read() == b""
        except ConnectionResetError:
            return True


@contextlib.asynccontextmanager
async def paired(world: World, *, first: bool = True) -> AsyncIterator[Paired]:
    reader, writer = await asyncio.open_connection(VIP, 80, local_addr=(OTHER, 0))
    try:
        made = Paired(world, reader, writer)
        if first:
            await made.pair()
        yield made
    finally:
        writer.transport.abort()


Test = Callable[[Node, Backend], Awaitable[None]]


def with_backend(world: World, test: Test, **settings: object) -> None:
    async def run(world: World) -> None:
        backend = Backend()
        async with node(world) as here, served(backend) as port:
            here.own_port = port  # type: ignore[attr-defined]
            await configure(here, port, **settings)
            await test(here, backend)

    scenario(world, run)


def test_later_requests_pass_by_the_proxy(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            for number in range(50):
                message = await own.ask(get(f"/size/{number}", "web"))
                assert message.status == 200
                assert len(message.body) == number
                assert own.delivered
            assert counts.since == (50, 50, 0)
            await own.ask(get("/denied", "web"))  # which it has sent by TCP
            assert own.delivered

    with_backend(world, test)


async def counted(here: Node, requests: int) -> dict[str, float]:
    """The metrics once there were so many; what the proxy has answered it counts a moment later."""
    async with asyncio.timeout(5):
        while True:
            found = here.proxy.metrics()
            names = [name for name in found if name.startswith("weft_http_requests_total{")]
            if sum(found[name] for name in names) == requests:
                return found
            await asyncio.sleep(0.01)


def test_what_clients_say_of_their_identity_passes_nobody_by(world):
    """The proxy takes it out, however it is written and wherever it is cut."""
    field = "X-Forwarded-Client-Cert: URI=forged"

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            for line in (field, field.lower(), field.upper(), f"A: b\r\n{field}"):
                assert (await own.ask(get("/a", "web", line))).body == b"/a"
                await own.offered()
            whole = get("/b", "web", field, "A: b")
            for at in (30, whole.index("X-"), whole.index("Cert"), whole.index("forged"), -2):
                own.writer.write(whole[:at].encode())
                await asyncio.sleep(0)
                assert (await own.ask(whole[at:])).body == b"/b"
                await own.offered()
            # Nor behind another request, in one message with it.
            own.writer.write((get("/a", "web") + whole).encode())
            assert [(await own.answer()).body for _ in "ab"] == [b"/a", b"/b"]
            await own.offered()
            chunked = get("/a", "web", "Transfer-Encoding: chunked")
            assert (await own.ask(f"{chunked}0\r\n{field}\r\n\r\n")).body == b"/a"
            await own.offered()
            assert counts.since == (0, 0, 0)
            assert (await own.ask(get("/a", "web", "A: b"))).body == b"/a"
            assert counts.since == (1, 1, 0)
        said = [line for head in backend.heads for line in head]
        assert len(backend.heads) == 14
        assert not [name for name, _ in said if name.lower().startswith("x-forwarded-client")]
        assert ("A", "b") in said or ("a", "b") in said

    with_backend(world, test)


def test_what_passes_is_counted_and_told_as_what_the_proxy_serves(world, tmp_path):
    """The same requests through the proxy and past it: the same metrics, flow records and lines."""
    reader = policies.rule("get", 301, http=policies.http(method="GET"))
    writer = policies.rule("put", 301, http=policies.http(method="PUT"))
    authority = Authority("cluster.local")
    put = "PUT /p/1 HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\n"
    asked: tuple[str | bytes, ...] = (
        get("/size/7", "web", "User-Agent: test", "X-Request-Id: one-of-mine"),
        get("/status/404", "web"),
        put + "abc",
    )

    async def test(here: Node, backend: Backend) -> None:
        identities = authority.svid(FRONT) | authority.svid(SHOP) | authority.bundle()
        await change(here, allowed(reader, writer) | identities)
        with open(tmp_path / "log", "wb") as file:
            log = AccessLog(asyncio.get_running_loop(), file.fileno())
            store = FlowStore(Peers())
            passed = PassedBy(world.pin, Path(here.proxy.metrics_dir), store, log)
            passed.start()
            here.proxy.merge = passed.merged
            async with paired(world) as own:
                start = await counted(here, 1)
                counts = Counts(world)
                for request in asked:
                    await own.ask(request)
                assert counts.since == (3, 3, 0)
                middle = await counted(here, 4)
                for request in asked:  # which it now sends in two parts, the first of them short
                    text = request if isinstance(request, bytes) else request.encode()
                    own.writer.write(text[:9])
                    await own.offered(stands=False)
                    await own.ask(text[9:])
                    await own.offered()
                assert counts.since == (3, 3, 0)
            end = await counted(here, 7)
            async with asyncio.timeout(5):
                while store.seen["FORWARDED"] < 3:
                    await asyncio.sleep(0.01)
            passed.close()

        def changes(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
            return {
                name: round(after[name] - before.get(name, 0), 9)
                for name in after
                if after[name] != before.get(name)
                and name.startswith("weft_http")
                and not name.startswith("weft_http_request_duration_seconds")
            }

        assert changes(start, middle) == changes(middle, end)
        by = f'destination="{SHOP}",policy="%s",source="{FRONT}"}}'
        name = 'weft_http_requests_by_policy_total{class="2xx",'
        assert changes(start, middle)[name + by % "get"] == 1
        assert changes(start, middle)[name + by % "put"] == 1
        name = 'weft_http_request_duration_seconds_bucket{backend="%s",gateway="mesh",le="+Inf"}'
        name %= "cluster/Service/default/web/80"
        assert middle[name] - start[name] == 3 == end[name] - middle[name]
        theirs: list[Flow] = []
        while len(theirs) < 4:
            theirs += (await here.proxy.flows()).records
        for flow, other in zip(store.held(), theirs[1:4], strict=True):
            assert plainly(flow) == plainly(store.peers.complete(other, ""))
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
        async with asyncio.timeout(5):
            while len(written := here.proxy.access_log().splitlines()) < 4:
                await asyncio.sleep(0.01)
        others = [json.loads(line) for line in written[1:4]]
        for line in (*lines, *others):
            for name in ("time", "duration_ms"):
                line.pop(name)
        assert lines == others

    with_backend(world, test)


def test_what_is_left_to_the_proxy_is_told_from_its_beginning(world):
    """When it was sent, what its body was, and which policy let it pass are the kernel's to say."""
    writer = policies.rule("put", 301, http=policies.http(method="PUT"))
    reader = policies.rule("get", 301, http=policies.http(method="GET"))

    async def test(here: Node, backend: Backend) -> None:
        await change(here, allowed(reader, writer))
        async with paired(world) as own:
            counts = Counts(world)
            put = b"PUT /late HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n"
            put += b"User-Agent: test\r\nX-Request-Id: one-of-mine\r\n\r\nabc"
            own.writer.write(put)
            await backend.reached.wait()
            await asyncio.sleep(0.2)
            backend.go_on.set()
            assert (await own.answer()).body == b"abc"
            assert counts.since == (1, 0, 1)
        line = await logged(here, "/late")
        assert line["duration_ms"] >= 200
        assert (line["status"], line["bytes_in"], line["bytes_out"]) == (200, 3, 3)
        assert (line["user_agent"], line["request_id"]) == ("test", "one-of-mine")
        flows: list[Flow] = []
        while len(flows) < 2:
            flows += (await here.proxy.flows()).records
        assert flows[1].policy == "put"

    with_backend(world, test)


def test_a_client_that_leaves_its_request_behind_is_told_of_once(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            own.writer.write(get("/slow/1", "web").encode())
            await backend.reached.wait()
            sock = own.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        line = await logged(here, "/slow/1")
        assert (line["status"], line["reason"]) == (499, "client_gone")
        found = await counted(here, 2)
        codes = [name for name in found if 'code="499"' in name]
        assert [found[name] for name in codes] == [1]
        flows: list[Flow] = []
        while len(flows) < 2:
            flows += (await here.proxy.flows()).records
        assert (flows[1].reason, flows[1].verdict, flows[1].http.path) == (  # type: ignore[union-attr]
            "client_gone",
            "ERROR",
            "/slow/1",
        )
        backend.go_on.set()
        async with paired(world):
            pass
        await logged(here, "/first", 2)
        assert sum(one["path"] == "/slow/1" for one in log_of(here)) == 1

    with_backend(world, test)


def test_a_response_that_breaks_off_is_no_whole_one(world, tmp_path):
    """It is told of by the proxy alone, with what has come of it."""

    async def test(here: Node, backend: Backend) -> None:
        store = FlowStore(Peers())
        passed = PassedBy(world.pin, Path(here.proxy.metrics_dir), store, None)
        passed.start()
        async with paired(world) as own:
            own.writer.write(get("/stalls", "web").encode())
            with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                await own.answer()
        line = await logged(here, "/stalls")
        assert (line["status"], line["bytes_out"], line["reason"]) == (200, 50, "request_timeout")
        assert sum(one.passed.requests for one in passed.counted()) == 0
        passed.close()

    with_backend(world, test, request_timeout_s=0.3)


def log_of(here: Node) -> list[dict[str, object]]:
    return [json.loads(line) for line in here.proxy.access_log().splitlines()]


async def logged(here: Node, path: str, count: int = 1) -> dict[str, object]:
    """The last of so many lines about it."""
    async with asyncio.timeout(5):
        while len(found := [one for one in log_of(here) if one["path"] == path]) < count:
            await asyncio.sleep(0.01)
    return found[-1]


def plainly(flow: Flow) -> Flow:
    """Without what is never the same twice."""
    assert flow.http is not None
    http = msgspec.structs.replace(flow.http, latency_ms=0)
    there = msgspec.structs.replace(flow.destination, labels={}, identity=0)
    source = msgspec.structs.replace(flow.source, labels={}, identity=0)
    return msgspec.structs.replace(
        flow, time=0, http=http, source=source, destination=there, node=""
    )


def test_routes_have_timeouts_past_the_proxy_too(world):

    async def test(here: Node, backend: Backend) -> None:
        key = cluster_key("Service", "default", "web", 80)
        for name, target, status, number in (
            ("request_timeout_ms", "/slow", 504, 1),
            ("backend_timeout_ms", "/slow", 504, 2),
            ("request_timeout_ms", "/stalls", 0, 1),
            ("backend_timeout_ms", "/stalls", 0, 2),
        ):
            reason = name.removesuffix("_ms")
            await change(here, mesh_route("r", rule(to("web"), matches=MATCHES, **{name: 200})))
            async with paired(world) as own:
                counts = Counts(world)
                own.writer.write(get(target, "web").encode())
                if status:
                    assert (await own.answer()).status == status
                else:  # the response has begun
                    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                        await own.answer()
                assert counts.since[0] == 1
                assert await own.ended()
            assert (await logged(here, target, number))["reason"] == reason
        failed = f'weft_upstream_failures_total{{backend="{key}",reason="timeout"}}'
        assert here.proxy.metrics()[failed] == 1

    with_backend(world, test)


def test_timeouts_are_counted_from_when_the_kernel_has_sent_a_request(world):
    """Not from when its response came to the proxy."""

    async def test(here: Node, backend: Backend) -> None:
        for name, reason in (
            ("request_timeout_ms", "request_timeout"),
            ("backend_timeout_ms", "backend_timeout"),
        ):
            await change(here, mesh_route("r", rule(to("web"), matches=MATCHES, **{name: 1000})))
            async with paired(world) as own:
                counts = Counts(world)
                backend.reached.clear()
                backend.go_on.clear()
                own.writer.write(get(f"/held/{name}", "web").encode())
                began = time.monotonic()
                await backend.reached.wait()
                await asyncio.sleep(0.5)
                handed = (time.monotonic() - began) * 1000
                backend.go_on.set()  # its head comes, and nothing else
                with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                    await own.answer()
                assert counts.since == (1, 0, 1)
            line = await logged(here, f"/held/{name}")
            assert (line["status"], line["reason"]) == (200, reason)
            assert handed < line["duration_ms"] < 1000 + handed

    with_backend(world, test)


def test_the_last_request_of_a_connection_is_the_proxy_s(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            for number in range(2, 6):
                message = await own.ask(get(f"/a/{number}", "web"))
                assert (message.header("connection") == "close") == (number == 5)
            assert counts.since[0] == 3
            assert await own.ended()

    with_backend(world, test, max_requests_per_connection=5)


def test_bodies_in_parts_go_past_the_proxy(world):
    """Head and body apart, as most clients send them; what stands behind is another's."""
    size = 40_000
    head = f"PUT /p HTTP/1.1\r\nHost: web\r\nContent-Length: {size}\r\n\r\n".encode()
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            own.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, 1, 1)
            for parts in ((head, body), (head + body[:1], body[1:30_000], body[30_000:])):
                for part in parts:
                    own.writer.write(part)
                    await asyncio.sleep(0.002)
                assert (await own.answer()).body == body
                assert own.delivered
            assert counts.since == (2, 2, 0)
            # Two requests behind the end of the body, one of them denied.
            own.writer.write(head + body[:9])
            await asyncio.sleep(0.002)
            own.writer.write(body[9:] + get("/denied", "web").encode() + get("/a", "web").encode())
            assert (await own.answer()).body == body
            assert (await own.answer()).status == 404
            assert (await own.answer()).body == b"/a"
            assert counts.since == (3, 2, 1)
            await own.pair()
            # An answer before the request is whole: then the connection is over.
            own.writer.write(b"PUT /early HTTP/1.1\r\nHost: web\r\nContent-Length: 9\r\n\r\n1234")
            assert (await own.answer()).body == b"early"
            own.writer.write(b"56789" + get("/denied", "web").encode())
            assert await own.ended()
        async with paired(world) as own:  # by another connection
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            # A body that does not come.
            own.writer.write(head + body[:5])
            assert (await own.answer()).status == 408
            assert await own.ended()
        assert "/denied" not in backend.targets

    with_backend(world, test, body_timeout_s=0.3)


def test_after_very_many_messages_the_rest_goes_through_the_proxy(world):
    size = 3_000
    head = f"PUT /p HTTP/1.1\r\nHost: web\r\nContent-Length: {size}\r\n\r\n".encode()
    body = bytes(range(250)) * (size // 250)

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            for _ in range(2):
                counts = Counts(world)
                assert (await own.ask(get(f"/drips/{size}", "web"))).body == b"d" * size
                assert counts.since == (1, 0, 1)
                await own.pair()
                counts = Counts(world)
                own.writer.write(head)
                for byte in body:
                    await asyncio.sleep(0)
                    own.writer.write(bytes([byte]))
                assert (await own.answer()).body == body
                assert counts.since == (1, 0, 1)
                await own.pair()
            own.writer.write(get("/drips/9999999", "web").encode() + get("/denied", "web").encode())
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
                await own.answer()
                raise AssertionError("the response was not to end")
            assert await own.ended()
        assert backend.targets.count("/p") == 2

    with_backend(world, test)


def test_long_responses_pass_once_there_was_one(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            for _ in range(4):
                assert len((await own.ask(get("/size/1000000", "web"))).body) == 1_000_000
                await own.offered()
            assert counts.since == (4, 3, 1)
            # Beyond what any may have.
            assert len((await own.ask(get("/size/5000000", "web"))).body) == 5_000_000
            assert counts.since == (5, 3, 2)

    with_backend(world, test)


def test_statuses_that_pass(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            for status in (200, 201, 204, 206, 301, 304, 404, 418, 500, 505):
                message = await own.ask(get(f"/status/{status}", "web"))
                assert message.status == status
            assert counts.since == (10, 10, 0)
            # What says how an endpoint fares is the proxy's to know.
            for status in (502, 503, 504):
                assert (await own.ask(get(f"/status/{status}", "web"))).status == status
                await own.pair()
            assert counts.since[2] == 3

    with_backend(world, test)


def test_statuses_that_nobody_has_registered_are_counted_by_class(world):
    """Past the proxy and through it: a backend cannot fill what is counted with its own ones."""
    asked = (200, 203, 226, 231, 263, 299, 308, 309, 390, 418, 451, 452, 499, 511, 512, 599)

    async def test(here: Node, backend: Backend) -> None:
        passed = PassedBy(world.pin, Path(here.proxy.metrics_dir), FlowStore(Peers()), None)
        passed.start()
        here.proxy.merge = passed.merged
        found = []
        for through in (False, True):
            async with paired(world) as own:
                start = await counted(here, len(found) * (len(asked) + 1) + 1)
                counts = Counts(world)
                for status in asked:
                    request = get(f"/status/{status}", "web")
                    if through:
                        own.writer.write(request[:9].encode())
                        await own.offered(stands=False)
                        request = request[9:]
                    assert (await own.ask(request)).status == status
                    await own.offered()
                assert counts.since[1] == (0 if through else len(asked))
                end = await counted(here, (len(found) + 1) * (len(asked) + 1))
            changed = {
                name: end[name] - start.get(name, 0)
                for name in end
                if name.startswith("weft_http_requests_") and end[name] != start.get(name)
            }
            found.append(changed)
        # A connection's first request is through the proxy, and not among them.
        assert found[0] == found[1]
        codes = {re.search('code="(...)"', name): value for name, value in found[0].items()}
        by_code = {one[1]: value for one, value in codes.items() if one is not None}
        assert by_code == dict.fromkeys(("200", "203", "226", "308", "418", "451", "511"), 1) | {
            "2xx": 3,
            "3xx": 2,
            "4xx": 2,
            "5xx": 2,
        }
        passed.close()

    with_backend(world, test)


def test_a_denied_request_behind_a_slow_one_waits_its_turn(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            own.writer.write(get("/slow", "web").encode())
            await backend.reached.wait()
            own.writer.write(get("/denied", "web").encode() + get("/after", "web").encode())
            own.writer.write(get("/again", "web").encode())
            await asyncio.sleep(0.05)  # for an answer that must not come
            assert counts.since[0] == 1
            backend.go_on.set()
            assert (await own.answer()).body == b"/slow"
            assert (await own.answer()).status == 404
            assert (await own.answer()).body == b"/after"
            assert (await own.answer()).body == b"/again"
        assert "/denied" not in backend.targets

    with_backend(world, test)


def test_requests_of_every_form_get_their_own_answers(world):
    """Twice each: on a pair, whatever came of it before."""
    requests: list[tuple[bytes, int, bytes | None]] = [
        (get("/status/204", "web").encode(), 204, b""),
        (get("/status/304", "web").encode(), 304, b""),
        (get("/status/404", "web").encode(), 404, None),
        (get("/status/503", "web").encode(), 503, None),
        (get("/chunked", "web").encode(), 200, b"abc"),
        (get("/parts", "web").encode(), 200, b"/parts"),
        (b"HEAD /size/10 HTTP/1.1\r\nHost: web\r\n\r\n", 200, None),
        (get("/size/70000", "web").encode(), 200, None),
        (get("/size/3000000", "web").encode(), 200, None),
        (get("/denied", "web").encode(), 404, None),
        (get("/a/../x", "web").encode(), 200, b"/x"),
        (get("/other", "other").encode(), 200, b"/other"),
        (b"PUT /p HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\nabc", 200, b"abc"),
        (
            b"PUT /p HTTP/1.1\r\nHost: web\r\nContent-Length: 90000\r\n\r\n" + bytes(90000),
            200,
            bytes(90000),
        ),
        (
            b"PUT /p HTTP/1.1\r\nHost: web\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"3\r\nabc\r\n0\r\nx: y\r\n\r\n",
            200,
            b"abc",
        ),
        (get("/long", "web", "x-long: " + "y" * 7000).encode(), 200, b"/long"),
        (get("/long", "web", "x-long: " + "y" * 8000).encode(), 200, b"/long"),
        (get("/up", "web", "Connection: upgrade", "Upgrade: websocket").encode(), 200, b"/up"),
        (get("/kept", "web", "Connection: keep-alive").encode(), 200, b"/kept"),
        (get("/claims", "web", "X-Forwarded-Client-Cert: me").encode(), 200, b"/claims"),
    ]

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            for request, status, body in requests * 2:
                message = await own.ask(request)
                assert message.status == status, request
                assert body is None or message.body == body, request
                await own.pair()
        assert "/denied" not in backend.targets

    with_backend(world, test)


def test_heads_split_at_every_byte(world):
    request = get("/size/20", "web", "x: y").encode()

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            own.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, 1, 1)
            for at in range(1, len(request)):
                own.writer.write(request[:at])
                await asyncio.sleep(0)
                assert len((await own.ask(request[at:])).body) == 20
                await own.pair()

    with_backend(world, test)


def test_backends_that_close(world):
    async def test(here: Node, backend: Backend) -> None:
        for size in (0, 1, 30, 100):
            async with paired(world) as own:
                own.writer.write(get(f"/close/{size}", "web").encode())
                if not size:
                    assert (await own.answer()).status == 502
                    assert await own.ended()
                else:
                    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionResetError):
                        assert (await own.answer()).status == 502
        for target in ("/bye", "/two", "/twice"):
            async with paired(world) as own:
                message = await own.ask(get(target, "web"))
                if target == "/twice":
                    assert message.status == 502
                else:
                    assert message.body == target.encode()
                await own.pair()  # by another connection
        # One that closes while nothing is asked of it.
        async with paired(world) as own:
            counts = Counts(world)
            assert (await own.ask(get("/close/140", "web"))).body == b"x" * 100
            await own.offered(stands=False)
            await own.pair()
            assert counts.since[0] == 1

    with_backend(world, test)


def test_a_response_may_come_in_parts(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            for _ in range(5):
                assert (await own.ask(get("/body", "web"))).body == b"/body" * 4000
            assert counts.since == (5, 5, 0)
            message = await own.ask(get("/more", "web"))
            assert message.body == b"/more"
            await own.offered(stands=False)
            await own.pair()  # by another connection
        for target in ("/close/90", "/over"):
            async with paired(world) as own:
                own.writer.write(get(target, "web").encode())
                with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
                    await own.answer()

    with_backend(world, test)


def cookie_of(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")


def test_a_backend_that_answers_without_reading_is_sent_no_more_than_by_the_proxy(world):
    """It reads only once nothing more comes, or takes the next connection: all its answers arrive,
    and it never holds much."""
    size, requests = 32_768, 100

    async def run(world: World) -> None:
        loop = asyncio.get_running_loop()
        listener = socket.create_server((NODE, 0))
        listener.setblocking(False)
        async with node(world) as here:
            await configure(here, listener.getsockname()[1])
            async with paired(world, first=False) as own:
                handles = world.handles()
                head = b"PUT /a HTTP/1.1\r\nHost: web\r\nContent-Length: %d\r\n\r\n" % size
                own.writer.write(get("/first", "web").encode())
                backend, _ = await loop.sock_accept(listener)
                cookie = cookie_of(backend)
                await loop.sock_recv(backend, 65536)
                await loop.sock_sendall(backend, ok(b"first"))
                await own.answer()
                most = read = times = 0
                for number in range(1, requests + 1):
                    before = handles.queued(cookie)
                    own.writer.write(head + bytes(size))
                    try:
                        async with asyncio.timeout(0.1):
                            while handles.queued(cookie) < before + size:
                                await asyncio.sleep(0.001)
                    except TimeoutError:
                        times += 1
                        while read < number * size:
                            data = await loop.sock_recv(backend, 65536)
                            read += data.count(0)
                            if not data:
                                backend.close()
                                backend, _ = await loop.sock_accept(listener)
                                cookie = cookie_of(backend)
                                read = (number - 1) * size
                    most = max(most, handles.queued(cookie))
                    await loop.sock_sendall(backend, ok(b"unread"))
                    assert (await own.answer()).body == b"unread"
                # One write is a request, or as much as the proxy receives at once.
                assert 0 < most <= MOST + 65_536
                assert times > 1
                backend.close()
        listener.close()

    scenario(world, run)


def test_the_client_s_end_of_sending_does_not_lose_the_answer(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            own.writer.write(get("/slow", "web").encode())
            own.writer.write_eof()
            await backend.reached.wait()
            await asyncio.sleep(0.02)
            backend.go_on.set()
            assert (await own.answer()).body == b"/slow"
            assert await own.ended()
            assert counts.since[0] == 1

    with_backend(world, test)


def test_a_change_dissolves_all_pairs(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own, paired(world) as other:
            counts = Counts(world)
            other.writer.write(get("/slow", "web").encode())
            await backend.reached.wait()
            await change(here, mesh_route("r", rule(to("web", weight=0))))
            assert (await own.ask(get("/a", "web"))).status == 500
            assert counts.since[0] == 1
            other.writer.write(get("/b", "web").encode())
            backend.go_on.set()
            assert (await other.answer()).body == b"/slow"
            assert (await other.answer()).status == 500
        assert "/a" not in backend.targets
        assert "/b" not in backend.targets

    with_backend(world, test)


def test_what_a_worker_offers_by_a_configuration_of_before_does_not_stand(world):
    """One that hangs, and one that wakes and does not know yet."""

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)
            # The others have another configuration.
            with contextlib.closing(Generation(world.pin)) as generation:
                generation.end_offers(time.monotonic_ns())
            assert (await own.ask(get("/b", "web"))).body == b"/b"
            await own.offered()
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)
            await change(here, {})
            await own.pair()
            counts = Counts(world)
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)

    with_backend(world, test)


def test_what_takes_too_long_is_given_up(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            message = await own.ask(get("/slow", "web"))
            assert message.status == 504
            assert counts.since[0] == 1
            assert await own.ended()

    with_backend(world, test, request_timeout_s=0.3)


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            until = time.monotonic() + 1.5
            asked = 0
            while time.monotonic() < until:
                assert (await own.ask(get("/busy", "web"))).body == b"/busy"
                asked += 1
                await asyncio.sleep(0.05)
            assert counts.since[0] == asked
            assert await own.ended()

    with_backend(world, test, idle_timeout_s=0.8)


def test_a_request_that_is_outstanding_keeps_its_connection_from_being_idle(world):
    """As long as the idle timeout, and longer; then it counts from the answer."""

    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            own.writer.write(get("/slow", "web").encode())
            await backend.reached.wait()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5):
                    await own.reader.read(1)
            backend.go_on.set()
            assert (await own.answer()).body == b"/slow"
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since[0] == 2
            assert await own.ended()

    with_backend(world, test, idle_timeout_s=0.5)


def test_nothing_passes_once_the_worker_is_gone(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            backend.lingers = True
            passed = PassedBy(world.pin, Path(here.proxy.metrics_dir), FlowStore(Peers()), None)
            passed.start()
            for _ in range(3):
                await own.ask(get("/a", "web"))
            here.proxy.process.kill()
            await here.proxy.process.wait()
            # What has passed is counted all the same.
            assert sum(one.passed.requests for one in passed.counted()) == 3
            passed.close()
            before = len(backend.targets)
            counts = Counts(world)
            own.writer.write(get("/a", "web").encode())
            assert await own.ended()
            assert counts.since == (0, 0, 0)
            assert len(backend.targets) == before
            backend.go_on.set()

    with_backend(world, test)


def allowed(*rules: policies.PolicyRule) -> dict[str, Section]:
    return policies.policy("web-0", NODE, 300, ingress=policies.closed(*rules))


def test_policies_judge_every_request(world):
    readers = policies.rule("get", 301, http=policies.http(method="GET", path="/(first|a|slow)"))
    others = policies.rule("other", 301, http=policies.http(method="GET", path="/(first|b)"))
    header = (HeaderRule("x-a", "2", "DENY"),)
    named = policies.rule("named", 301, http=policies.http(path="/size/3", headers=header))

    async def test(here: Node, backend: Backend) -> None:
        await change(here, allowed(readers, named))
        async with paired(world) as own:
            counts = Counts(world)
            assert (await own.ask(get("/size/3", "web", "x-a: 2"))).status == 200
            assert counts.since == (1, 1, 0)
            for twice in (("x-a: 2", "X-A: evil"), ("x-a: evil", "x-a: 2"), ("x-a: 2", "x-a: 2")):
                assert (await own.ask(get("/size/3", "web", *twice))).status == 403
                await own.pair()
            for _ in range(3):
                counts = Counts(world)
                assert (await own.ask(get("/a", "web"))).body == b"/a"
                assert counts.since == (1, 1, 0)
                assert (await own.ask(get("/b", "web"))).status == 403
                assert (await own.ask("DELETE /a HTTP/1.1\r\nHost: web\r\n\r\n")).status == 403
                await own.pair()
            # A slow one, a refused one behind it, and then another policy.
            own.writer.write(get("/slow", "web").encode() + get("/b", "web").encode())
            await asyncio.sleep(0.01)
            own.writer.write(get("/a", "web").encode())
            backend.go_on.set()
            assert [(await own.answer()).status for _ in range(3)] == [200, 403, 200]
            await own.pair()
            await change(here, allowed(others))
            counts = Counts(world)
            assert (await own.ask(get("/a", "web"))).status == 403
            assert (await own.ask(get("/b", "web"))).status == 200
            await own.pair()
            assert (await own.ask(get("/b", "web"))).status == 200
            assert counts.since[0] >= 1
            # Without a policy everything passes; with one for others nothing does.
            await change(here, {}, (policy_key("shop", "web-0"),))
            assert (await own.ask(get("/size/9", "web"))).status == 200
            await own.pair()
            await change(here, allowed(policies.rule("get", 999)))
            assert (await own.ask(get("/first", "web"))).status == 403
        assert {"/b", "/size/9"} <= set(backend.targets)

    with_backend(world, test)


def test_both_ends_have_valid_identities_or_nothing_passes(world):
    authority = Authority("cluster.local")

    async def test(here: Node, backend: Backend) -> None:
        until = time.time() + 2.5
        await change(
            here,
            authority.svid(FRONT) | authority.svid(SHOP, life(2.5)) | authority.bundle(),
        )
        async with paired(world) as own:
            counts = Counts(world)
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)
            while time.time() < until:  # it expires by the clock
                await asyncio.sleep(0.05)
            for _ in range(3):
                assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)
            await change(here, authority.svid(SHOP))
            await own.pair()
            await change(here, {}, (svid_key(FRONT),))
            for _ in range(3):
                assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)

    with_backend(world, test)


def test_an_endpoint_that_leaves_gets_no_more_requests(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            counts = Counts(world)
            own.writer.write(get("/slow", "web").encode())
            await backend.reached.wait()
            other = Backend()
            async with served(other) as port:
                here.world.frontend(NODE, port, EntryBackend(NODE, port, sockmap=True), http=True)
                key = cluster_key("Service", "default", "web", 80)
                await change(here, {key: ClusterSection((Endpoint(NODE, port, "web-0"),))})
                backend.go_on.set()
                assert (await own.answer()).body == b"/slow"
                before = len(backend.targets)
                for _ in range(5):
                    assert (await own.ask(get("/a", "web"))).body == b"/a"
                assert (len(backend.targets), len(other.targets)) == (before, 5)
            assert counts.since[0] >= 1

    with_backend(world, test)


def test_what_was_chosen_before_a_change_is_not_offered_after_it(world):
    """The response to a request that was under way meanwhile, through the proxy or past it."""

    async def test(here: Node, backend: Backend) -> None:
        key = cluster_key("Service", "default", "web", 80)
        own = ClusterSection((Endpoint(NODE, here.own_port, "web-0"),))  # type: ignore[attr-defined]
        for first, target in ((False, "/slow"), (True, "/slow"), (True, "/late")):
            backend.go_on.clear()
            backend.reached.clear()
            async with paired(world, first=first) as client:
                client.writer.write(get(target, "web").encode())
                await backend.reached.wait()
                await change(here, {key: ClusterSection(())})
                backend.go_on.set()
                assert (await client.answer()).status == 200
                assert (await client.ask(get("/a", "web"))).status == 503
                assert "/a" not in backend.targets
                await change(here, {key: own})

    with_backend(world, test)


@contextlib.asynccontextmanager
async def second(here: Node) -> AsyncIterator[tuple[Backend, dict[str, Section]]]:
    """Service shop/second's backend, and the sections for it."""
    other = Backend()
    async with served(other) as port:
        own = EntryBackend(NODE, port, sockmap=True)
        here.world.frontend(NODE, port, own, http=True, sockmap=True)
        section = ClusterSection((Endpoint(NODE, port, "web-0"),))
        yield other, {cluster_key("Service", "default", "second", 80): section}


def test_several_endpoints_get_their_shares(world):
    """Request by request, over one connection, and nearly all past the proxy."""

    async def test(here: Node, backend: Backend) -> None:
        async with second(here) as (other, put):
            key, own_port = cluster_key("Service", "default", "web", 80), here.own_port  # type: ignore[attr-defined]
            (its,) = next(iter(put.values())).endpoints  # type: ignore[union-attr]
            both = ClusterSection((Endpoint(NODE, own_port, "web-0"), its))
            await change(here, {key: both})

            async def share(requests: int) -> tuple[int, int]:
                """How many go to the other one, and how often another one is next."""
                taken, turns, last = 0, 0, False
                for _ in range(requests):
                    before = len(other.targets)
                    assert (await own.ask(get("/a", "web"))).body == b"/a"
                    await own.offered()
                    is_other = len(other.targets) > before
                    taken, turns, last = taken + is_other, turns + (is_other != last), is_other
                return taken, turns

            counts = Counts(world)
            async with paired(world) as own:
                taken, turns = await share(600)
            # Nine standard deviations, and some.
            assert 185 < taken < 415, taken
            assert turns > 185, turns
            assert counts.since[0] > 550
            weighted = rule(to("web", 1), to("second", 3), matches=MATCHES)
            await change(here, {key: ClusterSection(both.endpoints[:1])} | put)
            await change(here, mesh_route("r", weighted))
            counts = Counts(world)
            async with paired(world) as own:
                taken, turns = await share(2_000)
            assert 1_320 < taken < 1_680, taken
            assert turns > 550, turns
            assert counts.since[0] > 1_950
            # What the proxy alone can reach has its share too.
            (key,) = put
            await change(here, {key: ClusterSection((Endpoint(NODE, its.port),))})
            counts = Counts(world)
            async with paired(world, first=False) as own:
                before = len(backend.targets)
                while len(backend.targets) == before:  # its connection is one that can be held
                    await own.ask(get("/a", "web"))
                taken, _ = await share(800)
            assert 490 < taken < 710, taken
            assert 90 < counts.since[0] < 310

    with_backend(world, test)


def test_the_last_connection_that_an_endpoint_may_have_is_held_from_nobody(world):
    """Two rules lead to it, one after the other."""

    async def test(here: Node, backend: Backend) -> None:
        paths = [RouteMatch(PathMatch("PathPrefix", one)) for one in ("/b", "/")]
        own_port = here.own_port  # type: ignore[attr-defined]
        key = cluster_key("Service", "default", "web", 80)
        one = ClusterSection((Endpoint(NODE, own_port, "web-0"),), max_connections_per_endpoint=1)
        rules = [rule(to("web"), matches=(path,)) for path in paths]
        await change(here, mesh_route("r", *rules) | {key: one})
        async with paired(world) as own:
            counts = Counts(world)
            for path in ("/b", "/b", "/a", "/a"):
                assert (await own.ask(get(path, "web"))).body == path.encode()
                await own.offered()
            assert counts.since == (3, 3, 0)

    with_backend(world, test, connect_timeout_s=1)


def test_several_rules_pass_over_one_connection_to_an_endpoint(world):
    """Each with its own timeout, and counted for itself."""
    names = ("/slow", "/b", "/first", "/")

    async def test(here: Node, backend: Backend) -> None:
        rules = [
            rule(
                to("web"),
                matches=(RouteMatch(PathMatch("PathPrefix", name)),),
                request_timeout_ms=500 if name == "/slow" else None,
            )
            for name in names
        ]
        await change(here, mesh_route("r", *rules))
        passed = PassedBy(world.pin, Path(here.proxy.metrics_dir), FlowStore(Peers()), None)
        passed.start()
        backend.go_on.set()
        async with paired(world) as own:
            for path in ("/slow", "/b", "/a"):
                assert (await own.ask(get(path, "web"))).body == path.encode()
                await own.offered()
            counts = Counts(world)
            for number in range(30):
                for path in ("/a", "/b", "/slow", "/first"):
                    target = f"{path}/{number}"
                    assert (await own.ask(get(target, "web"))).body == target.encode()
            assert counts.since == (120, 120, 0)
            by_rule = Counter[str]()
            for one in passed.counted():
                by_rule[one.series.rule] += one.passed.requests
            assert by_rule == dict.fromkeys("0123", 30)
            # What comes to the proxy in between changes nothing.
            assert (await own.ask(get("/chunked", "web"))).body == b"abc"
            await own.offered()
            own.writer.write(get("/b", "web").encode()[:9])
            await own.offered(stands=False)
            assert (await own.ask(get("/b", "web")[9:])).body == b"/b"
            await own.offered()
            counts = Counts(world)
            for path in ("/a", "/b", "/slow", "/first"):
                assert (await own.ask(get(path, "web"))).body == path.encode()
            assert counts.since == (4, 4, 0)
            backend.go_on.clear()
            assert (await own.ask(get("/slow", "web"))).status == 504
            assert counts.since[0] == 5
        passed.close()

    with_backend(world, test)


def test_a_connection_that_others_wait_for_is_held_no_longer(world):
    """Two clients' connections, and the endpoint may have one."""

    async def test(here: Node, backend: Backend) -> None:
        own_port = here.own_port  # type: ignore[attr-defined]
        endpoints = (Endpoint(NODE, own_port, "web-0"),)
        one = ClusterSection(endpoints, max_connections_per_endpoint=1)
        await change(here, {cluster_key("Service", "default", "web", 80): one})
        async with paired(world) as own, paired(world) as other:
            counts = Counts(world)
            for asker in (other, own, other):
                for _ in "ab":
                    assert (await asker.ask(get("/a", "web"))).body == b"/a"
                    await asker.offered()
            assert counts.since == (4, 4, 0)
            # A request that is under way is answered first.
            other.writer.write(get("/slow", "web").encode())
            await backend.reached.wait()
            own.writer.write(get("/a", "web").encode())
            await other.offered(stands=False)
            backend.go_on.set()
            assert (await other.answer()).body == b"/slow"
            assert (await own.answer()).body == b"/a"

    with_backend(world, test, connect_timeout_s=1)


def test_a_connection_that_others_waited_for_before_is_not_held(world):
    """While it was busy with the first request of who would hold it."""

    async def test(here: Node, backend: Backend) -> None:
        own_port = here.own_port  # type: ignore[attr-defined]
        endpoints = (Endpoint(NODE, own_port, "web-0"),)
        one = ClusterSection(endpoints, max_connections_per_endpoint=1)
        key = cluster_key("Service", "default", "web", 80)
        await change(here, {key: one})
        async with paired(world, first=False) as own, paired(world, first=False) as other:
            own.writer.write(get("/slow", "web").encode())
            await backend.reached.wait()
            other.writer.write(get("/a", "web").encode())
            pending = f'weft_upstream_pending_requests{{backend="{key}"}}'
            await here.proxy.metric(pending, lambda value: value == 1)
            backend.go_on.set()
            assert (await own.answer()).body == b"/slow"
            async with asyncio.timeout(5):
                assert (await other.answer()).body == b"/a"
            await other.offered()

    with_backend(world, test)


def test_what_an_endpoint_fares_by_is_its_own(world):
    """One of two fails, and is left alone for a while although the other one answers."""

    async def test(here: Node, backend: Backend) -> None:
        async with second(here) as (other, put):
            other.fails = True
            (its,) = next(iter(put.values())).endpoints  # type: ignore[union-attr]
            both = (Endpoint(NODE, here.own_port, "web-0"), its)  # type: ignore[attr-defined]
            await change(here, {cluster_key("Service", "default", "web", 80): ClusterSection(both)})
            async with paired(world, first=False) as own:
                for _ in range(100):
                    await own.ask(get("/a", "web"))
                    await own.offered()
            # When it has failed for the last time an offer may stand already.
            assert len(other.targets) in (12, 13)
            assert len(backend.targets) + len(other.targets) == 100

    with_backend(world, test, ejection_failures=12, ejection_time_s=60)


def test_a_backend_that_answers_again_has_not_failed_in_a_row(world):
    """Past the proxy, and whatever the request behind that comes to."""

    async def test(here: Node, backend: Backend) -> None:
        async with second(here) as (other, put):
            (its,) = next(iter(put.values())).endpoints  # type: ignore[union-attr]
            both = (Endpoint(NODE, here.own_port, "web-0"), its)  # type: ignore[attr-defined]
            await change(here, {cluster_key("Service", "default", "web", 80): ClusterSection(both)})
            async with paired(world) as own:
                for _ in range(8):
                    assert (await own.ask(get("/status/503", "web"))).status == 503
                    await own.offered()
                    for _ in range(12):
                        assert (await own.ask(get("/a", "web"))).status == 200
                        await own.offered()
                    assert (await own.ask(get("/denied", "web"))).status == 404
                    await own.offered()
                before = len(backend.targets), len(other.targets)
                for _ in range(60):
                    assert (await own.ask(get("/a", "web"))).status == 200
                    await own.offered()
            now = len(backend.targets), len(other.targets)
            assert all(one - was > 5 for one, was in zip(now, before, strict=True))

    with_backend(world, test, ejection_failures=2, ejection_time_s=60)


def test_what_is_held_is_let_go_when_its_endpoint_leaves(world):
    """While another one serves a request for long."""

    async def test(here: Node, backend: Backend) -> None:
        async with second(here) as (other, put):
            paths = [RouteMatch(PathMatch("PathPrefix", one)) for one in ("/b", "/")]
            rules = (rule(to("second"), matches=paths[:1]), rule(to("web"), matches=paths[1:]))
            await change(here, put | mesh_route("r", *rules))
            async with paired(world) as own:
                assert (await own.ask(get("/b", "web"))).body == b"/b"
                await own.offered()
                slow = get("/slow", "web")
                own.writer.write(slow[:9].encode())
                await own.offered(stands=False)
                own.writer.write(slow[9:].encode())
                await backend.reached.wait()
                assert not other.ended.is_set()
                await change(here, dict.fromkeys(put, ClusterSection(())))
                async with asyncio.timeout(5):
                    await other.ended.wait()
                backend.go_on.set()
                assert (await own.answer()).body == b"/slow"

    with_backend(world, test)


def test_a_client_that_goes_while_the_proxy_takes_over(world):
    async def test(here: Node, backend: Backend) -> None:
        async with paired(world) as own:
            own.writer.write(get("/slow", "web").encode())
            await backend.reached.wait()
            own.writer.write(get("/a", "web").encode())
            await own.offered(stands=False)
            sock = own.writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
        assert backend.reader is not None
        async with asyncio.timeout(5):
            while not backend.reader.at_eof():
                await asyncio.sleep(0.001)
        backend.go_on.set()
        async with paired(world):
            pass  # the worker serves others, and nothing has failed: see its `stop`

    with_backend(world, test)


def test_what_is_left_of_sockets_that_are_gone_is_swept_away(world):
    """And of no others; a map that is full of it lets nothing pass, and loses nothing."""

    async def test(here: Node, backend: Backend) -> None:
        leftovers = passed_maps.Leftovers(world.pin)
        exchanges = maps.PinnedMap(world.pin, "exchanges", Number, Exchange)
        leftovers.sweep()
        leftovers.sweep()
        async with paired(world) as own:
            async with paired(world) as other:
                leftovers.sweep()
                assert leftovers.sweep() == 0
            assert exchanges.get(Number(other.cookie)) is not None
            async with asyncio.timeout(5):
                while leftovers.sweep() == 0:
                    await asyncio.sleep(0.01)
            assert exchanges.get(Number(other.cookie)) is None
            counts = Counts(world)
            assert (await own.ask(get("/a", "web"))).body == b"/a"
            assert counts.since == (1, 1, 0)
            with contextlib.suppress(OSError):
                exchanges.put_all((Number(one), EMPTY) for one in range(1, EXCHANGES_MAX + 1))
            async with paired(world, first=False) as other:
                for _ in range(3):
                    assert (await other.ask(get("/b", "web"))).body == b"/b"
            assert counts.since == (1, 1, 0)
            leftovers.sweep()
            assert leftovers.sweep() > EXCHANGES_MAX / 2
            async with paired(world):
                pass
        exchanges.close()
        leftovers.close()

    with_backend(world, test)


def test_a_request_whose_client_is_gone_is_told_of_however_long_it_takes(world):
    """What is swept away meanwhile is not what tells of it."""

    async def test(here: Node, backend: Backend) -> None:
        leftovers = passed_maps.Leftovers(world.pin)
        exchanges = maps.PinnedMap(world.pin, "exchanges", Number, Exchange)
        async with paired(world) as own:
            own.writer.write(get("/slow/1", "web").encode())
            await backend.reached.wait()
        await own.offered(stands=False)
        for _ in range(3):
            leftovers.sweep()
        assert exchanges.get(Number(own.cookie)) is not None
        backend.go_on.set()
        await logged(here, "/slow/1")
        async with asyncio.timeout(5):
            while exchanges.get(Number(own.cookie)) is not None:
                leftovers.sweep()
                await asyncio.sleep(0.01)
        exchanges.close()
        leftovers.close()

    with_backend(world, test)


def test_a_backend_s_socket_from_before_the_programs_answers_too(world):
    """They are attached once the self-test has passed, which need not be its first try."""

    async def test(here: Node, backend: Backend) -> None:
        attach.detach_pairs(world.pin)
        async with paired(world, first=False) as own:
            assert (await own.ask(get("/a", "web"))).body == b"/a"
        attach.attach_pairs(world.pin)
        counts = Counts(world)
        async with paired(world) as own:
            message = await own.ask(get("/b", "web"))
            assert message.body == b"/b"
            assert ("connection", "close") in message.headers
            assert await own.ended()
        assert counts.since == (1, 0, 0)
        await logged(here, "/b")
        async with paired(world) as own:
            assert (await own.ask(get("/a", "web"))).body == b"/a"
        assert counts.since == (2, 1, 0)

    with_backend(world, test)


def test_an_offer_to_another_socket_is_none(world):
    """Its memory may have become another's between being found and being read."""

    async def test(here: Node, backend: Backend) -> None:
        pairs = maps.PinnedMap(world.pin, "pairs", Number, Pair)
        with contextlib.closing(pairs):
            async with paired(world) as own:
                counts = Counts(world)
                key = Number(own.cookie)
                pair = pairs.get(key)
                assert pair is not None
                pairs.put(key, pair._replace(client=pair.client + 1))
                assert (await own.ask(get("/a", "web"))).body == b"/a"
                assert counts.since == (0, 0, 0)

    with_backend(world, test)


def test_rules_with_backends_of_their_own_pass_over_one_connection(world):
    """Then the one is removed, and the other one goes on; and what it could say stays unheard."""

    async def test(here: Node, backend: Backend) -> None:
        async with second(here) as (other, put):
            paths = [RouteMatch(PathMatch("PathPrefix", one)) for one in ("/b", "/")]
            rest = rule(to("web"), matches=(paths[1],))
            own_rules = (rule(to("second"), matches=(paths[0],)), rest)
            await change(here, put | mesh_route("r", *own_rules))
            async with paired(world) as own:
                assert (await own.ask(get("/b/0", "web"))).body == b"/b/0"
                await own.offered()
                counts = Counts(world)
                for number in range(50):
                    for path in ("/a", "/b"):
                        target = f"{path}/{number}"
                        assert (await own.ask(get(target, "web"))).body == target.encode()
                assert counts.since == (100, 100, 0)
                assert len(other.targets) == 51
                assert {target[:2] for target in other.targets} == {"/b"}
                # Who was not asked speaks while another's response is due.
                assert other.writer is not None
                own.writer.write(get("/slow", "web").encode())
                await backend.reached.wait()
                other.writer.write(ok(b"smuggled"))
                await own.offered(stands=False)
                backend.go_on.set()
                assert (await own.answer()).body == b"/slow"
                for path in ("/a", "/b", "/b", "/a"):
                    assert (await own.ask(get(path, "web"))).body == path.encode()
                await own.offered()
                # And while none is.
                other.writer.write(ok(b"smuggled"))
                await own.offered(stands=False)
                for path in ("/a", "/b", "/b", "/a"):
                    assert (await own.ask(get(path, "web"))).body == path.encode()
                await own.offered()
                counts = Counts(world)
                for path in ("/a", "/b"):
                    assert (await own.ask(get(path, "web"))).body == path.encode()
                assert counts.since == (2, 2, 0)
                await change(here, mesh_route("r", rest))
                before = len(other.targets)
                assert (await own.ask(get("/b", "web"))).body == b"/b"
                assert len(other.targets) == before

    with_backend(world, test)


def test_smuggling(world):
    """Published attacks, on a pair: the backend gets nothing that was not judged."""
    path = Path(__file__).parents[2] / "shared" / "http" / "smuggling-requests.json"
    if not path.exists():
        pytest.skip("../shared/http is not there")
    attacks = [base64.b64decode(text) for text in json.loads(path.read_text())]

    async def test(here: Node, backend: Backend) -> None:
        for attack in attacks:
            async with paired(world) as own:
                own.writer.write(attack)
                own.writer.write_eof()
                with contextlib.suppress(ConnectionResetError):
                    await own.reader.read()
        # The routes let nothing else pass.
        expected = re.compile(f"/({_PATHS})(/.*)?")
        assert [one for one in backend.targets if not expected.fullmatch(one)] == []

    with_backend(world, test)


def test_rules_of_one_label_over_one_connection_have_their_own_timeouts(world):
    """One that is named as another one is numbered."""

    async def test(here: Node, backend: Backend) -> None:
        slow, rest = (RouteMatch(PathMatch("PathPrefix", one)) for one in ("/slow", "/"))
        rules = (
            rule(to("web"), matches=(slow,), request_timeout_ms=300, name="1"),
            rule(to("web"), matches=(rest,)),
        )
        await change(here, mesh_route("r", *rules))
        backend.go_on.set()
        async with paired(world) as own:
            assert (await own.ask(get("/slow", "web"))).body == b"/slow"
            await own.offered()
            backend.go_on.clear()
            async with asyncio.timeout(5):
                assert (await own.ask(get("/slow", "web"))).status == 504

    with_backend(world, test)
