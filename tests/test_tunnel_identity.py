"""Identities of tunnels over time: whose connections are shared, what ends them, how they are
renewed."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from http2_peer import GET, RawPeer
from loops import advance, on_both_loops, on_virtual_loop
from support.http1 import raw_backend
from support.mesh import CLIENT, MeshProxy, ask, connected, mesh_route, service
from support.policy import http
from support.policy import rule as policy_rule
from support.proxy import backend, cluster, fetch, get, http_port, ok, read_message, route, rule, to
from support.two_nodes import (
    GATEWAY,
    WEB,
    Authority,
    TwoNodes,
    life,
    spiffe,
    two_nodes,
)
from test_mesh_flows import agent_of
from test_mesh_relay import echo
from test_policy_tunnel import ME, identify, ingress

from l7proxy import metrics
from l7proxy.tunnels import Tunnel
from mesh.model.channel import Proof
from mesh.model.nodeconfig import MESH_TUNNEL_PORT, Settings
from mesh.model.routeconfig import Mirror
from mesh.model.section import cluster_key, svid_key, workload_key

OTHER = "127.0.1.2"


def counted(reason: str) -> float:
    return float(metrics.TUNNEL_FAILURES.labels(reason)._value.get())


def tunnels(direction: str) -> float:
    return float(metrics.TUNNELS.labels(direction)._value.get())


@asynccontextmanager
async def echoing(
    nodes: TwoNodes,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A TCP tunnel in use."""
    async with raw_backend(echo) as web, connected(nodes.relay(web)) as (reader, writer):
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        yield reader, writer


async def ended_by_reset(reader: asyncio.StreamReader) -> bool:
    try:
        return await reader.read(1) != b""
    except ConnectionResetError:
        return True


# --- whose they are -------------------------------------------------------------------------------


async def test_pods_never_share_connections_though_their_service_account_is_one():
    async with two_nodes() as nodes, backend() as web, agent_of(nodes.b) as agent:
        nodes.pod("other", OTHER, "a", service_account="client")
        nodes.a.origins.steer(OTHER)
        port = nodes.http(web.port)
        for client in (CLIENT, OTHER, CLIENT, OTHER):
            assert (await ask(port, client=client)).status == 200
        assert web.connections == 2
        await nodes.a.close()
        flows = await agent.records(2)
        assert {flow.source.address for flow in flows} == {CLIENT, OTHER}


async def test_a_gateway_has_an_identity_of_its_own():
    async with two_nodes() as nodes, backend() as web, agent_of(nodes.b) as agent:
        port = nodes.http(web.port)
        assert (await ask(port)).status == 200
        outside = nodes.a.listen_outside()
        put = http_port(outside) | route("r", rule(to("web")))
        assert nodes.a.apply(put) == {}
        assert (await fetch(outside, get("/", "a"))).status == 200
        assert web.connections == 2  # it does not use the workload's
        log = await nodes.a.close()
        assert [line["client_identity"] for line in log] == [spiffe("client"), GATEWAY]
        flows = await agent.records(2)
        assert {flow.source.spiffe_id for flow in flows} == {spiffe("client"), GATEWAY}


async def test_modes_say_what_is_plain():
    async with two_nodes() as nodes, backend() as web, agent_of(nodes.a) as agent:
        port = nodes.http(web.port)
        asked = 0

        async def encryption() -> str:
            nonlocal asked
            message = await ask(port)
            asked += 1
            flow = (await agent.records(asked))[-1]
            return flow.encryption if message.status == 200 else flow.reason

        assert await encryption() == "mtls"
        nodes.pod("web", WEB, "b", mtls="DISABLE")
        assert await encryption() == "none"
        nodes.pod("web", WEB, "b", mtls="DISABLE", mtls_ports={web.port: "STRICT"})
        assert await encryption() == "mtls"
        nodes.pod("web", WEB, "b", mtls="STRICT", mtls_ports={web.port: "DISABLE"})
        assert await encryption() == "none"
        # Nobody can vouch for it: plain, unless that is not allowed.
        nodes.pod("web", WEB, "b", spiffe_id="")
        assert await encryption() == "none"
        nodes.pod("web", WEB, "b", spiffe_id="", mtls="STRICT")
        assert await encryption() == "mtls_required"
        # Nor for who asks.
        nodes.pod("web", WEB, "b")
        nodes.pod("client", CLIENT, "a", spiffe_id="")
        assert await encryption() == "none"
        nodes.pod("web", WEB, "b", mtls="STRICT")
        assert await encryption() == "mtls_required"
        # Both on one node: attested by its kernel, if both have SVIDs.
        nodes.pod("client", CLIENT, "a")
        nodes.hold("a", "web")
        nodes.pod("web", WEB, "a", mtls="STRICT")
        assert await encryption() == "local"
        for account in ("client", "web"):
            nodes.hold("a", account, life(-1))
            assert await encryption() == "svid_expired"
            nodes.pod("web", WEB, "a")
            assert await encryption() == "none"
            nodes.pod("web", WEB, "a", mtls="STRICT")
            nodes.hold("a", account)
            assert await encryption() == "local"
        nodes.pod("web", WEB, "a", spiffe_id="")
        assert await encryption() == "none"
        nodes.pod("web", WEB, "a", spiffe_id="", mtls="STRICT")
        assert await encryption() == "mtls_required"


async def test_a_node_without_an_authority_connects_plainly_but_not_to_strict_ports():
    async with two_nodes() as nodes, backend() as web:
        port = nodes.http(web.port)
        nodes.a.apply(
            {}, ("settings", "bundle/cluster.local", svid_key(GATEWAY), svid_key(spiffe("client")))
        )
        assert (await ask(port)).status == 200
        nodes.pod("web", WEB, "b", mtls="STRICT")
        before = counted("mtls_required")
        assert (await ask(port)).status == 503
        assert counted("mtls_required") == before + 1
        assert web.connections == 1


# --- two trust domains ----------------------------------------------------------------------------

FOREIGN = "other.example"


@pytest.mark.parametrize("foreign", ["client", "web"])
async def test_nodes_of_two_trust_domains_meet_by_exchanged_bundles(foreign: str):
    """The one of the other domain dials, or is dialled; over HTTP and TCP."""
    others = Authority(FOREIGN)
    ids = {name: spiffe(name) for name in ("client", "web")}
    ids[foreign] = spiffe(foreign, trust_domain=FOREIGN)
    async with (
        two_nodes(Settings(connect_timeout_s=0.4)) as nodes,
        backend() as web,
        raw_backend(echo) as tcp,
        agent_of(nodes.a) as dials,
        agent_of(nodes.b) as takes,
    ):
        at, address, node = (nodes.a, CLIENT, "a") if foreign == "client" else (nodes.b, WEB, "b")
        own = nodes.b if at is nodes.a else nodes.a
        assert at.apply(others.svid(ids[foreign]), (svid_key(spiffe(foreign)),)) == {}
        assert at.apply(others.bundle()) == {}
        nodes.pod(foreign, address, node, spiffe_id=ids[foreign])
        port = nodes.http(web.port)
        # Without its roots, then with those of somebody else of that name.
        assert (await ask(port)).status == 503
        assert own.apply(Authority(FOREIGN).bundle()) == {}
        assert (await ask(port)).status == 503
        # Nor do its roots vouch for a name of ours.
        assert own.apply(others.bundle()) == {}
        assert at.apply(others.svid(spiffe(foreign))) == {}
        nodes.pod(foreign, address, node)
        assert (await ask(port)).status == 503
        assert web.connections == 0
        nodes.pod(foreign, address, node, spiffe_id=ids[foreign])
        assert (await ask(port)).status == 200
        async with connected(nodes.relay(tcp)) as (reader, writer):
            writer.write(b"a")
            assert await reader.read(1) == b"a"
            assert own.apply({}, (f"bundle/{FOREIGN}",)) == {}
            assert await ended_by_reset(reader)
        assert (await ask(port)).status == 503
        assert web.connections == 1
        for agent in (dials, takes):
            seen = 1
            while (flow := (await agent.records(seen))[-1]).encryption != "mtls":
                seen += 1
            ends = flow.source.spiffe_id, flow.destination.spiffe_id
            assert ends == (ids["client"], ids["web"])


# --- who is told ----------------------------------------------------------------------------------

FORGED = ("X-Forwarded-Client-Cert: URI=forged", "X-Forwarded-For: 6.6.6.6")


async def test_backends_are_told_the_client_where_the_workload_asks_for_it():
    async with two_nodes() as nodes, backend() as web:
        port = nodes.http(web.port)
        await ask(port, get("/", "web", *FORGED))
        assert web.requests[-1].headers == [("host", "web"), ("x-forwarded-for", "6.6.6.6")]
        nodes.pod("web", WEB, "b", client_headers=True)
        await ask(port, get("/", "web", *FORGED))
        told = ("x-forwarded-client-cert", f"URI={spiffe('client')}")
        assert web.requests[-1].headers == [("host", "web"), ("x-forwarded-for", CLIENT), told]
        outside = nodes.a.listen_outside()
        assert nodes.a.apply(http_port(outside) | route("r", rule(to("web")))) == {}
        await fetch(outside, get("/", "a", *FORGED))
        own = [one for one in web.requests[-1].headers if one[0].startswith("x-forwarded-")]
        assert ("x-forwarded-client-cert", f"URI={GATEWAY}") in own
        assert ("x-forwarded-for", "127.0.0.1") in own


async def test_a_route_tells_the_identity_of_the_section_and_no_other():
    async with two_nodes() as nodes, backend() as web:
        port = nodes.http(web.port)
        nodes.a.apply(mesh_route("r", rule(to("web")), client_headers=True))
        nodes.a.apply(service(producers=True))
        nodes.pod("client", CLIENT, "a", spiffe_id="spiffe://cluster.local/ns/shop/sa/x")
        nodes.hold("a", "x")
        await ask(port, get("/", "web", *FORGED))
        told = ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/shop/sa/x")
        assert web.requests[-1].headers == [("host", "web"), ("x-forwarded-for", CLIENT), told]


@pytest.mark.parametrize(
    "where", ["same-node", "other-node", "mirrored", "read-there", "gateway", "behind"]
)
async def test_what_clients_say_of_their_identity_never_passes(where: str):
    """In HTTP/1, HTTP/2, trailers and requests to upgrade. "behind": by a Gateway's trusted proxy;
    "mirrored": of a copy, too."""
    settings = Settings(trusted_hops=1) if where == "behind" else None
    async with two_nodes(settings) as nodes, backend() as web, backend() as copies:
        port = nodes.http(web.port)
        mirror = Mirror(cluster_key("Service", "default", "copies", 80))
        if where == "mirrored":
            put = mesh_route("r", rule(to("web"), filters=(mirror,)))
            put |= service(producers=True) | cluster("copies", copies.port)
            assert nodes.a.apply(put) == {}
        elif where == "same-node":
            nodes.hold("a", "web")
            nodes.pod("web", WEB, "a")
        elif where == "read-there":
            identify(nodes)
            ingress(nodes, policy_rule("P", ME, http=http()))
        elif where != "other-node":
            port = nodes.a.listen_outside()
            assert nodes.a.apply(http_port(port) | route("r", rule(to("web")))) == {}
        field = "X-Forwarded-Client-Cert: URI=forged"
        upgrade = ("Connection: Upgrade", "Upgrade: websocket")
        trailer = get("/", "web", "Transfer-Encoding: chunked") + f"0\r\n{field}\r\nX-A: b\r\n\r\n"
        for request in (
            get("/", "web", field, field),
            get("/", "web", field, *upgrade),
            trailer,
        ):
            assert (await ask(port, request)).status == 200
        async with connected(port) as (reader, writer):
            peer = RawPeer(reader, writer, client=True)
            peer.start()
            forged = (b"x-forwarded-client-cert", b"URI=forged")
            assert (await peer.response(peer.request([*GET, forged])))[0] == 200
            await peer.close()
        if where == "mirrored":
            await copies.wait_for(4)
        for received in (web.requests, copies.requests if where == "mirrored" else web.requests):
            assert len(received) == 4
            assert not [seen for seen in received if "forged" in repr(seen)]


# --- what ends them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "key", "reason"),
    [
        ("a", workload_key("shop", "client"), "source_changed"),
        ("a", workload_key("shop", "web"), "destination_changed"),
        ("a", svid_key(spiffe("client")), "svid_missing"),
        ("a", "bundle/cluster.local", "wrong_trust_domain"),
        ("b", workload_key("shop", "client"), "pod_unknown"),
        ("b", workload_key("shop", "web"), "target_unknown"),
        ("b", svid_key(spiffe("web")), "svid_missing"),
        ("b", "bundle/cluster.local", "wrong_trust_domain"),
    ],
)
async def test_tunnels_end_with_what_they_depend_on(node: str, key: str, reason: str):
    async with two_nodes() as nodes:
        proxy = nodes.a if node == "a" else nodes.b
        async with echoing(nodes) as (reader, writer):
            before = counted(reason)
            proxy.apply({}, ("workload/shop/nobody", "svid/spiffe://cluster.local/x"))
            writer.write(b"b")
            assert await reader.read(1) == b"b"
            proxy.apply({}, (key,))
            assert await ended_by_reset(reader)
            assert counted(reason) == before + 1


async def test_another_pod_behind_the_address_is_another_destination():
    async with two_nodes() as nodes, echoing(nodes) as (reader, _):
        nodes.pod("web", "127.0.1.9", "b")
        nodes.pod("newer", WEB, "b", service_account="web")
        assert await ended_by_reset(reader)


async def test_http_ends_after_the_request_in_flight():
    arrived, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(_: object) -> bytes:
        arrived.set()
        await go_on.wait()
        return ok()

    async with two_nodes() as nodes, backend(slowly) as web:
        port = nodes.http(web.port)
        asking = asyncio.ensure_future(ask(port))
        await arrived.wait()
        nodes.a.apply({}, (svid_key(spiffe("client")),))
        refused = asyncio.ensure_future(ask(port))
        go_on.set()
        assert (await asking).status == 200
        nodes.hold("a", "client")  # comes before the other has waited long enough
        assert (await refused).status == 200
        assert web.connections == 2


@on_virtual_loop
async def test_a_backend_that_does_not_end_keeps_no_tunnel():
    ended = asyncio.Event()

    async def stays(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ok())
        await reader.read()
        ended.set()
        await asyncio.get_running_loop().create_future()

    async with two_nodes() as nodes, raw_backend(stays) as web:
        assert (await ask(nodes.http(web))).status == 200
        nodes.a.apply({}, (svid_key(spiffe("client")),))
        await ended.wait()
        incoming = metrics.TUNNELS.labels("in")._value
        assert incoming.get() == 1
        advance(Settings().drain_timeout_s + 1)
        async with asyncio.timeout(5):
            while incoming.get():
                await asyncio.sleep(0)


async def test_http_ends_at_once_where_its_sender_proves_nothing_any_more():
    arrived = asyncio.Event()

    async def never(_: object) -> bytes:
        arrived.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async with two_nodes() as nodes, backend(never) as web:
        asking = asyncio.ensure_future(ask(nodes.http(web.port)))
        await arrived.wait()
        nodes.b.apply({}, ("bundle/cluster.local",))
        async with asyncio.timeout(Settings().drain_timeout_s / 2):
            assert (await asking).status == 502


@pytest.mark.parametrize("node", ["a", "b"])
async def test_websockets_end_with_an_identity_as_tcp_does(node: str):
    """To a pod of the client's own node, which no tunnel ends, and to one of another."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        upgraded = "Connection: Upgrade", "Upgrade: websocket"
        writer.write("\r\n".join(("HTTP/1.1 101 Yes", *upgraded, "", "")).encode())
        await echo(reader, writer)

    async with two_nodes() as nodes, raw_backend(answer) as web:
        nodes.hold(node, "web")
        nodes.pod("web", WEB, node)
        request = get("/", "web", "Connection: Upgrade", "Upgrade: websocket")
        async with connected(nodes.http(web, protocol="ws")) as (reader, writer):
            writer.write(request.encode())
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
            nodes.pod("web", WEB, node, mtls="STRICT")
            writer.write(b"a")
            assert await reader.read(1) == b"a"
            nodes.a.apply({}, (svid_key(spiffe("client")),))
            async with asyncio.timeout(5):
                assert await ended_by_reset(reader)
        (line,) = await nodes.a.close()
        assert line["reason"] == "svid_missing"


# --- sessions -------------------------------------------------------------------------------------


async def test_a_tunnel_after_another_resumes_its_session_while_the_identities_stay():
    async with two_nodes() as nodes, raw_backend(echo) as web:
        port = nodes.relay(web)
        nodes.a.proxy._digger.rests.drain()  # a tunnel has one turn only

        async def resumed() -> list[bool]:
            """At each end of a new tunnel."""
            async with connected(port) as (reader, writer):
                writer.write(b"a")
                assert await reader.read(1) == b"a"
                found = [
                    tunnel.stream.ssl.session_reused
                    for proxy in (nodes.a, nodes.b)
                    for tunnel in set().union(*proxy.proxy.tunnels._by_key.values())
                ]
            while tunnels("out") or tunnels("in"):
                await asyncio.sleep(0)
            return found

        assert await resumed() == [False, False]
        assert await resumed() == [True, True]
        assert await resumed() == [True, True]
        nodes.hold("a", "client")
        assert await resumed() == [False, False]
        assert await resumed() == [True, True]
        new = Authority()
        nodes.a.apply(nodes.authority.bundle(new))
        assert await resumed() == [False, False]
        nodes.b.apply(nodes.authority.bundle(new))
        assert await resumed() == [False, False]
        assert await resumed() == [True, True]
        # Roots that change at one end during the handshake.
        for proxy in (nodes.a, nodes.b):
            proxy.proxy._credentials._chains.clear()
            assert await resumed() == [False, False]
            assert await resumed() == [True, True]
        # As long as the other end is to be expected to have another SVID.
        credentials = nodes.a.proxy._credentials
        (key,) = credentials._sessions
        kept = credentials._sessions[key]
        left = credentials.until(key.own) - kept.until
        assert 1500 < left < 2100
        credentials._sessions[key] = kept._replace(until=0)
        assert await resumed() == [False, False]


# --- renewal --------------------------------------------------------------------------------------


@on_both_loops
async def test_http_goes_to_another_tunnel_before_a_certificate_ends():
    """Nothing fails, and no connection is used until its end."""
    async with two_nodes() as nodes, backend() as web:
        port = nodes.http(web.port)
        nodes.hold("a", "client", life(2))
        async with connected(port) as (reader, writer):

            async def request() -> None:
                writer.write(get("/", "web").encode())
                message = await read_message(reader)
                assert message is not None
                assert message.status == 200

            await request()
            assert web.connections == 1
            nodes.hold("a", "client")
            while web.connections == 1:
                await request()
            assert web.connections == 2


async def test_tcp_outlives_its_certificates_while_both_ends_are_renewed():
    async with two_nodes() as nodes:
        nodes.hold("a", "client", life(2))
        async with echoing(nodes) as (reader, writer):
            nodes.hold("a", "client")
            while not metrics.TUNNELS_OUTLIVING._value.get():  # at both ends, one value here
                writer.write(b"b")
                assert await reader.read(1) == b"b"
            writer.write(b"c")
            assert await reader.read(1) == b"c"
        while metrics.TUNNELS_OUTLIVING._value.get():
            await asyncio.sleep(0)


@pytest.mark.parametrize(("node", "account"), [("a", "client"), ("b", "web")])
async def test_tcp_ends_with_a_certificate_that_is_not_renewed(node: str, account: str):
    async with two_nodes() as nodes:
        nodes.hold(node, account, life(2))
        async with echoing(nodes) as (reader, _):
            assert await ended_by_reset(reader)


@on_virtual_loop
async def test_tunnels_heed_a_clock_that_is_set(monkeypatch):
    real, ahead = time.time, 0.0
    outliving = metrics.TUNNELS_OUTLIVING._value.get()
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    async with two_nodes() as nodes, echoing(nodes) as (reader, writer):
        # Back: certificates that end an hour from now end later.
        ahead = -1000.0
        advance(3610)
        writer.write(b"b")
        assert await reader.readexactly(1) == b"b"
        assert metrics.TUNNELS_OUTLIVING._value.get() == outliving
        # Forward: they have ended, and no timer that was set before knows.
        ahead = 3610.0
        advance(31)
        assert await ended_by_reset(reader)


async def test_tcp_ends_where_a_renewal_cannot_be_proved():
    """What the other end is not shown does not count there."""
    async with two_nodes() as nodes:
        nodes.hold("a", "client", life(2))
        async with echoing(nodes) as (reader, _):
            nodes.b.proxy.unlisten((nodes.addresses["b"], MESH_TUNNEL_PORT))
            nodes.hold("a", "client")
            before = counted("not_renewed")
            assert await ended_by_reset(reader)
            assert counted("not_renewed") > before


async def test_everything_is_rotated_under_load_and_no_request_fails():
    """SVIDs, the intermediate and the root, while 64 connections ask and 8 echo; at the end the old
    root is gone, and so is whatever was made with it, but for TCP, which was proved anew."""
    async with two_nodes() as nodes, backend() as web, raw_backend(echo) as other:
        port = nodes.http(web.port)
        relay = nodes.relay(other)
        nodes.a.origins.steer()
        done = asyncio.Event()
        answered = 0
        old = nodes.authority

        async def asks() -> None:
            nonlocal answered
            async with connected(port) as (reader, writer):
                while not done.is_set():
                    writer.write(get("/", "web").encode())
                    message = await read_message(reader)
                    assert message is not None
                    assert message.status == 200
                    answered += 1

        async def rounds(count: int) -> None:
            target = answered + count
            while answered < target:
                await asyncio.sleep(0)

        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            nodes.steer_relay(other)
            echoes = [await stack.enter_async_context(connected(relay)) for _ in range(8)]
            for reader, writer in echoes:
                writer.write(b"a")
                assert await reader.read(1) == b"a"
            nodes.a.origins.steer()
            for _ in range(64):
                group.create_task(asks())
            await rounds(200)
            new = Authority()
            for bundle in (old.bundle(new), new.bundle(old)):
                nodes.a.apply(bundle)
                nodes.b.apply(bundle)
                nodes.authority = new
                for node, account in (("a", "client"), ("b", "web")):
                    nodes.hold(node, account, life(30))
                    await rounds(200)
            await nodes.grow_old()
            for proxy in (nodes.b, nodes.a):
                proxy.apply(new.bundle())
                await rounds(200)
            for reader, writer in echoes:
                writer.write(b"z")
                assert await reader.read(1) == b"z"
            done.set()
        assert web.connections > 64


@asynccontextmanager
async def second_worker(nodes: TwoNodes) -> AsyncIterator[MeshProxy]:
    """Another worker of node b: tunnels made from now on are its, after `back` the first one's."""
    second = MeshProxy()
    second.apply(dict(nodes.b.config.sections))
    second.proxy.use(second.origins)
    bind = (nodes.addresses["b"], MESH_TUNNEL_PORT)
    nodes.b.proxy.unlisten(bind)
    second.proxy.listen(bind, socket.create_server(bind))
    try:
        yield second
    finally:
        await second.close()
        second._log.close()


def back_to_the_first(nodes: TwoNodes, second: MeshProxy) -> None:
    bind = (nodes.addresses["b"], MESH_TUNNEL_PORT)
    second.proxy.unlisten(bind)
    nodes.b.proxy.listen(bind, socket.create_server(bind))


async def test_a_proof_that_another_worker_was_shown_counts():
    """Workers of a node take turns at its port; the agent passes on what one of them was shown."""
    async with (
        two_nodes() as nodes,
        second_worker(nodes) as second,
        echoing(nodes) as (reader, writer),
    ):
        back_to_the_first(nodes, second)
        told: list[Proof] = []
        nodes.b.proxy.tunnels.announce_by(told.append)
        new = Authority()
        for proxy in (nodes.a, nodes.b, second):
            proxy.apply(nodes.authority.bundle(new))
        nodes.authority = new
        nodes.hold("a", "client")
        await nodes.grow_old()
        (proof,) = told
        second.proxy.tunnels.hear(msgspec.structs.replace(proof, chain=()))
        second.proxy.tunnels.hear(msgspec.structs.replace(proof, source="shop/x"))
        second.proxy.tunnels.hear(proof)
        second.apply(new.bundle())  # with the old root goes what the tunnel was made with
        writer.write(b"b")
        assert await reader.read(1) == b"b"


def by_told(proxy: MeshProxy) -> dict[str, Tunnel]:
    """The tunnels of a worker."""
    held = proxy.proxy.tunnels._by_key.values()
    return {one.pair.source.told: one for tunnels in held for one in tunnels}


async def test_a_proof_is_for_those_that_a_gateway_spoke_for_and_is_told_again():
    async with two_nodes() as nodes, backend() as web:
        nodes.pod("other", OTHER, "a")
        outside = nodes.a.listen_outside()
        put = cluster("web", web.port) | http_port(outside) | route("r", rule(to("web")))
        assert nodes.a.apply(put) == {}
        async with second_worker(nodes) as second:
            for client in (CLIENT, OTHER):
                assert (await ask(outside, client=client)).status == 200
            found = by_told(second)
            assert found.keys() == {CLIENT, OTHER}
            before = found[OTHER].peer.chain
            assert found[CLIENT].peer.chain == before
            back_to_the_first(nodes, second)
            # The gateway has another SVID, and proves so for one of the two.
            assert nodes.a.apply(nodes.authority.svid(GATEWAY)) == {}
            said: list[Proof] = []
            nodes.b.proxy.tunnels.announce_by(said.append)
            await nodes.a.proxy.tunnels._prove(by_told(nodes.a)[CLIENT])
            (proof,) = said
            assert (proof.source, proof.gateway, proof.told) == ("default/gw", True, CLIENT)
            # Had that been lost: it is told again by the next channel.
            again: list[Proof] = []
            nodes.b.proxy.tunnels.announce_by(again.append)
            assert again == said
            second.proxy.tunnels.hear(proof)
            assert found[OTHER].peer.chain == before != found[CLIENT].peer.chain
