"""Flow records in the agent: who is behind addresses, what is held, what is lost, what matches."""

import asyncio
import time

import msgspec
import pytest
from flow_cases import PODS, TIME, connection, request, workload

from mesh.agent.flow_filter import FilterError, compile_filters, since_ns
from mesh.agent.flow_peers import Peers, own_addresses
from mesh.agent.flows import FlowStore, Line, Lost
from mesh.model.flow import Flows, Peer
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import NodeSection, SvidSection, WorkloadSection
from mesh.model.section import node_key, workload_key


@pytest.fixture
def peers():
    peers = Peers({"192.0.2.1", "fd00::1"})
    peers.publish(PODS, ())
    return peers


@pytest.fixture
def store(peers):
    return FlowStore(peers, 100, "a")


def everything(_flow):
    return True


def paths(flows):
    return [flow.http.path for flow in flows]


# --- who -----------------------------------------------------------------------------------------


def complete(peers, address):
    return peers.complete(connection(source=address), "a").source


def test_pods_are_known_by_address(peers):
    assert complete(peers, "10.244.0.2") == Peer(
        "10.244.0.2", 0, "shop", "web-1", "web", {"app": "web"}, 300
    )
    assert complete(peers, "fd00:10:244::3").pod == "cart-2"
    # As an IPv6 socket tells of an IPv4 peer.
    assert complete(peers, "::ffff:10.244.0.2") == complete(peers, "10.244.0.2")


def test_others_are_host_or_world(peers):
    for address in ("192.0.2.1", "fd00::1", "127.0.0.1", "127.1.2.3", "::1"):
        peer = complete(peers, address)
        assert (peer.identity, peer.labels, peer.pod) == (Reserved.HOST, {"reserved:host": ""}, "")
    for address in ("192.0.2.2", "2001:db8::1", "10.244.0.4"):
        peer = complete(peers, address)
        assert (peer.identity, peer.labels, peer.address) == (
            Reserved.WORLD,
            {"reserved:world": ""},
            address,
        )
    assert complete(peers, "") == Peer()


def test_nodes_and_gateways_are_told_from_the_world(peers):
    key = node_key("b")
    peers.publish({key: NodeSection("b", ("192.0.2.3", "fd00::3"))}, ())
    for address in ("192.0.2.3", "fd00::3", "::ffff:192.0.2.3"):
        peer = complete(peers, address)
        assert (peer.identity, peer.labels) == (Reserved.REMOTE_NODE, {"reserved:remote-node": ""})
    gateway = "spiffe://cluster.local/ns/weft-system/sa/weft-gateway"
    for address in ("192.0.2.3", "192.0.2.1"):
        end = Peer(address, spiffe_id=gateway)
        flow = msgspec.structs.replace(connection(), source=end)
        peer = peers.complete(flow, "a").source
        assert (peer.identity, peer.spiffe_id) == (Reserved.INGRESS, gateway)
    peers.publish({}, (key,))
    assert complete(peers, "192.0.2.3").identity == Reserved.WORLD


def test_a_pod_that_only_its_service_knows_is_named(peers):
    """Its EndpointSlice is there, its Pod is not."""
    endpoint = Peer("192.0.2.50", 80, "", "cart-9")
    flow = msgspec.structs.replace(request(), destination=endpoint)
    assert peers.complete(flow, "a").destination == Peer("192.0.2.50", 80, "shop", "cart-9")
    endpoint = Peer("10.244.0.3", 80, "", "other")
    flow = msgspec.structs.replace(request(), destination=endpoint)
    assert peers.complete(flow, "a").destination.pod == "cart-1"


def test_own_addresses_are_this_hosts():
    found = own_addresses()
    assert "127.0.0.1" in found
    assert not found & {"0.0.0.0", "127.0.0.0", "127.255.255.255"}


def test_pods_come_change_and_go(peers):
    peers.publish(workload("web-1", "10.244.0.7"), ())
    assert complete(peers, "10.244.0.7").pod == "web-1"
    assert complete(peers, "10.244.0.2").identity == Reserved.WORLD
    key = workload_key("shop", "web-1")
    peers.publish({}, (key, "route/x", "cluster/y"))
    assert complete(peers, "10.244.0.7").identity == Reserved.WORLD


def test_an_address_that_another_pod_has_got_is_the_others(peers):
    """Its new pod may come before its old one goes, or with it."""
    peers.publish(workload("new-1", "10.244.0.2"), ())
    peers.publish({}, (workload_key("shop", "web-1"),))
    assert complete(peers, "10.244.0.2").pod == "new-1"
    peers.publish(workload("new-2", "10.244.0.2"), (workload_key("shop", "new-1"),))
    assert complete(peers, "10.244.0.2").pod == "new-2"


def test_pods_of_one_node_are_proven_by_valid_svids(peers):
    """Of what no proxy saw."""
    ends = {one: f"spiffe://cluster.local/ns/shop/sa/{one}" for one in ("web", "cart")}
    after, before = TIME // 10**9 + 1, TIME // 10**9
    svids = {one: SvidSection(one, "", "", after) for one in ends.values()}
    peers.publish(workload("web-1", "10.244.0.2", local=True, spiffe_id=ends["web"]), ())
    peers.publish(svids, ())

    def proven(**fields):
        peers.publish(workload("cart-1", "10.244.0.3", spiffe_id=ends["cart"], **fields), ())
        flow = peers.proven(connection())
        return flow.encryption, flow.source.spiffe_id, flow.destination.spiffe_id

    assert proven(local=True) == ("local", *ends.values())
    plain = ("none", "", "")
    assert proven(local=False) == plain
    peers.publish({ends["cart"]: SvidSection(ends["cart"], "", "", before)}, ())
    assert proven(local=True) == plain
    peers.publish(svids, ())
    assert proven(local=True) == ("local", *ends.values())
    peers.publish({}, (ends["web"],))
    assert proven(local=True) == plain


def test_services_by_frontend(peers):
    assert peers.service("10.96.0.10", 80, "TCP") == "shop/cart:80"
    assert peers.service("10.96.0.10", 80, "UDP") == ""
    peers.publish({}, ("entry/10.96.0.10|80/TCP",))
    assert peers.service("10.96.0.10", 80, "TCP") == ""


# --- the store -----------------------------------------------------------------------------------


def test_the_newest_records_are_held_and_all_are_counted(store):
    for number in range(250):
        verdict = "DROPPED" if number % 5 == 0 else "FORWARDED"
        store.record(request(f"/{number}", verdict=verdict))
    assert paths(store.held()) == [f"/{number}" for number in range(150, 250)]
    assert store.seen == {"FORWARDED": 200, "DROPPED": 50, "ERROR": 0}
    assert store.overwritten == 150
    assert set(store.lost.values()) == {0}
    assert {flow.node for flow in store.held()} == {"a"}
    assert store.held()[0].destination.pod == "cart-1"


def test_what_workers_lost_is_counted(store):
    store.receive(Flows((request(), request()), lost=3))
    store.receive(Flows((), lost=4))
    assert store.lost["worker"] == 7
    assert len(store.held()) == 2


def test_long_texts_of_clients_are_cut(store):
    store.record(request("/" + "x" * 100_000, method="M" * 5000))
    http = store.held()[0].http
    assert http.path == "/" + "x" * 1023 + "…"
    assert len(http.method) == 1025
    store.record(request("/" + "x" * 1023))
    assert store.held()[1].http.path == "/" + "x" * 1023


async def test_a_follower_gets_what_matches_from_now_on(store):
    store.record(request("/before"))
    follower = store.follow(lambda flow: flow.http.status == 200)
    store.record(request("/one"))
    store.record(request("/other", 404))
    store.record(request("/two"))
    assert paths(line.flow for line in await follower.batch()) == ["/one", "/two"]
    waiting = asyncio.ensure_future(follower.batch())
    await asyncio.sleep(0)
    assert not waiting.done()
    store.record(request("/three"))
    assert paths(line.flow for line in await waiting) == ["/three"]
    store.unfollow(follower)
    store.record(request("/four"))
    store.close()
    waiting = asyncio.ensure_future(follower.batch())
    await asyncio.sleep(0)
    assert waiting.cancel()


async def test_a_slow_follower_loses_what_it_cannot_hold_and_is_told_where(store):
    slow, quick = store.follow(everything, limit=10), store.follow(everything, limit=1000)
    for number in range(25):
        store.record(request(f"/{number}"))
    *flows, last = await slow.batch()
    assert paths(line.flow for line in flows) == [f"/{number}" for number in range(10)]
    assert last == Line(lost=Lost("follower", 15))
    assert len(await quick.batch()) == 25
    assert store.lost["follower"] == 15
    store.record(request("/next"))
    assert paths(line.flow for line in await slow.batch()) == ["/next"]


async def test_followers_are_told_of_what_was_lost_before_the_store(store):
    follower = store.follow(everything)
    store.receive(Flows((request("/one"),), lost=2))
    store.count_lost("kernel", 5)
    lines = await follower.batch()
    assert lines[0].flow.http.path == "/one"
    assert [line.lost for line in lines[1:]] == [Lost("worker", 2), Lost("kernel", 5)]


async def test_followers_end_with_the_store_after_what_is_left(store):
    follower = store.follow(everything)
    store.record(request("/last"))
    store.close()
    assert len(await follower.batch()) == 1
    assert await follower.batch() == []


# --- filters -------------------------------------------------------------------------------------

WEB_TO_CART = request("/items/7", 503, verdict="ERROR")
TEST_TO_CART = request("/", 200, method="POST", source="10.244.0.9", to="fd00:10:244::3")
OUTSIDE = request("/shop", 301, source="203.0.113.9", service="shop/web:8080")
REFUSED = connection(to="10.96.0.10", port=443, verdict="DROPPED", reason="NO_BACKENDS")
DATAGRAM = connection(source="192.0.2.1", protocol="UDP", port=53)
ALL = (WEB_TO_CART, TEST_TO_CART, OUTSIDE, REFUSED, DATAGRAM)


@pytest.mark.parametrize(
    ("filters", "matching"),
    [
        ([], ALL),
        ([("from", "shop/web-1")], (WEB_TO_CART, REFUSED)),
        ([("from", "shop/web")], (WEB_TO_CART, REFUSED)),
        ([("from", "web")], (WEB_TO_CART, TEST_TO_CART, REFUSED)),
        ([("from", "eb-1")], ()),
        ([("from", "test/")], (TEST_TO_CART,)),
        ([("from", "te/")], ()),
        ([("from", "test/"), ("from", "world")], (TEST_TO_CART, OUTSIDE)),
        ([("from", "host")], (DATAGRAM,)),
        ([("from", "203.0.113.9")], (OUTSIDE,)),
        ([("from", "203.0.113.0/24")], (OUTSIDE,)),
        ([("from", "10.244.0.0/16")], (WEB_TO_CART, TEST_TO_CART, REFUSED)),
        ([("to", "FD00:10:244:0::3")], (TEST_TO_CART,)),
        ([("to", "fd00:10:244::/64")], (TEST_TO_CART,)),
        ([("to", "app=cart")], (WEB_TO_CART, TEST_TO_CART, OUTSIDE, DATAGRAM)),
        ([("to", "app=cart,tier=x")], ()),
        ([("from", "app=web"), ("to", "10.96.0.10")], (REFUSED,)),
        ([("verdict", "dropped"), ("verdict", "ERROR")], (WEB_TO_CART, REFUSED)),
        ([("http-status", "503")], (WEB_TO_CART,)),
        ([("http-status", "5xx"), ("http-status", "3XX")], (WEB_TO_CART, OUTSIDE)),
        ([("http-status", "200-301")], (TEST_TO_CART, OUTSIDE)),
        ([("http-method", "post")], (TEST_TO_CART,)),
        ([("http-path", "/items")], (WEB_TO_CART,)),
        ([("service", "shop/cart")], (WEB_TO_CART, TEST_TO_CART)),
        ([("service", "shop/cart:81")], ()),
        ([("service", "web")], (OUTSIDE,)),
        ([("service", "web:8080")], (OUTSIDE,)),
        ([("service", "shop/")], (WEB_TO_CART, TEST_TO_CART, OUTSIDE)),
        ([("protocol", "udp")], (DATAGRAM,)),
        ([("protocol", "http")], (WEB_TO_CART, TEST_TO_CART, OUTSIDE)),
        ([("protocol", "HTTP/2")], ()),
        ([("protocol", "tcp"), ("verdict", "dropped")], (REFUSED,)),
    ],
)
def test_filters(store, filters, matching):
    for flow in ALL:
        store.record(flow)
    matches = compile_filters(filters)
    found = [before for before, flow in zip(ALL, store.held(), strict=True) if matches(flow)]
    assert found == list(matching)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("from", "a/b/c", "not NAMESPACE/POD"),
        ("to", "/b", "not NAMESPACE/POD"),
        ("to", "", "an empty name"),
        ("to", "app!=x", "NAME=VALUE"),
        ("to", "app==x", "NAME=VALUE"),
        ("verdict", "AUDIT", "FORWARDED, DROPPED, ERROR"),
        ("http-status", "6xx", "500-504"),
        ("http-status", "ok", "500-504"),
        ("protocol", "SCTP", "give TCP"),
    ],
)
def test_filters_that_cannot_be_understood(name, value, said):
    with pytest.raises(FilterError, match=said):
        compile_filters([(name, value)])


def test_since():
    assert since_ns("2025-11-25T15:00:01.123Z") == TIME
    assert since_ns("2025-11-25T16:00:01.123+01:00") == TIME
    for text, seconds in (("30s", 30), ("5m", 300), ("1h30m", 5400), ("1.5d", 129_600)):
        before = time.time_ns()
        found = since_ns(text) + seconds * 10**9
        assert before <= found <= time.time_ns()
    for text in ("5", "m", "5 m", "yesterday", "2025-11-25", "2025-11-25T15:00:01", "-5m", ""):
        with pytest.raises(FilterError, match="30s"):
            since_ns(text)


def test_a_pod_without_labels_has_none():
    peers = Peers()
    peers.publish({"workload/x/y": WorkloadSection("x", "y", ("10.0.0.1",))}, ())
    flow = peers.complete(connection(source="10.0.0.1"), "")
    assert not compile_filters([("from", "app=web")])(flow)
