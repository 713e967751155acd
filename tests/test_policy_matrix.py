"""The matrix and the churn of `make matrix`, short; and that they see what they are to see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bpf_world import needs_bpf
from lab_world import needs_root
from matrix.churn import Churn
from matrix.reach import Matrix
from matrix.scene import Scene, scene
from matrix.sets import generate
from policy_model import Manifest

pytestmark = [needs_root, needs_bpf]

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
    assert len(found.wrong) == 2 * found.denied


def test_nothing_arrives_that_is_not_allowed_while_policies_and_pods_change(lab: Scene) -> None:
    evidence = Churn(lab, 1).run(seconds=8, rate=50)
    assert evidence.wrong == []
    assert evidence.changes > 100
    assert 1000 < evidence.arrived < evidence.sent
    assert evidence.elsewhen > 100
