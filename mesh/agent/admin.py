"""The admin port: /metrics, /healthz, /readyz. Tells, changes nothing, and never holds up the
agent: where the port cannot be bound, it is tried again, and status says so."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from aiohttp import web

from l7proxy.tasks import spawn
from mesh.agent import metrics
from mesh.agent.node import Node
from mesh.agent.ports import holder

_log = logging.getLogger("weft.agent")
_RETRY_S = 5.0


class Admin:
    """`error` is why the port is not there, None when it is (or is off)."""

    def __init__(self, node: Node, address: tuple[str, int] | None, metrics_dir: Path) -> None:
        self.address = address
        self.error: str | None = None
        self._node = node
        self._metrics_dir = metrics_dir
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        self._runner = web.AppRunner(app, access_log=None)
        self._retry: asyncio.TimerHandle | None = None

    async def start(self) -> None:
        await self._runner.setup()
        if self.address is not None:
            await self._listen(*self.address)

    async def close(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        await self._runner.cleanup()

    async def _listen(self, host: str, port: int) -> None:
        site = web.TCPSite(self._runner, host, port, reuse_address=True)
        try:
            await site.start()
        except OSError as error:
            if self.error is None:
                why = os.strerror(error.errno) if error.errno else str(error)
                who = f" by {found}" if (found := holder(port)) else ""
                self.error = (
                    f"the admin port {host}:{port} cannot be bound: {why.lower()}{who}: choose "
                    "another one with --admin"
                )
                _log.error("%s", self.error)
            self._retry = asyncio.get_running_loop().call_later(
                _RETRY_S, lambda: spawn(self._listen(host, port), name="admin port")
            )
            return
        self.error = None
        self.address = self._runner.addresses[0][:2]

    async def _metrics(self, _request: web.Request) -> web.Response:
        # The files of all workers are read; other requests need not wait for that.
        body = await asyncio.to_thread(metrics.exposition, self._node, self._metrics_dir)
        return web.Response(
            body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        reasons = self._node.not_ready()
        lines = [*(f"not ready: {reason}" for reason in reasons), *self._node.degraded()]
        text = "\n".join(lines or ["ok"]) + "\n"
        return web.Response(text=text, status=503 if reasons else 200)
