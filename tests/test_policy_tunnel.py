"""Policies between nodes: egress is judged where the client is, ingress where the pod is, by who
the tunnel says that asks."""

from __future__ import annotations

import asyncio
import socket
import ssl

import msgspec
import pytest
from support.http1 import raw_backend
from support.mesh import CLIENT, ask, connected
from support.policy import closed, http, policy, rule
from support.proxy import backend, cluster, get, http_port, read_message, route, to
from support.proxy import rule as route_rule
from support.two_nodes import WEB, TwoNodes, spiffe, two_nodes
from test_mesh_flows import agent_of
from test_mesh_relay import echo
from upstream_backend import backend as tls_backend

from certs.selfsigned import Authority
from l7proxy.lanes import WORTH
from l7proxy.tls import load_certificate
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import CertificateSection, UpstreamTLS, WorkloadSection
from mesh.model.policyconfig import CidrSection
from mesh.model.section import cidr_key, workload_key

ME, SERVER = 300, 301
RANGE = 1 << 31


def identify(nodes: TwoNodes) -> None:
    """Both nodes know who client and web are to policies."""
    for name, identity in (("client", ME), ("web", SERVER)):
        for node in (nodes.a, nodes.b):
            section = node.config.sections[workload_key("shop", name)]
            assert isinstance(section, WorkloadSection)
            section = msgspec.structs.replace(section, identity=identity)
            assert node.apply({workload_key("shop", name): section}) == {}


def ingress(nodes: TwoNodes, *rules: object) -> None:
    assert nodes.b.apply(policy("web", WEB, SERVER, ingress=closed(*rules))) == {}  # type: ignore[arg-type]


async def test_the_pods_node_judges_connections_by_the_pod_that_asks():
    async with two_nodes() as nodes, backend() as web, agent_of(nodes.b) as agent:
        identify(nodes)
        port = nodes.http(web.port)
        ingress(nodes, rule("P ingress[0]", ME, port=web.port))
        assert (await ask(port)).status == 200
        # The connection that is open already does not outlast the policy.
        ingress(nodes, rule("P ingress[0]", 999))
        refused = await ask(port)
        assert (refused.status, refused.body) == (403, b"access denied\n")
        assert len(web.requests) == 1
        cut, dropped = await agent.records(2)
        for flow in (cut, dropped):
            assert (flow.verdict, flow.reason) == ("DROPPED", "policy_denied")
            assert flow.policy == "NetworkPolicy shop/p (default deny)"
            assert flow.source.spiffe_id == spiffe("client")


async def test_who_is_refused_again_and_again_takes_the_endpoint_from_nobody():
    async with two_nodes() as nodes, backend() as one, backend() as two:
        identify(nodes)
        nodes.pod("other", "127.0.1.9", "a", identity=999)
        nodes.hold("a", "other")
        nodes.a.origins.steer("127.0.1.9")
        port = nodes.http(one.port, two.port)
        ingress(nodes, rule("P", ME))
        for _ in range(24):
            assert (await ask(port, client="127.0.1.9")).status == 403
        assert not any(found.ejected for found in nodes.a.proxy._clusters.stats().values())
        assert (await ask(port)).status == 200


async def test_requests_are_judged_at_the_pods_node_where_policy_asks_about_them():
    async with two_nodes() as nodes, backend() as web, agent_of(nodes.b) as agent:
        identify(nodes)
        port = nodes.http(web.port)
        ingress(nodes, rule("P ingress[0]", ME, http=http(method="GET", path="/public")))
        async with connected(port) as (reader, writer):
            for path, status in (("/public", 200), ("/admin", 403), ("/public?x", 200)):
                writer.write(get(path, "web").encode())
                assert (await read_message(reader)).status == status
        assert [one.start.split()[1] for one in web.requests] == ["/public", "/public?x"]
        good, bad, _ = await agent.records(3)
        assert (good.verdict, good.policy, good.encryption) == ("FORWARDED", "P ingress[0]", "mtls")
        assert (good.source.address, good.destination.address) == (CLIENT, WEB)
        assert (bad.verdict, bad.reason, bad.http.path) == ("DROPPED", "policy_denied", "/admin")
        # From now on nothing is asked about requests, then again.
        ingress(nodes, rule("P ingress[0]", ME))
        assert (await ask(port, get("/admin", "web"))).status == 200
        ingress(nodes, rule("P ingress[0]", ME, http=http(path="/public")))
        assert (await ask(port, get("/admin", "web"))).status == 403


async def test_each_request_is_judged_there_also_where_they_go_straight_on():
    """On the fast lanes of both nodes."""
    async with two_nodes() as nodes, backend() as web, agent_of(nodes.b) as agent:
        identify(nodes)
        port = nodes.http(web.port)
        public = rule("P ingress[0]", ME, http=http(path="/public"))
        expected = []

        async def ask_for(path: str, status: int) -> None:
            writer.write(get(path, "web").encode())
            assert (await read_message(reader)).status == status
            expected.append((path, status))

        ingress(nodes, public)
        async with connected(port) as (reader, writer):
            for _ in range(2):
                for _ in range(3 * WORTH):
                    await ask_for("/public", 200)
                    await asyncio.sleep(0.001)
                await ask_for("/admin", 403)
                ingress(nodes, rule("P ingress[0]", 999, http=http(path="/public")))
                await ask_for("/public", 403)
                ingress(nodes, public)
        assert len(web.requests) == 6 * WORTH
        flows = [one for one in await agent.records(len(expected)) if one.http is not None]
        assert [(one.http.path, one.http.status) for one in flows][: 3 * WORTH] == (
            expected[: 3 * WORTH]
        )


async def test_in_audit_mode_requests_are_told_of_and_bytes_are_left_alone():
    async with two_nodes() as nodes, backend() as web, agent_of(nodes.b) as agent:
        identify(nodes)
        port = nodes.http(web.port)
        asks = rule("P", ME, http=http(path="/public"), audit=True)
        nodes.b.apply(policy("web", WEB, SERVER, ingress=closed(asks, audit=True)))
        assert (await ask(port, get("/admin", "web"))).status == 200
        (flow,) = await agent.records(1)
        assert (flow.verdict, flow.reason) == ("FORWARDED", "policy_audit")
        assert flow.policy == "NetworkPolicy shop/p (default deny)"
    async with two_nodes() as nodes, raw_backend(echo) as web:
        identify(nodes)
        nodes.b.apply(policy("web", WEB, SERVER, ingress=closed(asks, audit=True)))
        async with connected(nodes.relay(web)) as (reader, writer):
            writer.write(b"\x00no request")
            assert await reader.readexactly(11) == b"\x00no request"
    # As those are that a backend encrypts itself.
    authority = Authority.create("backends")
    section = CertificateSection(*authority.issue(dns=["web.test"]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_certificate(context, section, "test")
    inside = UpstreamTLS("web.test", authority.certificate_pem)
    async with two_nodes() as nodes, tls_backend(context=context) as web:
        identify(nodes)
        nodes.b.apply(policy("web", WEB, SERVER, ingress=closed(asks, audit=True)))
        assert (await ask(nodes.http(web.endpoint.port, tls=inside))).body == b"a"


async def test_what_a_relayed_client_says_of_itself_is_taken_off_where_requests_are_read():
    """Its own node has not read them."""
    forged = ("X-Forwarded-Client-Cert: URI=forged", "X-Forwarded-For: 6.6.6.6")
    told = [("x-forwarded-for", CLIENT), ("x-forwarded-client-cert", f"URI={spiffe('client')}")]
    async with two_nodes() as nodes, backend() as web:
        identify(nodes)
        port = nodes.relay(web.port)
        ingress(nodes, rule("P", ME, http=http(path="/public")))
        for asks in (False, True):
            section = nodes.b.config.sections[workload_key("shop", "web")]
            section = msgspec.structs.replace(section, client_headers=asks)
            assert nodes.b.apply({workload_key("shop", "web"): section}) == {}
            async with connected(port) as (reader, writer):
                writer.write(get("/public", "web", *forged).encode())
                assert (await read_message(reader)).status == 200
            found = web.requests[-1].headers
            assert found == [("host", "web"), *(told if asks else [("x-forwarded-for", "6.6.6.6")])]


async def test_bytes_that_are_no_request_do_not_pass_there():
    async with two_nodes() as nodes, raw_backend(echo) as web:
        identify(nodes)
        port = nodes.relay(web)
        ingress(nodes, rule("P", ME, http=http(path="/public")))
        async with connected(port) as (reader, writer):
            writer.write(b"\x00\x01 no request\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 400")


async def test_relayed_connections_end_when_the_pods_node_refuses_them():
    async with two_nodes() as nodes, raw_backend(echo) as web:
        identify(nodes)
        port = nodes.relay(web)
        ingress(nodes, rule("P", ME))
        async with connected(port) as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            ingress(nodes)
            with pytest.raises(ConnectionResetError):
                await reader.read()


async def test_egress_is_judged_before_anything_leaves_the_clients_node():
    async with two_nodes() as nodes, backend() as web:
        identify(nodes)
        port = nodes.http(web.port)
        proven = rule("P", SERVER, http=http(path="/ok"), authenticated=True)
        nodes.a.apply(policy("client", CLIENT, ME, egress=closed(proven)))
        assert (await ask(port, get("/ok", "web"))).status == 200
        assert (await ask(port, get("/no", "web"))).status == 403


async def test_the_pods_node_is_told_of_a_gateways_client():
    async with two_nodes() as nodes, backend() as web:
        identify(nodes)
        sock = socket.create_server(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        nodes.a.proxy.listen(("127.0.0.1", port), sock)
        put = http_port(port) | cluster("web", web.port) | route("r", route_rule(to("web")))
        assert nodes.a.apply(put) == {}
        # No policy about pods of the Gateway's node names it.
        for node, here in ((nodes.a, False), (nodes.b, True)):
            section = CidrSection("127.0.7.0/24", RANGE, here=here)
            assert node.apply({cidr_key("127.0.7.0/24"): section}) == {}

        async def status(client: str) -> int:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, local_addr=(client, 0)
            )
            writer.write(get("/", "a").encode())
            found = (await read_message(reader)).status
            writer.close()
            return found

        for rules, expected in (
            ([rule("P", Reserved.INGRESS)], (200, 200, 200)),
            ([rule("P", RANGE)], (200, 403, 403)),
            ([rule("P", ME)], (403, 200, 403)),
            ([rule("P", Reserved.WORLD)], (403, 403, 200)),
            ([rule("P"), rule("D", RANGE, deny=True)], (403, 200, 200)),
            ([rule("P", RANGE, http=http(path="/"))], (200, 403, 403)),
        ):
            ingress(nodes, *rules)
            found = [await status(one) for one in ("127.0.7.1", CLIENT, "127.0.9.1")]
            assert tuple(found) == expected, rules
