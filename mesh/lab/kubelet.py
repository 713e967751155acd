"""Pods that somebody creates on the API server: given to a node, run there, and ended when they are
deleted. What scheduler and kubelet are for them, as far as a lab needs it.

There are no images: the first container's command, args, env and ports are the pod's, and it sees
the host's files as all pods of a lab do. Knows Pods as they come; how they are is told by
mesh.lab.cluster, as of all others.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from typing import Any, NamedTuple

import msgspec

from mesh.lab.config import ContainerPort, PodConfig
from mesh.lab.plan import Plan
from mesh.lab.state import LabDir
from mesh.model.meta import ObjectKey
from mesh.sources.kubernetes_client import Backoff, Client, ServerError, object_path
from mesh.sources.kubernetes_watch import Reflector

_log = logging.getLogger("weft.lab")

_ENDED = ("Succeeded", "Failed")


class _Running(NamedTuple):
    uid: str
    node: str


class Kubelet:
    """All nodes' at once. A sink for Pods; those of the lab's own file are passed over."""

    def __init__(self, client: Client, lab: LabDir, plan: Plan) -> None:
        self._client = client
        self._lab = lab
        self._plan = plan
        self._own = own_pods(plan)
        self._there: dict[ObjectKey, dict[str, Any]] = {}
        self._running: dict[ObjectKey, _Running] = {}
        self._queue: asyncio.Queue[ObjectKey] = asyncio.Queue()

    # --- what the reflector tells ----------------------------------------------------------------

    def changed(self, key: ObjectKey, raw: dict[str, Any]) -> None:
        if key not in self._own:
            self._there[key] = raw
            self._queue.put_nowait(key)

    def gone(self, key: ObjectKey, uid: str, version: str) -> None:
        if self._there.pop(key, None) is not None:
            self._queue.put_nowait(key)

    def reached(self, version: str) -> None:
        pass

    def failing(self, why: ServerError | None) -> None:
        if why is not None:
            _log.warning("Pods cannot be followed: %s", why)

    # --- what is done about it -------------------------------------------------------------------

    async def run(self) -> None:
        """For ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(Reflector(self._client, "/api/v1/pods", self).run(), name="pods")
            group.create_task(self._work(), name="kubelet")

    async def _work(self) -> None:
        backoff = Backoff()
        while True:
            key = await self._queue.get()
            try:
                await self._bring_about(key)
            except (ServerError, OSError) as error:
                _log.warning("Pod %s: %s; trying again", key, error)
                self._queue.put_nowait(key)
                await backoff.wait()
            else:
                backoff.reset()

    async def _bring_about(self, key: ObjectKey) -> None:
        raw, running = self._there.get(key), self._running.get(key)
        ending = raw is None or "deletionTimestamp" in raw["metadata"]
        if running and (ending or raw is None or raw["metadata"]["uid"] != running.uid):
            await self._order(running.node, f"remove {key}")
            del self._running[key]
        if raw is None:
            return
        if ending:
            # Its process has ended: now it may go.
            with contextlib.suppress(ServerError):
                path = object_path("v1", "pods", raw["metadata"])
                options = {"preconditions": {"uid": raw["metadata"]["uid"]}}
                await self._client.request("DELETE", path, {"gracePeriodSeconds": 0}, options)
            return
        if key in self._running or (raw.get("status") or {}).get("phase") in _ENDED:
            return
        node = raw["spec"].get("nodeName") or await self._bind(raw)
        if node not in {one.name for one in self._plan.nodes}:
            _log.error("Pod %s: the lab has no node %s", key, node)
            return
        try:
            order = msgspec.json.encode(_config(raw)).decode()
        except msgspec.ValidationError as error:
            _log.error("Pod %s cannot run in a lab: %s", key, error)
            return
        await self._order(node, f"add {order}")
        self._running[key] = _Running(raw["metadata"]["uid"], node)

    async def _bind(self, raw: dict[str, Any]) -> str:
        """Choose the node with the fewest pods, where no scheduler has chosen one."""
        taken = Counter(one.node for one in self._running.values())
        for pod in self._plan.pods:
            taken[pod.node] += 1
        node = min((one.name for one in self._plan.nodes), key=lambda name: taken[name])
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": raw["metadata"]["name"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        path = object_path("v1", "pods", raw["metadata"])
        await self._client.request("POST", f"{path}/binding", {}, body)
        return node

    async def _order(self, node: str, order: str) -> None:
        """To the node's supervisor. OSError: it does not answer."""
        reader, writer = await asyncio.open_unix_connection(self._lab.orders(node))
        writer.write(f"{order}\n".encode())
        answer = await reader.read()
        writer.close()
        if answer:
            _log.error("node %s: %s", node, answer.decode())


def own_pods(plan: Plan) -> frozenset[ObjectKey]:
    """Those of the lab's file."""
    return frozenset(ObjectKey(pod.namespace, pod.name) for pod in plan.pods)


def _config(raw: dict[str, Any]) -> PodConfig:
    """msgspec.ValidationError: it cannot be a lab's."""
    metadata, spec = raw["metadata"], raw["spec"]
    container = spec["containers"][0]
    ports = tuple(
        ContainerPort(
            name=port.get("name", ""),
            port=port["containerPort"],
            protocol=port.get("protocol", "TCP"),
        )
        for port in container.get("ports") or ()
    )
    config = PodConfig(
        name=metadata["name"],
        namespace=metadata["namespace"],
        labels=metadata.get("labels") or {},
        annotations=metadata.get("annotations") or {},
        service_account=spec.get("serviceAccountName") or "default",
        command=(*(container.get("command") or ()), *(container.get("args") or ())),
        env={one["name"]: one.get("value", "") for one in container.get("env") or ()},
        ports=ports,
        uid=metadata["uid"],
    )
    return msgspec.convert(msgspec.to_builtins(config), PodConfig)
