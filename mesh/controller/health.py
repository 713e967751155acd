"""What a kubelet asks of a controller: whether it lives, and whether it could take over at once.

Knows HTTP; what it says is the controller's to know.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web


class Health:
    """/healthz, /readyz on all addresses of this host; `not_ready()`: the reasons why not."""

    def __init__(self, port: int, not_ready: Callable[[], list[str]]) -> None:
        self._port = port
        self._not_ready = not_ready
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        self._runner = web.AppRunner(app, access_log=None)

    async def open(self) -> None:
        """OSError: the port cannot be had."""
        await self._runner.setup()
        await web.TCPSite(self._runner, None, self._port).start()

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _readyz(self, _request: web.Request) -> web.Response:
        reasons = self._not_ready()
        text = "\n".join(f"not ready: {reason}" for reason in reasons) or "ok"
        return web.Response(text=f"{text}\n", status=503 if reasons else 200)
