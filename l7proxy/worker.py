"""A proxy worker: one process, one event loop, no root.

Takes listening sockets and config channels from the supervisor over its control socket, applies
deltas, acknowledges them, serves, drains. It gives up root once everything is imported; what it
then needs comes through descriptors. When the supervisor is gone it goes too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import encodings.idna  # noqa: F401  (looked up lazily by name, which fails without root)
import gc
import logging
import os
import pwd
import resource
import signal
import socket
import sys
import weakref
from typing import cast

import uvloop

from bpf.proxy import ProxyHandles
from certs.secrecy import keep_memory_private
from l7proxy import metrics
from l7proxy.accesslog import AccessLog
from l7proxy.flows import FlowLog
from l7proxy.proxy import Proxy
from l7proxy.tasks import spawn
from mesh.model.channel import (
    Channel,
    Drain,
    FrameReader,
    Handles,
    Listen,
    Proof,
    Unlisten,
    encode_frame,
    receive_control,
    send_control,
)
from mesh.model.nodeconfig import Ack, Delta

_log = logging.getLogger("weft.worker")
_PR_SET_NO_NEW_PRIVS = 38
# How often the gauges of upstreams are set, seconds.
_REPORT_S = 1.0


def drop_root(user: str) -> None:
    """Become `user` for good: no groups, no capabilities, no way back (prctl(2), setresuid(2))."""
    account = pwd.getpwnam(user)
    os.setgroups([])
    os.setresgid(account.pw_gid, account.pw_gid, account.pw_gid)
    os.setresuid(account.pw_uid, account.pw_uid, account.pw_uid)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS)")


class ConfigChannel(asyncio.Protocol):
    """The worker's end of a config channel: deltas in, acknowledgements and flows out."""

    def __init__(self, proxy: Proxy, flows: FlowLog) -> None:
        self._proxy = proxy
        self._flows = flows
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._closed = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._closed:
            transport.close()
        else:
            self._flows.connect(self._transport)
            self._proxy.tunnels.announce_by(self._announce)

    def connection_lost(self, exc: Exception | None) -> None:
        assert self._transport is not None
        self._flows.disconnect(self._transport)

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        assert transport is not None
        try:
            for message in self._reader.receive(data):
                if isinstance(message, Proof):
                    self._proxy.tunnels.hear(message)
                elif isinstance(message, Delta):
                    refused = self._proxy.apply(message)
                    metrics.CONFIG_VERSION.set(message.version)
                    metrics.CONFIG_REFUSED.set(len(refused))
                    transport.write(encode_frame(Ack(message.version, refused)))
        except ValueError as error:
            # The agent then sees the channel end, and the supervisor makes a new one.
            _log.error("config channel closed: %s", error)
            transport.abort()

    def _announce(self, proof: Proof) -> None:
        """Tell the node's other workers. Without an agent nobody can: the next channel will."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(proof))

    def close(self) -> None:
        """Take no more deltas from it, be it connected yet or not."""
        self._closed = True
        if self._transport is not None:
            self._transport.abort()


class Worker:
    """The process: control socket, config channel, proxy."""

    def __init__(self, control: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._control = control
        self._loop = loop
        # Were standard output closed, its number could be a client's connection by now.
        self._log = AccessLog(
            loop, 1 if sys.stdout is not None else os.open(os.devnull, os.O_WRONLY)
        )
        self._flows = FlowLog(loop)
        self._proxy = Proxy(loop, self._log, self._flows)
        self._channel: ConfigChannel | None = None
        self._done = asyncio.Event()
        control.setblocking(False)
        loop.add_reader(control.fileno(), self._control_ready)
        loop.add_signal_handler(signal.SIGTERM, self._start_drain, None)

    async def run(self) -> None:
        self._report()
        await self._done.wait()
        self._log.close()

    def _report(self) -> None:
        self._proxy.report()
        self._loop.call_later(_REPORT_S, self._report)

    def _control_ready(self) -> None:
        while not self._done.is_set():
            try:
                received = receive_control(self._control)
            except BlockingIOError:
                return
            if received is None:
                _log.warning("the supervisor is gone")
                self._start_drain(None)
                return
            message, fds = received
            match message:
                case Channel():
                    spawn(self._take_channel(socket.socket(fileno=fds[0])), name="config channel")
                case Listen(port):
                    self._proxy.listen((port.address, port.port), socket.socket(fileno=fds[0]))
                case Unlisten(port):
                    self._proxy.unlisten((port.address, port.port))
                case Handles(names):
                    self._take_handles(dict(zip(names, fds, strict=True)))
                case Drain(deadline_s):
                    self._start_drain(deadline_s)
                    return
                case _:
                    _log.error("control message %s is not for a worker", type(message).__name__)

    def _take_handles(self, descriptors: dict[str, int]) -> None:
        """The kernel's answers come from these from now on. Those before are closed when others
        come and no connection asks them any more."""
        handles = ProxyHandles(descriptors)
        weakref.finalize(handles, _close, tuple(descriptors.values()))
        self._proxy.use(handles)
        with contextlib.suppress(OSError):  # the supervisor is gone, or ends this worker
            send_control(self._control, Handles(tuple(descriptors)))
        gc.collect()  # connections that have ended are in cycles, and would keep theirs

    async def _take_channel(self, sock: socket.socket) -> None:
        before, self._channel = self._channel, ConfigChannel(self._proxy, self._flows)
        channel = self._channel
        if before is not None:
            before.close()
        sock.setblocking(False)
        await self._loop.create_connection(lambda: channel, sock=sock)

    def _start_drain(self, deadline_s: float | None) -> None:
        self._loop.remove_reader(self._control.fileno())
        spawn(self._drain(deadline_s), name="drain")

    async def _drain(self, deadline_s: float | None) -> None:
        if left := await self._proxy.drain(deadline_s):
            _log.warning("drain deadline reached: %d connections cut off", left)
        self._flows.flush()
        await asyncio.sleep(0)  # in which the transport writes
        self._done.set()


def _close(descriptors: tuple[int, ...]) -> None:
    for fd in descriptors:
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(prog="l7proxy.worker", description=__doc__)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--id", type=int, required=True)
    parser.add_argument("--user", default="nobody", help="whom to become when started as root")
    args = parser.parse_args()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"worker {args.id}: %(message)s"
    )
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as comm:
        comm.write("weft-worker")  # what ps, top and "port in use by" call it
    # Ctrl-C reaches the whole foreground group; the supervisor decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # connections are descriptors
    if os.geteuid() == 0:
        drop_root(args.user)
    keep_memory_private()
    gc.freeze()  # what is imported stays: the collector need not look at it again
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(socket.socket(fileno=args.control_fd)))
    if sys.stderr is not None:
        sys.stderr.flush()
    # A thread that still writes the log to a stuck reader must not keep the process.
    os._exit(0)


async def _serve(control: socket.socket) -> None:
    await Worker(control, asyncio.get_running_loop()).run()


if __name__ == "__main__":
    main()
