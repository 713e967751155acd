"""The agent process: wires source, control plane, workers, supervisor and what people ask.

It may die at any time: traffic goes on with what the workers have, the ports stay bound with the
supervisor, and the next agent reads everything anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Protocol

from certs.secrecy import keep_memory_private
from gateway.control import ControlPlane
from l7proxy.accesslog import AccessLog
from l7proxy.tasks import spawn
from mesh.agent.admin import Admin
from mesh.agent.api import Api
from mesh.agent.authority import AuthorityClient, SocketClient
from mesh.agent.automata import KernelAutomata
from mesh.agent.cni_plugin import CniPlugin
from mesh.agent.datapath import Datapath
from mesh.agent.flow_peers import Peers, own_addresses
from mesh.agent.flows import FlowStore
from mesh.agent.kernel_flows import KernelFlows
from mesh.agent.node import Node
from mesh.agent.options import CLUSTER, AgentOptions, OptionError, parse
from mesh.agent.passed import PassedBy
from mesh.agent.rollout import Rollout
from mesh.agent.rundir import RunDir, name_process
from mesh.agent.svid_file import SvidFile
from mesh.agent.svids import Svids
from mesh.model.channel import (
    Bound,
    Handles,
    Leaving,
    PortAddress,
    Want,
    Worker,
    receive_control,
    send_control,
)
from mesh.model.meta import ObjectKey
from mesh.sources.directory import DirectorySource
from mesh.sources.update import SourceUpdate

if TYPE_CHECKING:
    from mesh.sources.kubernetes_client import Client

_log = logging.getLogger("weft.agent")
_PR_SET_PDEATHSIG = 1
_CHANNEL_PAUSE_S = 0.2
# Objects live long here, and looking at 500,000 of them takes the collector 0.25 s in which nobody
# is answered: young ones are looked at now and then, old ones hardly ever.
_GC_THRESHOLD = (20_000, 20, 50)


class Agent:
    """The process, once its options are checked."""

    def __init__(self, options: AgentOptions, control: socket.socket) -> None:
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        run_dir = self._run_dir = RunDir(options.run_dir)
        peers = Peers({*own_addresses(), *options.plane.mesh_addresses})
        flows = FlowStore(peers, options.flow_buffer, options.plane.node)
        rollout = Rollout(options.workers, self._workers_changed, self._worker_lost, flows.receive)
        self._source, client = _source(options)
        self._authority = _authority(options, client)
        datapath = self._datapath(options)
        self._cni = _cni_plugin(options, run_dir, datapath, client)
        self._node = Node(
            plane=ControlPlane(options.plane),
            rollout=rollout,
            want=self._want,
            ready=_ready,
            datapath=datapath,
            flows=flows,
            kernel=KernelFlows(datapath.pins, flows, datapath.rule) if datapath else None,
            passed=self._passed(options, run_dir, flows),
            svids=self._svids(options, run_dir),
            automata=self._automata(options),
            cni=self._cni,
        )
        self._reporter = _reporter(options, client, self._node, self._authority)
        self._admin = Admin(self._node, options.admin, run_dir.metrics)
        self._api = Api(self._node, options, run_dir, self._admin, self._source.origin)

    def _datapath(self, options: AgentOptions) -> Datapath | None:
        if options.steer is None:
            return None
        return Datapath(
            options.steer,
            options.plane.mesh_addresses,
            self._hand_over,
            self._datapath_changed,
            options.plane.node,
        )

    def _automata(self, options: AgentOptions) -> KernelAutomata | None:
        steer = options.steer
        return KernelAutomata(steer.pins) if steer is not None and steer.pairs else None

    def _passed(self, options: AgentOptions, run_dir: RunDir, flows: FlowStore) -> PassedBy | None:
        steer, log = options.steer, None
        if steer is None or not steer.pairs:
            return None
        if options.plane.settings.access_log != "off":
            log = AccessLog(self._loop, sys.stdout.fileno())
            log.format = options.plane.settings.access_log
        return PassedBy(steer.pins, run_dir.metrics, flows, log)

    def _svids(self, options: AgentOptions, run_dir: RunDir) -> Svids | None:
        if self._authority is None:
            return None
        return Svids(self._authority, options.plane.trust_domain, SvidFile(run_dir.svids))

    async def run(self) -> None:
        """Until SIGTERM or the end of the supervisor."""
        self._loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        self._control.setblocking(False)
        self._loop.add_reader(self._control.fileno(), self._control_ready)
        await self._api.start()
        await self._admin.start()
        # A failure of these is the agent's: the supervisor starts it again.
        async with asyncio.TaskGroup() as group:
            work = [
                group.create_task(self._node.run(), name="node"),
                group.create_task(self._follow_source(), name="source"),
            ]
            if self._reporter is not None:
                work.append(group.create_task(self._reporter.run(), name="reports"))
            if (datapath := self._node.datapath) is not None:
                work.append(group.create_task(datapath.run(), name="datapath"))
            if self._cni is not None:
                work.append(group.create_task(self._cni.run(), name="CNI"))
            if self._node.automata is not None:
                work.append(group.create_task(self._node.automata.run(), name="automata"))
            if self._node.svids is not None:
                work.append(group.create_task(self._node.svids.run(), name="SVIDs"))
            await self._stop.wait()
            for task in work:
                task.cancel()
        await self._source.close()
        await self._admin.close()
        await self._api.close()
        if self._authority is not None:
            await self._authority.close()
        for teller in (self._node.kernel, self._node.passed):
            if teller is not None:
                teller.close()
        if self._node.automata is not None:
            self._node.automata.close()
        if datapath is not None:
            datapath.close()
        if self._cni is not None and self._cni.close():
            self._run_dir.svids.unlink(missing_ok=True)

    async def _follow_source(self) -> None:
        async with contextlib.aclosing(self._source.updates()) as updates:
            async for update in updates:
                self._node.source_changed(update)

    def _datapath_changed(self) -> None:
        node = self._node
        if node.datapath is not None:
            node.let_pass(node.datapath.pairs)
        if node.datapath is not None and node.datapath.opened:
            for teller in (node.kernel, node.passed):
                if teller is not None:
                    teller.start()
            if node.automata is not None:
                node.automata.open()
        node.look_again()

    def _workers_changed(self) -> None:
        self._node.look_again()

    def _worker_lost(self, number: int, pid: int) -> None:
        """The supervisor makes a new channel, if the worker is still there. Not at once: one that
        refuses its channel time and again must not keep everybody busy."""
        self._loop.call_later(_CHANNEL_PAUSE_S, self._send, Worker(number, pid))

    def _want(self, ports: tuple[PortAddress, ...]) -> None:
        self._send(Want(ports))

    def _hand_over(self, descriptors: Mapping[str, int]) -> None:
        """To the proxies, by way of the supervisor."""
        self._send(Handles(tuple(descriptors)), tuple(descriptors.values()))

    async def _leave(self) -> None:
        self._node.leaving = True
        if self._cni is not None:
            spawn(self._cni.leave(), name="CNI")
        if self._reporter is not None:
            await self._reporter.leave()
        self._send(Leaving())

    def _send(self, message: Want | Worker | Handles | Leaving, fds: tuple[int, ...] = ()) -> None:
        try:
            send_control(self._control, message, fds)
        except OSError as error:
            if not self._stop.is_set():
                _log.error("the supervisor cannot be reached: %s", error)
            self._stop.set()

    def _control_ready(self) -> None:
        while True:
            try:
                received = receive_control(self._control)
            except BlockingIOError:
                return
            if received is None:
                self._loop.remove_reader(self._control.fileno())
                self._stop.set()
                return
            message, fds = received
            match message:
                case Worker(number, pid):
                    sock = socket.socket(fileno=fds.pop())
                    spawn(self._node.rollout.connect(number, pid, sock), name="config channel")
                case Bound():
                    self._node.bound_changed(message)
                case Leaving():
                    spawn(self._leave(), name="leave")
                case Handles() if self._node.datapath is not None:
                    self._node.datapath.handles_taken()
                case _:
                    _log.error("control message %s is not for an agent", type(message).__name__)
            for fd in fds:
                os.close(fd)


class Source(Protocol):
    """What objects come from: a directory, a cluster."""

    def updates(self) -> AsyncGenerator[SourceUpdate, None]: ...

    def origin(self, kind: str, key: ObjectKey) -> tuple[str, int]: ...

    async def close(self) -> None: ...


class Authority(AuthorityClient, Protocol):
    async def close(self) -> None: ...


class Reports(Protocol):
    """Who tells the cluster what is in force here."""

    async def run(self) -> None: ...

    async def leave(self) -> None: ...


def _source(options: AgentOptions) -> tuple[Source, Client | None]:
    """Where objects come from, and the connection to the cluster, if it is one."""
    if options.manifests is not None:
        return DirectorySource(options.manifests, RunDir(options.run_dir).manifests), None
    # 12 MB that nobody needs who has no cluster; so also below.
    from mesh.sources.kubernetes import KubernetesSource

    source = KubernetesSource(options.kubeconfig, secrets_namespace=options.secrets_namespace)
    return source, source.client


def _authority(options: AgentOptions, client: Client | None) -> Authority | None:
    """Who signs for this node: behind a socket, or the cluster's."""
    if options.authority is None:
        return None
    if str(options.authority) != CLUSTER:
        return SocketClient(options.authority)
    if client is None:
        raise OptionError(f"--authority {CLUSTER} needs objects that come from a cluster")
    from mesh.agent.authority_cluster import ClusterAuthority

    return ClusterAuthority(client, _name(options), options.namespace)


def _cni_plugin(
    options: AgentOptions, run_dir: RunDir, datapath: Datapath | None, client: Client | None
) -> CniPlugin | None:
    steer = options.steer
    if steer is None or datapath is None:
        return None
    daemonset = None
    if client is not None and steer.cni is not None:
        from mesh.agent.daemonset import DaemonSet

        daemonset = DaemonSet(client, options.namespace)
    return CniPlugin(run_dir.cni_socket, steer, datapath.in_force, datapath.local_pods, daemonset)


def _reporter(
    options: AgentOptions, client: Client | None, node: Node, authority: Authority | None
) -> Reports | None:
    if client is None:
        return None
    from mesh.agent.cluster import Reporter

    reporter = Reporter(
        node,
        client,
        name=_name(options),
        namespace=options.namespace,
        addresses=options.plane.advertise,
        mesh_addresses=options.plane.mesh_addresses,
        bundle=lambda: getattr(authority, "have", ""),
    )
    node.settled = reporter.changed
    return reporter


def _name(options: AgentOptions) -> str:
    return options.plane.node or socket.gethostname().lower()


def _ready() -> None:
    """Tell whoever started Weft and asked for it (sd_notify(3), NotifyAccess=all)."""
    # What is in force now stays for long: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            try:
                notify.sendto(b"READY=1", address.replace("@", "\0", 1))
            except OSError as error:
                _log.error("NOTIFY_SOCKET %s: %s", address, error)


def main() -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="agent: %(message)s")
    # Ctrl-C reaches the whole foreground group; the supervisor decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    keep_memory_private()
    try:
        options = parse(sys.argv[1:])
    except OptionError as error:
        print(f"agent: {error}", file=sys.stderr)
        return 2
    name_process("weft-agent")
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLD)
    asyncio.run(_run(options))
    return 0


async def _run(options: AgentOptions) -> None:
    await Agent(options, socket.socket(fileno=options.control_fd)).run()


if __name__ == "__main__":
    sys.exit(main())
