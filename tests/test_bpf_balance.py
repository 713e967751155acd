"""Socket-level load balancing by real programs: a process in a steered cgroup connects."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from bpf_world import Actor, loader, needs_bpf, new_actor, new_cgroup, steered

from bpf import constants, layout, maps
from bpf.balancer import Balancer
from bpf.reasons import Reason
from bpf.structs import Affinity, AffinityKey, Member, Number, Origin, OriginKey, Target
from mesh.model.nodeconfig import EntryBackend, LoadBalancerEntry
from mesh.model.section import entry_key

pytestmark = needs_bpf

# Nothing routes there: a connection that is not steered fails with ENETUNREACH.
V4, V6, MAPPED = "10.96.0.10", "fd96::10", "::ffff:10.96.0.10"
PORT = 80
LOOPBACK = {V4: "127.0.0.1", V6: "::1"}


class World(NamedTuple):
    pin: Path
    cgroup: Path
    actor: Actor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with steered(tmp_path_factory.mktemp("bpf")) as made:
        yield World(*made)


@pytest.fixture
def balancer(world: World) -> Iterator[Balancer]:
    made = Balancer(world.pin)
    yield made
    assert made.replace({}) == {}
    made.close()


@pytest.fixture
def counted(world: World):
    """The reasons counted since the last call, those that were not left out."""
    before = maps.counters(world.pin)

    def since() -> dict[Reason, int]:
        now = maps.counters(world.pin)
        return {
            reason: now[reason] - before[reason]
            for reason in Reason
            if now[reason] != before[reason]
        }

    return since


def entry(
    frontend: str,
    backends: dict[int, int],
    protocol: str = "TCP",
    port: int = PORT,
    affinity_s: int | None = None,
) -> dict[str, LoadBalancerEntry]:
    """Loopback backends of the frontend's family: port -> weight."""
    address = LOOPBACK[frontend]
    made = tuple(EntryBackend(address, backend, weight) for backend, weight in backends.items())
    value = LoadBalancerEntry(frontend, port, protocol, made, "Service/x/y", affinity_s)
    return {entry_key(frontend, port, protocol): value}


@pytest.mark.parametrize(("frontend", "asked"), [(V4, V4), (V6, V6), (V4, MAPPED)])
def test_a_connection_reaches_a_backend_and_believes_in_its_frontend(
    world, balancer, counted, frontend, asked
):
    port = world.actor("serve_tcp", LOOPBACK[frontend], "one")
    assert balancer.apply(entry(frontend, {port: 1})) == {}
    assert world.actor("connect", asked, PORT) == {"name": "one", "peer": [asked, PORT]}
    assert counted() == {Reason.BALANCED: 1, Reason.ANSWERED: 1}


@pytest.mark.parametrize(("frontend", "asked"), [(V4, V4), (V6, V6), (V4, MAPPED)])
def test_datagrams_stay_with_one_backend_and_answers_come_from_the_frontend(
    world, balancer, counted, frontend, asked
):
    ports = {world.actor("serve_udp", LOOPBACK[frontend], name): 1 for name in ("a", "b", "c")}
    assert balancer.apply(entry(frontend, ports, "UDP")) == {}
    answers = world.actor("udp", asked, PORT, 5)
    name = answers[0][0]
    assert name in ("a", "b", "c")
    assert answers == [[name, asked, PORT]] * 5
    # The backend answers with sendto as well, which is no frontend.
    assert counted() == {Reason.BALANCED: 5, Reason.ANSWERED: 5, Reason.PASSED: 5}


@pytest.mark.parametrize(("frontend", "asked"), [(V4, V4), (V6, V6), (V4, MAPPED)])
def test_a_connected_datagram_socket_believes_in_its_frontend(world, balancer, frontend, asked):
    port = world.actor("serve_udp", LOOPBACK[frontend], "one")
    assert balancer.apply(entry(frontend, {port: 1}, "UDP")) == {}
    assert world.actor("udp_connected", asked, PORT) == ["one", [asked, PORT], [asked, PORT]]


@pytest.mark.parametrize("frontend", [V4, V6])
def test_a_socket_connected_anew_believes_in_its_new_peer(world, balancer, frontend):
    backend = LOOPBACK[frontend], world.actor("serve_udp", LOOPBACK[frontend], "one")
    balancer.apply(entry(frontend, {backend[1]: 1}, "UDP"))
    peers = world.actor("udp_connected_anew", frontend, PORT, *backend)
    assert peers == [[frontend, PORT], list(backend)]


@pytest.mark.parametrize("frontend", [V4, V6])
def test_what_datagrams_asked_for_is_not_pushed_out_by_other_sockets(world, balancer, frontend):
    """The last of each socket are kept with it."""
    asked = [[frontend, PORT + number] for number in range(constants.ASKED_LATELY + 1)]
    for _, port in asked:
        backend = world.actor("serve_udp", LOOPBACK[frontend], str(port))
        assert balancer.apply(entry(frontend, {backend: 1}, "UDP", port)) == {}
    number = world.actor("udp_ask", asked * 2)
    answers = sorted([str(port), address, port] for address, port in asked)
    assert sorted(world.actor("udp_hear", number, len(asked) * 2)) == sorted(answers * 2)
    with contextlib.closing(maps.PinnedMap(world.pin, "origins", OriginKey, Origin)) as origins:
        world.actor("udp_ask", asked, number)
        for key, _ in list(origins.items()):
            origins.remove(key)
    told = sorted(world.actor("udp_hear", number, len(asked)))
    assert [one for one in told if one in answers] == [one for one in told if one[1] == frontend]
    # One has gone: it was asked for first.
    assert len([one for one in told if one in answers]) == constants.ASKED_LATELY
    assert [LOOPBACK[frontend]] == [one[1] for one in told if one not in answers]
    world.actor("close", number)


@pytest.mark.parametrize("frontend", [V4, V6])
def test_what_a_connection_asked_for_is_not_pushed_out_by_others(world, balancer, frontend):
    port = world.actor("serve_tcp", LOOPBACK[frontend], "one")
    assert balancer.apply(entry(frontend, {port: 1})) == {}
    number = world.actor("connect", frontend, PORT, True)["id"]
    origins = maps.PinnedMap(world.pin, "origins", OriginKey, Origin)
    with contextlib.closing(origins):
        found = list(origins.items())
        assert found
        for key, _ in found:
            origins.remove(key)
    assert world.actor("echo", number, "more") == ["more", [frontend, PORT]]
    world.actor("close", number)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_what_is_no_frontend_passes(world, balancer, counted, address):
    port = world.actor("serve_tcp", address, "direct")
    assert world.actor("connect", address, port) == {"name": "direct", "peer": [address, port]}
    assert counted() == {Reason.PASSED: 1}


def test_port_and_protocol_are_part_of_a_frontend(world, balancer):
    port = world.actor("serve_tcp", "127.0.0.1", "one")
    assert balancer.apply(entry(V4, {port: 1})) == {}
    assert world.actor("connect", V4, PORT + 1) == {"errno": "ENETUNREACH"}
    assert world.actor("udp", V4, PORT, 1) == {"errno": "ENETUNREACH"}


@pytest.mark.parametrize("asked", [V4, V6, MAPPED])
@pytest.mark.parametrize("weights", [{}, {9: 0}])
def test_a_frontend_without_backends_refuses(world, balancer, counted, asked, weights):
    for protocol in ("TCP", "UDP"):
        for frontend in (V4, V6):
            assert balancer.apply(entry(frontend, weights, protocol)) == {}
    assert world.actor("connect", asked, PORT) == {"errno": "ECONNREFUSED"}
    assert world.actor("udp", asked, PORT, 1) == {"errno": "ECONNREFUSED"}
    assert counted() == {Reason.NO_BACKENDS: 2}


def test_connections_are_shared_by_weight(world, balancer):
    heavy, light = (world.actor("serve_tcp", "127.0.0.1", name) for name in ("heavy", "light"))
    assert balancer.apply(entry(V4, {heavy: 3, light: 1})) == {}
    names = world.actor("connect_often", V4, PORT, 800)
    # 200 expected, with a standard deviation of 12.
    assert names["heavy"] + names["light"] == 800
    assert 130 < names["light"] < 270


def test_connections_stay_and_new_ones_follow(world, balancer):
    old, new = (world.actor("serve_tcp", "127.0.0.1", name) for name in ("old", "new"))
    balancer.apply(entry(V4, {old: 1}))
    kept = world.actor("connect", V4, PORT, True)
    balancer.apply(entry(V4, {new: 1}))
    assert world.actor("connect_often", V4, PORT, 50) == {"new": 50}
    assert world.actor("echo", kept["id"], "hello") == ["hello", [V4, PORT]]
    balancer.apply({}, [entry_key(V4, PORT, "TCP")])
    assert world.actor("connect", V4, PORT) == {"errno": "ENETUNREACH"}
    assert world.actor("echo", kept["id"], "still") == ["still", [V4, PORT]]
    world.actor("close", kept["id"])


def test_no_connection_sees_a_change_halfway(world, balancer, counted):
    ports = [world.actor("serve_tcp", "127.0.0.1", name) for name in ("a", "b")]
    balancer.apply(entry(V4, {ports[0]: 1}))
    world.actor.start("connect_often", V4, PORT, 1500)
    changes = 0
    while world.actor.busy():
        changes += 1
        balancer.apply(entry(V4, {ports[changes % 2]: 1}))
    names = world.actor.result()
    assert set(names) == {"a", "b"}
    assert counted() == {Reason.BALANCED: 1500}


def test_it_works_on_without_us_and_is_adopted(world, balancer):
    kept, gone = (world.actor("serve_tcp", "127.0.0.1", name) for name in ("kept", "gone"))
    balancer.apply(entry(V4, {kept: 1}) | entry(V4, {gone: 1}, port=81))
    # A second one stands for the agent after a restart: it knows only what the maps say.
    restarted = Balancer(world.pin)
    try:
        assert world.actor("connect", V4, 81)["name"] == "gone"
        refused = restarted.replace(entry(V4, {kept: 1, gone: 1}))
        assert refused == {}
        assert world.actor("connect", V4, 81) == {"errno": "ENETUNREACH"}
        assert set(world.actor("connect_often", V4, PORT, 60)) == {"kept", "gone"}
    finally:
        assert restarted.replace({}) == {}
        restarted.close()


def test_programs_are_replaced_under_traffic(world, balancer, counted):
    port = world.actor("serve_tcp", "127.0.0.1", "one")
    balancer.apply(entry(V4, {port: 1}))
    world.actor.start("connect_often", V4, PORT, 2000)
    done = loader("--pin", world.pin, "--cgroup", world.cgroup)
    assert (done.returncode, done.stderr) == (0, "")
    assert world.actor.result() == {"one": 2000}
    assert counted() == {Reason.BALANCED: 2000}


@pytest.mark.parametrize(("frontend", "asked"), [(V4, V4), (V6, V6), (V4, MAPPED)])
def test_a_client_keeps_its_backend(world, balancer, frontend, asked):
    ports = {world.actor("serve_tcp", LOOPBACK[frontend], name): 1 for name in ("a", "b", "c")}
    balancer.apply(entry(frontend, ports, affinity_s=1000))
    first = world.actor("connect_often", asked, PORT, 40)
    assert len(first) == 1
    # More weight elsewhere moves nobody who is settled.
    mine = list(ports)["abc".index(*first)]
    heavy = {port: 1 if port == mine else 1000 for port in ports}
    balancer.apply(entry(frontend, heavy, affinity_s=1000))
    assert world.actor("connect_often", asked, PORT, 40) == first
    # The agent's restart neither.
    balancer.replace(entry(frontend, heavy, affinity_s=1000))
    restarted = Balancer(world.pin)
    restarted.replace(entry(frontend, ports, affinity_s=1000))
    restarted.close()
    assert world.actor("connect_often", asked, PORT, 40) == first


def test_a_backend_that_goes_or_has_no_weight_keeps_nobody(world, balancer):
    ports = [world.actor("serve_tcp", "127.0.0.1", name) for name in ("a", "b")]
    for weights in ({ports[0]: 0, ports[1]: 1}, {ports[1]: 1}, {}):
        balancer.apply(entry(V4, {ports[0]: 1}, affinity_s=1000))
        assert world.actor("connect_often", V4, PORT, 3) == {"a": 3}
        balancer.apply(entry(V4, weights, affinity_s=1000))
        expected = {"b": 3} if weights else {"ECONNREFUSED": 3}
        assert world.actor("connect_often", V4, PORT, 3) == expected
    balancer.replace({})
    with members(world.pin) as table:
        assert list(table.items()) == []


def test_affinity_ends(world, balancer):
    """Not by waiting: the time of the client's last connection is put back."""
    old, new = (world.actor("serve_tcp", "127.0.0.1", name) for name in ("old", "new"))
    balancer.apply(entry(V4, {old: 1}, affinity_s=60))
    assert world.actor("connect", V4, PORT)["name"] == "old"
    balancer.apply(entry(V4, {old: 1, new: 10_000}, affinity_s=60))
    table = maps.PinnedMap(world.pin, "affinities", AffinityKey, Affinity)
    frontend = layout.TARGET.pack(Target.of(V4, PORT, "TCP"))
    [(key, last)] = [item for item in table.items() if item[0].frontend == frontend]
    table.put(key, last._replace(used_ns=last.used_ns - 50 * 10**9))
    assert world.actor("connect", V4, PORT)["name"] == "old"
    [renewed] = [value for found, value in table.items() if found == key]
    assert renewed.used_ns > last.used_ns
    table.put(key, renewed._replace(used_ns=renewed.used_ns - 61 * 10**9))
    assert world.actor("connect_often", V4, PORT, 20) == {"new": 20}
    table.close()


def test_another_pod_is_another_client(world, balancer):
    """Two network namespaces with backends of the same addresses."""
    ports = [world.actor("serve_tcp", "127.0.0.1", name) for name in ("a", "b")]
    with new_actor(world.cgroup) as other:
        balancer.apply(entry(V4, {ports[0]: 1}, affinity_s=1000))
        assert world.actor("connect", V4, PORT)["name"] == "a"
        port = other("serve_tcp", "127.0.0.1", "theirs")
        balancer.apply(entry(V4, {ports[0]: 1, port: 10_000}, affinity_s=1000))
        assert other("connect_often", V4, PORT, 20) == {"theirs": 20}
        assert world.actor("connect_often", V4, PORT, 20) == {"a": 20}


def test_members_left_by_a_process_that_ended_are_forgotten(world, balancer):
    gone, there = (world.actor("serve_tcp", "127.0.0.1", name) for name in ("gone", "there"))
    balancer.apply(entry(V4, {gone: 1}, affinity_s=1000))
    assert world.actor("connect", V4, PORT)["name"] == "gone"
    with members(world.pin) as table:
        [(left, one)] = table.items()
        balancer.apply(entry(V4, {there: 1}, affinity_s=1000))
        table.put(left, one)
        assert world.actor("connect", V4, PORT)["name"] == "gone"
        Balancer(world.pin).close()
        assert left not in dict(table.items())
    assert world.actor("connect", V4, PORT)["name"] == "there"


def members(pin: Path) -> contextlib.closing[maps.PinnedMap[Member, Number]]:
    return contextlib.closing(maps.PinnedMap(pin, "members", Member, Number))


def test_only_the_cgroup_is_steered(world, balancer):
    port = world.actor("serve_tcp", "127.0.0.1", "one")
    balancer.apply(entry(V4, {port: 1}))
    with new_cgroup() as other, new_actor(other) as outsider:
        assert outsider("connect", V4, PORT) == {"errno": "ENETUNREACH"}


def test_programs_move_to_another_cgroup(world, balancer):
    port = world.actor("serve_tcp", "127.0.0.1", "one")
    balancer.apply(entry(V4, {port: 1}))
    try:
        with new_cgroup() as other:
            assert loader("--pin", world.pin, "--cgroup", other).returncode == 0
            with new_actor(other) as moved:
                port = moved("serve_tcp", "127.0.0.1", "moved")
                balancer.apply(entry(V4, {port: 1}))
                assert moved("connect", V4, PORT)["name"] == "moved"
            assert world.actor("connect", V4, PORT) == {"errno": "ENETUNREACH"}
    finally:
        # The links of a cgroup that is gone are replaced too.
        assert loader("--pin", world.pin, "--cgroup", world.cgroup).returncode == 0
