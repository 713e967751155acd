"""Clusters over real sockets: keeping connections, other endpoints, limits, changes, ejection."""

from __future__ import annotations

import asyncio
import contextlib
import random
import select
from collections.abc import Callable

import pytest
from loops import advance, on_both_loops, on_virtual_loop
from tls_peers import AUTHORITY, certificate
from upstream_backend import GET, Backend, backend, black_hole, finish, refusing

from l7proxy.http1_client import Http1Client
from l7proxy.lease import Lease, NoEndpoints, Overflow
from l7proxy.peers import Caller
from l7proxy.pool import IDLE_S, ConnectFailed, Pool, Retired, UpstreamError
from l7proxy.streams import ClientConnection, StreamReset
from l7proxy.tls import TLSRefused
from l7proxy.upstream import Cluster, Clusters, ClusterStats
from mesh.model.nodeconfig import ClusterSection, Endpoint, Settings, UpstreamTLS

KEY = "cluster/Service/ns/a/80"


def section(*backends: Backend | Endpoint, **more: object) -> ClusterSection:
    endpoints = (one.endpoint if isinstance(one, Backend) else one for one in backends)
    return ClusterSection(tuple(endpoints), **more)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def clusters(first: ClusterSection, **settings: object):
    made = Clusters(Settings(**settings))  # type: ignore[arg-type]
    made.put(KEY, first)
    try:
        yield made
    finally:
        cluster = made.get(KEY)
        made.close()
        if cluster is not None:
            await connections(cluster, 0)


@contextlib.asynccontextmanager
async def in_cluster(*backends: Backend | Endpoint, **settings: object):
    async with clusters(section(*backends), **settings) as made:
        yield made.get(KEY)


async def connections(cluster: Cluster, count: int) -> None:
    """Until the cluster has so many open connections."""
    while cluster.stats().connections != count:
        await asyncio.sleep(0)


async def ask(cluster: Cluster, **how: object) -> str:
    return await finish(await cluster.acquire(**how))


def loads(cluster: Cluster) -> list[int]:
    return [member.load for member in cluster._balancer.members.values()]


# --- keeping connections ------------------------------------------------------------------------


@on_both_loops
async def test_a_connection_is_used_again():
    async with backend() as one, in_cluster(one) as cluster:
        for again in (False, True, True):
            lease = await cluster.acquire()
            assert lease.reused is again
            assert lease.endpoint_id == one.id
            assert await finish(lease) == "a"
        assert one.connections == 1
        assert cluster.stats() == ClusterStats(1, 1, 0, 0)


@on_both_loops
async def test_as_many_connections_as_requests_at_once():
    async with backend() as one, in_cluster(one) as cluster:
        one.hold()
        tasks = [asyncio.ensure_future(ask(cluster)) for _ in range(20)]
        await one.until(requests=20)
        assert cluster.stats() == ClusterStats(20, 0, 0, 0)
        assert loads(cluster) == [20]
        one.go_on()
        assert await asyncio.gather(*tasks) == ["a"] * 20
        assert cluster.stats() == ClusterStats(20, 20, 0, 0)
        assert loads(cluster) == [0]


@on_virtual_loop
async def test_idle_connections_close_in_time_and_busy_ones_do_not():
    async with backend() as one, in_cluster(one) as cluster:
        first, second = await cluster.acquire(), await cluster.acquire()
        await finish(first)
        advance(IDLE_S - 0.1)
        await asyncio.sleep(0)
        assert cluster.stats().connections == 2
        advance(0.2)
        await one.until(open=1)
        await connections(cluster, 1)
        assert await finish(second) == "a"
        advance(IDLE_S + 0.1)
        await one.until(open=0)
        await connections(cluster, 0)
        assert await ask(cluster) == "a"  # from nothing again


@on_virtual_loop
async def test_a_connection_in_use_now_and_then_stays():
    async with backend() as one, in_cluster(one) as cluster:
        for _ in range(5):
            await ask(cluster)
            advance(IDLE_S - 0.5)
            await asyncio.sleep(0)
        assert one.connections == 1


@on_both_loops
async def test_a_connection_that_the_backend_closes_while_idle_is_gone():
    async with backend() as one, in_cluster(one) as cluster:
        await ask(cluster)
        one.reset_all()
        await connections(cluster, 0)
        lease = await cluster.acquire()
        assert not lease.reused
        await finish(lease)


@on_both_loops
async def test_closed_before_the_event_loop_knows():
    async with backend() as one, in_cluster(one) as cluster:
        await asyncio.gather(*map(finish, [await cluster.acquire() for _ in range(3)]))
        one.close_all()
        lease = await cluster.acquire()
        assert not lease.reused
        assert await finish(lease) == "a"
        assert one.connections == 4


@on_both_loops
async def test_closed_at_the_moment_of_reuse():
    """The request fails so that it may be repeated, the next goes over a new connection though
    others were idle, and the endpoint's health does not suffer."""
    async with (
        backend("a") as one,
        backend("b") as two,
        in_cluster(one, two, ejection_failures=1) as cluster,
    ):
        for each in (one, two):
            held = [await cluster.acquire(prefer=each.id) for _ in range(3)]
            await asyncio.gather(*map(finish, held))
        one.reset_all()
        lease = await cluster.acquire(prefer=one.id)  # nobody has noticed yet
        assert lease.reused
        with pytest.raises(StreamReset) as caught:
            await finish(lease)
        assert caught.value.reused or caught.value.unprocessed
        lease.failed("reset")
        lease = await cluster.acquire(prefer=one.id)
        assert (lease.reused, lease.endpoint_id) == (False, one.id)
        assert await finish(lease) == "a"


@on_both_loops
async def test_a_stale_connection_takes_the_other_idle_ones_with_it():
    async with backend() as one, in_cluster(one) as cluster:
        await asyncio.gather(*map(finish, [await cluster.acquire() for _ in range(3)]))
        busy = await cluster.acquire()
        lease = await cluster.acquire()
        assert cluster.stats() == ClusterStats(3, 1, 0, 0)
        lease.stream.abort("reset")
        lease.release()
        lease.failed("reset")
        await one.until(open=1)
        assert cluster.stats() == ClusterStats(1, 0, 0, 0)
        assert await finish(busy) == "a"


# --- other endpoints ------------------------------------------------------------------------------


@on_both_loops
async def test_refused_goes_to_another():
    with refusing() as dead:
        async with backend() as one, in_cluster(dead, one) as cluster:
            for _ in range(4):
                assert await ask(cluster) == "a"
            assert loads(cluster) == [0, 0]


@on_virtual_loop
async def test_a_black_hole_costs_the_connect_timeout():
    with black_hole() as hole:
        async with backend() as one, in_cluster(hole, one, connect_timeout_s=3.0) as cluster:
            hole_id = f"127.0.0.1:{hole.port}"
            asked = asyncio.ensure_future(ask(cluster, prefer=hole_id))
            while cluster.stats().pending == 0:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            advance(2.9)
            await asyncio.sleep(0)
            assert not asked.done()
            advance(0.2)
            assert await asked == "a"


@on_both_loops
async def test_the_last_failure_is_told_when_all_were_tried():
    with refusing() as dead, refusing() as other:
        async with in_cluster(dead, other) as cluster:
            with pytest.raises(ConnectFailed) as caught:
                await cluster.acquire()
            assert caught.value.reason == "connect_refused"
            assert caught.value.status == 503
            assert caught.value.endpoint_id in str(caught.value)
            assert loads(cluster) == [0, 0]
            assert cluster.stats() == ClusterStats(0, 0, 0, 0)


@on_both_loops
async def test_avoided_endpoints_are_used_only_without_others():
    async with backend("a") as one, backend("b") as two, in_cluster(one, two) as cluster:
        assert {await ask(cluster, avoid={one.id}) for _ in range(4)} == {"b"}
        assert await ask(cluster, avoid={one.id, two.id}) in ("a", "b")
        assert {await ask(cluster, prefer=one.id) for _ in range(4)} == {"a"}
        assert cluster.has(one.id)
        assert not cluster.has("127.0.0.1:1")


@on_both_loops
async def test_no_endpoints():
    async with in_cluster() as cluster:
        with pytest.raises(NoEndpoints) as caught:
            await cluster.acquire()
        assert (caught.value.reason, caught.value.status) == ("no_endpoints", 503)


# --- limits -----------------------------------------------------------------------------------


@on_both_loops
async def test_requests_beyond_the_connections_wait_in_order_and_then_overflow():
    async with (
        backend() as one,
        clusters(section(one, max_connections_per_endpoint=2, max_pending=4)) as made,
    ):
        cluster = made.get(KEY)
        leases = [await cluster.acquire() for _ in range(2)]
        served: list[int] = []

        async def wait(number: int) -> None:
            lease = await cluster.acquire()
            served.append(number)
            await finish(lease)

        waiting = [asyncio.ensure_future(wait(number)) for number in range(3)]
        while cluster.stats().pending < 3:
            await asyncio.sleep(0)
        with pytest.raises(Overflow) as caught:
            await cluster.acquire()
        assert (caught.value.reason, caught.value.status) == ("max_pending", 503)
        assert not served
        for lease in leases:
            await finish(lease)
        await asyncio.gather(*waiting)
        assert served == [0, 1, 2]
        assert one.connections == 2
        assert cluster.stats() == ClusterStats(2, 2, 0, 0)
        assert loads(cluster) == [0]


@on_both_loops
async def test_clients_take_turns_and_none_gets_everything():
    async with (
        backend() as one,
        clusters(section(one, max_connections_per_endpoint=8, max_pending=40)) as made,
    ):
        cluster = made.get(KEY)
        served: list[str] = []

        async def hold(client: str) -> Lease:
            lease = await cluster.acquire(Caller(client))
            served.append(client)
            return lease

        def ask_for(client: str, count: int) -> list[asyncio.Task[Lease]]:
            return [asyncio.ensure_future(hold(client)) for _ in range(count)]

        asked = ask_for("greedy", 20)
        await connections(cluster, 5)  # then it holds more than are free
        asked += ask_for("a", 4) + ask_for("b", 4)
        while len(served) < 8:
            await asyncio.sleep(0)
        assert served == ["greedy"] * 5 + ["a", "b", "a"]
        asked += ask_for("greedy", 3)
        while cluster.stats().pending < 23:
            await asyncio.sleep(0)
        with pytest.raises(Overflow):
            await cluster.acquire(Caller("greedy"))
        asked += ask_for("c", 1)
        while cluster.stats().pending < 24:
            await asyncio.sleep(0)
        for lease in asked[:4]:
            await finish(await lease)
        while len(served) < 11:
            await asyncio.sleep(0)
        assert served[8:] == ["b", "c", "greedy"]  # at the third nobody held as few as were free
        for each in asyncio.as_completed(asked[4:]):
            await finish(await each)
        assert cluster.stats().pending == 0


@on_both_loops
async def test_an_aborted_stream_gives_its_place_to_who_waits():
    async with backend() as one, clusters(section(one, max_connections_per_endpoint=1)) as made:
        cluster = made.get(KEY)
        lease = await cluster.acquire()
        waiting = asyncio.ensure_future(ask(cluster))
        while cluster.stats().pending < 1:
            await asyncio.sleep(0)
        lease.stream.abort("test")
        lease.release()
        lease.release()
        assert await waiting == "a"
        assert loads(cluster) == [0]


# --- giving up ------------------------------------------------------------------------------------


@on_both_loops
async def test_cancelled_while_connecting_leaves_a_connection_for_the_next():
    async with backend() as one, in_cluster(one) as cluster:
        asked = asyncio.ensure_future(cluster.acquire())
        while cluster.stats().pending == 0:
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (cluster.stats().pending, loads(cluster)) == (0, [0])
        await connections(cluster, 1)
        assert await ask(cluster) == "a"
        assert one.connections == 1


@on_both_loops
async def test_cancelled_at_any_moment_leaks_nothing():
    """Cancelled after every number of steps of the loop, the moment of hand-over among them."""
    async with backend() as one, clusters(section(one, max_connections_per_endpoint=1)) as made:
        cluster = made.get(KEY)
        for steps in range(25):
            lease = await cluster.acquire()
            asked = asyncio.ensure_future(cluster.acquire())
            while cluster.stats().pending == 0:
                await asyncio.sleep(0)
            finishing = asyncio.ensure_future(finish(lease))
            for _ in range(steps):
                await asyncio.sleep(0)
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await finish(await asked)
            await finishing
            assert (cluster.stats().pending, loads(cluster)) == (0, [0])
            assert await ask(cluster) == "a"


@on_both_loops
async def test_cancelled_just_as_a_stream_is_handed_over():
    async with backend() as one, clusters(section(one, max_connections_per_endpoint=1)) as made:
        cluster = made.get(KEY)
        lease = await cluster.acquire()
        asked = asyncio.ensure_future(cluster.acquire())
        while cluster.stats().pending == 0:
            await asyncio.sleep(0)
        # Ends the stream and hands its place over within this very step of the loop.
        await lease.stream.request(GET)
        await lease.stream.response()
        while True:
            if not await lease.stream.read():
                break
        asked.cancel()
        lease.release()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert (cluster.stats().pending, loads(cluster)) == (0, [0])
        assert await ask(cluster) == "a"


@on_both_loops
async def test_resets_and_cancellations_at_random_leave_nothing_behind():
    chance = random.Random(7)
    async with contextlib.AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(backend(str(n))) for n in range(3)]
        made = await stack.enter_async_context(
            clusters(section(*backends, max_connections_per_endpoint=4, max_pending=20))
        )
        cluster = made.get(KEY)
        answered = 0

        async def client(number: int) -> None:
            nonlocal answered
            for _ in range(40):
                asked = asyncio.ensure_future(ask(cluster, caller=Caller(str(number))))
                for _ in range(chance.randrange(30)):
                    await asyncio.sleep(0)
                if chance.random() < 0.3:
                    asked.cancel()
                try:
                    await asked
                    answered += 1
                except (asyncio.CancelledError, StreamReset, UpstreamError):
                    if chance.random() < 0.1:
                        chance.choice(backends).reset_all()

        await asyncio.gather(*(client(number % 10) for number in range(30)))
        assert answered > 100
        assert set(loads(cluster)) == {0}
        assert cluster.stats().pending == 0
        assert await ask(cluster) in ("0", "1", "2")


# --- changes ------------------------------------------------------------------------------------


@on_both_loops
async def test_an_endpoint_that_leaves_finishes_and_gets_nothing_new():
    async with backend("a") as one, backend("b") as two, clusters(section(one, two)) as made:
        cluster = made.get(KEY)
        await asyncio.gather(*[ask(cluster, prefer=each.id) for each in (one, two)])
        idle = await cluster.acquire(prefer=one.id)
        busy = await cluster.acquire(prefer=one.id)
        kept = await cluster.acquire(prefer=two.id)
        await finish(kept)
        await finish(idle)
        one.hold()
        finishing = asyncio.ensure_future(finish(busy))
        await one.until(requests=3)
        made.put(KEY, section(two))
        await one.until(open=1)
        one.go_on()
        assert await finishing == "a"
        await one.until(open=0)
        assert {await ask(cluster, prefer=one.id) for _ in range(5)} == {"b"}
        assert two.connections == 1


@on_both_loops
async def test_who_waits_for_an_endpoint_that_leaves_goes_to_another():
    async with (
        backend("a") as one,
        backend("b") as two,
        clusters(section(one, max_connections_per_endpoint=1)) as made,
    ):
        cluster = made.get(KEY)
        lease = await cluster.acquire()
        waiting = [asyncio.ensure_future(ask(cluster)) for _ in range(3)]
        while cluster.stats().pending < 3:
            await asyncio.sleep(0)
        made.put(KEY, section(two, max_connections_per_endpoint=1))
        assert await asyncio.gather(*waiting) == ["b"] * 3
        assert await finish(lease) == "a"


@on_both_loops
async def test_who_waits_in_a_cluster_that_is_removed_is_told():
    async with backend() as one, clusters(section(one, max_connections_per_endpoint=1)) as made:
        cluster = made.get(KEY)
        lease = await cluster.acquire()
        waiting = asyncio.ensure_future(cluster.acquire())
        while cluster.stats().pending < 1:
            await asyncio.sleep(0)
        made.remove(KEY)
        with pytest.raises(NoEndpoints):
            await waiting
        assert made.get(KEY) is None
        assert await finish(lease) == "a"
        await connections(cluster, 0)


@on_both_loops
async def test_other_limits_take_effect():
    async with backend() as one, clusters(section(one, max_connections_per_endpoint=1)) as made:
        cluster = made.get(KEY)
        first = await cluster.acquire()
        made.put(KEY, section(one, max_connections_per_endpoint=2))
        second = await cluster.acquire()
        assert {await finish(first), await finish(second)} == {"a"}
        assert one.connections == 2


@on_both_loops
async def test_endpoints_change_under_load():
    async with contextlib.AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(backend(str(n))) for n in range(4)]
        made = await stack.enter_async_context(clusters(section(*backends)))
        cluster = made.get(KEY)
        stop = asyncio.Event()
        done: list[str] = []

        async def client() -> None:
            while not stop.is_set():
                done.append(await ask(cluster))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(16):
                tasks.create_task(client())
            for step in range(20):
                before = len(done)
                made.put(KEY, section(*(b for n, b in enumerate(backends) if n != step % 4)))
                while len(done) < before + 50:
                    await asyncio.sleep(0)
            stop.set()
        assert set(done) == {"0", "1", "2", "3"}
        assert set(loads(cluster)) == {0}
        assert cluster.stats().pending == 0


# --- ejection -------------------------------------------------------------------------------------


@on_virtual_loop
async def test_an_endpoint_that_fails_is_ejected_and_comes_back():
    async with (
        backend("a") as one,
        backend("b") as two,
        in_cluster(one, two, ejection_failures=3, ejection_time_s=10.0) as cluster,
    ):
        for status in (502, 503, 200, 502, 503):
            await finish(await cluster.acquire(prefer=one.id), status)
        assert cluster.stats().ejected == 0
        await finish(await cluster.acquire(prefer=one.id), 504)
        assert cluster.stats().ejected == 1
        assert {await ask(cluster, prefer=one.id) for _ in range(6)} == {"b"}
        advance(9.5)
        assert {await ask(cluster) for _ in range(6)} == {"b"}
        advance(1.0)
        assert {await ask(cluster) for _ in range(6)} == {"a", "b"}
        assert cluster.stats().ejected == 0


@on_both_loops
async def test_refused_connections_eject():
    with refusing() as dead:
        async with backend() as one, in_cluster(dead, one, ejection_failures=2) as cluster:
            for _ in range(2):
                assert await ask(cluster, prefer=f"127.0.0.1:{dead.port}") == "a"
            assert cluster.stats().ejected == 1


@on_both_loops
async def test_a_500_is_no_failure_of_the_endpoint():
    async with (
        backend("a") as one,
        backend("b") as two,
        in_cluster(one, two, ejection_failures=1) as cluster,
    ):
        lease = await cluster.acquire()
        await finish(lease, 500)
        assert cluster.stats().ejected == 0
        lease.failed("timeout")
        assert cluster.stats().ejected == 1


@on_both_loops
async def test_other_tls_gives_endpoints_another_chance():
    async with backend("a") as one, backend("b") as two:
        tls = UpstreamTLS("a.test", AUTHORITY.certificate_pem)
        async with clusters(section(one, two, tls=tls), ejection_failures=1) as made:
            cluster = made.get(KEY)
            lost = asyncio.ensure_future(cluster.acquire(prefer=one.id))
            for each in (one, two):
                await each.until(connections=1)
                each.reset_all()
            with pytest.raises(ConnectFailed):
                await lost
            assert cluster.stats().ejected == 1
            made.put(KEY, section(one, two))
            assert cluster.stats().ejected == 0
            assert {await ask(cluster) for _ in range(4)} == {"a", "b"}


@on_both_loops
async def test_settings_apply_from_the_next_request_on():
    async with backend("a") as one, backend("b") as two, clusters(section(one, two)) as made:
        made.settings = Settings(balancer="round-robin")
        names = [await ask(made.get(KEY)) for _ in range(6)]
        assert names in (["a", "b"] * 3, ["b", "a"] * 3)


# --- TLS that cannot be had -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tls": UpstreamTLS("a.test", broken="ConfigMap ns/ca does not exist")}, "ConfigMap"),
        ({"protocol": "wss"}, "BackendTLSPolicy"),
    ],
)
@on_both_loops
async def test_tls_that_cannot_be_enforced_makes_no_connection(more, words):
    async with backend() as one, clusters(section(one, **more)) as made:
        with pytest.raises(UpstreamError, match=words) as caught:
            await made.get(KEY).acquire()
        assert (caught.value.reason, caught.value.status) == ("tls_broken", 502)
        assert one.connections == 0


@on_both_loops
async def test_a_bundle_that_cannot_be_loaded_is_refused_and_what_was_stays():
    async with backend() as one, clusters(section(one)) as made:
        with pytest.raises(TLSRefused, match=f"^{KEY}: backend TLS: CA bundle"):
            made.put(KEY, section(one, tls=UpstreamTLS("a.test", "garbage")))
        assert await ask(made.get(KEY)) == "a"
        with pytest.raises(TLSRefused):
            made.put("cluster/new", section(one, tls=UpstreamTLS("a.test", "garbage")))
        assert made.get("cluster/new") is None


@on_both_loops
async def test_a_client_certificate_that_cannot_be_loaded_fails_without_its_key():
    broken = certificate("a.test")
    broken = type(broken)(broken.chain_pem, certificate("b.test").key_pem)
    tls = UpstreamTLS("a.test", AUTHORITY.certificate_pem)
    async with backend() as one, clusters(section(one, tls=tls)) as made:
        with pytest.raises(UpstreamError) as caught:
            await made.get(KEY).acquire(client_certificate=("certificate/n/b", broken))
        assert caught.value.reason == "tls_broken"
        assert broken.key_pem[40:60] not in str(caught.value)
        assert loads(made.get(KEY)) == [0]


# --- pools by themselves --------------------------------------------------------------------------


def pool(connect) -> Pool:
    return Pool(
        connect,
        endpoint="10.0.0.1:80",
        limit=1,
        shared=False,
        on_failure=lambda _: None,
        on_empty=lambda: None,
    )


async def never(_: object):
    await asyncio.get_running_loop().create_future()


@on_both_loops
async def test_a_retired_pool_sends_requests_elsewhere():
    made = pool(never)
    made.retire()
    with pytest.raises(Retired):
        await made.wait("")


@on_both_loops
async def test_a_fault_while_connecting_is_logged_and_nobody_hangs(caplog):
    async def faulty(_: object):
        raise RuntimeError("a fault")

    with pytest.raises(UpstreamError) as caught:
        await pool(faulty).wait("")
    assert caught.value.reason == "internal"
    await asyncio.sleep(0)
    assert "a fault" in caplog.text


@on_both_loops
async def test_an_endpoint_that_closes_at_once_fails_the_request_that_waits():
    """Nobody is connected for time and again."""
    connected = 0

    async def slam(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(slam, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def connect(on_change: Callable[[ClientConnection], None]):
        nonlocal connected
        connected += 1
        assert connected < 10, "it is connected to without end"
        transport, connection = await asyncio.get_running_loop().create_connection(
            lambda: Http1Client(Settings(), on_change), "127.0.0.1", port
        )
        gone = select.poll()
        gone.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
        while not connection.closed:
            await asyncio.sleep(0)
        return connection, gone

    failures: list[ConnectFailed] = []
    slammed = Pool(
        connect,
        endpoint="10.0.0.1:80",
        limit=4,
        shared=False,
        on_failure=failures.append,
        on_empty=lambda: None,
    )
    async with server:
        with pytest.raises(ConnectFailed, match="closed the connection at once") as caught:
            await slammed.wait("")
    assert caught.value.reason == "connect_closed"
    assert failures == [caught.value]
    assert connected == 1
    assert slammed.connections == 0
