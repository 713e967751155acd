"""Policies in the proxy: requests and connections of workloads, of Gateways' clients and out of
tunnels, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket

import msgspec
import pytest
from support.http1 import raw_backend
from support.mesh import CLIENT, MeshProxy, ask, connected, mesh_proxy, mesh_route, service
from support.policy import closed, http, pod, policy, rule
from support.proxy import (
    backend,
    cluster,
    connection,
    get,
    http_port,
    read_message,
    route,
    to,
)
from support.proxy import rule as route_rule
from support.two_nodes import Authority, spiffe
from test_http1_hostile import SMUGGLING
from test_mesh_flows import agent_of
from test_mesh_relay import echo, relayed

from l7proxy import metrics
from mesh.model.flow import Peer
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import (
    ClusterSection,
    Endpoint,
    NodeSection,
    Settings,
    WorkloadSection,
)
from mesh.model.policyconfig import CidrSection, HeaderRule, HttpRule, PolicySection
from mesh.model.routeconfig import (
    HeaderModifier,
    HeaderValue,
    Mirror,
    PathModifier,
    Rewrite,
)
from mesh.model.section import (
    SETTINGS_KEY,
    cidr_key,
    cluster_key,
    node_key,
    policy_key,
    workload_key,
)

SERVER = "127.0.0.1"  # the pod shop/web, which is the backend
ME, WEB, OTHER = 300, 301, 302  # identities: shop/client, shop/web, others
WHO = pod("client", CLIENT, ME) | pod("web", SERVER, WEB)


def denied(what: str = "request", verdict: str = "denied") -> float:
    return metrics.POLICY.labels(what, verdict)._value.get()


def serve(mesh: MeshProxy, *backends: int, **sides: object) -> int:
    """A port at which shop/client asks Service shop/web; `ingress` of its pod, `egress` of the
    client."""
    port = mesh.serve(cluster("web", *backends), service(), WHO)
    change(mesh, **sides)
    return port


def change(mesh: MeshProxy, *, ingress: object = None, egress: object = None) -> None:
    put = {}
    if ingress is not None:
        put |= policy("web", SERVER, WEB, ingress=ingress)  # type: ignore[arg-type]
    if egress is not None:
        put |= policy("client", CLIENT, ME, egress=egress)  # type: ignore[arg-type]
    assert mesh.apply(put) == {}


# --- requests ------------------------------------------------------------------------------------


async def test_ingress_rules_about_requests_let_pass_what_they_name():
    async with mesh_proxy() as mesh, backend() as web, agent_of(mesh) as agent:
        allow = rule("P ingress[0]", ME, port=web.port, http=http(method="GET", path="/public"))
        port = serve(mesh, web.port, ingress=closed(allow))
        before = denied()
        assert (await ask(port, get("/public?x=1", "web"))).status == 200
        refused = await ask(port, get("/admin", "web"))
        assert (refused.status, refused.body) == (403, b"access denied\n")
        assert (await ask(port, "POST /public HTTP/1.1\r\nHost: web\r\n\r\n")).status == 403
        assert len(web.requests) == 1
        assert denied() == before + 2
        good, bad, _ = await agent.records(3)
        assert (good.verdict, good.policy) == ("FORWARDED", "P ingress[0]")
        assert (bad.verdict, bad.reason) == ("DROPPED", "policy_denied")
        assert bad.policy == "NetworkPolicy shop/p (default deny)"
        assert bad.destination == Peer(SERVER, web.port, "", f"web-{web.port}")


async def test_a_policy_that_the_proxy_cannot_read_denies():
    """Also where that is a fault of its own."""
    async with mesh_proxy() as mesh, backend() as web:
        port = serve(mesh, web.port)
        for path in ("(", "/\ud800"):
            assert mesh.apply(policy("web", SERVER, WEB)) == {}
            assert (await ask(port, get("/", "web"))).status == 200
            allow = rule("P ingress[0]", ME, http=http(path=path))
            assert mesh.apply(policy("web", SERVER, WEB, ingress=closed(allow)))
            assert (await ask(port, get("/", "web"))).status == 403
        mesh.apply({}, [policy_key("shop", "web")])
        assert (await ask(port, get("/", "web"))).status == 200


async def test_who_is_not_named_is_refused_whatever_is_asked():
    async with mesh_proxy() as mesh, backend() as web:
        mesh.origins.steer("127.0.1.9")
        port = serve(mesh, web.port, ingress=closed(rule("P ingress[0]", ME)))
        assert (await ask(port)).status == 200
        # Nobody knows this workload; it is no part of the world, but `init`.
        assert (await ask(port, client="127.0.1.9")).status == 403
        change(mesh, ingress=closed(rule("P ingress[0]", Reserved.WORLD)))
        assert (await ask(port, client="127.0.1.9")).status == 403
        # Nor is it the pod of another node that had its address.
        moved = WorkloadSection("shop", "moved", ("127.0.1.9",), node="n2", identity=ME)
        assert mesh.apply({workload_key("shop", "moved"): moved}) == {}
        change(mesh, ingress=closed(rule("P ingress[0]", ME)))
        assert (await ask(port, client="127.0.1.9")).status == 403
        change(mesh, ingress=closed(rule("P ingress[0]", Reserved.INIT)))
        assert (await ask(port, client="127.0.1.9")).status == 200


async def test_who_is_not_known_is_denied_what_is_in_force_for_unknown_pods():
    async with mesh_proxy() as mesh, backend() as web:
        mesh.origins.steer("127.0.1.9")
        port = serve(mesh, web.port)
        assert (await ask(port, client="127.0.1.9")).status == 200
        unknown = PolicySection("", "", Reserved.INIT, ("::",), egress=closed())
        assert mesh.apply({policy_key("", ""): unknown}) == {}
        assert (await ask(port, client="127.0.1.9")).status == 403
        assert (await ask(port)).status == 200


async def test_deny_stands_above_allow_and_a_policy_gone_is_gone_at_once():
    async with mesh_proxy() as mesh, backend() as web:
        rules = (rule("P ingress[0]"), rule("P ingressDeny[0]", ME, deny=True))
        port = serve(mesh, web.port, ingress=closed(*rules))
        async with connected(port) as (reader, writer):  # one connection all along
            for status in (403, 200):
                writer.write(get("/", "web").encode())
                assert (await read_message(reader)).status == status
                mesh.apply({}, (policy_key("shop", "web"),))


async def test_egress_judges_the_request_as_sent_and_ingress_as_it_is_forwarded():
    async with mesh_proxy() as mesh, backend() as web:
        rewritten = route_rule(
            to("web"),
            filters=(
                Rewrite(path=PathModifier("ReplaceFullPath", "/inside")),
                HeaderModifier("request", set=(HeaderValue("x-route", "yes"),)),
            ),
        )
        port = serve(mesh, web.port)
        assert mesh.apply(service(producers=True) | mesh_route("r", rewritten)) == {}
        outside = closed(rule("P egress[0]", WEB, port=web.port, http=http(path="/outside")))
        inside = (HttpRule(path="/inside", headers=(HeaderRule("x-route", "yes"),)),)
        change(mesh, egress=outside, ingress=closed(rule("P ingress[0]", ME, http=inside)))
        assert (await ask(port, get("/outside", "web"))).body == b"GET /inside HTTP/1.1"
        assert (await ask(port, get("/inside", "web"))).status == 403
        change(mesh, ingress=closed(rule("P ingress[0]", ME, http=http(path="/outside"))))
        assert (await ask(port, get("/outside", "web"))).status == 403


async def test_an_endpoint_that_policy_refuses_is_none_for_the_request():
    """Others serve; the port that counts is the pod's."""
    async with mesh_proxy() as mesh, backend() as one, backend() as two:
        port = serve(mesh, one.port, two.port, ingress=closed(rule("P", ME, port=two.port)))
        for _ in range(4):
            assert (await ask(port)).status == 200
        assert (len(one.requests), len(two.requests)) == (0, 4)
        change(mesh, ingress=closed(rule("P", ME, port=two.port, http=http(path="/two"))))
        assert (await ask(port, get("/one", "web"))).status == 403


async def test_mirrors_go_only_where_policy_lets_the_client():
    async with mesh_proxy() as mesh, backend() as web, backend() as copy:
        rules = mesh_route("r", route_rule(to("web"), filters=(Mirror(to("copy").cluster),)))
        port = serve(mesh, web.port, ingress=closed(rule("P", ME, port=web.port)))
        assert mesh.apply(cluster("copy", copy.port) | service(producers=True) | rules) == {}
        assert (await ask(port)).status == 200
        change(mesh, ingress=closed(rule("P", ME)))
        assert (await ask(port, get("/seen", "web"))).status == 200
        await copy.wait_for(1)
        assert [one.start for one in copy.requests] == ["GET /seen HTTP/1.1"]


async def test_a_pod_reaches_itself():
    async with mesh_proxy() as mesh, backend() as web:
        mesh.origins.steer(SERVER)
        port = serve(mesh, web.port, ingress=closed(), egress=closed())
        mesh.apply(policy("web", SERVER, WEB, ingress=closed(), egress=closed()))
        async with connection(port) as (reader, writer):  # from 127.0.0.1, as the pod itself
            writer.write(get("/", "web").encode())
            assert (await read_message(reader)).status == 200
        assert (await ask(port)).status == 403


async def test_endpoints_in_other_spellings_are_the_same_pod():
    async with mesh_proxy() as mesh, backend() as web:
        port = serve(mesh, web.port, ingress=closed())
        key = cluster_key("Service", "default", "web", 80)
        mapped = ClusterSection((Endpoint("::ffff:127.0.0.1", web.port),))
        assert mesh.apply({key: mapped}) == {}
        assert (await ask(port)).status == 403
        assert not web.requests


async def test_a_section_that_cannot_be_in_force_refuses_everything_until_it_goes():
    async with mesh_proxy() as mesh, backend() as web:
        port = serve(mesh, web.port)
        broken = policy("web", SERVER, WEB, ingress=closed(rule("P", ME, http=http(path="a(b"))))
        refusals = mesh.apply(broken)
        assert "a(b" in refusals["policy/shop/web"]
        assert (await ask(port)).status == 403
        mesh.apply({}, ("policy/shop/web",))
        assert (await ask(port)).status == 200


async def test_what_only_authenticated_peers_may_do_is_for_those_of_this_node():
    """Those with SVIDs, both of them."""
    authority = Authority()
    async with mesh_proxy() as mesh, backend() as web:
        port = serve(mesh, web.port, ingress=closed(rule("P", authenticated=True)))
        mesh.origins.steer("127.0.1.9")
        named = {
            key: msgspec.structs.replace(section, spiffe_id=spiffe(section.name))
            for key, section in WHO.items()
        }
        assert mesh.apply(named | authority.bundle()) == {}
        for account in ("client", "web"):
            assert (await ask(port)).status == 403
            assert mesh.apply(authority.svid(spiffe(account))) == {}
        assert (await ask(port)).status == 200
        assert (await ask(port, client="127.0.1.9")).status == 403


# --- audit ---------------------------------------------------------------------------------------


async def test_in_audit_mode_requests_pass_and_flows_name_the_policy():
    async with mesh_proxy() as mesh, backend() as web, agent_of(mesh) as agent:
        named = rule("CNP a ingress[0]", ME, http=http(path="/ok"), audit=True)
        port = serve(mesh, web.port, ingress=closed(named, audit=True))
        before = denied(verdict="audited")
        assert (await ask(port, get("/ok", "web"))).status == 200
        assert (await ask(port, get("/no", "web"))).status == 200
        assert denied(verdict="audited") == before + 1
        well, told = await agent.records(2)
        assert (well.verdict, well.reason) == ("FORWARDED", "")
        assert (told.verdict, told.reason) == ("FORWARDED", "policy_audit")
        assert told.policy == "NetworkPolicy shop/p (default deny)"
        # What an enforced policy refuses, an audited one cannot allow.
        change(mesh, ingress=closed(named))
        assert (await ask(port, get("/ok", "web"))).status == 403


# --- headers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "sent", "forwarded"),
    [
        ("LOG", ["x-a: 1"], ["1"]),
        ("LOG", [], []),
        ("ADD", ["x-a: 1"], ["1", "2"]),
        ("ADD", ["x-a: 2"], ["2"]),
        ("DELETE", ["x-a: 1", "X-A: 3"], []),
        ("REPLACE", ["x-a: 1"], ["2"]),
        ("REPLACE", [], ["2"]),
        ("DENY", ["x-a: 2"], ["2"]),
        ("DENY", ["x-a: 1"], None),
        ("DENY", [], None),
        # Twice is not once: nobody knows which of them counts.
        ("DENY", ["x-a: 2", "x-a: 2"], None),
        ("DENY", ["x-a: 2", "X-A: evil"], None),
        ("DENY", ["x-a: evil", "accept: 2", "X-A: 2"], None),
        ("DENY", ["x-a:", "x-a: 2"], None),
        ("DENY", ["x-a: 2, evil"], None),
    ],
)
async def test_headers_that_are_not_as_a_rule_asks_are_mended_or_the_request_is_refused(
    action, sent, forwarded
):
    async with mesh_proxy() as mesh, backend() as web:
        wanted = (HttpRule(headers=(HeaderRule("x-a", "2", action),)),)
        port = serve(mesh, web.port, ingress=closed(rule("P", ME, http=wanted)))
        answer = await ask(port, get("/", "web", *sent))
        assert answer.status == (200 if forwarded is not None else 403)
        seen = [v for one in web.requests for k, v in one.headers if k.lower() == "x-a"]
        assert seen == (forwarded or [])


# --- around it -----------------------------------------------------------------------------------

AROUND = [
    "/public/..%2fadmin", "/public/%2e%2e/admin", "/public/../admin", "//admin",
    "/public//../admin",
    "/admin;x", "/public/..;/admin", "/public/..%5cadmin", "/public\\..\\admin", "/admin;/public/",
    "/public/%00/../admin", "/./admin", "/%61dmin", "/admin/", "/ADMIN", "/admin?/public/",
    "http://web/admin", "/public/%2e%2e%2fadmin", "/public/x%2f..%2f..%2fadmin", "/admin#/public/",
]  # fmt: skip


async def test_no_spelling_of_a_path_reaches_what_is_not_allowed():
    async with mesh_proxy() as mesh, backend() as web:
        allow = rule("P", ME, http=http(path="/public/.*", host=r"web\.example"))
        port = serve(mesh, web.port, ingress=closed(allow))
        for path in AROUND:
            answer = await ask(port, get(path, "web.example"))
            assert answer.status in (400, 403), path
        assert not web.requests
        assert (await ask(port, get("/public/a%2Fb;x", "WEB.example"))).status == 200
        assert (await ask(port, get("/public/a", "web.example:80"))).status == 200
        assert (await ask(port, get("/public/a", "web.example.evil"))).status == 403
        assert (await ask(port, get("/public/a", "other", "Host: web.example"))).status == 400


async def test_nothing_is_smuggled_behind_what_is_allowed():
    hidden = "GET /admin HTTP/1.1\r\nHost: web\r\n\r\n"
    chunked = f"0\r\n\r\n{hidden}"
    heads = [
        f"Content-Length: {len(chunked)}\r\nTransfer-Encoding: chunked\r\n\r\n{chunked}",
        f"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n{chunked}",
        f"Transfer-Encoding : chunked\r\n\r\n{chunked}",
        f"Content-Length: 0\r\nContent-Length: {len(hidden)}\r\n\r\n{hidden}",
        f"Content-Length: +{len(hidden)}\r\n\r\n{hidden}",
        f"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n{hidden}",
        f"\r\n{hidden}",
    ]
    async with mesh_proxy() as mesh, backend() as web:
        port = serve(mesh, web.port, ingress=closed(rule("P", ME, http=http(path="/public"))))
        for head in heads:
            async with connected(port) as (reader, writer):
                writer.write(f"POST /public HTTP/1.1\r\nHost: web\r\n{head}".encode())
                while (message := await read_message(reader)) is not None:
                    if message.status != 200:
                        break
        assert {one.start.split()[1] for one in web.requests} == {"/public"}


@pytest.mark.skipif(not SMUGGLING, reason="../shared/http is not there")
async def test_published_smuggling_gets_nothing_past_a_rule():
    """What policy allows is the path of the first request: nothing with another one arrives."""
    by_path: dict[str, list[bytes]] = {}
    for data in SMUGGLING:
        words = data.partition(b"\n")[0].split()
        path = words[1].decode("latin-1").partition("?")[0] if len(words) == 3 else "/"
        by_path.setdefault(path, []).append(data)
    quick = Settings(head_timeout_s=0.2, body_timeout_s=0.2, idle_timeout_s=0.2)
    async with mesh_proxy() as mesh, backend() as web:
        port = serve(mesh, web.port)
        assert mesh.apply({SETTINGS_KEY: quick}) == {}

        async def send(data: bytes) -> None:
            with contextlib.suppress(OSError):
                async with connected(port) as (reader, writer):
                    writer.write(data)
                    await reader.read()

        for path, cases in by_path.items():
            allowed = rule("P", ME, http=http(path=re.escape(path)))
            change(mesh, ingress=closed(allowed))
            before = len(web.requests)
            await asyncio.gather(*map(send, cases))
            seen = {one.start.split()[1].partition("?")[0] for one in web.requests[before:]}
            assert seen <= {path}
        assert web.requests  # some are harmless


# --- through a Gateway ----------------------------------------------------------------------------


async def test_behind_a_gateway_policies_see_the_gateway_and_its_client():
    async with mesh_proxy() as mesh, backend() as web:
        port = mesh.serve(WHO, cluster("web", web.port), route("r", route_rule(to("web"))))
        sock = socket.create_server(("127.0.0.1", 0))
        gateway = sock.getsockname()[1]
        mesh.proxy.listen(("127.0.0.1", gateway), sock)
        ranges = {
            cidr_key(cidr): CidrSection(cidr, identity)
            for cidr, identity in (("127.0.0.0/8", 1 << 31), ("127.0.7.0/24", 1 << 31 | 1))
        }
        node = {node_key("n1"): NodeSection("n1", ("127.0.8.1",))}
        assert mesh.apply(http_port(gateway) | ranges | node) == {}

        async def status(client: str) -> int:
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", gateway, local_addr=(client, 0)
            )
            writer.write(get("/", "a").encode())
            found = (await read_message(reader)).status
            writer.close()
            return found

        everybody = {"127.0.6.1": 200, "127.0.7.1": 200, "127.0.8.1": 200, CLIENT: 200}
        nobody = dict.fromkeys(everybody, 403)
        rules = {
            "the Gateway": ([rule("P", Reserved.INGRESS)], {}),
            "a range": ([rule("P", 1 << 31)], {"127.0.7.1": 403, "127.0.8.1": 403, CLIENT: 403}),
            "but a part": (
                [rule("P", Reserved.INGRESS), rule("D", 1 << 31 | 1, deny=True)],
                {"127.0.7.1": 403},
            ),
            "the node": ([rule("P", Reserved.HOST)], nobody | {"127.0.8.1": 200}),
            "a pod": ([rule("P", ME)], nobody | {CLIENT: 200}),
            "who is proven": ([rule("P", authenticated=True)], nobody),
        }
        for name, (found, expected) in rules.items():
            change(mesh, ingress=closed(*found))
            for client, usual in everybody.items():
                assert await status(client) == expected.get(client, usual), (name, client)
        assert port
        # A pod's own rules are asked as well, about the pod that it reaches and about the Gateway.
        own = {
            "nobody": ([], 403),
            "the own node": ([rule("P", Reserved.HOST)], 403),
            "the pod": ([rule("P", WEB)], 200),
            "the Gateway": ([rule("P", Reserved.INGRESS)], 200),
            "not the pod": ([rule("P", Reserved.INGRESS), rule("D", WEB, deny=True)], 403),
            "who is proven": ([rule("P", WEB, authenticated=True)], 403),
            "requests": ([rule("P", WEB, http=http(path="/"))], 200),
            "others": ([rule("P", WEB, http=http(path="/other"))], 403),
        }
        for name, (found, mine) in own.items():
            change(mesh, ingress=closed(rule("P", Reserved.INGRESS)), egress=closed(*found))
            for client, usual in everybody.items():
                wanted = mine if client == CLIENT else usual
                assert await status(client) == wanted, (name, client)


async def test_proxies_in_front_vouch_for_addresses_outside_of_the_cluster_only():
    """And pods for none, though every peer is trusted to say who its client is."""
    async with mesh_proxy() as mesh, backend() as web:
        mesh.serve(WHO, cluster("web", web.port), route("r", route_rule(to("web"))))
        port, outside, node = mesh.listen_outside(), "127.0.9.1", "127.0.8.1"
        put = http_port(port) | pod("other", "127.0.1.9", OTHER)
        put |= {
            SETTINGS_KEY: Settings(trusted_hops=1),
            node_key("n1"): NodeSection("n1", (node,)),
            cidr_key("127.0.7.0/24"): CidrSection("127.0.7.0/24", 1 << 31),
        }
        assert mesh.apply(put) == {}

        async def status(peer: str, said: str) -> int:
            return (await ask(port, get("/", "a", f"X-Forwarded-For: {said}"), peer)).status

        for peer, said, seen in (
            (outside, "127.0.7.1", 1 << 31),
            (outside, "127.0.6.1", Reserved.WORLD),
            (node, "127.0.7.1", 1 << 31),
            (outside, CLIENT, Reserved.WORLD),
            (outside, f"::ffff:{CLIENT}", Reserved.WORLD),
            (outside, node, Reserved.WORLD),
            ("127.0.7.1", CLIENT, 1 << 31),
            (node, CLIENT, Reserved.HOST),
            ("127.0.1.9", CLIENT, OTHER),
            ("127.0.1.9", "127.0.7.1", OTHER),
            ("127.0.1.9", node, OTHER),
        ):
            for identity in (1 << 31, Reserved.WORLD, Reserved.HOST, ME, OTHER):
                change(mesh, ingress=closed(rule("P", identity)))
                expected = 200 if identity == seen else 403
                assert await status(peer, said) == expected, (peer, said, identity)


async def test_a_pod_that_nobody_has_told_of_is_judged_as_such_where_it_is_asked():
    """An endpoint that is a pod's, of which nothing is known: what policies deny by default holds,
    for those of the client as for its own. A node's address is none, nor is one without a pod."""
    async with mesh_proxy() as mesh, backend() as web:
        port, address = mesh.serve(service(), WHO), SERVER
        assert mesh.apply({}, (workload_key("shop", "web"),)) == {}

        async def status(name: str = "web") -> int:
            endpoints = (Endpoint(address, web.port, name),)
            assert (
                mesh.apply(
                    {cluster_key("Service", "default", "web", 80): ClusterSection(endpoints)}
                )
                == {}
            )
            return (await ask(port)).status

        assert await status() == 200
        unknown = PolicySection("", "", Reserved.INIT, ("::",), ingress=closed())
        mesh.apply({policy_key("", ""): unknown})
        assert (await status(), await status("")) == (403, 200)
        mesh.apply({node_key("n1"): NodeSection("n1", (address,))})
        assert await status() == 200
        mesh.apply({}, (node_key("n1"),))
        some = rule("P", ME, port=web.port)
        mesh.apply({policy_key("", ""): msgspec.structs.replace(unknown, ingress=closed(some))})
        assert await status() == 200
        # Ranges are not about pods.
        mesh.apply({cidr_key("127.0.0.0/8"): CidrSection("127.0.0.0/8", 1 << 31)})
        change(mesh, egress=closed(rule("P", 1 << 31)))
        assert (await status(), await status("")) == (403, 200)
        change(mesh, egress=closed(rule("P", Reserved.INIT)))
        assert (await status(), await status("")) == (200, 403)


# --- connections ----------------------------------------------------------------------------------


async def test_relayed_connections_are_judged_as_they_open_and_as_policies_change():
    async with relayed() as (mesh, port, backend_port), agent_of(mesh) as agent:
        assert mesh.apply(WHO) == {}
        change(mesh, ingress=closed(rule("P ingress[0]", ME, port=backend_port)))
        before = denied("connection")
        async with connected(port) as (reader, writer):
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            change(mesh, egress=closed(rule("Q", WEB)))  # it still may
            writer.write(b"again")
            assert await reader.readexactly(5) == b"again"
            change(mesh, ingress=closed())
            with pytest.raises(ConnectionResetError):
                await reader.read()
        with pytest.raises(ConnectionResetError):
            async with connected(port) as (reader, writer):
                await reader.read()
        assert denied("connection") == before + 2
        for flow in await agent.records(2):
            assert (flow.verdict, flow.reason) == ("DROPPED", "policy_denied")
            assert flow.policy == "NetworkPolicy shop/p (default deny)"


async def test_bytes_do_not_pass_where_requests_must_be_judged():
    async with relayed() as (mesh, port, _), agent_of(mesh) as agent:
        assert mesh.apply(WHO) == {}
        change(mesh, ingress=closed(rule("P ingress[0]", ME, http=http(method="GET"))))
        with pytest.raises(ConnectionResetError):
            async with connected(port) as (reader, _):
                await reader.read()
        (flow,) = await agent.records(1)
        assert (flow.verdict, flow.policy) == ("DROPPED", "P ingress[0]")


async def test_audited_connections_pass_and_are_told():
    async with relayed() as (mesh, port, _), agent_of(mesh) as agent:
        assert mesh.apply(WHO) == {}
        change(mesh, egress=closed(audit=True))
        async with connected(port) as (reader, writer):
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            writer.write_eof()
            assert await reader.read() == b""
        (flow,) = await agent.records(1)
        assert (flow.verdict, flow.reason) == ("FORWARDED", "policy_audit")
        assert flow.policy == "NetworkPolicy shop/p (default deny)"


async def test_an_open_web_socket_ends_when_policy_refuses_it():
    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        await echo(reader, writer)

    asked = get("/", "web", "Connection: Upgrade", "Upgrade: websocket").encode()
    async with mesh_proxy() as mesh, raw_backend(tunnel) as web, agent_of(mesh) as agent:
        port = serve(mesh, web)
        async with connected(port) as (reader, writer):
            writer.write(asked)
            assert (await read_message(reader, head_only=True)).status == 101
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            change(mesh, ingress=closed(rule("P", ME)))
            writer.write(b"y")
            assert await reader.readexactly(1) == b"y"
            change(mesh, ingress=closed())
            with pytest.raises(ConnectionResetError):
                await reader.read()
        (flow,) = await agent.records(1)
        assert (flow.verdict, flow.reason) == ("DROPPED", "policy_denied")
