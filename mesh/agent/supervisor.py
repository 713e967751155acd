"""The supervisor: holds the listening sockets, starts agent and workers, starts them again.

It outlives them all, so it does little and imports little: ports are bound as the agent wants them
and stay bound while no agent is there; a pair of sockets connects agent and worker whenever either
is new. It knows nothing of configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

from bpf.attach import adopt
from bpf.errors import DatapathError
from bpf.proxy import descriptors
from l7proxy.tasks import spawn
from mesh.agent import ports
from mesh.agent.child import Child
from mesh.agent.rundir import RunDir, RunDirError, default_run_dir, name_process
from mesh.model.channel import (
    Bound,
    Channel,
    Control,
    Drain,
    Handles,
    Leaving,
    Listen,
    PortAddress,
    Unlisten,
    Want,
    Worker,
)

_log = logging.getLogger("weft.supervisor")

# Ports that could not be bound are tried again after this long, then twice that, ...
_RETRY_S = 1.0
_MAX_RETRY_S = 30.0
# How long the agent may take to say that the node leaves.
LEAVE_S = 2.0
# How long the agent may take to end, and workers beyond the deadline they were given.
GRACE_S = 2.0
_WORKER_USER = "nobody"


class Supervisor:
    """The process."""

    def __init__(self, args: argparse.Namespace, agent_arguments: list[str]) -> None:
        self._args = args
        self._run_dir = RunDir(args.run_dir)
        self._sockets: dict[PortAddress, socket.socket] = {}
        self._failed: dict[PortAddress, str] = {}
        # Of the eBPF data path, for workers: names and descriptors. What an earlier Weft left in
        # force sends to proxies, and enrols their sockets, from the start.
        self._handles = _left_handles(args)
        self._holders: set[int] = set()
        self._retry: asyncio.TimerHandle | None = None
        self._retry_s = _RETRY_S
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._told = asyncio.Event()
        agent = [sys.executable, "-m", args.agent_module]
        about = [f"--run-dir={self._run_dir.path}", f"--workers={args.workers}", *agent_arguments]
        if args.steer is not None:
            about += [f"--steer={args.steer}", f"--proxy-cgroup={proxy_cgroup(args)}"]
        if args.pins is not None:
            about.append(f"--pins={args.pins}")
        self._agent = Child(
            "agent",
            lambda fd: [*agent, f"--control-fd={fd}", *about],
            started=self._agent_started,
            ended=lambda pid: None,
            message=self._from_agent,
        )
        self._workers = {number: self._worker(number) for number in range(args.workers)}

    def _worker(self, number: int) -> Child:
        # The metrics directory is its working directory: whom it becomes may enter that, but
        # perhaps none above it. -P: nothing is ever imported from there.
        command = [sys.executable, "-P", "-m", self._args.worker_module, f"--id={number}"]
        return Child(
            f"worker {number}",
            lambda fd: [*command, f"--control-fd={fd}", f"--user={_WORKER_USER}"],
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": "."},
            directory=self._run_dir.metrics,
            started=lambda: self._worker_started(number),
            ended=lambda pid: self._worker_ended(number, pid),
            message=lambda message, fds: self._from_worker(number, message, fds),
        )

    async def run(self) -> int:
        """Until a signal; the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._run_dir.freshen(_WORKER_USER)
        self._agent.start()
        for worker in self._workers.values():
            worker.start()
        await self._stop.wait()
        return await self._shut_down()

    def _signalled(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    # --- children --------------------------------------------------------------------------------

    def _agent_started(self) -> None:
        if self._stop.is_set():
            self._agent.send(Leaving())
        for number in self._workers:
            self._connect(number)

    def _worker_started(self, number: int) -> None:
        for port, sock in self._sockets.items():
            self._workers[number].send(Listen(port), (sock.fileno(),))
        if self._handles is not None:
            message, fds = self._handles
            self._workers[number].send(message, tuple(fds))
        self._connect(number)

    def _worker_ended(self, number: int, pid: int) -> None:
        self._run_dir.forget_worker(pid)
        self._holders.discard(number)
        self._tell_held()

    def _from_worker(self, number: int, message: Control, fds: list[int]) -> None:
        _discard(fds)
        if self._handles is not None and message == self._handles[0]:
            self._holders.add(number)
            self._tell_held()

    def _tell_held(self) -> None:
        """The agent, once all workers that are there have the descriptors."""
        there = {number for number, worker in self._workers.items() if worker.pid is not None}
        if self._handles is not None and there <= self._holders:
            self._agent.send(self._handles[0])

    def _connect(self, number: int) -> None:
        """A new config channel between the agent and a worker, if both are there."""
        worker = self._workers[number]
        if self._agent.pid is None or worker.pid is None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            self._agent.send(Worker(number, worker.pid), (ours.fileno(),))
            worker.send(Channel(), (theirs.fileno(),))

    def _from_agent(self, message: Control, fds: list[int]) -> None:
        if isinstance(message, Handles):
            self._keep(message, fds)
            return
        _discard(fds)
        match message:
            case Want(wanted):
                self._want(wanted)
            case Leaving():
                self._told.set()
            case Worker(number, pid):
                # The agent has lost its channel to a worker that is still there.
                if number in self._workers and self._workers[number].pid == pid:
                    self._connect(number)
            case _:
                _log.error("control message %s is not for a supervisor", type(message).__name__)

    def _keep(self, message: Handles, fds: list[int]) -> None:
        before, self._handles = self._handles, (message, fds)
        self._holders.clear()
        if before is not None:
            _discard(before[1])
        for worker in self._workers.values():
            worker.send(message, tuple(fds))
        self._tell_held()

    # --- ports -----------------------------------------------------------------------------------

    def _want(self, wanted: tuple[PortAddress, ...]) -> None:
        for port in [port for port in self._sockets if port not in wanted]:
            self._sockets.pop(port).close()
            for worker in self._workers.values():
                worker.send(Unlisten(port))
            _log.info("no longer listening on %s port %d", port.address, port.port)
        self._failed = {port: why for port, why in self._failed.items() if port in wanted}
        for port in wanted:
            if port not in self._sockets:
                self._bind(port)
        self._retry_s = _RETRY_S
        self._tell_bound()

    def _bind(self, port: PortAddress) -> None:
        try:
            sock = self._sockets[port] = ports.bind(port)
        except ports.BindError as error:
            if self._failed.get(port) != str(error):
                _log.error("not listening on %s port %d: %s", port.address, port.port, error)
            self._failed[port] = str(error)
            return
        self._failed.pop(port, None)
        _log.info("listening on %s port %d", port.address, port.port)
        for worker in self._workers.values():
            worker.send(Listen(port), (sock.fileno(),))

    def _tell_bound(self) -> None:
        self._agent.send(Bound(tuple(self._sockets), tuple(self._failed.items())))
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._failed:
            loop = asyncio.get_running_loop()
            self._retry = loop.call_later(self._retry_s, self._bind_again)
            self._retry_s = min(2 * self._retry_s, _MAX_RETRY_S)

    def _bind_again(self) -> None:
        self._retry = None
        for port in tuple(self._failed):
            self._bind(port)
        self._tell_bound()

    # --- the end ---------------------------------------------------------------------------------

    async def _shut_down(self) -> int:
        """Say that the node leaves, drain the workers, then end the agent. A second signal ends
        everything at once."""
        self._agent.send(Leaving())
        await self._unless_hurried(self._told.wait(), within=LEAVE_S)
        if delay := float(self._args.drain_delay):
            _log.info("going to close in %g s; a second signal ends everything at once", delay)
            await self._unless_hurried(asyncio.sleep(delay), within=delay)
        deadline = float(self._args.drain_timeout)
        _log.info(
            "draining connections for up to %g s; a second signal ends them at once", deadline
        )
        if self._retry is not None:
            self._retry.cancel()
        for child in (*self._workers.values(), self._agent):
            child.stop()
        for worker in self._workers.values():
            worker.send(Drain(deadline))
        for sock in self._sockets.values():
            sock.close()
        drained = await self._gone(*self._workers.values(), within=deadline + GRACE_S)
        self._agent.kill(signal.SIGTERM)
        # Also where everybody is in a hurry: it may have things to take away from its node.
        await asyncio.wait({spawn(self._agent.gone.wait(), name="agent's end")}, timeout=GRACE_S)
        for child in (*self._workers.values(), self._agent):
            child.kill(signal.SIGKILL)
            await child.gone.wait()
        self._run_dir.api_socket.unlink(missing_ok=True)
        _log.info("ended")
        return 0 if drained else 1

    async def _gone(self, *children: Child, within: float) -> bool:
        """Whether all of them ended in time and before a second signal."""

        async def all_gone() -> None:
            for child in children:
                await child.gone.wait()

        return await self._unless_hurried(all_gone(), within=within)

    async def _unless_hurried(self, work: Coroutine[Any, Any, Any], within: float) -> bool:
        """Whether it was done in time and before a second signal."""
        done = spawn(work, name="end")
        hurry = spawn(self._stop_now.wait(), name="second signal")
        await asyncio.wait({done, hurry}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if done.done():
            return True
        done.cancel()
        return False


def _discard(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def parser() -> argparse.ArgumentParser:
    """The supervisor's own options; whatever else is given goes to the agent."""
    result = argparse.ArgumentParser(prog="weft up", add_help=False, allow_abbrev=False)
    result.add_argument("--run-dir", type=Path, default=default_run_dir())
    result.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    result.add_argument("--drain-delay", type=float, default=0.0)
    result.add_argument("--drain-timeout", type=float, default=30.0)
    result.add_argument("--steer", type=Path)
    result.add_argument("--proxy-cgroup", type=Path)
    result.add_argument("--pins", type=Path)
    # Tests put other programs in their places.
    result.add_argument("--agent-module", default="mesh.agent.agent")
    result.add_argument("--worker-module", default="l7proxy.worker")
    return result


def proxy_cgroup(args: argparse.Namespace) -> Path:
    """The cgroup of all of Weft's processes, by which the kernel knows the proxy's sockets."""
    given: Path | None = args.proxy_cgroup
    return given or args.steer.with_name(f"{args.steer.name}.proxy")


# On a cgroup that Weft made, also one that was killed since.
_MADE = "user.weft.made"


@contextlib.contextmanager
def in_cgroup(path: Path) -> Iterator[None]:
    """In it before any other process or socket is made: they inherit it. One that Weft made is gone
    at the end, unless somebody else is in it. Where it cannot be made the agent, which is to attach
    programs to it, says why."""
    before = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    with contextlib.suppress(OSError):
        if (path.parent / "cgroup.procs").exists():
            if not path.exists():
                path.mkdir()
                os.setxattr(path, _MADE, b"")
            (path / "cgroup.procs").write_text("0")
    yield
    root = path
    while (root.parent / "cgroup.procs").exists():
        root = root.parent
    with contextlib.suppress(OSError):
        (root / before / "cgroup.procs").write_text("0")
        if _MADE in os.listxattr(path):
            path.rmdir()


def _left_handles(args: argparse.Namespace) -> tuple[Handles, list[int]] | None:
    if args.steer is None:
        return None
    pins = args.pins or RunDir(args.run_dir).pins
    try:
        adopt(pins, proxy_cgroup(args))
        found = descriptors(pins)
    except (DatapathError, OSError):
        return None
    return (Handles(tuple(found)), list(found.values())) if found else None


def main() -> int:
    args, agent_arguments = parser().parse_known_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="weft: %(message)s")
    name_process("weft")
    if args.steer is None:
        return _up(args, agent_arguments)
    with in_cgroup(proxy_cgroup(args)):
        return _up(args, agent_arguments)


def _up(args: argparse.Namespace, agent_arguments: list[str]) -> int:
    run_dir = RunDir(args.run_dir)
    about = {"started": time.time(), "workers": args.workers, "agent": agent_arguments}
    try:
        lock = run_dir.lock(about)
    except RunDirError as error:
        print(f"weft: {error}", file=sys.stderr)
        return 1
    with contextlib.closing(os.fdopen(lock)):
        return asyncio.run(_run(args, agent_arguments))


async def _run(args: argparse.Namespace, agent_arguments: list[str]) -> int:
    return await Supervisor(args, agent_arguments).run()


if __name__ == "__main__":
    sys.exit(main())
