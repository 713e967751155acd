"""STRICT at a pod's interface: what is not by mutual TLS comes from this node, or not at all."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest
from bpf_world import needs_bpf
from pod_policies import KNOWN, SPIFFE, SVIDS
from pod_world import NODE, OUT, TIMEOUT_S, A, B, PodWorld, arrived, pod_world

from mesh.model.nodeconfig import SvidSection

pytestmark = needs_bpf

VERSIONS = (4, 6)
REFUSED = ("ECONNREFUSED", {"MTLS_REQUIRED": 1, "RESET": 1})
ANSWERED = ("answered", {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodWorld]:
    with pod_world(tmp_path_factory.mktemp("strict")) as world:
        yield world


def sections(**of_b: object) -> dict[str, object]:
    strict = {
        key: msgspec.structs.replace(KNOWN[key], **changes)
        for key, changes in (("workload/shop/a", {"mtls": "STRICT"}), ("workload/shop/b", of_b))
    }
    return {**KNOWN, **SVIDS, **strict}


@pytest.mark.parametrize("version", VERSIONS)
def test_who_reaches_a_strict_port(world: PodWorld, version: int) -> None:
    world.enforce(sections(mtls="STRICT"))
    with world.listen("b", B[version]) as server:
        assert world.attempt("out", server) == REFUSED
        # Another pod of this node; the node itself, its proxies and probes.
        assert world.attempt("a", server) == ANSWERED
        assert world.attempt("node", server) == ANSWERED
        assert world.attempt("node", server, NODE[version]) == ANSWERED
    # What the pod opens itself is answered.
    with world.listen("out", OUT[version]) as server:
        assert world.attempt("b", server) == ANSWERED
    world.enforce(sections(mtls="PERMISSIVE"))
    with world.listen("b", B[version]) as server:
        assert world.attempt("out", server) == ANSWERED


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_that_nobody_has_told_of_may_be_strict(world: PodWorld, version: int) -> None:
    """Where there are identities, even before there is any, and when all have expired."""
    known = {key: one for key, one in KNOWN.items() if key != "workload/shop/b"}
    world.replace_agent(mtls=True)
    world.enforce(known)
    with world.listen("b", B[version]) as server:
        assert world.attempt("out", server) == REFUSED
        world.enforce({**known, **SVIDS})
        for where in ("out", "a"):
            assert world.attempt(where, server) == REFUSED
        assert world.attempt("node", server) == ANSWERED
        assert world.enforcement.apply({}, SVIDS) == {}
        assert world.attempt("out", server) == REFUSED
        assert world.enforcement.apply({"workload/shop/b": KNOWN["workload/shop/b"]}) == {}
        assert world.attempt("out", server) == ANSWERED
        world.replace_agent(mtls=False)
        world.enforce(known)
        assert world.attempt("out", server) == ANSWERED


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("lacking", SPIFFE.values())
def test_pods_of_one_node_need_valid_svids_both(
    world: PodWorld, version: int, lacking: str
) -> None:
    """One that has expired is no section any more."""
    world.enforce(sections(mtls="STRICT"))
    with world.listen("b", B[version]) as server:
        assert world.attempt("a", server) == ANSWERED
        assert world.enforcement.apply({}, (f"svid/{lacking}",)) == {}
        assert world.attempt("a", server) == REFUSED
        assert world.attempt("node", server) == ANSWERED
        # An SVID of somebody else is of no use.
        other = SvidSection("spiffe://cluster.local/ns/shop/sa/c", "", "", 1 << 32)
        assert world.enforcement.apply({"svid/" + other.spiffe_id: other}) == {}
        assert world.attempt("a", server) == REFUSED
        assert world.enforcement.apply({f"svid/{lacking}": SVIDS[f"svid/{lacking}"]}) == {}
        assert world.attempt("a", server) == ANSWERED


def send_for_ever(client: socket.socket, deadline: float) -> None:
    """Now and then, until somebody says something."""
    while not select.select([client], [], [], 0.05)[0]:
        assert time.time() < deadline
        client.send(b"x")
    client.recv(1)


def test_an_svid_proves_no_longer_than_it_is_valid(world: PodWorld) -> None:
    """Though nobody says so: who should may hang. Also on connections that are open."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(world.listen("b", B[version])) for version in VERSIONS]
        soon = SvidSection(SPIFFE["a"], "", "", int(time.time()) + 2)
        world.enforce({**sections(mtls="STRICT"), "svid/" + SPIFFE["a"]: soon})
        clients = [stack.enter_context(world.connection("a", one))[0] for one in servers]
        for client in clients:
            with pytest.raises(ConnectionResetError):
                send_for_ever(client, soon.not_after + TIMEOUT_S)
        assert time.time() >= soon.not_after
        assert [world.attempt("a", one) for one in servers] == [REFUSED, REFUSED]
        world.enforce(sections(mtls="STRICT"))
        assert [world.attempt("a", one) for one in servers] == [ANSWERED, ANSWERED]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("mode", "ports", "outcome"),
    [
        ("STRICT", "DISABLE", ANSWERED),
        ("STRICT", "PERMISSIVE", ANSWERED),
        ("STRICT", "STRICT", REFUSED),
        ("PERMISSIVE", "STRICT", REFUSED),
        ("DISABLE", "STRICT", REFUSED),
        ("DISABLE", "PERMISSIVE", ANSWERED),
    ],
)
def test_a_port_has_its_own_mode(
    world: PodWorld, version: int, mode: str, ports: str, outcome: object
) -> None:
    with world.listen("b", B[version]) as server, world.listen("b", B[version]) as other:
        port = server.getsockname()[1]
        world.enforce(sections(mtls=mode, mtls_ports={port: ports}))
        assert world.attempt("out", server) == outcome
        assert world.attempt("out", other) == (REFUSED if mode == "STRICT" else ANSWERED)


@pytest.mark.parametrize("version", VERSIONS)
def test_datagrams_to_strict_ports(world: PodWorld, version: int) -> None:
    world.enforce(sections(mtls="STRICT"))
    with (
        world.udp("b", B[version]) as server,
        world.udp("out", OUT[version]) as out,
        world.udp("a", A[version]) as neighbour,
    ):
        before = world.counters()
        out.sendto(b"from elsewhere", server.getsockname()[:2])
        world.await_counted(before, "MTLS_REQUIRED")
        world.pass_on(neighbour, server, b"from a")
        # What the pod asks is answered, and only by whom it asked.
        world.pass_on(server, out, b"from b")
        with world.udp("out", OUT[version]) as other:
            before = world.counters()
            other.sendto(b"unasked", server.getsockname()[:2])
            world.await_counted(before, "MTLS_REQUIRED")
        assert not arrived(server)
        # As soon as it is allowed, what was refused before is not.
        world.enforce(sections())
        world.pass_on(out, server, b"now")


@pytest.mark.parametrize("version", VERSIONS)
def test_nobody_elsewhere_passes_for_one_of_this_node(world: PodWorld, version: int) -> None:
    world.enforce(sections(mtls="STRICT"))
    forged = {"FORGED": A[version], "MTLS_REQUIRED": NODE[version]}
    with world.udp("b", B[version]) as server:
        port = server.getsockname()[1]
        for reason, source in forged.items():
            world.add_address("out", source)
            with world.udp("out", source) as forger:
                if version == 4 and reason == "MTLS_REQUIRED":
                    # Linux itself takes no packet from outside in the node's own name.
                    continue
                before = world.counters()
                forger.sendto(b"in whose name?", (B[version], port))
                world.await_counted(before, reason)
        assert not arrived(server)
        # Where a flow of that name is there, it is not that of who sends from elsewhere.
        with world.udp("node", NODE[version], 7000) as node:
            world.pass_on(node, server, b"the node")
        if version == 6:
            with world.udp("out", NODE[version], 7000) as forger:
                before = world.counters()
                forger.sendto(b"not the node", (B[version], port))
                world.await_counted(before, "MTLS_REQUIRED")
            assert not arrived(server)
