"""The supervisor of a node: keeps its Weft running, adds its pods to the network, runs their
commands, says how they are.

What systemd and the kubelet are in a cluster, and the node's DNS server as well. One process for
each node, in the node's network namespace, started by `weft lab up` and ended with the lab:

    python -m mesh.lab.supervisor RUN_DIR LAB NODE

which returns at once: the supervisor is nobody's child.

A pod is ready while its process runs, from when all its ports are open for others than itself. One
that cannot have a network yet (mesh.lab.cni.NotYet) waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from l7proxy.tasks import spawn
from mesh.lab import cni
from mesh.lab.cgroups import remove_tree
from mesh.lab.config import PodConfig
from mesh.lab.dns import Names, serve
from mesh.lab.enter import enter_pod, pod_env, write_etc
from mesh.lab.errors import LabError
from mesh.lab.kernel import CLONE_NEWNET, create_netns, join, remove_netns
from mesh.lab.manifests import endpoint_slices, pods, to_yaml
from mesh.lab.plan import DNS_ADDRESS, Addresses, NodePlan, Plan, PodPlan, ServicePlan, with_pod
from mesh.lab.state import LabDir, NodeStatus, PodStatus
from mesh.lab.weft import NodeWeft

IFNAME = "eth0"
# What a pod gets to end by itself, and pod and Weft to become ready when they are started again.
GRACE_S = 5.0
START_S = 30.0
# What Weft gets to end: more than it gives its connections.
DRAIN_S = 40.0
# Between two attempts to add pods that could not be added yet.
_AGAIN_S = 0.5
# Between two looks at the ports of a pod that is starting.
_LOOK_S = 0.05
# States of sockets that others can reach, in /proc/net (include/net/tcp_states.h): TCP_LISTEN, and
# TCP_CLOSE, which is a UDP socket without peer.
_OPEN = {"TCP": "0A", "UDP": "07"}
_LOOPBACK = ("0100007F", "00000000000000000000000001000000")


class Supervisor:
    """One node at work."""

    def __init__(self, lab: LabDir, plan: Plan, node: NodePlan) -> None:
        self._lab = lab
        self._plan = plan
        self._node = node
        self._pods = {pod.key: pod for pod in plan.pods_of(node.name)}
        self._status = {key: PodStatus(key=key, phase="Pending") for key in self._pods}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._publishing = False
        self._ordered = asyncio.Lock()
        self._changed = asyncio.Event()
        self._weft = NodeWeft(lab, plan, node, self._weft_changed)

    def start_weft(self) -> None:
        """Start the node's Weft and wait until it is ready, so that pods are known and steered
        from their first connection."""
        self._publish()
        self._weft.start()

    def add_pods(self) -> None:
        """Everything that pods need before their processes start. Outside any event loop: pyroute2
        has its own."""
        for pod in self._pods.values():
            try:
                self._add(pod)
            except cni.NotYet as error:
                self._change(pod.key, message=str(error))
            except (cni.CniError, OSError) as error:
                self._change(pod.key, phase="Failed", message=str(error))

    async def run(self) -> None:
        """Until the process is killed."""
        self._loop = asyncio.get_running_loop()
        server = await serve(Names(self._plan, self._ready_pods), DNS_ADDRESS)
        await asyncio.start_unix_server(self._take_order, self._lab.orders(self._node.name))
        keeping = spawn(self._weft.keep(), name="weft")
        async with self._ordered:
            for pod in self._pods.values():
                if self._status[pod.key].message:
                    continue
                try:
                    self._start(pod)
                except (OSError, subprocess.SubprocessError) as error:
                    self._set(pod.key, phase="Failed", message=str(error))
                await asyncio.sleep(0)  # pods that already run are looked at meanwhile
            self._publish()
        await asyncio.gather(server.serve_forever(), keeping, self._add_when_possible())

    async def _add_when_possible(self) -> None:
        """For ever: pods that could not be added yet."""
        while True:
            await asyncio.sleep(_AGAIN_S)
            async with self._ordered:
                for pod in [one for one in self._pods.values() if self._status[one.key].waits]:
                    with contextlib.suppress(cni.CniError, OSError, subprocess.SubprocessError):
                        await self._add_and_start(pod, self._connect)

    async def _take_order(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One line, "stop KEY" or "start KEY", KEY being a pod's, or this node's for its Weft; "add
        POD" (mesh.lab.config.PodConfig as JSON), "remove KEY"; the answer is what went wrong, or
        nothing."""
        order, key = (await reader.readline()).decode().rstrip().split(maxsplit=1)
        answer = ""
        async with self._ordered:
            try:
                if order == "add":
                    await self._admit(msgspec.json.decode(key, type=PodConfig))
                elif order == "remove":
                    await self._forget(self._pods[key])
                elif key == self._node.key:
                    await (self._stop_weft if order == "stop" else self._start_weft_again)()
                else:
                    await (self._stop if order == "stop" else self._start_again)(self._pods[key])
            except (LabError, cni.CniError, OSError, subprocess.SubprocessError) as error:
                answer = str(error)
        writer.write(answer.encode())
        writer.close()
        await writer.wait_closed()

    async def _stop_weft(self) -> None:
        self._weft.want(False)
        await self._until(lambda: self._weft.stopped, DRAIN_S)
        if not self._weft.stopped:
            raise LabError(f"Weft of {self._node.key} still drains its connections")

    async def _start_weft_again(self) -> None:
        if self._weft.running:
            raise LabError(f"Weft of {self._node.key} is running: stop it first")
        self._weft.want(True)
        await self._until(lambda: self._weft.ready, START_S)
        if not self._weft.ready:
            raise LabError(
                f"Weft of {self._node.key} is not ready: see {self._lab.weft_log(self._node.name)}"
            )

    def _weft_changed(self) -> None:
        self._changed.set()
        self._publish_soon()

    async def _stop(self, pod: PodPlan) -> None:
        """No new connections first, then SIGTERM, then SIGKILL to all that is left, then the
        network."""
        if self._status[pod.key].phase == "Stopped":
            return
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._set(pod.key, phase="Terminating", ready=False, deletion_timestamp=now)
        process = self._processes.get(pod.key)
        if process is not None:
            self._publish()
            process.terminate()
            await self._until(lambda: pod.key not in self._processes, GRACE_S)
        # In a thread for pyroute2's sake; a thread is in the network namespace of its creator.
        await asyncio.to_thread(self._remove, pod)
        start = self._status[pod.key].start
        self._status[pod.key] = PodStatus(key=pod.key, phase="Stopped", start=start)
        self._publish()

    async def _start_again(self, pod: PodPlan) -> None:
        """With its addresses as before; waits until it is ready."""
        if self._status[pod.key].phase == "Running":
            raise LabError(f"{pod.key} is running: stop it first")
        await self._stop(pod)
        start = self._status[pod.key].start + 1
        self._status[pod.key] = PodStatus(key=pod.key, phase="Pending", start=start)
        self._publish()
        await self._add_and_start(pod, self._add)
        await self._until(lambda: self._status[pod.key].settled, START_S)
        self._publish()

    async def _admit(self, config: PodConfig) -> None:
        """One pod more, with addresses that are free."""
        self._plan, pod = with_pod(self._plan, self._node, config)
        self._pods[pod.key] = pod
        self._status[pod.key] = PodStatus(key=pod.key, phase="Pending")
        self._remember()
        await self._add_and_start(pod, self._add)

    async def _add_and_start(self, pod: PodPlan, add: Callable[[PodPlan], None]) -> None:
        try:
            await asyncio.to_thread(add, pod)
            self._start(pod)
        except cni.NotYet as error:
            self._set(pod.key, message=str(error))
        except (cni.CniError, OSError, subprocess.SubprocessError) as error:
            self._set(pod.key, phase="Failed", message=str(error))
            raise

    async def _forget(self, pod: PodPlan) -> None:
        """End it, and have no such pod any more."""
        await self._stop(pod)
        left = tuple(one for one in self._plan.pods if one.key != pod.key)
        self._plan = msgspec.structs.replace(self._plan, pods=left)
        del self._pods[pod.key], self._status[pod.key]
        self._remember()

    def _remember(self) -> None:
        late = tuple(pod for pod in self._pods.values() if pod.uid)
        self._lab.write_late_pods(self._node.name, late)
        self._publish()

    async def _until(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Wait for something, and no longer than that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()

    def _remove(self, pod: PodPlan) -> None:
        """What is left of it, if anything."""
        remove_tree(Path(pod.cgroup))
        cni.delete(pod.container_id, IFNAME, self._network(pod))
        remove_netns(Path(pod.netns))

    def _add(self, pod: PodPlan) -> None:
        self._make(pod)
        self._connect(pod)

    def _make(self, pod: PodPlan) -> None:
        Path(pod.cgroup).mkdir()
        create_netns(Path(pod.netns))

    def _connect(self, pod: PodPlan) -> None:
        network = pod.container_id, pod.netns, IFNAME, self._network(pod)
        cni.add(*network)
        cni.check(*network)
        write_etc(self._lab, pod)

    def _network(self, pod: PodPlan) -> cni.CniConfig:
        weft = self._lab.weft(self._node.name)
        return cni.CniConfig(
            addresses=pod.addresses,
            node_addresses=self._node.addresses,
            datapath=cni.CniDatapath(pins=weft.pins, records=weft.pods),
        )

    def _start(self, pod: PodPlan) -> None:
        if not pod.command:
            self._set(pod.key, phase="Running", ready=True)
            return

        def enter() -> None:
            try:
                enter_pod(self._lab, pod)
            except OSError as error:
                # To the pod's log; all that Popen says is that this function failed.
                os.write(2, f"weft: cannot enter the pod: {error}\n".encode())
                raise

        with open(self._lab.log(pod), "ab") as log:
            process = subprocess.Popen(
                pod.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._plan.directory,
                env=pod_env(pod),
                start_new_session=True,
                preexec_fn=enter,
            )
        self._processes[pod.key] = process
        start = self._status[pod.key].start
        self._status[pod.key] = PodStatus(
            key=pod.key, phase="Running", pid=process.pid, start=start
        )
        pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(pidfd, self._exited, pod.key, pidfd)
        self._set(pod.key)
        self._look(pod)

    def _exited(self, key: str, pidfd: int) -> None:
        self._loop.remove_reader(pidfd)
        os.close(pidfd)
        code = self._processes.pop(key).wait()
        self._changed.set()
        if self._status[key].phase == "Running":
            self._set(key, phase="Exited", ready=False, pid=None, exit_code=code)

    def _look(self, pod: PodPlan) -> None:
        """Ready once all ports are open; looks again until then, or until the process ends."""
        process = self._processes.get(pod.key)
        if process is None or self._status[pod.key].phase != "Running":
            return
        if {(port.protocol, port.port) for port in pod.ports} <= set(_open_ports(process.pid)):
            self._set(pod.key, ready=True)
        else:
            self._loop.call_later(_LOOK_S, self._look, pod)

    def _change(self, key: str, **changes: object) -> None:
        self._status[key] = msgspec.structs.replace(self._status[key], **changes)

    def _set(self, key: str, **changes: object) -> None:
        self._change(key, **changes)
        self._changed.set()
        self._publish_soon()

    def _publish_soon(self) -> None:
        if not self._publishing:
            self._publishing = True
            self._loop.call_soon(self._publish)

    def _publish(self) -> None:
        """Pods and endpoints first: whoever sees a pod ready finds it among them."""
        self._publishing = False
        for what, objects in (("pods", pods), ("endpoints", endpoint_slices)):
            file = self._lab.manifests / f"{what}.{self._node.name}.yaml"
            self._lab.write(file, to_yaml(objects(self._plan, self._node.name, self._status)))
        status = NodeStatus(
            pid=os.getpid(),
            weft_ready=self._weft.ready,
            weft_stopped=self._weft.stopped,
            pods=tuple(self._status.values()),
        )
        self._lab.write_node_status(self._node.name, status)

    def _ready_pods(self, service: ServicePlan) -> Iterator[Addresses]:
        """On all nodes."""
        statuses = map(self._lab.node_status, (node.name for node in self._plan.nodes))
        ready = {pod.key for node in statuses if node for pod in node.pods if pod.ready}
        return (
            pod.addresses for pod in self._plan.pods if pod.key in ready and service.selects(pod)
        )


def _open_ports(pid: int) -> Iterator[tuple[str, int]]:
    """Protocols and ports that others can reach in the network namespace of a process."""
    for protocol, state in _OPEN.items():
        for version in ("", "6"):
            try:
                table = Path(f"/proc/{pid}/net/{protocol.lower()}{version}").read_text()
            except OSError:  # it ended just now
                return
            for line in table.splitlines()[1:]:
                local, found = line.split()[1:4:2]
                address, _, port = local.partition(":")
                if found == state and address not in _LOOPBACK:
                    yield protocol, int(port, 16)


def main() -> None:
    run_dir, name, node_name = sys.argv[1:]
    lab = LabDir(Path(run_dir), name)
    plan = lab.plan()
    if plan is None:
        sys.exit(f"no lab {name} in {run_dir}")
    if os.fork():
        os._exit(0)
    node = plan.node(node_name)
    join(node.netns, CLONE_NEWNET)
    supervisor = Supervisor(lab, plan, node)
    supervisor.start_weft()
    supervisor.add_pods()
    asyncio.run(supervisor.run())


if __name__ == "__main__":
    main()
