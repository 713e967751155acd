"""Two nodes' proxies within the test, with identities of a small authority: pod shop/client of node
"a" asks pods of node "b", which are backends on 127.0.0.1.

Each pair of nodes has loopback addresses of its own: tests do not meet on the tunnels' port.
"""

from __future__ import annotations

import asyncio
import datetime
import itertools
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from certs.issue import Issuer, Life
from certs.spiffe import parse
from l7proxy.tls import load_certificate
from l7proxy.tunnel_acceptor import TunnelAcceptor
from mesh.model.nodeconfig import (
    MESH_TUNNEL_PORT,
    MeshPort,
    NodeSection,
    Section,
    Settings,
    SvidSection,
    TrustBundleSection,
    WorkloadSection,
)
from mesh.model.section import (
    SETTINGS_KEY,
    SectionKey,
    bundle_key,
    node_key,
    port_key,
    svid_key,
    workload_key,
)
from support.mesh import CLIENT, MeshProxy, service
from support.proxy import cluster

TRUST_DOMAIN = "cluster.local"
WEB = "127.0.0.1"  # the pod shop/web of node b
GATEWAY = f"spiffe://{TRUST_DOMAIN}/ns/weft-system/sa/weft-gateway"
_pairs = itertools.count(os.getpid() * 64)


def spiffe(service_account: str, namespace: str = "shop", trust_domain: str = TRUST_DOMAIN) -> str:
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{service_account}"


def life(seconds: float = 3600, start: float = -3600) -> Life:
    """From `start` to `seconds` from now."""
    now = datetime.datetime.now(datetime.UTC)
    return Life(now + datetime.timedelta(seconds=start), now + datetime.timedelta(seconds=seconds))


class Authority:
    """A root with an intermediate."""

    def __init__(self, trust_domain: str = TRUST_DOMAIN) -> None:
        self.trust_domain = trust_domain
        self.root = Issuer.new_root("root", life(), f"spiffe://{trust_domain}")
        self.intermediate = self.root.new_intermediate("intermediate", life())

    @property
    def roots_pem(self) -> str:
        return self.root.certificate.public_bytes(Encoding.PEM).decode()

    def bundle(self, *others: Authority) -> dict[SectionKey, Section]:
        pem = "".join(one.roots_pem for one in (self, *others))
        return {bundle_key(self.trust_domain): TrustBundleSection(self.trust_domain, pem)}

    def svid(
        self, spiffe_id: str, valid: Life | None = None, uris: Iterable[str] = ()
    ) -> dict[SectionKey, Section]:
        """`uris`: what its certificate says instead."""
        valid = valid or life()
        key = ec.generate_private_key(ec.SECP256R1())
        if uris:
            names = [x509.UniformResourceIdentifier(uri) for uri in uris]
            leaf = self.intermediate.leaf(key.public_key(), names, valid)
        else:
            leaf = self.intermediate.svid(key.public_key(), parse(spiffe_id), valid)
        return {
            svid_key(spiffe_id): _section(spiffe_id, (leaf, self.intermediate.certificate), key)
        }


def _section(
    spiffe_id: str, chain: Iterable[x509.Certificate], key: ec.EllipticCurvePrivateKey
) -> SvidSection:
    chain = tuple(chain)
    return SvidSection(
        spiffe_id,
        "".join(one.public_bytes(Encoding.PEM).decode() for one in chain),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        int(chain[0].not_valid_after_utc.timestamp()),
    )


class TwoNodes:
    """`a` and `b` know the same nodes and workloads; each holds the SVIDs of its own."""

    def __init__(self) -> None:
        number = next(_pairs)
        self.addresses = {
            name: f"127.{64 + number // 250 % 128}.{number % 250}.{last}"
            for name, last in (("a", 2), ("b", 3), ("c", 4))
        }
        self.authority = Authority()
        self.a, self.b = MeshProxy(), MeshProxy()

    def start(self, settings: Settings | None = None) -> None:
        settings = msgspec.structs.replace(settings or Settings(), gateway_spiffe_id=GATEWAY)
        nodes = {node_key(n): NodeSection(n, (at,)) for n, at in self.addresses.items()}
        for proxy, name in ((self.a, "a"), (self.b, "b")):
            put: dict[SectionKey, Section] = {SETTINGS_KEY: settings, **nodes}
            put |= self.authority.bundle() | self.authority.svid(GATEWAY)
            assert proxy.apply(put) == {}
            proxy.proxy.use(proxy.origins)
            address = self.addresses[name]
            sock = socket.create_server((address, MESH_TUNNEL_PORT), backlog=1024)
            proxy.proxy.listen((address, MESH_TUNNEL_PORT), sock)
            section = MeshPort(address, MESH_TUNNEL_PORT, "tunnel")
            assert proxy.apply({port_key(address, MESH_TUNNEL_PORT): section}) == {}
        self.pod("client", CLIENT, "a")
        self.pod("web", WEB, "b")
        self.hold("a", "client")
        self.hold("b", "web")

    def pod(self, name: str, address: str, node: str, **rest: Any) -> None:
        """Tell both nodes of a pod; its service account has its name."""
        rest.setdefault("service_account", name)
        rest.setdefault("spiffe_id", spiffe(rest["service_account"]))
        for proxy, own in ((self.a, "a"), (self.b, "b")):
            section = WorkloadSection(
                "shop", name, (address,), node=node, local=node == own, **rest
            )
            assert proxy.apply({workload_key("shop", name): section}) == {}

    def hold(self, node: str, service_account: str, valid: Life | None = None) -> None:
        """Give a node the SVID of a service account."""
        proxy = self.a if node == "a" else self.b
        assert proxy.apply(self.authority.svid(spiffe(service_account), valid)) == {}

    async def grow_old(self) -> None:
        """All tunnels of node a are as old as makes them change, and have."""
        tunnels = self.a.proxy.tunnels
        for tunnel in {one for found in tunnels._by_key.values() for one in found}:
            tunnels._old(tunnel, tunnel.until)
            while tunnels._proving:
                await asyncio.sleep(0)

    def open_tunnels(self) -> tuple[int, int]:
        """Those of either node, with what rests between two turns."""
        resting = [
            acceptor.resting
            for acceptor in self.b.proxy._state.mesh.values()
            if isinstance(acceptor, TunnelAcceptor)
        ]
        ours, theirs = (
            {one for found in node.proxy.tunnels._by_key.values() for one in found}
            for node in (self.a, self.b)
        )
        return len(ours), len(theirs) + sum(map(len, resting))

    def http(self, *backends: int, **rest: Any) -> int:
        """A port of node a at which shop/client asks Service shop/web."""
        return self.a.serve(service(), cluster("web", *backends, **rest))

    def relay(self, backend: int) -> int:
        """A port of node a at which shop/client has connected to shop/web."""
        self.steer_relay(backend)
        return self.a.serve(kind="relay")

    def steer_relay(self, backend: int) -> None:
        self.a.origins.steer(asked=("10.96.0.9", 5432), backend=(WEB, backend))


@asynccontextmanager
async def two_nodes(settings: Settings | None = None) -> AsyncIterator[TwoNodes]:
    nodes = TwoNodes()
    nodes.a.origins.steer()
    try:
        nodes.start(settings)
        yield nodes
    finally:
        for proxy in (nodes.a, nodes.b):
            await proxy.close()
            proxy._log.close()
        while any(nodes.open_tunnels()):
            await asyncio.sleep(0)
        await asyncio.sleep(0)


def bare_svid(spiffe_id: str) -> SvidSection:
    """One that nobody vouches for: self-signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self")])
    own = Issuer(_self_signed(name, key), key)
    return _section(spiffe_id, (own.svid(key.public_key(), parse(spiffe_id), life()),), key)


def _self_signed(name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    valid = life()
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(valid.not_before).not_valid_after(valid.not_after)
    return builder.sign(key, hashes.SHA256())


def peer_context(
    authority: Authority,
    svid: SvidSection | None,
    alpn: str | None = "weft/1",
    *,
    server: bool = False,
) -> ssl.SSLContext:
    """What a peer that is not Weft speaks with; it believes whoever answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=authority.roots_pem)
    context.verify_mode = ssl.CERT_REQUIRED
    if alpn is not None:
        context.set_alpn_protocols([alpn])
    if svid is not None:
        load_certificate(context, svid, "test")
    return context
