"""`weft controller`: writes what is true of Gateway API objects into their status.

The same derivation as on every node, fed with the same objects and with what all nodes say of their
data planes; what follows is written by the one controller that leads, once every node that serves
has in force what it follows from. Knows the order of things; no requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from gateway.control import KINDS as INPUTS
from gateway.control import ControlPlane, Options
from gateway.keys import ROUTE_KINDS, PortKey
from mesh.controller.balancers import Balancers
from mesh.controller.certificates import Certificates
from mesh.controller.election import Election
from mesh.controller.events import Recorder
from mesh.controller.health import Health
from mesh.controller.nodes import Nodes
from mesh.controller.secrets import Copies
from mesh.controller.writer import Ident, Wanted, Writer
from mesh.model.gateway import GatewayStatus, GatewayStatusAddress
from mesh.model.meta import ObjectKey
from mesh.model.nodereport import LABELS
from mesh.model.references import ParentReference, RouteStatus
from mesh.model.section import SectionKey
from mesh.policy.spec import KINDS as POLICY_KINDS
from mesh.sources.kubernetes import KubernetesSource
from mesh.sources.kubernetes_client import Backoff
from mesh.sources.kubernetes_watch import Reflector
from mesh.sources.update import SourceUpdate

_log = logging.getLogger("weft.controller")

# Stands in statuses for the addresses of the nodes, which come and go without anything else in them
# changing.
_NODES = "nodes.weft.invalid"
_MAX_ADDRESSES = 16
_WITH_STATUS = frozenset(
    (
        *("GatewayClass", "Gateway", "ListenerSet", "BackendTLSPolicy"),
        *(*ROUTE_KINDS, *POLICY_KINDS),
    )
)
_LONG_S = 30.0
# The mesh's own addresses differ from node to node; reports name them so (mesh.model.nodereport).
_MESH_ADDRESSES = ("127.0.0.1", "::1")


class ControllerOptions(NamedTuple):
    """`kubeconfig` None: the environment's, or the pod's service account. `identity`: this
    controller's, unlike any other's. `mesh`: nodes run with --steer. `trust_domain`: whose
    identities are signed, "" none's. `load_balancer`: Gateways that name no address get a Service
    of that type, not the nodes' addresses. `secrets_namespace`: where nodes find copies of the
    Secrets that they need; "": they read the Secrets themselves. `health_port`: where a kubelet
    asks, 0 for nowhere. `ca`, `federation`: what the authority is given, see
    mesh.controller.given."""

    kubeconfig: Path | None
    namespace: str
    identity: str
    addresses: tuple[str, ...] = ()
    bind_address: str = "0.0.0.0"
    advertise: tuple[str, ...] = ()
    mesh: bool = False
    trust_domain: str = ""
    load_balancer: bool = False
    secrets_namespace: str = ""
    health_port: int = 0
    ca: str = ""
    federation: Mapping[str, str] = {}


class _Held(NamedTuple):
    """Statuses that become true once the nodes have these versions in force."""

    needed: Mapping[str, int]
    statuses: Mapping[Ident, Wanted]


class Controller:
    def __init__(
        self, options: ControllerOptions, *, backoff: Callable[[], Backoff] = Backoff
    ) -> None:
        plane = Options(
            addresses=options.addresses,
            bind_address=options.bind_address,
            advertise=options.advertise or (_NODES,),
            mesh_addresses=_MESH_ADDRESSES if options.mesh else (),
        )
        self._plane = ControlPlane(plane)
        self._name = plane.controller_name
        self._mesh = options.mesh
        self._wake = asyncio.Event()
        self.nodes = Nodes(self._wake.set, self._node_uid)
        self._source = KubernetesSource(
            options.kubeconfig,
            # Without a mesh, policies are somebody else's to enforce, and to speak of.
            kinds=frozenset((*INPUTS, *ROUTE_KINDS, *(POLICY_KINDS if options.mesh else ()))),
            seen=self._seen,
            secrets_namespace=options.secrets_namespace,
            backoff=backoff,
        )
        client = self._source.client
        self.writer = Writer(
            client,
            self._name,
            self._source.written,
            self._source.version,
            Recorder(client, options.identity),
            backoff,
        )
        self.balancers = (
            Balancers(
                self._source,
                self._name,
                lambda key: ("Gateway", key) in self._on_nodes,
                self._plane.gateway_ports,
            )
            if options.load_balancer
            else None
        )
        # Where no node may write: who takes this Lease stops statuses and certificates.
        apart = options.secrets_namespace or options.namespace
        self.election = Election(client, apart, options.identity, self._led)
        self.certificates = (
            Certificates(
                self._source,
                options.namespace,
                options.trust_domain,
                options.ca,
                options.federation,
                self.nodes.without_bundle,
                backoff,
            )
            if options.trust_domain
            else None
        )
        self.copies = (
            Copies(self._source, options.secrets_namespace, self._wake.set, backoff)
            if options.secrets_namespace
            else None
        )
        self._leases = Reflector(
            client,
            f"/apis/coordination.k8s.io/v1/namespaces/{options.namespace}/leases",
            self.nodes,
            query={"labelSelector": ",".join(f"{k}={v}" for k, v in LABELS.items())},
        )
        self._health = Health(options.health_port, self.not_ready) if options.health_port else None
        self._pending: dict[str, dict[ObjectKey, Any]] = {}
        self._needed: Mapping[str, int] = {}
        self._synced = False
        self._binds: Mapping[PortKey, str] = {}
        self._refusals: Mapping[SectionKey, str] = {}
        self._held: list[_Held] = []
        self._on_nodes: dict[Ident, Wanted] = {}
        # Of the objects that statuses are derived from.
        self._uids: dict[Ident, str] = {}
        self._derived: dict[Ident, msgspec.Struct | None] = {}
        self._addresses: tuple[str, ...] = ()
        self._addresses_changed = False

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self._source.open()
            if self._health is not None:
                await self._health.open()
            await self._run()
        finally:
            if self._health is not None:
                await self._health.close()
            await self._source.close()

    def not_ready(self) -> list[str]:
        """Why this controller could not lead, were it its turn."""
        reasons = [] if self._synced else ["the cluster's objects have not been read yet"]
        if not self._leases.synced:
            reasons.append("the nodes' Leases have not been read yet")
        return reasons

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="source")
            group.create_task(self._leases.run(), name="leases")
            group.create_task(self.writer.run(), name="writer")
            group.create_task(self.election.run(), name="election")
            group.create_task(self._work(), name="controller")
            group.create_task(self._watch_over(), name="waiting")
            if self.balancers is not None:
                group.create_task(self.balancers.run(), name="load balancers")
            if self.copies is not None:
                group.create_task(self.copies.run(), name="secrets")
            if self.certificates is not None:
                group.create_task(self.certificates.run(), name="certificates")

    async def _follow(self) -> None:
        async with contextlib.aclosing(self._source.updates()) as updates:
            async for update in updates:
                self._source_changed(update)

    def _source_changed(self, update: SourceUpdate) -> None:
        for kind, changes in update.changes.items():
            self._pending.setdefault(kind, {}).update(changes)
        if update.changes:
            self._needed = update.newest
        self._synced = self._synced or update.complete
        if self.certificates is not None:
            self.certificates.changed(update)
        self._wake.set()

    def _node_uid(self, name: str) -> str:
        node = self._source.get("Node", ObjectKey("", name))
        return "" if node is None else node.metadata.uid or ""

    def _seen(self, kind: str, key: ObjectKey) -> None:
        """An object is another than before, if only in its status."""
        self.writer.look_again(((kind, key),))
        if kind == "Service" and self.balancers is not None:
            self._addresses_changed = True
            self._wake.set()
        if kind == "EndpointSlice" and self.balancers is not None:
            self.balancers.seen(kind, key)
        if self.copies is not None and kind == "Secret":
            self.copies.look_again()
        if self.certificates is not None:
            self.certificates.seen(kind, key)

    def _led(self, leading: bool) -> None:
        self.writer.enabled = leading
        if self.balancers is not None:
            self.balancers.enabled = leading
            self.balancers.look_again([key for _, key in self._on_nodes])
        if self.copies is not None:
            self.copies.enabled = leading
            self.copies.look_again()
        if self.certificates is not None:
            self.certificates.led(leading)
        if leading:
            self._wake.set()
            self.writer.look_again(self.writer.wanted)

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._synced:
                self._derive()
                if self.copies is None or self.copies.settled():
                    self._release()
                if self.certificates is not None:
                    self.certificates.authority.look_again()

    async def _watch_over(self) -> None:
        """Say who is waited for, where that takes long."""
        while True:
            held = self._held[0] if self._held else None
            await asyncio.sleep(_LONG_S)
            if held is not None and self._held and self._held[0] is held:
                who = "; ".join(self.nodes.lagging(self._still(held.needed)))
                _log.warning("statuses have waited for %g s for %s", _LONG_S, who)

    def _derive(self) -> None:
        answer = self.nodes.answer()
        changes, self._pending = self._pending, {}
        outcome = self._plane.apply(
            changes,
            refusals=_difference(self._refusals, answer.refusals),
            binds=_difference(self._binds, answer.binds),
        )
        self._refusals, self._binds = answer.refusals, answer.binds
        if self.copies is not None:
            self.copies.derived(changes.get("Secret", {}))
            self.copies.want(self._plane.wanted_secrets())
        for cell, error in outcome.failures.items():
            _log.error("defect in deriving %s of %s", *cell, exc_info=error)
        if statuses := self._whose(changes, outcome.statuses):
            self._held.append(_Held(self._needed, statuses))

    def _whose(
        self,
        changes: Mapping[str, Mapping[ObjectKey, Any]],
        statuses: Mapping[Ident, msgspec.Struct | None],
    ) -> dict[Ident, Wanted]:
        """Statuses that are new, or those of another object now that has taken the name."""
        result = {}
        for ident, status in statuses.items():
            self._derived[ident] = status
            result[ident] = Wanted(status, "")
        for kind in changes.keys() & _WITH_STATUS:
            for key, obj in changes[kind].items():
                ident = kind, key
                uid = "" if obj is None else obj.metadata.uid or ""
                if self._uids.get(ident, "") != uid and ident in self._derived:
                    result[ident] = Wanted(self._derived[ident], "")
                self._uids[ident] = uid
                if not uid:
                    del self._uids[ident]
        for ident, wanted in result.items():
            result[ident] = wanted._replace(uid=self._uids.get(ident, ""))
            if wanted.status is None:
                del self._derived[ident]
        return result

    def _release(self) -> None:
        """Statuses that have become true, the newest of each object."""
        true: dict[Ident, Wanted] = {}
        while self._held and self.nodes.have(self._still(self._held[0].needed)):
            true.update(self._held.pop(0).statuses)
        # With no node that serves nothing is said, not even this.
        addresses = self.nodes.addresses() or self._addresses
        if addresses != self._addresses or self._addresses_changed:
            self._addresses, self._addresses_changed = addresses, False
            true = {**self._on_nodes, **true}
        if self.balancers is not None:
            self.balancers.nodes_changed(addresses)
            self.balancers.look_again([key for kind, key in true if kind == "Gateway"])
        for ident, wanted in true.items():
            status = wanted.status
            self._on_nodes.pop(ident, None)
            if isinstance(status, GatewayStatus) and any(
                one.value == _NODES for one in status.addresses
            ):
                self._on_nodes[ident] = wanted
                true[ident] = wanted._replace(status=self._placed(ident[1], status))
            elif isinstance(status, RouteStatus):
                true[ident] = wanted._replace(status=self._answered(ident, status))
        if true:
            self.writer.want(true)
        if self.election.leading and not self._held:
            self._clear_left()

    def _still(self, needed: Mapping[str, int]) -> dict[str, int]:
        """Without kinds that are not served any more: no node will ever have those in force."""
        return {kind: version for kind, version in needed.items() if kind in self._needed}

    def _answered(self, ident: Ident, status: RouteStatus) -> RouteStatus:
        """Without the parents that nobody, or another mesh, may have something to say of: in a
        cluster with several controllers a Gateway that does not exist is no one's."""

        def ours(ref: ParentReference) -> bool:
            if ref.kind == "Service":
                return self._mesh
            key = ObjectKey(ref.namespace or ident[1].namespace, ref.name)
            return self._source.get(ref.kind, key) is not None

        parents = tuple(one for one in status.parents if ours(one.parent_ref))
        return msgspec.structs.replace(status, parents=parents)

    def _placed(self, key: ObjectKey, status: GatewayStatus) -> GatewayStatus:
        if self.balancers is not None:
            return self.balancers.placed(key, status)
        addresses = tuple(
            GatewayStatusAddress(type="IPAddress", value=address)
            for address in self._addresses[:_MAX_ADDRESSES]
        )
        others = tuple(one for one in status.addresses if one.value != _NODES)
        return msgspec.structs.replace(status, addresses=(*addresses, *others)[:_MAX_ADDRESSES])

    def _clear_left(self) -> None:
        """Entries that a controller before this one left in lists that are shared."""
        if self._cleared:
            return
        self._cleared = True
        left: dict[Ident, Wanted] = {}
        for kind in (*ROUTE_KINDS, "BackendTLSPolicy"):
            for key, written in self._source.all_written(kind).items():
                entries = written.status.get("parents") or written.status.get("ancestors") or ()
                if (kind, key) not in self.writer.wanted and any(
                    one.get("controllerName") == self._name for one in entries
                ):
                    left[kind, key] = Wanted(None, written.uid)
        self.writer.want(left)

    _cleared = False


def _difference(before: Mapping[Any, str], after: Mapping[Any, str]) -> dict[Any, str | None]:
    result: dict[Any, str | None] = {key: None for key in before if key not in after}
    result.update({key: why for key, why in after.items() if before.get(key) != why})
    return result


async def serve(options: ControllerOptions) -> None:
    """Until SIGTERM or SIGINT; what is led is handed over."""
    controller = Controller(options)
    loop = asyncio.get_running_loop()
    task = loop.create_task(controller.run(), name="controller")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
