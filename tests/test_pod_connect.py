"""Policy where a pod's socket names its peer: EPERM, before anything is sent."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import msgspec
import pytest
from bpf_world import needs_bpf
from pod_policies import A_ONLY, KNOWN, SVIDS, VERSIONS, WORLD, allow, only, policy, tcp
from pod_world import NODE, OUT, A, B, PodWorld, pod_world

from bpf import constants, events, layout, maps, settings
from bpf.balancer import Balancer
from bpf.events import SocketEvent
from bpf.reasons import Reason
from bpf.ringbuf import RingBuffer
from bpf.structs import Backend, Number, Target
from mesh.model.nodeconfig import (
    MESH_HTTP_PORT,
    EntryBackend,
    LoadBalancerEntry,
    WorkloadSection,
)
from mesh.model.policyconfig import Direction, PolicyRule

pytestmark = needs_bpf

SERVICE = {4: "10.96.0.1", 6: "fd96::1"}
DENIED = ("EPERM", {"POLICY_DENIED": 1})
ANSWERED = ("answered", {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodWorld]:
    with pod_world(tmp_path_factory.mktemp("connect"), steer=True) as world:
        yield world


@pytest.fixture
def balancer(world: PodWorld) -> Iterator[Balancer]:
    balancer = Balancer(world.pin)
    yield balancer
    balancer.replace({})
    balancer.close()


def packed(address: str, port: int) -> bytes:
    return layout.TARGET.pack(Target.of(address, port, "TCP"))


@contextlib.contextmanager
def told(world: PodWorld) -> Iterator[list[SocketEvent]]:
    """The events of what happens in the block, after it."""
    ring = RingBuffer(maps.open_pinned(world.pin, "events"), constants.EVENT_PAGES * 4096)
    try:
        while ring.read(1000):
            pass
        found: list[SocketEvent] = []
        yield found
        found += map(events.decode, ring.read(1000))
    finally:
        ring.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_the_rules_of_who_connects(world: PodWorld, version: int) -> None:
    world.enforce({**KNOWN, **policy(egress=only(allow(A_ONLY, tcp(7020))))})
    for where, address, port, outcome in (
        ("a", A, 7020, ANSWERED),
        ("a", A, 7021, DENIED),
        ("out", OUT, 7020, DENIED),
        ("node", NODE, 7020, DENIED),
        # Itself, and what never leaves it.
        ("b", B, 7021, ANSWERED),
        ("b", {4: "127.0.0.1", 6: "::1"}, 7021, ANSWERED),
    ):
        with world.listen(where, address[version], port) as server:
            assert world.attempt("b", server) == outcome, (where, port)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_rules_of_the_pod_that_is_connected_to(world: PodWorld, version: int) -> None:
    world.enforce({**KNOWN, **policy("a", ingress=only(allow(WORLD)))})
    with world.listen("a", A[version]) as server:
        assert world.attempt("b", server) == DENIED
        proven = {**KNOWN, **policy("a", ingress=only(allow(authenticated=True)))}
        world.enforce(proven)
        assert world.attempt("b", server) == DENIED
        world.enforce({**proven, **SVIDS})
        assert world.attempt("b", server) == ANSWERED
        proven = {**KNOWN, **policy(egress=only(allow(authenticated=True)))}
        world.enforce(proven)
        assert world.attempt("b", server) == DENIED
        world.enforce({**proven, **SVIDS})
        assert world.attempt("b", server) == ANSWERED


@pytest.mark.parametrize("version", VERSIONS)
def test_a_refusal_is_told_with_its_rule(world: PodWorld, version: int) -> None:
    rule = PolicyRule("NetworkPolicy shop/none egress[3]", WORLD, deny=True)
    world.enforce({**KNOWN, **policy(egress=only(allow(), rule))})
    with world.listen("out", OUT[version]) as server:
        with told(world) as found:
            assert world.attempt("b", server) == DENIED
        [event] = found
        port = server.getsockname()[1]
    assert event.reason == Reason.POLICY_DENIED
    assert event.asked == event.peer == Target.of(OUT[version], port, "TCP")
    assert event.source == Target.of(B[version], 0, "TCP")
    assert world.enforcement.source(event.rule) == rule.source


@pytest.mark.parametrize("version", VERSIONS)
def test_what_comes_plainly_from_elsewhere_is_told_once(world: PodWorld, version: int) -> None:
    world.enforce({**KNOWN, **SVIDS})
    port = 7050
    with world.listen("a", A[version], port) as server, told(world) as found:
        with world.connection("out", server) as (client, accepted):
            for one in (client, accepted):
                one.sendall(b"more")
            source = Target.of(*client.getsockname()[:2], "TCP")
            # Judged anew, but no news.
            world.enforce(KNOWN)
            client.sendall(b"more")
            assert accepted.recv(8, socket.MSG_WAITALL) == b"moremore"
        assert world.attempt("node", server) == ANSWERED
        assert world.attempt("b", server) == ANSWERED
    [event] = [one for one in found if one.reason == Reason.PLAIN]
    assert (event.source, event.peer) == (source, Target.of(A[version], port, "TCP"))
    with (
        told(world) as found,
        world.udp("a", A[version], port) as a,
        world.udp("out", OUT[version], port) as out,
        world.udp("out", OUT[version]) as other,
    ):
        world.pass_on(out, a, b"datagram")
        world.pass_on(out, a, b"datagram")
        # An answer is none.
        world.pass_on(a, other, b"datagram")
    [event] = [one for one in found if one.reason == Reason.PLAIN]
    assert event.source == Target.of(OUT[version], port, "UDP")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_nodes_own_connections_are_told_and_the_proxys_are_not(
    world: PodWorld, version: int
) -> None:
    """A kubelet's probe reaches whom nobody else does."""
    strict = msgspec.structs.replace(KNOWN["workload/shop/a"], mtls="STRICT")
    world.enforce({**KNOWN, "workload/shop/a": strict, **policy("a", ingress=only())})
    with world.listen("a", A[version]) as server, told(world) as found:
        with world.connection("node", server) as (probe, accepted):
            source = Target.of(*probe.getsockname()[:2], "TCP")
            # Judged anew, but no news.
            world.enforce({**KNOWN, **policy("a", ingress=only())})
            probe.sendall(b"more")
            assert accepted.recv(4) == b"more"
        with world.proxying():
            assert world.attempt("node", server) == ANSWERED
        port = server.getsockname()[1]
    [event] = found
    assert (event.reason, event.source) == (Reason.FROM_HOST, source)
    assert event.peer == Target.of(A[version], port, "TCP")


def test_the_nodes_own_connections_keep_nobody_from_hearing_of_others(world: PodWorld) -> None:
    world.enforce({**KNOWN, **SVIDS})
    with (
        told(world) as found,
        world.udp("node", NODE[4]) as node,
        world.udp("out", OUT[4]) as out,
        world.udp("a", A[4]) as a,
    ):
        before = world.counters()[Reason.FROM_HOST]
        for port in range(1, 4 * constants.TOLD_FROM_HOST_MAX):
            with contextlib.suppress(ConnectionRefusedError):
                node.sendto(b"are you well?", (A[4], port))
        assert world.counters()[Reason.FROM_HOST] - before == port
        world.pass_on(out, a, b"plain")
    reasons = [event.reason for event in found]
    assert 1 <= reasons.count(Reason.FROM_HOST) < port
    assert reasons.count(Reason.PLAIN) == 1


def test_what_comes_plainly_keeps_nobody_from_hearing_of_refusals(world: PodWorld) -> None:
    """There are bounds for both."""
    strict = msgspec.structs.replace(KNOWN["workload/shop/b"], mtls="STRICT")
    world.enforce({**KNOWN, "workload/shop/b": strict})
    with told(world) as found, world.udp("out", OUT[4]) as out:
        before = world.counters()
        for port in range(1, constants.TOLD_MAX + 200):
            with contextlib.suppress(ConnectionRefusedError):
                out.sendto(b"to whom?", (A[4], port))
        with contextlib.suppress(ConnectionRefusedError):
            out.sendto(b"refused", (B[4], 9))
        world.await_counted(before, "MTLS_REQUIRED")
    assert [event.reason for event in found].count(Reason.MTLS_REQUIRED) == 1


def test_what_is_audited_is_told_once_and_passes(world: PodWorld) -> None:
    world.enforce({**KNOWN, **policy(egress=Direction(default_deny=True, audit=True))})
    with world.listen("out", OUT[4]) as server, told(world) as found:
        assert world.attempt("b", server) == ("answered", {"POLICY_AUDIT": 1})
    reasons = [event.reason for event in found]
    assert sorted(reasons) == [Reason.PASSED, Reason.POLICY_AUDIT]


@pytest.mark.parametrize("version", VERSIONS)
def test_datagrams_to_a_service(world: PodWorld, balancer: Balancer, version: int) -> None:
    world.enforce({**KNOWN, **policy(egress=only(allow(A_ONLY)))})
    with (
        world.udp("a", A[version]) as a,
        world.udp("out", OUT[version]) as out,
        world.udp("b", B[version]) as b,
    ):
        for number, (address, server) in enumerate(((A, a), (OUT, out))):
            backend = EntryBackend(address[version], server.getsockname()[1])
            entry = LoadBalancerEntry(
                SERVICE[version], 80 + number, "UDP", (backend,), "Service/shop/x"
            )
            assert balancer.apply({f"entry/{number}": entry}) == {}
        b.sendto(b"allowed", (SERVICE[version], 80))
        assert a.recv(100) == b"allowed"
        with pytest.raises(PermissionError):
            b.sendto(b"refused", (SERVICE[version], 81))
        with pytest.raises(PermissionError):
            b.connect((SERVICE[version], 81))
        # An IPv6 socket that speaks IPv4.
        if version == 4:
            with world.udp("b", "::") as mapped, pytest.raises(PermissionError):
                mapped.sendto(b"refused", (f"::ffff:{SERVICE[4]}", 81))


@pytest.mark.parametrize("version", VERSIONS)
def test_answers_are_datagrams_that_policy_does_not_ask_about(
    world: PodWorld, version: int
) -> None:
    """Servers send them by sendto(2), like what opens a conversation; only the filter can tell."""
    world.enforce({**KNOWN, **policy(egress=only()), **policy("a", ingress=only())})
    with (
        world.udp("a", A[version]) as a,
        world.udp("out", OUT[version]) as out,
        world.udp("b", B[version]) as b,
    ):
        for client in (a, out):
            world.pass_on(client, b, b"asked")
            before = world.counters()
            b.sendto(b"not asked", (client.getsockname()[0], 9))
            world.await_counted(before, "POLICY_DENIED")


@pytest.mark.parametrize("affinity_s", [None, 60])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_backend_that_policy_lets_be_reached_is_found(
    world: PodWorld, balancer: Balancer, version: int, affinity_s: int | None
) -> None:
    """If there is one among hundreds, it always is."""
    world.enforce({**KNOWN, **policy(egress=only(allow(A_ONLY)))})
    with (
        world.listen("a", A[version]) as a,
        world.listen("out", OUT[version], a.getsockname()[1]) as out,
    ):
        port = a.getsockname()[1]
        backends = tuple(
            EntryBackend(*one)
            for one in ((A[version], port), *((OUT[version], n) for n in range(port, port + 299)))
        )
        entry = LoadBalancerEntry(
            SERVICE[version], 80, "TCP", backends, "Service/shop/x", affinity_s=affinity_s
        )
        assert balancer.apply({"entry": entry}) == {}
        for _ in range(50):
            world.connect_to("b", SERVICE[version], 80).close()
            a.accept()[0].close()
        # None of them: the reason is policy's.
        world.enforce({**KNOWN, **policy(egress=only())})
        with pytest.raises(PermissionError):
            world.connect_to("b", SERVICE[version], 80)
        out.setblocking(False)
        with pytest.raises(BlockingIOError):
            out.accept()


def test_an_ipv4_socket_is_given_no_ipv6_backend(world: PodWorld, balancer: Balancer) -> None:
    """Nor as the other backend that is tried because policy refuses the first."""
    world.enforce({**KNOWN, **policy(egress=only(allow(A_ONLY)))})
    backends = (EntryBackend(OUT[4], 80), EntryBackend(A[4], 80))
    entry = LoadBalancerEntry(SERVICE[4], 80, "TCP", backends, "Service/shop/x")
    assert balancer.apply({"entry": entry}) == {}
    # The balancer takes no such backend.
    found = maps.PinnedMap(world.pin, "backends", Number, Backend)
    for index, backend in list(found.items()):
        if backend.target == packed(A[4], 80):
            found.put(index, backend._replace(target=packed(A[6], 80)))
    found.close()
    for _ in range(8):
        before = world.counters()
        with pytest.raises(ConnectionRefusedError):
            world.connect_to("b", SERVICE[4], 80)
        assert world.counted(before) == {"WRONG_FAMILY": 1}


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_goes_plainly_because_the_relay_does_not_listen(
    world: PodWorld, balancer: Balancer, version: int
) -> None:
    """To a pod of another node; what is plain by rule is so without a relay."""
    far = WorkloadSection(
        "shop", "far", (OUT[version],), node="n2", spiffe_id="spiffe://cluster.local/ns/x/sa/far"
    )
    disabled = msgspec.structs.replace(far, mtls="DISABLE")
    strict = msgspec.structs.replace(disabled, mtls_ports={7030: "STRICT"}, spiffe_id="")
    apart = msgspec.structs.replace(KNOWN["workload/shop/b"], meshed=False)
    required = ("EPERM", {"MTLS_REQUIRED": 1})
    with world.listen("out", OUT[version]) as server:
        port = server.getsockname()[1]
        backend = EntryBackend(OUT[version], port, remote=True)
        entry = LoadBalancerEntry(SERVICE[version], 80, "TCP", (backend,), "Service/shop/x")
        assert balancer.apply({"entry": entry}) == {}
        settings.steer_to_proxy(world.pin, [], sockmap=False, mtls=True)
        try:
            for pod, outcome in (
                ({"workload/shop/far": far}, required),
                ({"workload/shop/far": strict}, required),
                ({"workload/shop/far": disabled}, ANSWERED),
                ({"workload/shop/far": far, "workload/shop/b": apart}, ANSWERED),
                ({}, ANSWERED),
            ):
                world.enforce({**KNOWN, **pod})
                assert world.attempt("b", server) == outcome, pod
                if outcome == required:
                    with pytest.raises(PermissionError):
                        world.connect_to("b", SERVICE[version], 80)
                else:
                    world.connect_to("b", SERVICE[version], 80).close()
                    server.accept()[0].close()
            # Of several backends those of this node are tried too: eight, as above.
            world.enforce({**KNOWN, "workload/shop/far": far})
            with world.listen("a", A[version], port) as near:
                backends = (backend, EntryBackend(A[version], port))
                assert (
                    balancer.apply({"entry": msgspec.structs.replace(entry, backends=backends)})
                    == {}
                )
                reached = 0
                for _ in range(20):
                    with contextlib.suppress(PermissionError):
                        world.connect_to("b", SERVICE[version], 80).close()
                        near.accept()[0].close()
                        reached += 1
                assert reached > 12
            # Nobody gives the node identities.
            settings.steer_to_proxy(world.pin, [], sockmap=False)
            world.enforce({**KNOWN, "workload/shop/far": far})
            assert world.attempt("b", server) == ANSWERED
        finally:
            settings.steer_to_proxy(world.pin, [], sockmap=False)


def test_what_goes_to_the_proxy_is_judged_there(world: PodWorld, balancer: Balancer) -> None:
    world.enforce({**KNOWN, **policy(egress=only())})
    with world.listen("node", NODE[4], MESH_HTTP_PORT) as proxy:
        entry = LoadBalancerEntry(
            SERVICE[4], 80, "TCP", (EntryBackend(OUT[4], 80),), "Service/shop/x", http=True
        )
        assert balancer.apply({"entry": entry}) == {}
        settings.steer_to_proxy(world.pin, [(NODE[4], MESH_HTTP_PORT)], sockmap=False)
        try:
            with world.connect_to("b", SERVICE[4], 80) as client, proxy.accept()[0] as accepted:
                accepted.sendall(b"answer")
                assert client.recv(6) == b"answer"
        finally:
            settings.steer_to_proxy(world.pin, [], sockmap=False)
        # Before there is one, nothing is let past it.
        with pytest.raises(PermissionError):
            world.connect_to("b", SERVICE[4], 80)
