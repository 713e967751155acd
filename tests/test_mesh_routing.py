"""Requests of workloads: whose routes judge them, where they go, what is sent on."""

from __future__ import annotations

import asyncio

import pytest
from http2_peer import ServerUnderTest
from loops import advance, on_virtual_loop
from support.mesh import CLIENT, SHOP, ask, connected, mesh_proxy, mesh_route, service, workload
from support.proxy import backend, cluster, get, ok, read_message, rule, to

from l7proxy import metrics
from l7proxy.http2_client import Http2Client
from l7proxy.message import RequestHead
from mesh.model.nodeconfig import Settings
from mesh.model.routeconfig import (
    HeaderModifier,
    HeaderValue,
    PathMatch,
    PathModifier,
    Redirect,
    Rewrite,
    RouteMatch,
)
from mesh.model.section import service_key, workload_key


def refused(reason: str) -> float:
    return metrics.REFUSED.labels(reason)._value.get()


def header(name: str, value: str, direction: str = "request") -> HeaderModifier:
    return HeaderModifier(direction, set=(HeaderValue(name, value),))


# --- who is let in --------------------------------------------------------------------------------


async def test_connections_wait_until_the_kernel_can_be_asked():
    async with mesh_proxy() as mesh, backend() as web:
        assert mesh.apply(cluster("web", web.port) | service()) == {}
        port = mesh.listen()
        async with connected(port) as (reader, writer):
            writer.write(get("/early", "web").encode())
            for _ in range(20):  # rounds of the event loop in which it could have been accepted
                await asyncio.sleep(0)
            assert mesh.proxy._admission.total == 0
            mesh.proxy.use(mesh.origins)
            assert (await read_message(reader)).body == b"GET /early HTTP/1.1"


async def test_who_was_not_steered_here_is_closed_at_once_and_counted():
    async with mesh_proxy() as mesh, backend() as web:
        port = mesh.serve(cluster("web", web.port), service())
        before = refused("unknown_origin")
        with pytest.raises(ConnectionError):
            await ask(port, client="127.0.9.9")
        assert refused("unknown_origin") == before + 1
        assert (await ask(port)).status == 200
        assert len(web.requests) == 1


async def test_a_removed_mesh_port_takes_nobody():
    async with mesh_proxy() as mesh, backend() as web:
        port = mesh.serve(cluster("web", web.port), service())
        assert (await ask(port)).status == 200
        mesh.apply({}, (f"port/127.0.0.1|{port}",))
        mesh.proxy.unlisten(("127.0.0.1", port))
        with pytest.raises(ConnectionError):
            await ask(port)


# --- which routes ---------------------------------------------------------------------------------


async def test_without_routes_the_services_own_endpoints_serve():
    async with mesh_proxy() as mesh, backend() as web:
        port = mesh.serve(cluster("web", web.port), service())
        assert (await ask(port, get("/x?y=1", "anything.example"))).body == b"GET /x?y=1 HTTP/1.1"


async def test_with_producer_routes_what_none_matches_is_404():
    async with mesh_proxy() as mesh, backend() as web, backend(lambda r: ok(b"v2")) as v2:
        port = mesh.serve(
            cluster("web", web.port), cluster("v2", v2.port), service(producers=True),
            mesh_route("r", rule(to("v2"), matches=(RouteMatch(PathMatch("PathPrefix", "/v2")),))),
        )  # fmt: skip
        assert (await ask(port, get("/v2/a", "whatever"))).body == b"v2"
        assert (await ask(port, get("/v1", "web"))).status == 404
        # The last route went: the Service's own endpoints serve again.
        mesh.apply(service(producers=False))
        assert (await ask(port, get("/v1", "web"))).status == 200


async def test_consumer_routes_are_for_clients_of_their_namespace_and_exclude_the_producers():
    async with (
        mesh_proxy() as mesh,
        backend(lambda r: ok(b"own")) as web,
        backend(lambda r: ok(b"producer")) as producer,
        backend(lambda r: ok(b"consumer")) as consumer,
    ):
        for address in ("127.0.1.1", "127.0.1.2", "127.0.1.3"):
            mesh.origins.steer(address)
        only_a = (RouteMatch(PathMatch("PathPrefix", "/a")),)
        port = mesh.serve(
            cluster("web", web.port),
            cluster("producer", producer.port),
            cluster("consumer", consumer.port),
            service(producers=True, consumers=("client",)),
            mesh_route("p", rule(to("producer"))),
            mesh_route("c", rule(to("consumer"), matches=only_a), namespace="client"),
            workload("one", "127.0.1.1", "client"),
            workload("two", "127.0.1.2", "shop"),
        )
        assert (await ask(port, get("/a"), "127.0.1.1")).body == b"consumer"
        assert (await ask(port, get("/b"), "127.0.1.1")).status == 404
        assert (await ask(port, get("/a"), "127.0.1.2")).body == b"producer"
        assert (await ask(port, get("/a"), "127.0.1.3")).body == b"producer"
        # The pod's address is another's now.
        mesh.apply(workload("three", "127.0.1.1", "shop"), (workload_key("client", "one"),))
        assert (await ask(port, get("/a"), "127.0.1.1")).body == b"producer"
        # Without producer routes others reach the Service as it is.
        mesh.apply(service(consumers=("client",)))
        assert (await ask(port, get("/a"), "127.0.1.2")).body == b"own"


async def test_ports_and_addresses_of_a_service_are_told_apart():
    async with (
        mesh_proxy() as mesh,
        backend(lambda r: ok(b"80")) as one,
        backend(lambda r: ok(b"8080")) as two,
    ):
        mesh.origins.steer("127.0.1.1", (SHOP, 80))
        mesh.origins.steer("127.0.1.2", (SHOP, 8080))
        mesh.origins.steer("127.0.1.3", ("fd00::a", 80))
        port = mesh.serve(
            cluster("web", one.port), cluster("alt", two.port),
            service("web", SHOP, "fd00:0:0::A"), service("alt", port=8080),
        )  # fmt: skip
        assert (await ask(port, client="127.0.1.1")).body == b"80"
        assert (await ask(port, client="127.0.1.2")).body == b"8080"
        assert (await ask(port, client="127.0.1.3")).body == b"80"


async def test_a_service_without_ready_endpoints_gets_503():
    async with mesh_proxy() as mesh:
        port = mesh.serve(cluster("web"), service())
        assert (await ask(port)).status == 503


async def test_a_service_with_an_address_that_is_none_is_refused():
    async with mesh_proxy() as mesh:
        mesh.serve(cluster("web"))
        key = service_key("shop", "web", 80)
        assert mesh.apply(service("web", "10.0.0.256")) == {
            key: "addresses[0]: '10.0.0.256' is not an IP address"
        }


async def test_session_affinity_chosen_by_the_kernel_is_followed_where_no_route_is():
    async with (
        mesh_proxy() as mesh,
        backend(lambda r: ok(b"a")) as a,
        backend(lambda r: ok(b"b")) as b,
    ):
        mesh.origins.steer(backend=("127.0.0.1", b.port))
        port = mesh.serve(cluster("web", a.port, b.port), service())
        assert {(await ask(port)).body for _ in range(6)} == {b"b"}


# --- pods -------------------------------------------------------------------------------------


async def test_a_pods_address_is_gone_to_straight():
    async with mesh_proxy() as mesh, backend() as pod, backend() as web:
        mesh.origins.steer(asked=("127.0.0.1", pod.port))
        port = mesh.serve(
            cluster("web", web.port),
            service(producers=True),
            mesh_route("r", rule(to("web"))),
            workload("pod", "127.0.0.1"),
        )
        response = await ask(port, get("/direct", "pod.example"))
        assert response.body == b"GET /direct HTTP/1.1"
        assert not web.requests
        entry = (await mesh.close())[0]
        assert (entry["gateway"], entry["backend"]) == ("mesh", "pod")
        assert entry["endpoint"] == f"127.0.0.1:{pod.port}"


async def test_an_address_that_is_no_service_any_more_and_no_pod_is_not_gone_to():
    """The proxy's own connections are not steered: it would get past all routes there."""
    async with mesh_proxy() as mesh, backend() as web:
        mesh.origins.steer(asked=("127.0.0.1", web.port))
        asked = service("web", "127.0.0.1", port=web.port)
        port = mesh.serve(cluster("web", web.port), asked)
        async with connected(port) as (reader, writer):
            writer.write(get("/", "web").encode())
            first = await read_message(reader)
            assert first is not None
            assert first.status == 200
            mesh.apply({}, tuple(asked))
            writer.write(get("/", "web").encode())
            second = await read_message(reader)
            assert second is not None
            assert second.status == 503
            assert second.body == b"no_service\n"
        assert len(web.requests) == 1


async def test_a_client_that_speaks_http2_gets_http2_toward_a_pod():
    async with mesh_proxy() as mesh, ServerUnderTest() as pod:
        mesh.origins.steer(asked=("127.0.0.1", pod.port))
        port = mesh.serve(workload("pod", "127.0.0.1"))
        _, client = await asyncio.get_running_loop().create_connection(
            lambda: Http2Client(Settings(), lambda _: None, scheme=b"http"),
            "127.0.0.1", port, local_addr=(CLIENT, 0),
        )  # fmt: skip
        stream = client.open()
        await stream.request(RequestHead(b"GET", b"http", b"pod", b"/a", None, []))
        head = await stream.response()
        assert (head.status, dict(head.headers)[b"x-path"]) == (200, b"/a")
        assert await stream.read() == b""
        assert len(pod.connections) == 1
        client.close()


@on_virtual_loop
async def test_pods_nobody_asks_for_any_more_are_forgotten():
    async with mesh_proxy() as mesh, backend() as one, backend() as two:
        for client, pod in (("127.0.1.1", one), ("127.0.1.2", two)):
            mesh.origins.steer(client, ("127.0.0.1", pod.port))
        port = mesh.serve(workload("pods", "127.0.0.1"))
        keys = [f"direct/http/127.0.0.1|{pod.port}" for pod in (one, two)]
        await ask(port, client="127.0.1.1")
        advance(40)
        await ask(port, client="127.0.1.2")
        assert all(map(mesh.proxy._clusters.get, keys))
        advance(21)
        await asyncio.sleep(0)  # timers are looked at
        await asyncio.sleep(0)
        assert mesh.proxy._clusters.get(keys[0]) is None
        assert mesh.proxy._clusters.get(keys[1]) is not None
        assert (await ask(port, client="127.0.1.1")).status == 200


# --- what is sent on ------------------------------------------------------------------------------


async def test_the_head_goes_on_as_it_is_but_for_the_reserved_field():
    async with mesh_proxy() as mesh, backend() as web:
        port = mesh.serve(
            cluster("web", web.port), service(producers=True), mesh_route("r", rule(to("web")))
        )
        own = (
            "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https", "Via: 1.1 own",
            "X-Request-Id: mine", "Forwarded: for=1.2.3.4", "X-Forwarded-Client-Cert: URI=forged",
        )  # fmt: skip
        await ask(port, get("/", "Web.Shop:81", *own))
        assert web.requests[0].headers == [
            ("host", "web.shop:81"),
            ("x-forwarded-for", "1.2.3.4"),
            ("x-forwarded-proto", "https"),
            ("via", "1.1 own"),
            ("x-request-id", "mine"),
            ("forwarded", "for=1.2.3.4"),
        ]
        await ask(port, get("/", "web"))
        assert web.requests[1].headers == [("host", "web")]


async def test_a_route_can_ask_that_the_client_is_told():
    async with mesh_proxy() as mesh, backend() as web:
        mesh.origins.steer("127.0.1.2")
        port = mesh.serve(
            cluster("web", web.port),
            service(producers=True),
            mesh_route("r", rule(to("web")), client_headers=True),
            workload("one", CLIENT, "front", spiffe_id="spiffe://cluster.local/ns/front/sa/cart"),
        )
        forged = ("X-Forwarded-For: 6.6.6.6", "X-Forwarded-Client-Cert: URI=forged")
        await ask(port, get("/", "web", *forged))
        assert web.requests[0].headers == [
            ("host", "web"),
            ("x-forwarded-for", CLIENT),
            ("x-forwarded-client-cert", "URI=spiffe://cluster.local/ns/front/sa/cart"),
        ]
        # Of a client nobody knows only the address is told.
        await ask(port, get("/", "web", *forged), "127.0.1.2")
        assert web.requests[1].headers == [("host", "web"), ("x-forwarded-for", "127.0.1.2")]


async def test_filters_of_mesh_routes():
    async with mesh_proxy() as mesh, backend() as web:
        rewrite = Rewrite("other.example", PathModifier("ReplaceFullPath", "/new"))
        port = mesh.serve(
            cluster("web", web.port), service(producers=True),
            mesh_route("r", rule(to("web"), filters=(header("x-a", "1"), rewrite))),
        )  # fmt: skip
        assert (await ask(port)).body == b"GET /new HTTP/1.1"
        assert web.requests[0].header("host") == "other.example"
        assert web.requests[0].header("x-a") == "1"


@pytest.mark.parametrize(
    ("redirect", "asked", "location"),
    [
        (Redirect(), 80, "http://web.shop/p?q"),
        (Redirect(), 8080, "http://web.shop:8080/p?q"),
        (Redirect(scheme="https"), 8080, "https://web.shop/p?q"),
        (Redirect(port=9000), 80, "http://web.shop:9000/p?q"),
        (Redirect(hostname="a.example"), 8080, "http://a.example:8080/p?q"),
    ],
)
async def test_redirects_tell_what_was_asked_for(redirect, asked, location):
    async with mesh_proxy() as mesh:
        mesh.origins.steer(asked=(SHOP, asked))
        port = mesh.serve(
            service(producers=True, port=asked),
            mesh_route("r", rule(filters=(redirect,)), parent=("shop", "web", asked)),
        )
        response = await ask(port, get("/p?q", "web.shop"))
        assert (response.status, response.header("location")) == (302, location)


async def test_what_is_logged_and_counted():
    async with mesh_proxy() as mesh, backend() as web:
        port = mesh.serve(
            cluster("web", web.port), service(producers=True), mesh_route("r", rule(to("web")))
        )
        labels = ("mesh", "HTTPRoute/shop/r", "0", "cluster/Service/default/web/80", "200")
        before = metrics.REQUESTS.labels(*labels)._value.get()
        await ask(port)
        assert metrics.REQUESTS.labels(*labels)._value.get() == before + 1
        entry = (await mesh.close())[0]
        assert entry["client"] == CLIENT
        assert entry["gateway"] == "mesh"
        assert entry["listener"] == "Service/shop/web/80"
        assert entry["route"] == "HTTPRoute/shop/r"
