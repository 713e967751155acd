"""A worker's data plane within the test, with what the kernel knows of connections made by hand.

Clients are workloads by their loopback address: `Origins` says what each asked for. Everything else
is real: sockets, configuration, requests.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from bpf.proxy import Origin
from bpf.structs import Target
from l7proxy.accesslog import AccessLog
from l7proxy.flows import FlowLog
from l7proxy.proxy import Proxy
from mesh.model.nodeconfig import MeshPort, NodeConfig, Section, ServiceSection, WorkloadSection
from mesh.model.routeconfig import Attachment, RouteRule, RouteSection
from mesh.model.section import (
    SectionKey,
    cluster_key,
    port_key,
    route_key,
    service_key,
    service_listener,
    workload_key,
)
from support.proxy import Message, get, read_message

SHOP = "10.96.0.10"  # what most tests ask for: Service shop/web, port 80
CLIENT = "127.0.1.1"  # from where they do


class Origins:
    """Handles in memory. `unread` is what each cookie's socket holds; `pairs` what `pair` says of
    connections to a port, each answer once and the last for ever; `plain` the marked ones."""

    def __init__(self) -> None:
        self.known: dict[str, Origin] = {}
        self.unread: Counter[int] = Counter()
        self.pairs: dict[int, list[int | None]] = {}
        self.plain: list[Target] = []
        self.marks_hold = True  # marked backends are plain from then on
        self.asked_queue = 0

    def steer(
        self,
        client: str = CLIENT,
        asked: tuple[str, int] = (SHOP, 80),
        backend: tuple[str, int] | None = None,
        *,
        enrolled: int | None = None,
    ) -> None:
        """Connections from `client` asked for this; `enrolled`: their cookie, where they are."""
        self.known[client] = Origin(
            Target.of(*asked, "TCP"),
            Target.of(*backend, "TCP") if backend is not None else None,
            enrolled or 1,
            1,
            enrolled is not None,
        )

    def origin(self, fd: int) -> Origin | None:
        with socket.socket(fileno=os.dup(fd)) as own:
            return self.known.get(own.getpeername()[0])

    def pair(self, fd: int) -> int | None:
        with socket.socket(fileno=os.dup(fd)) as own:
            answers = self.pairs.get(own.getpeername()[1], [0])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def queued(self, cookie: int) -> int:
        self.asked_queue += 1
        return self.unread[cookie]

    def mark_plain(self, backend: Target) -> None:
        self.plain.append(backend)
        if self.marks_hold:
            self.pairs[backend.port] = [0]


class MeshProxy:
    """`Proxy` with its supervisor and agent played by the test."""

    def __init__(self) -> None:
        self.origins = Origins()
        self.config = NodeConfig.empty()
        self._log = tempfile.TemporaryFile()
        self._access_log = AccessLog(asyncio.get_running_loop(), self._log.fileno())
        self.flows = FlowLog(asyncio.get_running_loop())
        self.proxy = Proxy(asyncio.get_running_loop(), self._access_log, self.flows)

    def apply(
        self, put: Mapping[SectionKey, Section], remove: tuple[SectionKey, ...] = ()
    ) -> dict[SectionKey, str]:
        self.config, delta = self.config.change(dict(put), remove)
        return self.proxy.apply(delta)

    def listen(self, kind: str = "http", address: str = "127.0.0.1") -> int:
        """A mesh port, bound and configured."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.create_server((address, 0), family=family, backlog=1024)
        port: int = sock.getsockname()[1]
        self.proxy.listen((address, port), sock)
        section = MeshPort(address, port, kind)  # type: ignore[arg-type]
        assert self.apply({port_key(address, port): section}) == {}
        return port

    def listen_outside(self) -> int:
        """A port for a Gateway, bound."""
        sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
        port: int = sock.getsockname()[1]
        self.proxy.listen(("127.0.0.1", port), sock)
        return port

    def serve(self, *sections: Mapping[SectionKey, Section], kind: str = "http") -> int:
        """A mesh port with these sections in force and the kernel's handles there."""
        put: dict[SectionKey, Section] = {}
        for section in sections:
            put |= section
        assert self.apply(put) == {}
        self.proxy.use(self.origins)
        return self.listen(kind)

    async def close(self) -> list[dict[str, Any]]:
        """The access log."""
        await self.proxy.drain(0)
        self.proxy._clusters.close()
        self._access_log.close()
        self._log.seek(0)
        return [json.loads(line) for line in self._log.read().decode().splitlines()]


@asynccontextmanager
async def mesh_proxy() -> AsyncIterator[MeshProxy]:
    mesh = MeshProxy()
    mesh.origins.steer()
    try:
        yield mesh
    finally:
        await mesh.close()
        mesh._log.close()


# --- configurations ---------------------------------------------------------------------------


def service(
    name: str = "web", *addresses: str, namespace: str = "shop", port: int = 80, **rest: Any
) -> dict[str, Section]:
    """A Service; its own endpoints are those of cluster `name` (support.proxy.cluster)."""
    key = rest.pop("cluster", cluster_key("Service", "default", name, 80))
    section = ServiceSection(namespace, name, port, addresses or (SHOP,), key, **rest)
    return {service_key(namespace, name, port): section}


def workload(name: str, address: str, namespace: str = "shop", **rest: Any) -> dict[str, Section]:
    return {workload_key(namespace, name): WorkloadSection(namespace, name, (address,), **rest)}


def mesh_route(
    name: str,
    *rules: RouteRule,
    namespace: str = "shop",
    parent: tuple[str, str, int] = ("shop", "web", 80),
    **rest: Any,
) -> dict[str, Section]:
    """A route of a Service port: a consumer route where it is of another namespace."""
    consumer = namespace if namespace != parent[0] else None
    section = RouteSection(
        kind="HTTPRoute",
        namespace=namespace,
        name=name,
        created="",
        attachments=(Attachment(service_listener(*parent, consumer), ("*",)),),
        rules=rules,
        **rest,
    )
    return {route_key("HTTPRoute", namespace, name): section}


# --- clients ------------------------------------------------------------------------------------


@asynccontextmanager
async def connected(
    port: int, client: str = CLIENT, **rest: Any
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A workload's connection."""
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", port, local_addr=(client, 0), **rest
    )
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def ask(port: int, request: str = get("/", "web"), client: str = CLIENT) -> Message:
    """One request on a connection of its own. ConnectionError: it was closed without an answer."""
    async with connected(port, client) as (reader, writer):
        writer.write(request.encode())
        message = await read_message(reader)
        if message is None:
            raise ConnectionError("closed without an answer")
        return message
