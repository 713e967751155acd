"""One backend of the storefront: answers in JSON who it is and what it saw.

Usage: backends.py NAME PORT. Listens on 127.0.0.1; ends on SIGTERM, and with whoever started it.
/stock is a WebSocket.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import signal
import sys

from aiohttp import web

_PR_SET_PDEATHSIG = 1
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


async def main(name: str, port: int) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        seen = {
            "service": name,
            "port": port,
            "saw": f"{request.method} {request.path_qs}",
            "headers": {key: request.headers[key] for key in _SHOWN if key in request.headers},
        }
        return web.json_response(text=json.dumps(seen) + "\n")

    app = web.Application()
    app.router.add_get("/stock", _stock)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    # Whoever started this waits for the line.
    print("listening", flush=True)
    await stop.wait()
    await runner.cleanup()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: backends.py NAME PORT")
    # Ctrl-C on a terminal goes to every process; run.py ends its backends in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
