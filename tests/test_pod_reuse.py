"""Pods that nobody has told of yet: new ones, and those that have got the address of one that is
gone. They have no rights of anybody's, and what policies deny by default they may not do either."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from bpf_world import needs_bpf
from pod_policies import A_ONLY, ID, KNOWN, NOTHING, VERSIONS, allow, only, policy
from pod_world import OUT, A, B, PodWorld, arrived, pod_world

from mesh.lab import cni
from mesh.model.identity import Reserved
from mesh.model.nodeconfig import WorkloadSection
from mesh.model.policyconfig import Direction, PolicySection

pytestmark = needs_bpf

DENIED = ("ECONNREFUSED", {"POLICY_DENIED": 1, "RESET": 1})
ANSWERED = ("answered", {})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PodWorld]:
    with pod_world(tmp_path_factory.mktemp("reuse")) as world:
        yield world


def unknown(ingress: Direction = NOTHING, egress: Direction = NOTHING) -> dict[str, object]:
    return {"policy//": PolicySection("", "", Reserved.INIT, ("::",), ingress, egress)}


def pod(name: str, identity: int, uid: str) -> dict[str, WorkloadSection]:
    """One with a's addresses."""
    known = KNOWN["workload/shop/a"]
    assert isinstance(known, WorkloadSection)
    made = msgspec.structs.replace(known, name=name, identity=identity, uid=uid)
    return {f"workload/shop/{name}": made}


def replace(world: PodWorld, old: str, new: str) -> None:
    """A pod with a's addresses goes, and another one gets them at once."""
    config = world.configs["a"]
    with world.inside("node"):
        cni.delete(old, "eth0", config)
        cni.add(new, str(world.names["a"]), "eth0", config)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pod_that_is_not_known_is_denied_what_policies_deny(
    world: PodWorld, version: int
) -> None:
    others = {key: one for key, one in KNOWN.items() if key != "workload/shop/a"}
    for section, may_enter, may_leave in (
        ({}, True, True),
        (unknown(ingress=only()), False, True),
        (unknown(egress=only()), True, False),
    ):
        world.enforce({**others, **section})  # type: ignore[dict-item]
        with world.listen("a", A[version]) as server:
            assert world.attempt("out", server) == (ANSWERED if may_enter else DENIED)
            assert world.attempt("node", server) == ANSWERED
        with world.listen("out", OUT[version]) as server:
            assert world.attempt("a", server) == (ANSWERED if may_leave else DENIED)
        # Who is known is not meant.
        with world.listen("b", B[version]) as server:
            assert world.attempt("out", server) == ANSWERED


@pytest.mark.parametrize("identity", [302, ID["a"]])
def test_an_address_that_is_given_out_again_brings_no_rights(
    world: PodWorld, identity: int
) -> None:
    """To a pod with other labels, and to one with the same."""
    of_b = policy(ingress=only(allow(A_ONLY)))
    of_a = policy("a", egress=Direction(rules=(allow(),)))
    closed = unknown(egress=only(allow(frozenset({ID["b"]}))))
    world.enforce({**KNOWN, **of_b, **of_a, **closed})  # type: ignore[dict-item]
    with world.listen("b", B[4]) as b, world.listen("out", OUT[4]) as out:
        assert world.attempt("a", b) == ANSWERED
        assert world.attempt("a", out) == ANSWERED
        replace(world, "a", "new")
        # Nothing else has changed: the agent does not know yet. Neither what b lets in a for, nor
        # what a's own rules let it do.
        assert world.attempt("a", b) == DENIED
        assert world.attempt("a", out) == DENIED
        world.enforcement.apply({**pod("new", identity, "2"), **of_b}, ["workload/shop/a"])
        assert world.attempt("a", b) == (ANSWERED if identity == ID["a"] else DENIED)
        assert world.attempt("a", out) == ANSWERED
    # The same pod once more, as far as names and labels can tell.
    with world.listen("b", B[4]) as b:
        world.enforce({**KNOWN, **of_b, **closed})  # type: ignore[dict-item]
        replace(world, "new", "a")
        assert world.attempt("a", b) == DENIED
        world.enforcement.apply(pod("a", ID["a"], "3"))
        assert world.attempt("a", b) == ANSWERED


def test_nor_do_flows_of_the_pod_that_had_it(world: PodWorld) -> None:
    """Datagrams with the same ports: there is nothing in them that says that they are new."""
    of_b = policy(ingress=only(allow(A_ONLY)))
    closed = unknown(egress=only(allow(frozenset({ID["b"]}))))
    world.enforce({**KNOWN, **of_b, **closed})  # type: ignore[dict-item]
    with world.udp("b", B[4], 7041) as b, world.udp("out", OUT[4], 7042) as out:
        with world.udp("a", A[4], 7040) as a:
            world.pass_on(a, b, b"old")
            world.pass_on(a, out, b"old")
        replace(world, "a", "new")
        with world.udp("a", A[4], 7040) as a:
            for server in (b, out):
                before = world.counters()
                a.sendto(b"new", server.getsockname())
                world.await_counted(before, "POLICY_DENIED")
                assert not arrived(server)
        replace(world, "new", "a")
