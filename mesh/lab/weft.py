"""The Weft of a node, kept running as systemd keeps a service with Restart=always.

Starts it, starts it again with growing pauses whenever it has ended, and ends it on order. Knows
its command line and how it says that it is ready, and nothing of pods.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable

from mesh.agent.child import STABLE_S, restart_pause
from mesh.lab.plan import NodePlan, Plan
from mesh.lab.state import LabDir

# What it gets to become ready.
START_S = 30.0


class NodeWeft:
    """`changed` is called when it has been started, has ended, or is to stay so."""

    def __init__(
        self, lab: LabDir, plan: Plan, node: NodePlan, changed: Callable[[], None]
    ) -> None:
        self.ready = False
        self._lab = lab
        self._plan = plan
        self._node = node
        self._changed = changed
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = asyncio.Event()
        self._wanted.set()

    @property
    def stopped(self) -> bool:
        """It has ended on order."""
        return self._process is None and not self._wanted.is_set()

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        """Start it, and wait until it is ready or has ended. Blocks: in a thread once there is an
        event loop, and from one that is in the node's network namespace."""
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready,
            open(self._lab.weft_log(self._node.name), "ab") as log,
        ):
            # An abstract address of the kernel's choice; it is one of the node's namespace.
            ready.bind("")
            address = "@" + ready.getsockname()[1:].decode()
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": address},
            )
            ended = os.pidfd_open(self._process.pid)
            heard, _, _ = select.select([ready.fileno(), ended], [], [], START_S)
            os.close(ended)
            self.ready = ready.fileno() in heard
        if not heard:
            print(f"Weft was not ready after {START_S:.0f} s", file=sys.stderr)

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-P", "-m", "mesh.agent.supervisor", "--workers=1"),
            f"--kubeconfig={self._lab.kubeconfig}"
            if self._plan.kubeconfig
            else f"--manifests={self._lab.manifests}",
            f"--run-dir={self._lab.weft(self._node.name).path}",
            # Gateways are reached at the node's addresses; so are the mesh's own ports.
            "--bind-address=::",
            f"--node={self._node.name}",
            f"--authority={self._lab.authority_socket(self._node.name)}",
            f"--trust-domain={self._plan.trust_domain}",
            *(f"--mesh-address={address}" for address in self._node.addresses),
            f"--steer={self._node.cgroup}",
            f"--proxy-cgroup={self._node.proxy_cgroup}",
            f"--http-in-kernel={'auto' if self._plan.http_in_kernel else 'off'}",
        ]

    async def keep(self) -> None:
        """For ever: start it whenever it has ended and is wanted."""
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            since = loop.time()
            code = await self._end()
            self.ready, self._process = False, None
            self._changed()
            if self._wanted.is_set():
                failures = 1 if loop.time() - since >= STABLE_S else failures + 1
                pause = restart_pause(failures)
                print(
                    f"Weft ended with status {code}: starting it again in {pause:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
                await asyncio.sleep(pause)
            await self._wanted.wait()
            await asyncio.to_thread(self.start)
            self._changed()

    async def _end(self) -> int:
        """Its exit code, once it has one."""
        assert self._process is not None
        ended = asyncio.Event()
        pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)
        return self._process.wait()

    def want(self, wanted: bool) -> None:
        """Whether it is to run. What ends drains its connections first."""
        if wanted:
            self._wanted.set()
            return
        self._wanted.clear()
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        self._changed()
