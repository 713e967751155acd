"""L3 and L4 policy at pods' interfaces: who passes, by which rule, and what becomes of open
connections when that changes."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from bpf_world import needs_bpf
from pod_policies import (
    A_ONLY,
    ID,
    KNOWN,
    NOTHING,
    SVIDS,
    VERSIONS,
    WORLD,
    allow,
    only,
    policy,
    tcp,
)
from pod_world import LINK, NODE, OUT, PODS, A, B, PodWorld, arrived, checksum, pod_world

from bpf import constants, rulesets, settings
from bpf.enforcement import Enforcement
from bpf.maps import PinnedMap
from bpf.reasons import Reason
from bpf.structs import Address, Identity, Number, Pod, Policy, PolicyKey, Prefix
from mesh.lab.cni import GATEWAYS
from mesh.model.identity import FIRST_CIDR, Reserved
from mesh.model.nodeconfig import WorkloadSection
from mesh.model.policyconfig import CidrSection, Direction, PolicyRule, PolicySection, PortRange

pytestmark = needs_bpf

DENIED = ("ECONNREFUSED", {"POLICY_DENIED": 1, "RESET": 1})
ANSWERED = ("answered", {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodWorld]:
    with pod_world(tmp_path_factory.mktemp("policy")) as world:
        yield world


# Of what may reach b, who does: the other pod, somebody elsewhere.
_INGRESS = {
    "no policy": (Direction(), True, True),
    "nobody": (only(), False, False),
    "everybody": (only(allow()), True, True),
    "a pod": (only(allow(A_ONLY)), True, False),
    "the world": (only(allow(WORLD)), False, True),
    "deny alone": (Direction(rules=(allow(WORLD, deny=True),)), True, False),
    "deny above allow": (only(allow(), allow(A_ONLY, deny=True)), False, True),
    "deny everybody above allow": (only(allow(A_ONLY), allow(deny=True)), False, False),
    "by mutual TLS or here": (only(allow(authenticated=True)), True, False),
    "unproven": (only(allow(authenticated=True)), False, False),
    "only requests": (only(PolicyRule("x", None, (), http=())), False, False),
    "audit": (Direction(default_deny=True, audit=True), True, True),
    "deny above an audited default": (
        Direction(default_deny=True, audit=True, rules=(allow(A_ONLY, deny=True),)), False, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", _INGRESS)
def test_ingress(world: PodWorld, case: str, version: int) -> None:
    ingress, pod, elsewhere = _INGRESS[case]
    svids = {} if case == "unproven" else SVIDS
    world.enforce({**KNOWN, **svids, **policy(ingress=ingress)})
    told = ("answered", {"POLICY_AUDIT": 1}) if ingress.audit else ANSWERED
    with world.listen("b", B[version]) as server:
        assert world.attempt("a", server) == (told if pod else DENIED)
        assert world.attempt("out", server) == (told if elsewhere else DENIED)
        # The node itself, its probes and proxies, always.
        assert world.attempt("node", server) == ANSWERED
    # What b opens is answered whatever may reach it.
    with world.listen("out", OUT[version]) as server:
        assert world.attempt("b", server) == ANSWERED


_EGRESS = {
    "nowhere": (only(), False, False, False),
    "a pod": (only(allow(A_ONLY)), True, False, False),
    "the world": (only(allow(WORLD)), False, True, False),
    "the node": (only(allow(frozenset({Reserved.HOST}))), False, False, True),
    "deny the world": (Direction(rules=(allow(WORLD, deny=True),)), True, False, True),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", _EGRESS)
def test_egress(world: PodWorld, case: str, version: int) -> None:
    egress, pod, elsewhere, node = _EGRESS[case]
    world.enforce({**KNOWN, **policy(egress=egress)})
    for where, address, allowed in (
        ("a", A, pod),
        ("out", OUT, elsewhere),
        ("node", NODE, node),
        # As it is known on the pod's link.
        *([("node", {4: GATEWAYS[0]}, node)] if version == 4 else []),
    ):
        with world.listen(where, address[version]) as server:
            assert world.attempt("b", server) == (ANSWERED if allowed else DENIED), where
    # Answers are no connections of b's own, to the node's probes either.
    with world.listen("b", B[version]) as server:
        for where in ("a", "out", "node"):
            assert world.attempt(where, server) == ANSWERED, where


@pytest.mark.parametrize(
    ("ports", "allowed"),
    [
        ((tcp(7001),), {7001}),
        ((tcp(7001, 7002),), {7001, 7002}),
        ((PortRange("UDP"),), set()),
        ((PortRange("ANY", 7002, 65535),), {7002, 7003}),
        ((), {7001, 7002, 7003}),
    ],
)
def test_ports(world: PodWorld, ports: tuple[PortRange, ...], allowed: set[int]) -> None:
    world.enforce({**KNOWN, **policy(ingress=only(allow(A_ONLY, *ports)))})
    for port in (7001, 7002, 7003):
        with world.listen("b", B[4], port) as server:
            assert world.attempt("a", server) == (ANSWERED if port in allowed else DENIED), port


# Addresses elsewhere, in ranges within one another.
_RANGES = {
    4: ("172.16.0.0/12", "172.16.5.0/24", "172.16.5.7/32"),
    6: ("fd16::/16", "fd16:5::/32", "fd16:5::7/128"),
}
_WITHIN = {
    4: ("172.20.0.1", "172.16.5.1", "172.16.5.7"),
    6: ("fd16:1::1", "fd16:5::1", "fd16:5::7"),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_smallest_range_is_who_an_address_is(world: PodWorld, version: int) -> None:
    numbers = [FIRST_CIDR + place for place in range(3)]
    ranges = {
        f"cidr/{cidr}": CidrSection(cidr, number)
        for cidr, number in zip(_RANGES[version], numbers, strict=True)
    }
    for address in _WITHIN[version]:
        world.add_address("out", address)
    # All of the widest, but for the range in it, of which one address is allowed again.
    ingress = only(allow(frozenset({numbers[0], numbers[2]})))
    with world.listen("b", B[version]) as server:
        world.enforce({**KNOWN, **ranges, **policy(ingress=ingress)})
        outcomes = [world.attempt("out", server, address) for address in _WITHIN[version]]
        assert outcomes == [ANSWERED, DENIED, ANSWERED]
        assert world.attempt("out", server) == DENIED
        # Without the smallest range, its address is of the next one; so it is if only other nodes'
        # policies name it.
        smallest = f"cidr/{_RANGES[version][2]}"
        elsewhere = {smallest: msgspec.structs.replace(ranges[smallest], here=False)}
        assert world.enforcement.apply(elsewhere) == {}
        assert world.attempt("out", server, _WITHIN[version][2]) == DENIED
        del ranges[smallest]
        world.enforce({**KNOWN, **ranges, **policy(ingress=ingress)})
        assert world.attempt("out", server, _WITHIN[version][2]) == DENIED
        world.enforce({**KNOWN, **ranges, **elsewhere, **policy(ingress=ingress)})
        assert world.attempt("out", server, _WITHIN[version][2]) == DENIED


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_is_no_part_of_a_range(world: PodWorld, version: int) -> None:
    everything = CidrSection("::/0" if version == 6 else "0.0.0.0/0", FIRST_CIDR)
    ingress = only(allow(frozenset({FIRST_CIDR})))
    world.enforce({**KNOWN, "cidr/all": everything, **policy(ingress=ingress)})
    with world.listen("b", B[version]) as server:
        assert world.attempt("out", server) == ANSWERED
        assert world.attempt("a", server) == DENIED
    # "::/0" is not about IPv4.
    other = 10 - version
    with world.listen("b", B[other]) as server:
        assert world.attempt("out", server) == DENIED


@pytest.mark.parametrize("version", VERSIONS)
def test_a_new_pod_of_another_node_is_not_of_the_world(world: PodWorld, version: int) -> None:
    """As long as nobody has told of it, in the range of that node's pods. What unknown pods of this
    node may do is not asked for it."""
    pods_of_node, around = _RANGES[version][1], _RANGES[version][0]
    sections = {
        f"cidr/{around}": CidrSection(around, FIRST_CIDR),
        f"cidr/{pods_of_node}": CidrSection(pods_of_node, Reserved.INIT),
        "policy//": PolicySection("", "", Reserved.INIT, ("::",), only(), only()),
    }
    new = _WITHIN[version][1]
    world.add_address("out", new)
    inward, outward = only(allow(frozenset({FIRST_CIDR, *WORLD}))), Direction(rules=(allow(),))
    world.enforce({**KNOWN, **sections, **policy(ingress=inward, egress=outward)})
    with world.listen("b", B[version]) as server, world.listen("out", new) as elsewhere:
        assert world.attempt("out", server, new) == DENIED
        assert world.attempt("b", elsewhere) == ANSWERED
        told = WorkloadSection("shop", "new", (new,), "n2", identity=302)
        allowed = only(allow(frozenset({302})))
        world.enforce({**KNOWN, **sections, "workload/shop/new": told, **policy(ingress=allowed)})
        assert world.attempt("out", server, new) == ANSWERED


@pytest.mark.parametrize("version", VERSIONS)
def test_datagrams(world: PodWorld, version: int) -> None:
    with (
        world.udp("b", B[version], 7010) as server,
        world.udp("b", B[version], 7011) as other,
        world.udp("a", A[version]) as a,
        world.udp("out", OUT[version]) as out,
    ):
        world.enforce(
            {**KNOWN, **policy(ingress=only(allow(A_ONLY, PortRange("UDP", 7010, 7010))))}
        )
        world.pass_on(a, server, b"allowed")
        for sender, refuser in ((a, other), (out, server)):
            before = world.counters()
            sender.sendto(b"refused", refuser.getsockname()[:2])
            world.await_counted(before, "POLICY_DENIED")
        # What b sends elsewhere itself is answered.
        world.pass_on(other, out, b"asked")
        # A conversation that is refused from now on is so both ways, until it is allowed again.
        world.enforce({**KNOWN, **policy(ingress=only())})
        before = world.counters()
        a.sendto(b"refused", server.getsockname()[:2])
        world.await_counted(before, "POLICY_DENIED")
        server.sendto(b"no answer either", a.getsockname()[:2])
        world.enforce({**KNOWN, **policy(ingress=only(allow()))})
        world.pass_on(a, server, b"again")
        assert not any(map(arrived, (server, other, a, out)))


@pytest.mark.parametrize("version", VERSIONS)
def test_open_connections_are_judged_by_the_policy_of_now(world: PodWorld, version: int) -> None:
    world.enforce({**KNOWN})
    with (
        world.listen("b", B[version]) as server,
        world.connection("out", server) as (refused, at_refused),
        world.connection("a", server) as (stays, at_stays),
    ):
        world.enforce({**KNOWN, **policy(ingress=only(allow(A_ONLY)))})
        # Either end: both are told at once that it has ended.
        refused.sendall(b"too late")
        with pytest.raises(ConnectionResetError):
            refused.recv(1)
        at_refused.sendall(b"too late as well")
        with pytest.raises(ConnectionResetError):
            at_refused.recv(1)
        stays.sendall(b"still allowed")
        assert at_stays.recv(100) == b"still allowed"
        at_stays.sendall(b"both ways")
        assert stays.recv(100) == b"both ways"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_policy_finds_out_who_had_opened_a_connection(world: PodWorld, version: int) -> None:
    """Connections that b had opened before nothing may reach it go on, and so do those opened to it
    when it may reach nothing."""
    world.enforce({**KNOWN})
    with (
        world.listen("b", B[version]) as server,
        world.listen("out", OUT[version]) as elsewhere,
        world.connection("out", server) as (inward, at_b),
        world.connection("b", elsewhere) as (outward, at_out),
    ):
        for section, near, far in (
            (policy(ingress=only()), at_out, outward),
            (policy(egress=only()), inward, at_b),
        ):
            world.enforce({**KNOWN, **section})
            for sender, receiver in ((near, far), (far, near)):
                sender.sendall(b"on and on")
                assert receiver.recv(100) == b"on and on"
        outward.sendall(b"refused")
        with pytest.raises(ConnectionResetError):
            outward.recv(1)


def test_a_change_of_who_somebody_is_reaches_open_connections(world: PodWorld) -> None:
    allowed = policy(ingress=only(allow(A_ONLY)))
    world.enforce({**KNOWN, **allowed})
    with (
        world.listen("b", B[4]) as server,
        world.connection("a", server) as (client, accepted),
    ):
        client.sendall(b"as a")
        assert accepted.recv(100) == b"as a"
        # Its labels have changed.
        known = KNOWN["workload/shop/a"]
        other = WorkloadSection("shop", "a", known.addresses, "n1", local=True, identity=302)
        world.enforce({**KNOWN, **allowed, "workload/shop/a": other})
        client.sendall(b"as somebody else")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert not arrived(accepted)


def test_a_connection_that_has_no_flow_is_judged_by_its_packets(world: PodWorld) -> None:
    """What was open before anything was tracked, or was forgotten, opens no way back."""
    world.enforce({**KNOWN})
    with (
        world.listen("b", B[4]) as server,
        world.connection("out", server) as (client, accepted),
    ):
        world.forget_flows()
        client.sendall(b"allowed")
        assert accepted.recv(100) == b"allowed"
        accepted.sendall(b"allowed too")
        assert client.recv(100) == b"allowed too"
        world.enforce({**KNOWN, **policy(ingress=only())})
        # b may send, and nothing may come to b for it.
        accepted.sendall(b"not acknowledged")
        assert client.recv(100) == b"not acknowledged"
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_policy_that_is_too_large_refuses_everything_to_its_pod_alone(world: PodWorld) -> None:
    huge = frozenset(range(1000, 1000 + 70_000))
    sections = {**KNOWN, **policy(ingress=Direction(rules=(allow(huge),)))}
    refused = world.enforcement.replace(sections)
    assert refused == {
        "policy/shop/b": "everything is refused to it and from it: its rules come to more than "
        "65536 entries of the kernel's"
    }
    with world.listen("b", B[4]) as server:
        assert world.attempt("a", server) == DENIED
        assert world.attempt("node", server) == ANSWERED
    with world.listen("a", A[4]) as server:
        assert world.attempt("b", server) == DENIED
        assert world.attempt("out", server) == ANSWERED
    world.enforce({**KNOWN, **policy(ingress=only(allow(A_ONLY)))})
    with world.listen("b", B[4]) as server:
        assert world.attempt("a", server) == ANSWERED


def test_a_policy_waits_until_there_is_room_for_it(
    world: PodWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones leave room for others."""
    monkeypatch.setattr(rulesets, "_FOR_SMALL", constants.POLICIES - 3000)
    large = [only(allow(frozenset({ID["b"], *range(at, at + 2000)}))) for at in (2000, 5000)]
    world.enforce({**KNOWN, **policy("a", large[0])})
    refused = world.enforcement.apply(policy("b", egress=large[1]))
    assert refused == {
        "policy/shop/b": "everything is refused to it and from it: its rules come to 2002 entries, "
        "and the kernel's maps have no room for it"
    }
    with world.listen("a", A[4]) as server, world.listen("b", B[4]) as at_b:
        assert world.attempt("b", server) == DENIED
        assert world.attempt("out", at_b) == DENIED
        # What is small is taken, of whomever.
        assert world.enforcement.apply(policy("b", egress=only(allow(A_ONLY)))) == {}
        assert world.attempt("b", server) == ANSWERED
        # What has waited is taken by itself.
        assert world.enforcement.apply(policy("b", egress=only(*large[1].rules, allow(A_ONLY))))
        assert world.attempt("b", server) == DENIED
        assert world.enforcement.apply({}, ["policy/shop/a"]) == {}
        assert world.attempt("b", server) == ANSWERED


def test_a_range_for_which_there_is_no_room_opens_nothing(
    world: PodWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither an exception nor a denial; rules for which it makes no difference go on."""
    outer, inner, other = _RANGES[4][0], _RANGES[4][1], "192.0.2.0/24"
    number = {one: FIRST_CIDR + at for at, one in enumerate((outer, inner, other))}
    section = {one: {f"cidr/{one}": CidrSection(one, number[one])} for one in number}
    for address in _WITHIN[4]:
        world.add_address("out", address)
    monkeypatch.setattr(settings, "MAX_RANGES", len(settings._ALWAYS) + 2)
    excepting = only(allow(frozenset({number[outer]})))
    everybody = only(allow(frozenset({*WORLD, *number.values()})))
    world.enforce({**KNOWN, **section[other], **section[outer], **policy("a", everybody)})
    refused = world.enforcement.apply({**section[inner], **policy("b", excepting)})
    assert set(refused) == {f"cidr/{inner}", "policy/shop/b"}
    assert "no room for all addresses that its rules name" in refused["policy/shop/b"]
    within, excepted = _WITHIN[4][:2]
    with world.listen("a", A[4]) as at_a, world.listen("b", B[4]) as at_b:
        assert [world.attempt("out", at_b, one) for one in (within, excepted)] == [DENIED] * 2
        assert [world.attempt("out", at_a, one) for one in (within, excepted)] == [ANSWERED] * 2
        # A denial of it as well.
        deny = Direction(rules=(allow(frozenset({number[inner]}), deny=True),))
        assert set(world.enforcement.apply(policy("b", deny))) == set(refused)
        assert world.attempt("out", at_b, excepted) == DENIED
        assert "policy/shop/b" not in world.enforcement.apply(policy("b", everybody))
        assert world.attempt("out", at_b, excepted) == ANSWERED
        # Once there is room, it is as it was written.
        assert world.enforcement.apply(policy("b", excepting), [f"cidr/{other}"]) == {}
        outcomes = [world.attempt("out", at_b, one) for one in (within, excepted)]
        assert outcomes == [ANSWERED, DENIED]
        # So it is where it takes the place of another.
        assert world.enforcement.apply(section[other], [f"cidr/{inner}"]) == {}
        assert world.attempt("out", at_b, excepted) == ANSWERED


def test_a_pod_for_which_there_is_no_room_is_closed(world: PodWorld) -> None:
    """The map of pods is full."""
    known = dict(KNOWN)
    workload = known.pop("workload/shop/b")
    world.enforce(known)
    world.enforcement.apply({})
    everything = PinnedMap(world.pin, "pods", Address, Pod)
    with contextlib.closing(everything), world.listen("b", B[4]) as server:
        taken = len(list(everything.items()))
        others = [Address.of(f"192.0.{n >> 8}.{n & 255}") for n in range(constants.PODS - taken)]
        for one in others:
            everything.put(one, Pod(0, 0, 0, 0, 0, 0))
        put = {"workload/shop/b": workload, **policy("a", egress=only(allow()))}
        refused = world.enforcement.apply(put)
        why = "everything is refused to it and from it: the kernel's maps have no room for it"
        assert refused == {"workload/shop/b": why}
        assert world.attempt("a", server) == DENIED
        assert world.attempt("out", server) == DENIED
        assert world.attempt("node", server) == ANSWERED
        for one in others:
            everything.remove(one)
        assert world.enforcement.apply({}) == {}
        assert world.attempt("out", server) == ANSWERED


def test_a_pod_of_which_there_is_no_room_to_say_who_it_is_is_closed(world: PodWorld) -> None:
    """The map of identities is full."""
    known = dict(KNOWN)
    workload = known.pop("workload/shop/b")
    world.enforce(known)
    world.enforcement.apply({})
    everything = PinnedMap(world.pin, "identities", Prefix, Identity)
    with contextlib.closing(everything), world.listen("b", B[4]) as server:
        free = constants.IDENTITIES - len(list(everything.items()))
        others = [Prefix(128, b"\xfd\x99" + bytes(10) + n.to_bytes(4, "big")) for n in range(free)]
        everything.put_all((one, Identity(0, 300, 0, 300, 0)) for one in others)
        # Its own policy would let everybody in, and a's names it.
        open_to_all = policy(ingress=only(allow()))
        of_a = policy("a", egress=Direction(rules=(allow(frozenset({ID["b"]}), deny=True),)))
        refused = world.enforcement.apply({"workload/shop/b": workload, **open_to_all, **of_a})
        assert refused.keys() == {"workload/shop/b", "policy/shop/a"}
        assert "No space left" in refused["workload/shop/b"]
        assert world.attempt("out", server) == DENIED
        assert world.attempt("a", server) == DENIED
        for one in others:
            everything.remove(one)
        assert world.enforcement.apply({}) == {}
        assert world.attempt("out", server) == ANSWERED
        assert world.attempt("a", server) == DENIED


@pytest.mark.parametrize("version", VERSIONS)
def test_the_api_server_on_a_node_is_not_the_node(world: PodWorld, version: int) -> None:
    """Its address is one of the node's, and has an identity of its own."""
    size = 32 if version == 4 else 128
    at = f"{LINK[version]}/{size}"
    allowed = policy(egress=only(allow(frozenset({FIRST_CIDR}))))
    with (
        world.listen("node", LINK[version]) as api_server,
        world.listen("node", NODE[version]) as node,
    ):
        world.enforce({**KNOWN, f"cidr/{at}": CidrSection(at, FIRST_CIDR), **allowed})
        assert world.attempt("b", api_server) == ANSWERED
        assert world.attempt("b", node) == DENIED
        world.enforce({**KNOWN, **policy(egress=only(allow(frozenset({Reserved.HOST}))))})
        assert world.attempt("b", api_server) == ANSWERED


@contextlib.contextmanager
def flood(world: PodWorld, where: str, server: socket.socket) -> Iterator[None]:
    """Datagrams, as many as can be, each other one from a socket that has sent nothing before."""
    address, done = server.getsockname(), threading.Event()
    own = PODS.get(where, OUT)[4]

    def send() -> None:
        with world.udp(where, own) as known:
            while not done.is_set():
                with world.udp(where, own) as new:
                    for sock in (known, new):
                        sock.sendto(b"no", address)

    with ThreadPoolExecutor() as pool:
        sending = pool.submit(send)
        try:
            yield
        finally:
            done.set()
        sending.result()


def test_no_packet_passes_between_two_policies(world: PodWorld) -> None:
    """Both let a reach b, and nobody elsewhere; each is a set of rules of its own."""
    one = policy(ingress=only(allow(A_ONLY), allow(WORLD, deny=True)))
    other = policy(ingress=only(allow(A_ONLY, PortRange("UDP"))))
    with world.udp("b", B[4]) as server, world.udp("a", A[4]) as a:
        world.enforce({**KNOWN, **one})
        with flood(world, "out", server):
            for number in range(200):
                assert world.enforcement.apply((one, other)[number % 2]) == {}
                world.pass_on(a, server, b"from a %d" % number)
        assert not arrived(server)


# What refuses that a reaches b before and after a change: sections, and which of them go.
_NEITHER = {
    # As which pod a is known, and its own rules.
    "labels": (
        {"workload/shop/a": (ID["a"], 302), "policy/shop/a": (NOTHING, only())},
        only(allow(frozenset({302}))),
    ),
    # Another pod has got the address.
    "address": (
        {"workload/shop/a": (ID["a"], None), "workload/shop/c": (None, 302)},
        Direction(rules=(allow(A_ONLY, deny=True), allow(frozenset({302}), deny=True))),
    ),
    # Another range is the smallest one that has it.
    "ranges": (
        {"cidr/10.7.0.0/24": (FIRST_CIDR, None), "cidr/10.7.0.2/32": (None, FIRST_CIDR + 1)},
        Direction(
            rules=tuple(allow(frozenset({one}), deny=True) for one in (FIRST_CIDR, FIRST_CIDR + 1))
        ),
    ),
    # Both ends' rules.
    "two pods": (
        {"policy/shop/a": (NOTHING, only()), "policy/shop/b": (only(), NOTHING)},
        None,
    ),
    "two pods, the other way round": (
        {"policy/shop/b": (NOTHING, only()), "policy/shop/a": (only(), NOTHING)},
        None,
    ),
}


@pytest.mark.parametrize("case", _NEITHER)
def test_no_packet_passes_that_is_refused_before_and_after(world: PodWorld, case: str) -> None:
    changes, ingress = _NEITHER[case]
    known = KNOWN["workload/shop/a"]

    def section(key: str, what: object) -> object:
        kind, _, name = key.partition("/")
        if kind == "cidr":
            return CidrSection(name, what)  # type: ignore[arg-type]
        name = name.removeprefix("shop/")
        if isinstance(what, int):
            return WorkloadSection("shop", name, known.addresses, "n1", local=True, identity=what)
        side = {"a": "egress", "b": "ingress"}[name]
        return policy(name, **{side: what})[key]  # type: ignore[arg-type]

    states = [
        {key: section(key, whats[i]) for key, whats in changes.items() if whats[i] is not None}
        for i in (0, 1)
    ]
    always = policy(ingress=ingress) if ingress is not None else {}
    world.enforce({**KNOWN, **always, **states[0]})  # type: ignore[dict-item]
    source = "out" if case == "ranges" else "a"
    with world.udp("b", B[4]) as server, flood(world, source, server):
        refused, number = world.counters()[Reason.POLICY_DENIED], 0
        while number < 1500 or world.counters()[Reason.POLICY_DENIED] < refused + 2000:
            number += 1
            put = states[number % 2]
            assert world.enforcement.apply(put, changes.keys() - put.keys()) == {}  # type: ignore[arg-type]
            assert not arrived(server), number


def test_a_flood_of_refusals_is_counted_and_not_all_told(world: PodWorld) -> None:
    world.enforce({**KNOWN, **policy(ingress=only())})
    with world.udp("b", B[4]) as server, world.udp("out", OUT[4]) as out:
        before, to = world.counters(), server.getsockname()
        for _ in range(20_000):
            out.sendto(b"again", to)
        after = world.counters()
        counted = {one: after[one] - before[one] for one in after}
        assert counted[Reason.POLICY_DENIED] > 19_000
        assert counted[Reason.UNTOLD] > 10_000


@pytest.mark.parametrize("version", VERSIONS)
def test_before_anything_is_told_nothing_passes(world: PodWorld, version: int) -> None:
    """The programs are loaded, and no agent has filled the maps."""
    unjudged = ("ECONNREFUSED", {"UNJUDGED": 1, "RESET": 1})
    generation = PinnedMap(world.pin, "generation", Number, Number)
    with (
        contextlib.closing(generation),
        world.listen("b", B[version]) as server,
        world.listen("out", OUT[version]) as elsewhere,
    ):
        world.enforce({})
        generation.put(Number(0), Number(0))
        assert world.attempt("a", server) == unjudged
        assert world.attempt("out", server) == unjudged
        assert world.attempt("b", elsewhere) == unjudged
        assert world.attempt("node", server) == ANSWERED
        world.enforce({})
        assert world.attempt("out", server) == ANSWERED


def test_what_an_earlier_agent_left_is_in_force_until_it_is_known_better(world: PodWorld) -> None:
    world.enforce({**KNOWN, **policy(ingress=only(allow(A_ONLY)))})
    later = Enforcement(world.pin, "n1")
    with contextlib.closing(later), world.listen("b", B[4]) as server:
        assert world.attempt("a", server) == ANSWERED
        assert world.attempt("out", server) == DENIED
        assert later.replace({**KNOWN, **policy(ingress=only(allow(WORLD)))}) == {}
        assert world.attempt("a", server) == DENIED
        assert world.attempt("out", server) == ANSWERED
        # Without policies nothing of them stays.
        later.replace(KNOWN)
        later.apply({})
        policies = PinnedMap(world.pin, "policies", PolicyKey, Policy)
        with contextlib.closing(policies):
            assert list(policies.items()) == []
    # What the first one knows is out of date.
    world.enforce(KNOWN)
    world.enforcement.apply({})


def test_what_a_killed_agent_was_about_to_change_never_comes_into_force(
    world: PodWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended when all was written but the number from which on it counts."""
    outer, inner = _RANGES[4][:2]
    number = {one: FIRST_CIDR + at for at, one in enumerate((outer, inner))}
    ranges = {f"cidr/{one}": CidrSection(one, number[one]) for one in number}
    within, excepted = _WITHIN[4][:2]
    for address in (within, excepted):
        world.add_address("out", address)
    known = KNOWN["workload/shop/a"]
    strict = {"workload/shop/a": msgspec.structs.replace(known, mtls="STRICT")}
    closed = {
        **KNOWN,
        **ranges,
        **strict,
        **policy(ingress=only(allow(frozenset({number[outer]})))),
    }
    world.enforce(closed)
    killed = Enforcement(world.pin, "n1")
    with contextlib.closing(killed), monkeypatch.context() as patch:
        assert killed.replace(closed) == {}
        patch.setattr(settings.Generation, "begin", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            killed.apply({"workload/shop/a": known}, [f"cidr/{inner}"])
    world.enforcement.close()
    world.enforcement = Enforcement(world.pin, "n1")
    with world.listen("a", A[4]) as at_a, world.listen("b", B[4]) as at_b:
        for _ in range(2):
            world.enforce(closed)
            assert world.attempt("out", at_b, within) == ANSWERED
            assert world.attempt("out", at_b, excepted) == DENIED
            assert world.attempt("out", at_a).counted["MTLS_REQUIRED"] == 1


def test_pods_with_the_same_rules_share_them(world: PodWorld) -> None:
    ingress = only(allow(A_ONLY, tcp(80)))
    policies = PinnedMap(world.pin, "policies", PolicyKey, Policy)
    with contextlib.closing(policies):
        world.enforce({**KNOWN, **policy("a", ingress), **policy("b", ingress)})
        world.enforcement.apply({})
        assert len({key.set for key, _ in policies.items()}) == 1
        world.enforcement.apply({}, ["policy/shop/a"])
        world.enforcement.apply({})
        assert len({key.set for key, _ in policies.items()}) == 1
        world.enforcement.apply({}, ["policy/shop/b"])
        world.enforcement.apply({})
        assert list(policies.items()) == []


# --- what has no ports ---------------------------------------------------------------------------


class Pinger:
    """Echo requests from a namespace."""

    def __init__(self, world: PodWorld, where: str, address: str) -> None:
        self.version = 6 if ":" in address else 4
        protocol = socket.IPPROTO_ICMPV6 if self.version == 6 else socket.IPPROTO_ICMP
        family = socket.AF_INET6 if self.version == 6 else socket.AF_INET
        with world.inside(where):
            self.socket = socket.socket(family, socket.SOCK_RAW, protocol)
        self.socket.bind((address, 0))
        self.socket.settimeout(5)

    def ask(self, destination: str, number: int = 77) -> None:
        kind = 128 if self.version == 6 else 8
        packet = struct.pack("!BBHHH", kind, 0, 0, number, 1)
        if self.version == 4:
            packet = packet[:2] + struct.pack("!H", checksum(packet)) + packet[4:]
        self.socket.sendto(packet, (destination, 0))

    def answer(self, number: int = 77) -> bool:
        """Until it comes."""
        reply = 129 if self.version == 6 else 0
        while True:
            data = self.socket.recv(2000)
            data = data[20:] if self.version == 4 else data
            if data[0] == reply and data[4:6] == struct.pack("!H", number):
                return True


@pytest.mark.parametrize("version", VERSIONS)
def test_pings(world: PodWorld, version: int) -> None:
    protocol = "ICMPv6" if version == 6 else "ICMP"
    request = PortRange(protocol, 128 if version == 6 else 8, 128 if version == 6 else 8)
    out, b = Pinger(world, "out", OUT[version]), Pinger(world, "b", B[version])
    node = Pinger(world, "node", NODE[version])
    with out.socket, b.socket, node.socket:
        world.enforce({**KNOWN, **policy(ingress=only(allow(None, tcp(80))))})
        before = world.counters()
        out.ask(B[version])
        world.await_counted(before, "POLICY_DENIED")
        # Its own are answered, and the node's.
        b.ask(OUT[version])
        assert b.answer()
        node.ask(B[version])
        assert node.answer()
        world.enforce({**KNOWN, **policy(ingress=only(allow(None, request)), egress=only())})
        out.ask(B[version])
        assert out.answer()
        before = world.counters()
        b.ask(OUT[version], 78)
        world.await_counted(before, "POLICY_DENIED")
