"""The redirect path by real programs and sockets: who is enrolled, what arrives, what fails."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest
from bpf_world import needs_bpf
from redirect_world import (
    MAPPED,
    NODE,
    NODE6,
    TIMEOUT_S,
    VIP,
    VIP6,
    World,
    await_that,
    received,
    redirect_world,
    unread,
)

from bpf import constants, maps, settings
from bpf.podfilter import netns_cookie
from bpf.proxy import ProxyHandles
from bpf.reasons import Reason
from bpf.structs import Address, Addresses, Number, Pod, Target
from mesh.model.nodeconfig import MESH_HTTP_PORT, MESH_RELAY_PORT, EntryBackend, WorkloadSection

pytestmark = needs_bpf
NOBODY = 65534
OTHER = "127.0.0.9"
_TCP_DEFER_ACCEPT = socket.TCP_DEFER_ACCEPT


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with redirect_world(tmp_path_factory.mktemp("redirect")) as made:
        yield made


def steer(world: World, *, sockmap: bool = True) -> None:
    ports = [(one, port) for one in (NODE, NODE6) for port in (MESH_HTTP_PORT, MESH_RELAY_PORT)]
    settings.steer_to_proxy(world.pin, ports, sockmap=sockmap)


def test_without_descriptors_nothing_is_known():
    """Where nothing could be loaded."""
    handles = ProxyHandles({})
    with socket.socket() as any_socket:
        assert handles.origin(any_socket.fileno()) is None
        assert handles.pair(any_socket.fileno()) == 0
    assert handles.queued(1) == 0


@pytest.mark.parametrize(
    ("asked", "frontend", "node"), [(VIP, VIP, NODE), (VIP6, VIP6, NODE6), (MAPPED, VIP, NODE)]
)
def test_a_workload_is_answered_by_redirect(world, asked, frontend, node):
    def scenario(world: World) -> None:
        steer(world)
        world.frontend(frontend, 80, http=True, sockmap=True)
        with world.as_proxy():
            server = world.listen(node, MESH_HTTP_PORT)
            # Descriptors are enough: the proxy has no rights.
            handles = world.handles()
        client = world.connect(asked, 80)
        assert client.getpeername()[:2] == (asked, 80)
        proxy = world.accept(server)
        os.setresuid(NOBODY, NOBODY, 0)
        origin = handles.origin(proxy.fileno())
        assert origin is not None
        assert origin.asked == Target.of(frontend, 80, "TCP")
        assert origin.backend is None
        assert origin.enrolled
        client.sendall(b"a request")
        assert received(proxy, 9) == b"a request"
        before = handles.queued(origin.cookie)
        proxy.sendall(b"an answer")
        await_that(lambda: unread(client) == 9)
        assert handles.queued(origin.cookie) > before
        assert received(client, 9) == b"an answer"
        assert handles.queued(origin.cookie) == before == 0
        # What was written before the end arrives before the end, both ways.
        proxy.sendall(b"last")
        proxy.shutdown(socket.SHUT_WR)
        assert received(client, 100) == b"last"
        client.sendall(b"thanks")
        client.close()
        assert received(proxy, 100) == b"thanks"
        assert handles.queued(origin.cookie) == 0
        os.setresuid(0, 0, 0)
        assert world.counted(Reason.TO_PROXY)
        assert world.counted(Reason.REDIRECTED)

    world.run(scenario)


def test_a_backend_is_asked_by_redirect(world):
    def scenario(world: World) -> None:
        steer(world)
        handles = world.handles()
        for address in (NODE, NODE6):
            backend = world.listen(address)
            port = backend.getsockname()[1]
            own = EntryBackend(address, port, sockmap=True)
            world.frontend(address, port, own, http=True, sockmap=True)
            with world.as_proxy():
                proxy = world.connect(address, port)
            await_that(lambda proxy=proxy: handles.pair(proxy.fileno()) is not None)
            cookie = handles.pair(proxy.fileno())
            assert cookie
            taken = world.accept(backend)
            proxy.sendall(b"a request")
            await_that(lambda taken=taken: unread(taken) == 9)
            assert handles.queued(cookie)
            assert received(taken, 9) == b"a request"
            taken.sendall(b"an answer")
            assert received(proxy, 9) == b"an answer"
            proxy.close()
            assert received(taken, 1) == b""

    world.run(scenario)


def test_nothing_is_sent_before_the_receiver_is_known(world):
    def scenario(world: World) -> None:
        steer(world)
        backend = world.listen(NODE)
        port = backend.getsockname()[1]
        world.frontend(NODE, port, EntryBackend(NODE, port, sockmap=True))
        with world.as_proxy():
            proxy = world.connect(NODE, port)
        before = world.counted(Reason.UNPAIRED)
        with pytest.raises(PermissionError):
            proxy.sendall(b"too early")
        assert world.counted(Reason.UNPAIRED) == before + 1

    world.run(scenario)


def test_a_backend_that_shows_its_socket_late_is_left_plain(world):
    def scenario(world: World) -> None:
        steer(world)
        handles = world.handles()
        backend = world.listen(NODE)
        backend.setsockopt(socket.IPPROTO_TCP, _TCP_DEFER_ACCEPT, 5)
        port = backend.getsockname()[1]
        world.frontend(NODE, port, EntryBackend(NODE, port, sockmap=True))
        with world.as_proxy():
            proxy = world.connect(NODE, port)
            assert handles.pair(proxy.fileno()) is None
            proxy.close()
            handles.mark_plain(Target.of(NODE, port, "TCP"))
            proxy = world.connect(NODE, port)
        assert handles.pair(proxy.fileno()) == 0
        proxy.sendall(b"a request")
        # It also gets to see the connection that was given up, with nothing in it.
        assert received(world.accept(backend), 1) == b""
        assert received(world.accept(backend), 9) == b"a request"
        # Not by waiting: what was remembered is made older.
        with contextlib.closing(maps.PinnedMap(world.pin, "plain", Target, Number)) as plain:
            target = Target.of(NODE, port, "TCP")
            since = plain.get(target)
            assert since is not None
            plain.put(target, Number(max(0, since.value - constants.PLAIN_S * 10**9)))
        with world.as_proxy():
            again = world.connect(NODE, port)
        assert handles.pair(again.fileno()) is None

    world.run(scenario)


def test_who_is_not_enrolled(world):
    """Where redirects are off, ports that do not declare HTTP/1, workloads that opted out,
    backends that may not, and loopback."""

    def scenario(world: World) -> None:
        handles = world.handles()
        with world.as_proxy():
            server = world.listen(NODE, MESH_HTTP_PORT)

        def enrolled() -> bool:
            client = world.connect(VIP, 80)
            proxy = world.accept(server)
            origin = handles.origin(proxy.fileno())
            assert origin is not None
            client.sendall(b"?")
            proxy.sendall(b"!")
            assert (received(client, 1), received(proxy, 1)) == (b"!", b"?")
            return origin.enrolled

        steer(world, sockmap=False)
        world.frontend(VIP, 80, http=True, sockmap=True)
        assert not enrolled()
        steer(world)
        assert enrolled()
        world.frontend(VIP, 80, http=True)
        assert not enrolled()
        world.frontend(VIP, 80, http=True, sockmap=True)
        world.know(False)
        assert not enrolled()
        # Who is not known may have opted out.
        world.know(None)
        assert not enrolled()
        world.know(True)
        assert enrolled()

        for address, may in ((NODE, False), ("127.0.0.1", True)):
            backend = world.listen(address)
            port = backend.getsockname()[1]
            world.frontend(address, port, EntryBackend(address, port, sockmap=may))
            with world.as_proxy():
                proxy = world.connect(address, port)
            assert handles.pair(proxy.fileno()) == 0
            proxy.sendall(b"by TCP")
            assert received(world.accept(backend), 6) == b"by TCP"

    world.run(scenario)


def test_loopback_is_steered_and_not_enrolled(world):
    def scenario(world: World) -> None:
        settings.steer_to_proxy(world.pin, (("127.0.0.1", MESH_HTTP_PORT),), sockmap=True)
        handles = world.handles()
        world.frontend(VIP, 80, http=True, sockmap=True)
        with world.as_proxy():
            server = world.listen("127.0.0.1", MESH_HTTP_PORT)
        client = world.connect(VIP, 80)
        proxy = world.accept(server)
        origin = handles.origin(proxy.fileno())
        assert origin is not None
        assert origin.asked == Target.of(VIP, 80, "TCP")
        assert not origin.enrolled
        proxy.sendall(b"!")
        assert received(client, 1) == b"!"

    world.run(scenario)


def test_sending_to_a_workload_that_is_gone_fails(world):
    def scenario(world: World) -> None:
        steer(world)
        handles = world.handles()
        world.frontend(VIP, 80, http=True, sockmap=True)
        with world.as_proxy():
            server = world.listen(NODE, MESH_HTTP_PORT)
        client = world.connect(VIP, 80)
        proxy = world.accept(server)
        origin = handles.origin(proxy.fileno())
        assert origin is not None
        proxy.sendall(bytes(1 << 20))
        assert handles.queued(origin.cookie) == 1 << 20
        before = world.counted(Reason.REDIRECT_MISSED)
        client.close()
        await_that(lambda: handles.queued(origin.cookie) == 0)
        with pytest.raises((PermissionError, ConnectionError)):
            proxy.sendall(b"x")
        assert world.counted(Reason.REDIRECT_MISSED) <= before + 1

    world.run(scenario)


def test_who_was_not_steered_has_no_origin(world):
    def scenario(world: World) -> None:
        steer(world)
        with world.as_proxy():
            server = world.listen(NODE, MESH_HTTP_PORT)
        stranger = world.connect(NODE, MESH_HTTP_PORT)
        proxy = world.accept(server)
        assert world.handles().origin(proxy.fileno()) is None
        stranger.close()

    world.run(scenario)


def test_remote_backends_go_through_the_relay(world):
    def scenario(world: World) -> None:
        steer(world)
        handles = world.handles()
        world.frontend(VIP, 5432, EntryBackend("198.51.100.77", 5432, remote=True))
        with world.as_proxy():
            server = world.listen(NODE, MESH_RELAY_PORT)
        client = world.connect(VIP, 5432)
        assert client.getpeername() == (VIP, 5432)
        proxy = world.accept(server)
        origin = handles.origin(proxy.fileno())
        assert origin is not None
        assert origin.asked == Target.of(VIP, 5432, "TCP")
        assert origin.backend == Target.of("198.51.100.77", 5432, "TCP")
        assert not origin.enrolled

    world.run(scenario)


def test_a_pod_of_another_node_is_reached_through_the_relay_at_any_port(world):
    """No Service leads to 9999."""

    def scenario(world: World) -> None:
        steer(world)
        handles = world.handles()
        far = WorkloadSection("x", "far", ("198.51.100.77",), node="n2")
        near = WorkloadSection("x", "near", (OTHER,), node="n1", local=True)
        out = WorkloadSection("x", "out", ("127.0.0.10",), node="n2", meshed=False)
        world.know(True, far, near, out)
        with world.as_proxy():
            server = world.listen(NODE, MESH_RELAY_PORT)
        client = world.connect("198.51.100.77", 9999)
        assert client.getpeername() == ("198.51.100.77", 9999)
        proxy = world.accept(server)
        origin = handles.origin(proxy.fileno())
        assert origin is not None
        assert origin.asked == origin.backend == Target.of("198.51.100.77", 9999, "TCP")
        assert not origin.enrolled
        for address in (OTHER, "127.0.0.10"):
            straight = world.listen(address)
            client = world.connect(address, straight.getsockname()[1])
            assert world.accept(straight).getpeername() == client.getsockname()
        # Datagrams go straight.
        world.know(True, WorkloadSection("x", "far", (OTHER,), node="n2"))
        with (
            socket.socket(type=socket.SOCK_DGRAM) as there,
            socket.socket(type=socket.SOCK_DGRAM) as here,
        ):
            there.bind((OTHER, 0))
            there.settimeout(TIMEOUT_S)
            here.connect(there.getsockname())
            here.send(b"x")
            assert there.recv(1) == b"x"

    world.run(scenario)


def test_who_is_out_of_the_mesh_is_sent_to_no_proxy(world):
    def scenario(world: World) -> None:
        steer(world)
        far = WorkloadSection("x", "far", (OTHER,), node="n2")
        backends = [world.listen(address) for address in (NODE, OTHER)]
        (_, port), (_, far_port) = (one.getsockname() for one in backends)
        world.frontend(VIP, 80, EntryBackend(NODE, port), http=True, sockmap=True)
        world.frontend(VIP, 5432, EntryBackend(NODE, port, remote=True))
        with world.as_proxy():
            proxies = [world.listen(NODE, one) for one in (MESH_HTTP_PORT, MESH_RELAY_PORT)]
        asked = ((VIP, 80), (VIP, 5432), (OTHER, far_port))

        def taken_by(servers: list[socket.socket], *order: int) -> None:
            for (address, number), server in zip(asked, order, strict=True):
                client = world.connect(address, number)
                assert world.accept(servers[server]).getpeername() == client.getsockname()

        world.is_a_pods()
        world.know(True, far)
        taken_by(proxies, 0, 1, 1)
        world.know(False, far, meshed=False)
        taken_by(backends, 0, 0, 1)

    world.run(scenario)


def test_affinity_is_the_kernels_choice_for_the_proxy_too(world):
    def scenario(world: World) -> None:
        steer(world)
        handles = world.handles()
        backends = [EntryBackend(f"198.51.100.{number}", 80) for number in range(10, 20)]
        world.frontend(VIP, 80, *backends, http=True, affinity_s=60)
        with world.as_proxy():
            server = world.listen(NODE, MESH_HTTP_PORT)
        chosen = set()
        for _ in range(10):
            client = world.connect(VIP, 80)
            proxy = world.accept(server)
            origin = handles.origin(proxy.fileno())
            assert origin is not None
            chosen.add(origin.backend)
            client.close()
        assert len(chosen) == 1

    world.run(scenario)


def test_before_a_proxy_has_ever_listened_connections_go_straight(world):
    def scenario(world: World) -> None:
        settings.steer_to_proxy(world.pin, (), sockmap=True)
        backend = world.listen(NODE)
        port = backend.getsockname()[1]
        world.frontend(VIP, 80, EntryBackend(NODE, port), http=True, sockmap=True)
        client = world.connect(VIP, 80)
        client.sendall(b"direct")
        assert received(world.accept(backend), 6) == b"direct"

    world.run(scenario)


def test_affinity_to_nobody_is_the_proxys_to_answer(world):
    """A route may lead to other backends."""

    def scenario(world: World) -> None:
        steer(world)
        handles = world.handles()
        world.frontend(VIP, 80, http=True, affinity_s=60)
        with world.as_proxy():
            server = world.listen(NODE, MESH_HTTP_PORT)
        client = world.connect(VIP, 80)
        proxy = world.accept(server)
        origin = handles.origin(proxy.fileno())
        assert origin is not None
        assert origin.backend is None
        client.close()

    world.run(scenario)


def test_nobody_connects_in_the_name_of_another_address(world):
    """The packets of one who tries are dropped, but it would have announced itself by then."""

    def scenario(world: World) -> None:
        steer(world)
        handles = world.handles()
        world.frontend(VIP, 80, http=True)
        with world.as_proxy():
            server = world.listen(NODE, MESH_HTTP_PORT)
        nobody = bytes(16)
        own, other = (Address.of(one).packed for one in (NODE, "198.51.100.9"))
        with contextlib.closing(
            maps.PinnedMap(world.pin, "namespaces", Number, Addresses)
        ) as namespaces:
            for address, known in ((other, False), (own, True)):
                namespaces.put(Number(netns_cookie()), Addresses(address, nobody))
                client = world.connect(VIP, 80)
                proxy = world.accept(server)
                assert (handles.origin(proxy.fileno()) is not None) == known
                client.close()

    world.run(scenario)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(3, Reason.POLICY_DENIED), (constants.POD_STRICT, Reason.MTLS_REQUIRED)],
    ids=["policies", "identities"],
)
def test_a_pod_that_nobody_has_told_of_reaches_no_proxy_where_there_are(world, flags, reason):
    """The proxy may still know another one that had its address."""

    def scenario(world: World) -> None:
        steer(world)
        handles = world.handles()
        world.frontend(VIP, 80, http=True)
        with world.as_proxy():
            server = world.listen(NODE, MESH_HTTP_PORT)
        pods = maps.PinnedMap(world.pin, "pods", Address, Pod)
        interfaces = maps.PinnedMap(world.pin, "interfaces", Address, Number)
        with contextlib.closing(pods), contextlib.closing(interfaces):
            interfaces.put(Address.of(NODE), Number(1))
            pods.put(Address.of("::"), Pod(0, 0, 0, flags, 0, 0))
            before = world.counted(reason)
            for told in (True, None):
                world.know(told)
                client = world.connect(VIP, 80)
                proxy = world.accept(server)
                assert (handles.origin(proxy.fileno()) is not None) == bool(told)
                client.close()
            assert world.counted(reason) == before + 1
            # Without either it is let in as somebody that is not known.
            pods.remove(Address.of("::"))
            client = world.connect(VIP, 80)
            assert handles.origin(world.accept(server).fileno()) is not None
            interfaces.remove(Address.of(NODE))

    world.run(scenario)
