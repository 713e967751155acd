"""What runs in a pod of the mesh cases: the echo server, and a client that takes requests from the
runner, so that they are the pod's own.

    python3 -m acceptance.inside SOCKETS ECHO_ARGUMENTS...

Takes requests at SOCKETS/<namespace>.<pod>.sock, each on a connection of its own as a line of JSON;
the answer is a line too. A pod shares files with the host, so the socket is found from both sides.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import msgspec
from echo.answer import Pod
from echo.pod import parse, serve
from echo.server import EchoServers

from acceptance.client import Request, RequestFailed, Response, round_trip

# A line; bodies are base64 in it.
_LIMIT = 1 << 20


class Answer(msgspec.Struct):
    """`response` None: there is no whole one, and `error` says why."""

    response: Response | None = None
    error: str = ""


def socket_of(sockets: Path, namespace: str, pod: str) -> Path:
    return sockets / f"{namespace}.{pod}.sock"


async def send_from(socket: Path, request: Request) -> Response:
    """The runner's side: one exchange from inside a pod. RequestFailed: no whole response came."""
    try:
        reader, writer = await asyncio.open_unix_connection(socket, limit=_LIMIT)
    except OSError as error:
        raise RequestFailed(f"the pod takes no requests: {error}") from error
    with contextlib.closing(writer):
        writer.write(msgspec.json.encode(request) + b"\n")
        line = await reader.readline()
    if not line:
        raise RequestFailed("the pod ended")
    answer = msgspec.json.decode(line, type=Answer)
    if answer.response is None:
        raise RequestFailed(answer.error)
    return answer.response


async def take_requests(socket: Path) -> asyncio.Server:
    """The pod's side."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):
            request = msgspec.json.decode(await reader.readline(), type=Request)
            try:
                answer = Answer(response=await round_trip(request))
            except RequestFailed as error:
                answer = Answer(error=str(error))
            writer.write(msgspec.json.encode(answer) + b"\n")
            await writer.drain()

    return await asyncio.start_unix_server(one, socket, limit=_LIMIT)


async def main() -> None:
    sockets, *arguments = sys.argv[1:]
    pod = Pod(os.environ["POD_NAME"], os.environ["POD_NAMESPACE"], address="")
    # The client first: the pod counts as ready once the echo server's ports are open.
    requests = await take_requests(socket_of(Path(sockets), pod.namespace, pod.name))
    await serve(EchoServers(), pod, parse(arguments))
    await requests.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
