"""What a worker has in force: ports, certificates, routes, clusters, settings.

Takes deltas section by section, refuses what cannot be enforced (the value before stays), and
accepts on every port that is both configured and handed over by the supervisor. It knows no
requests (`exchange`) and no processes (`worker`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from dataclasses import dataclass, field
from typing import Literal

from l7proxy import forwarding, metrics
from l7proxy.acceptor import Acceptor, Admission
from l7proxy.accesslog import AccessLog
from l7proxy.credentials import Credentials
from l7proxy.direct import Direct
from l7proxy.entry import GatewayPort
from l7proxy.exchange import Exchanges
from l7proxy.flows import FlowLog
from l7proxy.handles import Handles, Kernel
from l7proxy.http_acceptor import HttpAcceptor
from l7proxy.lanes import Lanes
from l7proxy.listening import Bind, Listening
from l7proxy.mesh import Mesh
from l7proxy.pairs import Pairs
from l7proxy.peers import Peers
from l7proxy.policies import Policies
from l7proxy.relay import RelayAcceptor
from l7proxy.routing import Refused, RouteIndex
from l7proxy.series import SeriesNumbers
from l7proxy.series_room import SeriesRoom
from l7proxy.tls_server import ServerTLS, TLSRefused
from l7proxy.tunnel import Digger
from l7proxy.tunnel_acceptor import TunnelAcceptor
from l7proxy.tunnels import Tunnels
from l7proxy.upstream import Clusters, ClusterStats
from mesh.model.nodeconfig import (
    CertificateSection,
    ClusterSection,
    Delta,
    MeshPort,
    NodeSection,
    PortSection,
    Section,
    ServiceSection,
    Settings,
    SvidSection,
    TrustBundleSection,
    WorkloadSection,
)
from mesh.model.policyconfig import CidrSection, PolicySection
from mesh.model.routeconfig import RouteSection
from mesh.model.section import SectionKey

_log = logging.getLogger("weft.proxy")

_NOTHING = ClusterStats()

# What others build on comes first.
_ORDER: dict[type, int] = {
    Settings: 0,
    CertificateSection: 1,
    SvidSection: 1,
    TrustBundleSection: 1,
    NodeSection: 1,
    ClusterSection: 2,
    RouteSection: 3,
    WorkloadSection: 4,
    ServiceSection: 5,
    PortSection: 6,
    MeshPort: 7,
}


def _position(item: tuple[SectionKey, Section]) -> int:
    return _ORDER.get(type(item[1]), len(_ORDER))


@dataclass(slots=True)
class _Served:
    """A configured port of a Gateway: what the exchange needs, and who accepts."""

    port: GatewayPort
    acceptor: HttpAcceptor


@dataclass(slots=True)
class _State:
    settings: Settings = field(default_factory=Settings)
    certificates: dict[SectionKey, CertificateSection] = field(default_factory=dict)
    served: dict[Bind, _Served] = field(default_factory=dict)
    mesh: dict[Bind, Acceptor] = field(default_factory=dict)
    keys: dict[SectionKey, Section] = field(default_factory=dict)
    refused: dict[SectionKey, str] = field(default_factory=dict)


class Proxy:
    """The data plane of one worker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log: AccessLog, flows: FlowLog) -> None:
        self._state = _State()
        self._listening = Listening(loop, self._acceptor_at)
        self._routes = RouteIndex()
        self._kernel = Kernel()
        self._credentials = Credentials()
        self._peers = Peers(self._credentials, self._state.settings)
        self.tunnels = Tunnels(self._credentials)
        self._digger = Digger(self._peers, self.tunnels)
        self._clusters = Clusters(self._state.settings, self._kernel, self._digger)
        self._admission = Admission()
        self._admission.idle.set()
        self._access_log = log
        self._policies = Policies(self._peers)
        self._pairs = Pairs(
            self._kernel,
            self._routes,
            self._policies,
            self._peers,
            SeriesRoom(SeriesNumbers(os.environ.get("PROMETHEUS_MULTIPROC_DIR")), self._kernel),
        )
        self._exchanges = Exchanges(
            self._routes,
            self._clusters,
            self._state.settings,
            log,
            flows,
            self._policies,
            self._pairs,
        )
        self._lanes = Lanes(self._exchanges, self._peers)
        self._exchanges.lane = self._lanes.lane
        self._direct = Direct(self._clusters)
        self._mesh = Mesh(self._direct, self._peers)
        self._reported: dict[str, ClusterStats] = {}

    # --- configuration ------------------------------------------------------------------------

    def apply(self, delta: Delta) -> dict[SectionKey, str]:
        """Put a delta in force; returns every refusal that now holds.

        One step of the event loop: no request sees half of it. ValueError: the delta does not
        continue from here, so a whole value is needed.
        """
        state = self._state
        if delta.base is None:
            gone = state.keys.keys() - delta.put.keys()
        elif delta.base != self._exchanges.version:
            raise ValueError(f"delta from {delta.base}, but {self._exchanges.version} is in force")
        else:
            gone = {key for key in delta.remove if key in state.keys}
        stale_tls: set[Bind] = set()
        changed: list[tuple[SectionKey, Section]] = []
        for key, section in sorted(delta.put.items(), key=_position):
            before = state.keys.get(key)
            if before == section and key not in state.refused:
                continue
            changed += [(key, one) for one in (before, section) if one is not None]
            try:
                stale_tls |= self._put(key, section)
            except (Refused, TLSRefused) as error:
                state.refused[key] = str(error)
                if isinstance(section, PolicySection):
                    state.keys[key] = section  # it refuses everything, until it goes
            except Exception as error:  # of this section; the others must not wait for its mending
                _log.exception("section %s cannot be put in force", key)
                state.refused[key] = f"a fault of the proxy's, its log has it: {error!r}"
                if isinstance(section, PolicySection):
                    state.keys[key] = section
            else:
                state.refused.pop(key, None)
                state.keys[key] = section
        for key in gone:
            section = state.keys.pop(key)
            changed.append((key, section))
            stale_tls |= self._remove(key, section)
        known = delta.put.keys() - set(delta.remove) if delta.base is None else None
        for key in [
            key
            for key in state.refused
            if (key not in known if known is not None else key in delta.remove)
        ]:
            del state.refused[key]
        for bind in stale_tls:
            self._reload_tls(bind)
        self._policies.told()
        self._peers.told()
        self.tunnels.changed((*delta.put, *gone))
        self._pairs.changed(delta.made_ns, changed)
        self._lanes.changed(state.settings)
        self._exchanges.version = delta.version
        return dict(state.refused)

    def _put(self, key: SectionKey, section: Section) -> set[Bind]:
        """Put one section in force; returns the ports whose TLS must be looked at again."""
        state = self._state
        match section:
            case Settings():
                forwarding.check(section)
                state.settings = self._exchanges.settings = section
                self._clusters.settings = self._peers.settings = self._pairs.settings = section
                self._access_log.format = section.access_log
            case CertificateSection():
                ServerTLS.check_certificate(key, section)
                state.certificates[key] = section
                self._exchanges.certificates = state.certificates
                return self._ports_with(key)
            case ClusterSection():
                self._clusters.put(key, section)
            case RouteSection():
                self._routes.put(key, section)
            case WorkloadSection():
                self._peers.put_workload(key, section)
            case NodeSection():
                self._peers.put_node(key, section)
            case CidrSection() | PolicySection():
                self._policies.put(key, section)
            case SvidSection():
                self._credentials.put_svid(section)
            case TrustBundleSection():
                self._credentials.put_bundle(section)
            case ServiceSection():
                self._mesh.put_service(key, section)
            case PortSection():
                self._put_port(section)
            case MeshPort():
                self._put_mesh_port(section)
            case _:
                raise Refused(f"a {type(section).__name__} is not for the proxy")
        return set()

    def _remove(self, key: SectionKey, section: Section) -> set[Bind]:
        state = self._state
        match section:
            case Settings():
                self._put(key, Settings())
            case CertificateSection():
                del state.certificates[key]
                return self._ports_with(key)
            case ClusterSection():
                self._clusters.remove(key)
            case RouteSection():
                self._routes.remove(key)
            case WorkloadSection():
                self._peers.remove_workload(key)
            case NodeSection():
                self._peers.remove_node(key)
            case CidrSection() | PolicySection():
                self._policies.remove(key)
            case SvidSection(spiffe_id=spiffe_id):
                self._credentials.remove_svid(spiffe_id)
            case TrustBundleSection(trust_domain=trust_domain):
                self._credentials.remove_bundle(trust_domain)
            case ServiceSection():
                self._mesh.remove_service(key)
            case PortSection(address=address, port=port):
                self._retire(state.served.pop((address, port)).acceptor, (address, port))
            case MeshPort(address=address, port=port):
                self._retire(state.mesh.pop((address, port)), (address, port))
                self._tell_own_addresses()
        return set()

    def _ports_with(self, certificate: SectionKey) -> set[Bind]:
        return {
            bind
            for bind, served in self._state.served.items()
            if any(
                certificate in listener.certificates for listener in served.port.section.listeners
            )
        }

    def _put_port(self, section: PortSection) -> None:
        state = self._state
        bind = (section.address, section.port)
        tls = ServerTLS(section, state.certificates) if section.protocol == "HTTPS" else None
        before = state.served.get(bind)
        if before is None:
            port = GatewayPort(section)
            state.served[bind] = _Served(port, self._acceptor(port, tls))
            self._listening.start(bind)
            return
        was = before.port.section
        before.port.replace(section)
        if (was.client_validation, was.protocol) == (section.client_validation, section.protocol):
            before.acceptor.context = tls.context if tls is not None else None
        else:
            # Who was let in under other rules must come in again.
            before.acceptor.drain()
            before.acceptor = self._acceptor(before.port, tls)

    def _put_mesh_port(self, section: MeshPort) -> None:
        bind = (section.address, section.port)
        before = self._state.mesh.get(bind)
        self._state.mesh[bind] = self._mesh_acceptor(section.kind)
        if before is not None:
            before.drain()
        self._listening.start(bind)
        self._tell_own_addresses()

    def _tell_own_addresses(self) -> None:
        mesh = self._state.mesh.items()
        self._peers.listen(bind[0] for bind, one in mesh if isinstance(one, TunnelAcceptor))

    def _mesh_acceptor(self, kind: Literal["http", "relay", "tunnel"]) -> Acceptor:
        if kind == "tunnel":
            return TunnelAcceptor(
                settings=lambda: self._state.settings,
                admission=self._admission,
                flows=self._exchanges.flows,
                kernel=self._kernel,
                peers=self._peers,
                tunnels=self.tunnels,
                exchanges=self._exchanges,
                direct=self._direct,
            )
        if kind == "relay":
            return RelayAcceptor(
                settings=lambda: self._state.settings,
                admission=self._admission,
                identify=self._kernel.steered,
                flows=self._exchanges.flows,
                peers=self._peers,
                digger=self._digger,
                policies=self._policies,
            )
        return HttpAcceptor(
            handler=functools.partial(self._exchanges.serve, self._mesh),
            settings=lambda: self._state.settings,
            admission=self._admission,
            identify=self._kernel.steered,
            pairing=self._pairs.pairing,
            lane=functools.partial(self._exchanges.lane, self._mesh),
        )

    def _retire(self, acceptor: Acceptor, bind: Bind) -> None:
        acceptor.drain()
        self._listening.stop(bind)

    def _acceptor(self, port: GatewayPort, tls: ServerTLS | None) -> HttpAcceptor:
        return HttpAcceptor(
            handler=functools.partial(self._exchanges.serve, port),
            settings=lambda: self._state.settings,
            admission=self._admission,
            context=tls.context if tls is not None else None,
            lane=functools.partial(self._exchanges.lane, port),
        )

    def _reload_tls(self, bind: Bind) -> None:
        """Certificates changed: new handshakes use the new ones, connections stay."""
        served = self._state.served.get(bind)
        if served is None:
            return
        try:
            tls = ServerTLS(served.port.section, self._state.certificates)
        except TLSRefused as error:
            _log.error("port %s:%d keeps its certificates: %s", *bind, error)
            return
        served.acceptor.context = tls.context

    # --- sockets ------------------------------------------------------------------------------

    def listen(self, bind: Bind, sock: socket.socket) -> None:
        """Take over a listening socket; a second one for the same port replaces the first."""
        self._listening.put(bind, sock)

    def unlisten(self, bind: Bind) -> None:
        self._listening.drop(bind)

    def use(self, handles: Handles) -> None:
        """Ask the kernel through these from now on. Connections of workloads wait for the first
        ones in their listening queues."""
        self._kernel.handles = handles
        for bind in self._state.mesh:
            self._listening.start(bind)

    def _acceptor_at(self, bind: Bind) -> Acceptor | None:
        """Who takes the connections of a port now."""
        served = self._state.served.get(bind)
        if served is not None:
            return served.acceptor
        return self._state.mesh.get(bind) if self._kernel.handles is not None else None

    # --- metrics ------------------------------------------------------------------------------

    def report(self) -> None:
        """Set the gauges of what clusters do now."""
        stats = self._clusters.stats()
        for key in self._reported.keys() - stats.keys():
            stats[key] = _NOTHING
        for key, now in stats.items():
            if now == self._reported.get(key, _NOTHING):
                continue
            metrics.UPSTREAM_CONNECTIONS.labels(key).set(now.connections)
            metrics.UPSTREAM_IDLE.labels(key).set(now.idle)
            metrics.UPSTREAM_PENDING.labels(key).set(now.pending)
            metrics.UPSTREAM_EJECTED.labels(key).set(now.ejected)
        self._reported = {key: now for key, now in stats.items() if now != _NOTHING}

    # --- end ----------------------------------------------------------------------------------

    async def drain(self, deadline_s: float | None) -> int:
        """Accept nothing new, let requests finish; returns how many connections the deadline (the
        settings' by default) cut off."""
        self._listening.close()
        for served in self._state.served.values():
            served.acceptor.drain()
        for acceptor in self._state.mesh.values():
            acceptor.drain()
        self._digger.rests.drain()
        if self._admission.total:
            try:
                async with asyncio.timeout(
                    self._state.settings.drain_timeout_s if deadline_s is None else deadline_s
                ):
                    await self._admission.idle.wait()
            except TimeoutError:
                pass
        left = self._admission.total
        for acceptor in self._state.mesh.values():
            acceptor.cut_off()
        return left
