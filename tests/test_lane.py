"""The fast lane against the exchange, through the same proxy over real sockets: what client,
backend, log, flows and metrics see must be the same, whatever backends answer and clients ask."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import re
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from prometheus_client import REGISTRY
from support.http1 import raw_backend, reset, shutdown
from support.mesh import MeshProxy, connected, mesh_proxy, mesh_route, service
from support.policy import closed, http, pod, policy
from support.policy import rule as policy_rule
from support.proxy import (
    certificate,
    client_context,
    cluster,
    get,
    http_port,
    https_port,
    read_message,
    route,
    rule,
    to,
)
from test_http1_hostile import SMUGGLING
from test_mesh_flows import agent_of

from certs.selfsigned import Authority
from l7proxy import native
from l7proxy.lanes import WORTH
from l7proxy.tasks import spawn
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import ClusterSection, Endpoint, Section, Settings
from mesh.model.routeconfig import PathMatch, RouteMatch, ValueMatch
from mesh.model.section import SETTINGS_KEY, SectionKey, cluster_key, policy_key, workload_key

pytestmark = pytest.mark.skipif(bool(native.available()), reason=native.available())

ME, WEB = 300, 301
AUTHORITY = Authority.create("test")
# Only the exchange counts the requests of a connection.
SLOW = Settings(max_requests_per_connection=1_000_000)
DATE = b"Date: Thu, 26 Nov 2026 03:36:24 GMT\r\n"


def answered(
    *fields: bytes, body: bytes = b"", status: bytes = b"200 OK", date: bytes = DATE
) -> bytes:
    lines = b"".join(field + b"\r\n" for field in fields)
    return b"HTTP/1.1 %b\r\n%b%b\r\n%b" % (status, date, lines, body)


def sized(body: bytes, *fields: bytes, **rest: bytes) -> bytes:
    return answered(b"Content-Length: %d" % len(body), *fields, body=body, **rest)


class Script(NamedTuple):
    """What a backend sends for one path, piece by piece, and whether it closes then."""

    pieces: tuple[bytes, ...]
    close: bool = False


PLAIN = sized(b"plain")
ENDLESS = 32 * 2**20
CHUNKS = b"2\r\nok\r\n0\r\nX-T: 1\r\n\r\n"
LARGE = sized(b"x" * 300_000)
SCRIPTS = {
    "plain": Script((PLAIN,)),
    "empty": Script((sized(b""),)),
    "body-later": Script((PLAIN[:-5], PLAIN[-5:])),
    "body-in-bits": Script((PLAIN[:-3], PLAIN[-3:-2], PLAIN[-2:-1], PLAIN[-1:])),
    "head-in-bits": Script(tuple(PLAIN[i : i + 1] for i in range(len(PLAIN)))),
    "large": Script((LARGE,)),
    "no-date": Script((sized(b"plain", date=b""),)),
    "kept": Script((sized(b"plain", b"Connection: keep-alive", b"Keep-Alive: timeout=5"),)),
    "kept-without-date": Script((sized(b"plain", b"Keep-Alive: timeout=5", b"X-A: b", date=b""),)),
    "two-keep-alives": Script((sized(b"plain", b"Keep-Alive: a", b"Keep-Alive: b"),)),
    "no-content": Script((answered(status=b"204 No Content"),)),
    "no-content-0": Script((sized(b"", status=b"204 No Content"),)),
    "not-modified": Script((answered(b"Content-Length: 7", status=b"304 Not Modified"),)),
    "reset-content": Script((sized(b"", status=b"205 Reset Content"),)),
    "not-found": Script((sized(b"no", status=b"404 Not Found"),)),
    "unavailable": Script((sized(b"no", status=b"503 Service Unavailable"),)),
    "no-phrase": Script((b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok",)),
    "opaque": Script((sized(b"ok", b"X-Opaque: \xe4\xff\t."),)),
    "interim": Script((b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" + PLAIN,)),
    "chunked": Script((answered(b"Transfer-Encoding: chunked", body=CHUNKS),)),
    "trailer": Script((sized(b"ok", b"Trailer: X-T"),)),
    "until-close": Script((answered(body=b"all"),), close=True),
    "says-close": Script((sized(b"plain", b"Connection: close"),), close=True),
    "names-a-field": Script((sized(b"plain", b"Connection: X-Hop", b"X-Hop: 1"),)),
    "old": Script((b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",), close=True),
    "surplus": Script((PLAIN + b"HTTP/1.1 200 OK\r\n",)),
    "surplus-later": Script((PLAIN[:-2], PLAIN[-2:] + b"more")),
    "short": Script((PLAIN[:-2],), close=True),
    "short-head": Script((PLAIN[:30],), close=True),
    "nothing": Script((), close=True),
    "two-lengths": Script((answered(b"Content-Length: 2", b"Content-Length: 3", body=b"okk"),)),
    "signed-length": Script((answered(b"Content-Length: +2", body=b"ok"),)),
    "folded": Script((answered(b"X-A: b", b" c", b"Content-Length: 2", body=b"ok"),)),
    "bare-lf": Script((b"HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nok",)),
    "blank-name": Script((answered(b"X-A : b", b"Content-Length: 2", body=b"ok"),)),
    "control": Script((sized(b"ok", b"X-A: \x01"),)),
    "nonsense": Script((b"SSH-2.0-x\r\n\r\n",)),
    "many-fields": Script((sized(b"ok", *(b"X-%d: y" % i for i in range(120))),)),
    "upgrade": Script((sized(b"ok", b"Upgrade: h2c"),)),
}  # fmt: skip


class Backend:
    """Answers by script; `heads` are the raw heads that came."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.connections = 0
        self.bodies: list[bytes] = []
        self.port = 0
        self.gate = asyncio.Event()
        self.begun = b""
        self.gone = False
        self.sent = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            self.heads.append(head)
            if (length := re.search(rb"\r\ncontent-length: *(\d+)", head.lower())) is not None:
                self.bodies.append(await reader.readexactly(int(length[1])))
            name = head.split()[1].partition(b"?")[0].strip(b"/").decode()
            if name == "gated":
                await self._answer_later(reader, writer)
                continue
            if name == "nothing-once" and len(self.bodies) == 2:
                return
            if name == "endless":
                await self._answer_at_length(writer)
                continue
            script = SCRIPTS.get(name, SCRIPTS["plain"])
            for piece in script.pieces:
                if head.startswith(b"HEAD "):
                    piece = piece[: piece.find(b"\r\n\r\n") + 4]
                writer.write(piece)
                await writer.drain()
                # Each by itself: the proxy has seen it before the next comes.
                for _ in range(6 if len(script.pieces) > 1 else 0):
                    await asyncio.sleep(0)
            if script.close:
                return

    async def _answer_later(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(self.begun)
        waiting = spawn(self.gate.wait(), name="gate")
        ending = spawn(reader.read(1), name="end")
        await asyncio.wait((waiting, ending), return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        waiting.cancel()
        await asyncio.wait((waiting, ending))
        self.gone = not ending.cancelled()
        if self.gone:
            raise ConnectionResetError
        writer.write(PLAIN[len(self.begun) :])

    async def _answer_at_length(self, writer: asyncio.StreamWriter) -> None:
        writer.write(answered(b"Content-Length: %d" % ENDLESS))
        for _ in range(ENDLESS // 2**16):
            writer.write(bytes(2**16))
            await writer.drain()
            self.sent += 2**16


class Seen(NamedTuple):
    answers: list[Any]
    heads: list[Any]
    bodies: list[bytes]
    log: list[dict[str, Any]]
    flows: list[Any]
    counted: dict[tuple[str, tuple[tuple[str, str], ...]], float]


def sections(port: int) -> dict[SectionKey, Section]:
    """Routes and policies about requests, on both sides."""
    by_header = RouteMatch(headers=(ValueMatch("Exact", "x-route", "other"),))
    rules = (
        rule(to("web"), matches=(by_header,)),
        rule(to("pods"), matches=(RouteMatch(PathMatch("PathPrefix", "/")),)),
    )
    first = http(method="GET|HEAD|POST", path="/[a-z0-9-]*")
    return {
        **service(producers=True),
        **cluster("web", port),
        cluster_key("Service", "default", "pods", 80): ClusterSection(
            (Endpoint("127.0.0.1", port, "shop/web"),)
        ),
        **mesh_route("r", *rules),
        **route("outside", *rules),
        **pod("client", "127.0.1.1", ME),
        **pod("web", "127.0.0.1", WEB),
        **policy(
            "web",
            "127.0.0.1",
            WEB,
            ingress=closed(
                policy_rule("first", ME, int(Reserved.INGRESS), http=first),
                policy_rule("second", ME, http=http(method="DELETE")),
            ),
        ),
    }


def counters() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in REGISTRY.collect()
        for sample in family.samples
        if family.name.startswith("weft_")
        and not sample.name.endswith(("_created", "_sum", "_bucket", "connections"))
    }


@contextlib.asynccontextmanager
async def scene(
    *, fast: bool, door: str = "mesh", **more: Any
) -> AsyncIterator[tuple[MeshProxy, int, Backend]]:
    """A proxy whose lanes are open, or without any. `door`: which of its ports is asked, the
    mesh's, a Gateway's, or one with TLS."""
    backend = Backend()
    async with raw_backend(backend) as port, mesh_proxy() as mesh:
        backend.port = port
        settings = Settings(**more) if fast else Settings(**more, max_requests_per_connection=10**6)
        listening = mesh.serve(sections(port), {SETTINGS_KEY: settings})
        if door != "mesh":
            listening = mesh.listen_outside()
            put = http_port(listening)
            if door == "tls":
                put = https_port(listening) | certificate(AUTHORITY, "web")
            assert mesh.apply(put) == {}
        async with connected(listening, **client(door)) as (reader, writer):
            for _ in range(1000):
                writer.write(get("/plain", "web").encode())
                await read_message(reader)
                if backend.heads[-1].startswith(b"GET /plain HTTP/1.1\r\nHost:") is fast and (
                    len(backend.heads) > WORTH + 1
                ):
                    break
                await asyncio.sleep(0.001)
            else:
                raise AssertionError("the lane did not open")
        yield mesh, listening, backend


def client(door: str) -> dict[str, Any]:
    """What a client of it is besides."""
    if door != "tls":
        return {}
    return {"ssl": client_context(AUTHORITY), "server_hostname": "web"}


async def conversation(request: bytes, port: int, door: str) -> Any:
    """What the client gets: a first answer, so that there is a connection to the backend, the one
    to `request`, and, if the connection goes on, one to another."""
    seen: list[Any] = []
    async with connected(port, **client(door)) as (reader, writer):
        for one in (get("/plain", "web").encode(), request, get("/plain", "web").encode()):
            writer.write(one)
            while True:
                try:
                    bodiless = one.startswith(b"HEAD ") or b" /not-modified" in one
                    message = await read_message(reader, head_only=bodiless)
                except (ConnectionError, asyncio.IncompleteReadError) as error:
                    partial = getattr(error, "partial", b"")
                    seen.append(("broken off", partial))
                    message = None
                if message is None:
                    return seen
                left_out = {("connection", "keep-alive")}
                fields = {(name.lower(), value) for name, value in message.headers} - left_out
                dated = any(name == "date" for name, _ in fields)
                fields = {one for one in fields if one[0] != "date"}
                seen.append((message.status, sorted(fields), dated, message.body))
                if message.status >= 200:
                    break
    return seen


async def observe(requests: list[bytes], *, fast: bool, door: str) -> Seen:
    async with scene(fast=fast, door=door) as (mesh, port, backend), agent_of(mesh) as agent:
        before = counters()
        backend.heads.clear()
        answers = []
        for request in requests:
            try:
                async with asyncio.timeout(2):
                    answers.append(await conversation(request, port, door))
            except TimeoutError:
                raise AssertionError((fast, request)) from None
        await asyncio.sleep(0)
        counted = {key: value - before.get(key, 0) for key, value in counters().items()}
        total = sum(value for key, value in counted.items() if key[0].endswith("requests_total"))
        flows = await agent.records(int(total))
        log = (await mesh.close())[-int(total) :]
    for line in log:
        for name in ("time", "duration_ms", "endpoint", "request_id"):
            line.pop(name, None)
    return Seen(
        answers,
        [read(head) for head in backend.heads],
        backend.bodies,
        log,
        [told(flow) for flow in flows],
        {key: value for key, value in counted.items() if value},
    )


def read(head: bytes) -> Any:
    line, *fields = head[:-4].split(b"\r\n")
    split = [field.partition(b":") for field in fields]
    fields = sorted((name.lower(), value.strip()) for name, _, value in split)
    told = {
        b"x-forwarded-port": rb"\d+",  # another each time
        b"x-request-id": rb"[0-9a-f]{32}",
    }
    return line, [
        (name, b"*" if name in told and re.fullmatch(told[name], value) else value)
        for name, value in fields
        if (name, value) != (b"connection", b"Keep-Alive")
    ]


def told(flow: Any) -> Any:
    http = flow.http
    return (
        flow.verdict, flow.source.address, flow.destination.pod, flow.reason, flow.service,
        flow.gateway, flow.route, flow.policy, flow.encryption, http.method, http.host, http.path,
        http.status, http.protocol, http.bytes_in, http.bytes_out,
    )  # fmt: skip


REQUESTS = [
    *(get(f"/{name}?q=1", "web").encode() for name in SCRIPTS),
    b"HEAD /plain HTTP/1.1\r\nHost: web\r\n\r\n",
    b"HEAD /large HTTP/1.1\r\nHost: web\r\n\r\n",
    b"HEAD /no-date HTTP/1.1\r\nHost: web\r\n\r\n",
    get("/plain", "web", "X-Route: other", "User-Agent: me", "X-Request-Id: abc").encode(),
    get("/plain", "web", "X-Request-Id: a b", "Connection: Keep-Alive").encode(),
    get("/plain", "web", "X-Request-Id: a", "X-Request-Id: b").encode(),
    get("/plain", "web:80", "X-Forwarded-For: 192.0.2.1", "Via: 1.1 x").encode(),
    get("/plain", "web", "X-Forwarded-Client-Cert: URI=spiffe://x/y").encode(),
    get("/Denied", "web").encode(),
    get("/a/../plain", "web").encode(),
    get("/%70lain", "WEB").encode(),
    b"DELETE /nothing HTTP/1.1\r\nHost: web\r\n\r\n",
    b"DELETE /plain HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n",
    b"DELETE /plain HTTP/1.1\r\nHost: web\r\nContent-Length: 2\r\n\r\nok",
    b"POST /plain HTTP/1.1\r\nHost: web\r\n\r\n",
    b"POST /plain HTTP/1.1\r\nHost: web\r\nContent-Length: 70000\r\n\r\n" + b"b" * 70000,
    b"POST /plain HTTP/1.1\r\nContent-Length: 4\r\nX-Request-Id: a\r\nHost: web\r\n\r\n"
    b"\r\n\r\n",
    b"PUT /plain HTTP/1.1\r\nHost: web\r\nContent-Length: 2\r\n\r\nok",
    *(
        f"{method} /{name} HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\nabc".encode()
        for method in ("POST", "DELETE")
        for name in SCRIPTS
    ),
    b"GET /plain HTTP/1.0\r\nHost: web\r\n\r\n",
    b"GET /plain HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("door", ["mesh", "gateway", "tls"])
async def test_whatever_is_asked_and_answered_all_see_the_same(door):
    slow = await observe(REQUESTS, fast=False, door=door)
    fast = await observe(REQUESTS, fast=True, door=door)
    for one, other, request in zip(slow.answers, fast.answers, REQUESTS, strict=True):
        assert one == other, request
    assert slow.heads == fast.heads
    assert slow.bodies == fast.bodies
    assert slow.log == fast.log
    assert slow.flows == fast.flows
    assert slow.counted == fast.counted


# --- what happens meanwhile -----------------------------------------------------------------------

both = pytest.mark.parametrize("fast", [True, False])
GATED = b"GET /gated HTTP/1.1\r\nHost: web\r\n\r\n"


@contextlib.asynccontextmanager
async def gated(
    port: int, backend: Backend, begun: bytes = b""
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A client whose request is at the backend, which has sent this of its answer, all of PLAIN
    else once `backend.gate` is set."""
    backend.gate.clear()
    backend.begun = begun
    async with connected(port) as (reader, writer):
        writer.write(get("/plain", "web").encode())
        await read_message(reader)
        heads = len(backend.heads)
        writer.write(GATED)
        await until(lambda: len(backend.heads) > heads)
        if begun:
            assert await reader.readexactly(1) == b"H"
        yield reader, writer


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@both
async def test_policy_that_comes_to_refuse_is_obeyed_by_the_next_request(fast):
    async with scene(fast=fast) as (mesh, port, backend), gated(port, backend) as (reader, writer):
        nobody = policy("web", "127.0.0.1", WEB, ingress=closed())
        assert mesh.apply(nobody) == {}
        backend.gate.set()
        assert (await read_message(reader)).status == 200
        writer.write(GATED)
        assert (await read_message(reader)).status == 403
        assert mesh.apply({}, (policy_key("shop", "web"),)) == {}
        writer.write(GATED)
        assert (await read_message(reader)).status == 200


@both
async def test_a_pod_that_is_gone_is_no_part_of_the_world(fast):
    """As long as it is an endpoint: whoever has its address now is `init`, as for the kernel."""
    async with scene(fast=fast) as (mesh, port, _), connected(port) as (reader, writer):
        outside = closed(policy_rule("world", int(Reserved.WORLD)))
        gone = workload_key("shop", "web"), policy_key("shop", "web")
        for put, status in (
            ({}, 200),
            (policy("client", "127.0.1.1", ME, egress=outside), 403),
        ):
            assert mesh.apply(put, gone if put else ()) == {}
            for _ in range(2 * WORTH):
                writer.write(get("/plain", "web").encode())
                assert (await read_message(reader)).status == status
                await asyncio.sleep(0.002)


@both
async def test_a_body_goes_along_and_is_kept_for_another_try(fast):
    """The second finds its connection closed, and is sent again over a new one."""
    async with scene(fast=fast) as (_, port, backend), connected(port) as (reader, writer):
        for name in ("plain", "nothing-once"):
            head = f"DELETE /{name} HTTP/1.1\r\nHost: web\r\nContent-Length: 3\r\n\r\n".encode()
            writer.write(head + b"abc")
            message = await read_message(reader)
            assert message is not None
            assert message.status == 200
            assert backend.bodies[-1] == b"abc"
            assert (backend.heads[-1] == head) is (fast and name == "plain")
        assert backend.bodies == [b"abc"] * 3


@both
async def test_an_empty_body_is_whole_for_another_try(fast):
    """Nobody waits for more of it, so that the connection of that try can be used again."""
    async with scene(fast=fast) as (_, port, backend), connected(port) as (reader, writer):
        before = backend.connections
        async with asyncio.timeout(5):
            for name in ("plain", "nothing-once", "plain", "plain"):
                head = f"DELETE /{name} HTTP/1.1\r\nHost: web\r\nContent-Length: 0\r\n\r\n"
                writer.write(head.encode())
                message = await read_message(reader)
                assert message is not None
                assert message.status == 200
        # That of the other try.
        assert backend.connections == before + 1


@both
async def test_what_is_added_is_no_field_of_the_client_s(fast):
    """As many as there may be, and a response that is not the lane's to read."""
    async with (
        scene(fast=fast, door="outside") as (_, port, backend),
        connected(port) as (reader, writer),
    ):
        fields = "".join(f"X-{number}: y\r\n" for number in range(99))
        async with asyncio.timeout(5):
            for name in ("plain", "chunked", "plain"):
                writer.write(f"GET /{name} HTTP/1.1\r\nHost: web\r\n{fields}\r\n".encode())
                message = await read_message(reader)
                assert message is not None
                assert message.status == 200
        assert all(b"\r\nx-forwarded-for: " in head.lower() for head in backend.heads)


@both
async def test_pipelined_requests_wait_for_the_one_before(fast):
    async with scene(fast=fast) as (_, port, backend), gated(port, backend) as (reader, writer):
        before = len(backend.heads)
        writer.write(get("/empty", "web").encode() + get("/Denied", "web").encode())
        writer.write(get("/plain?3", "web").encode())
        await asyncio.sleep(0.01)
        assert len(backend.heads) == before
        backend.gate.set()
        answers = [await read_message(reader) for _ in range(4)]
        assert [(one.status, one.body) for one in answers] == [
            (200, b"plain"), (200, b""), (403, b"access denied\n"), (200, b"plain"),
        ]  # fmt: skip


@both
async def test_a_head_in_bits_is_one_request(fast):
    async with scene(fast=fast) as (_, port, backend), connected(port) as (reader, writer):
        before = len(backend.heads)
        for at in range(len(GATED)):
            writer.write(GATED[at : at + 1])
            await writer.drain()
            await asyncio.sleep(0)
        backend.gate.set()
        assert (await read_message(reader)).body == b"plain"
        assert len(backend.heads) == before + 1


@both
async def test_who_drains_lets_the_request_end_and_says_close(fast):
    async with scene(fast=fast) as (mesh, port, backend), gated(port, backend) as (reader, writer):
        draining = spawn(mesh.proxy.drain(5), name="drain")
        await asyncio.sleep(0.01)
        backend.gate.set()
        answer = await read_message(reader)
        assert (answer.status, answer.header("connection")) == (200, "close")
        assert await reader.read() == b""
        writer.close()
        assert await draining == 0


@both
async def test_a_request_that_takes_too_long_is_given_up(fast):
    async with scene(fast=fast, request_timeout_s=0.2) as (mesh, port, backend):
        async with gated(port, backend) as (reader, _):
            answer = await read_message(reader)
            assert (answer.status, answer.body) == (504, b"request_timeout\n")
        async with gated(port, backend, PLAIN[:-1]) as (reader, _):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await reader.readexactly(len(PLAIN))
        # Connections do not come to the backend's rescue: it is asked on others.
        async with connected(port) as (reader, writer):
            writer.write(get("/plain", "web").encode())
            assert (await read_message(reader)).status == 200
        log = (await mesh.close())[-6:]
    kept = [(one["path"], one["status"], one.get("reason", "")) for one in log]
    assert ("/gated", 504, "request_timeout") in kept
    assert ("/gated", 200, "request_timeout") in kept


@both
async def test_a_client_that_goes_takes_its_request_along(fast):
    async with scene(fast=fast) as (mesh, port, backend):
        async with gated(port, backend) as (_, writer):
            reset(writer)
            await until(lambda: backend.gone)
        log = await mesh.close()
    assert (log[-1]["status"], log[-1]["reason"]) == (499, "client_gone")


@both
async def test_a_client_that_has_sent_all_still_gets_its_answer(fast):
    async with scene(fast=fast) as (_, port, backend), gated(port, backend) as (reader, writer):
        shutdown(writer)
        await asyncio.sleep(0.01)
        backend.gate.set()
        assert (await read_message(reader)).status == 200
        assert await reader.read() == b""


@both
async def test_slow_readers_hold_the_backend_up_and_get_all(fast):
    async with (
        scene(fast=fast) as (_, port, backend),
        connected(port, limit=1024) as (
            reader,
            writer,
        ),
    ):
        backend.sent = 0
        writer.write(get("/endless", "web").encode())
        await reader.readuntil(b"\r\n\r\n")
        stalled, sent = 0, -1
        while stalled < 20:
            stalled = stalled + 1 if sent == backend.sent else 0
            sent = backend.sent
            await asyncio.sleep(0.005)
        assert 0 < sent < ENDLESS // 2
        left = ENDLESS
        while left:
            left -= len(await reader.read(1 << 20))
        writer.write(get("/plain", "web").encode())
        assert (await read_message(reader)).body == b"plain"


async def test_each_request_has_its_backend_by_weight_and_load():
    """As without the lane: three of four, and none at all once it weighs nothing."""
    async with scene(fast=True) as (mesh, port, backend):
        other = Backend()
        async with raw_backend(other) as second, connected(port) as (reader, writer):
            heavy = {**cluster("heavy", second), **cluster("web", backend.port)}
            split = mesh_route("r", rule(to("web"), to("heavy", 3)))
            assert mesh.apply(heavy | split) == {}
            for _ in range(2 * WORTH):
                writer.write(get("/plain", "web").encode())
                await read_message(reader)
                await asyncio.sleep(0.001)
            backend.heads.clear()
            other.heads.clear()
            for _ in range(400):
                writer.write(get("/plain", "web").encode())
                assert (await read_message(reader)).body == b"plain"
            assert 240 < len(other.heads) < 360
            assert all(b"\r\nHost:" in head for head in other.heads + backend.heads)
            assert mesh.apply(mesh_route("r", rule(to("web", 0), to("heavy", 3)))) == {}
            backend.heads.clear()
            for _ in range(50):
                writer.write(get("/plain", "web").encode())
                assert (await read_message(reader)).status == 200
            assert not backend.heads


@pytest.mark.skipif(not SMUGGLING, reason="../shared/http is not there")
async def test_published_smuggling_reaches_backends_as_without_the_lane():
    quick = {"head_timeout_s": 0.5, "body_timeout_s": 0.5, "idle_timeout_s": 0.5}
    seen = []
    for fast in (True, False):
        async with scene(fast=fast, **quick) as (_, port, backend):
            backend.heads.clear()

            async def send(data: bytes, port: int = port) -> bytes:
                async with connected(port) as (reader, writer):
                    writer.write(get("/plain", "web").encode())
                    await read_message(reader)
                    writer.write(data)
                    with contextlib.suppress(OSError):
                        return await reader.read()
                    return b""

            answers = []
            for at in range(0, len(SMUGGLING), 100):
                answers += await asyncio.gather(*map(send, SMUGGLING[at : at + 100]))
            statuses = [re.findall(rb"HTTP/1\.1 (\d+)", answer) for answer in answers]
            seen.append((statuses, sorted(map(repr, map(read, backend.heads)))))
            gc.collect()  # now: CPython 3.11 does not bear so much of it just anywhere
    assert seen[0] == seen[1]
