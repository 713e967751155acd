"""Choice among endpoints and passive ejection; time is an argument."""

from __future__ import annotations

from collections import Counter

import pytest

from l7proxy.balance import Balancer, endpoint_id
from mesh.model.nodeconfig import Endpoint, Settings

SETTINGS = Settings(ejection_failures=3, ejection_time_s=10.0)
ROUND_ROBIN = Settings(balancer="round-robin")


def endpoints(count: int) -> list[Endpoint]:
    return [Endpoint("10.0.0.1", port) for port in range(1, count + 1)]


def balancer(count: int) -> Balancer:
    made = Balancer()
    made.update(endpoints(count))
    return made


def picked(made: Balancer, now: float, times: int, settings: Settings = SETTINGS) -> set[str]:
    return {made.pick(now, settings).id for _ in range(times)}


def eject(made: Balancer, member_id: str, now: float = 0.0) -> bool:
    member = made.members[member_id]
    return [made.failed(member, now, SETTINGS) for _ in range(3)][-1]


def test_ids():
    assert endpoint_id(Endpoint("10.0.0.1", 80)) == "10.0.0.1:80"
    assert endpoint_id(Endpoint("fd00::1", 80)) == "[fd00::1]:80"


def test_none_without_members():
    assert Balancer().pick(0.0, SETTINGS) is None


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_round_robin_takes_turns(count):
    made = balancer(count)
    counts = Counter(made.pick(0.0, ROUND_ROBIN).id for _ in range(count * 7))
    assert set(counts.values()) == {7}
    assert len(counts) == count


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_least_loaded_of_few(count):
    made = balancer(count)
    for member in made.members.values():
        member.load = 5
    made.members["10.0.0.1:2"].load = 4
    assert picked(made, 0.0, 20) == {"10.0.0.1:2"}


@pytest.mark.parametrize("count", [2, 3, 8, 9, 50])
def test_load_evens_out(count):
    made = balancer(count)
    for _ in range(count * 20):
        made.pick(0.0, SETTINGS).load += 1
    loads = [member.load for member in made.members.values()]
    assert max(loads) - min(loads) <= (1 if count <= 8 else 10)


def test_of_many_the_most_loaded_is_never_taken_when_there_is_a_choice():
    made = balancer(20)
    made.members["10.0.0.1:7"].load = 1
    assert "10.0.0.1:7" not in picked(made, 0.0, 500)


def test_avoided_come_last_and_tried_never():
    made = balancer(3)
    avoid = {"10.0.0.1:1", "10.0.0.1:2"}
    assert made.pick(0.0, SETTINGS, avoid=avoid).id == "10.0.0.1:3"
    assert made.pick(0.0, SETTINGS, avoid=avoid, tried={"10.0.0.1:3"}).id in avoid
    assert made.pick(0.0, SETTINGS, tried=set(made.members)) is None


def test_preference_gives_way_to_health_and_avoidance():
    made = balancer(3)
    assert {made.pick(0.0, SETTINGS, prefer="10.0.0.1:2").id for _ in range(9)} == {"10.0.0.1:2"}
    assert made.pick(0.0, SETTINGS, prefer="10.0.0.1:2", avoid={"10.0.0.1:2"}).id != "10.0.0.1:2"
    assert made.pick(0.0, SETTINGS, prefer="10.0.0.9:9") is not None
    eject(made, "10.0.0.1:2")
    assert made.pick(1.0, SETTINGS, prefer="10.0.0.1:2").id != "10.0.0.1:2"


def test_only_failures_in_a_row_eject():
    made = balancer(2)
    member = made.members["10.0.0.1:1"]
    for _ in range(5):
        assert not made.failed(member, 0.0, SETTINGS)
        assert not made.failed(member, 0.0, SETTINGS)
        member.failures = 0  # as a success leaves it (upstream.Lease)
    assert eject(made, "10.0.0.1:1")
    assert picked(made, 9.9, 10) == {"10.0.0.1:2"}


def test_every_ejection_lasts_longer_up_to_a_cap_and_time_forgives():
    made = balancer(2)
    now = 0.0
    for lasts in (10, 20, 30):
        assert eject(made, "10.0.0.1:1", now)
        assert picked(made, now + lasts - 0.1, 10) == {"10.0.0.1:2"}
        now += lasts
        assert len(picked(made, now, 10)) == 2
    for _ in range(40):
        assert eject(made, "10.0.0.1:1", now)
        now += 300
        assert len(picked(made, now, 10)) == 2
    now += 300
    assert eject(made, "10.0.0.1:1", now)
    assert len(picked(made, now + 10, 10)) == 2


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_at_most_half_is_ejected(count, most):
    made = balancer(count)
    ejected = sum(eject(made, member) for member in list(made.members))
    assert ejected == most == len(made.ejected)
    assert len(picked(made, 1.0, 50)) == count - most


def test_with_only_ejected_ones_left_they_serve():
    made = balancer(2)
    eject(made, "10.0.0.1:1")
    made.update(endpoints(1))
    assert picked(made, 1.0, 3) == {"10.0.0.1:1"}


def test_with_all_healthy_ones_tried_the_ejected_are():
    made = balancer(2)
    eject(made, "10.0.0.1:1")
    assert made.pick(1.0, SETTINGS, tried={"10.0.0.1:2"}).id == "10.0.0.1:1"


def test_members_that_stay_keep_what_is_known_of_them():
    made = balancer(3)
    made.members["10.0.0.1:2"].load = 7
    eject(made, "10.0.0.1:3")
    left = made.update(endpoints(4)[1:])
    assert [member.id for member in left] == ["10.0.0.1:1"]
    assert made.members["10.0.0.1:2"].load == 7
    assert picked(made, 1.0, 30) == {"10.0.0.1:4"}
    assert not made.failed(left[0], 0.0, SETTINGS)
