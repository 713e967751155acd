"""This node's report to the controller, kept up to date in its Lease.

Written soon after something that was asked for is in force, seldom otherwise. A cluster that cannot
be reached changes nothing here but the log: traffic does not depend on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec

from mesh.agent.node import Node
from mesh.model.channel import PortAddress
from mesh.model.meta import ObjectKey
from mesh.model.nodereport import (
    ANNOTATION,
    LABELS,
    LEASE_PREFIX,
    MAX_TEXT,
    NodeReport,
    encode_report,
)
from mesh.sources.kubernetes_client import APPLY, Backoff, Client, ServerError

_log = logging.getLogger("weft.agent")

LEASE_S = 40
_RENEW_S = 10.0
# Reports do not follow each other faster than this, those of news that only says how far the node
# is than that: with many nodes, objects that change all the time would keep the server busy.
_PAUSE_S = 0.1
_VERSIONS_S = 1.0
# So many of the latter a second from all nodes together, more only by what renewals take.
_VERSIONS_PER_S = 50
# The agent's end is not to take long.
_LAST_S = 1.0
_MANAGER = "weft-agent"


class Reporter:
    """`name`: this node's; `addresses`: where clients reach Gateways that name no address;
    `bundle()`: the tag of the trust bundle that is in force."""

    def __init__(
        self,
        node: Node,
        client: Client,
        *,
        name: str,
        namespace: str,
        addresses: tuple[str, ...],
        mesh_addresses: Sequence[str],
        bundle: Callable[[], str],
    ) -> None:
        self._node = node
        self._client = client
        self._name = name
        self._path = (
            f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases/{LEASE_PREFIX}{name}"
        )
        self._namespace = namespace
        self._addresses = addresses
        self._mesh = {one: "::1" if ":" in one else "127.0.0.1" for one in mesh_addresses}
        self._bundle = bundle
        self._changed = asyncio.Event()
        # The report written last but for its versions, and what the Lease belonged to.
        self._said: tuple[NodeReport, list[dict[str, str]]] | None = None
        self._left = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def changed(self) -> None:
        """Something that was asked for is in force now."""
        self._changed.set()

    async def leave(self) -> None:
        """Until the cluster knows that the node is leaving."""
        self._changed.set()
        await self._left.wait()

    async def run(self) -> None:
        """Until cancelled; then the node serves no more, and nobody is to wait for it."""
        try:
            await self._keep_up()
        finally:
            self._node.leaving = True
            if not self._left.is_set():
                with contextlib.suppress(ServerError, TimeoutError):
                    async with asyncio.timeout(_LAST_S):
                        await self._write()

    async def _keep_up(self) -> None:
        backoff, failing = Backoff(), ""
        # That there is no server at first is the source's to say.
        await self._client.reachable.wait()
        while True:
            try:
                await self._write()
            except ServerError as error:
                if failing != str(error):
                    failing = str(error)
                    _log.error("cannot report to the cluster: %s", error)
                await backoff.wait(error.retry_after_s, until=self._client.reachable)
                continue
            failing = ""
            backoff.reset()
            await self._until_due()

    async def _until_due(self) -> None:
        """Until the next report: soon after news, but not one after each."""
        last = self._loop.time()
        due = last + _RENEW_S
        while (left := due - self._loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
                self._changed.clear()
                now = self._loop.time()
                if (_but_versions(self._report()), self._owners()) != self._said:
                    due = min(due, max(now, last + _PAUSE_S))
                else:
                    # What belongs together comes together.
                    nodes = len(self._node.objects.get("Node", {}))
                    pause = max(_VERSIONS_S, nodes / _VERSIONS_PER_S)
                    due = min(due, max(now + _PAUSE_S, last + pause))

    async def _write(self) -> None:
        self._changed.clear()
        report, leaving, owners = self._report(), self._node.leaving, self._owners()
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": f"{LEASE_PREFIX}{self._name}",
                "namespace": self._namespace,
                "labels": LABELS,
                "annotations": {ANNOTATION: encode_report(report)},
                "ownerReferences": owners,
            },
            "spec": {
                "holderIdentity": self._name,
                "leaseDurationSeconds": LEASE_S,
                "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            },
        }
        query = {"fieldManager": _MANAGER, "force": "true"}
        await self._client.request("PATCH", self._path, query, body, content_type=APPLY)
        self._said = _but_versions(report), owners
        if leaving:
            self._left.set()

    def _owners(self) -> list[dict[str, str]]:
        """The Node, where this is one of the cluster's: the Lease goes with it, as its kubelet's
        does ("Owners and dependents")."""
        node = self._node.objects.get("Node", {}).get(ObjectKey("", self._name))
        if node is None:
            return []
        uid = node.metadata.uid or ""
        return [{"apiVersion": "v1", "kind": "Node", "name": self._name, "uid": uid}]

    def _report(self) -> NodeReport:
        node = self._node
        bound = node.bound
        ports = {self._port(one): "" for one in (bound.bound if bound else ())}
        failed = bound.failed if bound else ()
        ports.update({self._port(one): why[:MAX_TEXT] for one, why in failed})
        return NodeReport(
            node=self._name,
            ready=node.ready_once and not node.not_ready(),
            versions=dict(node.in_force),
            ports=ports,
            refused={key: why[:MAX_TEXT] for key, why in sorted(node.refusals.items())},
            addresses=self._addresses,
            bundle=self._bundle(),
            mesh=node.datapath is not None,
        )

    def _port(self, port: PortAddress) -> str:
        address = self._mesh.get(port.address, port.address)
        return f"{f'[{address}]' if ':' in address else address}:{port.port}"


def _but_versions(report: NodeReport) -> NodeReport:
    return msgspec.structs.replace(report, versions={})
