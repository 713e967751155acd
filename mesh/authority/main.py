"""The authority process: options, sockets, the manifests it reads pods from, what it is brought.

It may die at any time: nodes go on with the certificates they have, and the next one reads its
state from disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path

from aiohttp import web

from certs.authority import Authority
from certs.errors import AuthorityError
from certs.secrecy import keep_memory_private
from mesh.authority.files import read_brought, read_federation
from mesh.authority.options import AuthorityOptions, OptionError, parse
from mesh.authority.pods import Placement
from mesh.authority.service import Service
from mesh.sources.directory import DirectorySource
from mesh.sources.watch import Watch

_log = logging.getLogger("weft.authority")


class Process:
    """The process, once its options are checked. AuthorityError: it cannot be an authority."""

    def __init__(self, options: AuthorityOptions) -> None:
        self._options = options
        brought = read_brought(options.brought) if options.brought else None
        self._authority = Authority(
            options.directory, options.trust_domain, options.lives, time.time(), brought
        )
        self._placement = Placement(options.trust_domain)
        self._service = Service(self._authority, self._placement, tuple(options.nodes))
        self._service.federate(read_federation(options.federation))
        self._placed = asyncio.Barrier(len(options.manifests) + 1)

    async def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            work = [group.create_task(self._follow(path)) for path in self._options.manifests]
            work += [
                group.create_task(self._service.tend()),
                group.create_task(self._follow_files()),
            ]
            # Who asks before the pods are known would be refused.
            await self._placed.wait()
            await self._listen(stack, self._options.admin_socket, self._service.admin_app())
            for node, path in self._options.nodes.items():
                await self._listen(stack, path, self._service.node_app(node))
            _log.info("answers for %s", self._authority.trust_domain)
            await stop.wait()
            for task in work:
                task.cancel()
        self._authority.close()

    async def _listen(
        self, stack: contextlib.AsyncExitStack, path: Path, app: web.Application
    ) -> None:
        """On a socket that only this user can open; what an authority before left is replaced."""
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.SockSite(runner, _private_socket(path)).start()

    async def _follow(self, manifests: Path) -> None:
        """The pods of one directory."""
        source, first = DirectorySource(manifests), True
        async with contextlib.aclosing(source.updates()) as updates:
            async for update in updates:
                self._placement.changed(manifests, update)
                if first:
                    first = False
                    await self._placed.wait()

    async def _follow_files(self) -> None:
        """What was brought and who is federated with, when it changes; what cannot be used leaves
        what is in force."""
        options = self._options
        paths = [path.parent for path in options.federation.values()]
        if options.brought is not None:
            paths.append(options.brought if options.brought.is_dir() else options.brought.parent)
        if not paths:
            return
        queue: asyncio.Queue[set[str]] = asyncio.Queue()
        with contextlib.closing(Watch(set(paths), queue, recursive=False)):
            while True:
                try:
                    self._service.federate(read_federation(options.federation))
                    if options.brought is not None:
                        self._service.bring(read_brought(options.brought))
                except AuthorityError as error:
                    _log.error("%s", error)
                await queue.get()


def _private_socket(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise AuthorityError(f"{path}: cannot listen there: {error.strerror or error}") from None
    finally:
        os.umask(mask)
    return sock


def main() -> int:
    """Exit codes: 0 stopped as asked, 1 it cannot be an authority, 2 wrong usage."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="authority: %(message)s")
    try:
        options = parse(sys.argv[1:])
    except OptionError as error:
        print(f"authority: {error}", file=sys.stderr)
        return 2
    keep_memory_private()
    try:
        asyncio.run(_run(options))
    except AuthorityError as error:
        print(f"authority: {error}", file=sys.stderr)
        return 1
    return 0


async def _run(options: AuthorityOptions) -> None:
    await Process(options).run()


if __name__ == "__main__":
    sys.exit(main())
