"""A pod of the storefront: answers in JSON who it is and what it saw. /stock is a WebSocket.

Usage: backend.py PORT. Listens on all addresses of its pod; ends on SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

from aiohttp import web

_SHOWN = ("host", "x-shop", "x-canary", "x-forwarded-for", "x-forwarded-proto", "x-request-id")
_STOCK = 12


async def _stock(request: web.Request) -> web.StreamResponse:
    """Every message buys one."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    left = _STOCK
    await socket.send_str(f"{left} left")
    async for message in socket:
        if message.type is web.WSMsgType.TEXT:
            left = max(0, left - 1)
            await socket.send_str(f"{message.data}: {left} left")
    return socket


async def _answer(request: web.Request) -> web.StreamResponse:
    seen = {
        "pod": os.environ["POD_NAME"],
        "node": os.environ["NODE_NAME"],
        "client": request.remote,
        "saw": f"{request.method} {request.path_qs}",
        "headers": {key: request.headers[key] for key in _SHOWN if key in request.headers},
    }
    return web.json_response(text=json.dumps(seen) + "\n")


async def main(port: int) -> None:
    app = web.Application()
    app.router.add_get("/stock", _stock)
    app.router.add_route("*", "/{path:.*}", _answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, None, port).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: backend.py PORT")
    asyncio.run(main(int(sys.argv[1])))
