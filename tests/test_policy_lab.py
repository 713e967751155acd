"""Policies in a lab: the matrix and the churn of `make matrix`, short; and attempts to get past
them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from bpf_world import needs_bpf
from lab_world import needs_root
from matrix.churn import Churn
from matrix.reach import Matrix
from matrix.reuse import windows_s
from matrix.scene import Scene, scene
from matrix.sets import generate
from policy_model import Manifest

pytestmark = [needs_root, needs_bpf]

ATTACK = Path(__file__).with_name("matrix") / "attack.py"

DENY_ALL = {
    "kind": "CiliumClusterwideNetworkPolicy",
    "metadata": {"name": "nothing"},
    "spec": {"endpointSelector": {}, "ingress": [{}], "egress": [{}]},
}
SETS = 4


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("m")) as lab:
        yield lab


@pytest.fixture(scope="module")
def matrix(lab: Scene) -> Matrix:
    return Matrix(lab)


@pytest.fixture(scope="module")
def sets() -> list[list[Manifest]]:
    return generate(1, SETS)


@pytest.mark.parametrize("number", range(SETS))
def test_who_reaches_whom_is_as_the_model_says(
    matrix: Matrix, sets: list[list[Manifest]], number: int
) -> None:
    found = matrix.run(sets[number])
    assert (found.wrong, matrix.late()) == ([], [])
    assert found.allowed > 100
    assert found.denied > 100


def test_disagreement_is_seen(matrix: Matrix) -> None:
    """What is in force, and another policy for the model: both ways round."""
    everything = matrix.run([])
    assert (everything.denied, everything.wrong) == (0, [])
    found = matrix.probe([DENY_ALL])
    # Each is answered, and has arrived.
    assert len({*found.wrong, *matrix.late()}) == 2 * found.denied


def test_nothing_arrives_that_is_not_allowed_while_policies_and_pods_change(lab: Scene) -> None:
    evidence = Churn(lab, 1).run(seconds=8, rate=50)
    assert evidence.wrong == []
    assert evidence.changes > 100
    assert 1000 < evidence.arrived < evidence.sent
    assert evidence.elsewhen > 100


def test_the_other_node_hears_of_an_address_that_is_given_out_again(lab: Scene) -> None:
    assert len(windows_s(lab, 3)) == 3


# --- attempts to get past it ----------------------------------------------------------------------

# Pods with app z ask a/p0 for what is public, and nobody asks it for anything else; connections to
# another port of its, and datagrams, are theirs as well.
VICTIM = "a/p0"
GUARD: Manifest = {
    "kind": "CiliumNetworkPolicy",
    "metadata": {"name": "guard", "namespace": "a"},
    "spec": {
        "endpointSelector": {"matchLabels": {"app": "x"}},
        "ingress": [
            {
                "fromEndpoints": [
                    {
                        "matchLabels": {"app": "z"},
                        "matchExpressions": [
                            {"key": "io.kubernetes.pod.namespace", "operator": "Exists"}
                        ],
                    }
                ],
                "toPorts": [
                    {
                        "ports": [{"port": "8080", "protocol": "TCP"}],
                        "rules": {"http": [{"method": "GET", "path": "/public"}]},
                    },
                    {"ports": [{"port": "9090", "protocol": "TCP"}, {"port": "53"}]},
                ],
            }
        ],
    },
}


@pytest.fixture
def guarded(lab: Scene) -> Iterator[Scene]:
    lab.enforce([GUARD])
    lab.seen(VICTIM)
    yield lab
    lab.enforce([])


def attack(lab: Scene, attacker: str, friend: str) -> dict[str, str]:
    victim = lab.place(VICTIM)
    node = lab.place(f"node/{victim.node}")
    own, other = lab.place(attacker), lab.place(friend)
    addresses = (own.addresses[0], *victim.addresses, other.addresses[0], node.addresses[0])
    done = lab.lab.run(attacker, "python3", str(ATTACK), *addresses)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.parametrize("attacker", ["b/p1", "a/p1"])
def test_nothing_of_an_attacker_arrives(guarded: Scene, attacker: str) -> None:
    """One on the same node, one on the other; the policy names neither."""
    found = attack(guarded, attacker, friend="c/p2")
    assert [what for what, outcome in found.items() if outcome in ("answered", "200")] == []
    # Connections are refused at once.
    assert {found[what] for what in found if what.startswith("tcp 10")} <= {
        "EPERM", "ECONNREFUSED", "ECONNRESET", "closed", "400",
    }  # fmt: skip
    assert guarded.seen(VICTIM) == []


@pytest.mark.parametrize("friend", ["c/p2", "b/p2"])
def test_who_is_let_in_gets_no_further_than_that(guarded: Scene, friend: str) -> None:
    found = attack(guarded, friend, friend)
    v4, v6 = guarded.place(VICTIM).addresses
    for address in (v4, v6, f"::ffff:{v4}"):
        assert found[f"tcp {address} 80"] != "answered"
        assert found[f"tcp {address} 8080"] in ("400", "closed", "ECONNRESET")
        assert found[f"tcp {address} 9090"] == "answered"
        assert found[f"http {address} /public"] == "200"
        assert found[f"http {address} /admin"] == "403"
    assert not [what for what, outcome in found.items() if "proxy" in what and outcome == "200"]
    heads = [text for text in guarded.seen(VICTIM) if "HTTP" in text]
    assert {text.split()[1] for text in heads} == {"/public?evil"}
