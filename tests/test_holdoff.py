"""When responses that do not pass by the proxy are not tried any more, and tried again."""

from __future__ import annotations

from l7proxy.holdoff import IN_A_ROW, PAUSE_S, HoldOff


def test_only_failures_in_a_row_pause_and_only_for_a_while():
    now = [100.0]
    own = HoldOff(lambda: now[0])
    for _ in range(3):
        assert not any(own.failed("a") for _ in range(IN_A_ROW - 1))
        own.passed("a")
    assert not any(own.failed("a") for _ in range(IN_A_ROW - 1))
    assert own.left("a") == 0
    assert own.failed("a")
    for passed in (0.0, PAUSE_S - 0.5):
        now[0] = 100 + passed
        assert own.left("a") == PAUSE_S - passed
        assert own.left("b") == 0
        assert not own.failed("a")  # it was under way; the pause is as long as it was
    now[0] = 100 + PAUSE_S
    assert own.left("a") == 0
    assert own.failed("a")  # one is enough
    now[0] += PAUSE_S
    own.passed("a")
    assert not own.failed("a")


def test_what_is_known_is_bounded():
    own = HoldOff(lambda: 0.0)
    for number in range(10_000):
        assert not own.failed(number)
    assert not any(own.failed(9_999) for _ in range(IN_A_ROW - 2))
    assert own.failed(9_999)
    assert not any(own.failed(0) for _ in range(IN_A_ROW - 1))
