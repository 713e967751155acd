"""What a worker has in force: ports, certificates, routes, clusters, settings.

Takes deltas section by section, refuses what cannot be enforced (the value before stays), and keeps
a server on every port that is both configured and handed over by the supervisor. It knows no
requests (`exchange`) and no processes (`worker`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
from dataclasses import dataclass, field
from typing import TypeAlias

from l7proxy import forwarding
from l7proxy.acceptor import Acceptor, Admission
from l7proxy.accesslog import AccessLog
from l7proxy.exchange import Exchanges, Port
from l7proxy.routing import PortIndex, Refused, RouteIndex
from l7proxy.tasks import spawn
from l7proxy.tls_server import ServerTLS, TLSRefused
from l7proxy.upstream import Clusters
from mesh.model.nodeconfig import (
    CertificateSection,
    ClusterSection,
    Delta,
    PortSection,
    RouteSection,
    Section,
    SectionKey,
    Settings,
)

_log = logging.getLogger("weft.proxy")
Bind: TypeAlias = tuple[str, int]

# Seconds before the first probe, between probes; probes unanswered until the end.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))

# What others build on comes first.
_ORDER: dict[type, int] = {
    Settings: 0,
    CertificateSection: 1,
    ClusterSection: 2,
    RouteSection: 3,
    PortSection: 4,
}


def _position(item: tuple[SectionKey, Section]) -> int:
    return _ORDER.get(type(item[1]), len(_ORDER))


@dataclass(slots=True)
class _Bound:
    """A listening socket, and the server on it while the configuration has the port."""

    sock: socket.socket
    server: asyncio.AbstractServer | None = None
    context: ssl.SSLContext | None = None


@dataclass(slots=True)
class _Served:
    """A configured port: what the exchange needs, and who accepts."""

    port: Port
    acceptor: Acceptor
    tls: ServerTLS | None = None


@dataclass(slots=True)
class _State:
    settings: Settings = field(default_factory=Settings)
    certificates: dict[SectionKey, CertificateSection] = field(default_factory=dict)
    served: dict[Bind, _Served] = field(default_factory=dict)
    bound: dict[Bind, _Bound] = field(default_factory=dict)
    keys: dict[SectionKey, Section] = field(default_factory=dict)
    refused: dict[SectionKey, str] = field(default_factory=dict)


class Proxy:
    """The data plane of one worker."""

    def __init__(self, loop: asyncio.AbstractEventLoop, log: AccessLog) -> None:
        self._loop = loop
        self._state = _State()
        self._routes = RouteIndex()
        self._clusters = Clusters(self._state.settings)
        self._admission = Admission()
        self._admission.idle.set()
        self._access_log = log
        self._exchanges = Exchanges(self._routes, self._clusters, self._state.settings, log)
        self._draining = False

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
        for key, section in sorted(delta.put.items(), key=_position):
            if state.keys.get(key) == section and key not in state.refused:
                continue
            try:
                stale_tls |= self._put(key, section)
            except (Refused, TLSRefused) as error:
                state.refused[key] = str(error)
            else:
                state.refused.pop(key, None)
                state.keys[key] = section
        for key in gone:
            stale_tls |= self._remove(key, state.keys.pop(key))
        for key in [key for key in state.refused if key in delta.remove]:
            del state.refused[key]
        for bind in stale_tls:
            self._reload_tls(bind)
        self._exchanges.version = delta.version
        return dict(state.refused)

    def _put(self, key: SectionKey, section: Section) -> set[Bind]:
        """Put one section in force; returns the ports whose TLS must be looked at again."""
        state = self._state
        match section:
            case Settings():
                forwarding.check(section)
                state.settings = self._exchanges.settings = section
                self._clusters.settings = section
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
            case PortSection():
                self._put_port(section)
            case _:
                raise Refused(f"a {type(section).__name__} is not for the proxy")
        return set()

    def _remove(self, key: SectionKey, section: Section) -> set[Bind]:
        state = self._state
        match section:
            case CertificateSection():
                del state.certificates[key]
                return self._ports_with(key)
            case ClusterSection():
                self._clusters.remove(key)
            case RouteSection():
                self._routes.remove(key)
            case PortSection(address=address, port=port):
                served = state.served.pop((address, port))
                served.acceptor.drain()
                self._close_server((address, port))
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
        port = Port(section, PortIndex(section))
        before = state.served.get(bind)
        if before is None:
            acceptor = Acceptor(
                handler=functools.partial(self._exchanges.serve, port),
                settings=lambda: state.settings,
                admission=self._admission,
                sni_of=ServerTLS.sni_of,
            )
            state.served[bind] = _Served(port, acceptor, tls)
        else:
            # Who was let in under other rules must come in again.
            if (
                before.port.section.client_validation != section.client_validation
                or before.port.section.protocol != section.protocol
            ):
                before.acceptor.drain()
            before.port.section, before.port.index = section, port.index
            before.tls = tls
        self._start_server(bind)

    def _reload_tls(self, bind: Bind) -> None:
        """Certificates changed: new handshakes use the new ones, connections stay."""
        served = self._state.served.get(bind)
        if served is None:
            return
        try:
            served.tls = ServerTLS(served.port.section, self._state.certificates)
        except TLSRefused as error:
            _log.error("port %s:%d keeps its certificates: %s", *bind, error)
            return
        self._start_server(bind)

    # --- sockets ------------------------------------------------------------------------------

    async def listen(self, bind: Bind, sock: socket.socket) -> None:
        """Take over a listening socket; a second one for the same port replaces the first."""
        self.unlisten(bind)
        if self._draining:
            sock.close()
            return
        # Accepted connections inherit these: they find out clients that closed while the proxy has
        # nothing to send (tcp(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._state.bound[bind] = _Bound(sock)
        self._start_server(bind)

    def unlisten(self, bind: Bind) -> None:
        if bound := self._state.bound.pop(bind, None):
            if bound.server is not None:
                bound.server.close()
            bound.sock.close()

    def _start_server(self, bind: Bind) -> None:
        bound, served = self._state.bound.get(bind), self._state.served.get(bind)
        if bound is None or served is None:
            return
        context = served.tls.context if served.tls is not None else None
        if bound.server is not None and bound.context is context:
            return
        spawn(self._serve(bind, bound, served, context), name=f"server {bind[0]}:{bind[1]}")

    async def _serve(
        self, bind: Bind, bound: _Bound, served: _Served, context: ssl.SSLContext | None
    ) -> None:
        """Accept with `context`, then stop accepting with the one before. Both share the kernel's
        queue of the socket, so no connection is lost in between."""
        settings = self._state.settings
        server = await self._loop.create_server(
            served.acceptor,
            sock=bound.sock.dup(),
            ssl=context,
            ssl_handshake_timeout=settings.head_timeout_s if context else None,
            ssl_shutdown_timeout=settings.connect_timeout_s if context else None,
        )
        if self._state.bound.get(bind) is not bound or self._state.served.get(bind) is not served:
            server.close()
            return
        before, bound.server, bound.context = bound.server, server, context
        if before is not None:
            before.close()

    def _close_server(self, bind: Bind) -> None:
        if (bound := self._state.bound.get(bind)) and bound.server is not None:
            bound.server.close()
            bound.server = bound.context = None

    # --- end ----------------------------------------------------------------------------------

    async def drain(self, deadline_s: float | None) -> int:
        """Accept nothing new, let requests finish; returns how many connections the deadline (the
        settings' by default) cut off."""
        self._draining = True
        for bind in tuple(self._state.bound):
            self.unlisten(bind)
        for served in self._state.served.values():
            served.acceptor.drain()
        if self._admission.total:
            try:
                async with asyncio.timeout(
                    self._state.settings.drain_timeout_s if deadline_s is None else deadline_s
                ):
                    await self._admission.idle.wait()
            except TimeoutError:
                pass
        return self._admission.total
