"""A real worker process under a test's control, real backends, a client that speaks raw bytes."""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import shutil
import socket
import ssl
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from certs.selfsigned import Authority
from mesh.model.channel import (
    Channel,
    Drain,
    FrameReader,
    Listen,
    PortAddress,
    Unlisten,
    encode_frame,
    send_control,
)
from mesh.model.flow import Flows
from mesh.model.nodeconfig import (
    Ack,
    CertificateSection,
    ClusterSection,
    Endpoint,
    Listener,
    NodeConfig,
    PortSection,
    Section,
)
from mesh.model.routeconfig import Attachment, RouteMatch, RouteRule, RouteSection, WeightedBackend
from mesh.model.section import SectionKey, certificate_key, cluster_key, port_key, route_key

LISTENER = "Gateway/default/gw/http"
CERTIFICATE = certificate_key("default", "shop")


class WorkerProcess:
    """`l7proxy.worker` with its supervisor and agent played by the test."""

    def __init__(self) -> None:
        self.config = NodeConfig.empty()
        self._reader = FrameReader()
        # What is added to the metrics of the worker.
        self.merge: Callable[[Callable[[], Iterable[Metric]]], Iterable[Metric]] | None = None
        self._messages: deque[Any] = deque()
        self._flows: deque[Flows] = deque()
        self._channel_out: asyncio.StreamWriter | None = None

    async def start(
        self, *arguments: str, stdout: int | None = None, prefix: tuple[str, ...] = ()
    ) -> None:
        """`stdout`: a descriptor for the access log in place of a file; `prefix`: a command that
        starts the worker."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        self.metrics_dir = tempfile.mkdtemp(prefix="weft-metrics-")
        # The last to look at it may be long after the process has ended.
        atexit.register(shutil.rmtree, self.metrics_dir, ignore_errors=True)
        Path(self.metrics_dir).chmod(0o777)
        # Sanitised output goes to a file: a pipe nobody reads would be a test of its own.
        self.log = tempfile.TemporaryFile()
        self.errors = tempfile.TemporaryFile()
        self.process = await asyncio.create_subprocess_exec(
            *prefix,
            sys.executable,
            "-m",
            "l7proxy.worker",
            "--control-fd",
            str(theirs.fileno()),
            "--id",
            "0",
            *arguments,
            pass_fds=(theirs.fileno(),),
            stdout=self.log if stdout is None else stdout,
            stderr=self.errors,
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": self.metrics_dir},
        )
        theirs.close()
        await self.connect()

    async def connect(self) -> None:
        """Hand the worker a new config channel, and it the whole configuration."""
        await self.disconnect()
        ours, theirs = socket.socketpair()
        send_control(self.control, Channel(), (theirs.fileno(),))
        theirs.close()
        self._channel_in, self._channel_out = await asyncio.open_connection(sock=ours)
        self._reader = FrameReader()
        self._messages.clear()
        if self.config.version:
            self._channel_out.write(encode_frame(self.config.whole()))
            await self.ack()

    async def disconnect(self) -> None:
        """Close the config channel, as an agent that dies does."""
        if self._channel_out is not None:
            self._channel_out.close()
            with suppress(ConnectionError):
                await self._channel_out.wait_closed()
            self._channel_out = None

    async def ack(self) -> Ack:
        """The next acknowledgement; flows that come before it are kept."""
        while True:
            message = await self._message()
            if isinstance(message, Ack):
                return message
            self._flows.append(message)

    async def flows(self) -> Flows:
        """The next batch of flow records."""
        while not self._flows:
            message = await self._message()
            assert isinstance(message, Flows)
            self._flows.append(message)
        return self._flows.popleft()

    async def _message(self) -> Ack | Flows:
        while not self._messages:
            data = await self._channel_in.read(65536)
            if not data:
                raise ConnectionError("the worker closed the config channel")
            self._messages.extend(self._reader.receive(data))
        message = self._messages.popleft()
        assert isinstance(message, Ack | Flows)
        return message

    async def apply(
        self, put: Mapping[SectionKey, Section], remove: tuple[SectionKey, ...] = ()
    ) -> dict[SectionKey, str]:
        """Send one delta; returns what the worker refuses then."""
        self.config, delta = self.config.change(dict(put), remove, time.monotonic_ns())
        self._channel_out.write(encode_frame(delta))
        ack = await self.ack()
        assert ack.version == self.config.version
        return ack.refused

    def listen(self, address: str = "127.0.0.1") -> int:
        """Bind a free port and hand it over; returns the port."""
        sock = socket.create_server((address, 0), backlog=1024)
        port: int = sock.getsockname()[1]
        send_control(self.control, Listen(PortAddress(address, port)), (sock.fileno(),))
        sock.close()
        return port

    def unlisten(self, port: int, address: str = "127.0.0.1") -> None:
        send_control(self.control, Unlisten(PortAddress(address, port)))

    def drain(self, deadline_s: float) -> None:
        send_control(self.control, Drain(deadline_s))

    def access_log(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()

    def error_log(self) -> str:
        """What the worker has said on standard error."""
        self.errors.seek(0)
        return self.errors.read().decode()

    def metrics(self) -> dict[str, float]:
        """Every sample, as `name{label="value",...}`."""
        registry = CollectorRegistry()
        collector: Any = MultiProcessCollector
        collector(registry, path=self.metrics_dir)
        found = registry.collect() if self.merge is None else self.merge(registry.collect)
        return {
            sample.name + _labels(sample.labels): sample.value
            for metric in found
            for sample in metric.samples
        }

    async def metric(self, name: str, wanted: Callable[[float], bool]) -> float:
        """The value of a sample as soon as it is as wanted."""
        async with asyncio.timeout(10):
            while not wanted(value := self.metrics().get(name, 0.0)):
                await asyncio.sleep(0.02)  # files tell nobody that they changed
        return value

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        self.control.close()
        await self.disconnect()
        said = self.error_log()
        sys.stderr.write(said)
        self.log.close()
        self.errors.close()
        # Whatever clients and backends do to it, a worker meets nothing that it does not expect.
        assert "Traceback" not in said


def _labels(labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
    return f"{{{inner}}}" if inner else ""


@asynccontextmanager
async def worker(
    *arguments: str, stdout: int | None = None, prefix: tuple[str, ...] = ()
) -> AsyncIterator[WorkerProcess]:
    process = WorkerProcess()
    await process.start(*arguments, stdout=stdout, prefix=prefix)
    try:
        yield process
    finally:
        await process.stop()


@pytest.fixture(name="proxy")
async def proxy_fixture() -> AsyncIterator[WorkerProcess]:
    """A worker of the test's own. A test file takes it with `proxy = proxy_fixture`."""
    async with worker() as process:
        yield process


async def serve(process: WorkerProcess, *sections: Mapping[SectionKey, Section]) -> int:
    """A port of the worker with these sections in force."""
    port = process.listen()
    put = http_port(port)
    for section in sections:
        put |= section
    assert await process.apply(put) == {}
    return port


# --- configurations -----------------------------------------------------------------------------


def http_port(port: int, *listeners: Listener, address: str = "127.0.0.1") -> dict[str, Section]:
    section = PortSection(
        address=address,
        port=port,
        protocol="HTTP",
        gateway="default/gw",
        listeners=listeners or (Listener(LISTENER),),
    )
    return {port_key(address, port): section}


def https_port(port: int, *hostnames: str | None, **rest: object) -> dict[str, Section]:
    """A listener for each host name, or one for all."""
    section = PortSection(
        address="127.0.0.1",
        port=port,
        protocol="HTTPS",
        gateway="default/gw",
        listeners=tuple(
            Listener(f"{LISTENER}{i or ''}", hostname, (CERTIFICATE,))
            for i, hostname in enumerate(hostnames or (None,))
        ),
        **rest,  # type: ignore[arg-type]
    )
    return {port_key("127.0.0.1", port): section}


def certificate(authority: Authority, *names: str) -> dict[str, Section]:
    return {CERTIFICATE: CertificateSection(*authority.issue(dns=list(names)))}


def client_context(authority: Authority, *alpn: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.certificate_pem)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def cluster(name: str, *ports: int, **rest: object) -> dict[str, Section]:
    section = ClusterSection(
        endpoints=tuple(Endpoint("127.0.0.1", port, f"{name}-{port}") for port in ports),
        **rest,  # type: ignore[arg-type]
    )
    return {cluster_key("Service", "default", name, 80): section}


def route(name: str, *rules: RouteRule, hostnames: tuple[str, ...] = ("*",)) -> dict[str, Section]:
    section = RouteSection(
        kind="HTTPRoute",
        namespace="default",
        name=name,
        created="",
        attachments=(Attachment(LISTENER, hostnames),),
        rules=rules,
    )
    return {route_key("HTTPRoute", "default", name): section}


def to(name: str, weight: int = 1, **rest: object) -> WeightedBackend:
    key = cluster_key("Service", "default", name, 80)
    return WeightedBackend(key, weight, **rest)  # type: ignore[arg-type]


def rule(*backends: WeightedBackend, **rest: object) -> RouteRule:
    rest.setdefault("matches", (RouteMatch(),))
    return RouteRule(backends=backends, **rest)  # type: ignore[arg-type]


# --- raw HTTP/1.1 -------------------------------------------------------------------------------


@dataclass
class Message:
    """A message as it stood on the wire."""

    start: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        return next((v for k, v in self.headers if k.lower() == name.lower()), None)

    @property
    def status(self) -> int:
        return int(self.start.split()[1])


async def read_message(reader: asyncio.StreamReader, *, head_only: bool = False) -> Message | None:
    """A message off the wire; None at the end of the stream before one."""
    try:
        block = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    start, *lines = block[:-4].decode("latin-1").split("\r\n")
    headers = [tuple(re.split(r":\s*", line, maxsplit=1)) for line in lines]
    message = Message(start, headers)  # type: ignore[arg-type]
    if not head_only:
        await read_body(reader, message)
    return message


async def read_body(reader: asyncio.StreamReader, message: Message) -> None:
    """What follows a head."""
    if "chunked" in (message.header("transfer-encoding") or ""):
        while size := int(await reader.readuntil(b"\r\n"), 16):
            message.body += await reader.readexactly(size)
            await reader.readexactly(2)
        while (await reader.readuntil(b"\r\n")) != b"\r\n":
            pass
    elif length := message.header("content-length"):
        message.body = await reader.readexactly(int(length))
    elif (
        message.start.startswith("HTTP/")
        and message.status >= 200
        and message.status not in (204, 304)
    ):
        message.body = await reader.read()


@asynccontextmanager
async def connection(
    port: int, address: str = "127.0.0.1", **rest: object
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(address, port, **rest)  # type: ignore[arg-type]
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def fetch(port: int, request: str | bytes = "GET / HTTP/1.1\r\nHost: a\r\n\r\n") -> Message:
    """One request on a connection of its own."""
    async with connection(port) as (reader, writer):
        writer.write(request.encode() if isinstance(request, str) else request)
        message = await read_message(reader, head_only=request[:4] in ("HEAD", b"HEAD"))
        assert message is not None, "the proxy closed without an answer"
        return message


async def over_tls(port: int, context: ssl.SSLContext) -> int:
    """The status of one request for host a.x."""
    async with connection(port, ssl=context, server_hostname="a.x") as (reader, writer):
        writer.write(get("/", "a.x").encode())
        message = await read_message(reader)
        assert message is not None
        return message.status


def get(path: str = "/", host: str = "a", *headers: str) -> str:
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n"


@dataclass
class Backend:
    """A real HTTP/1.1 server that remembers what reached it."""

    port: int = 0
    requests: list[Message] = field(default_factory=list)
    connections: int = 0
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def wait_for(self, count: int) -> None:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.requests) >= count)


Answer = Callable[[Message], bytes | Awaitable[bytes]]


def ok(body: bytes = b"ok", *headers: str, status: str = "200 OK") -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers).encode()
    return b"HTTP/1.1 %s\r\n%scontent-length: %d\r\n\r\n%s" % (
        status.encode(),
        lines,
        len(body),
        body,
    )


@asynccontextmanager
async def backend(
    answer: Answer = lambda request: ok(request.start.encode()), *, port: int = 0
) -> AsyncIterator[Backend]:
    """Serve; an answer of b"" closes the connection without one. Bytes are sent as they are, and
    `connection: close` in them closes after it."""
    state = Backend()
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        state.connections += 1
        try:
            while (request := await read_message(reader)) is not None:
                async with state.arrived:
                    state.requests.append(request)
                    state.arrived.notify_all()
                reply = answer(request)
                data = reply if isinstance(reply, bytes) else await reply
                if not data:
                    break
                writer.write(data)
                await writer.drain()
                if b"connection: close" in data.lower():
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            handlers.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", port)
    state.port = server.sockets[0].getsockname()[1]
    try:
        yield state
    finally:
        server.close()
        for task in tuple(handlers):
            task.cancel()
        await asyncio.gather(*handlers, return_exceptions=True)
